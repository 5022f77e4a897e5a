"""Notes where the package makes the host wait for the device, as it would on a GPU; it works on any device."""

from __future__ import annotations

import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_tspipe
from lightning_tspipe.channel import Line
from lightning_tspipe.logrelay import Recorder

PACKAGE, TORCH = (f"{Path(str(module.__file__)).parent}/" for module in (lightning_tspipe, torch))
CALLS = {torch.tensor, torch.as_tensor, Tensor.new_tensor, Tensor.cpu, Tensor.numpy, Tensor.tolist}
OPERATIONS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Watch(L.Callback):
    """Watches some steps.

    Args:
        first, last: the first batch that is watched, and the first one after it that is not.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.waits: list[str] = []
        self.allowed: list[str] = []
        self.modes = ExitStack()

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.modes.enter_context(_Calls(self))
            self.modes.enter_context(_Operations(self))
        if batch_idx == self.last:
            self.modes.close()

    def note(self, name: str) -> None:
        """The call is the package's if its innermost frame outside of torch and of this file is."""
        for frame, line in traceback.walk_stack(sys._getframe(1)):
            holder, file = frame.f_locals.get("self"), frame.f_code.co_filename
            if file.startswith(TORCH) or file == __file__:
                continue
            if file.startswith(PACKAGE):
                # a line carries what the host alone knows; a number that `loss` logs becomes a tensor of the host
                fine = isinstance(holder, Line) or (isinstance(holder, Recorder) and name == "tensor")
                (self.allowed if fine else self.waits).append(f"{name} at {Path(file).name}:{line}")
            return


class _Calls(TorchFunctionMode):
    """What Python code calls; a move to a device must not be waited for."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        moves = func is Tensor.to and any(isinstance(v, torch.device | str) for v in (*args, *options.values()))
        if func in CALLS or (moves and not options.get("non_blocking")):
            self.watch.note(func.__name__)
        return func(*args, **options)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What torch itself runs, whoever calls it: `float(tensor)`, `if tensor:`, an index by a mask."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATIONS:
            self.watch.note(func.__name__)
        return func(*args, **(kwargs or {}))

"""A forward that keeps for its backward no outputs which are quickly computed again from what it keeps anyway.

An activation function keeps its input, and the matrix product behind it the function's output. The second is let go of,
and the function runs again when the product's weights want their gradient. Of a transformer's block that is a third of
what it keeps, for a few per cent of its time. Source: the output-discarding recomputation of Megatron-LM's
``--recompute-granularity selective`` (Korthikanti et al., "Reducing activation recomputation in large transformer
models", MLSys 2023, https://arxiv.org/abs/2205.05198).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_tspipe.recording import memory_of

Recompute = bool | Literal["selective"]  # of the strategy
# elementwise, or nearly so; autograd keeps their first argument, and none draws random numbers
CHEAP = frozenset((F.gelu, F.silu, F.mish, F.elu, F.leaky_relu, F.hardswish, F.layer_norm, F.group_norm))


class Kept(NamedTuple):
    """A tensor that is kept, and how often it had been written to."""

    tensor: Tensor
    version: int

    def get(self) -> Tensor:
        """The tensor; RuntimeError if it has been written to, as autograd has it."""
        if self.tensor._version != self.version:  # noqa: SLF001
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(self.tensor.shape)} is at version {self.tensor._version}; expected version "  # noqa: SLF001
                f"{self.version} instead"
            )
        return self.tensor


class Again(NamedTuple):
    """A tensor that is computed again."""

    function: Callable[..., Tensor]
    first: Kept | Again
    others: tuple[Any, ...]
    options: dict[str, Any]

    def get(self) -> Tensor:
        """The function's output, bit for bit."""
        with torch.no_grad():
            return self.function(self.first.get(), *self.others, **self.options)


class View(NamedTuple):
    """What lies in the memory of a tensor that is computed again."""

    of: Again
    layout: tuple[Any, ...]

    def get(self) -> Tensor:
        """The view."""
        return self.of.get().as_strided(*self.layout)


def unpack(packed: Kept | View) -> Tensor:
    """What a forward within `Selective` has packed."""
    return packed.get()


class Selective(AbstractContextManager[None]):
    """What autograd keeps within it are no outputs of cheap functions.

    Args:
        note: sees each tensor that is kept, and gives what autograd shall keep in its place.
    """

    def __init__(self, note: Callable[[Tensor], Tensor] = Tensor.detach) -> None:
        self._note = note
        self._made: dict[int, tuple[weakref.ref[Tensor], int, Again]] = {}  # by memory
        self._watch = _Watch(self)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, unpack)

    def __enter__(self) -> None:
        self._watch.__enter__()  # type: ignore[no-untyped-call]
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._watch.__exit__(*error)  # type: ignore[no-untyped-call]
        self._made.clear()

    def made(self, output: Tensor, function: Callable[..., Tensor], args: Any, options: dict[str, Any]) -> None:
        """A cheap function has given something."""
        if output.requires_grad and output is not args[0] and output.dtype == args[0].dtype:  # else autocast had a part
            first = self._again(args[0]) or self._keep(args[0])
            again = Again(function, first, tuple(args[1:]), options)
            self._made[memory_of(output)] = weakref.ref(output), output._version, again  # noqa: SLF001

    def _again(self, tensor: Tensor) -> Again | None:
        """How a tensor that has all memory of a cheap output is made, unless that was written to."""
        reference, version, again = self._made.get(memory_of(tensor), (None, 0, None))
        output = None if reference is None else reference()
        if output is None or output._version != version or output.numel() != tensor.numel():  # noqa: SLF001
            return None
        return again

    def _keep(self, tensor: Tensor) -> Kept:
        return Kept(self._note(tensor), tensor._version)  # noqa: SLF001

    def _pack(self, tensor: Tensor) -> Kept | View:
        if (again := self._again(tensor)) is None:
            return self._keep(tensor)
        return View(again, (tensor.size(), tensor.stride(), tensor.storage_offset()))


class _Watch(TorchFunctionMode):
    """Tells of the calls of cheap functions."""

    def __init__(self, owner: Selective) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs) if kwargs else func(*args)
        if func in CHEAP and args:
            self._owner.made(output, func, args, kwargs or {})
        return output


def selectively(active: bool) -> AbstractContextManager[None]:
    """`Selective`, or nothing."""
    return Selective() if active else nullcontext()


def noting(note: Callable[[Tensor], Tensor], selective: bool) -> AbstractContextManager[Any]:
    """Show each tensor that autograd keeps to a function, which gives what is kept in its place."""
    return Selective(note) if selective else torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)

"""Less for test processes to do: packages can be hidden, what is installed is asked for once, and frames have room."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.metadata
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

LARGE = {"matplotlib", "scipy", "transformers"}  # torchmetrics looks for them, and does without


class Hide(importlib.abc.MetaPathFinder):
    """Finds no hidden package, as if none were installed.

    Args:
        hidden: names of packages.
    """

    def __init__(self, hidden: set[str]) -> None:
        # every Trainer asks for them, and reads the files of all packages for that
        importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
        self._hidden, self._distribution = hidden, importlib.metadata.distribution
        sys.meta_path.insert(0, self)
        importlib.metadata.distribution = self._found

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Nothing, so that others are asked, or the error of a missing package."""
        if fullname.partition(".")[0] in self._hidden:
            raise ModuleNotFoundError(f"No module named {fullname!r}, which tests hide", name=fullname)

    def _found(self, distribution_name: str) -> importlib.metadata.Distribution:
        if distribution_name in self._hidden:
            raise importlib.metadata.PackageNotFoundError(distribution_name)
        return self._distribution(distribution_name)

    def end(self) -> None:
        """From now on they can be imported."""
        self._hidden = set()  # others may have taken the function below
        sys.meta_path.remove(self)
        importlib.metadata.distribution = self._distribution


def tell_apart() -> None:
    """Ask what Lightning asks, of many types, and what packages bring: answers are kept, also for processes that fork.

    A rank of a small training would else spend a fifth of its time on that.
    """
    from torchmetrics import Metric

    where = ("tests.", "torch.nn.", "torch.utils.data", "lightning.pytorch.trainer.connectors", "builtins", "types")
    modules = [module for name, module in sys.modules.items() if name.startswith(where)]
    found = (value for module in modules for value in vars(module).values())
    types = {kind for kind in found if issubclass(type(kind), type)}  # in Python 3.10 list[int] says that it is one
    for group in ("torch.distributed.backends", "lightning.pytorch.callbacks_factory"):
        importlib.metadata.entry_points(group=group)
    for kind in types:
        for asked in (Metric, Mapping, Sequence, Iterable, numbers.Number):
            issubclass(kind, asked)


def _call(function: Callable[[], Any]) -> Any:
    return function()


# Calls a function where there is room for the frames of all that it calls. Python 3.11 maps memory for frames, 16 kB at
# a time, and gives it back at once: a loop whose calls cross such a limit asks the kernel for memory at every call.
roomy = FunctionType(_call.__code__.replace(co_stacksize=1 << 16), globals())

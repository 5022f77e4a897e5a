"""The random generators of this process, and those that the user's data and hooks hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

MOST = 100_000  # objects that are looked at in search of generators
OWN = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)


class Generators:
    """The random state of this process, in types that `torch.load(weights_only=True)` takes.

    Args:
        device: whose generator counts besides those of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state(self) -> dict[str, Any]:
        """The state of every generator."""
        legacy: Any = numpy.random.get_state()
        name, keys, *rest = legacy
        of_numpy = (name, torch.from_numpy(keys.astype(numpy.int64)), *rest)
        state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": of_numpy}
        return state | ({"cuda": torch.cuda.get_rng_state(self._device)} if self._device.type == "cuda" else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put every generator back to where it was."""
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), *rest))
        if self._device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self._device)


@contextmanager
def kept(device: torch.device, *holders: object) -> Iterator[None]:
    """Put back the generators of this process, and those that can be reached from some objects."""
    generators = Generators(device)
    state, undo = generators.state(), [_putting_back(generator) for generator in _held(holders)]
    try:
        yield
    finally:
        generators.restore(state)
        for put_back in undo:
            put_back()


def _putting_back(generator: Any) -> Callable[[], Any]:
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if hasattr(generator, "set_state"):  # of torch, and the old one of numpy
        return partial(generator.set_state, generator.get_state())
    return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)


def _held(holders: tuple[object, ...]) -> list[Any]:
    """Generators in attributes, containers, closures, and globals that functions name, as deep as they lie."""
    seen: dict[int, object] = {}  # with the objects, so that no identity is used twice
    todo = [*holders]
    while todo and len(seen) < MOST:
        value = todo.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            todo += _within(value)
    return [value for value in seen.values() if isinstance(value, OWN)]


def _within(value: Any) -> list[Any]:
    """What an object holds; of an nn.Module only the generators that are its own attributes."""
    if isinstance(value, FunctionType):
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        return [*(value.__closure__ or ()), *(value.__defaults__ or ()), *(x for x in named if isinstance(x, OWN))]
    if isinstance(value, CellType):
        try:
            return [value.cell_contents]
        except ValueError:  # nothing is in it yet
            return []
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, BuiltinMethodType):
        return [value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    if isinstance(value, (type, ModuleType, Tensor, *OWN)):
        return []
    if isinstance(value, nn.Module):
        return [held for held in vars(value).values() if isinstance(held, OWN)]
    methods = [getattr(type(value), name, None) for name in ("__getitem__", "__call__")]
    return [*vars(value).values(), *methods] if hasattr(value, "__dict__") else []

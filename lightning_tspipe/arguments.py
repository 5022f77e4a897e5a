"""How what an input hook returns becomes the arguments of a network's forward."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any, NamedTuple, cast

from torch import nn


class Call(NamedTuple):
    """The arguments of a forward that has several, or named ones."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments_of(network: nn.Module, value: Any) -> Call:
    """How an input becomes the arguments of a network's forward.

    A mapping whose keys are names of arguments, all that forward needs among them, gives keyword arguments; a tuple is
    spread if forward needs several arguments; anything else is the one argument.
    """
    if isinstance(value, Call):
        return value
    if isinstance(value, Mapping | tuple):
        needed, names, takes_any = _parameters(cast(Hashable, type(network)))
        if isinstance(value, tuple):
            return Call(tuple(value), {}) if 1 < len(needed) <= len(value) else Call((value,), {})
        known = names.issuperset(value) or (takes_any and not names.isdisjoint(value))
        if known and needed.issubset(value):
            return Call((), dict(value))
    return Call((value,), {})


def run_network(network: nn.Module, value: Any) -> Any:
    """Call a network on what an input hook gave."""
    args, kwargs = arguments_of(network, value)
    return network(*args, **kwargs)


@cache
def _parameters(kind: Any) -> tuple[frozenset[str], frozenset[str], bool]:
    """Of a class's forward: the names of the arguments that it needs, those of all, whether it takes any name."""
    if kind.forward is nn.Sequential.forward:
        return frozenset({"input"}), frozenset(), False
    _, *parameters = inspect.signature(kind.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = frozenset(p.name for p in named if p.default is p.empty)
    return needed, frozenset(p.name for p in named), any(p.kind == p.VAR_KEYWORD for p in parameters)

"""What submodules of a network return on the way to its output: the features that a loss may use by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from lightning_tspipe.arguments import run_network


class Tapped(NamedTuple):
    """What a network with taps gives: its output, and what its tapped submodules returned, by their names."""

    value: Any
    taps: dict[str, Any]


class TapError(ValueError):
    """A tap that cannot be followed."""


def run_tapped(network: nn.Module, value: Any, names: Sequence[str]) -> Tapped:
    """Call a network on what an input hook gave, and note what these submodules return.

    Of a submodule that is called several times the last call counts; one that is not called is left out.
    """
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        for name in names:  # no longer than the call: a module with hooks would be one layer when it is followed
            handle = network.get_submodule(name).register_forward_hook(partial(_note, found, name))
            stack.callback(handle.remove)
        output = run_network(network, value)
    return Tapped(output, {name: found[name] for name in names if name in found})


def _note(found: dict[str, Any], name: str, module: nn.Module, args: Any, output: Any) -> None:
    found[name] = output


def taken_apart(given: Any) -> tuple[Any, Any]:
    """Output and taps of what a network gave; lists of them if there are views; no taps if it has none."""
    if isinstance(given, list) and given and isinstance(given[0], Tapped):
        return [view.value for view in given], [view.taps for view in given]
    return (given.value, given.taps) if isinstance(given, Tapped) else (given, {})


def problem_with(network: nn.Module, names: Any) -> str | None:
    """What is wrong with the names of a network's taps; None if nothing is."""
    if isinstance(names, str):
        return f"is the string {names!r}. Give a sequence of names: ({names!r},)."
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        return f"is {names!r}. Give a sequence of names of submodules, such as ('layer2', 'layer3')."
    known = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, cutoff=0.4)
            near = near or [other for other in known if "." not in other]
            return (
                f"names {name!r}, which is no submodule of this {type(network).__name__}. "
                f"Near it are {', '.join(map(repr, near))}; all are in `named_modules()`."
            )
    return None


def uncalled(network: nn.Module, name: str, is_layer: Callable[[nn.Module], bool] | None = None) -> str:
    """Why nothing was noted for a tap, and what to do.

    Args:
        network: the network.
        name: of the submodule.
        is_layer: of a network that was followed: what is called as a whole, so that nothing within is seen.
    """
    path = name.split(".")
    for count in range(len(path) if is_layer is not None else 0):
        outer = ".".join(path[:count])
        if is_layer is not None and is_layer(network.get_submodule(outer)):
            return (
                f"The tap {name!r} of {type(network).__name__} is inside of {outer or 'the network'!r}, which is one "
                f"indivisible layer in the pipeline (docs/models.md says which are). Tap {outer or 'its parts'!r} "
                "itself, and let it return the feature."
            )
    return (
        f"The tap {name!r} of {type(network).__name__} was never called in its forward. Tap a submodule that is "
        "called; an nn.ModuleList is not, its items are."
    )

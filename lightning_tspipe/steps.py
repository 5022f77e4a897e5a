"""What a stage calls, one call after the other, or as one function by torch.compile.

torch.compile gets to see a module of its own, which holds the user's modules and changes none: no `state_dict` knows of
it, and it is gone with the stage. It is generated code, since torch.compile counts how often a piece of code was
compiled, whatever for, and gives up after a few.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_tspipe import tree
from lightning_tspipe.recording import Step

Options = Mapping[str, Any]  # keyword arguments of torch.compile


def chain(
    layers: Sequence[nn.Module], names: Sequence[str], options: Options | None, begin: Callable[[str], None]
) -> Callable[[Any], Any]:
    """Layers that are called one after the other as one function, compiled if there are options.

    Args:
        layers, names: what is called, and what each is called in its network.
        options: arguments of torch.compile, or None.
        begin: hears the name of each layer before it is called, unless they are compiled.
    """
    if options is None or not layers:
        return partial(_call_each, list(zip(names, layers, strict=True)), begin)
    graph = fx.Graph()
    value = graph.placeholder("value")
    for number in range(len(layers)):
        value = graph.call_module(str(number), (value,))
    graph.output(value)
    return _compiled(layers, graph, options)


def call_all(layers: Sequence[nn.Module], value: Any) -> Any:
    """Call the layers one after the other."""
    for layer in layers:
        value = layer(value)
    return value


def _call_each(layers: Sequence[tuple[str, nn.Module]], begin: Callable[[str], None], value: Any) -> Any:
    for name, layer in layers:
        begin(name)
        value = layer(value)
    return value


class Steps:
    """Some steps of a recording.

    Args:
        steps: in order.
        targets: what they call by name.
        wanted: the values that are needed after them.
        device_type: where they run.
        options: how to compile them; None runs them as they are.
        begin: hears the name of each layer that begins, unless they are compiled.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        targets: Mapping[str, nn.Module],
        wanted: Sequence[int],
        device_type: str,
        options: Options | None,
        begin: Callable[[str], None],
    ) -> None:
        self._begin = begin
        self._calls: list[tuple[_Call, tuple[int, ...]]] = []  # with the values that nothing later uses
        kept = set(wanted)
        for step in reversed(steps):
            used = {*step.inputs, *step.outputs}
            target = targets[step.target] if isinstance(step.target, str) else step.target
            self._calls.insert(0, (_Call(step, target, device_type), tuple(used - kept)))
            kept |= used
        self._compiled = None if options is None or not steps else self._compile(wanted, options)

    def run(self, values: dict[int, Tensor], get: Callable[[int], Tensor]) -> None:
        """Run them.

        Args:
            values: what they use; gets what they make.
            get: gives a value also if it is a parameter or a buffer, which are not among `values` before.
        """
        if self._compiled is not None:
            given, made, run = self._compiled
            values.update(zip(made, run(*map(get, given)), strict=True))
            return
        for call, dead in self._calls:
            step = call.step
            if step.layer is not None:
                self._begin(step.layer)
            values.update(zip(step.outputs, call.forward(*map(get, step.inputs)), strict=True))
            for number in dead:
                del values[number]

    def _compile(
        self, wanted: Sequence[int], options: Options
    ) -> tuple[tuple[int, ...], tuple[int, ...], Callable[..., tuple[Tensor, ...]]]:
        """One function, with the values that it takes and those that it returns."""
        calls = [call for call, _ in self._calls]
        given: dict[int, None] = {}
        made: set[int] = set()
        for call in calls:
            given |= dict.fromkeys(value for value in call.step.inputs if value not in made)
            made |= {value for value in call.step.outputs if value not in given}  # what works in place returns an input
        graph = fx.Graph()
        nodes = {value: graph.placeholder(f"value{value}") for value in given}
        for number, call in enumerate(calls):
            results = graph.call_module(str(number), tuple(nodes[value] for value in call.step.inputs))
            for place, value in enumerate(call.step.outputs):
                nodes[value] = graph.call_function(operator.getitem, (results, place))
        returned = tuple(value for value in wanted if value in made)
        graph.output(tuple(nodes[value] for value in returned))
        return tuple(given), returned, _compiled(calls, graph, options)


class _Call(nn.Module):
    """A step as a module."""

    def __init__(self, step: Step, target: Callable[..., Any], device_type: str) -> None:
        super().__init__()
        self.step, self._device_type = step, device_type
        self._target = (target,)  # else torch 2.11 takes it for a method that it does not know

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Run it; its results."""
        args, kwargs = tree.unflatten(tensors, self.step.structure)
        autocast = nullcontext() if self.step.autocast else torch.autocast(self._device_type, enabled=False)
        with nullcontext() if self.step.grad else torch.no_grad(), autocast:
            return tree.flatten(self._target[0](*args, **kwargs))[0]


def _compiled(modules: Sequence[nn.Module], graph: fx.Graph, options: Options) -> Callable[..., Any]:
    run: Callable[..., Any] = torch.compile(fx.GraphModule(nn.ModuleList(modules), graph), **options)
    return run

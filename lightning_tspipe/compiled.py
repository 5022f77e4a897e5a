"""What torch.compile gets to see of a stage: a module of its own, which holds the user's modules and changes none.

So no `state_dict` and no module of the user knows of it, and it is gone with the stage. Each is generated code, since
torch.compile counts how often a piece of code was compiled, whatever it was compiled for, and gives up after a few.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lightning_tspipe import tree
from lightning_tspipe.recording import Step

Options = Mapping[str, Any]  # keyword arguments of torch.compile


def compile_chain(layers: Sequence[nn.Module], options: Options) -> Callable[[Any], Any]:
    """One function out of layers that are called one after the other."""
    graph = fx.Graph()
    value = graph.placeholder("value")
    for number in range(len(layers)):
        value = graph.call_module(str(number), (value,))
    graph.output(value)
    return _compile(layers, graph, options)


class CompiledSteps(NamedTuple):
    """Some steps of a recording as one function.

    Args:
        given: the values that it takes.
        made: the values that it returns.
        run: from tensors to a tuple of tensors.
    """

    given: tuple[int, ...]
    made: tuple[int, ...]
    run: Callable[..., Any]


def compile_steps(
    steps: Sequence[Step], targets: Sequence[Any], wanted: Sequence[int], device_type: str, options: Options
) -> CompiledSteps:
    """One function out of recorded steps.

    Args:
        steps: in order.
        targets: what each of them calls.
        wanted: the values that are needed later.
        device_type: where they run.
        options: keyword arguments of torch.compile.
    """
    given: dict[int, None] = {}
    made: set[int] = set()
    for step in steps:
        given |= dict.fromkeys(value for value in step.inputs if value not in made)
        made |= {value for value in step.outputs if value not in given}  # a step in place returns what it was given
    graph = fx.Graph()
    nodes = {value: graph.placeholder(f"value{value}") for value in given}
    for number, step in enumerate(steps):
        results = graph.call_module(str(number), tuple(nodes[value] for value in step.inputs))
        for place, value in enumerate(step.outputs):
            nodes[value] = graph.call_function(operator.getitem, (results, place))
    returned = tuple(value for value in wanted if value in made)
    graph.output(tuple(nodes[value] for value in returned))
    calls = [_Call(step, target, device_type) for step, target in zip(steps, targets, strict=True)]
    return CompiledSteps(tuple(given), returned, _compile(calls, graph, options))


def perform(step: Step, target: Callable[..., Any], tensors: Sequence[Tensor], device_type: str) -> list[Tensor]:
    """Run one recorded step; its results."""
    args, kwargs = tree.unflatten(tensors, step.structure)
    autocast = nullcontext() if step.autocast else torch.autocast(device_type, enabled=False)
    with nullcontext() if step.grad else torch.no_grad(), autocast:
        return tree.flatten(target(*args, **kwargs))[0]


class _Call(nn.Module):
    """A step as a module."""

    def __init__(self, step: Step, target: Callable[..., Any], device_type: str) -> None:
        super().__init__()
        self._step, self._target, self._device_type = step, target, device_type

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Run it."""
        return perform(self._step, self._target, tensors, self._device_type)


def _compile(modules: Sequence[nn.Module], graph: fx.Graph, options: Options) -> Callable[..., Any]:
    run: Callable[..., Any] = torch.compile(fx.GraphModule(nn.ModuleList(modules), graph), **options)
    return run

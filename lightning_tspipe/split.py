"""A backward in two parts: first the gradients of a stage's inputs, for which another rank waits, later the weights'.

Source: Qi et al., "Zero bubble pipeline parallelism", ICLR 2024, section 2, https://arxiv.org/abs/2401.10241. Autograd
itself leaves out what is not asked for, so each part computes its own half of a matrix product or a convolution::

    x --> conv --> norm --> linear --> out        inputs:   linear, norm (with its own parameters), conv  -> x.grad
           |                  |                   weights:  linear -> weight.grad, conv -> weight.grad
         weight             weight

Only the nodes that cost much for their weights are put off. The parameters of all others (norms, scales, embeddings),
and those of autograd functions written in Python, which cannot leave anything out, get their gradients in the first
part. A weight that several nodes use, as with several views, waits if none of them leads to another one. Where
torch.compile has made a part of the graph, nothing is put off: that part is one node, and it may refuse to keep what
the second part would need.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

# nodes whose weight gradients cost about as much as those of their inputs
HEAVY = frozenset({"AddmmBackward0", "MmBackward0", "BmmBackward0", "BaddbmmBackward0", "ConvolutionBackward0"})
COMPILED = "CompiledFunctionBackward"  # the node of what torch.compile has made


@dataclass(frozen=True)
class _Junction:
    """Nodes that lead to inputs, none of them to another one, and parameters that are reached through them alone."""

    nodes: list[Node]
    gradients: list[Tensor | None]  # of their outputs, once the first part has passed
    parameters: list[Tensor]


class WeightBackward:
    """What is left to do for the weights; call it once."""

    def __init__(self, junctions: Sequence[_Junction], whole: Callable[[], None] | None = None) -> None:
        self._junctions, self._whole = deque(junctions), whole

    def __call__(self) -> None:
        """Add the gradients of the weights to their ``.grad``."""
        if self._whole is not None:
            self._whole()
        while self._junctions:  # each lets go of what lies between it and the next one, from the outputs on
            junction = self._junctions.popleft()
            pairs = zip(junction.nodes, junction.gradients, strict=True)
            edges = {GradientEdge(node, 0): gradient for node, gradient in pairs if gradient is not None}
            if edges:  # in one call, so that a weight's gradients are summed as they are in a whole backward
                torch.autograd.backward(list(edges), list(edges.values()), inputs=junction.parameters)
        self._whole = None


def backward_inputs(outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> WeightBackward:
    """Add the gradients of `inputs` to their ``.grad``, and of all parameters that cannot wait.

    Args:
        outputs: tensors that require gradients.
        gradients: one for each output, of its shape.
        inputs: leaves; without any, the whole backward is put off.

    Returns:
        The rest of the backward.
    """
    whole = partial(torch.autograd.backward, list(outputs), list(gradients))
    wanted = {torch.autograd.graph.get_gradient_edge(leaf).node for leaf in inputs if leaf.requires_grad}
    if not wanted:
        return WeightBackward([], whole)
    graph = _Graph([output.grad_fn for output in outputs], wanted)
    junctions, now = graph.junctions()
    handles = [
        node.register_prehook(partial(_keep, junction.gradients, place))
        for junction in junctions
        for place, node in enumerate(junction.nodes)
    ]
    asked = [leaf for leaf in inputs if leaf.requires_grad]
    torch.autograd.backward(outputs, gradients, inputs=[*asked, *now], retain_graph=bool(junctions))
    for handle in handles:
        handle.remove()
    return WeightBackward(junctions)


def _keep(kept: list[Tensor | None], place: int, gradients: Sequence[Any]) -> None:
    kept[place] = gradients[0]


class _Graph:
    """The nodes behind some outputs, and which of them lead to the wanted leaves.

    Args:
        roots: the nodes of the outputs.
        wanted: the nodes of the leaves.
    """

    def __init__(self, roots: Sequence[Node | None], wanted: set[Node]) -> None:
        self._next: dict[Node, list[Node]] = {}
        self._leads: dict[Node, bool] = dict.fromkeys(wanted, True)
        self._roots = [root for root in roots if root is not None]
        stack = [(root, False) for root in self._roots]
        while stack:  # depth first, each node after all that it leads to
            node, done = stack.pop()
            if done:
                self._leads[node] = node in wanted or any(self._leads[child] for child in self._next[node])
            elif node not in self._next:
                self._next[node] = [child for child, _ in node.next_functions if child is not None]
                stack.append((node, True))
                stack += [(child, False) for child in self._next[node]]

    def junctions(self) -> tuple[list[_Junction], list[Tensor]]:
        """What can be put off, and the parameters that cannot."""
        found: list[tuple[Node, list[Tensor]]] = []
        for node, children in self._next.items():
            if self._leads[node]:
                beside = [child for child in children if not self._leads[child]]
                if beside and (parameters := self._parameters(beside)):
                    found.append((node, parameters))
        found += [(root, self._parameters([root])) for root in self._roots if not self._leads[root]]
        splits = all(node.name() != COMPILED for node in self._next)
        users: dict[int, list[Node]] = {}
        for node, parameters in found:
            for parameter in parameters:
                users.setdefault(id(parameter), []).append(node)
        parts = self._parts()
        junctions: dict[tuple[Node, ...], _Junction] = {}
        now = {}
        for _, parameters in found:
            for parameter in parameters:
                nodes = tuple(users[id(parameter)])
                apart = len({parts.get(node) for node in nodes}) == len(nodes)
                if splits and apart and all(node.name() in HEAVY and self._leads[node] for node in nodes):
                    junction = junctions.setdefault(nodes, _Junction(list(nodes), [None] * len(nodes), []))
                    if all(parameter is not known for known in junction.parameters):
                        junction.parameters.append(parameter)
                else:
                    now[id(parameter)] = parameter
        return list(junctions.values()), list(now.values())

    def _parts(self) -> dict[Node, int]:
        """A number for each node that leads to an input, the same wherever there is a way from one to the other."""
        neighbours: dict[Node, list[Node]] = {node: [] for node, leads in self._leads.items() if leads}
        for node in neighbours:
            for child in self._next.get(node, ()):
                if self._leads[child]:
                    neighbours[node].append(child)
                    neighbours[child].append(node)
        parts: dict[Node, int] = {}
        for number, start in enumerate(neighbours):
            stack = [start]
            while stack:
                node = stack.pop()
                if node not in parts:
                    parts[node] = number
                    stack += neighbours[node]
        return parts

    def _parameters(self, roots: Sequence[Node]) -> list[Tensor]:
        """Every leaf behind some nodes that lead to no input."""
        found, seen, stack = [], set(roots), list(roots)
        while stack:
            node = stack.pop()
            if (leaf := getattr(node, "variable", None)) is not None:
                found.append(leaf)
            new = [child for child in self._next[node] if child not in seen]
            seen.update(new)
            stack += new
        return found

"""A backward in two parts: first the gradients of a stage's inputs, for which another rank waits, later the weights'.

Source: Qi et al., "Zero bubble pipeline parallelism", ICLR 2024, section 2, https://arxiv.org/abs/2401.10241. Autograd
itself leaves out what is not asked for, so each part computes its own half of a matrix product or a convolution::

    x --> conv --> norm --> linear --> out        inputs:   linear, norm (with its own parameters), conv  -> x.grad
           |                  |                   weights:  linear -> weight.grad, conv -> weight.grad
         weight             weight

Only the nodes that cost much for their weights are put off. The parameters of all others (norms, scales, embeddings),
those that several nodes use, and those of autograd functions written in Python, which cannot leave anything out, get
their gradients in the first part. Where torch.compile has made a part of the graph, nothing is put off: that part is
one node, and it may refuse to keep what the second part would need.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
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
    """A node that leads to an input, and to parameters that are reached through it alone."""

    node: Node
    gradients: list[Tensor]  # of its output, once the first part has passed
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
            if junction.gradients:
                edge = GradientEdge(junction.node, 0)
                torch.autograd.backward([edge], junction.gradients, inputs=junction.parameters)
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
    handles = [junction.node.register_prehook(partial(_keep, junction.gradients)) for junction in junctions]
    asked = [leaf for leaf in inputs if leaf.requires_grad]
    torch.autograd.backward(outputs, gradients, inputs=[*asked, *now], retain_graph=bool(junctions))
    for handle in handles:
        handle.remove()
    return WeightBackward(junctions)


def _keep(place: list[Tensor], gradients: Iterable[Any]) -> None:
    place.extend(gradient for gradient in gradients if gradient is not None)


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
        uses = Counter(id(parameter) for _, parameters in found for parameter in parameters)
        splits = all(node.name() != COMPILED for node in self._next)
        junctions, now = [], {}
        for node, parameters in found:
            alone = all(uses[id(parameter)] == 1 for parameter in parameters)
            if splits and alone and node.name() in HEAVY and self._leads[node]:
                junctions.append(_Junction(node, [], parameters))
            else:
                now.update({id(parameter): parameter for parameter in parameters})
        return junctions, list(now.values())

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

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

from lightning_tspipe import _nodes

# nodes whose weight gradients cost about as much as those of their inputs
HEAVY = frozenset({"AddmmBackward0", "MmBackward0", "BmmBackward0", "BaddbmmBackward0", "ConvolutionBackward0"})
COMPILED = "CompiledFunctionBackward"  # the node of what torch.compile has made


@dataclass(frozen=True)
class _Junction:
    """A node that leads to an input, and to parameters that are reached through it alone.

    Attributes:
        node: the node.
        slots: which of its inputs lead to parameters.
        parameters: all of them.
    """

    node: Node
    slots: list[int]
    parameters: list[Tensor]


class WeightBackward:
    """What is left to do for the weights; call it once."""

    def __init__(self, steps: deque[Callable[[], None]]) -> None:
        self._steps = steps

    def __call__(self) -> None:
        """Add the gradients of the weights to their ``.grad``."""
        while self._steps:  # from the outputs on; each lets go of what it alone needed
            self._steps.popleft()()


def backward_inputs(outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> WeightBackward:
    """Add the gradients of `inputs` to their ``.grad``, and of all parameters that cannot wait.

    Args:
        outputs: tensors that require gradients.
        gradients: one for each output, of its shape.
        inputs: leaves; without any, the whole backward is put off.

    Returns:
        The rest of the backward.
    """
    asked = [leaf for leaf in inputs if leaf.requires_grad]
    wanted = {torch.autograd.graph.get_gradient_edge(leaf).node for leaf in asked}
    if not wanted:
        return WeightBackward(deque([partial(torch.autograd.backward, list(outputs), list(gradients))]))
    graph = _Graph([output.grad_fn for output in outputs], wanted)
    junctions, now = graph.junctions()
    # the graph stays only where a product has to be left to it: kept activations make the first part slower, since
    # its gradients then go to memory that is new to the process
    known = all(_nodes.is_known(junction.node, junction.slots) for junction in junctions)
    steps: deque[Callable[[], None]] = deque()
    put_off = partial(_put_off, steps, _compute if known else _leave)
    handles = [junction.node.register_prehook(partial(put_off, junction)) for junction in junctions]
    torch.autograd.backward(outputs, gradients, inputs=[*asked, *now], retain_graph=not known)
    for handle in handles:
        handle.remove()
    return WeightBackward(steps)


def _put_off(
    steps: deque[Callable[[], None]],
    make: Callable[[_Junction, Tensor], Callable[[], None]],
    junction: _Junction,
    gradients: Iterable[Any],
) -> None:
    steps.extend(make(junction, gradient) for gradient in gradients if gradient is not None)


def _leave(junction: _Junction, gradient: Tensor) -> Callable[[], None]:
    """Leave a junction's weights to the graph."""
    edges, inputs = [GradientEdge(junction.node, 0)], junction.parameters
    return partial(torch.autograd.backward, edges, [gradient], inputs=inputs)


def _compute(junction: _Junction, gradient: Tensor) -> Callable[[], None]:
    """Compute a junction's weights from what its node has saved; the graph has only what lies behind the node."""
    edges = [junction.node.next_functions[slot] for slot in junction.slots]
    return partial(_pass_on, edges, _nodes.weights_half(junction.node, junction.slots, gradient))


def _pass_on(edges: Sequence[tuple[Any, int]], compute: Callable[[], list[Tensor]]) -> None:
    torch.autograd.backward([_root(*edge) for edge in edges], compute())


def _root(node: Any, place: int) -> Any:
    """Where a gradient goes in.

    A parameter copies its first gradient if somebody else holds that, as we do here. Behind a view it takes it over.
    """
    parameter = getattr(node, "variable", None)
    if parameter is None or parameter.grad is not None:
        return GradientEdge(node, place)
    with torch.enable_grad():
        return parameter.view_as(parameter)


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
                functions = enumerate(node.next_functions)
                slots = [slot for slot, (child, _) in functions if child is not None and not self._leads[child]]
                junctions.append(_Junction(node, slots, parameters))
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

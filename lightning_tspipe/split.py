"""A backward in two parts: first the gradients of a stage's inputs, for which another rank waits, later the weights'.

Source: Qi et al., "Zero bubble pipeline parallelism", ICLR 2024, section 2, https://arxiv.org/abs/2401.10241. Autograd
itself leaves out what is not asked for, so each part computes its own half of a matrix product or a convolution::

    x --> conv --> norm --> linear --> out        inputs:   linear (with its bias), norm (with its parameters), conv
           |                  |                   weights:  linear -> weight.grad, conv -> weight.grad
         weight             weight

Only what costs much is put off. The biases of matrix products, the parameters of all other nodes (norms, scales,
embeddings), and those of autograd functions written in Python, which cannot leave anything out, get their gradients in
the first part. A weight that several nodes use, as with several views, waits if none of them leads to another one.
Where torch.compile has made a part of the graph, nothing is put off: that part is one node, and it may refuse to keep
what the second part would need. `WeightBackward.early` has the weights that cost much and could not wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from lightning_tspipe import _nodes

# nodes whose weight gradients cost about as much as those of their inputs
HEAVY = frozenset({"AddmmBackward0", "MmBackward0", "BmmBackward0", "BaddbmmBackward0", "ConvolutionBackward0"})
SUMS = frozenset({"AddmmBackward0", "BaddbmmBackward0"})  # of these, the nodes whose first input is only added
COMPILED = "CompiledFunctionBackward"  # the node of what torch.compile has made
RECURRENT = "Rnn"  # in the names of the nodes that run through a sequence


class _Step(Protocol):
    """A part of what is put off, and the tensors that it keeps for that."""

    @property
    def kept(self) -> list[Tensor]: ...

    def __call__(self) -> None: ...


class _Junction:
    """Nodes that lead to inputs, none of them to another one, and to parameters that are reached through them alone.

    Args:
        slots: of each node, which of its inputs lead to parameters.
        parameters: all of them.
    """

    def __init__(self, slots: dict[Node, list[int]], parameters: list[Tensor]) -> None:
        self.slots = slots
        self._parameters = parameters
        self._left: list[tuple[GradientEdge, Tensor]] = []
        self._known: list[tuple[list[Any], partial[list[Tensor]]]] = []

    @property
    def is_known(self) -> bool:
        """Whether the weights can be computed from what the nodes have saved, and summed as the graph would."""
        if not all(_nodes.is_known(node, slots) for node, slots in self.slots.items()):
            return False
        first, *others = self.slots.values()
        return all(first == slots for slots in others) and all(
            _same_end([node.next_functions[slot] for node in self.slots]) for slot in first
        )

    @property
    def kept(self) -> list[Tensor]:
        """What the second part needs besides the graph."""
        return [gradient for _, gradient in self._left] + [
            t for _, compute in self._known for t in _tensors(compute.args)
        ]

    def __call__(self) -> None:
        """The second part."""
        if self._left:
            self._finish_left()
        else:
            self._finish_known()

    def leave(self, steps: deque[_Step], node: Node, gradients: Sequence[Any]) -> None:
        """Leave the weights to the graph, given the gradient of a node's output."""
        if gradients[0] is not None:
            if not self._left:
                steps.append(self)
            self._left.append((GradientEdge(node, 0), gradients[0]))

    def _finish_left(self) -> None:
        edges, gradients = zip(*self._left, strict=True)  # one call, so that sums are those of a whole backward
        torch.autograd.backward(list(edges), list(gradients), inputs=self._parameters)

    def compute(self, steps: deque[_Step], node: Node, gradients: Sequence[Any]) -> None:
        """Compute the weights from what a node has saved; the graph has only what lies behind the node."""
        if gradients[0] is not None:
            if not self._known:
                steps.append(self)
            slots = self.slots[node]
            edges = [node.next_functions[slot] for slot in slots]
            self._known.append((edges, _nodes.weights_half(node, slots, gradients[0])))

    def _finish_known(self) -> None:
        edges, compute = self._known[0]
        more = self._known[1:]
        rooms = [_room(node) if more else None for node, _ in edges]
        found = compute()
        for _, compute in more:  # in the order in which the nodes ran, as the graph sums them
            pairs = zip(found, compute(), rooms, strict=True)
            found = [torch.add(one, other, out=one if room is None else room) for one, other, room in pairs]
        torch.autograd.backward([_root(*edge) for edge in edges], found)


def _same_end(edges: Sequence[tuple[Any, int]]) -> bool:
    """Whether gradients that go to these edges are summed there, or behind a transposition of each."""
    if len(set(edges)) > 1 and all(node.name() == "TBackward0" for node, _ in edges):
        edges = [node.next_functions[0] for node, _ in edges]
    return len(set(edges)) == 1


class _Whole:
    """A backward that is put off as a whole."""

    def __init__(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self._outputs, self.kept = list(outputs), list(gradients)

    def __call__(self) -> None:
        torch.autograd.backward(self._outputs, self.kept)


class WeightBackward:
    """What is left to do for the weights; call it once.

    Args:
        steps: of it.
        keeps_graph: whether the graph stays, with all that it has saved.
        early: matrices that cost much and could not wait; their gradients are there.
    """

    def __init__(self, steps: deque[_Step], keeps_graph: bool, early: Sequence[Tensor] = ()) -> None:
        self._steps, self.keeps_graph, self.early = steps, keeps_graph, early

    @property
    def kept(self) -> list[Tensor]:
        """Tensors that wait for the call, besides those of a graph that stays; some may share their memory."""
        return [tensor for step in self._steps for tensor in step.kept]

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
        return WeightBackward(deque([_Whole(outputs, gradients)]), keeps_graph=True)
    graph = _Graph([output.grad_fn for output in outputs], wanted)
    junctions, now, early = graph.junctions()
    # the graph stays only where a product has to be left to it: kept activations make the first part slower, since
    # its gradients then go to memory that is new to the process
    known = all(junction.is_known for junction in junctions)
    steps: deque[_Step] = deque()
    handles = [
        node.register_prehook(partial(junction.compute if known else junction.leave, steps, node))
        for junction in junctions
        for node in junction.slots
    ]
    torch.autograd.backward(outputs, gradients, inputs=[*asked, *now], retain_graph=not known)
    for handle in handles:
        handle.remove()
    return WeightBackward(steps, keeps_graph=not known, early=early)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Those in nested tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _room(node: Any) -> Tensor | None:
    """Memory for a parameter's first gradient, taken before what is summed, which then is freed in one piece."""
    parameter = getattr(node, "variable", None)
    return None if parameter is None or parameter.grad is not None else torch.empty_like(parameter.detach())


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
        self._next: dict[Node, list[Node | None]] = {}
        self._leads: dict[Node | None, bool] = {None: False, **dict.fromkeys(wanted, True)}
        self._roots = [root for root in roots if root is not None]
        stack: list[Node | None] = [*self._roots]
        while stack:  # depth first, each node again after all that it leads to
            node = stack.pop()
            if node is None:
                continue
            if (children := self._next.get(node)) is None:
                self._next[node] = children = [child for child, _ in node.next_functions]
                stack.append(node)
                stack += children
            elif node not in self._leads:
                self._leads[node] = True in map(self._leads.__getitem__, children)

    def junctions(self) -> tuple[list[_Junction], list[Tensor], list[Tensor]]:
        """What can be put off; the parameters that cannot; and of these the matrices that cost much."""
        splits = all(node.name() != COMPILED for node in self._next)
        now: dict[int, Tensor] = {}
        costly: dict[int, Tensor] = {}
        groups: dict[int, tuple[dict[Node, list[int]], dict[int, Tensor]]] = {}  # what shares parameters, by parameter
        for node, children in self._next.items():
            if not self._leads[node]:
                continue
            slots = [slot for slot, child in enumerate(children) if child is not None and not self._leads[child]]
            if not slots:
                continue
            early, name = len(slots), node.name()
            if splits and name in HEAVY:
                early = int(slots[0] == 0 and name in SUMS)
            at_once = self._parameters([children[slot] for slot in slots[:early]])
            now.update(at_once)
            in_one = name in HEAVY and not splits
            if in_one or RECURRENT in name or isinstance(node, BackwardCFunction):
                costly.update(at_once)
            nodes, reached = {node: slots[early:]}, self._parameters([children[slot] for slot in slots[early:]])
            for others, theirs in {id(groups[key]): groups[key] for key in reached if key in groups}.values():
                nodes, reached = others | nodes, theirs | reached
            groups.update(dict.fromkeys(reached, (nodes, reached)))
        for root in self._roots:
            if not self._leads[root]:
                now.update(self._parameters([root]))
        parts: dict[Node, int] | None = None
        junctions = []
        for nodes, reached in {id(group): group for group in groups.values()}.values():
            waits = now.keys().isdisjoint(reached)
            if waits and len(nodes) > 1:
                parts = parts or self._parts()
                waits = len({parts[node] for node in nodes}) == len(nodes)
            if waits:
                junctions.append(_Junction(nodes, list(reached.values())))
            else:
                now.update(reached)
                costly.update(reached)
        return junctions, list(now.values()), [tensor for tensor in costly.values() if tensor.ndim > 1]

    def _parts(self) -> dict[Node, int]:
        """A number for each node that leads to an input, the same wherever there is a way from one to the other."""
        neighbours: dict[Node, list[Node]] = {
            node: [] for node, leads in self._leads.items() if leads and node is not None
        }
        for node in neighbours:
            for child in self._next.get(node, ()):
                if child is not None and self._leads[child]:
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

    def _parameters(self, roots: Sequence[Node | None]) -> dict[int, Tensor]:
        """Every leaf behind some nodes that lead to no input, by its id."""
        found, seen, stack = {}, set(roots), list(roots)
        while stack:
            if (node := stack.pop()) is None:
                continue
            if (leaf := getattr(node, "variable", None)) is not None:
                found[id(leaf)] = leaf
            new = [child for child in self._next[node] if child not in seen]
            seen.update(new)
            stack += new
        return found

"""What a gradient reaches.

From another process the rest gets gradients of zeros, where autograd by itself leaves None, which optimizers skip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge


def reach(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], reached: Sequence[bool]
) -> tuple[list[bool], list[Tensor]]:
    """Which inputs of a stage a gradient of the loss reaches, and which parameters get zeros only.

    Args:
        outputs: what a forward gave, floating point tensors.
        inputs: what went in, leaves.
        reached: for each output, whether the loss depends on it.

    Returns:
        For each input whether the loss depends on it; the leaves behind outputs that it does not depend on alone.
    """
    found = _behind(output for output, there in zip(outputs, reached, strict=True) if there)
    others = set() if all(reached) else _behind(outputs) - found
    places = [get_gradient_edge(leaf).node if leaf.requires_grad else None for leaf in inputs]
    rest = (getattr(node, "variable", None) for node in others.difference(places))
    return [node in found for node in places], [leaf for leaf in rest if leaf is not None]


def _behind(outputs: Iterable[Tensor]) -> set[Node]:
    """Every node that a backward from these outputs passes."""
    stack = [get_gradient_edge(output).node for output in outputs if output.requires_grad]
    found = set(stack)
    while stack:
        new = {child for child, _ in stack.pop().next_functions if child is not None} - found
        found |= new
        stack += new
    return found

"""The weights' half of a matrix product or a convolution, from what a node has saved; torch's private names of nodes.

What autograd would compute for the weights alone is computed here in the same way, bit for bit. So a graph can let go
of all it has saved when the gradients of its inputs are there, except for what the weights still need.

The formulas are those of https://github.com/pytorch/pytorch/blob/main/tools/autograd/derivatives.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_tspipe.selective import View, unpack


def is_known(node: Any, slots: Sequence[int]) -> bool:
    """Whether `weights_half` can compute these gradients.

    Not where others' hooks pack what is saved: a checkpoint may unpack only once in each backward.

    Args:
        node: of a matrix product or a convolution.
        slots: places among the node's `next_functions`.
    """
    match node.name():
        case "AddmmBackward0":
            return list(slots) == [2] and node._saved_alpha == 1 and _has_formula(node, node._raw_saved_mat1)
        case "MmBackward0":
            return list(slots) == [1] and _has_formula(node, node._raw_saved_self)
        case "ConvolutionBackward0":
            return 0 not in slots and not _is_packed(node._raw_saved_input)
    return False


def weights_half(node: Any, slots: Sequence[int], gradient: Tensor) -> partial[list[Tensor]]:
    """What computes the gradients at some slots; its arguments are all that it needs, instead of the node.

    Args:
        node: one that `is_known`, in its backward.
        slots: places among the node's `next_functions`.
        gradient: of the node's output.
    """
    name = node.name()
    if name == "ConvolutionBackward0":
        saved = (
            *(node._saved_input.detach(), node._saved_weight.detach(), node._saved_bias_sym_sizes_opt),
            *(node._saved_stride, node._saved_padding, node._saved_dilation),
            *(node._saved_transposed, node._saved_output_padding, node._saved_groups),
        )
        return partial(_filter, gradient, saved, slots)
    left = node._saved_self if name == "MmBackward0" else node._saved_mat1
    return partial(_matrix, gradient, left.detach())


def _matrix(gradient: Tensor, left: Tensor) -> list[Tensor]:
    """Of the right matrix of ``left @ right``."""
    with torch.no_grad():
        return [gradient.t().mm(left.conj()).t()]


def _filter(gradient: Tensor, saved: tuple[Any, ...], slots: Sequence[int]) -> list[Tensor]:
    inputs, weight, bias, *others = saved
    mask = [False, 1 in slots, 2 in slots]
    with torch.no_grad():
        found = torch.ops.aten.convolution_backward(gradient, inputs, weight, bias, *others, mask)
    return [found[slot] for slot in slots]


def _is_packed(saved: Any) -> bool:
    """Whether a hook that is not ours has packed a saved tensor."""
    return getattr(saved, "unpack_hook", saved) not in (None, unpack)


def _has_formula(node: Any, left: Any) -> bool:
    """Whether the right matrix lies in memory by columns, as a transposed weight does; others have another formula."""
    sizes, strides = node._saved_mat2_sym_sizes, node._saved_mat2_sym_strides
    by_columns = strides[0] == 1 and strides[1] == sizes[0]
    return bool(by_columns) and not _is_packed(left) and _is_strided(left)


def _is_strided(saved: Any) -> bool:
    """Whether it is a usual tensor; what is to be computed again is, and is not computed to learn that."""
    data = saved.data  # torch 2.11 has no `saved.unpack`
    if isinstance(data, View):
        return True
    tensor: Tensor = data if isinstance(data, Tensor) else unpack(data)
    return tensor.layout is torch.strided


def backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """`torch.autograd.backward` of tensors with gradients of their shapes and types.

    It looks at each pair for what may be wrong with it, which takes as long as the backward of a small layer.
    """
    torch.autograd.graph._engine_run_backward(
        tuple(outputs), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
    )

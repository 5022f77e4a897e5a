"""The emulated stage: a tiny linear layer whose forward and backward last as long as they are told to."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def wait_until(deadline: float) -> None:
    """Sleep until ``time.perf_counter()`` reads ``deadline`` seconds; a spinning wait would rob the other ranks."""
    while (remaining := deadline - time.perf_counter()) > 0:
        time.sleep(remaining)


class _TimedLinear(torch.autograd.Function):
    """A linear map that ends at ``start + cost``, in both directions.

    One node holds all three gradients, and the weight always asks for its own: so the whole cost of a backward is paid,
    once, also in stage 0, whose input asks for no gradient.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, forward_s: float, backward_s: float) -> Tensor:
        start = time.perf_counter()
        ctx.save_for_backward(input, weight)
        ctx.backward_s = backward_s
        output = nn.functional.linear(input, weight, bias)
        wait_until(start + forward_s)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        start = time.perf_counter()
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_input = grad_output @ weight if needs_input else None
        grad_weight = grad_output.T @ input if needs_weight else None
        grad_bias = grad_output.sum(0) if needs_bias else None
        wait_until(start + ctx.backward_s)
        return grad_input, grad_weight, grad_bias, None, None


class EmulatedLayer(nn.Linear):
    """A linear layer in float64 that stands for one stage's work on one microbatch.

    Args:
        width: Features in and out; the input has shape ``[rows, width]``.
        forward_s: Seconds that a forward lasts, the multiplication included.
        backward_s: Seconds that a whole backward (inputs and weights) lasts.
    """

    def __init__(self, width: int, forward_s: float = 0.02, backward_s: float = 0.04) -> None:
        super().__init__(width, width, dtype=torch.float64)
        self.forward_s, self.backward_s = forward_s, backward_s
        nn.init.orthogonal_(self.weight)  # a deep chain of them neither damps nor amplifies what passes through

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _TimedLinear.apply(input, self.weight, self.bias, self.forward_s, self.backward_s)
        return output

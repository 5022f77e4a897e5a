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


class _Slow(torch.autograd.Function):
    """The identity, whose backward lasts some seconds."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        wait_until(time.perf_counter() + ctx.seconds)
        return gradient, None


class EmulatedLayer(nn.Linear):
    """A linear layer in float64 that stands for one stage's work on one microbatch.

    The multiplication is torch's own node, which leads to a wait for the input and to one for the weight, so whoever
    can split a backward splits this one. Where the input asks for no gradient, the weight's wait lasts as long as both:
    else the first stage of all would have less work than the others. A stage whose actions last no time is the linear
    layer alone, without the waits, which would take time of themselves.

    Args:
        width: Features in and out; the input has shape ``[rows, width]``.
        forward_s: Seconds that a forward lasts, the multiplication included.
        inputs_s: Seconds that a backward for the input lasts.
        weights_s: Seconds that a backward for the weight lasts.
    """

    def __init__(self, width: int, forward_s: float = 0.02, inputs_s: float = 0.02, weights_s: float = 0.02) -> None:
        super().__init__(width, width, dtype=torch.float64)
        self.forward_s, self.inputs_s, self.weights_s = forward_s, inputs_s, weights_s
        nn.init.orthogonal_(self.weight)  # a deep chain of them neither damps nor amplifies what passes through

    def forward(self, input: Tensor) -> Tensor:
        if not (self.forward_s or self.inputs_s or self.weights_s):
            return super().forward(input)
        end = time.perf_counter() + self.forward_s
        extra = 0.0 if input.requires_grad else self.inputs_s
        weight = _Slow.apply(self.weight, self.weights_s + extra)
        output = nn.functional.linear(_Slow.apply(input, self.inputs_s), weight, self.bias)
        wait_until(end)
        return output

"""What it costs by itself to keep gradients for later: the backward of MLPs, kernel by kernel, without autograd."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCKS = 6
Half = tuple[int, Tensor, Tensor]  # layer, gradient of its output, its input


class Products:
    """Blocks of linear, GELU and linear, four times as wide inside.

    Args:
        tokens: of a microbatch.
        width: of a token.
    """

    def __init__(self, tokens: int, width: int) -> None:
        self._tokens, self._width = tokens, width
        shapes = [(4 * width, width), (width, 4 * width)] * BLOCKS
        self._weights = [torch.randn(shape) / width for shape in shapes]
        self._gradients: list[Tensor | None] = []

    def seconds(self, order: str) -> list[float]:
        """Processor seconds of a step's parts: of all "I" or "B", and of all "W".

        Args:
            order: "I" of the next microbatch, "W" of the oldest one, or "B", which computes the weights at once.
        """
        self._gradients = [None] * len(self._weights)
        saved = deque([self._forward() for part in order if part != "W"])
        waiting = deque[deque[Half]]()
        spent = {False: 0.0, True: 0.0}
        for part in order:
            start = time.process_time()
            if part == "I":
                waiting.append(deque(self._inputs(saved.popleft())))
            elif part == "W":
                self._weigh_all(_each(waiting.popleft()))
            else:
                self._weigh_all(self._inputs(saved.popleft()))
            spent[part == "W"] += time.process_time() - start
        return list(spent.values())

    def _forward(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer its input, and what GELU made it from."""
        inputs = [torch.randn(self._tokens, weight.shape[1]) for weight in self._weights]
        return [(value, value.clone()) for value in inputs]

    def _inputs(self, saved: list[tuple[Tensor, Tensor]]) -> Iterator[Half]:
        """The inputs' half; what is saved is let go of on the way."""
        gradient = torch.ones(self._tokens, self._width)
        for layer in reversed(range(len(self._weights))):
            value, before = saved.pop()
            yield layer, gradient, value
            gradient = gradient.mm(self._weights[layer])
            if layer % 2:
                gradient = torch.ops.aten.gelu_backward(gradient, before)

    def _weigh_all(self, halves: Iterator[Half]) -> None:
        """The weights' half of each layer, added to what other microbatches gave."""
        for layer, gradient, value in halves:
            found = gradient.t().mm(value)
            if (known := self._gradients[layer]) is None:
                self._gradients[layer] = found
            else:
                known.add_(found)


def _each(halves: deque[Half]) -> Iterator[Half]:
    """Each once, let go of when it is taken."""
    while halves:
        yield halves.popleft()

"""A second stream of the device, for the teacher of a pipeline of one stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_tspipe import tree


class Beside:
    """Lets a GPU run the teacher's forwards of a step beside the student's; a CPU has one stream, so nothing changes.

    The second stream begins where the step does: after the last update of the weights, and after the batch has begun
    its way to the device. The first stream waits for it before each loss, and so before all that comes after.

    Args:
        device: where the stage is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self._stream = self._module.Stream(device)
        self._begun = False

    def next_step(self) -> None:
        """The next `run` begins after all that the first stream was given by then."""
        self._begun = False

    @contextmanager
    def run(self) -> Iterator[None]:
        """What is launched meanwhile runs on the second stream."""
        if not self._begun:
            self._stream.wait_stream(self._module.current_stream(self._device))
            self._begun = True
        with self._module.stream(self._stream):
            yield

    def give(self, outputs: Any) -> None:
        """The first stream is going to read what the second one made: its memory is not free before that has ended."""
        if self._device.type == "cuda":
            for leaf in tree.flatten(outputs)[0]:
                leaf.record_stream(self._module.current_stream(self._device))

    def join(self) -> None:
        """What the first stream is given from now on begins after all that the second one was given."""
        if self._begun:
            self._module.current_stream(self._device).wait_stream(self._stream)

"""`self.student(x)` and `self.teacher(x)` outside of training steps: a forward through all stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_tspipe import tree
from lightning_tspipe.arguments import Call
from lightning_tspipe.comm import Comm
from lightning_tspipe.partition import Partition
from lightning_tspipe.stage import Network, Stage


class WholeForward:
    """Runs one network through all stages, with the same result on every rank.

    Args:
        stage: this rank's layers.
        comm: this rank's connections.
        parts: the layers of all stages.
        in_step: whether a training step runs.
        for_summary: whether a summary of the model watches this rank's layers.
    """

    def __init__(
        self,
        stage: Stage,
        comm: Comm,
        parts: Partition,
        in_step: Callable[[], bool],
        for_summary: Callable[[], bool],
    ) -> None:
        self._stage, self._comm, self._parts = stage, comm, parts
        self._in_step, self._for_summary = in_step, for_summary

    def take_over(self, name: Network, network: nn.Module) -> Callable[[], None]:
        """Let calls of a network mean this; returns what undoes it."""
        network.forward = partial(self.run, name)
        return lambda: vars(network).pop("forward", None)

    def run(self, network: Network, *args: Any, **kwargs: Any) -> Any:
        """The output of a network for these arguments.

        Raises:
            MisconfigurationException: within a training step.
        """
        if self._in_step():
            raise MisconfigurationException(
                f"self.{network}(...) was called in a training step, where each rank has one stage only. Use the "
                "outputs that `loss` gets; in validation_step, test_step and predict_step the call works."
            )
        inputs = args[0] if len(args) == 1 and not kwargs else Call(args, kwargs)
        run = self._run_for_summary if self._for_summary() else self._stage.run
        return self._comm.chain(partial(run, network), inputs)

    def _run_for_summary(self, network: Network, inputs: Any) -> Any:
        """A summary watches rank 0's layers: there those of other ranks run too, without memory."""
        output = self._stage.run(network, inputs)
        with suppress(RuntimeError):  # not every layer can run so; the summary then has no sizes for it
            value = tree.map_tensors(output, lambda leaf: leaf.to("meta"))
            for layer in chain.from_iterable(getattr(self._parts, network)[1:]):
                value = layer.module(value)
        return output

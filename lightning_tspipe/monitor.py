"""The callback that logs how well the pipeline is used."""

from __future__ import annotations

import resource
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_tspipe.clock import of_teacher
from lightning_tspipe.runtime import Runtime
from lightning_tspipe.stopwatch import Stopwatch
from lightning_tspipe.strategy import TSPipeStrategy

MB = 1e6
Report = tuple[float, float, float, int, int]  # seconds of the batch, of work, of waits; bytes sent, peak bytes


class PipelineMonitor(pl.Callback):
    """Logs utilization, bubbles, planned and measured time, bytes sent and peak memory of every rank.

    One batch in `log_every_n_steps` is timed, action by action. Each rank sends rank 0 its few numbers a batch later,
    and a batch after that rank 0 gives them to all loggers, so that no rank waits for another.

    Args:
        log_every_n_steps: which batches are timed; None takes the trainer's `log_every_n_steps`.

    Raises:
        ValueError: `log_every_n_steps` is no positive number.
        MisconfigurationException: the trainer has another strategy, or no logger.
    """

    def __init__(self, log_every_n_steps: int | None = None) -> None:
        if log_every_n_steps is not None and log_every_n_steps < 1:
            raise ValueError(f"log_every_n_steps={log_every_n_steps}: give at least 1, or None for the trainer's")
        self._every = log_every_n_steps
        self._batches = 0
        self._recording: Recording | None = None  # this batch
        self._recorded: Recording | None = None  # the one before
        self._sent: Recording | None = None  # the one before that, whose numbers are under way

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy_of(trainer, type(self).__name__)
        if stage == "fit" and not trainer.loggers:
            raise MisconfigurationException("Cannot use `PipelineMonitor` callback with `Trainer(logger=False)`.")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches, self._recording, self._recorded, self._sent = 0, None, None, None
        self._begin_if_due(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    def _restart(self) -> None:
        """What lies between two epochs, or before a batch that follows a validation, is not the batch's."""
        if self._recording is not None:
            self._recording.watch.restart()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._batches += 1
        self._pass_on(trainer)
        if self._recording is not None:
            self._recording.stop(trainer)
            self._recorded, self._recording = self._recording, None
        self._begin_if_due(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        while self._recorded is not None or self._sent is not None:
            self._pass_on(trainer)

    def _pass_on(self, trainer: pl.Trainer) -> None:
        """What is under way arrives, and what was recorded goes out."""
        if self._sent is not None:
            self._sent.arrive(trainer)
        if self._recorded is not None:
            self._recorded.send()
        self._sent, self._recorded = self._recorded, None

    def _begin_if_due(self, trainer: pl.Trainer) -> None:
        every = self._every or trainer.log_every_n_steps  # type: ignore[attr-defined]
        strategy = strategy_of(trainer, type(self).__name__)
        assert strategy.runtime is not None
        # `PipelineTrace` may have set one
        if every and (self._batches + 1) % every == 0 and strategy.runtime.stopwatch is None:
            self._recording = Recording(strategy)


class Recording:
    """One batch of one rank, from the end of the one before on."""

    def __init__(self, strategy: TSPipeStrategy) -> None:
        assert strategy.runtime is not None
        self._runtime: Runtime = strategy.runtime
        self._costs = strategy.predicted_costs
        self.watch = self._runtime.stopwatch = Stopwatch(self._runtime.device)
        self._sent = self._bytes
        self._step, self._microbatches = 0, (0, 0)
        self._own: Report = (0.0, 0.0, 0.0, 0, 0)

    @property
    def _bytes(self) -> int:
        return 0 if self._runtime.comm is None else self._runtime.comm.sent

    def stop(self, trainer: pl.Trainer) -> None:
        """The batch has ended."""
        self.watch.stop()
        self._runtime.stopwatch = None
        assert self._runtime.current is not None
        self._sent, self._step = self._bytes - self._sent, trainer.global_step
        self._microbatches = self._runtime.current.microbatches, self._runtime.current.teacher_microbatches

    def send(self) -> None:
        """A batch later: the device has come to its end, and rank 0 gets the numbers."""
        self._own = (*self.watch.sums(), self._sent, peak_bytes(self._runtime.device))
        if self._runtime.comm is not None:
            self._runtime.comm.report(self._own)

    def arrive(self, trainer: pl.Trainer) -> None:
        """Another batch later: rank 0 logs what has come."""
        comm = self._runtime.comm
        if comm is not None and comm.stage:
            return
        numbers = self.numbers([self._own, *([] if comm is None else comm.reports())])
        for logger in trainer.loggers if trainer.is_global_zero else ():
            names = {name: f"PipelineMonitor{logger.group_separator}{name}" for name in numbers}
            logger.log_metrics({names[name]: value for name, value in numbers.items()}, step=self._step - 1)

    def numbers(self, reports: list[Report]) -> dict[str, float]:
        """What is logged, from what every rank has sent."""
        seconds = max(report[0] for report in reports)
        plan = self._runtime.planner.find(*self._microbatches)
        costs = of_teacher(self._runtime.costs, *self._microbatches)
        work = [costs.work(stage, self._microbatches[0]) for stage in range(len(costs.t))]
        used = sum(report[1] for report in reports) / len(reports) / seconds
        found = {"utilization": used, "bubble": 1 - used, "step_s": seconds,
                 "planned_utilization": sum(work) / len(work) / plan.period if plan.period else 1.0}  # fmt: skip
        if self._costs is not None and costs.f[0]:
            found["planned_step_s"] = plan.period * self._costs.f[0] / costs.f[0]
        for rank, (_, busy, waits, sent, peak) in enumerate(reports):
            each = {"work_s": busy, "wait_s": waits, "sent_mb": sent / MB, "peak_mb": peak / MB}
            found |= {f"rank_{rank}_{name}": value for name, value in each.items()}
        return found


def strategy_of(trainer: pl.Trainer, name: str) -> TSPipeStrategy:
    """The trainer's strategy; raises MisconfigurationException if it is no pipeline."""
    strategy = trainer.strategy
    if not isinstance(strategy, TSPipeStrategy):
        raise MisconfigurationException(
            f"`{name}` watches a pipeline, but the strategy is {type(strategy).__name__}. Use "
            f'`Trainer(strategy="tspipe")`, or leave it out.'
        )
    return strategy


def peak_bytes(device: torch.device) -> int:
    """The most memory that this rank has taken so far: of its GPU, or of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""The side of a training step that faces the user: `loss`, Lightning's hooks around the backward, and logging."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torchmetrics import Metric

from lightning_tspipe import _lightning, _metrics
from lightning_tspipe.comm import Comm
from lightning_tspipe.logrelay import LossReport, Recorder
from lightning_tspipe.module import TeacherStudentModule, run_loss


class TrainingHooks:
    """Implements `hooks.StepHooks` for one module under one trainer.

    Args:
        trainer: the trainer.
        module: the user's module.
        signals: where a SIGTERM is noted.
    """

    def __init__(self, trainer: pl.Trainer, module: TeacherStudentModule, signals: _lightning.SignalLink) -> None:
        self._trainer, self._module, self._signals = trainer, module, signals
        self._metrics = dict(_metrics.metrics_of(module))
        self._names = {id(metric): name for name, metric in self._metrics.items()}
        owners: list[Any] = [module, *trainer.callbacks]  # type: ignore[attr-defined]
        self._are_seen = any(is_overridden("on_before_zero_grad", owner) for owner in owners)

    def before_forwards(self) -> None:
        """Zero the gradients, whose memory the activations can have, unless a hook is to see them in its place."""
        if not self._are_seen:
            _lightning.zero_grad(self._trainer, self._trainer.optimizers[0])

    def loss(self, student_out: Any, teacher_out: Any, target: Any, rows: slice) -> tuple[Tensor, LossReport]:
        """Run the user's loss and record what it logs; a faulty result is an error that names the fix."""
        recorder = Recorder(self._names, _metrics.cached_value)
        with torch.enable_grad(), logging_by(self._module, recorder.log):
            result = run_loss(self._module, student_out, teacher_out, target, rows)
        loss, extra = _checked(result)
        head = Recorder({}, _metrics.cached_value)
        head.add("output", "loss", loss)
        for name, value in extra.items():
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
                head.add("output", name, value)
        return loss, LossReport(head.entries + recorder.entries, head.values + recorder.values)

    def before_backward(self, loss: Tensor) -> Tensor:
        """Zero the gradients, if that has not been done, and fire the hooks that Lightning fires here."""
        if self._are_seen:
            _lightning.zero_grad(self._trainer, self._trainer.optimizers[0])
        scaled = loss / self._trainer.accumulate_grad_batches
        precision = self._trainer.precision_plugin
        self._trainer.strategy.pre_backward(scaled)
        return precision.pre_backward(scaled, self._module)

    def scale(self, loss: Tensor) -> Tensor:
        """What is differentiated for a microbatch after the first, without the hooks that fire once per batch."""
        scaled = loss / self._trainer.accumulate_grad_batches
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return scaled if scaler is None else scaler.scale(scaled)

    def after_backward(self, loss: Tensor) -> None:
        """Fire the hooks that Lightning fires after a backward."""
        scaled = loss / self._trainer.accumulate_grad_batches
        self._trainer.precision_plugin.post_backward(scaled, self._module)
        self._trainer.strategy.post_backward(scaled)

    def asked(self) -> int:
        """What signals have asked of this rank."""
        return self._signals.asked

    def ask(self, what: int) -> None:
        """What they have asked of a rank behind this one."""
        self._signals.ask(what)

    def agree(self, what: int) -> None:
        """What they have asked of any replica, as all know now."""
        self._signals.agree(what)

    def log(self, report: LossReport) -> None:
        """Make the `self.log` calls that were recorded in `loss`, in the place where the twin makes them."""
        for entry, value in report.items():
            if entry.kind == "log":
                assert value is not None
                self._module.log(entry.name, value, **dict(entry.options))
            elif entry.kind == "metric":
                metric = self._metrics[entry.metric]
                _metrics.set_cached_value(metric, value)
                self._module.log(entry.name, metric, **dict(entry.options))

    def output(self, report: LossReport) -> Tensor | dict[str, Any]:
        """What `training_step` returns."""
        outputs: dict[str, Any] = {entry.name: value for entry, value in report.items() if entry.kind == "output"}
        loss: Tensor = outputs["loss"]
        return loss if len(outputs) == 1 else outputs


@contextmanager
def logging_by(module: pl.LightningModule, log: Callable[..., None]) -> Iterator[None]:
    """Let `self.log` of the module mean something else."""
    before = vars(module).get("log")
    module.log = log  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.log
        else:
            module.log = before  # type: ignore[method-assign]


def refuse_log(name: str, *_: Any, **__: Any) -> None:
    """What `self.log` is within the input hooks."""
    raise MisconfigurationException(
        f"`self.log({name!r}, ...)` was called while a batch is loaded, on rank 0 alone and one batch early: in "
        "student_input, teacher_input, target or a transfer hook. Log it in `loss`; target(batch) can carry it there."
    )


def log_what_is_here(log: Callable[..., None], name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """What `self.log` is within a fit: Lightning's own, unless the value has no memory on this rank."""
    if isinstance(value, Tensor) and value.is_meta:
        raise MisconfigurationException(
            f"`self.log({name!r}, ...)` got a tensor without memory: only rank 0's hooks see the batch, and a rank has "
            "the parameters of its own stage only. Log it in `loss`, or skip tensors whose `is_meta` is true."
        )
    log(name, value, *args, **kwargs)


class Requeue(pl.Callback):
    """Saves the job and queues it again, as SLURM has asked, at the end of the batch that every rank was told of.

    Args:
        is_due: whether the current batch is that one.
        signals: what does it.
    """

    def __init__(self, is_due: Callable[[], bool], signals: _lightning.SignalLink) -> None:
        self._is_due, self._signals, self._due = is_due, signals, False

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Wait for the end of an accumulation window, since gradients are not saved."""
        self._due = self._due or self._is_due()
        if self._due and not _lightning.accumulates(trainer):
            self._due = False
            self._signals.requeue_now()


class MetricSync(pl.Callback):
    """Before the epoch's metrics are computed, gives every rank the state of those that `loss` updated."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One exchange per epoch, if the module has metrics; one that `loss` did not log is logged by a hook later."""
        metrics: dict[str, Metric] = dict(_metrics.metrics_of(pl_module))
        if not metrics:
            return
        last = self._comm.stages - 1
        states = self._comm.share(_metrics.states_of(pl_module) if self._comm.stage == last else None, last)
        if self._comm.stage != last:
            for name, (state, updates) in states.items():
                _metrics.adopt_state(metrics[name], state, updates)


def _checked(result: Any) -> tuple[Tensor, dict[str, Any]]:
    extra = {key: value for key, value in result.items() if key != "loss"} if isinstance(result, Mapping) else {}
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise MisconfigurationException(
            f"`loss` must return a scalar tensor, or a dict with a scalar tensor under 'loss'; it returned {what}. "
            "Reduce it, for example with `.mean()`."
        )
    if not loss.requires_grad:
        raise MisconfigurationException(
            "The loss does not depend on the student: it has no gradient. Compute it from `student_out`, and do not "
            "detach it."
        )
    return loss.reshape(()), extra

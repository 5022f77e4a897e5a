"""One fit on one rank: the feed, the runtime and the momentum teacher, tied to Lightning's loop while it lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lightning_tspipe import _lightning, _loaders
from lightning_tspipe.comm import Comm
from lightning_tspipe.data import Batch, make_batch
from lightning_tspipe.feed import Feed, FollowingFeed, LeadingFeed
from lightning_tspipe.memory import keep_freed
from lightning_tspipe.module import TeacherStudentModule
from lightning_tspipe.plan import Planner
from lightning_tspipe.randomness import Generators
from lightning_tspipe.replan import Replanner
from lightning_tspipe.replicas import Replicas
from lightning_tspipe.runtime import Runtime
from lightning_tspipe.stage import Stage
from lightning_tspipe.teacher import MomentumTeacher, pair_parameters
from lightning_tspipe.topology import Topology
from lightning_tspipe.training import MetricSync, Requeue, TrainingHooks, log_what_is_here, logging_by, refuse_log
from lightning_tspipe.whole import WholeGradient


class Fitting:
    """Everything of a rank that lives from the set-up of a fit to its end.

    Args:
        trainer, module: the user's.
        stage: this rank's layers.
        comm: this rank's connections; None for one stage.
        planner: makes the schedules.
        microbatches: what the user asked for.
        teacher_microbatches: how many the teacher has of a batch with rows enough, and whether the user gave them.
        topology: who is who.
        parameters: what this rank trains.
        replicas: data-parallel replicas; None if there are none.
        signals: where signals are noted.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: TeacherStudentModule,
        stage: Stage,
        comm: Comm | None,
        planner: Planner,
        microbatches: int | Literal["auto"],
        teacher_microbatches: tuple[int, bool],
        topology: Topology,
        parameters: Sequence[Tensor],
        replicas: Replicas | None,
        signals: _lightning.SignalLink,
    ) -> None:
        self._trainer, self._module, self._comm = trainer, module, comm
        self._microbatches, self._topology = microbatches, topology
        self._teacher_microbatches = teacher_microbatches
        self._teacher = _momentum_teacher(module)
        span = _lightning.profiler_span(trainer)
        self.runtime = Runtime(
            stage, comm, planner, self._teacher, module.loss_over, topology, parameters, replicas, span
        )
        self._signals = signals
        self._hooks = TrainingHooks(trainer, module, self._signals)
        self._feed: Feed | None = None
        self._loaded = 0
        self._generators = Generators(stage.device)
        self._undo: list[Callable[[], None]] = []
        self._replanner: Replanner | None = None
        if comm is not None and stage.device.type == "cpu":  # a host's clock does not tell what a kernel takes
            self._replanner = Replanner(self.runtime, comm)
        self.in_step = self._keeps_freed = False

    def connect(self, places: tuple[dict[int, int], int], before_loading: Callable[[], list[Any]]) -> None:
        """Put this rank's parts into Lightning's loop.

        Args:
            places: of this rank's parameters among all of the optimizer (`Shards.places`).
            before_loading: called before a loader is iterated for the first time; gives `LeadingFeed`'s `restore` for
                a pass that is resumed in its middle.
        """
        trainer = self._trainer
        self._before_loading = before_loading
        link = _loaders.LoaderLink(trainer, self._make_feed)
        _lightning.take_over_backward(trainer, True)
        self._undo += [link.close, partial(_lightning.take_over_backward, trainer, False)]
        self._undo.append(_lightning.skip_preparation(trainer, self.is_stand_in))
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        requeue = Requeue(self._is_requeued, self._signals)
        callbacks.append(requeue)
        self._undo.append(partial(callbacks.remove, requeue))
        if self._comm is None:
            return
        whole = WholeGradient(trainer.precision_plugin, self._comm, *places)
        self._undo += [whole.close, _lightning.clip_by(self._module, whole.total_norm)]
        self._undo.append(_lightning.first_rank_decides(trainer, self._comm.first_says))
        log = partial(log_what_is_here, self._module.log)
        guard = ExitStack()
        guard.enter_context(logging_by(self._module, log))
        self._undo.append(guard.close)
        for callback in callbacks:
            vars(callback)["log"] = log  # Lightning gives them the module's own at every run
        sync = MetricSync(self._comm)
        callbacks.insert(0, sync)
        self._undo.append(partial(callbacks.remove, sync))

    def close(self) -> None:
        """Take them out again."""
        for undo in reversed(self._undo):
            undo()

    @property
    def before_training(self) -> bool:
        """Whether the training loop has not begun, and no sanity check runs."""
        return self._feed is None and bool(self._trainer.training)

    def begin(self) -> None:
        """Training begins, or goes on: the teacher holds the version that the next step uses."""
        if self._teacher is not None:
            self._teacher.version = self._version(self._trainer.global_step + 1)

    def step(self) -> STEP_OUTPUT:
        """Train on the feed's current batch; what `training_step` returns."""
        assert self._feed is not None and self._feed.current is not None
        step = self._trainer.global_step + 1
        updates = not _lightning.accumulates(self._trainer)
        next_version = self._version(step + updates)
        if self._replanner is not None:
            info = self._feed.current.info
            self._replanner.before_step(info.microbatches, info.teacher_microbatches)
        self.in_step = True
        self._hooks.before_forwards()
        with self._trainer.precision_plugin.train_step_context():
            report = self.runtime.run_step(
                self._feed.current,
                self._feed.upcoming,
                self._hooks,
                version=self._version(step),
                next_version=next_version,
                completed=step - 1,
                lookahead=self._teacher is None or next_version <= step - 1,
                updates=updates,
            )
        self.in_step = False
        return self._hooks.output(report)

    def after_optimizer_step(self) -> None:
        """Make the update that the next step uses, so that a validation and a checkpoint see it."""
        if not self._keeps_freed and self.runtime.device.type == "cpu":  # what stays has its memory by now
            self._keeps_freed = True
            self._undo.insert(0, keep_freed())  # ends last
        step = self._trainer.global_step + 1  # Lightning counts the step after this call
        self._module.note_momentum(step)
        if self._teacher is not None and self._version(step + 1) == step:
            self._teacher.advance(step, step)

    def end(self) -> None:
        """No next step comes: nothing stays under way."""
        self.runtime.finish_ahead()
        if self._feed is not None:
            self._feed.settle()

    def ahead(self) -> list[Any] | None:
        """See `LeadingFeed.ahead`; what a checkpoint holds of the rank that loads."""
        return self._feed.ahead() if isinstance(self._feed, LeadingFeed) else None

    def is_stand_in(self, batch: Any) -> bool:
        """Whether this is the current batch as Lightning was given it, which is prepared already, or has no memory."""
        return self._feed is not None and batch is self._feed.stand_in

    def _is_requeued(self) -> bool:
        return self._feed is not None and self._feed.current is not None and self._feed.current.info.requeue

    def _version(self, step: int) -> int:
        return self._module.version_of(step, default_delay=1)

    def _make_feed(self, inner: Any) -> Feed:
        restore: list[Any] = []
        if self._feed is not None:
            self._feed.settle()
        else:
            restore = self._before_loading()
        if self._comm is not None and self._topology.stage:
            self._feed = FollowingFeed(inner, self._signals, self._begin_pass, self._comm)
        else:
            announce = self._comm.send_header if self._comm is not None else lambda header: None
            self._feed = LeadingFeed(
                inner, self._signals, self._begin_pass, self._load, announce, self._is_last_step, self._generators,
                restore if self._trainer.fit_loop.restarting else (),
            )  # fmt: skip
        return self._feed

    def _begin_pass(self) -> None:
        """Forget the batch that was looked ahead in a pass that ended early; number batches as Lightning does."""
        self.runtime.finish_ahead()
        self._loaded = self._trainer.fit_loop.total_batch_idx

    def _load(self, raw: Any) -> tuple[Any, Batch]:
        """Lightning's preparation, the user's input hooks, the cut into microbatches."""
        module = self._module
        self._loaded += 1
        count = self.runtime.microbatches if self._microbatches == "auto" else self._microbatches
        with logging_by(module, refuse_log):
            batch = _lightning.prepare_batch(self._trainer, raw)
            inputs = module.student_input(batch), module.teacher_input(batch), module.target(batch)
        fixed = self._microbatches != "auto"
        return batch, make_batch(self._loaded, batch, *inputs, count, fixed, *self._teacher_microbatches)

    def _is_last_step(self) -> bool:
        trainer = self._trainer
        one_more = trainer.accumulate_grad_batches == 1 and trainer.global_step + 1 >= trainer.max_steps
        return trainer.max_steps != -1 and one_more


def _momentum_teacher(module: TeacherStudentModule) -> MomentumTeacher | None:
    """The update of the teacher parameters that this rank holds; None for a frozen teacher."""
    if module.momentum is None:
        return None
    pairs = pair_parameters(module.teacher, module.ema_source()).values()
    local = [(teacher, student) for teacher, student in pairs if not teacher.is_meta]
    assert all(not student.is_meta for _, student in local), "a teacher stage is not where its source is"
    return MomentumTeacher(local, module.momentum_of)

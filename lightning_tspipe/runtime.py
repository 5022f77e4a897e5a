"""One loop over the actions of a step, and one dispatch table."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_tspipe import tree
from lightning_tspipe.comm import Comm
from lightning_tspipe.data import Batch, shapes_of
from lightning_tspipe.hooks import StepHooks
from lightning_tspipe.logrelay import LossRelay, LossReport, mean_of
from lightning_tspipe.plan import Planner
from lightning_tspipe.replicas import Replicas
from lightning_tspipe.schedule import Action, Costs, Op, Schedule, lower, step_order
from lightning_tspipe.stage import Network, Stage, differentiable
from lightning_tspipe.teacher import MomentumTeacher
from lightning_tspipe.topology import Topology

log = logging.getLogger(__name__)

Handler = Callable[[Batch, int], None]
NOTHING = nullcontext()


class Runtime:
    """Runs the steps of one rank.

    Args:
        stage: this rank's layers.
        comm: this rank's connections; None for a pipeline of one stage.
        planner: makes the schedule for a number of microbatches.
        teacher: the momentum update of this rank; None for a frozen teacher.
        loss_over: "batch" or "microbatch".
        topology: who is who.
        parameters: what this rank trains.
        replicas: data-parallel replicas to average gradients with; None if there are none.
        span: a context to run each action in, by its name, for a profiler; None costs nothing.
    """

    def __init__(
        self,
        stage: Stage,
        comm: Comm | None,
        planner: Planner,
        teacher: MomentumTeacher | None,
        loss_over: Literal["batch", "microbatch"],
        topology: Topology,
        parameters: Sequence[Tensor] = (),
        replicas: Replicas | None = None,
        span: Callable[[str], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._stage, self._comm, self._planner, self._teacher = stage, comm, planner, teacher
        self._loss_over, self._topology = loss_over, topology
        self._place, self._last = topology.stage, topology.is_last
        self._parameters, self._replicas = parameters, replicas
        self._relay = None if comm is None else LossRelay(comm)
        self._span = span
        self._done: Counter[int] = Counter()  # batch -> teacher forwards already made
        self._versions: dict[int, int] = {}
        self._completed = 0
        self._teacher_out: dict[int, list[list[Any]]] = {}
        self._student_out: list[list[Any]] = []
        self._gradients: dict[int, list[Tensor | None]] = {}
        self._out: Any = None
        self._reports: list[LossReport] = []
        self._backwards = self._gradients_done = 0
        self._report: LossReport | None = None
        self._keys: dict[Hashable, int] = {}  # short names of messages' shapes
        self._next: Batch | None = None
        self._pending: Batch | None = None  # its teacher work has begun somewhere in the pipeline
        self._programs: dict[tuple[int, int], tuple[Op, ...]] = {}
        self.current: Schedule | None = None  # of the last step
        self.busy: dict[str, float] = {"T": 0.0, "F": 0.0, "B": 0.0}
        self._table: dict[tuple[str, str], Handler] = {
            ("run", "T"): self._teacher_forward,
            ("run", "F"): self._student_forward,
            ("run", "B"): self._backward,
            ("run", "I"): self._backward_inputs,
            ("run", "W"): self._backward_weights,
        }
        for kind, edge in zip("TFBI", "TFBB", strict=True):
            self._table["recv", kind], self._table["send", kind] = partial(self._post, edge), partial(self._send, edge)

    @property
    def microbatches(self) -> int:
        """How many microbatches the planner wants."""
        return self._planner.microbatches

    @property
    def costs(self) -> Costs:
        """What the planner takes the stages to cost."""
        return self._planner.costs

    def schedule(self, microbatches: int) -> Schedule:
        """The schedule that steps of that many microbatches follow."""
        return self._planner.schedule(microbatches)

    def run_step(
        self,
        batch: Batch,
        upcoming: Callable[[], Batch | None],
        hooks: StepHooks,
        *,
        version: int,
        next_version: int,
        completed: int,
        lookahead: bool,
        updates: bool,
    ) -> LossReport:
        """Train on one batch and do what the schedule places here of the next batch's teacher work.

        Args:
            batch: the batch; the first rank's has the inputs.
            upcoming: gives the next batch, or None at the end; called when it is first needed.
            hooks: calls to the outside.
            version, next_version: the teacher's version for this batch and for the next.
            completed: optimizer steps made so far.
            lookahead: whether the next batch's teacher version exists already.
            updates: whether an optimizer step follows this batch.

        Returns:
            The loss and what it logged, the same on every rank.
        """
        self._hooks, self._next = hooks, None
        self.current = self.schedule(batch.info.microbatches)
        self._versions[batch.info.index], self._completed, self._updates = version, completed, updates
        self._reports, self._report, self._backwards, self._gradients_done, self._pending = [], None, 0, 0, None
        self._begin(batch)
        asked = False
        for op in self._program(batch.info.microbatches, self._done.pop(batch.info.index, 0)):
            action, target = op.action, batch
            if action.ahead:
                if lookahead and not asked:
                    self._stage.leave()
                    self._next, asked = upcoming(), True
                    if self._next is not None:
                        self._versions[self._next.info.index] = next_version
                if self._next is None or action.microbatch >= self._next.info.microbatches:
                    continue
                target = self._next
            try:
                with self._span(f"[TSPipe]{action}") if self._span is not None and op.verb == "run" else NOTHING:
                    self._table[op.verb, action.kind](target, action.microbatch)
            except Exception:
                self._show(batch.info.microbatches, action)
                raise
        if self._teacher is not None and updates:
            self._teacher.advance(completed, completed)  # the optimizer is about to replace this student
        self._stage.leave()
        if self._replicas is not None and updates:
            self._hooks.agree(self._replicas.finish())
        assert self._report is not None
        self._hooks.after_backward(self._report.values[0])
        self._finish(batch)
        if not asked:
            self._next = upcoming()
        if lookahead and self._next is not None and any(self.schedule(batch.info.microbatches).ahead):
            self._pending = self._next
            self._versions[self._next.info.index] = next_version
        return self._report

    def finish_ahead(self) -> None:
        """Do the rest of a looked-ahead batch's teacher work and forget it: no message stays under way."""
        batch, self._pending = self._pending, None
        if batch is None:
            return
        index = batch.info.index
        rest = [Action("T", q) for q in range(self._done.pop(index, 0), batch.info.microbatches)]
        for op in lower(rest, self._place, self._topology.stages):
            self._table[op.verb, op.action.kind](batch, op.action.microbatch)
        self._stage.leave()
        self._teacher_out.pop(index, None)
        self._versions.pop(index, None)
        self._stage.norms["teacher"].discard(index)
        self._done.clear()

    def _begin(self, batch: Batch) -> None:
        self._student_out = []
        if self._comm is None:
            return
        channels = self._comm
        if not self._last:
            assert self._relay is not None
            self._relay.post()
        structure, shapes = batch.info.target
        key = (structure, shapes)
        if self._place == 0 and shapes:
            channels.outward["Y"].know(key, structure, shapes)
            channels.outward["Y"].send(key, batch.target)
        if self._last and shapes:
            channels.inward["Y"].know(key, structure, shapes)
            channels.inward["Y"].post(key)

    def _finish(self, batch: Batch) -> None:
        self._stage.norms["student"].commit(batch.info.index)
        self._stage.norms["teacher"].commit(batch.info.index)
        del self._versions[batch.info.index], self._done[batch.info.index]  # the number may come again: the LR finder
        self._student_out = []
        if self._comm is not None:
            if (channel := self._comm.outward.get("F")) is not None:
                channel.retire(batch.info.microbatches)
            self._comm.end_step()

    def _program(self, microbatches: int, done: int) -> tuple[Op, ...]:
        if (microbatches, done) not in self._programs:
            row = self.schedule(microbatches).ranks[self._place]
            order, post_ahead = step_order(row, done), self._planner.post_ahead
            self._programs[microbatches, done] = lower(order, self._place, self._topology.stages, post_ahead=post_ahead)
        return self._programs[microbatches, done]

    def _show(self, microbatches: int, action: Action) -> None:
        schedule = self.schedule(microbatches)
        row = schedule.ranks[self._place]
        position = row.index(action) if action in row else 0
        where = f"{self._topology.describe(self._topology.rank)} failed at {action}"
        log.error("%s of this schedule:\n%s", where, schedule.grid(self._place, position))

    # --- messages

    def _post(self, kind: str, batch: Batch, q: int) -> None:
        assert self._comm is not None
        self._comm.inward[kind].post(self._key(kind, batch, q))

    def _send(self, kind: str, batch: Batch, q: int) -> None:
        assert self._comm is not None
        value, self._out = self._out, None
        channel, key = self._comm.outward[kind], self._key(kind, batch, q)
        if kind == "B" and not channel.knows(key):
            channel.know(key, tree.flatten(value)[1], shapes_of(value))
        channel.send(key, value)

    def _key(self, kind: str, batch: Batch, q: int) -> int:
        """Equal for messages of equal shapes; a gradient has the key of the activation that it belongs to."""
        network: Network = "teacher" if kind == "T" else "student"
        name = (network, batch.info.sizes[q])
        if name not in batch.keys:
            batch.keys[name] = self._keys.setdefault(batch.info.key(network, q), len(self._keys))
        return batch.keys[name]

    # --- work

    def _teacher_forward(self, batch: Batch, q: int) -> None:
        views = batch.teacher[q] if self._place == 0 else self._take("T")
        start = time.perf_counter()
        index = batch.info.index
        if self._teacher is not None and index in self._versions:
            self._teacher.advance(self._versions[index], self._completed)
        outputs = self._stage.teacher_forward((index, q), views)
        self._done[index] += 1
        if self._last:
            self._teacher_out.setdefault(index, []).append(outputs)
        else:
            self._out = outputs
        self.busy["T"] += time.perf_counter() - start

    def _student_forward(self, batch: Batch, q: int) -> None:
        views = batch.student[q] if self._place == 0 else self._take("F")
        start = time.perf_counter()
        outputs = self._stage.student_forward((batch.info.index, q), views)
        if self._last:
            self._student_out.append(outputs)
        else:
            self._out = outputs
            assert self._comm is not None
            gradients, key = self._comm.inward["B"], self._key("B", batch, q)
            if not gradients.knows(key):
                leaves = differentiable(tree.flatten(outputs)[0])
                gradients.know(key, tree.flatten(leaves)[1], shapes_of(leaves))
        self.busy["F"] += time.perf_counter() - start

    def _backward(self, batch: Batch, q: int) -> None:
        self._differentiate(batch, q, self._stage.backward)
        self._trained(batch)

    def _backward_inputs(self, batch: Batch, q: int) -> None:
        self._differentiate(batch, q, self._stage.backward_inputs)

    def _backward_weights(self, batch: Batch, q: int) -> None:
        start = time.perf_counter()
        self._stage.backward_weights((batch.info.index, q))
        self.busy["B"] += time.perf_counter() - start
        self._trained(batch)

    def _trained(self, batch: Batch) -> None:
        """All gradients of one more microbatch are there."""
        self._gradients_done += 1
        if self._gradients_done == batch.info.microbatches and self._updates and self._replicas is not None:
            self._replicas.start(self._parameters, self._hooks.asked())

    def _differentiate(self, batch: Batch, q: int, run: Callable[[Any, Any], list[Tensor]]) -> None:
        work = (batch.info.index, q)
        if self._last:
            start = time.perf_counter()
            self._differentiate_loss(batch, q)
            gradients = self._gradients.pop(q)
        else:
            self._take_report(batch)
            gradients = self._take("B")
            start = time.perf_counter()
        self._out = run(work, gradients)
        self.busy["B"] += time.perf_counter() - start
        self._backwards += 1

    def _take(self, kind: str) -> Any:
        assert self._comm is not None
        return self._comm.inward[kind].take()

    # --- the loss, on the last rank, and its way up

    def _reports_complete(self, batch: Batch) -> bool:
        return len(self._reports) == (1 if self._loss_over == "batch" else batch.info.microbatches)

    def _differentiate_loss(self, batch: Batch, q: int) -> None:
        """Run `loss` on what it covers and leave its gradients with respect to the outputs for the backwards."""
        if q in self._gradients:
            return
        self._stage.leave()
        index, sizes = batch.info.index, batch.info.sizes
        target = batch.target
        if self._comm is not None and not self._reports and batch.info.target[1]:
            target = batch.target = self._take("Y")
        elif self._comm is not None and not batch.info.target[1]:
            target = tree.unflatten([], batch.info.target[0])
        whole = self._loss_over == "batch"
        covered = range(len(sizes)) if whole else range(q, q + 1)
        if not whole:
            target = tree.split(target, sizes)[q]
        student = [tree.merge([self._student_out[p][v] for p in covered]) for v in range(len(self._student_out[q]))]
        outputs = self._teacher_out[index]
        teacher = [tree.merge([outputs[p][v] for p in covered]) for v in range(len(outputs[q]))]
        leaves, structure = tree.flatten(student)
        leaves = [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
        student = tree.unflatten(leaves, structure)
        first = not self._reports
        loss, report = self._hooks.loss(
            student if batch.info.student.is_list else student[0],
            teacher if batch.info.teacher.is_list else teacher[0],
            target,
        )
        self._reports.append(report)
        if whole:
            self._teacher_out.pop(index)
        for p in covered:
            self._student_out[p] = []
        if self._reports_complete(batch):
            self._teacher_out.pop(index, None)
            self._publish()
        scaled = self._hooks.before_backward(loss) if first else self._hooks.scale(loss)
        if not whole:
            scaled = scaled / len(sizes)
        torch.autograd.backward(scaled)
        floats = differentiable(leaves)
        if all(leaf.grad is None for leaf in floats):
            raise ValueError(
                "The loss does not depend on the student: no gradient reached its outputs. Compute it from "
                "`student_out`, and do not detach it."
            )
        parts = [[None] * len(covered) if leaf.grad is None else torch.split(leaf.grad, [sizes[p] for p in covered])
                 if len(covered) > 1 else [leaf.grad] for leaf in floats]  # fmt: skip
        for place, p in enumerate(covered):
            self._gradients[p] = [part[place] for part in parts]

    def _publish(self) -> None:
        """Send loss and logged values upstream, ahead of the gradients."""
        self._report = mean_of(self._reports)
        if self._relay is not None:
            self._relay.pass_on(self._report, self._hooks.asked())
        self._hooks.log(self._report)

    def _take_report(self, batch: Batch) -> None:
        """Take loss and logged values from below, and pass them on.

        They come before the first backward (loss over the batch) or the last one (per microbatch, when complete).
        """
        assert self._relay is not None
        due = 0 if self._loss_over == "batch" else batch.info.microbatches - 1
        if self._backwards not in (0, due):
            return
        self._stage.leave()
        if self._backwards != due:
            self._hooks.before_backward(torch.zeros((), device=self._stage.device))
            return
        self._report, asked = self._relay.take()
        self._hooks.ask(asked)
        if self._place:
            self._relay.pass_on(self._report, self._hooks.asked())
        self._hooks.log(self._report)
        if due == 0:
            self._hooks.before_backward(self._report.values[0])

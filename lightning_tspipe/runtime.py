"""One loop over the actions of a step, and one dispatch table."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from lightning_tspipe import tree
from lightning_tspipe.beside import Beside
from lightning_tspipe.channel import Channel
from lightning_tspipe.comm import Comm
from lightning_tspipe.data import Batch, shapes_of
from lightning_tspipe.hooks import StepHooks
from lightning_tspipe.journal import LOAD
from lightning_tspipe.logrelay import LossReport
from lightning_tspipe.lossside import LossSide
from lightning_tspipe.plan import Planner
from lightning_tspipe.replicas import Replicas
from lightning_tspipe.schedule import Action, Costs, Kind, LossOver, Op, Schedule, lower, step_order
from lightning_tspipe.stage import Network, Stage, differentiable
from lightning_tspipe.stopwatch import Stopwatch
from lightning_tspipe.teacher import MomentumTeacher
from lightning_tspipe.topology import Topology

log = logging.getLogger(__name__)

Handler = Callable[[Batch, int], None]


class _Bound(NamedTuple):
    """An op and what does it."""

    run: Handler
    microbatch: int
    ahead: bool
    action: Action


class Runtime:
    """Runs the steps of one rank.

    Args:
        stage: this rank's layers.
        comm: this rank's connections; None for a pipeline of one stage.
        planner: makes the schedule for a number of microbatches.
        teacher: the momentum update of this rank; None for a frozen teacher.
        loss_over: as of the module.
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
        loss_over: LossOver,
        topology: Topology,
        parameters: Sequence[Tensor] = (),
        replicas: Replicas | None = None,
        span: Callable[[str], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._stage, self._comm, self.planner, self._teacher = stage, comm, planner, teacher
        self.comm, self.device = comm, stage.device
        self.stopwatch: Stopwatch | None = None  # notes when each action begins and ends, if there is one
        self._topology = topology
        self._place, self._last = topology.stage, topology.is_last
        self._parameters, self._replicas = parameters, replicas
        world = comm.alone if comm is not None else None
        self._beside = Beside(stage.device) if comm is None else None
        self._loss = LossSide(stage, comm, loss_over, topology, world if replicas is None else replicas.group)
        self._span = span
        self._done: Counter[int] = Counter()  # batch -> teacher forwards already made
        self._versions: dict[int, int] = {}
        self._completed = 0
        self._out: Any = None
        self._gradients_done = 0
        self._keys: dict[Hashable, int] = {}  # short names of messages' shapes
        self._forms: dict[Hashable, dict[Network, list[int]]] = {}  # those of a batch's messages, by its shapes
        self._next: Batch | None = None
        self._pending: Batch | None = None  # its teacher work has begun somewhere in the pipeline
        self._programs: dict[tuple[int, int, int, bool], tuple[_Bound, ...]] = {}
        self.current: Schedule | None = None  # of the last step
        self.spent: dict[str, float] = dict.fromkeys("TFBIW", 0.0)  # seconds per kind of action, waits left out
        self.ran: Counter[str] = Counter()  # actions per kind
        self._table: dict[tuple[str, str], Handler] = {
            ("run", "T"): self._teacher_forward,
            ("run", "F"): self._student_forward,
            ("run", "B"): self._backward,
            ("run", "I"): self._backward_inputs,
            ("run", "W"): self._backward_weights,
        }
        networks: dict[str, Network] = {"T": "teacher", "F": "student", "B": "student"}
        for kind, edge in zip("TFBI", "TFBB", strict=True):
            inward, outward = (comm.inward.get(edge), comm.outward.get(edge)) if comm is not None else (None, None)
            if inward is not None:
                self._table["recv", kind] = partial(self._post, inward, networks[edge])
            if outward is not None:
                send = self._send_gradients if edge == "B" else self._send
                self._table["send", kind] = partial(send, outward, networks[edge])

    @property
    def microbatches(self) -> int:
        """How many microbatches the planner wants."""
        return self.planner.microbatches

    @property
    def busy(self) -> dict[str, float]:
        """Seconds spent in T, F and B; both parts of a split backward are in B."""
        spent = self.spent
        return {"T": spent["T"], "F": spent["F"], "B": spent["B"] + spent["I"] + spent["W"]}

    @property
    def costs(self) -> Costs:
        """What the planner takes the stages to cost."""
        return self.planner.costs

    def follow(self, planner: Planner) -> None:
        """Take the next steps' schedules from another planner; `Planner.come_after` must have been asked before."""
        self.planner = planner
        self._programs.clear()

    def schedule(self, microbatches: int, teacher: int | None = None) -> Schedule:
        """The schedule that steps of that many microbatches follow; None: as many of the teacher."""
        return self.planner.schedule(microbatches, teacher)

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
        self.current = self.schedule(batch.info.microbatches, batch.info.teacher_microbatches)
        self._versions[batch.info.index], self._completed, self._updates = version, completed, updates
        self._gradients_done, self._pending = 0, None
        watch = self.stopwatch
        if watch is not None:
            watch.next_step()
        if self._beside is not None:
            self._beside.next_step()
        self._loss.begin(batch, hooks)
        self._name(batch)
        asked = False
        for run, q, ahead, action in self._program(self.current, self._done.pop(batch.info.index, 0)):
            target = batch
            if ahead:
                if lookahead and not asked:
                    self._stage.leave()
                    self._next, asked = self._load(upcoming, batch), True
                    if self._next is not None:
                        self._versions[self._next.info.index] = next_version
                if self._next is None or q >= self._next.info.teacher_microbatches:
                    continue
                target = self._next
            try:
                run(target, q)
            except Exception:
                self._show(self.current, action)
                raise
        if self._teacher is not None and updates:
            self._teacher.advance(completed, completed)  # the optimizer is about to replace this student
        self._stage.leave()
        if self._replicas is not None and updates:
            self._hooks.agree(self._replicas.finish())
        report = self._loss.report
        assert report is not None
        self._hooks.after_backward(report.values[0])
        self._finish(batch)
        if not asked:
            self._next = self._load(upcoming, batch)
        if lookahead and self._next is not None and any(self.current.ahead):
            self._pending = self._next
            self._versions[self._next.info.index] = next_version
        return report

    def _load(self, upcoming: Callable[[], Batch | None], batch: Batch) -> Batch | None:
        """The batch after this one."""
        if self.stopwatch is not None:
            self.stopwatch.begin(LOAD, batch.info.index + 1, ahead=True)
        found = upcoming()
        if self.stopwatch is not None:
            self.stopwatch.end()
        if found is not None:
            self._name(found)
        return found

    def finish_ahead(self) -> None:
        """Do the rest of a looked-ahead batch's teacher work and forget it: no message stays under way."""
        batch, self._pending = self._pending, None
        if batch is None:
            return
        index = batch.info.index
        rest = [Action("T", q) for q in range(self._done.pop(index, 0), batch.info.teacher_microbatches)]
        for op in lower(rest, self._place, self._topology.stages):
            self._table[op.verb, op.action.kind](batch, op.action.microbatch)
        self._stage.leave()
        self._loss.forget(index)
        self._versions.pop(index, None)
        self._stage.norms["teacher"].discard(index)
        self._done.clear()

    def _finish(self, batch: Batch) -> None:
        self._stage.norms["student"].commit(batch.info.index)
        self._stage.norms["teacher"].commit(batch.info.index)
        del self._versions[batch.info.index], self._done[batch.info.index]  # the number may come again: the LR finder
        if self._comm is not None:
            if (channel := self._comm.outward.get("F")) is not None:
                channel.retire(batch.info.microbatches)
            self._comm.end_step()

    def _program(self, schedule: Schedule, done: int) -> tuple[_Bound, ...]:
        """What a step does, op by op, each with what does it: put together once."""
        watched = self.stopwatch is not None or self._span is not None
        key = schedule.microbatches, schedule.teacher_microbatches, done, watched
        if key not in self._programs:
            order, post_ahead = step_order(schedule.ranks[self._place], done), self.planner.post_ahead
            ops = lower(order, self._place, self._topology.stages, post_ahead=post_ahead)
            self._programs[key] = tuple(self._bind(op, watched) for op in ops)
        return self._programs[key]

    def _bind(self, op: Op, watched: bool) -> _Bound:
        action = op.action
        run = self._table[op.verb, action.kind]
        if watched and op.verb == "run":
            run = partial(self._watch, run, action)
        return _Bound(run, action.microbatch, action.ahead, action)

    def _watch(self, run: Handler, action: Action, batch: Batch, q: int) -> None:
        """Run an action for those who look on."""
        with nullcontext() if self._span is None else self._span(f"[TSPipe]{action}"):
            if self.stopwatch is None:
                run(batch, q)
            else:
                self.stopwatch.begin(action.kind, batch.info.index, q, action.ahead)
                run(batch, q)
                self.stopwatch.end()

    def _show(self, schedule: Schedule, action: Action) -> None:
        row = schedule.ranks[self._place]
        position = row.index(action) if action in row else 0
        where = f"{self._topology.describe(self._topology.rank)} failed at {action}"
        log.error("%s of this schedule:\n%s", where, schedule.grid(self._place, position))

    # --- messages

    def _post(self, channel: Channel, network: Network, batch: Batch, q: int) -> None:
        channel.post(batch.keys[network][q])

    def _send(self, channel: Channel, network: Network, batch: Batch, q: int) -> None:
        value, self._out = self._out, None
        channel.send(batch.keys[network][q], value)

    def _send_gradients(self, channel: Channel, network: Network, batch: Batch, q: int) -> None:
        if not channel.knows(key := batch.keys[network][q]):
            channel.know(key, tree.flatten(self._out)[1], shapes_of(self._out))
        self._send(channel, network, batch, q)

    def _name(self, batch: Batch) -> None:
        """Give a batch's messages their keys.

        They are equal for messages of equal shapes; a gradient has that of the activation that it belongs to.
        """
        info = batch.info
        form = info.sizes, info.teacher_sizes, info.student, info.teacher
        if form not in self._forms:
            counts: dict[Network, int] = {"teacher": info.teacher_microbatches, "student": info.microbatches}
            self._forms[form] = {
                network: [self._keys.setdefault(info.key(network, q), len(self._keys)) for q in range(count)]
                for network, count in counts.items()
            }
        batch.keys = self._forms[form]

    # --- work

    def _teacher_forward(self, batch: Batch, q: int) -> None:
        views = batch.teacher[q] if self._place == 0 else self._take("T", batch.keys["teacher"][q])
        start = time.perf_counter()
        index = batch.info.index
        if self._teacher is not None and index in self._versions:
            self._teacher.advance(self._versions[index], self._completed)
        if self._beside is None or self.stopwatch is not None:  # which times one stream
            outputs = self._stage.teacher_forward((index, q), views)
        else:
            with self._beside.run():
                outputs = self._stage.teacher_forward((index, q), views)
            self._beside.give(outputs)
        self._done[index] += 1
        if self._last:
            self._loss.keep_teacher(index, outputs)
        else:
            self._out = outputs
        self._note("T", start)

    def _student_forward(self, batch: Batch, q: int) -> None:
        views = batch.student[q] if self._place == 0 else self._take("F", batch.keys["student"][q])
        start = time.perf_counter()
        outputs = self._stage.student_forward((batch.info.index, q), views)
        if self._last:
            self._loss.keep_student(outputs)
        else:
            self._out = outputs
            assert self._comm is not None
            gradients, key = self._comm.inward["B"], batch.keys["student"][q]
            if not gradients.knows(key):
                leaves = differentiable(tree.flatten(outputs)[0])
                gradients.know(key, tree.flatten(leaves)[1], shapes_of(leaves))
        self._note("F", start)

    def _backward(self, batch: Batch, q: int) -> None:
        self._differentiate("B", batch, q, self._stage.backward)
        self._trained(batch)

    def _backward_inputs(self, batch: Batch, q: int) -> None:
        self._differentiate("I", batch, q, self._stage.backward_inputs)

    def _backward_weights(self, batch: Batch, q: int) -> None:
        start = time.perf_counter()
        self._stage.backward_weights((batch.info.index, q))
        self._note("W", start)
        self._trained(batch)

    def _trained(self, batch: Batch) -> None:
        """All gradients of one more microbatch are there."""
        self._gradients_done += 1
        if self._gradients_done < batch.info.microbatches:
            return
        self._loss.drop_zeros()
        if self._updates and self._replicas is not None:
            self._replicas.start(self._parameters, self._hooks.asked())

    def _differentiate(self, kind: Kind, batch: Batch, q: int, run: Callable[[Any, Any], list[Tensor]]) -> None:
        work = (batch.info.index, q)
        if self._last:
            start = time.perf_counter()
            if self._beside is not None:
                self._beside.join()
            gradients = self._loss.gradients(batch, q)
        else:
            self._loss.take_report(batch, q)
            gradients = self._take("B", batch.keys["student"][q])
            start = time.perf_counter()
        self._out = run(work, gradients)
        self._note(kind, start)

    def _note(self, kind: Kind, start: float) -> None:
        self.spent[kind] += time.perf_counter() - start
        self.ran[kind] += 1

    def _take(self, kind: str, key: int) -> Any:
        assert self._comm is not None
        value = self._comm.inward[kind].take(key)
        if self.stopwatch is not None:
            self.stopwatch.arrived()
        return value

"""What a schedule does without running it: a replay of its messages, and a timeline of its work.

`replay` executes the lowered ops of all ranks over several steps and knows no time: it finds deadlocks, wrong pairings
and use before arrival. `timeline` knows only time: it says how long a steady step takes, and `draw` shows it::

    rank 0 F0 F1 F2 T0' T1' T2' B0--- B1--- B2---
    rank 1 ... F0 F1 F2 B0----- B1--- B2--- T0 T1
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from lightning_tspipe.clock import clock, of_teacher, reaches_over
from lightning_tspipe.schedule import Action, Costs, Kind, Op, Schedule, lower, peers, step_order, validate

Edge = tuple[int, int, Kind]  # sender, receiver, and T, F or B; the gradient of an I travels with those of B
Work = tuple[int, int]  # batch, microbatch


class ReplayError(ValueError):
    """A schedule cannot run; the text names rank, stage, step and op and shows the grid with the cell marked."""

    def __init__(self, schedule: Schedule, rank: int, step: int, op: Op | None, reason: str) -> None:
        row = schedule.ranks[rank]
        same = [] if op is None else [op.action, Action("T", op.action.microbatch, True)]
        position = next((row.index(action) for action in same if action in row), len(row))
        at = "the end" if op is None else f"'{op}'"
        super().__init__(f"rank {rank} (stage {rank}), step {step}, {at}: {reason}\n{schedule.grid(rank, position)}")
        self.rank, self.step, self.op, self.reason = rank, step, op, reason


@dataclass(frozen=True, slots=True)
class Replay:
    """What a successful replay counted.

    Args:
        messages: per (sender, receiver, kind), how many messages went; gradients of I count as B.
        held: per edge as above, the most messages that were sent and for which no receive was posted yet.
        in_flight: per rank, the most student microbatches whose forward was done and whose B (or I) was not.
    """

    messages: Mapping[Edge, int]
    held: Mapping[Edge, int]
    in_flight: tuple[int, ...]


def replay(
    schedule: Schedule,
    *,
    steps: int = 4,
    first_done: int | Sequence[int] = 0,
    last_has_next: bool = False,
    rendezvous: bool = True,
    post_ahead: int = 2,
    next_microbatches: int | None = None,
    window: int | None = None,
) -> Replay:
    """Run the ops of all ranks over some steps, without time, and check every message.

    Args:
        schedule: what to run; need not be valid.
        steps: number of optimizer steps.
        first_done: teacher forwards of the first batch made before, on every rank or one number per rank.
        last_has_next: whether a batch follows the last step. If so, what one rank made ahead and the one below did
            not is left under way, else nothing is.
        rendezvous: a send blocks its rank until the receive is posted, except that of a ``Tq'`` that the receiver
            runs only a step later and cannot post yet. False: sends never block.
        post_ahead: as in `schedule.lower`.
        next_microbatches: of the teacher in the batch after the last step, if their number differs.
        window: batches of an optimizer step, each a step here, if nothing is done ahead over a window's end.

    Raises:
        ReplayError: a deadlock, a message without its counterpart, use before arrival or a wrong order.
        ValueError: an argument is out of range.
    """
    done = (first_done,) * schedule.stages if isinstance(first_done, int) else tuple(first_done)
    teacher = schedule.teacher_microbatches
    falling = all(above >= below for above, below in pairwise((teacher, *done, 0)))
    if len(done) != schedule.stages or not falling:
        raise ValueError(f"first_done is {first_done}: give at most M per rank, not growing from rank to rank")
    if steps < 1:
        raise ValueError(f"steps is {steps}: give at least 1")
    following = teacher if next_microbatches is None else next_microbatches
    run, ahead = _Run(schedule, rendezvous, done), schedule.ahead
    for rank, row in enumerate(schedule.ranks):
        for step in range(steps):
            has_come, goes_on = reaches_over(step, steps, window or steps)
            order = step_order(row, ahead[rank] if has_come else 0 if step else done[rank])
            coming = teacher * goes_on if step < steps - 1 else following * last_has_next
            ops = lower(order, rank, schedule.stages, post_ahead=post_ahead)
            run.programs[rank] += [(step, op) for op in ops if not op.action.ahead or op.action.microbatch < coming]
    run.to_the_end()
    run.check_leftovers([min(s, following * last_has_next) for s in ahead])
    messages = {edge: len(channel.sent) - channel.before for edge, channel in run.channels.items()}
    held = {edge: channel.held for edge, channel in run.channels.items() if channel.held}
    return Replay(messages, held, tuple(run.most_in_flight))


@dataclass(slots=True)
class _Channel:
    """One directed edge and kind: the n-th message sent meets the n-th receive posted."""

    sent: list[Work] = field(default_factory=list)
    posted: list[Work] = field(default_factory=list)
    place: dict[Work, int] = field(default_factory=dict)  # of what is posted
    used: int = 0
    before: int = 0  # messages under way at the start
    held: int = 0

    def add(self, side: list[Work], work: Work) -> str | None:
        """Append to `sent` or `posted`; the reason if the other side has something else at that place."""
        side.append(work)
        if side is self.posted:
            self.place.setdefault(work, len(side) - 1)
        self.held = max(self.held, len(self.sent) - len(self.posted))
        place = len(side) - 1
        if place < min(len(self.sent), len(self.posted)) and self.sent[place] != self.posted[place]:
            pair = f"sender has {_name(self.sent[place])}, the receiver {_name(self.posted[place])}"
            return f"as message {place} of this edge the {pair}"
        return None


class _Run:
    """The state of all ranks in a replay."""

    def __init__(self, schedule: Schedule, rendezvous: bool, done: Sequence[int]) -> None:
        self.schedule, self.rendezvous, self.ahead = schedule, rendezvous, schedule.ahead
        self.programs: list[list[tuple[int, Op]]] = [[] for _ in done]
        self.worked: list[set[tuple[Kind, int, int]]] = [{("T", 0, q) for q in range(s)} for s in done]
        self.most_in_flight = [0] * schedule.stages
        self.in_flight = [0] * schedule.stages
        self.channels: dict[Edge, _Channel] = {}
        for rank, (above, below) in enumerate(pairwise(done)):
            sent = [(0, q) for q in range(below, above)]
            self.channels[rank, rank + 1, "T"] = _Channel(sent, before=len(sent), held=len(sent))

    def to_the_end(self) -> None:
        """Let every rank go as far as it can, again and again; nobody moving before the end is a deadlock."""
        heads = [0] * len(self.programs)
        moved = True
        while moved:
            moved = False
            for rank, program in enumerate(self.programs):
                while heads[rank] < len(program) and self.waits_for(rank, *program[heads[rank]]) is None:
                    self.execute(rank, *program[heads[rank]])
                    heads[rank] += 1
                    moved = True
        stuck = [
            (rank, *program[heads[rank]]) for rank, program in enumerate(self.programs) if heads[rank] < len(program)
        ]
        if stuck:
            story = (f"rank {rank} at step {step}, '{op}', waits for {self.waits_for(rank, step, op)}"
                     for rank, step, op in stuck)  # fmt: skip
            raise ReplayError(self.schedule, *stuck[0], f"deadlock: {'; '.join(story)}")

    def channel(self, rank: int, op: Op, incoming: bool) -> _Channel | None:
        """The channel of an action's input or of its result."""
        kind = op.action.kind
        peer = peers(kind, rank, self.schedule.stages)[0 if incoming else 1]
        if peer is None:
            return None
        return self.channels.setdefault((*((peer, rank) if incoming else (rank, peer)), _edge(kind)), _Channel())

    def waits_for(self, rank: int, step: int, op: Op) -> str | None:
        """What a rank cannot go on without, None if it can."""
        action = op.action
        if op.verb == "run" and (channel := self.channel(rank, op, True)) is not None:
            work = (step + action.ahead, action.microbatch)
            if channel.place.get(work, -1) >= len(channel.sent):
                return "its message"
        if op.verb == "send" and self.rendezvous and (channel := self.channel(rank, op, False)) is not None:
            crosses = action.ahead and action.microbatch >= self.ahead[rank + 1]
            if len(channel.posted) <= len(channel.sent) and not crosses:
                return "the receive to be posted"
        return None

    def execute(self, rank: int, step: int, op: Op) -> None:
        """One op that need not wait; raises ReplayError if it is wrong here."""
        work = (step + op.action.ahead, op.action.microbatch)
        channel = self.channel(rank, op, op.verb != "send")
        if op.verb == "run":
            fault = self.misplaced(rank, step, op.action)
            if channel is not None and work not in channel.place:
                fault = fault or "no receive was posted for its message"
            elif channel is not None:
                fault = fault or (None if channel.posted[channel.used] == work else "takes its message out of order")
                channel.used += 1
            self.worked[rank].add((op.action.kind, *work))
            self.in_flight[rank] += {"F": 1, "B": -1, "I": -1}.get(op.action.kind, 0)
            self.most_in_flight[rank] = max(self.most_in_flight[rank], self.in_flight[rank])
        elif channel is None:
            fault = "there is no neighbour on that side"
        elif op.verb == "recv":
            fault = channel.add(channel.posted, work)
        else:
            known = (op.action.kind, *work) in self.worked[rank]
            fault = channel.add(channel.sent, work) if known else "sent before it has run"
        if fault is not None:
            raise ReplayError(self.schedule, rank, step, op, fault)

    def misplaced(self, rank: int, step: int, action: Action) -> str | None:
        """The reason if what an action needs on its own rank has not run."""
        worked, q, count = self.worked[rank], action.microbatch, self.schedule.microbatches
        pieces = self.schedule.teacher_microbatches
        batch = step + action.ahead
        needs: list[tuple[Kind, int, int]] = []
        if action.kind == "T":
            needs = [("T", batch, q - 1) if q else ("T", batch - 1, pieces - 1)] if batch or q else []
        elif action.kind in "BI":
            needs = [("F", batch, q)]
            if rank == self.schedule.stages - 1:
                whole = self.schedule.loss_over == "batch"
                needs += [("T", batch, p) for p in self.schedule.taught(q)]
                needs += [("F", batch, p) for p in (range(count) if whole else range(q, q + 1))]
        elif action.kind == "W":
            needs = [("I", batch, q)]
        if (action.kind, batch, q) in worked:
            return "runs twice"
        return next((f"{kind}{p} of batch {b} has not run" for kind, b, p in needs if (kind, b, p) not in worked), None)

    def check_leftovers(self, ahead: Sequence[int]) -> None:
        """At the end nothing is under way but what the last step made ahead for a batch that follows."""
        for (sender, receiver, kind), channel in self.channels.items():
            expected = ahead[sender] - ahead[receiver] if kind == "T" else 0
            step = self.programs[receiver][-1][0] if self.programs[receiver] else 0
            if len(channel.sent) - len(channel.posted) != expected:
                what = f"{len(channel.sent)} {kind} messages came from rank {sender} for {len(channel.posted)} receives"
                raise ReplayError(self.schedule, receiver, step, None, f"{what}; {expected} may be under way")
            if channel.used != len(channel.posted):
                what = f"{len(channel.posted) - channel.used} {kind} messages of rank {sender}"
                raise ReplayError(self.schedule, receiver, step, None, f"{what} were received and never used")


def _edge(kind: Kind) -> Kind:
    return "B" if kind == "I" else kind


def _name(work: Work) -> str:
    return f"microbatch {work[1]} of batch {work[0]}"


@dataclass(frozen=True, slots=True)
class Span:
    """One action's time on a rank, seconds; `batch` is the one that it works for."""

    action: Action
    batch: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """When every rank does what.

    Args:
        spans: per rank, in order of time.
        step_ends: per rank, when each of its steps ends (its optimizer step included), seconds.
        period: seconds between steady steps.
        utilization: mean busy time of a rank per step, over `period`; 1.0 is a balanced pipeline without bubbles.
        lower_bound: the busiest rank's work per step; no period is shorter.
        in_flight: per rank, the most student microbatches whose forward was done and whose B (or I) was not.
        held: per rank, the most whose forward was done and whose B (or W) was not.
    """

    spans: tuple[tuple[Span, ...], ...]
    step_ends: tuple[tuple[float, ...], ...]
    period: float
    utilization: float
    lower_bound: float
    in_flight: tuple[int, ...]
    held: tuple[int, ...]

    @property
    def bubble(self) -> float:
        """The share of a steady step that a rank is idle, on average."""
        return 1 - self.utilization


def timeline(schedule: Schedule, costs: Costs, *, steps: int = 6) -> Timeline:
    """Time a schedule from a cold start to a last step that has no successor; messages cost only their latency.

    Args:
        schedule: what to time; must be valid.
        costs: seconds per action, for as many stages.
        steps: number of optimizer steps, at least 4 so that there are steady ones.

    Raises:
        ReplayError: the ranks wait for each other.
        ValueError: the schedule is not valid, or an argument does not fit it.
    """
    validate(schedule)
    if steps < 4:
        raise ValueError(f"steps is {steps}: give at least 4, of which the first and the last are not steady")
    if len(costs.t) != schedule.stages:
        raise ValueError(f"costs are for {len(costs.t)} stages, not {schedule.stages}: give one entry per stage")
    times = clock(schedule, costs, steps=steps)
    programs = [[(step, a) for step, order in enumerate(orders) for a in order] for orders in times.orders]
    for rank, (program, starts) in enumerate(zip(programs, times.starts, strict=True)):
        if len(starts) < len(program):
            step, action = program[len(starts)]
            raise ReplayError(schedule, rank, step, Op("run", action), "its message never comes: deadlock")
    each = costs.per_action(schedule.microbatches, schedule.teacher_microbatches)
    spans = tuple(
        tuple(
            Span(action, step + action.ahead, start, start + each.seconds(action.kind, rank))
            for (step, action), start in zip(program, times.starts[rank], strict=True)
        )
        for rank, program in enumerate(programs)
    )
    given = of_teacher(costs, schedule.microbatches, schedule.teacher_microbatches)
    work = [given.work(stage, schedule.microbatches) for stage in range(schedule.stages)]
    return Timeline(
        spans=spans,
        step_ends=tuple(map(tuple, times.step_ends)),
        period=times.period,
        utilization=sum(work) / len(work) / times.period if times.period else 1.0,
        lower_bound=max(work),
        in_flight=tuple(_most(row, "BI") for row in spans),
        held=tuple(_most(row, "BW") for row in spans),
    )


def _most(row: Iterable[Span], ends: str) -> int:
    """The most microbatches between their F and the end of their backward."""
    changes = ((span.action.kind == "F") - (span.action.kind in ends) for span in row)
    return max(accumulate(changes), default=0)


def draw(timeline: Timeline, *, width: int = 120, start: float = 0.0, end: float | None = None) -> str:
    """A text grid with one row per rank and time from left to right; '.' is idle.

    Cells show their actions (``T3'``) if all of them have room, else only the kinds, with a small ``t`` for a teacher
    forward that works for the next batch; dashes go on to the end of an action.

    Args:
        timeline: what to draw.
        width: most columns of a line; less are used if every label has room.
        start: seconds, left edge.
        end: seconds, right edge; None means the end of the last action.
    """
    spans = [span for row in timeline.spans for span in row]
    end = max(span.end for span in spans) if end is None else end
    head = len(f"rank {len(timeline.spans) - 1} ")
    if end <= start or width <= head:
        raise ValueError(f"nothing to draw from {start} to {end} in {width} columns: give a later end or more columns")
    shown = [span for span in spans if span.end > span.start and span.end > start and span.start < end]
    roomy = max(((len(str(span.action)) + 1) / (span.end - span.start) for span in shown), default=0.0)
    whole = roomy * (end - start) <= width - head + 1e-9
    shortest = min((span.end - span.start for span in shown), default=end - start)
    scale = roomy or 1 / shortest
    if not whole:
        fitting = (width - head) / (end - start)  # if it can be, a whole number of columns for the shortest action
        scale = math.floor(fitting * shortest + 1e-9) / shortest or fitting
    columns = math.ceil((end - start) * scale - 1e-9)
    lines = []
    for rank, row in enumerate(timeline.spans):
        cells = ["."] * columns
        for span in row:
            left, right = (round((edge - start) * scale) for edge in (span.start, span.end))
            label = str(span.action) if whole else span.action.kind
            text = (label.lower() if span.action.ahead and not whole else label).ljust(right - left - whole, "-") + " "
            for column in range(max(left, 0), min(right, columns)):
                cells[column] = text[column - left]
        lines.append(f"rank {rank} ".ljust(head) + "".join(cells).rstrip(" "))
    return "\n".join(lines)

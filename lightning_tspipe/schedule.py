"""Schedules as data: actions, orders, the communication derived from them, validation and the text form.

Rank ``k`` owns stage ``k`` of student and teacher. Per batch and microbatch it runs ``T`` (teacher forward), ``F``
(student forward) and ``B`` (full backward), or ``I`` (backward for inputs) and ``W`` (backward for weights). A schedule
holds ONE steady step per rank. Its primed actions work for the next batch, so they fill the holes of this one::

    stages=2 microbatches=3 loss_over=batch
    rank 0: F0 F1 F2 T0' T1' T2' B0 B1 B2        the hole before B0 is filled with the next batch's teacher
    rank 1: T0 T1 T2 F0 F1 F2 B0 B1 B2           the hole before F0 is filled with what was not done ahead

Method: Lim et al., "TSPipe", ICML 2022, PMLR 162:13302-13312, https://proceedings.mlr.press/v162/lim22a.html.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import add
from typing import Any, Literal, cast, get_args

Kind = Literal["T", "F", "B", "I", "W"]
LossOver = Literal["batch", "microbatch", "student_microbatch"]

KINDS: tuple[Kind, ...] = get_args(Kind)
LOSSES = get_args(LossOver)


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One piece of work of one rank; ``ahead`` (printed as a prime) says that it belongs to the next batch."""

    kind: Kind
    microbatch: int
    ahead: bool = False

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}{chr(39) if self.ahead else ''}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read ``"T3'"``; raises ValueError for anything that `str` does not print."""
        if not (match := re.fullmatch(r"([TFBIW])(0|[1-9][0-9]*)('?)", text)):
            raise ValueError(f"{text!r} is not an action: write one of T F B I W and a microbatch, such as F0 or T3'")
        return cls(cast(Kind, match[1]), int(match[2]), bool(match[3]))


@dataclass(frozen=True, slots=True)
class Op:
    """What the runtime's loop dispatches on: post a receive, run an action, start a send."""

    verb: Literal["recv", "run", "send"]
    action: Action

    def __str__(self) -> str:
        return str(self.action) if self.verb == "run" else f"{self.verb} {self.action}"

    @classmethod
    def parse(cls, text: str) -> Op:
        """Read ``"recv F3"``, ``"F3"`` or ``"send F3"``."""
        for verb in ("recv", "send"):
            if text.startswith(f"{verb} "):
                return cls(verb, Action.parse(text[5:]))
        return cls("run", Action.parse(text))


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds per student microbatch, one entry per stage; leave `w` out if the backward is not split.

    Args:
        t, f, b, w: teacher forward, student forward, backward for inputs, backward for weights.
        message, optimizer: seconds of one message between neighbours, and of one optimizer step of a rank.
        exchange: seconds from when all ranks are through with their rows until any may make its optimizer step, where
            a scalar of all stages comes before it (clipping by norm, a loss scale); None: no rank waits for another.
        whole: a full backward, of which the two parts may take more; none given: `b` + `w`.
        t_fixed: what of `t` a teacher forward takes however few rows it has; none given: nothing.
    """

    t: tuple[float, ...]
    f: tuple[float, ...]
    b: tuple[float, ...]
    w: tuple[float, ...] = ()
    message: float = 0.0
    optimizer: float = 0.0
    exchange: float | None = None
    whole: tuple[float, ...] = ()
    t_fixed: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.w:
            object.__setattr__(self, "w", (0.0,) * len(self.b))
        given = [name for name in ("whole", "t_fixed") if getattr(self, name)]
        lengths = {name: len(getattr(self, name)) for name in (*"tfbw", *given)}
        require(len(set(lengths.values())) == 1 and bool(self.t), f"costs need one entry per stage, not {lengths}")
        for name, value in asdict(self).items():
            if value is None:
                continue
            fine = all(0 <= seconds < math.inf for seconds in (value if isinstance(value, tuple) else (value,)))
            require(fine, f"costs.{name} is {value}: give finite seconds that are not negative")

    @classmethod
    def uniform(cls, stages: int, t: float = 1, f: float = 1, b: float = 1, w: float = 1, message: float = 0) -> Costs:
        """The same costs on every one of `stages` stages."""
        require(stages >= 1, f"stages is {stages}: give at least 1")
        return cls((t,) * stages, (f,) * stages, (b,) * stages, (w,) * stages, message)

    def recomputed(self) -> Costs:
        """Where every backward begins with its forward again: in I, but in W on the first stage, whose I is nothing."""
        b, w = ((self.b[0], *map(add, self.b[1:], self.f[1:])), (self.w[0] + self.f[0], *self.w[1:]))
        return replace(self, b=b, w=w, whole=tuple(map(add, self.whole, self.f)))

    def scaled(self, by: float, stages: Sequence[int] | None = None) -> Costs:
        """So many times the seconds of every action, of all stages or of these; messages and optimizer stay."""
        places = range(len(self.t)) if stages is None else stages
        names = (*"tfbw", "whole", "t_fixed")
        columns: dict[str, tuple[float, ...]] = {name: getattr(self, name) for name in names}
        changed: dict[str, Any] = {n: tuple(by * column[k] for k in places if column) for n, column in columns.items()}
        return replace(self, **changed)

    def per_action(self, microbatches: int, teacher_microbatches: int) -> Costs:
        """The same with `t` of one of the teacher's microbatches, where it has more or fewer than the student."""
        if teacher_microbatches == microbatches:
            return self
        share, fixed = microbatches / teacher_microbatches, self.t_fixed or (0.0,) * len(self.t)
        parts = ((seconds, min(seconds, same)) for seconds, same in zip(self.t, fixed, strict=True))
        return replace(self, t=tuple(same + (seconds - same) * share for seconds, same in parts))

    def seconds(self, kind: Kind, stage: int) -> float:
        """What one action takes on a stage."""
        b, w = self.b[stage], self.w[stage]
        whole = self.whole[stage] if self.whole else b + w
        return {"T": self.t[stage], "F": self.f[stage], "B": whole, "I": b, "W": w}[kind]

    def work(self, stage: int, microbatches: int, split: bool | None = None) -> float:
        """Seconds that a rank is busy per step; no schedule has a step shorter than the largest of them.

        Args:
            stage: which rank.
            microbatches: M.
            split: whether its backwards are split; None: whatever is less work.
        """
        whole, parts = self.seconds("B", stage), self.b[stage] + self.w[stage]
        backward = min(whole, parts) if split is None else parts if split else whole
        return microbatches * (self.t[stage] + self.f[stage] + backward) + self.optimizer


@dataclass(frozen=True, slots=True)
class Schedule:
    """One steady step of every rank, the same for each step (`step_order` adapts it to what is already done).

    `teacher_microbatches` is how many the teacher's forwards of a batch are cut into; 0 stands for `microbatches`.
    """

    stages: int
    microbatches: int
    loss_over: LossOver
    ranks: tuple[tuple[Action, ...], ...]
    teacher_microbatches: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher_microbatches", self.teacher_microbatches or self.microbatches)

    @property
    def ahead(self) -> tuple[int, ...]:
        """For each rank how many teacher forwards of the next batch it makes in a step (s_k)."""
        return tuple(map(self.ahead_of, range(self.stages)))

    def ahead_of(self, rank: int) -> int:
        """`ahead` of one rank."""
        return sum(action.ahead and action.kind == "T" for action in self.ranks[rank])

    def taught(self, microbatch: int) -> range:
        """The teacher's microbatches that the loss of one of the student's needs."""
        count, pieces = self.microbatches, self.teacher_microbatches
        return covering(microbatch, count, pieces) if self.loss_over == "microbatch" else range(pieces)

    def __str__(self) -> str:
        rows = (f"rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.ranks))
        header = f"stages={self.stages} microbatches={self.microbatches} loss_over={self.loss_over}"
        if self.teacher_microbatches != self.microbatches:
            header += f" teacher_microbatches={self.teacher_microbatches}"
        return "\n".join((header, *rows))

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read what `str` prints; raises ValueError with the line that cannot be read. Does not validate."""
        header, *lines = text.strip().splitlines() or [""]
        pattern = r"stages=(\d+) microbatches=(\d+) loss_over=(\w+)(?: teacher_microbatches=(\d+))?"
        if not (match := re.fullmatch(pattern, header.strip())) or match[3] not in LOSSES:
            raise ValueError(
                f"first line {header!r}: write stages=2 microbatches=3 loss_over=batch (or {' or '.join(LOSSES[1:])})"
            )
        for rank, line in enumerate(lines):
            require(line.strip().startswith(f"rank {rank}:"), f"line {line!r}: expected 'rank {rank}: ...'")
        rows = (tuple(map(Action.parse, line.split(":", 1)[1].split())) for line in lines)
        return cls(int(match[1]), int(match[2]), cast(LossOver, match[3]), tuple(rows), int(match[4] or 0))

    def grid(self, rank: int | None = None, position: int | None = None) -> str:
        """The rows in aligned columns, with ``>cell<`` at one position; one past the end marks what is missing."""
        cells = [list(map(str, row)) for row in self.ranks]
        if rank is not None and position is not None:
            cells[rank][position : position + 1] = [f">{(*cells[rank], '?')[position]}<"]
        wide = max((len(cell) for row in cells for cell in row), default=1)
        rows = (" ".join(cell.ljust(wide) for cell in row) for row in cells)
        return "\n".join(f"rank {rank}: {row}".rstrip() for rank, row in enumerate(rows))


class ScheduleError(ValueError):
    """A schedule breaks a rule; the text names rank, cell and reason and shows the grid with the cell marked."""

    def __init__(self, schedule: Schedule, rank: int, position: int, reason: str) -> None:
        cell = (*schedule.ranks[rank], "end of row")[position]
        super().__init__(f"rank {rank}, cell {position} ({cell}): {reason}\n{schedule.grid(rank, position)}")
        self.rank, self.position, self.reason = rank, position, reason


def peers(kind: Kind, stage: int, stages: int) -> tuple[int | None, int | None]:
    """The ranks an action's input comes from and its result goes to: T and F flow down, B and I up, W stays."""
    step = 1 if kind in "TF" else -1 if kind in "BI" else stages
    before, after = stage - step, stage + step
    return (before if 0 <= before < stages else None, after if 0 <= after < stages else None)


def covering(microbatch: int, microbatches: int, teacher_microbatches: int) -> range:
    """The teacher's microbatches that share rows with a student microbatch; one number divides the other.

    >>> [list(covering(q, 2, 4)) for q in range(2)], [list(covering(q, 4, 2)) for q in range(4)]
    ([[0, 1], [2, 3]], [[0], [0], [1], [1]])
    """
    first, last = (q * teacher_microbatches for q in (microbatch, microbatch + 1))
    return range(first // microbatches, -(-last // microbatches))


def step_order(actions: Sequence[Action], done: int) -> tuple[Action, ...]:
    """What a rank runs in a step for whose batch it has already made `done` teacher forwards.

    Missing ones come first, in ascending order, and those already done are skipped; with ``done`` = s_k this is the
    steady row itself. The caller skips ``Tq'`` when there is no next batch or it has at most q of the teacher's::

        T1 F0 F1 T0' B0 B1     done=0: T0 T1 F0 F1 T0' B0 B1     done=1: the same     done=2: F0 F1 T0' B0 B1

    Args:
        actions: one rank's row of a schedule.
        done: teacher forwards of this batch made earlier, at least 0.
    """
    require(done >= 0, f"done is {done}: give the number of teacher forwards already made, at least 0")
    missing = (Action("T", q) for q in range(done, sum(action.ahead for action in actions)))
    rest = (a for a in actions if a.kind != "T" or a.ahead or a.microbatch >= done)
    return (*missing, *rest)


def lower(actions: Sequence[Action], stage: int, stages: int, *, post_ahead: int = 2) -> tuple[Op, ...]:
    """Derive the communication of one rank's step: receives posted early, each send right after its run.

    With ``post_ahead=1`` on the middle one of three ranks, ``F0 F1 B0 B1`` becomes::

        recv F0 | recv F1 F0 send F0 | recv B0 F1 send F1 | recv B1 B0 send B0 | B1 send B1

    Args:
        actions: what the rank runs, in order (from `step_order`).
        stage: the rank's stage.
        stages: number of stages.
        post_ahead: runs before its use that a receive is posted. For the next batch it is posted after the step's first
            student forward, since before that rank 0 may not have announced it, or else 2 runs before its use at most.
    """
    require(0 <= stage < stages, f"stage is {stage} of {stages}: give 0 to {stages - 1}")
    require(post_ahead >= 0, f"post_ahead is {post_ahead}: give 0 (post right before the use) or more")
    began = next((i + 1 for i, action in enumerate(actions) if action.kind == "F"), 0)
    early: list[list[Action]] = [[] for _ in actions]
    for index, action in enumerate(actions):
        if peers(action.kind, stage, stages)[0] is not None:
            place = index - post_ahead
            if action.ahead:  # by the first student forward rank 0 has announced the next batch
                place = max(place, min(index - 2, began))
            early[max(0, place)].append(action)
    ops: list[Op] = []
    for posted, action in zip(early, actions, strict=True):
        ops += [Op("recv", coming) for coming in posted]
        ops.append(Op("run", action))
        if peers(action.kind, stage, stages)[1] is not None:
            ops.append(Op("send", action))
    return tuple(ops)


def validate(
    schedule: Schedule, *, max_in_flight: Sequence[int] | None = None, max_held: Sequence[int] | None = None
) -> None:
    """Check every rule that can be seen without running the schedule (`simulate.replay` runs it).

    Args:
        schedule: what to check.
        max_in_flight: per rank, the most student microbatches whose forward is done and whose B (or I) is not.
        max_held: per rank, the most whose forward is done and whose B (or W) is not; a W needs what its I left.

    Raises:
        ScheduleError: names the rank, the cell and the reason, and shows the grid with the cell marked.
        ValueError: a scalar of the schedule or the length of a bound is wrong.
    """
    check_scalars(schedule.stages, schedule.microbatches, schedule.loss_over)
    check_teacher_microbatches(schedule.microbatches, schedule.teacher_microbatches)
    bounds = {"max_in_flight": max_in_flight, "max_held": max_held}
    for name, rows in {"ranks": schedule.ranks, **bounds}.items():
        fits = rows is None or len(rows) == schedule.stages
        require(fits, f"{name} has {len(rows or ())} entries for {schedule.stages} stages: give one per stage")
    given = [[schedule.microbatches] * schedule.stages if rows is None else rows for rows in bounds.values()]
    in_rows = (_row_faults(schedule, rank, *limits) for rank, limits in enumerate(zip(*given, strict=True)))
    between = (_edge_faults(schedule, rank) for rank in range(1, schedule.stages))
    for rank, position, reason in itertools.chain.from_iterable(itertools.chain(in_rows, between)):
        raise ScheduleError(schedule, rank, position, reason)


def _row_faults(schedule: Schedule, rank: int, limit: int, hold: int) -> Iterator[tuple[int, int, str]]:
    """Rank, position and reason of each broken rule within a row."""
    row, count, ahead = schedule.ranks[rank], schedule.microbatches, schedule.ahead_of(rank)
    pieces = schedule.teacher_microbatches
    gate = schedule.loss_over if rank == schedule.stages - 1 else None
    seen: set[Action] = set()
    forwards, backwards, finished, next_own, next_ahead = 0, 0, 0, ahead, 0
    for position, action in enumerate(row):
        kind, q = action.kind, action.microbatch
        teacher, back, due = kind == "T", kind in "BI", next_ahead if action.ahead else next_own
        forwards, backwards, finished = forwards + (kind == "F"), backwards + back, finished + (kind in "BW")
        most, needs = pieces if teacher else count, schedule.taught(q).stop
        rules = (
            (not 0 <= q < most, f"the microbatches are 0 to {most - 1}"),
            (action in seen, f"{action} comes twice"),
            (action.ahead and not teacher, "only a teacher forward may work for the next batch"),
            (teacher and not action.ahead and next_ahead > 0, "the teacher forwards of this batch come first"),
            (
                teacher and q != due,
                f"expected {Action(kind, due, action.ahead)}: a batch starts at T0', goes on at T{ahead}",
            ),
            (back and Action("F", q) not in seen, f"F{q} has not run yet"),
            (back and bool({Action("B", q), Action("I", q)} & seen), f"microbatch {q} had its backward already"),
            (kind == "W" and Action("I", q) not in seen, f"I{q} has not run yet"),
            (
                back and gate == "batch" and (forwards < count or next_own < pieces),
                "the loss needs every F and T of the batch",
            ),
            (back and gate in LOSSES[1:] and next_own < needs, f"the loss of microbatch {q} needs T{needs - 1}"),
            (forwards - backwards > limit, f"{forwards - backwards} student microbatches in flight, bound {limit}"),
            (forwards - finished > hold, f"{forwards - finished} student microbatches held, bound {hold}"),
        )
        yield from ((rank, position, reason) for broken, reason in rules if broken)
        seen.add(action)
        next_own, next_ahead = next_own + (teacher and not action.ahead), next_ahead + action.ahead
    missing = [Action("F", q) for q in range(count) if Action("F", q) not in seen]
    missing += [Action("T", q) for q in range(next_own, pieces)]
    missing += [Action("B", q) for q in range(count) if not {Action("B", q), Action("I", q)} & seen]
    missing += [Action("W", a.microbatch) for a in row if a.kind == "I" and Action("W", a.microbatch) not in seen]
    if missing:
        yield rank, len(row), f"{' '.join(map(str, missing))} missing"


def _edge_faults(schedule: Schedule, rank: int) -> Iterator[tuple[int, int, str]]:
    """Receiver, position and reason where a rank and the one above disagree on the order of their messages."""
    above = schedule.ahead_of(rank - 1)
    if schedule.ahead_of(rank) > above:
        position = schedule.ranks[rank].index(Action("T", above, True))
        yield rank, position, f"rank {rank - 1} makes only {above} ahead, so this input comes a step later"
    for kinds, sender, receiver in (("F", rank - 1, rank), ("BI", rank, rank - 1)):
        sent = [a.microbatch for a in schedule.ranks[sender] if a.kind in kinds]
        uses = [(i, a.microbatch) for i, a in enumerate(schedule.ranks[receiver]) if a.kind in kinds]
        for q, (position, used) in zip(sent, uses, strict=True):
            if q != used:
                yield receiver, position, f"rank {sender} sends microbatch {q} here: both ends need one order"


def require(fine: bool, message: str) -> None:
    """Raises ValueError with the message unless all is fine."""
    if not fine:
        raise ValueError(message)


def check_scalars(stages: int, microbatches: int, loss_over: str, costs: Costs | None = None) -> None:
    """Raises ValueError for an argument that many functions share."""
    require(stages >= 1, f"stages is {stages}: give at least 1")
    require(microbatches >= 1, f"microbatches is {microbatches}: give at least 1")
    require(loss_over in LOSSES, f"loss_over is {loss_over!r}: choose from {', '.join(LOSSES)}")
    given = stages if costs is None else len(costs.t)
    require(given == stages, f"costs are for {given} stages, not {stages}: give one entry per stage")


def check_teacher_microbatches(microbatches: int, teacher_microbatches: int) -> None:
    """Raises ValueError unless a teacher's microbatch is a whole number of the student's, or the other way round."""
    fits = teacher_microbatches >= 1 and (
        teacher_microbatches % microbatches == 0 or microbatches % teacher_microbatches == 0
    )
    require(
        fits,
        f"teacher_microbatches is {teacher_microbatches} for {microbatches} microbatches: give a multiple or a divisor "
        "of these, so that a microbatch of the one is a whole number of the other's",
    )

"""The teacher in the holes of the student's timetable: rows for a period that is given.

The student alone is timed first. Then its forwards are put off as far as their receivers allow: a rank has the wait
before a forward rather than after it, and the teacher fills it the sooner. Rank by rank, from the first, each teacher
forward goes into the first hole that is long enough for it, once its input is there. Rank 0 of 2, a step of 16::

    soon    F0- F1- ....... B0----- F2- B1----- F3- B2----- ... B3----- ...
    late    F0- ....... F1- B0----- F2- B1----- F3- B2----- ... B3----- ...
    filled  F0- T0' T1' F1- B0----- F2- B1----- F3- B2----- T2' B3----- T3-

Where W is long, the student's timetable keeps to its work only if no rank starts a W while a gradient is on its way to
it. So there are tables with and without that patience, and the shortest step is tried with each before a longer one.

A greedy order (`greedy`) knows no timetable: it starts a teacher forward wherever a rank is free, which is in the
student's way where all ranks are short of time at once, as with few microbatches in flight.

There the student's own holes do not suffice either: what else is left of a step is no hole before anyone waits. So
room is made for a teacher forward before the student's forward of some microbatches, of the same ones on every rank:
then all wait at once, as if one stage held both, and nobody for another (`waves`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_tspipe.greedy import Policy, Rows, greedy_rows
from lightning_tspipe.schedule import Action, Costs, Kind, peers

STEPS = 5  # that are filled; the last but one is taken as the steady one
NEARLY = 1e-9


@dataclass(slots=True)
class _Cell:
    action: Action
    start: float
    end: float

    def shift(self, seconds: float) -> None:
        self.start += seconds
        self.end += seconds


Timetable = list[list[_Cell]]


def filled(
    policies: Sequence[Policy],
    microbatches: int,
    costs: Costs,
    periods: Sequence[float],
    teacher_microbatches: int = 0,
) -> Iterator[Rows]:
    """Rows with the teacher in the student's own holes, the most promising first.

    Args:
        policies: how the student is ordered; nothing in them that concerns the teacher counts.
        microbatches: M.
        costs: seconds per action; `t` is of one of the teacher's microbatches.
        periods: seconds of a step to aim at; those that the student alone does not keep are left out.
        teacher_microbatches: of a batch; 0 stands for M.
    """
    students = dict.fromkeys(_student(policy, microbatches, costs) for policy in policies)
    tables: list[tuple[Timetable, float]] = []
    for student in students:
        if student is not None:
            late = _put_off(_timed(student, costs), costs, "F")
            tables += ((table, _loop(table, costs)) for table in (late, _timed(student, costs)))
    known: set[Rows] = set()
    for period, (table, alone) in itertools.product(periods, tables):
        if period >= alone * (1 - NEARLY):
            for overrun in (0.0, 0.3, 0.6):
                yield from _new(known, table, teacher_microbatches or microbatches, costs, period, overrun)


def waves(policy: Policy, microbatches: int, costs: Costs, bound: float, best: Callable[[], float]) -> Iterator[Rows]:
    """Rows with room for the teacher before some of the student's forwards, those of shorter steps first.

    Args:
        policy: as in `filled`.
        microbatches: M, of both networks.
        costs: seconds per action.
        bound: seconds of a step at least.
        best: seconds of the best step known; longer ones are not tried.
    """
    student = _student(policy, microbatches, costs)
    if student is None or not max(costs.t):
        return
    known: set[Rows] = set()
    alone = _loop(_put_off(_timed(student, costs), costs, "BI"), costs)
    for count in range(max(1, math.ceil((bound - alone) / max(costs.t)) - 1), microbatches + 1):
        spread = {q * microbatches // count for q in range(count)}
        loops = []
        for places in (range(microbatches - count, microbatches), spread, range(count)):
            table = _put_off(_timed(student, costs, places), costs, "BI")
            for late in (False, True):
                if late:
                    _put_off(table, costs, "F")
                loops.append(_loop(table, costs))
                least = max(loops[-1], bound)
                for period, overrun in itertools.product((least, 1.005 * least), (0.0, 0.3)):
                    if period < best() * (1 - NEARLY):
                        yield from _new(known, table, microbatches, costs, period, overrun)
        if min(loops) >= best():
            break


def _new(known: set[Rows], *tried: Any) -> Iterator[Rows]:
    """What `_fill` makes, if it makes something that is not known."""
    made = _fill(*tried)
    if made is not None and made not in known:
        known.add(made)
        yield made


@functools.lru_cache(maxsize=16)  # `filled` and `waves` ask for the same, of two orders in turn
def _student(policy: Policy, microbatches: int, costs: Costs) -> Rows | None:
    """The student's rows if there were no teacher; None if the ranks get stuck."""
    stages = len(costs.t)
    alone = replace(costs, t=(0.0,) * stages, exchange=None)
    rows = greedy_rows(replace(policy, ahead=(0,) * stages, lead=1), microbatches, alone, steps=2)
    return None if rows is None else tuple(tuple(action for action in row if action.kind != "T") for row in rows)


def _timed(rows: Sequence[Sequence[Action]], costs: Costs, room: Collection[int] = ()) -> Timetable:
    """One batch of the student, everything as soon as it can be, with room for the teacher before some forwards."""
    stages = len(rows)
    table: Timetable = [[] for _ in rows]
    free = [0.0] * stages
    there: dict[tuple[Kind, int, int], float] = {}  # when the input of a rank's action arrives
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            for action in row[len(table[rank]) :]:
                source, target = peers(action.kind, rank, stages)
                edge: Kind = "B" if action.kind == "I" else action.kind
                arrival = 0.0 if source is None else there.get((edge, rank, action.microbatch), math.inf)
                if arrival == math.inf:
                    break
                made = costs.t[rank] if action.kind == "F" and action.microbatch in room else 0.0
                start = max(free[rank] + made, arrival)
                free[rank] = start + costs.seconds(action.kind, rank)
                table[rank].append(_Cell(action, start, free[rank]))
                if target is not None:
                    there[edge, target, action.microbatch] = free[rank] + costs.message
                moved = True
    return table


def _put_off(table: Timetable, costs: Costs, kinds: Literal["F", "BI"]) -> Timetable:
    """The forwards, or the backwards, as late as their receivers and what follows on their rank allow.

    The forwards of the last rank, and the last backward of rank 0, stay.
    """
    receiver: dict[int, float] = {}  # when it starts on a microbatch
    for row in reversed(table) if kinds == "F" else table:
        following = math.inf
        for cell in reversed(row):
            if cell.action.kind in kinds:
                latest = min(following, receiver.get(cell.action.microbatch, math.inf) - costs.message)
                if cell.end < latest < math.inf:
                    cell.shift(latest - cell.end)
            following = cell.start
        receiver = {cell.action.microbatch: cell.start for cell in row if cell.action.kind in kinds}
    return table


def _loop(table: Timetable, costs: Costs) -> float:
    """The shortest step of the student alone."""
    last = max(row[-1].end for row in table) + (costs.exchange or 0.0)
    ends = (row[-1].end if costs.exchange is None else last for row in table)
    return max(end - row[0].start for row, end in zip(table, ends, strict=True)) + costs.optimizer


def _fill(table: Timetable, microbatches: int, costs: Costs, period: float, overrun: float) -> Rows | None:
    """Put teacher forwards into the holes.

    Args:
        table: of the student.
        microbatches: of the teacher.
        costs: seconds per action.
        period: the table is repeated after so many seconds.
        overrun: by what share of a teacher forward a hole may be too short for it.

    Returns:
        The rows of a steady step; None if the holes do not suffice.
    """
    last = max(row[-1].end for row in table)
    arrivals: list[float] | None = None
    rows, above = [], microbatches
    for rank, student in enumerate(table):
        close = student[-1].end if costs.exchange is None else last
        busy = [(cell.start, cell.end) for cell in student]
        busy.append((close, close + (costs.exchange or 0.0) + costs.optimizer))
        starts = _placed(busy, microbatches, costs.t[rank], arrivals, period, overrun)
        arrivals = [start + costs.t[rank] + costs.message for start in starts]
        step = STEPS - 2
        close += step * period
        cells = [(cell.start + step * period, False, cell.action) for cell in student]
        begun = [[start < end for start in starts].count(True) for end in (close - period, close)]
        began, ended = (min(count, (step + n) * microbatches + above) for n, count in enumerate(begun))
        for count in range(began, ended):
            batch, q = divmod(count, microbatches)
            if not 0 <= batch - step <= 1:
                return None  # the teacher does not keep up
            cells.append((starts[count], True, Action("T", q, batch > step)))
        above = ended - (step + 1) * microbatches  # how far this rank is ahead: what the rank below may be at most
        if above < 0 or began != ended - microbatches:
            return None
        cells.sort(key=lambda cell: cell[:2])
        rows.append(tuple(action for _, _, action in cells))
    return tuple(rows)


def _placed(
    student: Sequence[tuple[float, float]],
    microbatches: int,
    seconds: float,
    arrivals: Sequence[float] | None,
    period: float,
    overrun: float,
) -> list[float]:
    """When a rank starts the teacher forwards of some batches, beside what it does at these times of every step."""
    busy = [(start + n * period, end + n * period) for n in range(-1, STEPS) for start, end in student]
    starts: list[float] = []
    place, free = 0, -math.inf
    for count in range(STEPS * microbatches):
        # a rank learns of a batch when the one before has begun on it
        known = student[0][1] + (count // microbatches - 1) * period
        now = max(free, known, -math.inf if arrivals is None else arrivals[count])
        while place < len(busy):
            start, end = busy[place]
            if end > now + NEARLY * period and start >= now + seconds * (1 - overrun) - NEARLY * period:
                break
            now = max(now, end)
            place += 1
        starts.append(now)
        free = now + seconds
    return starts

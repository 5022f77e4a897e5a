"""When every action of a schedule starts if each rank keeps its order and waits only for its messages.

A rank's next action starts when the one before has ended and its input is there, so one pass over all ranks gives all
times::

    rank 0: F0 F1 T0' T1' B0 B1      F0@0 F1@1 T0'@2 T1'@3 B0@5 B1@7
    rank 1: T0 T1 F0 F1 B0 B1        F0@1 F1@2 B0@3 B1@5
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_tspipe.schedule import KINDS, Action, Costs, Kind, Schedule, peers, step_order


@dataclass(frozen=True, slots=True)
class Times:
    """When every rank does what; short of `steps` step ends where ranks wait for each other.

    Args:
        orders: per rank, what it runs in each step.
        starts: per rank, when its actions start, seconds, all steps in a row.
        step_ends: per rank, when each of its steps ends (its optimizer step included), seconds.
        window: batches of an optimizer step; a step above is one of them then.
    """

    orders: tuple[tuple[tuple[Action, ...], ...], ...]
    starts: tuple[list[float], ...]
    step_ends: tuple[list[float], ...]
    window: int = 1

    @property
    def period(self) -> float:
        """Seconds between steady steps: over the second half without the last, of the slowest rank."""
        steps = len(self.orders[0])
        if any(len(ends) < steps for ends in self.step_ends):
            return math.inf
        low, high = (steps // self.window - 1) // 2 * self.window, steps - self.window - 1
        low += self.window - 1
        return max((ends[high] - ends[low]) / (high - low) for ends in self.step_ends)


_Ends = tuple[list[float] | None, list[float] | None, float]  # where an action's input and result are, seconds
_Compiled = tuple[list[float] | None, list[float] | None, int, float]  # input, result, place in both, seconds


def clock(schedule: Schedule, costs: Costs, *, steps: int = 6, window: int = 1, exact: bool = False) -> Times:
    """Time a schedule from a cold start to a last step that has no successor; nothing is checked.

    Args:
        schedule: one steady step of every rank.
        costs: seconds per action, for as many stages; messages cost only their latency.
        steps: number of steps, at least 4 windows.
        window: batches of an optimizer step; each is a step here, of which the last has the optimizer's.
        exact: whether the teacher has its next version only then, so that nothing is done ahead over a window's end.
    """
    return Clock(schedule, costs, steps=steps, window=window, exact=exact)(costs)


class Clock:
    """`clock` for costs that differ in their messages, exchange and optimizer only; arguments are the same."""

    def __init__(
        self, schedule: Schedule, costs: Costs, *, steps: int = 6, window: int = 1, exact: bool = False
    ) -> None:
        stages, count = schedule.stages, max(schedule.microbatches, schedule.teacher_microbatches)
        self._count, self._steps, self._window = count, steps, window
        self._messages = {(kind, k): [math.inf] * (count * (steps + 1)) for kind in "TFB" for k in range(stages)}
        messages = self._messages | {("I", k): self._messages["B", k] for k in range(stages)}
        each = costs.per_action(schedule.microbatches, schedule.teacher_microbatches)
        orders, self._programs = [], []
        for rank, row in enumerate(schedule.ranks):
            kinds: dict[Kind, _Ends] = {}
            for name in KINDS:
                source, target = peers(name, rank, stages)
                comes = None if source is None else messages[name, rank]
                goes = None if target is None else messages[name, target]
                kinds[name] = comes, goes, each.seconds(name, rank)
            made: dict[tuple[bool, bool], tuple[tuple[Action, ...], list[_Compiled]]] = {}
            several = []
            for step in range(steps):
                kind = reaches_over(step, steps, window if exact else steps)
                if kind not in made:
                    actions = taking(row, *kind)
                    made[kind] = actions, _compile(actions, kinds, count)
                several.append(made[kind])
            orders.append(tuple(actions for actions, _ in several))
            self._programs.append([ops for _, ops in several])
        self._orders = tuple(orders)

    def __call__(self, costs: Costs) -> Times:
        """Seconds with these messages, exchange and optimizer."""
        programs, steps, count, stages = self._programs, self._steps, self._count, len(self._programs)
        for arrivals in self._messages.values():
            arrivals[:] = [math.inf] * len(arrivals)
        starts: tuple[list[float], ...] = tuple([] for _ in programs)
        ends: tuple[list[float], ...] = tuple([] for _ in programs)
        free, places = [0.0] * stages, [0] * stages
        # a step's optimizer steps wait until this many ranks more are at the end of their rows, the last one then
        ends_window = [(step + 1) % self._window == 0 for step in range(steps)]
        waiting, gates = [0 if costs.exchange is None else stages * end for end in ends_window], [0.0] * steps
        there = [False] * stages
        moved = True
        while moved:
            moved = False
            for rank in range(stages):
                now, place, started, step = free[rank], places[rank], starts[rank], len(ends[rank])
                before = len(started), step
                while step < steps:
                    ops = programs[rank][step]
                    base = step * count
                    while place < len(ops):
                        source, result, offset, seconds = ops[place]
                        if source is not None and (arrival := source[base + offset]) > now:
                            if arrival == math.inf:
                                break
                            now = arrival
                        started.append(now)
                        now += seconds
                        if result is not None:
                            result[base + offset] = now + costs.message
                        place += 1
                    if place < len(ops):
                        break
                    if costs.exchange is not None and ends_window[step] and not there[rank]:
                        there[rank], waiting[step] = True, waiting[step] - 1
                        gates[step] = max(gates[step], now + costs.exchange)
                    if waiting[step]:
                        break
                    there[rank] = False
                    now, place, step = max(now, gates[step]) + costs.optimizer * ends_window[step], 0, step + 1
                    ends[rank].append(now)
                free[rank], places[rank] = now, place
                moved = moved or before != (len(started), step)
        return Times(self._orders, starts, ends, self._window)


def of_teacher(costs: Costs, microbatches: int, teacher: int) -> Costs:
    """The costs for a teacher with that many microbatches, each of which takes what is fixed.

    Args:
        costs: seconds per student microbatch.
        microbatches: M.
        teacher: how many the teacher has.
    """
    if teacher == microbatches or not costs.t_fixed:
        return costs
    each = costs.per_action(microbatches, teacher).t
    return replace(costs, t=tuple(seconds * teacher / microbatches for seconds in each), t_fixed=())


def reaches_over(step: int, steps: int, window: int) -> tuple[bool, bool]:
    """Whether work was done ahead for a step, and whether it does some: within a window of so many steps only."""
    place = step % window
    return place > 0, place < window - 1 and step < steps - 1


def taking(row: Sequence[Action], has_come: bool, goes_on: bool) -> tuple[Action, ...]:
    """What a rank with that row runs, for what `reaches_over` says."""
    order = step_order(row, sum(action.ahead for action in row) * has_come)
    return tuple(action for action in order if goes_on or not action.ahead)


def _compile(actions: Sequence[Action], kinds: Mapping[Kind, _Ends], batch: int) -> list[_Compiled]:
    """The actions in the form that `Clock` runs through."""
    ops = []
    for action in actions:
        source, target, seconds = kinds[action.kind]
        ops.append((source, target, action.microbatch + batch * action.ahead, seconds))
    return ops

"""When every action of a schedule starts if each rank keeps its order and waits only for its messages.

A rank's next action starts when the one before has ended and its input is there, so one pass over all ranks gives all
times::

    rank 0: F0 F1 T0' T1' B0 B1      F0@0 F1@1 T0'@2 T1'@3 B0@5 B1@7
    rank 1: T0 T1 F0 F1 B0 B1        F0@1 F1@2 B0@3 B1@5
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_tspipe.schedule import Action, Costs, Kind, Schedule, peers, step_order


@dataclass(frozen=True, slots=True)
class Times:
    """When every rank does what; short of `steps` step ends where ranks wait for each other.

    Args:
        orders: per rank, what it runs in each step.
        starts: per rank, when its actions start, seconds, all steps in a row.
        step_ends: per rank, when each of its steps ends (its optimizer step included), seconds.
    """

    orders: tuple[tuple[tuple[Action, ...], ...], ...]
    starts: tuple[list[float], ...]
    step_ends: tuple[list[float], ...]

    @property
    def period(self) -> float:
        """Seconds between steady steps: over the second half without the last, of the slowest rank."""
        steps = len(self.orders[0])
        if any(len(ends) < steps for ends in self.step_ends):
            return math.inf
        low, high = (steps - 1) // 2, steps - 2
        return max((ends[high] - ends[low]) / (high - low) for ends in self.step_ends)


_Compiled = tuple[list[float] | None, list[float] | None, int, float]  # input, result, place in both, seconds


def clock(schedule: Schedule, costs: Costs, *, steps: int = 6) -> Times:
    """Time a schedule from a cold start to a last step that has no successor; nothing is checked.

    Args:
        schedule: one steady step of every rank.
        costs: seconds per action, for as many stages; messages cost only their latency.
        steps: number of optimizer steps, at least 4.
    """
    stages, count = schedule.stages, max(schedule.microbatches, schedule.teacher_microbatches)
    messages = {(kind, k): [math.inf] * (count * (steps + 1)) for kind in "TFB" for k in range(stages)}
    orders, programs = [], []
    for rank, row in enumerate(schedule.ranks):
        first, last = step_order(row, 0), tuple(action for action in row if not action.ahead)
        kinds = [(actions, _compile(actions, rank, schedule, costs, messages)) for actions in (first, row, last)]
        several = [kinds[0], *[kinds[1]] * (steps - 2), kinds[2]]
        orders.append(tuple(actions for actions, _ in several))
        programs.append([ops for _, ops in several])
    starts: tuple[list[float], ...] = tuple([] for _ in programs)
    ends: tuple[list[float], ...] = tuple([] for _ in programs)
    free, places = [0.0] * stages, [0] * stages
    # a step's optimizer steps wait until this many ranks more are at the end of their rows, the last one then
    waiting, gates = [0 if costs.exchange is None else stages] * steps, [0.0] * steps
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
                if costs.exchange is not None and not there[rank]:
                    there[rank], waiting[step] = True, waiting[step] - 1
                    gates[step] = max(gates[step], now + costs.exchange)
                if waiting[step]:
                    break
                there[rank] = False
                now, place, step = max(now, gates[step]) + costs.optimizer, 0, step + 1
                ends[rank].append(now)
            free[rank], places[rank] = now, place
            moved = moved or before != (len(started), step)
    return Times(tuple(orders), starts, ends)


def _compile(
    actions: Sequence[Action],
    rank: int,
    schedule: Schedule,
    costs: Costs,
    messages: dict[tuple[str, int], list[float]],
) -> list[_Compiled]:
    """The actions in the form that `clock` runs through."""
    costs = costs.per_action(schedule.microbatches, schedule.teacher_microbatches)
    seconds: dict[Kind, float] = {kind: costs.seconds(kind, rank) for kind in ("T", "F", "B", "I", "W")}
    batch = max(schedule.microbatches, schedule.teacher_microbatches)  # places of messages
    ops: list[_Compiled] = []
    for action in actions:
        kind = action.kind
        source, target = peers(kind, rank, schedule.stages)
        edge = "B" if kind == "I" else kind
        ops.append((
            None if source is None else messages[edge, rank],
            None if target is None else messages[edge, target],
            action.microbatch + batch * action.ahead,
            seconds[kind],
        ))  # fmt: skip
    return ops

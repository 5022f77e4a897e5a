"""How far the teacher runs ahead of its batch on each rank: the s_k of a schedule, and the search for them.

Rank 0 waits longest in the middle of its step, the last rank at the start of it, so good s_k are a staircase down to 0.
Every step of it is wide enough for the teacher to fill the way of one microbatch to the rank below and back::

    stages=4, t = f = b = w, full backward: (f + b + w) / t = 3
    rank 0: s_0 = 9    rank 1: s_1 = 6    rank 2: s_2 = 3    rank 3: s_3 = 0
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lightning_tspipe.schedule import Costs

Ahead = tuple[int, ...]
Item = TypeVar("Item")
SIZE = 160_000  # stages x microbatches x tries in a search: less than a second
FEWEST = 16  # tries, for a large problem


def legal(ahead: Sequence[float], microbatches: int, last: int | None = 0) -> Ahead:
    """At most M and not growing downstream: a rank cannot take what the one above has not made; `last` on the last."""
    whole = [max(0, int(min(microbatches, *ahead[: k + 1], microbatches))) for k in range(len(ahead))]
    return (*whole[:-1], whole[-1] if last is None else last)


def staircases(
    microbatches: int, costs: Costs, *, split: bool = False, scales: Sequence[float] | None = None
) -> list[Ahead]:
    """Splits in proportion to the holes, from just wide enough to as wide as M allows.

    Args:
        microbatches: M, of the teacher.
        costs: seconds per action.
        split: whether the rank below returns its gradient after I rather than after the whole backward.
        scales: how much wider than the holes; None: 1, as wide as possible, and between them.
    """
    back = "I" if split else "B"
    trips = [costs.f[k] + costs.seconds(back, k) + 2 * costs.message for k in range(len(costs.t))]  # type: ignore[arg-type]
    room = [min(sum(trips[k + 1 :]) / t, 1e9) if t else 1e9 for k, t in enumerate(costs.t)]
    widest = max(1.0, microbatches / (room[0] or 1.0))
    pairs = itertools.product(scales or (1.0, (1 + widest) / 2, widest), (1e-9, 0.5, 1 - 1e-9))
    return [legal([r * scale + part for r in room], microbatches) for scale, part in pairs]


def vary(
    best: Ahead, microbatches: int, score: Callable[[Ahead], Any], stop: Callable[[], bool], last: int | None = 0
) -> Ahead:
    """Descend by changes of one rank's s_k, or of all above it too, until `stop`; a lower score is better."""
    for step in (8, 4, 2, 2, 1, 1, 1, 1):
        for rank, change in itertools.product(range(len(best) - (last is not None)), (-step, step)):
            if not stop():
                down = [s + change * (k <= rank) for k, s in enumerate(best)]
                alone = [*(max(s, best[rank] + change) for s in best[:rank]), best[rank] + change, *best[rank + 1 :]]
                best = min(best, legal(down, microbatches, last), legal(alone, microbatches, last), key=score)
    return best


def slower_messages(costs: Costs) -> Costs:
    """The costs with messages slower by 2 % of a mean action: who waits for jitter there waits for it everywhere."""
    jitter = 0.02 * sum(map(sum, (costs.t, costs.f, costs.b, costs.w))) / (4 * len(costs.t))
    return replace(costs, message=costs.message + jitter)


def afab_ahead(microbatches: int, costs: Costs, budget: int = 150, teacher_microbatches: int = 0) -> tuple[Ahead, int]:
    """The s_k of all-forward-then-backward, and how many were tried: a descent from the best of a few staircases.

    Args:
        microbatches: M.
        costs: seconds per action; `t` is of one of the teacher's microbatches.
        budget: how many to try.
        teacher_microbatches: of a batch; 0 stands for M.
    """
    budget = min(budget, max(FEWEST, SIZE // (len(costs.t) * microbatches)))
    slower = slower_messages(costs)
    none = (0,) * len(costs.t)
    teacher = teacher_microbatches or microbatches
    plain = afab_period(microbatches, costs, none, teacher)
    more = teacher - microbatches
    floor = 2 * max(costs.work(k, microbatches) + more * costs.t[k] for k in range(len(none)))

    lowest = math.inf

    @functools.cache
    def score(ahead: Ahead) -> tuple[bool, float, int]:
        nonlocal lowest
        period = afab_period(microbatches, costs, ahead, teacher)
        both = period + afab_period(microbatches, slower, ahead, teacher)
        lowest = min(lowest, both)
        return period > plain, float(f"{both:.9g}"), sum(ahead)

    def enough() -> bool:
        return score.cache_info().misses >= budget or lowest <= floor

    best = min([none, *staircases(teacher, costs)], key=score)
    return vary(best, teacher, score, enough), score.cache_info().misses


def afab_period(microbatches: int, costs: Costs, ahead: Sequence[int], teacher_microbatches: int = 0) -> float:
    """Step time of all-forward-then-backward: what `clock.clock` gives, in a fraction of the time."""
    stages, every = len(costs.t), range(microbatches)
    pieces = range(teacher_microbatches or microbatches)
    free, ends, done = [0.0] * stages, [], [0] * stages

    def chain(now: float, queue: Sequence[int], seconds: float, arrivals: list[float], sent: list[float]) -> float:
        for q in queue:
            now = max(now, arrivals[q]) + seconds
            sent[q] = now + costs.message
        return now

    coming = [[0.0] * len(pieces) for _ in range(stages + 1)]
    for step in range(6):
        teacher, coming = coming, [[0.0] * len(pieces) for _ in range(stages + 1)]
        student, gradient = [0.0] * microbatches, [0.0] * microbatches
        for k in range(stages):
            now = chain(free[k], pieces[done[k] :], costs.t[k], teacher[k], teacher[k + 1])
            now = chain(now, every, costs.f[k], student, student)
            done[k] = ahead[k] if step < 5 else 0
            free[k] = chain(now, pieces[: done[k]], costs.t[k], coming[k], coming[k + 1])
        for k in reversed(range(stages)):
            free[k] = chain(free[k], every, costs.seconds("B", k), gradient, gradient)
        if costs.exchange is not None:
            free = [max(free) + costs.exchange] * stages
        free = [now + costs.optimizer for now in free]
        ends.append(tuple(free))
    return max(b - a for a, b in zip(ends[2], ends[4], strict=True)) / 2


def unique(items: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The items without repetitions, in their order."""
    return list(dict.fromkeys(items))


def in_turn(*sources: Iterator[Item]) -> Iterator[Item]:
    """One item of each in turn, none of them None, until all have ended."""
    return (item for row in itertools.zip_longest(*sources) for item in row if item is not None)

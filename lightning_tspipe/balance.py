"""Where to cut two chains of layers, so that the slowest rank is as fast as possible."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SLACK = 1.05  # how much larger the largest stage may be so that less travels
UNITS = 96  # of a network of more layers, neighbours that cost little are cut as one


@dataclass(frozen=True)
class Chain:
    """What the layers of one network cost, in order; one entry per layer.

    Args:
        seconds: of all work of one microbatch.
        edge: seconds that a rank spends on the messages of a cut before this layer; infinite forbids the cut.
        weights: bytes that the layer takes at all times.
        held: bytes that one microbatch takes between its forward and its backward.
        passed: if stages recompute, bytes of a microbatch that go into each layer, and at the end out of the last one.
            A stage then holds what goes in and out of it for each microbatch in flight, and `held` for one at a time.
    """

    seconds: Sequence[float]
    edge: Sequence[float] = ()
    weights: Sequence[float] = ()
    held: Sequence[float] = ()
    passed: Sequence[float] = ()

    def joined(self, most: int) -> tuple[Chain, list[int]]:
        """A chain of at most `most` layers, and how many of these each of its layers is; the cheapest are joined."""
        sizes = [1] * len(self.seconds)
        total = list(self.seconds)
        while len(sizes) > most:
            place = min(range(len(sizes) - 1), key=lambda n: total[n] + total[n + 1])
            sizes[place : place + 2] = [sum(sizes[place : place + 2])]
            total[place : place + 2] = [sum(total[place : place + 2])]
        starts = list(itertools.accumulate(sizes, initial=0))
        weights, held = (
            [sum(column[a:b]) for a, b in itertools.pairwise(starts)] for column in (self.weights, self.held)
        )
        edge = [self.edge[a] for a in starts[:-1]] if self.edge else ()
        return Chain(total, edge, weights, held, [self.passed[a] for a in starts] if self.passed else ()), sizes


class _Costs:
    """Matrices over (first layer, end): what a stage with these layers costs."""

    def __init__(self, chain: Chain) -> None:
        count = len(chain.seconds)
        edge = np.append(chain.edge if len(chain.edge) else np.zeros(count), 0.0)
        edge[0] = 0.0
        self.seconds = self._ranges(chain.seconds) + edge[:, None] + edge[None, :]
        self.weights, self.held = (
            self._ranges(chain.weights or [0.0] * count),
            self._ranges(chain.held or [0.0] * count),
        )
        self.passed = np.asarray(chain.passed, dtype=np.float64)
        self.count = count

    def memory(self, in_flight: int) -> np.ndarray:
        """Bytes with so many microbatches in flight."""
        memory: np.ndarray = self.weights + in_flight * self.held
        if len(self.passed):
            memory = self.weights + self.held + in_flight * (self.passed[:, None] + self.passed[None, :])
        return memory

    @staticmethod
    def _ranges(column: Sequence[float]) -> np.ndarray:
        sums = np.append(0.0, np.cumsum(np.asarray(column, dtype=np.float64)))
        ranges: np.ndarray = sums[None, :] - sums[:, None]
        ranges[np.tril_indices(len(sums))] = math.inf  # a stage has a layer
        return ranges


def joint_cut(
    student: Chain,
    teacher: Chain,
    stages: int,
    limit: float = math.inf,
    in_flight: Sequence[int] = (),
    spare: float = 0.0,
) -> tuple[list[int], list[int]]:
    """Cut both networks together, such that the slowest stage is as fast as possible under a bound on its memory.

    Exact, by dynamic programming over pairs of prefixes, for networks of up to 96 layers; of longer ones the cheapest
    neighbours are joined first. Each stage has at least one layer of each.

    Args:
        student, teacher: at least `stages` layers each.
        stages: P.
        limit: bytes per rank.
        in_flight: for each stage, how many microbatches it holds at once; none: one each.
        spare: by what share the slowest stage may be slower if the stage with the most memory takes less for that, by a
            larger share.

    Returns:
        The numbers of layers per stage, of the student and of the teacher.

    Raises:
        ValueError: nothing keeps the limit.
    """
    (student, sizes_s), (teacher, sizes_t) = student.joined(max(UNITS, stages)), teacher.joined(max(UNITS, stages))
    of_s, of_t = _Costs(student), _Costs(teacher)
    seconds = [(of_s.seconds, of_t.seconds)] * stages
    memory = [(of_s.memory(in_flight[stage] if in_flight else 1), of_t.weights) for stage in range(stages)]
    most = _simple_bound(of_s, of_t, stages) if limit == math.inf else math.inf
    slowest, ends = _search(seconds, memory, limit, most)
    if spare:
        cuts = itertools.pairwise([(0, 0), *ends])
        parts = zip(memory, cuts, strict=True)
        fullest = max(float(ranges_s[a, b] + ranges_t[c, d]) for (ranges_s, ranges_t), ((a, c), (b, d)) in parts)
        less, others = _search(memory, seconds, slowest * (1 + spare), fullest)
        ends = others if less < fullest * (1 - spare) else ends
    starts = [(0, 0), *ends[:-1]]
    return (
        [sum(sizes_s[start:end]) for (start, _), (end, _) in zip(starts, ends, strict=True)],
        [sum(sizes_t[start:end]) for (_, start), (_, end) in zip(starts, ends, strict=True)],
    )


_Ranges = Sequence[tuple[np.ndarray, np.ndarray]]  # per stage, of the student and of the teacher: (first layer, end)


def _search(costs: _Ranges, others: _Ranges, limit: float, most: float) -> tuple[float, list[tuple[int, int]]]:
    """The stages' ends with the smallest largest cost, where nothing else exceeds a limit.

    Args:
        costs: what each stage would cost.
        others: what `limit` is for.
        limit: of these.
        most: the cost of a stage that no answer needs to exceed.

    Raises:
        ValueError: nothing keeps the limit.
    """
    count_s, count_t = (len(ranges) - 1 for ranges in costs[0])
    best = np.full((count_s + 1, count_t + 1), math.inf)
    best[0, 0] = 0.0
    cuts: list[np.ndarray] = []
    for stage, ((cost_s, cost_t), (other_s, other_t)) in enumerate(zip(costs, others, strict=True)):
        now = np.full_like(best, math.inf)
        where = np.zeros((*best.shape, 2), dtype=np.int64)
        for end in range(stage + 1, count_s - (len(costs) - 1 - stage) + 1):
            possible = (cost_s[:end, end] <= most) & (other_s[:end, end] <= limit)
            starts = np.flatnonzero(possible & np.isfinite(best[:end].min(axis=1)))
            if not len(starts):
                continue
            # (start of the student's part, start and end of the teacher's)
            cost = cost_s[starts, end][:, None, None] + cost_t[None]
            if limit < math.inf:
                cost = np.where(other_s[starts, end][:, None, None] + other_t[None] <= limit, cost, math.inf)
            cost = np.maximum(cost, best[starts][:, :, None]).reshape(-1, count_t + 1)
            place = cost.argmin(axis=0)
            now[end] = cost[place, np.arange(count_t + 1)]
            where[end, :, 0], where[end, :, 1] = starts[place // (count_t + 1)], place % (count_t + 1)
        best = now
        cuts.append(where)
    if not math.isfinite(best[-1, -1]):
        raise ValueError("nothing keeps the limit")
    ends = [(count_s, count_t)]
    for where in reversed(cuts[1:]):
        start_s, start_t = where[ends[0]]
        ends.insert(0, (int(start_s), int(start_t)))
    return float(best[-1, -1]), ends


def _simple_bound(student: _Costs, teacher: _Costs, stages: int) -> float:
    """The slowest stage if each network is cut by itself, which no joint cut has to exceed."""
    total = 0.0
    for costs in (student, teacher):
        best = np.full(costs.count + 1, math.inf)
        best[0] = 0.0
        for _ in range(stages):
            best = np.maximum(best[:, None], costs.seconds).min(axis=0)
        total += float(best[-1])
    return total * (1 + 1e-9)


def balance_by_cost(costs: Sequence[float], stages: int, alive: Sequence[float] = ()) -> list[int]:
    """Numbers of layers per stage such that the most expensive stage is as cheap as possible.

    Exact, by dynamic programming over prefixes; among equals the one with the smallest sum of squares. With `alive` the
    most expensive stage may cost 5 % more if less travels between the stages for that.

    Args:
        costs: one non-negative number per layer.
        stages: at most ``len(costs)``.
        alive: what travels if a stage begins at a layer.
    """
    sizes = _cheapest(costs, stages, None, alive)
    if not alive:
        return sizes
    ends = list(itertools.accumulate(sizes, initial=0))
    return _cheapest(costs, stages, SLACK * max(sum(costs[a:b]) for a, b in itertools.pairwise(ends)), alive)


def _cheapest(costs: Sequence[float], stages: int, bound: float | None, alive: Sequence[float]) -> list[int]:
    """The cut with the smallest largest stage; with a bound, the one below it where the least travels."""
    count = len(costs)
    prefix = list(itertools.accumulate(costs, initial=0.0))
    # (stages, layers) -> (objective, sum of squares as tie-break, layers of the last stage)
    best = {(0, 0): (0.0, 0.0, 0)}
    for stage in range(1, stages + 1):
        for end in range(stage, count - (stages - stage) + 1):
            found = None
            for start in range(end - 1, stage - 2, -1):
                mine = prefix[end] - prefix[start]
                if bound is not None and mine > bound:
                    break  # and more layers cost more
                if bound is None and found is not None and mine > found[0]:
                    break
                if (stage - 1, start) in best:
                    before, squares, _ = best[stage - 1, start]
                    now = max(before, mine) if bound is None else before + (alive[start] if start else 0)
                    option = now, squares + mine * mine, end - start
                    found = option if found is None else min(found, option)
            if found is not None:
                best[stage, end] = found
    sizes: list[int] = []
    end = count
    for stage in range(stages, 0, -1):
        sizes.insert(0, best[stage, end][2])
        end -= sizes[0]
    return sizes

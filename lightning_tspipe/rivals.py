"""How long a step of other ways to run the same stages takes, in the same simulation for all of them.

The rivals are pipelines of the student with the teacher in the stages' forwards ("fused") or wholly before. With two
chunks per rank the stages are cut in halves; chunk c of rank k is stage k + cP (interleaved), or 2P-1-k for c = 1 (V)::

    interleaved  rank 0: stages 0, 2    rank 1: stages 1, 3
    V            rank 0: stages 0, 3    rank 1: stages 1, 2

Orders: Huang et al., "GPipe", https://arxiv.org/abs/1811.06965; Narayanan et al., "Megatron-LM" (1F1B and interleaved),
https://arxiv.org/abs/2104.04473; Qi et al., "Zero Bubble" (ZB1P, ZBV), https://arxiv.org/abs/2401.10241.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lightning_tspipe.plain import plain_rows
from lightning_tspipe.schedule import Costs

Op = tuple[str, int, int]  # T, F, B, I or W; stage; microbatch
Rows = list[list[Op]]
STEPS = 6


@dataclass(frozen=True, slots=True)
class Stages:
    """What is where.

    Args:
        ranks: per stage, where it is.
        costs: per stage.
    """

    ranks: tuple[int, ...]
    costs: Costs

    @property
    def last(self) -> int:
        """The stage with the loss."""
        return len(self.ranks) - 1

    def needs(self, op: Op) -> Op | None:
        """What must have run before, of another stage or on this one."""
        kind, stage, q = op
        if kind in "TF":
            return (kind, stage - 1, q) if stage else None
        if kind == "W":
            return "I", stage, q
        return (kind, stage + 1, q) if stage < self.last else ("F", stage, q)

    def seconds(self, op: Op) -> float:
        """How long it takes."""
        return self.costs.seconds(op[0], op[1])  # type: ignore[arg-type]

    def arrives(self, op: Op, end: float, at: int) -> float:
        """When the result of what ended is on another stage's rank."""
        return end + (self.costs.message if self.ranks[op[1]] != self.ranks[at] else 0.0)


def period(rows: Rows, stages: Stages) -> float:
    """Seconds of a steady step, if each rank keeps its order and waits only for its messages."""
    done: dict[tuple[int, Op], float] = {}
    free, places = [0.0] * len(rows), [0] * len(rows)
    ends: list[list[float]] = [[] for _ in rows]
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while len(ends[rank]) < STEPS:
                step, op = len(ends[rank]), row[places[rank]]
                need = stages.needs(op)
                if need is not None and (step, need) not in done:
                    break
                ready = 0.0 if need is None else stages.arrives(need, done[step, need], op[1])
                free[rank] = done[step, op] = max(free[rank], ready) + stages.seconds(op)
                places[rank] = (places[rank] + 1) % len(row)
                if not places[rank]:
                    free[rank] += stages.costs.optimizer
                    ends[rank].append(free[rank])
                moved = True
    assert all(len(each) == STEPS for each in ends), "the ranks wait for each other"
    return max(each[STEPS - 1] - each[1] for each in ends) / (STEPS - 2)


def of_student(order: str, stages: int, microbatches: int) -> Rows:
    """A plain order without its teacher: "afab" is GPipe, "zb" is ZB1P."""
    rows = plain_rows(order, stages, microbatches)[0]
    return [[(a.kind, k, a.microbatch) for a in row if a.kind != "T"] for k, row in enumerate(rows)]


def teacher_first(rows: Rows, microbatches: int) -> Rows:
    """A pass of the teacher's own before."""
    return [[("T", k, q) for q in range(microbatches)] + row for k, row in enumerate(rows)]


def interleaved(stages: int, microbatches: int) -> Rows:
    """1F1B with two chunks per rank; the microbatches are a multiple of the stages."""
    count = 2 * microbatches

    def op(kind: str, rank: int, number: int) -> Op:
        group, place = divmod(number, 2 * stages)
        chunk = place // stages
        chunk = 1 - chunk if kind == "B" else chunk
        return kind, rank + chunk * stages, group * stages + place % stages

    rows: Rows = []
    for rank in range(stages):
        warm = min(count, 2 * (stages - rank - 1) + stages)
        row = [op("F", rank, number) for number in range(warm)]
        for number in range(count):
            row += [op("F", rank, warm + number)] * (warm + number < count)
            row.append(op("B", rank, number))
        rows.append(row)
    return rows


def v_shaped(microbatches: int, stages: Stages) -> Rows:
    """ZBV, approximately: a rank runs the most urgent work that is ready, in the memory of 1F1B.

    The gradient first, then the forward of the second chunk, of the first, and weights where nothing else can run.
    """
    ranks = max(stages.ranks) + 1
    rows: Rows = [[] for _ in range(ranks)]
    coming = [{(kind, k): 0 for kind in "FIW" for k in (rank, 2 * ranks - 1 - rank)} for rank in range(ranks)]
    done: dict[Op, float] = {}
    free, held = [0.0] * ranks, [0] * ranks

    def starts(op: Op, rank: int) -> float:
        need = stages.needs(op)
        if op[0] == "F" and op[1] < ranks and held[rank] >= 2 * ranks:
            return math.inf
        if need is not None and need not in done:
            return math.inf
        return max(free[rank], 0.0 if need is None else stages.arrives(need, done[need], op[1]))

    def urgency(op: Op) -> tuple[int, int, int]:
        return "IFW".index(op[0]), -op[1] if op[0] == "F" else 0, op[2]

    def next_of(rank: int) -> tuple[float, int, tuple[int, int, int], Op] | None:
        """The earliest, and there the most urgent."""
        ops = [(*key, q) for key, q in coming[rank].items() if q < microbatches]
        return min(((starts(op, rank), rank, urgency(op), op) for op in ops), default=None)

    best = [next_of(rank) for rank in range(ranks)]
    queue = [one for one in best if one is not None]
    while queue:
        found = heapq.heappop(queue)
        start, rank, _, op = found
        if found != best[rank]:
            continue  # another has come before it since
        assert start < math.inf, "the ranks wait for each other"
        free[rank] = done[op] = start + stages.seconds(op)
        held[rank] += (op[0] == "F") - (op[0] == "W")
        coming[rank][op[:2]] += 1
        rows[rank].append(op)
        for k in {rank, *(stages.ranks[k] for k in (op[1] - 1, op[1] + 1) if 0 <= k <= stages.last)}:
            best[k] = again = next_of(k)
            if again is not None:
                heapq.heappush(queue, again)
    return rows


def fused(costs: Costs) -> Costs:
    """The teacher within the student's forward."""
    forward = tuple(t + f for t, f in zip(costs.t, costs.f, strict=True))
    return replace(costs, t=(0.0,) * len(forward), f=forward)


def halves(costs: Costs, ranks: Sequence[int]) -> Stages:
    """Two chunks per rank, each with half of its costs."""
    return Stages(tuple(ranks), costs.scaled(0.5, ranks))


def serial(costs: Costs, microbatches: int) -> float:
    """Seconds of a step if one rank works at a time: naive model parallelism."""
    stages = len(costs.t)
    work = sum(costs.work(stage, microbatches) - costs.optimizer for stage in range(stages))
    return work + 3 * (stages - 1) * costs.message + costs.optimizer


def streaming(costs: Costs, microbatches: int) -> float:
    """Seconds of a step if the passes T, F and B of the whole batch stream through the ranks."""
    stages = len(costs.t)
    rows: Rows = [[(kind, k, 0) for kind in "TFB"] for k in range(stages)]
    return period(rows, Stages(tuple(range(stages)), costs.scaled(microbatches)))


def periods(costs: Costs, microbatches: int) -> dict[str, float]:
    """Seconds of a step of every rival; the interleaved one only where it exists."""
    return {name: seconds() for name, seconds in ways(costs, microbatches).items()}


def ways(costs: Costs, microbatches: int) -> dict[str, Callable[[], float]]:
    """The same, each simulated when it is called."""
    count = len(costs.t)
    plain, both = Stages(tuple(range(count)), costs), Stages(tuple(range(count)), fused(costs))
    gp, f1b1 = (of_student(order, count, microbatches) for order in ("afab", "1f1b"))
    lazily: dict[str, Callable[[], float]] = {
        "serial model parallelism": lambda: serial(costs, microbatches),
        "passes streamed": lambda: streaming(costs, microbatches),
        "GPipe, teacher first": lambda: period(teacher_first(gp, microbatches), plain),
        "1F1B, teacher first": lambda: period(teacher_first(f1b1, microbatches), plain),
        "GPipe, teacher fused": lambda: period(gp, both),
        "1F1B, teacher fused": lambda: period(f1b1, both),
        "ZB1P, teacher fused": lambda: period(of_student("zb", count, microbatches), both),
    }
    if count > 1:
        around = halves(both.costs, [*range(count), *range(count)])
        if microbatches % count == 0:
            lazily["interleaved 1F1B, teacher fused"] = lambda: period(interleaved(count, microbatches), around)
        vee = halves(both.costs, [*range(count), *reversed(range(count))])
        lazily["ZBV, teacher fused"] = lambda: period(v_shaped(microbatches, vee), vee)
    return lazily

"""What no step goes below, its work and the waits that no order avoids; and the microbatches that fill its bubble.

A step of rank 0 begins with its first action and ends with its optimizer step. In between, the n-th action of a kind on
a rank, whichever microbatch it is of, starts when the n-th one that sends to it has ended, and those that make room for
it under the bounds on memory; an n-th backward, when n forwards have been to the last stage. So every action has a
least time before it (head) and behind it (tail). Stage 0 of 2 with one microbatch in flight, a step of 12 at least::

    rank 0 F0- ....... B0----- F1- ....... B1-----        F1: a head of 6, a tail of 5
    rank 1 ... F0- B0----- ....... F1- B1-----

A rank does one thing at a time. The least that its actions take with their heads and tails is what they take if they
may be interrupted, and then the one with the longest tail comes first (J. R. Jackson, 1955; J. Carlier, "The
one-machine sequencing problem", EJOR 11, 1982). A teacher that may run ahead counts as work only.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lightning_tspipe.schedule import KINDS, Costs, Kind, LossOver, check_scalars

NEARLY = 1e-9  # of rounding

Node = tuple[Kind, int, int]  # kind, rank, and the how manieth of its kind on the rank
Job = tuple[float, float, float]  # head, seconds, tail


def step_floor(
    costs: Costs,
    microbatches: int,
    split: bool,
    in_flight: Sequence[int],
    held: Sequence[int],
    *,
    lookahead: bool = True,
    loss_over: LossOver = "microbatch",
) -> float:
    """Seconds of a step at least.

    Args:
        costs: seconds per student microbatch.
        microbatches: M.
        split: whether the backward is split into I and W.
        in_flight: per rank, the most student microbatches whose forward is done and whose B (or I) is not.
        held: per rank, the most whose forward is done and whose B (or W) is not.
        lookahead: whether the teacher may run a batch ahead.
        loss_over: "batch" if the first backward needs all forwards of the batch.
    """
    step = _Step(costs, microbatches, split, in_flight, held, lookahead, loss_over == "batch")
    least = [costs.work(stage, microbatches, split) for stage in step.every]
    least += [max(one_machine(jobs), step.of_its_own(k), step.of_both(k)) for k, jobs in enumerate(step.jobs())]
    return max(least)


def minimal_microbatches(
    stages: int, costs: Costs, *, lookahead: bool = True, split: bool = False, loss_over: LossOver = "batch"
) -> int:
    """The fewest microbatches with which the work that may be moved fills the bubble of the student's pipeline.

    Each cost is the largest over the stages, a message is one of T's, F's or B's. A teacher forward cannot be divided
    and goes from rank to rank as the student's does, so a hop takes h = max(t, f), and per hop it fills whole ones::

        delayed or frozen teacher, full backward                    M >= (P-1) ceil((h + b + w) / t)
        the same, split backward, loss over the batch               M >= (P-1) ceil((h + b) / t)
        the same, split backward, loss per microbatch               M (t + w) >= (P-1)(h + b) + w
        exact teacher (no lookahead), split, loss per microbatch    M w       >= (P-1)(h + b) + w

    The last two also need M (t + f) >= (P-1)(h + b) + t + f, since rank 0 has no other work before its first gradient
    comes. Where the stages differ, what fills is the least that the student's work leaves of the busiest rank's time
    instead of t. At least `stages`, and 1 for one stage. Where nothing may fill the bubble, or what may costs nothing,
    no M suffices: 2 P is a compromise there (for unit costs the bubble is then less than a third of the step).
    """
    check_scalars(stages, 1, loss_over, costs)
    if stages == 1:
        return 1
    every = range(stages)
    t, f, w = (max(column) for column in (costs.t, costs.f, costs.w))
    busy = [costs.work(k, 1, split) for k in every]
    free = max(busy) - max(seconds - costs.t[k] for k, seconds in enumerate(busy))
    trip = max(t, f) + max(costs.seconds("I" if split else "B", k) for k in every) + 2 * costs.message
    lean, hops = split and loss_over != "batch", stages - 1
    if lean and w + free * lookahead:
        need = max((hops * trip + w) / (free * lookahead + w), (hops * trip + t + f) / (t + f) if t + f else 0.0)
    elif lookahead and free:
        need = hops * math.ceil(trip / free - NEARLY)
    else:
        return 2 * stages
    return max(stages, math.ceil(need - NEARLY))


def one_machine(jobs: Iterable[Job]) -> float:
    """The least time in which a machine that may interrupt does the jobs, each with its head before and tail behind.

    >>> one_machine([(0, 2, 5), (1, 3, 9)])  # the second one interrupts the first
    13
    """
    coming, ready, now, longest = sorted(jobs, reverse=True), list[list[float]](), 0.0, 0.0
    while coming or ready:
        if not ready:
            now = max(now, coming[-1][0])
        while coming and coming[-1][0] <= now:
            _, seconds, tail = coming.pop()
            heapq.heappush(ready, [-tail, seconds])
        urgent = ready[0]
        until = coming[-1][0] if coming else math.inf
        if now + urgent[1] <= until:
            now += urgent[1]
            longest = max(longest, now - heapq.heappop(ready)[0])
        else:
            urgent[1] -= until - now
            now = until
    return longest


@dataclass
class _Step:
    """One step of all ranks; see `step_floor`."""

    costs: Costs
    microbatches: int
    split: bool
    in_flight: Sequence[int]
    held: Sequence[int]
    lookahead: bool
    batch: bool

    def __post_init__(self) -> None:
        self.back: Kind = "I" if self.split else "B"
        self.done: Kind = "W" if self.split else "B"
        self.every = range(len(self.costs.t))
        self.seconds = {(kind, k): self.costs.seconds(kind, k) for kind in KINDS for k in self.every}
        self.rest = self.costs.optimizer + (self.costs.exchange or 0.0)

    def needs(self) -> Iterator[tuple[Node, list[tuple[Node, float]]]]:
        """Every action with those that end before it starts and the seconds between; each after what it needs."""
        order = range(self.microbatches)
        for block in [order] if self.batch else [range(q, q + 1) for q in order]:
            for q in block:
                yield from self.forwards(q)
            for q in block:
                yield from self.backwards(q)

    def forwards(self, q: int) -> Iterator[tuple[Node, list[tuple[Node, float]]]]:
        message = self.costs.message
        for k in self.every:
            room: list[tuple[Node, float]] = [
                ((self.back, k, q - self.in_flight[k]), 0.0),
                ((self.done, k, q - self.held[k]), 0.0),
            ]
            yield ("F", k, q), [(("F", k - 1, q), message), (("F", k, q - 1), 0.0), *room]
            if not self.lookahead:
                yield ("T", k, q), [(("T", k - 1, q), message), (("T", k, q - 1), 0.0)]

    def backwards(self, q: int) -> Iterator[tuple[Node, list[tuple[Node, float]]]]:
        last, gate = self.every[-1], self.microbatches - 1 if self.batch else q
        for k in reversed(self.every):
            loss: list[tuple[Node, float]] = [(("F", k, gate), 0.0), (("T", k, gate), 0.0)] if k == last else []
            yield (self.back, k, q), [((self.back, k + 1, q), self.costs.message), ((self.back, k, q - 1), 0.0), *loss]
            if self.split:
                yield ("W", k, q), [((self.back, k, q), 0.0), (("W", k, q - 1), 0.0)]

    def jobs(self) -> list[list[Job]]:
        """Per rank, what has to be done within a step of rank 0."""
        needs, heads = dict(self.needs()), dict[Node, float]()
        tails = dict.fromkeys(needs, -math.inf)
        for node, before in needs.items():
            ends = [heads[other] + self.seconds[other[:2]] + gap for other, gap in before if other in heads]
            heads[node] = max([0.0, *ends, *self.since_the_first(node, heads)])
            if node[0] == self.done and (node[1] == 0 or self.costs.exchange is not None):
                tails[node] = self.rest
        for node in reversed(needs):
            behind = tails[node] + self.seconds[node[:2]]
            for other, gap in needs[node]:
                if other in tails:
                    tails[other] = max(tails[other], behind + gap)
        made: list[list[Job]] = [[] for _ in self.every]
        for node, tail in tails.items():
            if tail > -math.inf:  # a W of another rank than the first may reach into the next step of rank 0
                made[node[1]].append((heads[node], self.seconds[node[:2]], tail))
        return made

    def since_the_first(self, node: Node, heads: dict[Node, float]) -> list[float]:
        """When the last rank has done what precedes a backward, where an exact teacher's forwards are part of it."""
        kind, k, q = node
        if self.lookahead or kind != self.back or k != self.every[-1]:
            return []
        both = (self.microbatches if self.batch else q + 1) * (self.seconds["T", k] + self.seconds["F", k])
        return [min(heads["T", k, 0], heads["F", k, 0]) + both + q * self.seconds[kind, k]]

    def path(self, kind: Kind, ranks: Iterable[int]) -> float:
        """Seconds for one microbatch through some ranks, with a message each."""
        return sum(self.seconds[kind, k] + self.costs.message for k in ranks)

    def of_its_own(self, k: int) -> float:
        """A rank's own step, from its first forward on: the backwards, W too, come after a round trip.

        So do the student's forwards that memory does not allow before.
        """
        t, f, below = self.seconds["T", k], self.seconds["F", k], self.every[k + 1 :]
        early = self.microbatches if self.batch else 1
        down, forwards = self.path("F", below), early * f
        if not self.lookahead:
            way = self.path("T", below)
            down, forwards = max(min(down, way), down - early * t, way - early * f), early * (t + f)
        late = 0 if self.batch else self.microbatches - min(self.microbatches, self.in_flight[k], self.held[k])
        weights = self.seconds["W", k] if self.split else 0.0
        backwards = self.microbatches * (self.seconds[self.back, k] + weights)
        return forwards + down + self.path(self.back, below) + backwards + late * f + self.rest

    def of_both(self, k: int) -> float:
        """Where both networks' forwards have to come to a rank: it waits for the first of either.

        Say student forwards come before T0 there, n of them. Each overtakes T0 on some rank i up to this one, or goes
        first from rank 0 on, and T0 waits there for as long as it takes on rank i. So T0 comes no sooner than without
        them and n min_i f_i, of which this rank is busy for n f_k; n is no more than memory allows. The same holds the
        other way round.
        """
        if self.lookahead:
            return 0.0
        above, below = self.every[:k], self.every[k + 1 :]
        most = min(self.microbatches, self.in_flight[k], self.held[k])
        t, f = ([self.seconds[kind, i] for i in self.every[: k + 1]] for kind in ("T", "F"))
        teacher, student = self.path("T", above), self.path("F", above)
        waits = min(
            max(student, teacher - most * (f[k] - min(f))), max(teacher, student - self.microbatches * (t[k] - min(t)))
        )
        if self.batch:  # and again for the first gradient
            waits += min(self.path("T", below), self.path("F", below)) + self.path(self.back, below)
        work = self.microbatches * (t[k] + f[k] + self.seconds[self.back, k])
        return waits + work + self.path(self.back, above) + self.seconds["W", 0] * self.split + self.rest

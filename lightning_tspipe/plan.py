"""From costs to a schedule: how many microbatches, and the order."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from lightning_tspipe.clock import clock, of_teacher
from lightning_tspipe.floor import minimal_microbatches
from lightning_tspipe.layers import Layer
from lightning_tspipe.orders import NEAR, ORDERS, SPLIT, Found, find_schedule
from lightning_tspipe.partition import Partition
from lightning_tspipe.schedule import Costs, LossOver, Schedule, check_teacher_microbatches
from lightning_tspipe.simulate import ReplayError, replay

SCHEDULES = ORDERS
SHARES = (0.25, 0.5, 0.75, 1.5, 2)  # of the microbatches that fill the bubbles, to try in their place
ENOUGH, LARGER = 0.99, 0.97  # of a step is as long; for larger microbatches of the teacher
LARGE = 4096  # stages x microbatches of the teacher, up to which a search takes about a second


def estimate_costs(partition: Partition) -> Costs:
    """Relative costs from parameter counts, for want of measured ones: a backward is two forwards."""
    student = [1 + _parameters(layers) for layers in partition.student]
    teacher = [1 + _parameters(layers) if layers else 0 for layers in partition.teacher]
    unit = sum(student) / len(student)
    forward = tuple(count / unit for count in student)
    return Costs(t=tuple(count / unit for count in teacher), f=forward, b=forward, w=forward)


def check_plan_arguments(microbatches: int | str, schedule: str, teacher_microbatches: int | str = "auto") -> None:
    """Raises ValueError for numbers of microbatches, or an order, that do not exist or do not go together."""
    if microbatches != "auto" and (not isinstance(microbatches, int) or microbatches < 1):
        raise ValueError(f'microbatches={microbatches!r}: give a number of at least 1, or "auto"')
    if teacher_microbatches != "auto" and (not isinstance(teacher_microbatches, int) or teacher_microbatches < 1):
        raise ValueError(f'teacher_microbatches={teacher_microbatches!r}: give a number of at least 1, or "auto"')
    if isinstance(teacher_microbatches, int):
        if not isinstance(microbatches, int):
            raise ValueError(
                f"teacher_microbatches={teacher_microbatches} with microbatches={microbatches!r}: one has to divide "
                'the other, so give both numbers, or leave teacher_microbatches="auto"'
            )
        check_teacher_microbatches(microbatches, teacher_microbatches)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown: choose from {', '.join(map(repr, SCHEDULES))}")


def most_in_memory(limit: Sequence[float], microbatch: Sequence[float]) -> tuple[int, ...]:
    """How many student microbatches fit on each rank, for a bound on what is held.

    Args:
        limit: bytes per rank that activations may take.
        microbatch: bytes per rank that one microbatch takes between its forward and the end of its backward.

    Raises:
        ValueError: a rank has no room for a single one.
    """
    most = tuple(int(bytes_ // each) if each else sys.maxsize for bytes_, each in zip(limit, microbatch, strict=True))
    if min(most) < 1:
        rank = most.index(min(most))
        raise ValueError(
            f"A microbatch takes {microbatch[rank]:,.0f} bytes on rank {rank}, more than the "
            f"{max(0, limit[rank]):,.0f} that it may: cut the batch into more microbatches, or the network into more "
            "stages."
        )
    return most


class Planner:
    """Makes the schedule for any number of microbatches, once each, and replays it for all ranks before it is used.

    Args:
        costs: per stage.
        lookahead: whether the teacher may run a batch ahead (frozen or delayed).
        loss_over: as of the module.
        schedule: the order, or "auto".
        post_ahead: how many runs before its use a receive is posted. A schedule whose ranks would then wait for each
            other raises it, from that schedule on.
        split_backward: whether "auto" may split the backward into I and W.
        clipping: whether all stages exchange a scalar before the optimizer step (clipping by norm, a loss scale).
        max_in_flight, max_held, max_held_split: per rank, bounds on student microbatches (`find_schedule`).
        accumulation: batches of an optimizer step. A teacher that may not run a batch ahead may within these, and only
            the last one's backward is followed by an exchange: what is planned is the mean batch.

    Raises:
        ScheduleError, ReplayError: a schedule that would not run; a bug of this library.
        ValueError: no order keeps the bounds.
    """

    def __init__(
        self,
        costs: Costs,
        lookahead: bool,
        loss_over: LossOver,
        schedule: str = "auto",
        post_ahead: int = 2,
        *,
        split_backward: bool = False,
        clipping: bool = False,
        max_in_flight: Sequence[int] | None = None,
        max_held: Sequence[int] | None = None,
        max_held_split: Sequence[int] | None = None,
        accumulation: int = 1,
    ) -> None:
        stages = len(costs.t)
        if clipping and costs.exchange is None:  # the scalar goes up to rank 0 and down again
            costs = replace(costs, exchange=2 * (stages - 1) * costs.message)
        self.costs, self.lookahead, self.post_ahead = costs, lookahead, post_ahead
        self._arguments: dict[str, Any] = {
            "lookahead": lookahead, "loss_over": loss_over, "split_backward": split_backward,
            "max_in_flight": max_in_flight, "max_held": max_held, "max_held_split": max_held_split,
        }  # fmt: skip
        self._order, self.accumulation = schedule, accumulation
        self._find: Callable[..., Found] = partial(
            find_schedule, stages, costs=costs, order=schedule, **self._arguments
        )
        self._found: dict[tuple[int, int], Found] = {}
        self._replayed: set[tuple[int, int]] = set()
        self.search(1, 1)  # an order that the loss does not allow is an error here
        self._fewest = partial(
            minimal_microbatches,
            stages,
            costs,
            lookahead=lookahead,
            loss_over="batch" if schedule == "afab-split" else loss_over,
        )
        self._backwards = (True, False) if split_backward and schedule == "auto" else (schedule in SPLIT,)

    @cached_property
    def microbatches(self) -> int:
        """How many to take if nobody says: the fewest that fill the bubbles."""
        return self._best(self._fewest(split=split) for split in self._backwards)

    def again(self, costs: Costs) -> Planner:
        """A planner with other costs, and all else the same, the number of microbatches too if it is chosen already."""
        own = {"accumulation": self.accumulation, **self._arguments}
        made = Planner(costs, schedule=self._order, post_ahead=self.post_ahead, **own)
        if "microbatches" in vars(self):
            made.microbatches = self.microbatches
        return made

    def come_after(self, old: Schedule) -> None:
        """Make sure that a step can follow one of another schedule, whatever that one has done ahead.

        Raises:
            ReplayError: the ranks would wait for each other.
        """
        made = self.schedule(old.microbatches, old.teacher_microbatches)
        self.post_ahead = self._runs_with(made, old.ahead)

    def find(self, microbatches: int, teacher: int | None = None) -> Found:
        """The schedule for batches of that many microbatches, and what is known of it.

        Args:
            microbatches: M.
            teacher: how many of the teacher; None: M.
        """
        teacher = microbatches if teacher is None else teacher
        found = self.search(microbatches, teacher)
        if (microbatches, teacher) not in self._replayed:
            self.post_ahead = self._runs_with(found.schedule)
            self._replayed.add((microbatches, teacher))
        return found

    def schedule(self, microbatches: int, teacher: int | None = None) -> Schedule:
        """The schedule for batches of that many microbatches, of the student and of the teacher."""
        return self.find(microbatches, teacher).schedule

    def teacher_microbatches(
        self, microbatches: int, most: float = math.inf, fits: Callable[[Schedule], bool] = lambda _: True
    ) -> int:
        """How many the teacher should have for M of the student, if that makes the step shorter: else M.

        2 M or 4 M, where a teacher forward takes longer than the student's, so that it is a coarse thing to fill holes
        with, where M is 1 % off the bound and the step gets 1 % shorter. Fewer, where a part of a forward's time does
        not depend on its rows and the step gets 3 % shorter: a half, a third or a quarter of M, whatever divides it, or
        one. Large problems are left out, for the time that it takes.

        Args:
            microbatches: M.
            most: rows of a batch, which cannot be cut into more.
            fits: whether larger ones leave what they need of the memory.
        """
        best, size = self.search(microbatches, microbatches), len(self.costs.t)
        if not best.period or size * microbatches > LARGE:
            return microbatches
        most = min(most, LARGE / size)
        coarse = max(self.costs.t) > max(self.costs.f) and best.bound / best.period < ENOUGH
        more = [count for count in (2 * microbatches, 4 * microbatches) if coarse and count <= most]
        shares = (2, 3, 4, microbatches) if any(self.costs.t_fixed) else ()
        fewer = [microbatches // by for by in shares if by > 1 and microbatches % by == 0]
        for count in dict.fromkeys([*more, *fewer]):
            costs = of_teacher(self.costs, microbatches, count)
            if max(costs.work(k, microbatches) for k in range(size)) < ENOUGH * best.period:
                found = self.search(microbatches, count)
                share = ENOUGH if count > microbatches else LARGER  # these take memory, and what is fixed is a guess
                if found.period < share * best.period and fits(found.schedule):
                    best = found
        return best.schedule.teacher_microbatches

    def _best(self, numbers: Iterable[int]) -> int:
        tries = sorted(set(numbers))
        if len(tries) == 1:
            return tries[0]
        shares = [self._share(count) for count in tries]
        return next(count for count, share in zip(tries, shares, strict=True) if share >= 0.99 * max(shares))

    def search(self, microbatches: int, teacher: int) -> Found:
        """What `find` gives, before it is replayed."""
        if (microbatches, teacher) not in self._found:
            self._found[microbatches, teacher] = self._search(microbatches, teacher)
        return self._found[microbatches, teacher]

    def seconds(self, schedule: Schedule) -> float:
        """Of a batch with that schedule, on average."""
        if self.accumulation == 1:
            return clock(schedule, self.costs).period
        two = 2 * clock(schedule, self.costs, steps=8, window=2, exact=not self.lookahead).period
        steady = clock(schedule, replace(self.costs, exchange=None, optimizer=0.0)).period
        return (two + (self.accumulation - 2) * steady) / self.accumulation

    def _search(self, microbatches: int, teacher: int) -> Found:
        """The best for the mean batch of an optimizer step."""
        given: dict[str, Any] = {} if teacher == microbatches else {"teacher_microbatches": teacher}
        found = self._find(microbatches, **given)
        if self.accumulation == 1:
            return found
        found = self._mean(found)
        if not self.lookahead and found.period > found.bound * NEAR:
            ahead = self._mean(self._find(microbatches, **given, lookahead=True))
            found = min(found, ahead, key=lambda each: each.period)
        return found

    def _mean(self, found: Found) -> Found:
        """With what its schedule takes for the mean batch."""
        bound = found.bound - self.costs.optimizer * (1 - 1 / self.accumulation)
        return replace(found, period=self.seconds(found.schedule), bound=bound, floor=bound)

    def _share(self, microbatches: int, teacher: int | None = None) -> float:
        """The bound over the step; 0 where no order keeps the bounds on memory."""
        try:
            found = self.search(microbatches, microbatches if teacher is None else teacher)
        except ValueError:
            return 0.0
        return found.bound / found.period if found.period else 1.0

    def _runs_with(self, made: Schedule, first_done: int | Sequence[int] = 0) -> int:
        """How early receives must be posted so that no rank waits with a send for another that waits for it."""
        longest = max(map(len, made.ranks))
        for post_ahead in (self.post_ahead, 8, 32):
            if self.post_ahead <= post_ahead < longest:
                try:
                    self._replay(made, first_done, post_ahead)
                except ReplayError:
                    continue
                return post_ahead
        self._replay(made, first_done, max(longest, self.post_ahead))
        return max(longest, self.post_ahead)

    def _replay(self, made: Schedule, first_done: int | Sequence[int], post_ahead: int) -> None:
        replay(made, steps=3, first_done=first_done, post_ahead=post_ahead)
        if not self.lookahead and any(made.ahead):  # within a window alone; a longer one has nothing else
            replay(made, steps=6, first_done=first_done, post_ahead=post_ahead, window=min(self.accumulation, 3))


def fastest_count(stages: int, first: int, of: Callable[[int], Planner], most: int) -> int:
    """How many microbatches a batch should have, where fewer and larger ones take less time in all.

    Args:
        stages: P.
        first: how many fill the bubbles, by costs that are in proportion to the rows; to be beaten by 1 %.
        of: plans with the costs that a microbatch has if a batch has so many.
        most: how many there may be.
    """
    first = best = max(1, min(first, most))
    shortest = math.inf
    tries = [first, *(round(first * share) for share in SHARES), stages, 2 * stages]
    # with fewer than stages a microbatch would be much larger than any that was measured
    for count in dict.fromkeys(max(1, min(most, max(stages, count))) for count in tries):
        try:
            planner = of(count)
            bound = max(planner.costs.work(k, count) for k in range(len(planner.costs.t)))
            if bound >= 0.99 * shortest:  # it can be no better, so nothing is searched
                continue
            period = planner.search(count, count).period
        except ValueError:  # what is in flight does not fit
            continue
        best, shortest = (count, period) if period < 0.99 * shortest else (best, shortest)
    return best


def _parameters(layers: tuple[Layer, ...]) -> int:
    return sum(layer.num_parameters for layer in layers)

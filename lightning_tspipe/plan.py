"""From costs to a schedule: how many microbatches, and the order."""

from __future__ import annotations

from functools import cache
from typing import Literal

from lightning_tspipe.partition import Layer, Partition
from lightning_tspipe.schedule import Costs, Schedule, make_schedule, minimal_microbatches
from lightning_tspipe.simulate import replay

SCHEDULES = ("auto", "afab")


def estimate_costs(partition: Partition) -> Costs:
    """Relative costs from parameter counts, for want of measured ones: a backward is two forwards."""
    student = [1 + _parameters(layers) for layers in partition.student]
    teacher = [1 + _parameters(layers) if layers else 0 for layers in partition.teacher]
    unit = sum(student) / len(student)
    forward = tuple(count / unit for count in student)
    return Costs(t=tuple(count / unit for count in teacher), f=forward, b=forward, w=forward)


def check_plan_arguments(microbatches: int | str, schedule: str) -> None:
    """Raises ValueError for a number of microbatches or an order that does not exist."""
    if microbatches != "auto" and (not isinstance(microbatches, int) or microbatches < 1):
        raise ValueError(f'microbatches={microbatches!r}: give a number of at least 1, or "auto"')
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown: choose from {', '.join(map(repr, SCHEDULES))}")


class Planner:
    """Makes the schedule for any number of microbatches, once each, and replays it for all ranks before it is used.

    Args:
        costs: per stage.
        lookahead: whether the teacher may run a batch ahead (frozen or delayed).
        loss_over: "batch" or "microbatch".
        schedule: the order, or "auto".
        post_ahead: how many runs before its use a receive is posted.

    Raises:
        ScheduleError, ReplayError: a schedule that would not run; a bug of this library.
    """

    def __init__(
        self,
        costs: Costs,
        lookahead: bool,
        loss_over: Literal["batch", "microbatch"],
        schedule: str = "auto",
        post_ahead: int = 2,
    ) -> None:
        stages = len(costs.t)
        self.costs, self.lookahead, self.post_ahead = costs, lookahead, post_ahead
        self.microbatches = minimal_microbatches(stages, costs, lookahead=lookahead)

        def make(count: int) -> Schedule:
            made = make_schedule(stages, count, costs, lookahead=lookahead, loss_over=loss_over, order=schedule)
            replay(made, post_ahead=post_ahead)
            return made

        self._make = cache(make)

    def schedule(self, microbatches: int) -> Schedule:
        """The schedule for batches of that many microbatches."""
        return self._make(microbatches)


def _parameters(layers: tuple[Layer, ...]) -> int:
    return sum(layer.num_parameters for layer in layers)

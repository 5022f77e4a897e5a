"""The least that a step takes under a bound on memory: by hand, and never above what a plan takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tspipe.clock import clock
from lightning_tspipe.floor import step_floor
from lightning_tspipe.orders import find_schedule
from lightning_tspipe.plan import Planner
from lightning_tspipe.schedule import Action, Costs, LossOver, Schedule, ScheduleError, validate

seconds = st.sampled_from([0.5, 1.0, 2.0, 3.0])


def test_round_trips_by_hand() -> None:
    """Two stages: f + b is 3 on each, and a message either way 0.5."""
    costs = Costs.uniform(2, message=0.5)
    free = (4, 4)
    assert step_floor(costs, 4, False, free, free) == 4 * 4  # work
    assert step_floor(costs, 4, False, (1, 1), free) == 4 * (3 + 1 + 3)
    # F2 waits on stage 0 for B0, which ends after a round trip of 7; stage 1 has B3 9 after the F2 that it sends
    assert step_floor(costs, 4, False, (2, 1), free) == 7 + 1 + 0.5 + 2 * 3 + 0.5 + 2
    assert step_floor(costs, 4, True, (1, 1), free) == 4 * (2 + 1 + 2) + 1  # W need not be waited for, but for the last
    assert step_floor(costs, 4, True, (1, 1), (1, 1)) == 4 * (2 + 1 + 2 + 1)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("t", [1, 3])
def test_one_at_a_time_reaches_the_floor(stages: int, t: float) -> None:
    """Which is up to six times the work, and none with a large teacher and few stages."""
    found = find_schedule(
        stages, 2 * stages, Costs.uniform(stages, t=t), loss_over="microbatch", max_in_flight=(1,) * stages
    )
    assert found.period == pytest.approx(found.floor)


@given(st.data(), st.integers(2, 5), st.integers(1, 8), st.booleans(), st.booleans())
@settings(max_examples=12, deadline=None)
def test_no_plan_is_below_the_floor(
    data: st.DataObject, stages: int, microbatches: int, split: bool, lookahead: bool
) -> None:
    columns = [tuple(data.draw(seconds) for _ in range(stages)) for _ in range(4)]
    bound = [tuple(data.draw(st.integers(1, stages)) for _ in range(stages)) for _ in range(2)]
    found = find_schedule(
        stages, microbatches, Costs(*columns, message=data.draw(st.sampled_from([0.0, 0.3]))), lookahead=lookahead,
        loss_over="microbatch", split_backward=split, max_in_flight=bound[0], max_held=bound[1],
    )  # fmt: skip
    assert found.bound * (1 - 1e-9) <= found.floor <= found.period * (1 + 1e-9)


def test_large_teacher_operations_reach_it_with_the_memory_of_1f1b() -> None:
    """16 stages and t = 3f, with a whole backward: within 2 %, and with the smaller ones that "auto" takes on it."""
    planner = Planner(Costs.uniform(16, t=3), True, "microbatch", max_in_flight=tuple(range(16, 0, -1)))
    coarse, found = (planner.search(48, count) for count in (48, planner.teacher_microbatches(48)))
    assert found.floor == found.bound
    assert found.period == pytest.approx(found.floor)
    assert coarse.period <= coarse.floor / 0.98


def rows(kinds: str, microbatches: int, loss_over: LossOver) -> Iterator[tuple[Action, ...]]:
    """Every order of one rank in which the microbatches of a kind come in turn, and each after what it needs."""
    back = kinds[2]

    def more(done: dict[str, int]) -> Iterator[tuple[Action, ...]]:
        if not any(done[kind] < microbatches for kind in kinds):
            yield ()
        forwards = min(done["T"], done["F"])
        gate = forwards if loss_over == "microbatch" or forwards == microbatches else 0
        free = {"T": microbatches, "F": microbatches, "W": done["I"], back: gate}
        for kind in kinds:
            if done[kind] < free[kind]:
                for rest in more(done | {kind: done[kind] + 1}):
                    yield Action(kind, done[kind]), *rest  # type: ignore[arg-type]

    yield from more(dict.fromkeys("TFBIW", 0))


@pytest.mark.parametrize(
    ("stages", "microbatches", "kinds", "loss_over", "held"),
    [
        (3, 1, "TFIW", "microbatch", (1, 1, 1)),
        (2, 2, "TFB", "microbatch", (2, 1)),
        (2, 2, "TFB", "batch", (2, 2)),
        (2, 2, "TFIW", "microbatch", (2, 1)),
        (2, 2, "TFIW", "batch", (2, 2)),
    ],
)
@pytest.mark.parametrize("t", [(1.0, 1.0, 1.0), (3.0, 2.0, 4.0), (0.5, 2.0, 0.5)])
def test_every_order_with_an_exact_teacher(
    stages: int, microbatches: int, kinds: str, loss_over: LossOver, held: tuple[int, ...], t: tuple[float, ...]
) -> None:
    """None is below the floor, and the best one is half an action above it at most."""
    costs = Costs(t[:stages], (1.0, 1.5, 1.0)[:stages], (1.0, 2.0, 1.5)[:stages], (1.0, 0.5, 2.0)[:stages])
    best = inf
    for ranks in product(rows(kinds, microbatches, loss_over), repeat=stages):
        schedule = Schedule(stages, microbatches, loss_over, ranks)
        try:
            validate(schedule, max_held=held)
        except ScheduleError:
            continue
        best = min(best, clock(schedule, costs).period)
    floor = step_floor(
        costs, microbatches, "W" in kinds, (microbatches,) * stages, held, lookahead=False, loss_over=loss_over
    )
    assert floor <= best <= floor + 0.5


def test_an_exact_teacher_of_three_forwards_is_at_the_floor() -> None:
    """16 stages, M = 48: the last rank waits for T0 for 15 (t + b) + w and has 48 w to fill that with."""
    costs = Costs.uniform(16, t=3)
    found = find_schedule(16, 48, costs, lookahead=False, split_backward=True, loss_over="microbatch")
    assert found.period == pytest.approx(found.floor)
    assert found.floor == pytest.approx(found.bound + 15 * (3 + 1) + 1 - 48)

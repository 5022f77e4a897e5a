"""The teacher in the holes of the student's timetable, as literal tables."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_tspipe.greedy import Policy
from lightning_tspipe.holes import filled, waves
from lightning_tspipe.schedule import Costs, Schedule, validate
from lightning_tspipe.simulate import timeline

POLICY = Policy(ahead=(0, 0), in_flight=(2, 1), held=(4, 4))  # 1F1B


def rows(policy: Policy, microbatches: int, costs: Costs, *periods: float) -> list[list[str]]:
    made = []
    for found in filled([policy], microbatches, costs, periods):
        schedule = Schedule(len(costs.t), microbatches, policy.loss_over, found)
        validate(schedule, max_in_flight=policy.in_flight, max_held=policy.held)
        made.append([" ".join(map(str, row)) for row in found])
    return made


def test_rows_table() -> None:
    assert rows(POLICY, 4, Costs.uniform(2), 16) == [
        # the wait for B0 stands before F1, or, with F1 as soon as it can be, after it
        ["T3 F0 T0' T1' F1 B0 F2 B1 F3 B2 T2' B3", "T0 T1 T2 T3 F0 B0 F1 B1 F2 B2 F3 B3"],
        ["T3 F0 F1 T0' T1' B0 F2 B1 F3 B2 T2' B3", "T0 T1 T2 T3 F0 B0 F1 B1 F2 B2 F3 B3"],
    ]
    whole = replace(POLICY, in_flight=(3, 3), loss_over="batch")
    assert rows(whole, 3, Costs.uniform(2), 12)[0] == ["F0 F1 F2 T0' T1' T2' B0 B1 B2", "T0 T1 T2 F0 F1 F2 B0 B1 B2"]


def test_what_does_not_fit_is_not_made() -> None:
    costs = Costs.uniform(2)
    assert rows(POLICY, 4, costs, 14.5) == []  # shorter than the student alone
    assert rows(POLICY, 4, Costs.uniform(2, t=3), 20) == []  # no hole is as long as a teacher forward
    assert rows(replace(POLICY, in_flight=(1, 1), loss_over="batch"), 2, costs, 99) == []  # the student gets stuck


def test_no_weights_are_in_the_way_of_a_gradient() -> None:
    """A step of the work alone, 40, for which a rank may not start a W of 4 while it waits 2 for an I."""
    policy = Policy((0, 0, 0), in_flight=(4, 4, 4), held=(4, 4, 4), split=True)
    costs = Costs.uniform(3, t=2, f=1, b=3, w=4)
    patient = replace(policy, patience=0.6)
    assert rows(policy, 4, costs, costs.work(0, 4)) == []
    found = rows(patient, 4, costs, costs.work(0, 4))
    assert found[0] == [
        "F0 T0' F1 F2 F3 T1' T2' I0 T3' I1 I2 I3 W0 W1 W2 W3",
        "T3 F0 F1 F2 F3 I0 T0' I1 T1' I2 T2' I3 W0 W1 W2 W3",
        "T0 T1 T2 T3 F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3",
    ]
    both = filled([policy, patient], 4, costs, [costs.work(0, 4)])
    assert [[" ".join(map(str, row)) for row in each] for each in both] == found


def test_an_optimizer_step_and_an_exchange_are_kept_free() -> None:
    costs = replace(Costs.uniform(2), optimizer=1, exchange=2)
    for period in (17, 19, 23):
        for found in filled([POLICY], 4, costs, [period]):
            assert timeline(Schedule(2, 4, "microbatch", found), costs).period <= period


def test_room_is_made_in_the_same_microbatches_on_all_ranks() -> None:
    """2 ranks, 1F1B, t = 2: 8 of teacher and 12 of student, whose round trip of 3 leaves room for one teacher forward.

    So three more stand before the last three forwards of the student, on both ranks.
    """
    costs = Costs.uniform(2, t=2)
    schedule = Schedule(2, 4, "microbatch", next(waves(POLICY, 4, costs, 20, lambda: math.inf)))
    validate(schedule, max_in_flight=POLICY.in_flight, max_held=POLICY.held)
    assert str(schedule).splitlines()[1:] == [
        "rank 0: F0 T0' F1 T1' B0 F2 T2' B1 F3 T3' B2 B3",
        "rank 1: T2 F0 T3 B0 F1 T0' B1 F2 T1' B2 F3 B3",
    ]
    assert timeline(schedule, costs).period == 21
    assert list(waves(POLICY, 4, costs, 20, lambda: 20)) == []  # the best that is known is as good


def test_room_helps_where_few_microbatches_are_in_flight() -> None:
    """12 ranks, t = 3f: 0.93 of the work without it."""
    costs, one = (
        Costs.uniform(12, t=3),
        replace(POLICY, ahead=(0,) * 12, in_flight=(*range(12, 0, -1),), held=(24,) * 12),
    )
    made = [Schedule(12, 24, "microbatch", found) for found in waves(one, 24, costs, 144, lambda: math.inf)]
    for schedule in made:
        validate(schedule, max_in_flight=one.in_flight)
    assert min(timeline(schedule, costs).period for schedule in made) <= 144 / 0.97

"""When actions start, as literal tables, and that the clock and the quick formula of one order agree."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tspipe.ahead import afab_ahead, afab_period, legal, staircases
from lightning_tspipe.clock import clock
from lightning_tspipe.schedule import Costs, Schedule
from tests.test_simulate import problems

TWO = Schedule.parse("""
    stages=2 microbatches=2 loss_over=batch
    rank 0: F0 F1 T0' T1' B0 B1
    rank 1: T0 T1 F0 F1 B0 B1
""")
SPLIT = Schedule.parse("""
    stages=2 microbatches=2 loss_over=microbatch
    rank 0: T1 F0 F1 I0 W0 I1 W1 T0'
    rank 1: T1 F0 I0 F1 I1 W0 W1 T0'
""")


def starts(schedule: Schedule, costs: Costs) -> list[str]:
    """The first step and the second, with the time that each action starts."""
    times = clock(schedule, costs, steps=4)
    return [
        " ".join(f"{action}@{start:g}" for action, start in zip([*orders[0], *orders[1]], rank, strict=False))
        for orders, rank in zip(times.orders, times.starts, strict=True)
    ]


def test_each_action_waits_for_its_rank_and_its_message() -> None:
    assert starts(TWO, Costs.uniform(2, message=0.5)) == [
        "T0@0 T1@1 F0@2 F1@3 T0'@4 T1'@5 B0@8 B1@10 F0@12 F1@13 T0'@14 T1'@15 B0@18 B1@20",
        "T0@1.5 T1@2.5 F0@3.5 F1@4.5 B0@5.5 B1@7.5 T0@9.5 T1@10.5 F0@13.5 F1@14.5 B0@15.5 B1@17.5",
    ]
    assert clock(TWO, Costs.uniform(2, message=0.5)).period == 10


def test_a_split_backward_and_an_optimizer_step() -> None:
    assert starts(SPLIT, replace(Costs.uniform(2), optimizer=3)) == [
        "T0@0 T1@1 F0@2 F1@3 I0@5 W0@6 I1@7 W1@8 T0'@9 T1@13 F0@14 F1@15 I0@17 W0@18 I1@19 W1@20 T0'@21",
        "T0@1 T1@2 F0@3 I0@4 F1@5 I1@6 W0@7 W1@8 T0'@10 T1@14 F0@15 I0@16 F1@17 I1@18 W0@19 W1@20 T0'@22",
    ]


def test_with_an_exchange_no_rank_makes_its_optimizer_step_before_all_are_through() -> None:
    costs = replace(Costs.uniform(2), optimizer=1, exchange=2)
    times = clock(TWO, costs, steps=4)
    assert starts(TWO, costs) == [  # the last backward ends at 11, on rank 0: both may go on at 13
        "T0@0 T1@1 F0@2 F1@3 T0'@4 T1'@5 B0@7 B1@9 F0@14 F1@15 T0'@16 T1'@17 B0@20 B1@22",
        "T0@1 T1@2 F0@3 F1@4 B0@5 B1@7 T0@14 T1@15 F0@16 F1@17 B0@18 B1@20",
    ]
    assert [ends[:2] for ends in times.step_ends] == [[14, 27], [14, 27]]
    # a rank takes part when it is through with its row: both at 11, after the teacher's work for the next batch
    first = starts(SPLIT, replace(costs, optimizer=0))[0]
    assert first.endswith(" W1@8 T0'@9 T1@13 F0@14 F1@15 I0@17 W0@18 I1@19 W1@20 T0'@21")


def test_in_a_window_the_optimizer_steps_once_and_nothing_reaches_over_its_end() -> None:
    costs = replace(Costs.uniform(2), optimizer=1, exchange=2)
    times = clock(TWO, costs, steps=8, window=2, exact=True)
    rows = [[" ".join(map(str, actions)) for actions in orders[2:4]] for orders in times.orders]
    own = "T0 T1 F0 F1 B0 B1"
    assert rows == [["T0 T1 F0 F1 T0' T1' B0 B1", "F0 F1 B0 B1"], [own, own]]
    # 11 for the first batch; rank 0's last backward ends 9 after it, and 3 pass until both have stepped
    assert [ends[:4] for ends in times.step_ends] == [[11, 23, 34, 46], [9, 23, 32, 46]]
    assert times.period == 23 / 2
    without = clock(TWO, costs, steps=8, window=2)
    assert [" ".join(map(str, actions)) for actions in without.orders[0][3:5]] == ["F0 F1 T0' T1' B0 B1"] * 2
    assert without.period < times.period


def test_ranks_that_wait_for_each_other_have_no_period() -> None:
    crossed = Schedule.parse("""
        stages=2 microbatches=2 loss_over=batch
        rank 0: T1 F0 F1 B0 T0' B1
        rank 1: T1 F0 F1 T0' B0 B1
    """)
    times = clock(crossed, Costs.uniform(2))
    assert (times.period, times.step_ends) == (math.inf, ([], []))


@given(problems(), st.sampled_from([None, 0.0, 1.5]), st.sampled_from([1, 1, 2, 3]), st.data())
@settings(max_examples=40, deadline=None)
def test_the_quick_formula_gives_the_same_period(
    problem: tuple[int, int, Costs], exchange: float | None, ratio: int, data: st.DataObject
) -> None:
    stages, microbatches, costs = problem
    costs = replace(costs, exchange=exchange)
    ahead = legal(data.draw(st.lists(st.integers(0, 9), min_size=stages, max_size=stages)), microbatches)
    teacher = ratio * microbatches
    own, rest = [f"T{q}" for q in range(teacher)], [f"F{q}" for q in range(microbatches)]
    back = [f"B{q}" for q in range(microbatches)]
    rows = [" ".join([*own[s:], *rest, *(f"{t}'" for t in own[:s]), *back]) for s in ahead]
    text = [f"rank {rank}: {row}" for rank, row in enumerate(rows)]
    written = Schedule.parse("\n".join([f"stages={stages} microbatches={microbatches} loss_over=batch", *text]))
    written = replace(written, teacher_microbatches=teacher)
    each = costs.per_action(microbatches, teacher)
    assert each.t == pytest.approx([seconds / ratio for seconds in costs.t])
    assert afab_period(microbatches, each, ahead, teacher) == pytest.approx(clock(written, costs).period)


def test_staircases_table() -> None:
    costs = Costs.uniform(4)
    assert staircases(12, costs) == [
        *[(9, 6, 3, 0)] * 3, (10, 7, 3, 0), (10, 7, 3, 0), (11, 7, 4, 0), *[(12, 8, 4, 0)] * 3
    ]  # fmt: skip
    assert set(staircases(6, costs, split=True)) == {(6, 4, 2, 0)}
    assert legal((3, 9, 5, 5), 4) == (3, 3, 3, 0)
    assert legal((3, 9, 5, 5), 4, None) == (3, 3, 3, 3)
    ahead, evaluations = afab_ahead(12, costs)
    assert ahead == (12, 8, 4, 0)
    assert evaluations <= 150

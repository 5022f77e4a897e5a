"""The orders as tables, the bounds that they reach, and that no plain order is faster."""

from __future__ import annotations

import pytest

from lightning_tspipe.orders import (
    make_schedule,
    minimal_microbatches,
)
from lightning_tspipe.schedule import Costs, validate
from tests.test_schedule import lines

# --- orders as tables


@pytest.mark.parametrize(
    ("stages", "microbatches", "table"),
    [
        (1, 1, ["T0 F0 B0"]),
        (1, 2, ["T0 T1 F0 F1 B0 B1"]),
        (2, 1, ["F0 T0' B0", "T0 F0 B0"]),
        (2, 2, ["F0 F1 T0' T1' B0 B1", "T0 T1 F0 F1 B0 B1"]),
        (2, 3, ["F0 F1 F2 T0' T1' T2' B0 B1 B2", "T0 T1 T2 F0 F1 F2 B0 B1 B2"]),
        (
            3,
            3,
            [
                "F0 F1 F2 T0' T1' T2' B0 B1 B2",
                "T0 T1 T2 F0 F1 F2 B0 B1 B2",
                "T0 T1 T2 F0 F1 F2 B0 B1 B2",
            ],
        ),
        (
            3,
            6,
            [
                "F0 F1 F2 F3 F4 F5 T0' T1' T2' T3' T4' T5' B0 B1 B2 B3 B4 B5",
                "T3 T4 T5 F0 F1 F2 F3 F4 F5 T0' T1' T2' B0 B1 B2 B3 B4 B5",
                "T0 T1 T2 T3 T4 T5 F0 F1 F2 F3 F4 F5 B0 B1 B2 B3 B4 B5",
            ],
        ),
    ],
)
def test_all_forward_all_backward_table(stages: int, microbatches: int, table: list[str]) -> None:
    for order in ("auto", "afab"):
        schedule = make_schedule(stages, microbatches, order=order)
        assert lines(schedule) == table
        validate(schedule)


def test_the_split_of_the_teacher_is_a_staircase() -> None:
    """One more than the (P-1-k)(f+b+w)/t that the hole needs, where there are enough: neighbours are decoupled."""
    assert make_schedule(4, 12).ahead == (12, 8, 4, 0)
    assert make_schedule(4, 9).ahead == (9, 6, 3, 0)


def test_without_lookahead_everything_is_done_within_the_step() -> None:
    for loss_over in ("batch", "microbatch"):
        schedule = make_schedule(2, 2, lookahead=False, loss_over=loss_over)  # type: ignore[arg-type]
        assert lines(schedule) == ["T0 T1 F0 F1 B0 B1"] * 2
        assert schedule.loss_over == loss_over


def test_a_teacher_that_costs_nothing_is_scheduled_too() -> None:
    for costs in (Costs.uniform(3, t=0), Costs.uniform(3, 0, 0, 0, 0)):
        validate(make_schedule(3, 4, costs))


# --- how many microbatches


@pytest.mark.parametrize(
    ("stages", "costs", "lookahead", "expected"),
    [
        (1, Costs.uniform(1), True, 1),
        (1, Costs.uniform(1), False, 1),
        (2, Costs.uniform(2), True, 3),
        (4, Costs.uniform(4), True, 9),
        (8, Costs.uniform(8), True, 21),
        (8, Costs.uniform(8, t=0.1, f=0.1, b=0.1, w=0.1), True, 21),
        (8, Costs.uniform(8, message=0.5), True, 28),
        (8, Costs.uniform(8, t=3), True, 8),
        (4, Costs.uniform(4, t=3), True, 4),
        (8, Costs.uniform(8), False, 16),
        (8, Costs.uniform(8, t=0), True, 16),
        (2, Costs(t=(1, 2), f=(3, 1), b=(1, 4)), True, 4),
    ],
)
def test_minimal_microbatches_table(stages: int, costs: Costs, lookahead: bool, expected: int) -> None:
    assert minimal_microbatches(stages, costs, lookahead=lookahead) == expected


@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_minimal_microbatches_of_split_backwards(stages: int) -> None:
    costs = Costs.uniform(stages)
    assert minimal_microbatches(stages, costs, split=True) == max(stages, 2 * (stages - 1))
    assert minimal_microbatches(stages, costs, split=True, loss_over="microbatch") == stages
    exact = minimal_microbatches(stages, costs, lookahead=False, split=True, loss_over="microbatch")
    assert exact == 2 * stages - 1
    assert minimal_microbatches(stages, costs, lookahead=False, split=True) == 2 * stages


# --- bad arguments


BAD_ARGUMENTS = [
    (lambda: make_schedule(0, 1), "stages is 0: give at least 1"),
    (lambda: make_schedule(1, 0), "microbatches is 0: give at least 1"),
    (lambda: make_schedule(2, 2, order="2f2b"), "order is '2f2b': choose from auto, afab, 1f1b, afab-split, zb"),
    (lambda: make_schedule(2, 2, order="1f1b"), 'order "1f1b" needs a loss per microbatch: set loss_over="microbatch"'),
    (lambda: make_schedule(2, 2, order="zb"), 'order "zb" needs a loss per microbatch'),
    (lambda: make_schedule(2, 3, max_in_flight=(2, 2)), "all 3 microbatches are in flight at once, which the bound"),
    (lambda: make_schedule(2, 3, max_in_flight=(2, 2)), 'or set loss_over="microbatch"'),
    (lambda: make_schedule(2, 3, loss_over="microbatch", order="afab", max_held=(3, 2)), "all 3 microbatches are in"),
    (
        lambda: make_schedule(2, 3, max_in_flight=(2,)),
        "max_in_flight is (2,): give at least 1 for each of the",
    ),
    (lambda: make_schedule(2, 3, max_held=(2, 0)), "max_held is (2, 0): give at least 1 for each of the 2 stages"),
    (lambda: make_schedule(2, 2, loss_over="epoch"), "loss_over is 'epoch': choose from batch, microbatch"),  # type: ignore[arg-type]
    (lambda: make_schedule(2, 2, Costs.uniform(3)), "costs are for 3 stages, not 2: give one entry per stage"),
    (lambda: minimal_microbatches(0, Costs.uniform(1)), "stages is 0: give at least 1"),
    (lambda: minimal_microbatches(2, Costs.uniform(1)), "costs are for 1 stages, not 2"),
]


@pytest.mark.parametrize(("call", "complaint"), BAD_ARGUMENTS)
def test_bad_arguments_name_the_fix(call, complaint: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below
        call()
    assert complaint in str(caught.value)

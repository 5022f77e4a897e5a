"""The greedy simulation, as literal tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_tspipe.greedy import Policy, greedy_rows
from lightning_tspipe.schedule import Costs, Schedule, validate

FREE = Policy(ahead=(0, 0), in_flight=(4, 4), held=(4, 4))


def rows(policy: Policy, microbatches: int, costs: Costs) -> list[str]:
    made = greedy_rows(policy, microbatches, costs)
    assert made is not None
    loss_over = policy.loss_over
    schedule = Schedule(len(costs.t), microbatches, loss_over, made)
    validate(schedule, max_in_flight=policy.in_flight, max_held=policy.held)
    return [" ".join(map(str, row)) for row in made]


@pytest.mark.parametrize(
    ("change", "microbatches", "table"),
    [
        ({"loss_over": "batch"}, 2, ["F0 F1 T0 T1 B0 B1", "F0 F1 T0 T1 B0 B1"]),
        ({"loss_over": "batch", "ahead": (2, 0)}, 2, ["F0 F1 T0' T1' B0 B1", "T0 T1 F0 F1 B0 B1"]),
        ({"lead": 1}, 3, ["T0 F0 T1 F1 T2 B0 F2 B1 B2", "T0 F0 B0 T1 F1 B1 T2 F2 B2"]),
        ({"lead": 1, "in_flight": (2, 1)}, 3, ["T0 F0 T1 F1 T2 B0 F2 B1 B2", "T0 F0 B0 T1 F1 B1 T2 F2 B2"]),
        ({"lead": 1, "split": True, "in_flight": (2, 1)}, 3, [
            "T0 F0 T1 F1 I0 T2 F2 I1 W0 W1 I2 W2", "T0 F0 I0 T1 F1 I1 T2 F2 I2 W0 W1 W2",
        ]),
        ({"lead": 1, "split": True, "in_flight": (2, 1), "held": (3, 1)}, 3, [
            "T0 F0 T1 F1 I0 T2 F2 W0 I1 W1 I2 W2", "T0 F0 I0 W0 T1 F1 I1 W1 T2 F2 I2 W2",
        ]),
    ],
)  # fmt: skip
def test_rows_table(change: dict[str, object], microbatches: int, table: list[str]) -> None:
    assert rows(replace(FREE, **change), microbatches, Costs.uniform(2)) == table  # type: ignore[arg-type]


def test_teacher_work_fills_the_wait_for_an_exchange() -> None:
    costs = replace(Costs.uniform(2), exchange=2)
    policy = replace(FREE, ahead=(3, 2), loss_over="batch")
    assert rows(policy, 3, costs) == ["F0 F1 F2 T0' T1' T2' B0 B1 B2", "T2 F0 F1 F2 B0 B1 B2 T0' T1'"]


def test_patience_leaves_the_rank_free_for_the_student() -> None:
    costs = Costs.uniform(2, t=3)
    eager, patient = (rows(replace(FREE, ahead=(3, 1), split=True, patience=p), 3, costs)[0] for p in (0.0, 1.0))
    assert eager == "F0 F1 F2 T0' I0 I1 T1' T2' I2 W0 W1 W2"
    assert patient == "F0 F1 F2 I0 T0' T1' I1 T2' I2 W0 W1 W2"


def test_ranks_that_get_stuck_have_no_rows() -> None:
    # all forwards come before the first backward, and the bound does not let them
    assert greedy_rows(replace(FREE, loss_over="batch", in_flight=(1, 1)), 2, Costs.uniform(2)) is None

"""The planner: from layers to costs, from costs to a schedule that has been replayed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from torch import nn

from lightning_tspipe import plan
from lightning_tspipe.orders import make_schedule
from lightning_tspipe.partition import partition
from lightning_tspipe.plan import Planner, estimate_costs
from lightning_tspipe.schedule import Costs, Schedule
from lightning_tspipe.simulate import ReplayError


def network(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(first, second, bias=False) for first, second in pairwise(widths)))


def test_costs_are_shares_of_the_mean_student_stage() -> None:
    parts = partition(network(3, 5, 1), network(3, 13, 3), 2, {"student": [1, 1], "teacher": [1, 1]}, None)
    costs = estimate_costs(parts)
    # one more than the parameters, over the mean of 16 and 6
    assert costs.f == costs.b == costs.w == (16 / 11, 6 / 11)
    assert costs.t == (40 / 11, 40 / 11)


def test_a_stage_without_teacher_layers_costs_nothing() -> None:
    student = network(3, 5, 5)
    parts = partition(student, network(3, 5), 2, "parameters", student[0])  # a momentum teacher of the first layer
    assert [len(layers) for layers in parts.teacher] == [1, 0]
    assert estimate_costs(parts).t[1] == 0


def test_it_plans_each_number_of_microbatches_once() -> None:
    costs = Costs.uniform(3)
    planner = Planner(costs, lookahead=True, loss_over="batch")
    assert planner.microbatches == 6
    assert planner.schedule(5) is planner.schedule(5)
    assert planner.schedule(5) == make_schedule(3, 5, costs)
    assert not any(Planner(costs, lookahead=False, loss_over="batch").schedule(5).ahead)


@pytest.mark.parametrize("post_ahead", [0, 2, 24])
def test_a_schedule_that_would_hang_is_found_before_it_runs(monkeypatch: pytest.MonkeyPatch, post_ahead: int) -> None:
    def reversed_forwards(*args: object, **kwargs: object) -> Schedule:
        made = make_schedule(2, 3, lookahead=False)
        row = made.ranks[1]
        return replace(made, ranks=(made.ranks[0], (*row[3:6][::-1], *row[:3], *row[6:])))

    monkeypatch.setattr(plan, "make_schedule", reversed_forwards)
    with pytest.raises(ReplayError, match="rank 1"):
        Planner(Costs.uniform(2), lookahead=True, loss_over="batch", post_ahead=post_ahead).schedule(3)

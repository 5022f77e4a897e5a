"""The new plan from measured times: what it is made of, when it is taken, and that no number changes with it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tspipe import replan
from lightning_tspipe.plan import Planner
from lightning_tspipe.replan import Replanner, better, measured
from lightning_tspipe.schedule import Costs, Schedule
from lightning_tspipe.simulate import ReplayError
from tests.multiproc import run_fits
from tests.test_numerics import EXACT, LATE, Case, case, compare, references, shuffled
from tests.test_runtime import Notes
from tests.test_simulate import problems

# --- the costs


def test_measured_costs_table() -> None:
    costs = Costs((1, 1), (1, 1), (1, 3), (1, 1), message=0.5, exchange=2, whole=(2, 3))
    whole = [{"T": 5, "F": 6, "B": 8}, {"T": 0, "F": 7, "B": 9}]
    parts = [{"T": 5, "F": 6, "I": 8, "W": 2}, {"T": 0, "F": 7, "I": 6, "W": 2}]
    assert measured(costs, whole) == replace(costs, t=(5, 0), f=(6, 7), b=(4, 9), w=(4, 3), whole=(8, 9))
    assert measured(costs, parts) == replace(costs, t=(5, 0), f=(6, 7), b=(8, 6), w=(2, 2), whole=(10, 6))
    assert measured(replace(costs, whole=()), whole).whole == ()
    nothing = replace(costs, b=(0, 0), w=(0, 0), whole=())
    assert measured(nothing, whole).seconds("B", 1) == 9
    assert measured(nothing, parts).seconds("B", 1) == 8


# --- the decision


def test_a_plan_that_is_no_better_is_not_taken() -> None:
    planner = Planner(Costs.uniform(3), True, "batch")
    assert better(planner, Costs.uniform(3, t=1.01), 6) is None
    assert better(planner, planner.costs, 6) is None


def test_a_better_plan_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, costs = Planner(Costs.uniform(3, t=4), True, "batch", max_held=(6, 6, 6)), Costs.uniform(3)
    assert planner.microbatches == 4
    made = better(planner, costs, 6)
    assert made is not None
    assert made.costs == costs
    assert made.microbatches == 4  # for itself it would take 6
    assert made.schedule(6).ahead != planner.schedule(6).ahead
    with pytest.raises(ValueError, match="the bound forbids"):
        made.find(7)  # bounds are kept

    def refuse(self: Planner, old: Schedule) -> None:
        raise ReplayError(old, 0, 0, None, "the ranks wait for each other")

    monkeypatch.setattr(Planner, "come_after", refuse)
    assert better(planner, costs, 6) is None


@given(problems(), st.data(), st.sampled_from(["afab", "1f1b", "afab-split", "zb"]), st.booleans())
@settings(max_examples=6, deadline=None)
def test_any_plan_can_follow_any_other(
    problem: tuple[int, int, Costs], data: st.DataObject, order: str, lookahead: bool
) -> None:
    """Also one of another order, and one that has less ahead or more."""
    stages, microbatches, costs = problem
    second = Costs(*(tuple(data.draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in range(stages)) for _ in "tfbw"))
    one = Planner(costs, lookahead, "microbatch", order)
    for other in (one.again(second), Planner(second, True, "microbatch", "auto")):
        other.come_after(one.schedule(microbatches))
        one.come_after(other.schedule(microbatches))


# --- fits


def plans(stages: int, lookahead: bool) -> list[Planner]:
    """Of several orders, with much ahead and with little."""
    made = []
    for number, order in enumerate(("zb", "afab", "1f1b", "afab-split")):
        ramp = tuple(1.0 + k * (number % 2) for k in range(stages))
        costs = Costs(((3.0, 0.2, 1.0)[number % 3],) * stages, ramp, ramp, ramp)
        made.append(Planner(costs, lookahead, "microbatch", order))
        made[-1].schedule(4)  # so that the ranks need not search
    return made


@pytest.mark.parametrize(("stages", "base"), [(2, EXACT), (3, LATE)])
def test_no_number_changes_with_the_plan(stages: int, base: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another plan for every step: equal to the reference, and to a run by one plan bit for bit."""
    made = plans(stages, base is LATE)

    class Often:
        def __init__(self, runtime: Any, comm: Any) -> None:
            self._runtime, self._count = runtime, 0

        def before_step(self, microbatches: int, teacher: int | None = None) -> None:
            current = self._runtime.current
            if current is not None and current.microbatches == microbatches:
                planner = made[self._count % len(made)]
                planner.come_after(current)
                self._runtime.follow(planner)
                self._count += 1

    one = case(replace(base, loader=lambda: shuffled(44, 8), epochs=2), microbatches=4, loss_over="microbatch")
    (steady,) = run_fits([one.fit(stages)])
    monkeypatch.setattr("lightning_tspipe.fitting.Replanner", Often)
    told = {"callbacks": [Notes(lambda trainer: trainer.strategy.plan)]}
    (often,) = run_fits([replace(one.fit(stages), trainer=one.fit(stages).trainer | told)])
    compare(often, references(one)[0])
    for ours, theirs in zip(often, steady, strict=True):
        followed = [str(plan) for plan in ours["notes"]]
        assert followed == [str(plan) for plan in often[0]["notes"]]
        assert sum(first != second for first, second in pairwise(followed)) >= 9
        assert all(map(torch.equal, ours["losses"], theirs["losses"]))
        for kind in ("local", "whole"):
            assert all(torch.equal(value, theirs[kind][name]) for name, value in ours[kind].items())
        for grads, others in zip(ours["grads"], theirs["grads"], strict=True):
            assert all(torch.equal(value, others[name]) for name, value in grads.items())


def test_ranks_plan_with_the_times_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, after the first steps."""
    for name, value in (("WARM_UP", 1), ("MEASURED", 2), ("GAIN", 0.0)):
        monkeypatch.setattr(replan, name, value)
    base = replace(LATE, loader=lambda: shuffled(20, 8), epochs=3)
    told = {"callbacks": [Notes(lambda trainer: trainer.strategy.costs)]}
    fit = case(base, microbatches=4).fit(3)
    (ranks,) = run_fits([replace(fit, trainer=fit.trainer | told)])
    notes = ranks[0]["notes"]
    estimated = notes[0]
    assert [costs == estimated for costs in notes] == [True] * 3 + [False] * 6
    assert all(costs == notes[3] for costs in notes[3:])
    assert all(0 < seconds < 1 for seconds in (*notes[3].t, *notes[3].f, *notes[3].b))
    assert all(seen["notes"] == notes for seen in ranks)


def test_it_is_asked_for_once_and_not_before_a_batch_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Replanner, "_plan", lambda self, microbatches, teacher: asked.append(microbatches))
    runtime = SimpleNamespace(current=None, spent={}, ran={})
    replanner = Replanner(runtime, None)  # type: ignore[arg-type]
    for step in range(replan.WARM_UP + replan.MEASURED):
        replanner.before_step(4, 8)
        runtime.current = SimpleNamespace(microbatches=4, teacher_microbatches=8)
        assert not asked, step
    for microbatches, teacher, expected in ((2, 2, []), (4, 4, []), (4, 8, [4]), (4, 8, [4])):
        replanner.before_step(microbatches, teacher)
        assert asked == expected


def test_times_of_the_teachers_own_microbatches_become_those_of_the_students(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(replan, "better", lambda *arguments: found.append(arguments))
    spent, ran = {"T": 4.0, "F": 4.0, "B": 8.0}, {"T": 8, "F": 4, "B": 4}
    runtime = SimpleNamespace(spent=spent, ran=ran, planner=SimpleNamespace(costs=Costs.uniform(1)))
    comm = SimpleNamespace(gather=lambda mine: [mine], share=lambda ranks, source: ranks)
    Replanner(runtime, comm)._plan(4, 8)  # type: ignore[arg-type]
    ((_, costs, *numbers),) = found
    assert (costs.t, costs.f, costs.seconds("B", 0), numbers) == ((1.0,), (1.0,), 2.0, [4, 8])

"""The planner: from layers to costs, from costs to a schedule that has been replayed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_tspipe import plan
from lightning_tspipe.arranging import Arrangement
from lightning_tspipe.clock import clock
from lightning_tspipe.floor import minimal_microbatches
from lightning_tspipe.orders import Found, make_schedule
from lightning_tspipe.partition import partition
from lightning_tspipe.placement import Placement, fits, peaks
from lightning_tspipe.plan import Planner, estimate_costs, fastest_count, most_in_memory
from lightning_tspipe.schedule import LOSSES, Costs, validate
from lightning_tspipe.simulate import ReplayError, replay, timeline
from tests.test_simulate import problems


def network(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(first, second, bias=False) for first, second in pairwise(widths)))


def test_costs_are_shares_of_the_mean_student_stage() -> None:
    parts = partition(network(3, 5, 1), network(3, 13, 3), 2, {"student": [1, 1], "teacher": [1, 1]}, None)
    costs = estimate_costs(parts)
    # one more than the parameters, over the mean of 16 and 6
    assert costs.f == costs.b == costs.w == (16 / 11, 6 / 11)
    assert costs.t == (40 / 11, 40 / 11)
    # a forward more
    assert costs.recomputed() == replace(costs, b=(16 / 11, 12 / 11), w=(32 / 11, 6 / 11))


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
    def reversed_forwards(*args: object, **kwargs: object) -> Found:
        made = make_schedule(2, 3, lookahead=False)
        row = made.ranks[1]
        crossed = replace(made, ranks=(made.ranks[0], (*row[3:6][::-1], *row[:3], *row[6:])))
        return Found(crossed, "afab", 1.0, 1.0, 1.0, 1)

    monkeypatch.setattr(plan, "find_schedule", reversed_forwards)
    with pytest.raises(ReplayError, match="rank 1"):
        Planner(Costs.uniform(2), lookahead=True, loss_over="batch", post_ahead=post_ahead).schedule(3)


@pytest.mark.parametrize("lookahead", [True, False])
def test_the_backward_is_split_only_if_that_is_allowed(lookahead: bool) -> None:
    for loss_over in ("batch", "microbatch"):
        whole = Planner(Costs.uniform(4), lookahead, loss_over)  # type: ignore[arg-type]
        assert whole.microbatches == (9 if lookahead else 8)
        assert {action.kind for row in whole.schedule(7).ranks for action in row} == {"T", "F", "B"}
    split = Planner(Costs.uniform(4), lookahead, "microbatch", split_backward=True)
    assert split.microbatches == (4 if lookahead else 7)
    found = split.find(split.microbatches)
    assert {action.kind for row in found.schedule.ranks for action in row} == {"T", "F", "I", "W"}
    assert found.order == "zb"
    assert found.period == found.bound


@pytest.mark.parametrize(("part", "order", "period"), [(1.0, "zb", 28), (1.1, "zb", 29.4), (1.8, "afab", 37)])
def test_the_backward_is_split_only_if_that_pays(part: float, order: str, period: float) -> None:
    """Where the two parts take more than the whole."""
    costs = replace(Costs.uniform(4), b=(part,) * 4, w=(part,) * 4, whole=(2.0,) * 4)
    found = Planner(costs, False, "microbatch", split_backward=True).find(7)
    assert found.order == order
    assert found.period == pytest.approx(period)
    assert timeline(found.schedule, costs).lower_bound == found.bound == 28


def test_the_number_of_microbatches_is_for_the_backward_that_is_faster() -> None:
    for part, fewest in ((1.0, 4), (1.2, 9)):  # 4.4 in place of 4: with 9 microbatches the whole one has no bubble
        costs = replace(Costs.uniform(4), b=(part,) * 4, w=(part,) * 4, whole=(2.0,) * 4)
        planner = Planner(costs, True, "microbatch", split_backward=True)
        assert planner.microbatches == fewest
        assert planner.find(fewest).order == ("zb" if part == 1 else "afab")
    for most, number in ((9, 9), (7, 6)):  # a whole one, which costs a tenth less, needs 9
        costs = replace(Costs.uniform(4, b=0.95, w=1.25), whole=(2.0,) * 4)
        tight = Planner(costs, True, "batch", split_backward=True, max_held=(most,) * 4)
        assert tight.microbatches == number


def test_a_split_backward_has_a_bound_of_its_own() -> None:
    """A microbatch takes 10 bytes, and 30 between the two parts of its backward."""
    ones = (1.0,) * 3
    names = ("0",), ("1",), ("2",)
    placement = Placement(names, names, ones, ones, ones, ones, first=ones, rest=ones, weights=(0.0,) * 3,
                          held=(10.0,) * 3, pending=(30.0,) * 3)  # fmt: skip

    def planner(limit: float, schedule: str = "auto", loss_over: str = "microbatch") -> Planner:
        arrangement: Any = object.__new__(Arrangement)
        vars(arrangement).update(
            _limit=limit, _schedule=schedule, _recompute=False, _microbatches=6, placement=placement,
            _module=SimpleNamespace(momentum=0.9, teacher_delay=0, delay_from_step=1, loss_over=loss_over),
            _trainer=SimpleNamespace(gradient_clip_val=None, precision_plugin=None, accumulate_grad_batches=1),
        )  # fmt: skip
        return Arrangement.planner(arrangement, None, 2, None)

    assert planner(inf).find(6).order == "zb"
    for limit in (200, 100, 60):
        held = timeline(planner(limit, "zb").schedule(6), Costs(ones, ones, ones, ones)).held
        assert max(held) <= limit // 30
    assert planner(25).find(6).order in ("afab", "1f1b")  # one microbatch until I, but none until W
    assert planner(60, loss_over="batch").find(6).order == "afab"  # all at once
    with pytest.raises(ValueError, match="A microbatch takes 30 bytes on rank 0, more than the 25"):
        planner(25, "zb")


@pytest.mark.parametrize(("fixed", "count"), [(0.0, 9), (3.0, 4)])
def test_fewer_and_larger_microbatches_where_each_has_a_fixed_cost(fixed: float, count: int) -> None:
    """A pass takes a microbatch's share of 9 seconds, and something besides; the step is nearly the shortest."""

    def of(count: int) -> Planner:
        return Planner(Costs.uniform(4, *[9 / count + fixed] * 4), True, "batch")

    found = fastest_count(4, 9, of, 32)
    assert found == count
    shortest = min(of(other).search(other, other).period for other in (3, 4, 6, 9))
    assert of(found).search(found, found).period <= 1.05 * shortest


def test_the_number_of_microbatches_keeps_the_memory_and_the_rows() -> None:
    def of(count: int) -> Planner:
        return Planner(Costs.uniform(4, *[9 / count + 3] * 4), True, "microbatch", max_held=(count // 2,) * 4)

    assert fastest_count(4, 9, of, 32) == 8  # with 6 it is not 1 % shorter; a batch in one piece does not fit
    assert fastest_count(4, 1000, lambda count: Planner(Costs.uniform(4), True, "batch"), 5) <= 5


def test_the_fixed_part_of_a_pass_is_what_is_left_without_rows() -> None:
    names = ("0",), ("1",)
    large = Placement(names, names, *[(3.0, 8.0)] * 4, first=(3.0, 8.0), rest=(3.0, 8.0), rows=8, held=(16.0, 8.0),
                      messages=(8.0, 8.0), message=8.0)  # fmt: skip
    small = replace(large, **dict.fromkeys(("t", "f", "b", "w", "first", "rest"), (1.5, 9.0)), rows=2)
    line = large.with_fixed(small)
    assert line.fixed == ((1.0, 8.0),) * 6  # 1 and a quarter per row; 8, since more rows do not take less
    other = line.of_rows(4)
    assert (other.t, other.rest, other.rows, other.held, other.message) == ((2.0, 8.0), (2.0, 8.0), 4, (8.0, 4.0), 4.0)
    assert other.fixed == line.fixed
    assert other.of_rows(8) == line
    assert large.of_rows(4).f == (1.5, 4.0)
    assert Placement.parse(line.text()) == line
    costs = other.costs
    assert costs is not None
    assert costs.per_action(4, 8).t == (1.5, 8.0)  # two halves of four rows do not take two halves of the time
    assert costs.per_action(4, 8).per_action(8, 4).t == costs.t


def test_where_lookahead_is_enough_the_simple_order_is_kept() -> None:
    for loss_over in ("batch", "microbatch"):
        for split in (False, True):
            planner = Planner(Costs.uniform(3), True, loss_over, split_backward=split)  # type: ignore[arg-type]
            assert planner.find(7).order == "afab"


def test_receives_are_posted_early_enough_for_the_schedule() -> None:
    bound = (4, 3, 2, 1)
    planner = Planner(Costs.uniform(4), True, "microbatch", max_in_flight=bound)
    assert planner.post_ahead == 2
    schedule = planner.schedule(12)
    assert planner.post_ahead > 2
    replay(schedule, post_ahead=planner.post_ahead)
    with pytest.raises(ReplayError):
        replay(schedule, post_ahead=2)
    validate(schedule, max_in_flight=bound)


def test_clipping_makes_ranks_wait_and_the_teacher_fills_that() -> None:
    costs = Costs.uniform(4, message=0.01)
    planner = Planner(costs, True, "batch", clipping=True)
    assert planner.costs == replace(costs, exchange=0.06)
    found = planner.find(12)
    assert found.period / found.bound < 1.02
    # without teacher work behind the last backward, the ranks wait for rank 0 there
    blind = make_schedule(4, 12, costs)
    assert timeline(blind, planner.costs).period > 1.08 * found.period


def test_within_an_accumulation_window_an_exact_teacher_runs_ahead() -> None:
    """Its version is the same for all batches of an optimizer step, so its work fills bubbles there."""
    costs = Costs.uniform(4)
    share = {}
    for accumulation in (1, 2, 4, 16):
        found = Planner(costs, False, "batch", accumulation=accumulation).find(9)
        assert any(found.schedule.ahead) == (accumulation > 1)
        share[accumulation] = found.bound / found.period
    assert share[1] == pytest.approx(0.8)
    assert share[1] + 0.07 < share[2] < share[4] < share[16]
    assert share[16] > 0.95
    # bubble-free without: nothing is done ahead
    assert not any(Planner(costs, False, "microbatch", "zb", accumulation=4).schedule(8).ahead)


@given(problems(), st.integers(2, 5), st.sampled_from([None, 0.0, 2.0]), st.booleans(), st.data())
@settings(max_examples=30, deadline=None)
def test_a_plan_for_several_batches_per_step(
    problem: tuple[int, int, Costs], accumulation: int, exchange: float | None, lookahead: bool, data: st.DataObject
) -> None:
    """What is said of the mean batch is so in a long run, and it is no worse than as planned without accumulation."""
    _, microbatches, costs = problem
    costs = replace(costs, exchange=exchange, optimizer=data.draw(st.sampled_from([0.0, 1.0])))
    split, loss_over = data.draw(st.booleans()), data.draw(st.sampled_from(LOSSES))
    planner = Planner(costs, lookahead, loss_over, split_backward=split, accumulation=accumulation)
    found = planner.find(microbatches)
    ends = clock(found.schedule, costs, steps=8 * accumulation, window=accumulation, exact=not lookahead).step_ends
    ends = [rank[accumulation - 1 :: accumulation] for rank in ends]
    mean = max(rank[6] - rank[2] for rank in ends) / 4 / accumulation
    assert found.period == pytest.approx(mean, rel=0.01)
    assert found.bound <= mean * (1 + 1e-9)
    plain = Planner(costs, lookahead, loss_over, split_backward=split).schedule(microbatches)
    assert found.period <= planner.seconds(plain) * (1 + 1e-9)


@pytest.mark.parametrize("stages", [2, 4])
def test_fewer_microbatches_of_the_teacher_where_each_takes_a_fixed_time(stages: int) -> None:
    costs = replace(Costs.uniform(stages, t=3), t_fixed=(1.5,) * stages)
    planner = Planner(costs, True, "batch")
    assert planner.teacher_microbatches(12) < 12
    best = planner.find(12, planner.teacher_microbatches(12))
    assert best.period == clock(best.schedule, costs).period < 0.95 * planner.find(12).period
    # its work is what its forwards take: so many fixed times, and of the rest as much as before
    assert best.bound == pytest.approx(12 * (1.5 + 3) + 1.5 * best.schedule.teacher_microbatches)
    assert best.bound <= best.period
    assert timeline(best.schedule, costs).utilization == pytest.approx(best.bound / best.period)
    for count in (1, 2, 3, 4, 6):  # none of the others is much better
        assert planner.find(12, count).period > 0.97 * best.period
    assert planner.teacher_microbatches(12, fits=lambda made: made.teacher_microbatches >= 6) == 6
    assert planner.teacher_microbatches(12, fits=lambda _: False) == 12
    assert Planner(replace(costs, t_fixed=()), True, "batch").teacher_microbatches(12) >= 12


def test_larger_microbatches_of_the_teacher_need_room() -> None:
    ones = (1.0,) * 2
    names = ("0",), ("1",)
    sizes = Placement(names, names, ones, ones, ones, ones, weights=(100.0, 50.0), held=(10.0, 20.0),
                      teacher_held=(7.0, 30.0))  # fmt: skip
    schedule = make_schedule(2, 4, order="afab", teacher_microbatches=2)
    assert peaks(sizes, schedule) == [140, 130]
    assert fits(sizes, schedule, 190)  # 130 + 2 * 30
    assert not fits(sizes, schedule, 189)
    assert fits(sizes, make_schedule(2, 4, order="afab"), 0)  # no larger ones
    assert not fits(replace(sizes, teacher_held=()), schedule, 1000)  # nobody knows
    assert fits(replace(sizes, teacher_held=()), schedule, inf)
    assert sizes.teacher_held == replace(sizes, rows=2).of_rows(1).of_rows(2).teacher_held == (7, 30)


def test_what_fits_in_memory() -> None:
    assert most_in_memory((100, 250), (25, 100)) == (4, 2)
    assert most_in_memory((100, 250), (25, 0))[1] > 1e9
    with pytest.raises(ValueError, match=r"A microbatch takes 101 bytes on rank 0, more than the 100 that it may: cut"):
        most_in_memory((100, 250), (101, 100))


def test_the_fewest_microbatches_that_fill_the_bubbles() -> None:
    assert Planner(Costs.uniform(4), True, "batch").microbatches == 9
    # a hop of 2.9 + 2 wants two teacher forwards of 2.9
    assert Planner(Costs.uniform(4, t=2.9), True, "batch").microbatches == 6


@pytest.mark.parametrize(
    ("stages", "seconds", "least"),
    [
        (16, (3.8, 2.7, 2.7, 1.35), 0.98),
        (14, (3.7, 2.1, 3.4, 1.6), 0.98),
        (12, (0.275, 3.55, 0.391, 3.32), 0.98),
        (12, (1.26, 2.23, 1.84, 2.02), 0.98),
        (14, (0.48, 3.97, 1.33, 3.59), 0.98),
        (14, (0.62, 1.95, 1.47, 1.12), 0.98),
        (16, (1.82, 2.44, 3.57, 1.01), 0.97),
    ],
    ids=["a long teacher's forward", "another one", "long W", "W in the way", "more", "still more", "falls short"],
)
def test_near_the_bound_on_many_stages(stages: int, seconds: tuple[float, ...], least: float) -> None:
    """With the teacher's microbatches that "auto" takes; with the student's own the first two are 3 % off.

    The next but the last need a student's timetable without a W in the way of the gradients, else they are 3 % off.
    """
    costs = Costs(*((each,) * stages for each in seconds), message=0.05)
    planner = Planner(costs, True, "microbatch", split_backward=True)
    count = minimal_microbatches(stages, costs, split=True, loss_over="microbatch") + 2
    found = planner.search(count, planner.teacher_microbatches(count))
    assert found.period <= found.bound / least


def test_the_teacher_has_microbatches_of_its_own_where_that_pays() -> None:
    def chosen(stages: int, t: float, microbatches: int, most: float = inf, **options: Any) -> int:
        planner = Planner(Costs.uniform(stages, t=t), True, "batch", **options)
        return planner.teacher_microbatches(microbatches, most)

    assert chosen(4, 3, 4) == 16  # 0.87 of the bound with as many as the student, 0.98 with twice as many
    assert chosen(4, 3, 4, split_backward=True) == 8  # which are enough
    assert chosen(4, 3, 4, most=15) == 8  # a batch has no more rows
    assert chosen(4, 3, 4, most=7) == 4
    assert chosen(4, 3, 6) == 6  # which has no bubble
    assert chosen(4, 1, 4) == 4  # the teacher is not the coarse one
    planner = Planner(Costs.uniform(4, t=3), True, "batch")
    assert planner.schedule(4, 8) is planner.schedule(4, 8)
    assert planner.schedule(4, 8) == make_schedule(4, 4, planner.costs, teacher_microbatches=8)
    assert planner.schedule(4, 4) is planner.schedule(4)

"""What rivals take in the simulation, by hand for small cases, and what the verdict says and why."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lightning_tspipe import rivals
from lightning_tspipe.clock import clock
from lightning_tspipe.plain import plain_rows
from lightning_tspipe.prospects import GB, Machine, Pair, prospects, report, trains, verdict
from lightning_tspipe.rivals import Stages, fused, halves, period, periods
from lightning_tspipe.schedule import Costs, Schedule

MS = 1e-3


def on(costs: Costs) -> Stages:
    return Stages(tuple(range(len(costs.t))), costs)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 2), (2, 3), (4, 12), (8, 24)])
def test_bubbles_are_those_of_the_papers(stages: int, microbatches: int) -> None:
    """Unit costs: a fused GPipe or 1F1B has (P-1)(t+f+b+w) of bubbles, with a pass before it t less per hop."""
    found = periods(Costs.uniform(stages), microbatches)
    work, hops = 4 * microbatches, stages - 1
    assert found["serial model parallelism"] == work * stages
    assert found["GPipe, teacher fused"] == found["1F1B, teacher fused"] == pytest.approx(work + 4 * hops)
    assert found["GPipe, teacher first"] == found["1F1B, teacher first"] == pytest.approx(work + 3 * hops)
    assert found["passes streamed"] == pytest.approx(microbatches * (4 + 3 * hops))
    assert found["ZB1P, teacher fused"] == pytest.approx(work + 2 * hops)  # (P-1)(f + b - w), f with the teacher in it
    if stages > 1 and microbatches % stages == 0:
        assert found["interleaved 1F1B, teacher fused"] == pytest.approx(work + 4 * hops / 2)
    if stages > 1:
        assert work <= found["ZBV, teacher fused"] <= found["ZB1P, teacher fused"]


def test_a_whole_backward_may_take_less_than_its_parts() -> None:
    ones = (1.0, 1.0)
    plain, cheap = Costs(ones, ones, ones, ones), Costs(ones, ones, ones, ones, whole=(1.5, 1.5))
    assert periods(Costs(ones, ones, ones, ones, whole=(2.0, 2.0)), 4) == periods(plain, 4)
    before, after = periods(plain, 4), periods(cheap, 4)
    parts = {"ZB1P, teacher fused", "ZBV, teacher fused"}
    assert {name for name in before if after[name] == before[name]} == parts
    assert all(after[name] < before[name] for name in before.keys() - parts)


@pytest.mark.parametrize(("name", "order"), [("1F1B", "1f1b"), ("ZB1P", "zb")])
def test_uneven_costs_and_messages_count_as_in_the_clock(name: str, order: str) -> None:
    """The same orders of the student alone, timed by the simulation of this package's own schedules."""
    costs = Costs((0, 0, 0), (1, 2, 1.5), (2, 1, 1), (0.5, 1, 2), 0.25)
    rows = rivals.of_student(order, 3, 6)
    same = Schedule(3, 6, "microbatch", plain_rows(order, 3, 6)[0])
    assert period(rows, on(costs)) == pytest.approx(clock(same, costs).period)
    assert periods(costs, 6)[f"{name}, teacher fused"] == period(rows, on(costs))


def test_zbv_of_equal_costs_has_no_bubbles_between_two_ranks_and_few_between_more() -> None:
    """The teacher left out, as in its paper."""
    for stages, microbatches, least in ((2, 6, 1.0), (4, 16, 0.97), (8, 24, 0.94)):
        costs = Costs.uniform(stages, t=0)
        assert 3 * microbatches / periods(costs, microbatches)["ZBV, teacher fused"] >= least - 1e-9


def test_halves_have_the_work_of_the_whole() -> None:
    costs = fused(Costs((1, 2), (3, 4), (5, 6), (7, 8)))
    assert costs.f == (4, 6)
    both = halves(costs, [0, 1, 1, 0])
    assert both.costs.f == (2, 3, 3, 2)
    assert both.costs.w == (3.5, 4, 4, 3.5)


def pair(stages: int = 4, **options: object) -> Pair:
    """Costs of a millisecond, and a student of 0.1 GB that learns from 1 GB; each microbatch takes 0.1 GB per stage."""
    known = {"student": 0.1 * GB, "teacher": GB, "weights": (0.35 * GB,) * stages, "held": (0.1 * GB,) * stages}
    return Pair(**({"costs": Costs.uniform(stages, *[MS] * 4)} | known | options))  # type: ignore[arg-type]


def said(pair: Pair, microbatches: int, machine: Machine) -> str:
    return " ".join(verdict(pair, microbatches, machine, prospects(pair, microbatches, machine)))


def of(name: str, pair: Pair, machine: Machine) -> float:
    return next(one.seconds for one in prospects(pair, 12, machine) if one.name == name) / MS


def test_data_parallelism_follows_from_the_bandwidth() -> None:
    """12 microbatches are 48 ms of work per rank, half of it backward; 3/4 of the bytes cross, and twice for DDP."""
    assert of("DDP", pair(), Machine(10 * GB)) == pytest.approx(48)  # 15 ms, behind the backward
    assert of("DDP", pair(), Machine(1 * GB)) == pytest.approx(24 + 150)
    assert of("FSDP", pair(), Machine(100 * GB)) == pytest.approx(48)
    assert of("FSDP", pair(), Machine(1 * GB)) == pytest.approx(0.75 * (3 * 100 + 1000))


def test_each_rival_has_its_own_best_number_of_microbatches_too() -> None:
    """1F1B has 4 + 3 x 4 ms of 12 x 4; with 64 microbatches the same bubbles, of which 12/64 count."""
    assert of("1F1B, teacher fused", pair(), Machine()) == pytest.approx(48 + 12)
    assert of("1F1B, teacher fused, M=64", pair(), Machine()) == pytest.approx(48 + 12 * 12 / 64)
    names = [one.name for one in prospects(pair(), 12, Machine(None, 4 * GB)) if one.larger]
    assert "GPipe, teacher fused, M=32" in names  # 0.35 GB and 0.1 GB for each microbatch
    assert "1F1B, teacher fused, M=64" in names  # 4 at a time
    assert not [name for name in names if name.startswith(("serial", "passes"))]
    assert not [one for one in prospects(pair(1), 12, Machine()) if one.larger]  # nothing to gain
    some = {one.name for one in prospects(pair(3), 10, Machine())}
    assert "interleaved 1F1B, teacher fused" not in some  # 10 is no multiple of 3
    assert "interleaved 1F1B, teacher fused, M=63" in some


def test_a_larger_batch_of_a_rival_is_no_choice() -> None:
    """With few microbatches and an exact teacher ours has bubbles; theirs would have few with 64."""
    mine = pair(lookahead=False, loss_over="microbatch")
    found = prospects(mine, 4, Machine(GB / 1e3, 80 * GB))
    ours = min(one.seconds for one in found if one.ours)
    assert any(one.larger and one.seconds < 0.99 * ours for one in found)
    assert verdict(mine, 4, Machine(GB / 1e3, 80 * GB), found) == verdict(
        mine, 4, Machine(GB / 1e3, 80 * GB), [one for one in found if not one.larger]
    )


def test_it_says_that_the_pipeline_is_the_better_choice() -> None:
    text = said(pair(), 12, Machine(GB))
    assert text.startswith('The pipeline is the better choice: tspipe, schedule="afab" with 48.00 ms per step.')


def test_it_says_that_it_is_not() -> None:
    fast = Machine(100 * GB, 80 * GB)
    equal = said(pair(), 12, fast)
    assert equal.startswith("The pipeline is NOT clearly the better choice: DDP is within 1 %")
    few = said(pair(costs=Costs.uniform(4, *[MS] * 3, MS)), 4, fast)
    assert few.startswith("The pipeline is NOT the better choice: DDP takes 16.00 ms, the best order is tspipe")
    assert "microbatches are too few to fill them, 6 are needed" in few
    uneven = pair(costs=Costs((MS, 2 * MS, MS, MS), *[(MS,) * 4] * 3))
    assert "Stage 1 has 18% more work than the mean" in said(uneven, 12, fast)
    exact = pair(lookahead=False)
    assert "there is no work that may fill them" in said(exact, 12, fast)
    short = pair(costs=Costs.uniform(4, *[MS / 10] * 4))
    assert said(short, 12, Machine(GB)).startswith(
        "The pipeline is NOT the better choice: an action takes 0.13 ms on average, and Python adds"
    )


def test_memory_rules_out_what_does_not_fit() -> None:
    """DDP takes 1.4 GB of weights and 1.2 GB of activations; the pipeline 0.35 and up to 1.2."""
    text = said(pair(), 12, Machine(100 * GB, 2 * GB))
    assert "DDP does not fit: it takes 2.60 GB per rank, of 2.00." in text
    assert said(pair(), 12, Machine(1 * GB, 2 * GB)).startswith("The pipeline is the better choice")
    none = said(pair(), 12, Machine(1 * GB, 1 * GB))
    assert none == (
        "The pipeline is NOT the better choice: none of its orders fits into memory; nothing else does either."
    )
    for loss_over in ("microbatch", "student_microbatch"):
        lean = said(pair(loss_over=loss_over), 12, Machine(1 * GB, 1.2 * GB))  # afab would take 1.55
        assert 'The pipeline is the better choice: tspipe, schedule="1f1b"' in lean


def test_who_trains_a_loss_that_sees_all_that_the_teacher_gave() -> None:
    """We do, and a pass of the teacher before the student's; not a teacher that is fused into the stages."""
    both = [pair(loss_over=loss_over, lookahead=False) for loss_over in ("microbatch", "student_microbatch")]
    each, seeing = (prospects(mine, 12, Machine()) for mine in both)
    cannot = {one.name for one in seeing if not one.any_loss and not trains(both[1], one)}
    assert cannot == {one.name for one in each if "fused" in one.name}
    assert all(trains(both[0], one) for one in each)
    zb = [next(one.seconds for one in found if one.name == 'tspipe, schedule="zb"') for found in (each, seeing)]
    assert zb[0] < zb[1]  # an exact teacher's forwards all come before the first backward


def test_orders_keep_the_memory_that_there_is() -> None:
    """1F1B holds more than P-k microbatches where that is faster, and fewer where they do not fit."""
    by_name = lambda memory: {  # noqa: E731
        one.name: one for one in prospects(pair(loss_over="microbatch"), 12, Machine(GB, memory))
    }
    for name in ('tspipe, schedule="1f1b"', 'tspipe, schedule="zb"'):
        free, bound = by_name(None)[name], by_name(0.85 * GB)[name]
        assert free.peak is not None
        assert bound.peak is not None
        assert bound.peak <= 0.85 * GB < free.peak
        assert bound.seconds >= free.seconds


def test_a_split_backward_keeps_what_its_second_part_needs() -> None:
    """Of one microbatch on two stages: 0.1 GB until I, and then less or more; with recomputation 0.01 until I."""

    def peak(order: str, **sizes: float) -> float | None:
        mine = pair(2, loss_over="microbatch", **{name: (size * GB,) * 2 for name, size in sizes.items()})
        name = f'tspipe, schedule="{order}"'
        return next(one.peak for one in prospects(mine, 1, Machine()) if one.name == name)

    for order, extra in (("afab-split", 0.1), ("zb", 0.1), ("afab", 0.1)):
        assert peak(order, pending=0.05) == pytest.approx((0.35 + extra) * GB)
    assert peak("zb", pending=0.3) == pytest.approx((0.35 + 0.3) * GB)
    assert peak("1f1b", pending=0.3) == pytest.approx((0.35 + 0.1) * GB)
    assert peak("zb", pending=0.05, passed=0.01) == pytest.approx((0.35 + 0.1 + 0.01) * GB)
    assert peak("zb", pending=0.3, passed=0.01) == pytest.approx((0.35 + 0.3) * GB)


@pytest.mark.parametrize("late", [0.05, 0.1, 0.2])
def test_a_split_order_keeps_the_memory_that_there_is(late: float) -> None:
    """Also where W needs more than the whole microbatch did."""
    mine = pair(loss_over="microbatch", pending=(late * GB,) * 4)
    bound = 0.35 + 5 * max(late, 0.1)
    found = {one.name: one for one in prospects(mine, 12, Machine(GB, bound * GB))}
    peak = found['tspipe, schedule="zb"'].peak
    assert peak is not None
    assert peak <= (bound + 1e-9) * GB
    free = {one.name: one for one in prospects(mine, 12, Machine(GB))}['tspipe, schedule="zb"'].peak
    assert free is not None
    assert free > bound * GB or late < 0.1


def test_recomputation_keeps_little_and_one_microbatch_whole() -> None:
    """0.01 GB per microbatch and stage, and 0.1 once; a split backward keeps all until its second half."""
    lean = {one.name: one.peak for one in prospects(pair(passed=(0.01 * GB,) * 4), 12, Machine())}
    assert lean['tspipe, schedule="afab"'] == pytest.approx((0.35 + 0.1 + 12 * 0.01) * GB)
    assert lean['tspipe, schedule="afab-split"'] == pytest.approx((0.35 + 12 * 0.1 + 0.01) * GB)
    assert lean["DDP"] == pytest.approx((1.4 + (4 * 0.01 + 0.1) * 3) * GB)


def test_each_order_has_as_many_of_the_teachers_microbatches_as_a_run_would_have() -> None:
    """With t = 3f and no more microbatches than stages a full backward is faster with smaller ones of the teacher."""
    slow = pair(4, costs=Costs.uniform(4, 3 * MS, MS, MS, MS), loss_over="microbatch")
    ours = {
        count: {one.name: one for one in prospects(replace(slow, teacher_microbatches=count), 4, Machine()) if one.ours}
        for count in ("auto", None, 2)
    }
    name = 'tspipe, schedule="1f1b"'
    assert ours["auto"][name].teacher in (8, 16)
    assert ours["auto"][name].seconds < 0.99 * ours[None][name].seconds
    for count, expected in ((None, 4), (2, 2)):
        assert {one.teacher for one in ours[count].values()} == {expected}
    few = prospects(replace(slow, teacher_microbatches="auto", rows=4), 4, Machine())
    assert {one.teacher for one in few if one.ours} == {4}  # there are no more rows
    assert re.search(
        r'^tspipe, schedule="1f1b" +\| per microbatch \| 4 ', report(slow, 4, Machine(), few), re.MULTILINE
    )
    with pytest.raises(ValueError, match="teacher_microbatches is 3 for 4 microbatches: give a multiple or a divisor"):
        prospects(replace(slow, teacher_microbatches=3), 4, Machine())


def test_what_is_not_known_is_said() -> None:
    text = said(pair(weights=(), held=()), 12, Machine())
    assert text.startswith(
        'The best pipeline is tspipe, schedule="afab" with 48.00 ms. Whether it is the better choice'
    )
    assert "DDP is as fast or faster if a rank sends 6.25 GB/s or more; whether it fits into memory is not" in text
    assert of("DDP", pair(), Machine(6.25 * GB)) == pytest.approx(48)
    blind = said(pair(student=0.0, weights=(), held=()), 12, Machine())
    assert "DDP is as fast or faster if its messages can be hidden" in blind


def test_the_table_marks_bounds_and_what_no_loss_over_the_batch_can_have() -> None:
    for loss_over in ("batch", "microbatch"):
        mine = pair(loss_over=loss_over)
        text = report(mine, 12, Machine(None, 2 * GB), prospects(mine, 12, Machine(None, 2 * GB)))
        rows = {
            line.split(" | ")[0].strip(): [cell.strip() for cell in line.split(" | ")] for line in text.splitlines()
        }
        assert rows["DDP"][1:] == ["any", "", ">= 48.00", "<= 1.000", ">= 1.00", "2.6", "NO"]
        assert rows["1F1B, teacher fused"][1:] == ["per microbatch", "", "60.00", "0.800", "1.25", "0.75", "yes"]
        assert "ZBV is a greedy order" in text

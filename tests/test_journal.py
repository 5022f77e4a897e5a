"""Bubbles have causes, shares add up, and a planned journal says what the simulation says."""

from __future__ import annotations

import pytest

from lightning_tspipe.journal import CAUSES, Entry, Journal, planned
from lightning_tspipe.orders import make_schedule
from lightning_tspipe.schedule import Costs
from lightning_tspipe.simulate import timeline

UNIT = Costs.uniform(3)


def test_every_bubble_has_its_cause() -> None:
    """Rank 0 works from 0 to 6, and from 20 on; rank 1 waits for it, and for the next batch."""
    journal = Journal.of(
        [
            [
                (0, "T", 1, 0, True, 100.0, 100.0, 102.0),
                (0, "F", 0, 0, False, 102.5, 102.5, 106.0),
                (0, "load", 1, 0, True, 106.0, 106.0, 107.0),
                (0, "B", 0, 0, False, 107.0, 115.0, 118.0),
                (1, "F", 1, 0, False, 120.0, 120.0, 121.0),
            ],
            [
                (0, "F", 0, 0, False, 100.0, 106.5, 109.0),
                (0, "load", 1, 0, True, 109.0, 109.0, 110.0),
                (0, "I", 0, 0, False, 110.0, 110.0, 114.0),
            ],
        ]
    )
    (first, second) = (list(journal.bubbles(rank)) for rank in (0, 1))
    assert [(b.kind, b.begin, b.end) for b in first] == [
        ("runtime", 2.0, 2.5), ("load", 6.0, 7.0), ("B", 7.0, 15.0), ("between steps", 18.0, 20.0),
    ]  # fmt: skip
    assert [(b.kind, b.begin, b.end) for b in second] == [("F", 0.0, 6.5), ("load", 9.0, 10.0)]
    assert first[2].cause == "waits for I0 of rank 1: 7000.00 ms until it is done, 1000.00 ms for the message"
    assert first[2].source == (1, journal.ranks[1][2])
    assert second[0].cause == "waits for F0 of rank 0: 6000.00 ms until it is done, 500.00 ms for the message"
    assert (first[1].cause, second[1].cause) == (
        "the next batch is loaded",
        "waits for rank 0 to announce the next batch",
    )
    assert [entry.name for entry in journal.ranks[0]] == ["T0'", "F0", "load", "B0", "F0"]


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_plan_has_the_times_of_its_timeline(lookahead: bool) -> None:
    schedule = make_schedule(3, 6, UNIT, lookahead=lookahead)
    journal, times = planned(schedule, UNIT, 6), timeline(schedule, UNIT)
    first, last = journal.steady()
    assert (journal.steps, first, last) == (6, 2, 5)
    assert journal.step_seconds(first, last) == pytest.approx(times.period)
    assert (
        journal.utilization(first, last) == pytest.approx(times.utilization) == pytest.approx(1 if lookahead else 0.8)
    )
    assert [[(e.start, e.end) for e in row] for row in journal.ranks] == [
        [(s.start, s.end) for s in row] for row in times.spans
    ]
    for rank, shares in enumerate(journal.shares(first, last)):
        assert sum(shares.values()) == pytest.approx(1)
        assert list(shares) == ["work", *CAUSES]
        waits = [b for b in journal.bubbles(rank) if first <= b.step < last]
        assert bool(waits) == (not lookahead)
        assert all(bubble.source is not None and bubble.source[1].end == bubble.end for bubble in waits)
    assert journal.costs() == Costs((1,) * 3, (1,) * 3, (2,) * 3)


def test_the_split_backward_has_costs_of_its_own() -> None:
    costs = Costs((1, 2), (3, 4), (5, 6), (7, 8))
    schedule = make_schedule(2, 4, costs, loss_over="microbatch", order="zb")
    assert planned(schedule, costs, 4).costs() == costs


def test_the_summary_is_a_table() -> None:
    text = planned(make_schedule(2, 3, Costs.uniform(2), lookahead=False), Costs.uniform(2), 6).summary()
    lines = text.splitlines()
    assert lines[0] == "step 15000.00 ms, utilization 0.800"
    assert [cell.strip() for cell in lines[1].split("|")] == [
        "rank", "work", "waits for T", "waits for F", "waits for B", "load", "between steps", "runtime",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[3].split("|")] == ["0", "80.0%", "0.0%", "0.0%", "20.0%", *["0.0%"] * 3]


def test_a_short_run_has_no_steady_steps() -> None:
    row = tuple(Entry(step, "F", step, 0, False, 2.0 * step, 2.0 * step, 2.0 * step + 1) for step in range(3))
    journal = Journal((row,))
    assert journal.steady() == (0, 3)
    assert journal.step_seconds(0, 3) == pytest.approx(5 / 3)
    assert journal.utilization(1, 2) == 0.5

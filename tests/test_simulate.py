"""Replay and timeline: what is promised of the schedules, and that broken ones are found."""

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tspipe import simulate
from lightning_tspipe.orders import make_schedule
from lightning_tspipe.schedule import Action, Costs, Op, Schedule, ScheduleError, lower, validate
from lightning_tspipe.simulate import Replay, ReplayError, draw, replay, timeline
from tests.test_schedule import HAND_WRITTEN

DOCS = Path(__file__).parent.parent / "docs" / "schedule.md"

# Valid by every rule of a row and of an edge, yet rank 0 wants B0 before it makes what rank 1 wants before B0.
CROSSED = Schedule.parse("""
    stages=2 microbatches=2 loss_over=batch
    rank 0: T1 F0 F1 B0 T0' B1
    rank 1: T1 F0 F1 T0' B0 B1
""")
# Runs only if F0 can be posted before T0 and T1 have run on rank 1, or need not be.
LATE_POST = Schedule.parse("""
    stages=2 microbatches=2 loss_over=batch
    rank 0: F0 T0 T1 F1 B0 B1
    rank 1: T0 T1 F0 F1 B0 B1
""")

seconds = st.floats(0.25, 4.0)


@st.composite
def problems(draw_from: st.DrawFn, balanced: bool = False) -> tuple[int, int, Costs]:
    """Stages, microbatches and random costs, the same for every stage if `balanced`."""
    stages, microbatches = draw_from(st.integers(1, 5)), draw_from(st.integers(1, 8))
    columns = [
        (draw_from(seconds),) * stages if balanced else tuple(draw_from(seconds) for _ in range(stages)) for _ in "tfbw"
    ]
    message, optimizer = draw_from(st.sampled_from([0.0, 0.05, 0.5])), draw_from(st.sampled_from([0.0, 1.0]))
    return stages, microbatches, Costs(*columns, message=message, optimizer=optimizer)


def plain(stages: int, microbatches: int) -> Schedule:
    """The teacher entirely before the student."""
    return make_schedule(stages, microbatches, lookahead=False)


# --- replay


def test_replay_counts_table() -> None:
    assert replay(make_schedule(1, 2)) == Replay({}, {}, (2,))
    assert replay(make_schedule(2, 3), steps=5) == Replay(
        messages={(0, 1, "T"): 15, (0, 1, "F"): 15, (1, 0, "B"): 15}, held={(0, 1, "T"): 3}, in_flight=(3, 3)
    )
    assert replay(plain(3, 2), steps=1, rendezvous=True).messages == {
        (0, 1, "T"): 2, (1, 2, "T"): 2, (0, 1, "F"): 2, (1, 2, "F"): 2, (1, 0, "B"): 2, (2, 1, "B"): 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "in_flight"), [("1F1B", (2, 1)), ("split backward", (3, 3)), ("split below, full above", (2, 1))]
)
def test_other_orders_replay(name: str, in_flight: tuple[int, ...]) -> None:
    schedule = Schedule.parse(HAND_WRITTEN[name])
    found = replay(schedule)
    assert found.in_flight == timeline(schedule, Costs.uniform(2)).in_flight == in_flight
    assert found.messages[1, 0, "B"] == 4 * schedule.microbatches
    replay(schedule, rendezvous=False, post_ahead=0)


@given(
    problem=problems(),
    lookahead=st.booleans(),
    loss_over=st.sampled_from(["batch", "microbatch", "student_microbatch"]),
    rendezvous=st.booleans(),
    post_ahead=st.integers(0, 3),
    last_has_next=st.booleans(),
    following=st.none() | st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_every_made_schedule_replays(
    problem: tuple[int, int, Costs],
    lookahead: bool,
    loss_over: str,
    rendezvous: bool,
    post_ahead: int,
    last_has_next: bool,
    following: int | None,
    data: st.DataObject,
) -> None:
    stages, microbatches, costs = problem
    schedule = make_schedule(stages, microbatches, costs, lookahead=lookahead, loss_over=loss_over, order="afab")  # type: ignore[arg-type]
    done = sorted(data.draw(st.lists(st.integers(0, microbatches), min_size=stages, max_size=stages)), reverse=True)
    found = replay(
        schedule,
        steps=3,
        first_done=data.draw(st.sampled_from([0, microbatches, done])),
        last_has_next=last_has_next,
        rendezvous=rendezvous,
        post_ahead=post_ahead,
        next_microbatches=following,
    )
    assert found.in_flight == (microbatches,) * stages
    for rank in range(stages - 1):
        assert found.messages[rank, rank + 1, "F"] == found.messages[rank + 1, rank, "B"] == 3 * microbatches


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_batches_may_change_their_size(stages: int, first: int, second: int) -> None:
    one, other = make_schedule(stages, first), make_schedule(stages, second)
    sent = replay(one, steps=2, last_has_next=True, next_microbatches=second).messages
    ahead = [min(s, second) for s in one.ahead]
    more = replay(other, steps=1, first_done=ahead).messages
    for rank in range(stages - 1):
        assert sent[rank, rank + 1, "T"] + more[rank, rank + 1, "T"] == 2 * first + second


def test_what_was_made_ahead_for_a_next_batch_stays_under_way() -> None:
    schedule = make_schedule(3, 6)
    assert schedule.ahead == (6, 3, 0)
    messages = replay(schedule, steps=1, last_has_next=True).messages
    assert (messages[0, 1, "T"], messages[1, 2, "T"]) == (12, 9)
    messages = replay(schedule, steps=1, last_has_next=True, next_microbatches=2).messages
    assert (messages[0, 1, "T"], messages[1, 2, "T"]) == (8, 8)
    messages = replay(schedule, steps=1).messages
    assert (messages[0, 1, "T"], messages[1, 2, "T"]) == (6, 6)


@pytest.mark.parametrize("rendezvous", [False, True])
def test_ranks_that_wait_for_each_other_are_a_deadlock(rendezvous: bool) -> None:
    validate(CROSSED)
    with pytest.raises(ReplayError) as caught:
        replay(CROSSED, rendezvous=rendezvous)
    assert str(caught.value) == (
        "rank 0 (stage 0), step 0, 'B0': deadlock: rank 0 at step 0, 'B0', waits for its message; "
        "rank 1 at step 0, 'T0'', waits for its message\n"
        "rank 0: T1   F0   F1   >B0< T0'  B1\n"
        "rank 1: T1   F0   F1   T0'  B0   B1"
    )
    assert (caught.value.rank, caught.value.step, str(caught.value.op)) == (0, 0, "B0")
    with pytest.raises(ReplayError, match="'B0': its message never comes: deadlock"):
        timeline(CROSSED, Costs.uniform(2))


def test_a_send_that_meets_no_receive_is_a_deadlock_under_rendezvous_only() -> None:
    validate(LATE_POST)
    replay(LATE_POST, post_ahead=2)
    replay(LATE_POST, post_ahead=0, rendezvous=False)
    with pytest.raises(ReplayError, match="'send F0', waits for the receive to be posted"):
        replay(LATE_POST, post_ahead=0)


Ops = list[Op]


def _swap(ops: Ops, one: str, other: str) -> Ops:
    exchange = {Op.parse(one): Op.parse(other), Op.parse(other): Op.parse(one)}
    return [exchange.get(op, op) for op in ops]


def _drop(ops: Ops, which: str) -> Ops:
    return [op for op in ops if op != Op.parse(which)]


def _tamper_with(monkeypatch: pytest.MonkeyPatch, rank: int, tamper: Callable[[Ops], Ops]) -> None:
    def tampered(actions: tuple[Action, ...], stage: int, stages: int, *, post_ahead: int) -> tuple[Op, ...]:
        ops = lower(actions, stage, stages, post_ahead=post_ahead)
        return tuple(tamper(list(ops))) if stage == rank else ops

    monkeypatch.setattr(simulate, "lower", tampered)


def _double(ops: Ops, which: str) -> Ops:
    return [copy for op in ops for copy in [op] * (1 + (op == Op.parse(which)))]


@pytest.mark.parametrize(
    ("rank", "tamper", "reason"),
    [
        (1, lambda ops: _drop(ops, "recv F1"), "sender has microbatch 1 of batch 0, the receiver microbatch 2"),
        (1, lambda ops: _drop(ops, "recv T2"), "no receive was posted for its message"),
        (0, lambda ops: _drop(ops, "recv B2"), "no receive was posted for its message"),
        (0, lambda ops: _drop(ops, "send F2"), "deadlock"),
        (0, lambda ops: _drop(ops, "send F1"), "sender has microbatch 2 of batch 0, the receiver microbatch 1"),
        (0, lambda ops: _drop(ops, "send T2'"), ""),  # a deadlock, or what comes in its place does not fit
        (1, lambda ops: _drop(ops, "send B2"), "deadlock"),
        (1, lambda ops: _drop(ops, "F1"), "takes its message out of order"),
        (0, lambda ops: _drop(ops, "F1"), "sent before it has run"),
        (0, lambda ops: _drop(ops, "T1'"), "sent before it has run"),
        (1, lambda ops: _drop(ops, "B2"), "sent before it has run"),
        (0, lambda ops: _drop(ops, "B2"), "takes its message out of order"),
        (1, lambda ops: _double(ops, "recv F1"), "of batch 0, the receiver microbatch 1 of batch 0"),
        (1, lambda ops: _double(ops, "F1"), "runs twice"),
        (0, lambda ops: _double(ops, "send F1"), "sender has microbatch 1 of batch 0, the receiver microbatch 2"),
        (1, lambda ops: _swap(ops, "recv F0", "recv F1"), "as message 0 of this edge"),
        (1, lambda ops: _swap(ops, "F0", "F1"), "takes its message out of order"),
        (0, lambda ops: _swap(ops, "F1", "send F1"), "sent before it has run"),
        (0, lambda ops: _swap(ops, "send F1", "send F0"), "sent before it has run"),
        (0, lambda ops: _swap(ops, "T0'", "T1'"), "T0 of batch 1 has not run"),
        (1, lambda ops: _swap(ops, "F2", "B0"), "F2 of batch 0 has not run"),
        (1, lambda ops: _swap(ops, "T2", "B0"), "F0 of batch 0 has not run"),
        (1, lambda ops: [*ops, Op.parse("recv F0")], "as message 3 of this edge"),
        (1, lambda ops: [*ops, Op.parse("send F0")], "there is no neighbour on that side"),
        (1, lambda ops: [*ops, Op.parse("W0")], "I0 of batch 0 has not run"),
    ],
)
@pytest.mark.parametrize("rendezvous", [True, False])
def test_tampered_communication_is_found(
    monkeypatch: pytest.MonkeyPatch, rendezvous: bool, rank: int, tamper: Callable[[Ops], Ops], reason: str
) -> None:
    schedule = make_schedule(2, 3)
    replay(schedule, rendezvous=rendezvous)
    _tamper_with(monkeypatch, rank, tamper)
    with pytest.raises(ReplayError) as caught:
        replay(schedule, rendezvous=rendezvous)
    assert reason in str(caught.value)
    assert re.search(r">\S+<", str(caught.value))


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        (("recv B1", "B1"), "2 B messages came from rank 1 for 1 receives; 0 may be under way"),
        (("B1",), "1 B messages of rank 1 were received and never used"),
    ],
)
def test_nothing_is_left_over(monkeypatch: pytest.MonkeyPatch, which: tuple[str, ...], reason: str) -> None:
    _tamper_with(monkeypatch, 0, lambda ops: [op for op in ops if str(op) not in which])
    with pytest.raises(ReplayError, match=f"step 0, the end: {reason}"):
        replay(plain(2, 2), steps=1, rendezvous=False)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"steps": 0}, "steps is 0: give at least 1"),
        ({"first_done": 3}, "first_done is 3: give at most M per rank"),
        ({"first_done": (0, 1)}, "not growing from rank to rank"),
        ({"first_done": (1,)}, "give at most M per rank"),
        ({"first_done": -1}, "first_done is -1"),
        ({"post_ahead": -1}, "post_ahead is -1"),
    ],
)
def test_replay_refuses_bad_arguments(options: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replay(make_schedule(2, 2), **options)  # type: ignore[arg-type]


# --- timeline


def test_timeline_as_a_table() -> None:
    """Cold start, steady steps, last step without a next batch."""
    times = timeline(make_schedule(2, 2), Costs.uniform(2), steps=4)
    table = [" ".join(f"{span.action}@{span.start:g}" for span in row) for row in times.spans]
    assert table == [
        "T0@0 T1@1 F0@2 F1@3 T0'@4 T1'@5 B0@7 B1@9 F0@11 F1@12 T0'@13 T1'@14 B0@16 B1@18 "
        "F0@20 F1@21 T0'@22 T1'@23 B0@25 B1@27 F0@29 F1@30 B0@34 B1@36",
        "T0@1 T1@2 F0@3 F1@4 B0@5 B1@7 T0@9 T1@10 F0@12 F1@13 B0@14 B1@16 "
        "T0@18 T1@19 F0@21 F1@22 B0@23 B1@25 T0@27 T1@28 F0@30 F1@31 B0@32 B1@34",
    ]
    assert [span.batch for span in times.spans[0]] == [0] * 4 + [1] * 2 + [0] * 2 + [1] * 2 + [2] * 2 + [1] * 2 + [
        2, 2, 3, 3, 2, 2, 3, 3, 3, 3,
    ]  # fmt: skip
    assert times.step_ends == ((11, 20, 29, 38), (9, 18, 27, 36))
    assert (times.period, times.lower_bound, times.utilization, times.in_flight) == (9, 8, 8 / 9, (2, 2))
    assert times.bubble == pytest.approx(1 / 9)


def test_latency_and_optimizer_in_the_timeline() -> None:
    costs = replace(Costs.uniform(2, message=0.25), optimizer=3)
    times = timeline(plain(2, 1), costs)
    assert times.period == 1 + 1 + 0.25 + 1 + 2 + 0.25 + 2 + 3  # T, F, message, F, B, message, B, optimizer
    assert times.step_ends[0][0] - times.spans[0][2].end == 3
    assert times.lower_bound == 7


@pytest.mark.parametrize(
    ("stages", "microbatches", "message", "least"),
    [(8, 24, 0, 0.995), (4, 12, 0, 0.995), (2, 3, 0, 0.995), (16, 64, 0, 0.995), (8, 24, 0.02, 0.98)],
)
def test_no_bubbles_at_unit_costs(stages: int, microbatches: int, message: float, least: float) -> None:
    costs = Costs.uniform(stages, message=message)
    for known in {costs, Costs.uniform(stages)}:  # also if the plan knew nothing of the latency
        assert timeline(make_schedule(stages, microbatches, known), costs).utilization >= least


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("share", [3, 0.25])
def test_no_bubbles_with_a_heavy_teacher_and_fewer_with_a_light_one(stages: int, share: float) -> None:
    costs = Costs.uniform(stages, t=share)
    times = timeline(make_schedule(stages, 24, costs), costs)
    student = (24 + stages - 1) * 3  # the student's own fill and drain: nothing is faster
    assert times.period == pytest.approx(max(times.lower_bound, student))


@given(problems(balanced=True))
@settings(max_examples=40, deadline=None)
def test_without_lookahead_it_is_fill_and_drain(problem: tuple[int, int, Costs]) -> None:
    stages, microbatches, costs = problem
    t, f, full = costs.t[0], costs.f[0], costs.seconds("B", 0)
    fill_drain = (stages - 1) * (max(t, f) + full + 2 * costs.message)
    period = timeline(make_schedule(stages, microbatches, costs, lookahead=False), costs).period
    assert period == pytest.approx(costs.work(0, microbatches) + fill_drain)


@given(problems(), st.sampled_from([0.25, 1.0, 3.0]))
@settings(max_examples=60, deadline=None)
def test_never_worse_than_the_teacher_before_the_student(problem: tuple[int, int, Costs], share: float) -> None:
    stages, microbatches, costs = problem
    costs = replace(costs, t=tuple(share * f for f in costs.f))
    times = timeline(make_schedule(stages, microbatches, costs), costs)
    assert times.period <= timeline(plain(stages, microbatches), costs).period * (1 + 1e-9)
    assert times.period >= times.lower_bound * (1 - 1e-9)
    assert 0 < times.utilization <= 1 + 1e-9


@given(problems())
@settings(max_examples=20, deadline=None)
def test_the_period_is_that_of_many_steps(problem: tuple[int, int, Costs]) -> None:
    stages, microbatches, costs = problem
    schedule = make_schedule(stages, microbatches, costs)
    assert timeline(schedule, costs).period == pytest.approx(timeline(schedule, costs, steps=30).period, rel=0.02)


@given(problems())
@settings(max_examples=30, deadline=None)
def test_a_timeline_keeps_the_dependencies(problem: tuple[int, int, Costs]) -> None:
    stages, microbatches, costs = problem
    times = timeline(make_schedule(stages, microbatches, costs), costs, steps=4)
    ends = {
        (rank, span.action.kind, span.batch, span.action.microbatch): span.end
        for rank, row in enumerate(times.spans)
        for span in row
    }
    assert len(ends) == stages * 4 * 3 * microbatches
    for rank, row in enumerate(times.spans):
        assert all(one.end <= other.start + 1e-9 for one, other in pairwise(row))
        for span in row:
            work = (span.action.kind, span.batch, span.action.microbatch)
            above, below = ends.get((rank - 1, *work), -1.0), ends.get((rank + 1, *work), -1.0)
            assert span.start >= (below if span.action.kind == "B" else above)
            if span.action.kind == "B":
                assert span.start >= ends[(rank, "F", *work[1:])]


def test_free_work_takes_no_time() -> None:
    times = timeline(make_schedule(2, 2), Costs.uniform(2, 0, 0, 0, 0))
    assert (times.period, times.utilization) == (0, 1)


def test_timeline_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="steps is 3: give at least 4"):
        timeline(make_schedule(2, 2), Costs.uniform(2), steps=3)
    with pytest.raises(ValueError, match="costs are for 3 stages, not 2"):
        timeline(make_schedule(2, 2), Costs.uniform(3))
    with pytest.raises(ScheduleError, match="T0 B0 missing"):
        timeline(Schedule.parse("stages=1 microbatches=1 loss_over=microbatch\nrank 0: F0"), Costs.uniform(1))


# --- drawing


def test_draw_with_and_without_room_for_labels() -> None:
    times = timeline(make_schedule(2, 2), Costs.uniform(2), steps=4)
    assert draw(times, start=0, end=11) == (
        "rank 0 T0- T1- F0- F1- T0' T1' ....B0----- B1-----\n"
        "rank 1 ....T0- T1- F0- F1- B0----- B1----- T0- T1-"
    )  # fmt: skip
    assert draw(times, start=11, end=20, width=32) == (
        "rank 0 F-F-t-t-..B---B---\n"
        "rank 1 ..F-F-B---B---T-T-"
    )  # fmt: skip
    assert draw(times, width=46) == (
        "rank 0 TTFFtt.B-B-FFtt.B-B-FFtt.B-B-FF...B-B-\n"
        "rank 1 .TTFFB-B-TT.FFB-B-TT.FFB-B-TT.FFB-B-.."
    )  # fmt: skip


@given(problems(), st.integers(10, 150))
@settings(max_examples=20, deadline=None)
def test_draw_fits_the_width(problem: tuple[int, int, Costs], width: int) -> None:
    stages, microbatches, costs = problem
    drawn = draw(timeline(make_schedule(stages, microbatches, costs), costs), width=width).splitlines()
    assert len(drawn) == stages
    assert all(len(line) <= width and line.startswith(f"rank {rank} ") for rank, line in enumerate(drawn))


def test_draw_refuses_an_empty_window() -> None:
    times = timeline(make_schedule(2, 2), Costs.uniform(2))
    for options in ({"start": 5.0, "end": 5.0}, {"width": 7}):
        with pytest.raises(ValueError, match="give a later end or more columns"):
            draw(times, **options)  # type: ignore[arg-type]


# --- documentation


def test_the_grids_in_the_documentation_come_from_their_commands() -> None:
    pairs = re.findall(r"```sh\npython - <<'PY'\n(.*?)\nPY\n```\n+```text\n(.*?)\n```", DOCS.read_text(), re.DOTALL)
    assert len(pairs) == DOCS.read_text().count("```text")
    for code, shown in pairs:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        assert printed.getvalue().rstrip("\n") == shown

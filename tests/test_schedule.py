"""Actions, text forms, lowering and validation, as literal tables."""

from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tspipe.orders import make_schedule
from lightning_tspipe.schedule import (
    Action,
    Costs,
    Op,
    Schedule,
    ScheduleError,
    lower,
    peers,
    step_order,
    validate,
)
from lightning_tspipe.simulate import ReplayError, replay

HAND_WRITTEN = {
    "1F1B": """
        stages=2 microbatches=4 loss_over=microbatch
        rank 0: T2 T3 F0 F1 T0' B0 F2 B1 F3 B2 T1' B3
        rank 1: T0 T1 T2 T3 F0 B0 F1 B1 F2 B2 F3 B3
    """,
    "split backward": """
        stages=2 microbatches=3 loss_over=batch
        rank 0: F0 F1 F2 T0' T1' I0 T2' I1 I2 W0 W1 W2
        rank 1: T0 T1 T2 F0 F1 F2 I0 W0 I1 W1 I2 W2
    """,
    "split below, full above": """
        stages=2 microbatches=2 loss_over=microbatch
        rank 0: T0 T1 F1 F0 B1 B0
        rank 1: T0 T1 F1 I1 F0 I0 W0 W1
    """,
}


def row(text: str) -> tuple[Action, ...]:
    return tuple(map(Action.parse, text.split()))


def text(actions: tuple[Action, ...]) -> str:
    return " ".join(map(str, actions))


def lines(schedule: Schedule) -> list[str]:
    return [text(actions) for actions in schedule.ranks]


# --- actions, ops and their text


@pytest.mark.parametrize(
    ("action", "written"),
    [
        (Action("T", 3, True), "T3'"),
        (Action("T", 3), "T3"),
        (Action("F", 0), "F0"),
        (Action("B", 10), "B10"),
        (Action("I", 1), "I1"),
        (Action("W", 2), "W2"),
    ],
)
def test_an_action_and_its_ops_round_trip(action: Action, written: str) -> None:
    assert str(action) == written
    assert Action.parse(written) == action
    for verb, prefix in (("recv", "recv "), ("run", ""), ("send", "send ")):
        op = Op(verb, action)  # type: ignore[arg-type]
        assert str(op) == prefix + written
        assert Op.parse(prefix + written) == op


@pytest.mark.parametrize(
    "written", ["", "X3", "T", "T-1", "T03", "T3''", "t3", " T3", "recvT3", "post T3", "recv recv T3"]
)
def test_text_that_is_no_action_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="write one of T F B I W"):
        Op.parse(written)


def test_actions_are_immutable_and_ordered() -> None:
    with pytest.raises(FrozenInstanceError):
        Action("T", 0).microbatch = 1  # type: ignore[misc]
    assert sorted(row("T0' W0 T1 F0 T0")) == list(row("F0 T0 T0' T1 W0"))


# --- text


def test_schedule_text_round_trips() -> None:
    schedule = make_schedule(2, 2)
    assert str(schedule) == (
        "stages=2 microbatches=2 loss_over=batch\nrank 0: F0 F1 T0' T1' B0 B1\nrank 1: T0 T1 F0 F1 B0 B1"
    )
    for again in (schedule, make_schedule(4, 12, loss_over="microbatch"), *map(Schedule.parse, HAND_WRITTEN.values())):
        assert Schedule.parse(str(again)) == again


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("", "first line ''"),
        ("stages=2 microbatches=x loss_over=batch", "first line"),
        ("stages=2 microbatches=2 loss_over=epoch", "write stages=2 microbatches=3 loss_over=batch"),
        ("stages=1 microbatches=1 loss_over=batch\nrank 1: T0", "expected 'rank 0: ...'"),
        ("stages=1 microbatches=1 loss_over=batch\nT0 F0 B0", "expected 'rank 0: ...'"),
        ("stages=1 microbatches=1 loss_over=batch\nrank 0: T0 G0", "'G0' is not an action"),
    ],
)
def test_schedule_text_that_cannot_be_read(written: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Schedule.parse(written)


# --- step_order


@pytest.mark.parametrize(
    ("done", "order"),
    [
        (0, "T0 T1 T2 T3 F0 F1 T0' B0 T1' B1"),
        (1, "T1 T2 T3 F0 F1 T0' B0 T1' B1"),
        (2, "T2 T3 F0 F1 T0' B0 T1' B1"),
        (3, "T3 F0 F1 T0' B0 T1' B1"),
        (4, "F0 F1 T0' B0 T1' B1"),
        (9, "F0 F1 T0' B0 T1' B1"),
    ],
)
def test_step_order_table(done: int, order: str) -> None:
    assert text(step_order(row("T2 T3 F0 F1 T0' B0 T1' B1"), done)) == order


def test_step_order_keeps_the_place_of_what_is_not_missing() -> None:
    assert text(step_order(row("F0 T1 F1 T0' B0 B1"), 0)) == "T0 F0 T1 F1 T0' B0 B1"
    assert text(step_order(row("F0 F1 T0' T1' B0 B1"), 1)) == "T1 F0 F1 T0' T1' B0 B1"


def test_step_order_refuses_a_negative_count() -> None:
    with pytest.raises(ValueError, match="done is -1: give"):
        step_order(row("T0 F0 B0"), -1)


# --- lowering


@pytest.mark.parametrize(
    ("actions", "stage", "stages", "post_ahead", "ops"),
    [
        ("T0 F0 B0", 0, 1, 2, "T0|F0|B0"),
        ("F0 T0' B0", 0, 2, 0, "F0|send F0|T0'|send T0'|recv B0|B0"),
        ("F0 T0' B0", 0, 2, 1, "F0|send F0|recv B0|T0'|send T0'|B0"),
        ("F0 T0' B0", 0, 2, 2, "recv B0|F0|send F0|T0'|send T0'|B0"),
        ("F0 T0' B0", 0, 2, 9, "recv B0|F0|send F0|T0'|send T0'|B0"),
        ("T0 F0 B0", 1, 2, 1, "recv T0|recv F0|T0|F0|B0|send B0"),
        ("F0 F1 B0 B1", 1, 3, 1, "recv F0|recv F1|F0|send F0|recv B0|F1|send F1|recv B1|B0|send B0|B1|send B1"),
        ("F0 F1 F2 T0' B0", 2, 3, 9, "recv F0|recv F1|recv F2|F0|recv T0'|F1|F2|T0'|B0|send B0"),
        (
            "T1 F0 F1 T0' T1' B0 B1",
            1,
            3,
            9,
            "recv T1|recv F0|recv F1|recv B0|recv B1|T1|send T1|recv T0'|F0|send F0|recv T1'"
            "|F1|send F1|T0'|send T0'|T1'|send T1'|B0|send B0|B1|send B1",
        ),
        ("T0' T1' F0", 1, 2, 9, "recv T0'|recv T1'|recv F0|T0'|T1'|F0"),
        ("F0 I0 W0", 1, 3, 0, "recv F0|F0|send F0|recv I0|I0|send I0|W0"),
        ("F0 I0 W0", 2, 3, 2, "recv F0|F0|I0|send I0|W0"),
        ("", 0, 2, 2, ""),
    ],
)
def test_lowering_table(actions: str, stage: int, stages: int, post_ahead: int, ops: str) -> None:
    lowered = lower(row(actions), stage, stages, post_ahead=post_ahead)
    assert "|".join(map(str, lowered)) == ops


def test_peers_table() -> None:
    assert [peers(kind, 1, 3) for kind in "TFBIW"] == [(0, 2), (0, 2), (2, 0), (2, 0), (None, None)]  # type: ignore[arg-type]
    assert [peers(kind, 0, 2) for kind in "TFBIW"] == [(None, 1), (None, 1), (1, None), (1, None), (None, None)]  # type: ignore[arg-type]
    assert {peers(kind, 0, 1) for kind in "TFBIW"} == {(None, None)}  # type: ignore[arg-type]


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4), st.data())
@settings(max_examples=50, deadline=None)
def test_lowering_posts_in_the_order_of_use(
    stages: int, microbatches: int, post_ahead: int, data: st.DataObject
) -> None:
    schedule = make_schedule(stages, microbatches)
    stage = data.draw(st.integers(0, stages - 1))
    ops = lower(schedule.ranks[stage], stage, stages, post_ahead=post_ahead)
    assert tuple(op.action for op in ops if op.verb == "run") == schedule.ranks[stage]
    posted = [op.action for op in ops if op.verb == "recv"]
    used = [a for a in schedule.ranks[stage] if peers(a.kind, stage, stages)[0] is not None]
    for kind in "TFB":
        assert [a for a in posted if a.kind == kind] == [a for a in used if a.kind == kind]
    assert post_ahead > 2 or posted == used
    assert len(posted) == len(used)
    for action in posted:
        between = ops[ops.index(Op("recv", action)) : ops.index(Op("run", action))]
        runs = [op.action for op in between if op.verb == "run"]
        assert len(runs) <= post_ahead
        if action.ahead and len(runs) > 2:  # the next batch is announced by the first student forward at the latest
            assert Action("F", 0) in schedule.ranks[stage][: schedule.ranks[stage].index(runs[0])]


# --- validation

VALID = """
    stages=2 microbatches=3 loss_over=batch
    rank 0: T2 F0 F1 F2 T0' T1' B0 B1 B2
    rank 1: T1 T2 F0 F1 F2 T0' B0 B1 B2
"""
# changed rank, its row, blamed rank, position, reason
BREAKS = [
    (0, "T2 F0 F2 T0' T1' B0 B1 B2", 0, 6, "F1 has not run yet"),
    (0, "T2 F0 F1 F1 F2 T0' T1' B0 B1 B2", 0, 3, "F1 comes twice"),
    (0, "T2 F0 F1 F3 T0' T1' B0 B1 B2", 0, 3, "the microbatches are 0 to 2"),
    (0, "T2 F0 F1 F2' T0' T1' B0 B1 B2", 0, 3, "only a teacher forward may work for the next batch"),
    (0, "T2 F0 F1 F2 T1' T0' B0 B1 B2", 0, 4, "expected T0'"),
    (0, "T2 F0 F1 F2 T0' B0 B1 B2", 0, 0, "expected T1"),
    (0, "T2 F0 F1 F2 T0' T1' T2' B0 B1 B2", 0, 0, "expected T3"),
    (0, "F0 F1 F2 T0' T1' B0 B1 B2", 0, 8, "T2 missing"),
    (0, "F0 F1 F2 T0' T2 T1' B0 B1 B2", 0, 4, "the teacher forwards of this batch come first"),
    (1, "T2 T1 F0 F1 F2 T0' B0 B1 B2", 1, 0, "expected T1"),
    (0, "T2 F0 F1 F2 T0' T1' B0 B2", 0, 8, "B1 missing"),
    (0, "T2 F0 F1 T0' T1' B0 B1 B2 F2", 0, 7, "F2 has not run yet"),
    (0, "T2 F0 F1 F2 T0' T1' B0 I1 B2", 0, 9, "W1 missing"),
    (0, "T2 F0 F1 F2 T0' T1' B0 I1 W1 B1 B2", 0, 9, "microbatch 1 had its backward already"),
    (0, "T2 F0 F1 F2 T0' T1' B0 W1 I1 B2", 0, 7, "I1 has not run yet"),
    (1, "T1 T2 F0 F1 T0' B0 F2 B1 B2", 1, 5, "the loss needs every F and T of the batch"),
    (1, "T1 F0 F1 F2 B0 T2 T0' B1 B2", 1, 4, "the loss needs every F and T of the batch"),
    (1, "F0 F1 F2 T0' T1' T2' B0 B1 B2", 1, 5, "rank 0 makes only 2 ahead"),
    (1, "T1 T2 F0 F2 F1 T0' B0 B1 B2", 1, 3, "rank 0 sends microbatch 1 here"),
    (0, "T2 F0 F2 F1 T0' T1' B0 B1 B2", 1, 3, "rank 0 sends microbatch 2 here"),
    (1, "T1 T2 F0 F1 F2 T0' B1 B0 B2", 0, 6, "rank 1 sends microbatch 1 here"),
    (1, "T1 T2 F0 F1 F2 T0' I1 B0 W1 B2", 0, 6, "rank 1 sends microbatch 1 here"),
    (0, "T2 F0 F1 F2 T0' T1' B0 B2 B1", 0, 7, "rank 1 sends microbatch 1 here"),
]


def test_the_valid_one_is_valid() -> None:
    validate(Schedule.parse(VALID))


@pytest.mark.parametrize(("changed", "actions", "rank", "position", "reason"), BREAKS)
def test_a_broken_rule_is_named_with_its_cell(
    changed: int, actions: str, rank: int, position: int, reason: str
) -> None:
    ranks = list(Schedule.parse(VALID).ranks)
    ranks[changed] = row(actions)
    broken = Schedule(2, 3, "batch", tuple(ranks))
    with pytest.raises(ScheduleError) as caught:
        validate(broken)
    error = caught.value
    assert (error.rank, error.position) == (rank, position)
    assert reason in error.reason
    cell = [*map(str, broken.ranks[rank]), "?"][position]
    head, *grid = str(error).splitlines()
    assert head.startswith(f"rank {rank}, cell {position} ({cell if cell != '?' else 'end of row'}): {reason}")
    assert len(grid) == 2
    assert f">{cell}<" in grid[rank]
    assert ">" not in grid[1 - rank]


def test_the_grid_of_an_error() -> None:
    broken = Schedule.parse("stages=1 microbatches=2 loss_over=batch\nrank 0: T0 T1 F0 B0 F1 B1")
    with pytest.raises(ScheduleError) as caught:
        validate(broken)
    assert str(caught.value) == (
        "rank 0, cell 3 (B0): the loss needs every F and T of the batch\nrank 0: T0   T1   F0   >B0< F1   B1"
    )
    assert broken.grid() == "rank 0: T0 T1 F0 B0 F1 B1"


@pytest.mark.parametrize("written", HAND_WRITTEN.values(), ids=HAND_WRITTEN.keys())
def test_other_orders_are_valid(written: str) -> None:
    validate(Schedule.parse(written))


def test_the_loss_per_microbatch_needs_its_teacher_forward() -> None:
    broken = Schedule.parse("stages=1 microbatches=2 loss_over=microbatch\nrank 0: T0 F0 B0 F1 B1 T1")
    with pytest.raises(ScheduleError, match=r"rank 0, cell 4 \(B1\): the loss of microbatch 1 needs T1"):
        validate(broken)


@pytest.mark.parametrize(
    ("student", "teacher", "loss_over", "written", "reason"),
    [
        (2, 4, "microbatch", "T0 T1 F0 B0 T2 T3 F1 B1", None),
        (2, 4, "microbatch", "T0 F0 B0 T1 T2 T3 F1 B1", "0 needs T1"),
        (2, 4, "microbatch", "T0 T1 F0 F1 B0 T2 B1 T3", "1 needs T3"),
        (4, 2, "microbatch", "T0 F0 B0 F1 B1 T1 F2 B2 F3 B3", None),
        (4, 2, "microbatch", "T0 F0 B0 F1 B1 F2 B2 T1 F3 B3", "2 needs T1"),
        (2, 2, "student_microbatch", "T0 F0 T1 B0 F1 B1", None),
        (2, 2, "student_microbatch", "T0 F0 B0 T1 F1 B1", "0 needs T1"),
        (1, 2, "student_microbatch", "F0 T0 T1 B0", None),
        (4, 2, "student_microbatch", "T0 F0 F1 T1 B0 B1 F2 F3 B2 B3", None),
        (4, 2, "student_microbatch", "T0 F0 F1 B0 B1 T1 F2 F3 B2 B3", "0 needs T1"),
        (1, 2, "batch", "T0 F0 B0 T1", "every F and T"),
        (2, 1, "batch", "T0 F0 F1 B0 B1", None),
        (2, 1, "batch", "T0 T1 F0 F1 B0 B1", "microbatches are 0 to 0"),
        (1, 2, "batch", "T0 F0 B0", "every F and T"),
        (2, 3, "batch", "T0 T1 T2 F0 F1 B0 B1", "multiple or a divisor"),
    ],
)  # fmt: skip
def test_other_microbatches_of_the_teacher(
    student: int, teacher: int, loss_over: str, written: str, reason: str | None
) -> None:
    header = f"stages=1 microbatches={student} loss_over={loss_over} teacher_microbatches={teacher}"
    schedule = Schedule.parse(f"{header}\nrank 0: {written}")
    assert schedule.teacher_microbatches == teacher
    assert Schedule.parse(str(schedule)) == schedule
    if reason is None:
        validate(schedule)
        replay(schedule)
        return
    with pytest.raises(ValueError, match=reason):
        validate(schedule)
    if "needs" in reason:
        with pytest.raises(ReplayError):
            replay(schedule)


def test_the_bound_on_activations() -> None:
    one_f_one_b = Schedule.parse(HAND_WRITTEN["1F1B"])
    validate(one_f_one_b, max_in_flight=(2, 1))
    with pytest.raises(ScheduleError, match=r"rank 0, cell 3 \(F1\): 2 student microbatches in flight, bound 1"):
        validate(one_f_one_b, max_in_flight=(1, 1))
    validate(make_schedule(2, 3), max_in_flight=(3, 3))
    with pytest.raises(ScheduleError, match=r"rank 1, cell 5 \(F2\): 3 student microbatches in flight, bound 2"):
        validate(make_schedule(2, 3), max_in_flight=(3, 2))


def test_the_bound_on_what_is_held_counts_pending_weights() -> None:
    split = Schedule.parse("""
        stages=1 microbatches=3 loss_over=microbatch
        rank 0: T0 T1 T2 F0 I0 F1 I1 W0 F2 W1 I2 W2
    """)
    validate(split, max_in_flight=(1,), max_held=(2,))
    with pytest.raises(ScheduleError, match=r"rank 0, cell 5 \(F1\): 2 student microbatches held, bound 1"):
        validate(split, max_in_flight=(1,), max_held=(1,))


@pytest.mark.parametrize("kind", ["drop", "duplicate", "swap within a kind", "swap F and B", "swap rows"])
@given(st.integers(2, 4), st.integers(2, 6), st.data())
@settings(max_examples=30, deadline=None)
def test_mutations_are_caught(kind: str, stages: int, microbatches: int, data: st.DataObject) -> None:
    schedule = make_schedule(stages, microbatches)
    rank = data.draw(st.integers(0, stages - 1))
    actions = list(schedule.ranks[rank])
    place = data.draw(st.integers(0, len(actions) - 1))
    if kind == "drop":
        del actions[place]
    elif kind == "duplicate":
        actions.insert(data.draw(st.integers(0, len(actions))), actions[place])
    elif kind == "swap within a kind":
        same = [i for i, a in enumerate(actions) if a.kind == actions[place].kind and i != place]
        other = data.draw(st.sampled_from(same))
        actions[place], actions[other] = actions[other], actions[place]
    elif kind == "swap F and B":
        q = data.draw(st.integers(0, microbatches - 1))
        one, other = actions.index(Action("F", q)), actions.index(Action("B", q))
        actions[one], actions[other] = actions[other], actions[one]
    else:
        actions = [a for a in schedule.ranks[rank] if not a.ahead][::-1]
    broken = replace(schedule, ranks=(*schedule.ranks[:rank], tuple(actions), *schedule.ranks[rank + 1 :]))
    with pytest.raises(ScheduleError):
        validate(broken)


# --- costs


def test_costs_of_actions() -> None:
    costs = Costs(t=(1, 2), f=(3, 4), b=(5, 6), w=(7, 8), optimizer=9)
    assert [costs.seconds(kind, 1) for kind in "TFBIW"] == [2, 4, 14, 6, 8]  # type: ignore[arg-type]
    assert costs.work(0, 10) == 10 * (1 + 3 + 5 + 7) + 9
    assert Costs(t=(1,), f=(1,), b=(2,)).w == (0,)
    assert Costs.uniform(2, message=3) == Costs((1, 1), (1, 1), (1, 1), (1, 1), 3)


# --- bad arguments

BAD_ARGUMENTS = [
    (lambda: Costs.uniform(0), "stages is 0: give at least 1"),
    (lambda: Costs((), (), ()), "costs need one entry per stage"),
    (lambda: Costs((1, 1), (1, 1), (1,)), "costs need one entry per stage, not {'t': 2, 'f': 2, 'b': 1, 'w': 1}"),
    (lambda: Costs((1,), (-1,), (1,)), "costs.f is (-1,): give finite seconds that are not negative"),
    (lambda: Costs((1,), (1,), (1,), message=-1), "costs.message is -1: give finite seconds"),
    (lambda: Costs((1,), (1,), (1,), optimizer=float("nan")), "costs.optimizer is nan: give finite seconds"),
    (lambda: Costs((float("inf"),), (1,), (1,)), "costs.t is (inf,): give finite seconds"),
    (lambda: lower((), 2, 2), "stage is 2 of 2: give 0 to 1"),
    (lambda: lower((), 0, 2, post_ahead=-1), "post_ahead is -1: give 0 (post right before the use) or more"),
    (lambda: validate(Schedule(0, 1, "batch", ())), "stages is 0: give at least 1"),
    (lambda: validate(Schedule(1, 0, "batch", ((),))), "microbatches is 0: give at least 1"),
    (lambda: validate(Schedule(2, 1, "batch", ((),))), "ranks has 1 entries for 2 stages: give one per stage"),
    (lambda: validate(make_schedule(2, 2), max_in_flight=(2,)), "max_in_flight has 1 entries for 2 stages"),
    (lambda: validate(make_schedule(2, 2), max_held=(2,)), "max_held has 1 entries for 2 stages"),
    (lambda: Costs((1,), (1,), (1,), exchange=-1), "costs.exchange is -1: give finite seconds"),
]


@pytest.mark.parametrize(("call", "complaint"), BAD_ARGUMENTS)
def test_bad_arguments_name_the_fix(call, complaint: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below
        call()
    assert complaint in str(caught.value)

"""What each rank runs and in which order, how a fit ends early, what a failure shows, and that no step waits."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_tspipe import TSPipeStrategy
from lightning_tspipe.comm import Comm
from lightning_tspipe.data import Batch
from lightning_tspipe.runtime import Runtime
from lightning_tspipe.schedule import Costs, step_order
from tests.multiproc import TWIN, Fit, Witness, run_fits
from tests.scripts.small import Small, loader, network
from tests.waits import Watch

Ran = list[tuple[str, int, int]]  # kind, batch, microbatch
SHORT = {"timeout": timedelta(seconds=10)}  # so that a lost message is an error soon

pytestmark = pytest.mark.timeout(60)


class Notes(L.Callback):
    """Adds to the witness's file, under "notes", what a function gives at the end of each batch."""

    def __init__(self, note: Callable[[Any], Any]) -> None:
        self.note, self.notes = note, list[Any]()

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        next(each for each in trainer.callbacks if isinstance(each, Witness)).seen["notes"] = self.notes

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.notes.append(self.note(trainer))


# --- the order


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """All that a rank has run; every forked rank has a list of its own."""
    found: Ran = []

    def noting(kind: str, handler: Callable[[Runtime, Batch, int], None]) -> Callable[[Runtime, Batch, int], None]:
        def run(runtime: Runtime, batch: Batch, q: int) -> None:
            found.append((kind, batch.info.index, q))
            handler(runtime, batch, q)

        return run

    for kind, name in (("T", "_teacher_forward"), ("F", "_student_forward"), ("B", "_backward")):
        monkeypatch.setattr(Runtime, name, noting(kind, getattr(Runtime, name)))
    return found


def steps_of(ran: Ran, stages: int, options: dict[str, Any], **more: Any) -> list[list[tuple[Any, Ran]]]:
    """For each rank the plan and the actions of each step: two epochs of batches of 8, 8, 8 and 2 rows."""

    def note(trainer: Any) -> tuple[Any, Ran]:
        step = trainer.strategy.plan, list(ran)
        ran.clear()
        return step

    trainer = {"max_epochs": 2, "callbacks": [Notes(note)], **more}
    fit = Fit(lambda: Small(**options), lambda: loader(26, 8), stages, strategy=SHORT, trainer=trainer)
    return [seen["notes"] for seen in run_fits([fit], 40)[0]]


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(
    ("options", "ahead_from"),  # the first step that works for the next batch
    [({}, 0), ({"momentum": 0.9}, 0), ({"momentum": 0.9, "delay_from_step": 4}, 2)],
    ids=["frozen", "momentum", "late"],
)
def test_every_rank_follows_its_plan(ran: Ran, stages: int, options: dict[str, Any], ahead_from: int) -> None:
    counts = [3 * (stages - 1)] * 3 + [2]  # microbatches
    ranks = steps_of(ran, stages, options)
    for rank, steps in enumerate(ranks):
        assert len(steps) == 8
        done = 0
        for number, (plan, actions) in enumerate(steps):
            assert plan == ranks[0][number][0]
            assert plan.microbatches == counts[number % 4]
            assert plan.ahead[0] > 0
            coming = counts[number % 4 + 1] if number % 4 < 3 and number >= ahead_from else 0
            order = [a for a in step_order(plan.ranks[rank], done) if not a.ahead or a.microbatch < coming]
            assert actions == [(a.kind, number + a.ahead, a.microbatch) for a in order], (rank, number)
            done = sum(batch > number for _, batch, _ in actions)


def test_an_exact_teacher_works_ahead_within_a_window_of_accumulation(ran: Ran) -> None:
    ranks = steps_of(ran, 3, {"momentum": 0.9, "teacher_delay": 0}, accumulate_grad_batches=3)
    for rank, steps in enumerate(ranks):
        for number, (plan, actions) in enumerate(steps):
            made = sum(batch > number for _, batch, _ in actions)
            most = 2 if number % 4 == 2 else plan.microbatches  # of the next batch
            # batches 0 to 2 are a step, and batch 3 another one
            assert made == (min(plan.ahead[rank], most) if number % 4 < 2 else 0), (rank, number)
        assert rank == 2 or steps[0][0].ahead[rank] > 0


def test_the_order_of_two_epochs_in_full(ran: Ran) -> None:
    """The first rank is ahead by a whole batch, except at the end of an epoch; the last one never is."""
    ranks = [
        [" ".join(f"{kind}{q}" + "'" * (batch - n) for kind, batch, q in actions) for n, (_, actions) in steps]
        for steps in map(enumerate, steps_of(ran, 2, {}))
    ]
    row = "F0 F1 F2 T0' T1' T2' B0 B1 B2"
    assert ranks[0] == [f"T0 T1 T2 {row}", row, row.replace(" T2'", ""), "F0 F1 B0 B1"] * 2
    assert ranks[1] == [*["T0 T1 T2 F0 F1 F2 B0 B1 B2"] * 3, "T0 T1 F0 F1 B0 B1"] * 2


# --- an early end


class Stream(IterableDataset[Any]):
    """Rows without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loader().dataset)


class Stop(L.Callback):
    """Ends the fit after the third of eight steps."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 3


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many messages a rank has neither received nor sent when it closes its connections."""
    found: list[int] = []
    close = Comm.close

    def noting(comm: Comm) -> None:
        inward, outward = comm.inward.values(), comm.outward.values()
        lines = [*(channel._line for channel in inward), *comm.lines_in.values()]
        receives = sum(len(end._posted) + len(end._waiting) for end in inward) + sum(len(end._posted) for end in lines)
        near = [end._near for end in (*inward, *lines) if end._near is not None]
        receives += sum(end._head[end._theirs] - end._taken for end in near)
        found.append(receives + sum(len(channel._sent) for channel in outward) + len(comm._kept))
        close(comm)

    monkeypatch.setattr(Comm, "close", noting)
    return found


@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
@pytest.mark.parametrize("momentum", [None, 0.9], ids=["frozen", "momentum"])
def test_an_early_end_leaves_no_message(ran: Ran, left: list[int], momentum: float | None, sized: bool) -> None:
    """All ranks end after one step, with the weights of the sequential twin; what was begun ahead is run to its end."""

    def fit(stages: int) -> Fit:
        trainer = {"callbacks": [Stop(), Notes(lambda trainer: (ran, left))]}
        options: dict[str, Any] = {} if stages == TWIN else {"strategy": SHORT, "microbatches": 3}
        make_loader = loader if sized else lambda: DataLoader(Stream(), 4)
        return Fit(lambda: Small(momentum=momentum, teacher_delay=1), make_loader, stages, trainer=trainer, **options)

    (twin,), *pipelines = run_fits([fit(TWIN), fit(2), fit(3)], 50)
    assert twin["steps"] == 3
    for seen in chain(*pipelines):
        assert seen["steps"] == len(seen["losses"]) == 3
        actions, messages = seen["notes"][-1]
        assert [(kind, q) for kind, batch, q in actions if batch == 3] == [("T", 0), ("T", 1), ("T", 2)]
        assert messages == [0]
        for name, tensor in seen["whole"].items():
            torch.testing.assert_close(tensor, twin["whole"][name], rtol=1e-5, atol=1e-6)


# --- a failure


class Broken(nn.Module):
    """Raises in one of its forwards, counted from 1, or in the backward of that one."""

    def __init__(self, call: int, backward: bool) -> None:
        super().__init__()
        self.call, self.backward, self.calls = call, backward, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result = x.clone()
        if self.calls == self.call:
            result.register_hook(self.fail) if self.backward else self.fail()  # type: ignore[no-untyped-call]
        return result

    def fail(self, *_: Any) -> None:
        raise ArithmeticError("broken")


@pytest.mark.parametrize(
    ("rank", "call", "first", "second"),
    [
        (1, 5, "F0   F1   F2   T0'  T1'  T2'  B0   B1   B2", "T0   T1   T2   F0   >F1< F2   B0   B1   B2"),
        (0, 6, "F0   F1   F2   T0'  T1'  T2'  B0   B1   >B2<", "T0   T1   T2   F0   F1   F2   B0   B1   B2"),
        (0, 8, "F0    F1    F2    T0'   >T1'< T2'   B0    B1    B2",
               "T0    T1    T2    F0    F1    F2    B0    B1    B2"),
    ],
    ids=["forward", "backward", "teacher"],
)  # fmt: skip
def test_a_failure_shows_its_cell_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, call: int, first: str, second: str
) -> None:
    """In the second step; the stages cost the same, so the first one runs the teacher a whole batch ahead."""
    (cell,) = re.findall(">(.*)<", first + second)
    broken = "teacher" if cell[0] == "T" else "student"

    def make() -> Small:
        module = Small()
        module.student, module.teacher = network(4, 4, 4), network(4, 4, 4)
        getattr(module, broken).insert(1, Broken(call, cell[0] == "B"))
        return module

    balance = {"student": [1, 1], "teacher": [1, 1]} | {broken: [2 - rank, 1 + rank]}
    handler = logging.FileHandler(tmp_path / "log", delay=True)  # pytest takes the place of what prints to stderr
    monkeypatch.setattr(logging.getLogger("lightning_tspipe"), "handlers", [handler])
    with pytest.raises(AssertionError, match="ArithmeticError: broken"):
        run_fits([Fit(make, loader, 2, 3, strategy=SHORT | {"balance": balance})], 40)
    text, where = (tmp_path / "log").read_text(), f"rank {rank} (stage {rank}) failed at"
    assert f"{where} {cell} of this schedule:\nrank 0: {first}\nrank 1: {second}\n" in text
    assert text.count(where) == 1


# --- what the strategy tells


class Told(Notes):
    """Notes plan, costs and busy seconds; what they are after the fit is in a file of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(lambda trainer: (trainer.strategy.plan, trainer.strategy.costs, trainer.strategy.busy))
        self.folder = folder

    def on_fit_end(self, trainer: L.Trainer, *_: Any) -> None:
        torch.save(self.note(trainer), self.folder / f"{trainer.global_rank}.pt")


def test_plan_costs_and_busy_are_there_during_the_fit_only(tmp_path: Path) -> None:
    strategy = TSPipeStrategy(balance="parameters")
    assert (strategy.plan, strategy.costs, strategy.busy) == (None, None, {})
    ranks = run_fits([Fit(Small, loader, 2, 3, strategy=SHORT, trainer={"callbacks": [Told(tmp_path)]})], 40)[0]
    shares = 41 / 66, 91 / 66  # parameters of a stage, and one, over the mean
    idle = dict.fromkeys("TFB", 0.0)
    for rank, seen in enumerate(ranks):
        assert len(seen["notes"]) == 8
        seen["notes"].pop()  # a rank that is ahead by a whole batch has no teacher to run in the last step
        for (_, _, before), (plan, costs, busy) in pairwise([(None, None, idle), *seen["notes"]]):
            assert plan == ranks[0]["notes"][0][0]
            assert (plan.stages, plan.microbatches) == (2, 3)
            assert costs == Costs(shares, shares, shares, shares)
            assert busy.keys() == idle.keys()
            assert all(busy[kind] > before[kind] for kind in idle)
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=False) == (None, None, {})


def test_the_plan_knows_of_clipping() -> None:
    """By norm, all ranks wait for a scalar; teacher work behind the last backward fills that."""
    options = {"limit_train_batches": 2, "gradient_clip_val": 1.0}
    notes = [Notes(lambda trainer: (trainer.strategy.costs.exchange, trainer.strategy.plan)) for _ in range(2)]
    trainers = [
        options | {"gradient_clip_algorithm": by, "callbacks": [note]}
        for by, note in zip(("norm", "value"), notes, strict=True)
    ]
    by_norm, by_value = run_fits([Fit(Small, loader, 2, 3, strategy=SHORT, trainer=each) for each in trainers], 40)
    for norm, value in zip(by_norm, by_value, strict=True):
        assert (norm["notes"][0][0], value["notes"][0][0]) == (0.0, None)
    row = by_norm[1]["notes"][0][1].ranks[1]
    assert row[-1].ahead
    assert not by_value[1]["notes"][0][1].ranks[1][-1].ahead


# --- no waits


class Rich(Small):
    """Batch norms, dropout, and a loss that logs a number and a tensor."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        middle = nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()
        self.student = nn.Sequential(nn.Linear(4, 8), *middle, nn.Linear(8, 2))
        self.teacher = copy.deepcopy(self.student)

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        loss = super().loss(student_out, teacher_out, target)
        self.log("number", 0.5)
        self.log("tensor", loss.detach())
        return {"loss": loss, "more": 3}


@pytest.mark.parametrize("loss_over", ["batch", "microbatch"])
def test_no_steady_step_waits_for_the_device(loss_over: str) -> None:
    def fit(stages: int) -> Fit:
        watch = Watch(2, 6)
        trainer = {"callbacks": [watch, Notes(lambda trainer: (watch.waits, watch.allowed))]}
        make = lambda: Rich(momentum=0.9, loss_over=loss_over)  # noqa: E731
        return Fit(make, lambda: loader(48, 6), stages, 3, strategy=SHORT, trainer=trainer)

    for ranks in run_fits([fit(stages) for stages in (1, 2, 3)], 50):
        for rank, seen in enumerate(ranks):
            waits, allowed = seen["notes"][-1]
            assert waits == [], f"rank {rank} of {len(ranks)}"
            assert allowed, "the watch saw nothing, not even what it allows"

"""From the middle of an epoch, with all that is random: resumed training is uninterrupted training, bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import TSPipeStrategy
from tests.multiproc import result_of
from tests.scripts.small import trainer
from tests.test_checkpoint import AUTO, Exact, assert_same, read
from tests.test_precision import half

ROWS, BATCH = 24, 4  # six batches


class Resumable(DataLoader[Any]):
    """Shuffles, and adds noise to what it loads, by the generators of the process; goes on where its state says.

    Args:
        quiet: by no generator of the process: the order is another one in each epoch, but given.
    """

    def __init__(self, quiet: bool = False) -> None:
        data = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))
        super().__init__(TensorDataset(data, torch.arange(ROWS)), BATCH)
        self.now: dict[str, Any] = {"order": [], "position": 0}  # handed out as it is: others have to copy it
        self.resumed, self.quiet = False, quiet

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        torch.rand(())  # as DataLoader does, for its workers
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        if not self.resumed:
            order = sum(self.now["order"][:2]) if self.quiet else torch.randperm(ROWS)[0]
            generator = torch.Generator().manual_seed(int(order))
            self.now.update(order=torch.randperm(ROWS, generator=generator).tolist(), position=0)
        self.resumed = False
        while self.now["position"] < ROWS // BATCH:
            start = self.now["position"] * BATCH
            rows = self.dataset[self.now["order"][start : start + BATCH]]
            self.now["position"] += 1
            noise = float(torch.rand(())) + random.random() + float(numpy.random.rand())
            yield rows[0] + (0 if self.quiet else noise / 100), rows[1]

    def state_dict(self) -> dict[str, Any]:
        return self.now

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now = dict(state)
        self.resumed = state["position"] < ROWS // BATCH


class Unsized:
    """The same without a length."""

    def __init__(self) -> None:
        self.loader = Resumable()
        self.state_dict, self.load_state_dict = self.loader.state_dict, self.loader.load_state_dict

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class Random(Exact):
    """Dropout in both networks, and numbers that `loss` and a hook of rank 0 draw."""

    def __init__(self, noise: bool = True, **options: Any) -> None:
        super().__init__(adam=True, **({"momentum": 0.9, "teacher_delay": 1} | options))
        self.noise = noise
        if noise:
            for each in (self.student, self.teacher):
                each.insert(1, nn.Dropout(0.2))

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        loss = super().loss(student_out, teacher_out, target)
        self.log("loss", loss)
        return loss * (1 + torch.rand(())) if self.noise else loss

    def on_train_batch_start(self, *args: Any) -> None:
        if self.noise:
            torch.rand(()), random.random(), numpy.random.rand()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self.student(batch[0].double()) - self.teacher(batch[0].double())).square().mean())

    def configure_optimizers(self) -> Any:
        (optimizer,), (scheduler,) = super().configure_optimizers()
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Counter(L.Callback):
    """A callback with a state."""

    def __init__(self) -> None:
        self.sums = [0.0]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *args: Any) -> None:
        self.sums.append(self.sums[-1] + float(outputs["loss"]))

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = list(state["sums"])


def train(
    folder: Path, stages: int, resume: Path | None = None, loader: Any = Resumable, validate: bool = False,
    module: dict[str, Any] | None = None, microbatches: int = 2, end: Path | None = None, method: Any = "fork",
    **options: Any,
) -> None:  # fmt: skip
    """Two epochs; ``<step>.ckpt`` for every step, or after every validation."""
    often: dict[str, Any] = {"save_on_train_epoch_end": False} if validate else {"every_n_train_steps": 1}
    each = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, auto_insert_metric_name=False, **often)
    strategy: Any = "auto" if stages == AUTO else TSPipeStrategy(microbatches=microbatches, start_method=method)
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(random.SystemRandom().randrange(10**9) if resume else 7)
    run = trainer(
        max(1, stages), strategy,
        **({"max_epochs": 2, "callbacks": [each, Counter()], "enable_checkpointing": True} | options),
    )  # fmt: skip
    val = DataLoader(TensorDataset(torch.ones(4, 4)), 2, shuffle=True) if validate else None
    run.fit(Random(**(module or {})), loader(), val, ckpt_path=resume)
    if end is not None:
        run.save_checkpoint(end)


def content(file: Path) -> dict[str, Any]:
    """All that a file holds, but for the paths that `ModelCheckpoint` remembers."""
    found = read(file)
    found["callbacks"] = found["callbacks"]["Counter"]
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    assert list(found) == list(expected)
    for part in expected:
        if part not in but:
            assert_same(found, expected, part)


@pytest.mark.parametrize(
    ("steps", "starts", "options"),
    [
        (12, (1, 5, 6, 7, 11), {}),
        (12, (1, 5, 7), {"loader": Unsized}),
        (12, (2, 4, 6, 8), {"validate": True, "val_check_interval": 2}),
        (6, (2, 3, 4), {"accumulate_grad_batches": 2}),
        (4, (1, 2, 3), {"accumulate_grad_batches": 3, "module": {"teacher_delay": 0}}),
        (10, (4, 6), {"limit_train_batches": 5}),
        (9, (5, 8), {"max_steps": 9}),
        (12, (8,), {"loader": Unsized, "plugins": None}),
    ],
    ids=["plain", "no length", "validation", "accumulation", "exact", "limit", "max_steps", "scaler"],
)
def test_from_the_middle_of_an_epoch(tmp_path: Path, steps: int, starts: Any, options: dict[str, Any]) -> None:
    """Every value in the last file: weights, optimizer, scaler, scheduler, counters, callbacks, random states."""

    def run(folder: str, resume: int = 0, stages: int = 2) -> None:
        extra = {"plugins": [half()]} if "plugins" in options else {}
        train(tmp_path / folder, stages, tmp_path / f"whole/{resume}.ckpt" if resume else None, **(options | extra))

    def trainings() -> None:
        run("whole")
        for step in starts:
            run(f"{step}", step)
        if 6 in starts:
            run("twin", 6, AUTO)

    result_of(trainings, timeout=100)
    expected = content(tmp_path / f"whole/{steps}.ckpt")
    assert expected["global_step"] == steps
    for step in starts:
        found = content(tmp_path / f"{step}/{steps}.ckpt")
        # saved with the last batch, but before Lightning has counted the epoch: it then forgets one
        uncounted = expected["global_step"] == 2 * step and "validate" not in options
        assert_equal(found, expected, ("loops",) if uncounted else ())
        if step == 6:
            twin = content(tmp_path / f"twin/{steps}.ckpt")
            for each in (found, twin):
                del each["loops"]["fit_loop"]["state_dict"]["combined_loader"]  # another order
            assert_same(found, twin, "loops")


def test_from_the_middle_of_an_epoch_on_other_numbers_of_stages(tmp_path: Path) -> None:
    """The pipeline, plain Lightning and the pipeline again, each for a part of an epoch; and the twin for all of it."""
    options: dict[str, Any] = {"module": {"noise": False}, "loader": partial(Resumable, quiet=True), "microbatches": 1}

    def trainings() -> None:
        train(tmp_path / "auto", AUTO, **options)
        train(tmp_path / "2", 2, max_steps=3, **options)
        train(tmp_path / "plain", AUTO, tmp_path / "2/2.ckpt", max_steps=4, **options)
        train(tmp_path / "3", 3, tmp_path / "plain/4.ckpt", max_steps=8, **options)
        train(tmp_path / "1", 1, tmp_path / "3/8.ckpt", max_steps=10, **options)
        train(tmp_path / "end", 2, tmp_path / "1/9.ckpt", **options)

    result_of(trainings, timeout=100)
    expected, found = content(tmp_path / "auto/12.ckpt"), content(tmp_path / "end/12.ckpt")
    del found["tspipe"]
    assert_equal(found, expected)


def test_saved_after_a_fit_that_ended_within_an_epoch(tmp_path: Path) -> None:
    """A batch had been looked ahead, in vain: the loader's state and the random ones are as of the last batch."""

    def trainings() -> None:
        for name, loader in (("sized", Resumable), ("unsized", Unsized)):
            options: dict[str, Any] = {
                "loader": loader, "accumulate_grad_batches": 2, "max_epochs": 9,  # Lightning counts the cut one
                "method": "popen",  # here, not in a fork, of which the optimizer would not come back
            }  # fmt: skip
            train(tmp_path / name / "whole", 1, max_steps=6, **options)
            end = tmp_path / name / "end.ckpt"
            train(tmp_path / name / "first", 1, max_steps=2, end=end, **options)
            train(tmp_path / name / "second", 1, end, max_steps=6, **options)

    result_of(trainings, timeout=100)
    for name in ("sized", "unsized"):
        expected, found = (content(tmp_path / name / folder / "6.ckpt") for folder in ("whole", "second"))
        assert_equal(found, expected, ("epoch", "loops"))


class InTheWindow(L.Callback):
    """Saves after a batch that does not step the optimizer."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 2:
            trainer.save_checkpoint(self.file)


@pytest.mark.parametrize("delay", [1, 0])
def test_a_window_of_accumulation_that_is_cut(tmp_path: Path, delay: int) -> None:
    """Its first gradients are in no checkpoint: the pipeline goes on as plain Lightning does, from either's file."""
    options: dict[str, Any] = {
        "module": {"noise": False, "teacher_delay": delay}, "loader": partial(Resumable, quiet=True), "microbatches": 1,
        "accumulate_grad_batches": 2,
    }  # fmt: skip

    def trainings() -> None:
        for name, stages in (("auto", AUTO), ("pipe", 2)):
            each = ModelCheckpoint(tmp_path / name, filename="whole")
            file = tmp_path / name / "cut.ckpt"
            train(tmp_path, stages, **options, callbacks=[Counter(), InTheWindow(file), each])
        for name, stages, source in (("auto", AUTO, "pipe"), ("pipe", 2, "auto")):
            train(tmp_path / f"{name} resumed", stages, tmp_path / source / "cut.ckpt", **options)

    result_of(trainings, timeout=100)
    for file in ("{}/cut.ckpt", "{}/whole.ckpt", "{} resumed/6.ckpt"):
        found = content(tmp_path / file.format("pipe"))
        del found["tspipe"]
        assert_equal(found, content(tmp_path / file.format("auto")))

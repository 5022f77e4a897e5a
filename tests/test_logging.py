"""Everything that is logged, by whatever means, has on every rank and in every file the value that the twin gives."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection, SpearmanCorrCoef, SumMetric
from torchmetrics.classification import BinaryAUROC, MulticlassPrecision, MulticlassRecall

from tests.scripts.small import Small, loader
from tests.scripts.zygote import Zygote
from tests.twins import TWIN, Case, Make, Twins, case, state

pytestmark = pytest.mark.timeout(120)
CASES: dict[str, Case] = {}
PIPELINES = {1: 1, 3: 1}  # one microbatch, as the twin has: metrics are in float32


@pytest.fixture(scope="module")
def twins(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(zygote, tmp_path_factory.mktemp("logging"), "tests.test_logging", PIPELINES)


class Model(Small):
    """A late momentum teacher in float64."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"momentum": 0.9, "teacher_delay": 1} | options))
        self.double()

    def student_input(self, batch: Any) -> Any:
        return batch[0].double()

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        loss = (student_out - teacher_out).square().mean()
        self.say(loss, student_out, target)
        return loss

    def say(self, loss: Tensor, student_out: Tensor, target: Any) -> None:
        """What `loss` logs."""


def rows(last: int = 2) -> DataLoader[Any]:
    """Batches of 4 and a short last one, so that means over an epoch weigh batches."""
    return loader(16 + last)


class Shown(Callback):
    """What the trainer shows after every batch, and after every epoch and validation."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def note(self, trainer: L.Trainer) -> None:
        shown = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics
        self.seen.append([{name: float(value) for name, value in metrics.items()} for metrics in shown])

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.note(trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.note(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.note(trainer)


def fit(make: Make, module: Any, **options: Any) -> dict[str, Any]:
    """Two epochs with validations, what was shown in them and what they left."""
    shown = Shown()
    callbacks = [*options.pop("callbacks", []), shown]
    logger = CSVLogger(make.folder / type(module).__name__, "", "csv")  # type: ignore[attr-defined]
    run = make(callbacks=callbacks, **({"logger": logger, "log_every_n_steps": 1, "max_epochs": 2} | options))
    run.fit(module, rows(), [loader(7, 3), loader(4, 4)])
    return {"seen": shown.seen, **state(run, module)}


# --- numbers


class Numbers(Model):
    """Logs numbers and tensors with every option."""

    def say(self, loss: Tensor, student_out: Tensor, target: Any) -> None:
        both: dict[str, Any] = {"on_step": True, "on_epoch": True}
        self.log("plain", loss)
        self.log("both", loss, **both)
        self.log("epoch", loss, on_step=False, on_epoch=True)
        self.log("bar", loss, True)
        self.log("hidden", loss, logger=False, **both)
        self.log("positional", loss, False, True, True, True, "max", False, False, None, True, 5)
        for name in ("mean", "sum", "min", "max"):
            self.log(f"by {name}", student_out.sum(), reduce_fx=name, **both)
            self.log(f"by torch.{name}", student_out.sum(), reduce_fx=getattr(torch, name), **both)
        self.log("builtin", loss, reduce_fx=max, on_epoch=True)
        self.log("weighed", loss, batch_size=len(target) ** 2, **both)
        self.log("synced", loss, sync_dist=True, **both)
        self.log("rank zero", loss, rank_zero_only=True, **both)
        self.log("number", 1.5, **both)
        self.log("whole", target.sum(), **both)
        self.log("single", loss.reshape(1, 1), **both)
        self.log_dict({"a": loss + 1, "b": len(target) / 2}, prog_bar=True, **both)
        if self.trainer.global_step % 2:
            self.log("sometimes", loss, **both)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        gap = (self.student(batch[0].double()) - 1).square().mean()
        self.log("val", gap)
        self.log("val both", gap, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log("val max", gap, reduce_fx="max", batch_size=2)
        self.log(f"val own {dataloader_idx}", gap, add_dataloader_idx=False)
        self.log_dict({"val a": gap, "val b": gap + 1}, batch_size=len(batch[0]))


@case(CASES)
def numbers(make: Make) -> Any:
    return fit(make, Numbers())


def test_numbers(twins: Twins) -> None:
    found = twins.same("numbers")["metrics"]
    assert found["by max_epoch"] > found["by mean_epoch"] > found["by min_epoch"]
    assert found["weighed_epoch"] != found["both_epoch"] != found["epoch"] - 1
    assert {"val/dataloader_idx_0", "val/dataloader_idx_1", "val own 0", "sometimes_epoch"} <= set(found)


class Pieces(Model):
    """The loss over microbatches of one row, each of which logs."""

    def __init__(self) -> None:
        super().__init__(loss_over="microbatch")
        self.metric = MeanMetric()

    def say(self, loss: Tensor, student_out: Tensor, target: Any) -> None:
        both: dict[str, Any] = {"on_step": True, "on_epoch": True}
        self.log("mean", target.double().mean(), **both)
        self.log("sum", target.sum(), reduce_fx="sum", **both)
        self.log("min", target.double().min(), reduce_fx=torch.min, **both)
        self.log("max", target.max(), reduce_fx=max, **both)
        self.log("whole", loss, **both)
        self.metric(target.double())
        self.log("metric", self.metric, **both)


@case(CASES)
def pieces(make: Make) -> Any:
    shown = Shown()
    run = make(microbatches=4, callbacks=[shown], max_epochs=2)
    run.fit(module := Pieces(), loader(16))
    return {"seen": shown.seen, **state(run, module)}


# --- torchmetrics


class Metrics(Model):
    """Metrics whose states are sums, means, extrema and lists, alone and in collections."""

    def __init__(self) -> None:
        super().__init__()
        classes = [MulticlassPrecision(2, average="macro"), MulticlassRecall(2, average="macro")]
        self.mean, self.total, self.sync = MeanMetric(), SumMetric(), MeanMetric(dist_sync_on_step=True)
        self.area, self.val_area = BinaryAUROC(thresholds=None), BinaryAUROC(thresholds=None)
        self.rank, self.by_hand = SpearmanCorrCoef(), MeanMetric()
        self.several = MetricCollection(classes, prefix="several ")
        self.val_several = self.several.clone(prefix="val several ")
        self.later = MetricCollection({"error": MeanSquaredError(), "twice": MeanSquaredError()}, prefix="later ")
        self.updated = MeanMetric()

    def say(self, loss: Tensor, student_out: Tensor, target: Any) -> None:
        both: dict[str, Any] = {"on_step": True, "on_epoch": True}
        self.mean(loss)
        self.total(loss)
        self.sync(loss)
        self.area(student_out[:, 0].sigmoid(), target % 2)
        self.rank(student_out[:, 0], student_out[:, 1])
        self.several(student_out, target % 2)
        for name in ("mean", "total", "sync", "area", "rank"):
            self.log(name, getattr(self, name), **both)
        self.log("epoch mean", self.mean, on_step=False, on_epoch=True)
        self.log_dict(self.several, **both)
        self.updated.update(loss)
        self.log("updated", self.updated, on_step=False, on_epoch=True)
        self.by_hand.update(loss)  # logged at the end of the epoch
        self.later.update(student_out[:, 0].detach(), target.double())

    def on_train_epoch_end(self) -> None:
        self.log("by hand", self.by_hand.compute(), prog_bar=True)
        self.log_dict(self.later.compute())
        self.by_hand.reset()
        self.later.reset()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        out = self.student(batch[0].double())
        self.val_area(out[:, 0].sigmoid(), batch[1] % 2)
        self.val_several.update(out, batch[1] % 2)
        self.log("val area", self.val_area, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_several.compute())
        self.val_several.reset()


@case(CASES)
def metrics(make: Make) -> Any:
    module = Metrics()
    found = fit(make, module)
    flags = [(m.sync_on_compute, m.dist_sync_on_step, m._to_sync) for m in module.modules() if isinstance(m, Metric)]
    return {**found, "flags": flags}


def test_metrics(twins: Twins) -> None:
    found = twins.same("metrics")["metrics"]
    assert found["mean_epoch"] == found["epoch mean"] == found["updated"] == found["by hand"]
    assert {"several MulticlassRecall_epoch", "val several MulticlassPrecision", "later twice", "rank_step"} <= set(
        found
    )


# --- hooks


class Hooks(Model):
    """Logs in every hook of training that may."""

    def say(self, loss: Tensor, student_out: Tensor, target: Any) -> None:
        self.log("loss", loss)

    def on_train_start(self) -> None:
        self.log("train start", 1.0)

    def on_train_epoch_start(self) -> None:
        self.log("epoch start", float(self.current_epoch))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("batch start", float(batch_idx))
        self.log("rows", float(len(batch[0])))

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("zero grad", optimizer.param_groups[0]["lr"], on_step=True, on_epoch=True)

    def on_before_backward(self, loss: Tensor) -> None:
        self.log("before", loss, on_step=True, on_epoch=True)

    def on_after_backward(self) -> None:
        self.log("after", float(self.global_step))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict({"optimizer": float(self.global_step)}, reduce_fx="sum", on_epoch=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("batch end", outputs["loss"], on_step=True, on_epoch=True, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self.log("epoch end", self.trainer.callback_metrics["before_epoch"] * 2)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def on_validation_start(self) -> None:
        self.log("val start", float(self.global_step))

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val rows", batch[0].double().mean())

    def on_validation_epoch_end(self) -> None:
        self.log("val end", float(self.global_step))


class Logs(Callback):
    """A callback that logs."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.log("callback", outputs["loss"] * 3, on_step=True, on_epoch=True)
        self.log_dict({"callback dict": outputs["loss"]})

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.logger is not None:
            trainer.logger.log_metrics({"direct": 2.0}, trainer.global_step)


@case(CASES)
def hooks(make: Make) -> Any:
    return fit(make, Hooks(), callbacks=[Logs()], accumulate_grad_batches=2)


def test_hooks(twins: Twins) -> None:
    found = twins.same("hooks")["metrics"]
    assert {"train start", "epoch start", "zero grad_epoch", "before_step", "callback_epoch", "callback dict"} <= set(
        found
    )
    assert {"val rows/dataloader_idx_1", "val end"} <= set(found)


# --- who listens


class Worsens(Model):
    """Its logged values have a turning point."""

    def say(self, loss: Tensor, student_out: Tensor, target: Any) -> None:
        self.log("curve", loss + float((self.current_epoch - 2) ** 2), on_epoch=True)
        self.log("fine", loss)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self.student(batch[0].double()) - 1).square().mean() * 0 + (self.current_epoch - 1) ** 2)


@case(CASES)
def stopping(make: Make) -> Any:
    found = []
    for flags in (
        {"monitor": "curve", "patience": 1, "check_on_train_epoch_end": True},
        {"monitor": "val", "patience": 1},
        {"monitor": "val", "patience": 1, "mode": "max"},
        {"monitor": "fine", "stopping_threshold": 1e9},
    ):
        stop = EarlyStopping(**flags)  # type: ignore[arg-type]
        run = make(callbacks=[stop], max_epochs=7)
        run.fit(module := Worsens(), rows(), loader(8))
        found.append({"stop": (stop.stopped_epoch, stop.wait_count, float(stop.best_score)), **state(run, module)})
    return found


def test_early_stopping(twins: Twins) -> None:
    assert [one["epoch"] for one in twins.same("stopping")] == [4, 3, 2, 1]


# --- files


class Written(Numbers):
    """Has hyperparameters."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


@case(CASES)
def files(make: Make) -> Any:
    folder = make.folder  # type: ignore[attr-defined]
    loggers = [CSVLogger(folder, "csv"), TensorBoardLogger(folder, "board", default_hp_metric=False)]
    run = make(logger=loggers, log_every_n_steps=2, max_epochs=2, val_check_interval=3, callbacks=[Logs()])
    run.fit(module := Written(), rows(), [loader(7, 3), loader(4, 4)])
    run.validate(module, loader(8), verbose=False)
    return Path(run.log_dir).relative_to(folder).parts


def lines(folder: Path) -> list[dict[str, Any]]:
    """A CSV file's rows, without empty cells."""
    (file,) = folder.rglob("metrics.csv")
    with file.open() as text:
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(text)]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a TensorBoard file, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (parent,) = {file.parent for file in folder.rglob("events.*")}
    events = EventAccumulator(str(parent))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_files_are_those_of_the_twin(twins: Twins) -> None:
    assert twins.same("files") == ("csv", "version_0")
    expected = twins.files("files", TWIN)
    rows, names = lines(expected), set(curves(expected))
    assert len(rows) > 8
    assert {"both_step", "both_epoch", "val max/dataloader_idx_1", "epoch"} <= names
    assert any("direct" in row for row in rows)
    assert "hidden_step" not in names
    for stages in PIPELINES:
        folder = twins.files("files", stages)
        assert len(list(folder.rglob("*.*"))) == len(list(expected.rglob("*.*")))
        for file in expected.rglob("*.yaml"):
            assert (folder / file.relative_to(expected)).read_text() == file.read_text()
        found = lines(folder)
        assert [list(row) for row in found] == [list(row) for row in rows]
        for row, other in zip(found, rows, strict=True):
            assert row == pytest.approx(other, rel=1e-12, abs=1e-12)
        for name, curve in curves(folder).items():
            assert curve == curves(expected)[name], name


def test_what_microbatches_log_is_joined(twins: Twins) -> None:
    found = twins.same("pieces")["metrics"]
    assert found["sum_epoch"] == sum(range(16))
    assert (found["min_epoch"], found["max_epoch"]) == (0, 15)

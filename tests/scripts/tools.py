"""Trainings with Lightning's callbacks, profilers and tuner; every rank leaves what they saw in a file."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    DeviceStatsMonitor,
    LambdaCallback,
    LearningRateFinder,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from lightning_tspipe import TSPipeStrategy
from tests.scripts.fits import save, scalars
from tests.scripts.small import Small, loader, trainer, weights


class Watched(Small):
    """Logs values for the bar, and runs whole networks in every kind of evaluation."""

    flops_per_batch = 1000

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.ones(2, 4)

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        loss = super().loss(student_out, teacher_out, target)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.student(batch[0]).mean(), prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.student(batch[0]).mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.student(batch[0])


class Bars(TQDMProgressBar):
    """Notes where each bar was at its end, and whether it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, Any] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_end(trainer, *args)
        bar = self.train_progress_bar
        self.ends["train"] = (bar.total, bar.n, not bar.disable, sorted(self.get_metrics(trainer, *args)))

    def on_validation_end(self, *args: Any) -> None:
        self.ends["validate"] = (self.val_progress_bar.total, self.val_progress_bar.n)
        super().on_validation_end(*args)


class Writer(BasePredictionWriter):
    """Keeps the predictions and the indices of their rows."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Any] = []
        self.epoch: Any = None

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *args: Any) -> None:
        self.batches.append((prediction, indices))

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
        self.epoch = (list(predictions), indices)


class Lines(logging.Handler):
    """Keeps what Lightning's callbacks say."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("lightning.pytorch.callbacks")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def make_trainer(twin: bool, **options: Any) -> L.Trainer:
    torch.set_num_threads(1)
    return trainer(1 if twin else 2, "auto" if twin else TSPipeStrategy(microbatches=2), **options)


def watched(rank: int, out: Path, twin: bool) -> None:
    """Fit with validation, test and predict under everything that watches."""
    rows: list[int] = []
    bars, timer, writer = Bars(), Timer(), Writer()
    callbacks = [
        bars, timer, writer, DeviceStatsMonitor(cpu_stats=True), ModelSummary(max_depth=2),
        ThroughputMonitor(lambda batch: batch[0].size(0), lambda batch: batch[0].numel(), window_size=3),
        LambdaCallback(on_train_batch_start=lambda trainer, module, batch, batch_idx: rows.append(len(batch[0]))),
    ]  # fmt: skip
    logger = CSVLogger(out, name="", version="csv")
    fit = make_trainer(twin, callbacks=callbacks, logger=logger, log_every_n_steps=2, max_epochs=2,
                       enable_progress_bar=True, enable_model_summary=True)  # fmt: skip
    said = Lines()
    module = Watched()
    fit.fit(module, loader(), loader(12))
    result = {"bars": bars.ends, "rows": rows, "elapsed": timer.time_elapsed("train"), "said": said.lines}
    fit.test(module, loader(8), verbose=False)
    fit.predict(module, loader(10))
    save(out / f"{rank}.pt", result | {"batches": writer.batches, "epoch": writer.epoch})


def stopped(rank: int, out: Path) -> None:
    """A timer whose time is over on one rank, and then on the other; then a spike of the loss."""
    found: dict[str, Any] = {}
    for late in (0, 1):
        timer = Timer(timedelta(hours=1))

        def wait(trainer: L.Trainer, *args: Any, timer: Timer = timer, late: int = late) -> None:
            if trainer.global_step == 3 and rank == late:
                timer._offset = 10**6

        fit = make_trainer(False, callbacks=[LambdaCallback(on_train_batch_start=wait), timer])
        fit.fit(Small(), loader())
        found[f"late {late}"] = fit.global_step
    fit = make_trainer(False, callbacks=[SpikeDetection(exclude_batches_path=str(out / f"skip{rank}.json"))])
    try:
        fit.fit(Jumpy(), loader())
    except TrainingSpikeException as error:
        found["spike"] = str(error)
    save(out / f"{rank}.pt", found)


class Jumpy(Small):
    """The fifth loss is large."""

    calls = 0

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        self.calls += 1
        return super().loss(student_out, teacher_out, target) * (1e4 if self.calls == 5 else 1)


class Tunable(Small):
    """In float64, with a learning rate to be found."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__(momentum=momentum, teacher_delay=1)
        self.lr = 0.001
        self.double()

    def student_input(self, batch: Any) -> Any:
        return batch[0].double()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.student(batch[0].double()).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.student.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def tuned(rank: int, out: Path, twin: bool) -> None:
    """`Tuner.lr_find`, and then the callback that does the same at the start of a fit."""
    found: list[Any] = []
    options: dict[str, Any] = {"default_root_dir": out, "max_epochs": 3}
    for momentum in (None, 0.9):
        module = Tunable(momentum)
        before = weights(module)
        finder = Tuner(make_trainer(twin, **options)).lr_find(module, loader(), num_training=20, min_lr=1e-5)
        assert finder is not None
        found.append({"results": finder.results, "lr": module.lr, "before": before, "after": weights(module)})
        module = Tunable(momentum)
        fit = make_trainer(twin, callbacks=[LearningRateFinder(num_training_steps=20, min_lr=1e-5)], **options)
        fit.fit(module, loader(), loader(8))
        found.append({"lr": module.lr, "steps": fit.global_step, "after": weights(module),
                      "metrics": scalars(fit.callback_metrics)})  # fmt: skip
    save(out / f"{rank}.pt", found)


class Copies(TorchCheckpointIO):
    """Notes what it writes."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.written.append(Path(path).name)
        super().save_checkpoint(checkpoint, path, storage_options)


def flagged(rank: int, out: Path) -> None:
    """Flags that are the process's, a plugin, and a fit without anything around it."""
    flags: set[Any] = set()
    note = LambdaCallback(
        on_after_backward=lambda *_: flags.add(
            (torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled())
        )
    )
    plugin = Copies()
    modules = [Watched(), Watched()]
    fit = make_trainer(False, callbacks=[note], detect_anomaly=True, deterministic=True, plugins=[plugin],
                       enable_checkpointing=True, default_root_dir=out)  # fmt: skip
    fit.fit(modules[0], loader())
    torch.use_deterministic_algorithms(False)
    make_trainer(False, barebones=True, **dict.fromkeys(BARE)).fit(modules[1], loader())
    save(out / f"{rank}.pt", {"flags": flags, "written": plugin.written, "weights": [weights(m) for m in modules]})


BARE = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
PROFILERS: dict[str, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def profiled(rank: int, out: Path) -> None:
    """A fit under each profiler; the actions of this rank's plan."""
    actions: dict[str, list[str]] = {}
    for name, kind in PROFILERS.items():
        options = {"row_limit": -1, "export_to_chrome": False, "schedule": None} if name == "pytorch" else {}
        row: list[str] = []
        note = LambdaCallback(
            on_train_end=lambda trainer, module, row=row: row.extend(map(str, trainer.strategy.plan.ranks[rank]))  # type: ignore[misc]
        )
        profiler = kind(dirpath=out, filename=name, **options)
        make_trainer(False, profiler=profiler, max_epochs=2, callbacks=[note]).fit(Watched(), loader(), loader(8))
        actions[name] = row
    save(out / f"{rank}.pt", actions)


def rich(rank: int, out: Path) -> None:
    """Rich's bar and summary."""
    callbacks = [RichProgressBar(), RichModelSummary(max_depth=2)]
    fit = make_trainer(False, callbacks=callbacks, enable_progress_bar=True, enable_model_summary=True)
    fit.fit(Watched(), loader(), loader(8))

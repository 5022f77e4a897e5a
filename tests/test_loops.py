"""Every way to bound and to interleave the loops: the pipeline sees, validates and ends as the sequential twin does."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tests.scripts.small import Small, loader
from tests.scripts.zygote import Zygote
from tests.twins import Case, Make, Twins, case, state

pytestmark = pytest.mark.timeout(120)
CASES: dict[str, Case] = {}
BATCHES = 8  # of the training loader


@pytest.fixture(scope="module")
def twins(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(zygote, tmp_path_factory.mktemp("loops"), "tests.test_loops", {1: 2, 3: 2})


class Model(Small):
    """A late momentum teacher in float64, which logs what it sees."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"momentum": 0.9, "teacher_delay": 1} | options))
        self.double()

    def student_input(self, batch: Any) -> Any:
        return batch[0].double()

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        loss = (student_out - teacher_out).square().mean()
        self.log("rows", target.double().mean(), on_step=True, on_epoch=True)
        return loss

    def gap(self, batch: Any) -> Tensor:
        return (self.student(batch[0].double()) - self.teacher(batch[0].double())).square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", self.gap(batch), batch_size=len(batch[0]))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test", self.gap(batch), batch_size=len(batch[0]))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.student(batch[0].double()), batch[1]


class Seen(L.Callback):
    """What happened, in order: batches with their loss, and validations with their result."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rows = float(trainer.callback_metrics["rows_step"])
        self.events.append(("batch", trainer.current_epoch, batch_idx, rows, float(outputs["loss"])))

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        word = "sanity" if trainer.sanity_checking else "validation"
        self.events.append((word, trainer.global_step, {k: float(v) for k, v in trainer.callback_metrics.items()}))

    def count(self, word: str) -> int:
        return sum(event[0] == word for event in self.events)


def shuffled(**options: Any) -> DataLoader[Any]:
    """Rows in an order that every epoch draws."""
    return loader(generator=torch.Generator().manual_seed(3), shuffle=True, **options)


def fit(make: Make, module: Any = None, train: Any = None, val: Any = None, **options: Any) -> dict[str, Any]:
    """A fit, what happened in it and what it left."""
    seen, module = Seen(), Model() if module is None else module
    fit = make(callbacks=[*options.pop("callbacks", []), seen], **options)
    fit.fit(module, shuffled() if train is None else train, val)
    return {
        "events": seen.events,
        "batches": seen.count("batch"),
        "validations": seen.count("validation"),
        "sanity": seen.count("sanity"),
        **state(fit, module),
    }


def many(make: Make, flags: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """A fit for each set of flags."""
    return [fit(make, val=loader(12, 5), **options, **one) for one in flags]


def counts(found: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(one[name] for name in names) for one in found]


# --- validation


@case(CASES)
def validation(make: Make) -> Any:
    flags: list[dict[str, Any]] = [
        {"num_sanity_val_steps": 2},
        {"num_sanity_val_steps": -1, "val_check_interval": 3},
        {"val_check_interval": 0.25},
        {"check_val_every_n_epoch": 2, "max_epochs": 3},
        {"check_val_every_n_epoch": None, "val_check_interval": 5, "max_epochs": 2},
        {"val_check_interval": 3, "accumulate_grad_batches": 2, "max_epochs": 2},
    ]
    return many(make, flags)


def test_when_validation_runs(twins: Twins) -> None:
    found = counts(twins.same("validation"), "sanity", "validations", "step", "epoch")
    assert found == [(1, 1, 8, 1), (1, 2, 8, 1), (0, 4, 8, 1), (0, 1, 24, 3), (0, 3, 16, 2), (0, 4, 8, 2)]


class Late(L.Callback):
    """Lets an hour pass before one batch; on other ranks before every batch, so that their clocks differ."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 or trainer.global_rank:
            trainer._last_val_time -= 3600


@case(CASES)
def by_time(make: Make) -> Any:
    return fit(make, val=loader(8), callbacks=[Late()], val_check_interval=timedelta(hours=1), max_epochs=2)


def test_validation_by_the_clock(twins: Twins) -> None:
    assert counts([twins.same("by_time")], "validations", "step") == [(2, 16)]


@case(CASES)
def several_loaders(make: Make) -> Any:
    found = fit(make, val=[loader(12, 5), loader(8, 3)], num_sanity_val_steps=1)
    run, module = make(), Model()
    return found, run.test(module, {"a": loader(8), "b": loader(4, 3)}, verbose=False), run.validate(
        module, CombinedLoader([loader(8), loader(4)], "sequential"), verbose=False
    )  # fmt: skip


def test_several_validation_loaders(twins: Twins) -> None:
    found, test, validate = twins.same("several_loaders")
    names = {"val/dataloader_idx_0", "val/dataloader_idx_1"}
    assert names <= set(found["metrics"])
    assert [list(one) for one in test] == [["test/dataloader_idx_0"], ["test/dataloader_idx_1"]]
    assert len(validate) == 2


# --- limits


@case(CASES)
def limits(make: Make) -> Any:
    flags: list[dict[str, Any]] = [
        {"limit_train_batches": 3, "limit_val_batches": 1, "max_epochs": 2},
        {"limit_train_batches": 0.5, "limit_val_batches": 0.4},
        {"limit_train_batches": 0, "num_sanity_val_steps": 1},
        {"limit_val_batches": 0},
        {"overfit_batches": 2, "max_epochs": 2},
        {"overfit_batches": 0.5},
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
    ]
    return many(make, flags)


def test_limits(twins: Twins) -> None:
    found = counts(twins.same("limits"), "batches", "validations", "step", "epoch")
    assert found == [(6, 2, 6, 2), (4, 1, 4, 1), (0, 0, 0, 0), (8, 0, 8, 1), (4, 2, 4, 2), (4, 1, 4, 1), (1, 1, 1, 1),
                     (3, 1, 3, 1)]  # fmt: skip


class Stops(L.Callback):
    """Asks for the end after so many batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches -= 1
        if self.batches == 0:
            trainer.should_stop = True


@case(CASES)
def ends(make: Make) -> Any:
    flags: list[dict[str, Any]] = [
        {"max_steps": 5},
        {"max_steps": 5, "accumulate_grad_batches": 2, "max_epochs": -1},
        {"max_steps": 8, "max_epochs": -1},
        {"max_steps": 0},
        {"max_epochs": 0},
        {"max_time": timedelta(microseconds=1), "min_steps": 3, "min_epochs": 0},
        {"callbacks": [Stops(5)], "max_epochs": 3},
        {"callbacks": [Stops(5)], "max_epochs": 3, "accumulate_grad_batches": 2},
        {"callbacks": [Stops(1)], "max_epochs": 5, "min_epochs": 2},
        {"callbacks": [Stops(1)], "max_epochs": 5, "min_steps": 11},
        {"callbacks": [Stops(8)], "max_epochs": 3},
    ]
    return many(make, flags)


def test_when_training_ends(twins: Twins) -> None:
    found = counts(twins.same("ends"), "batches", "validations", "step", "epoch")
    assert found == [(5, 0, 5, 1), (10, 1, 5, 2), (8, 1, 8, 1), (0, 0, 0, 0), (0, 0, 0, 0), (3, 1, 3, 1), (5, 1, 5, 1),
                     (5, 1, 2, 1), (16, 2, 16, 2), (11, 2, 11, 2), (8, 1, 8, 1)]  # fmt: skip


class Skips(Model):
    """Skips the rest of the epoch; by the number of the batch, or by what is in it."""

    def __init__(self, by_content: bool, **options: Any) -> None:
        super().__init__(**options)
        self.by_content = by_content

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        if self.by_content:
            return -1 if not batch[1].is_meta and 5 in batch[1] else None
        return -1 if batch_idx == 3 * (self.current_epoch % 2) else None


@case(CASES)
def skips(make: Make) -> Any:
    return [
        fit(make, Skips(content, teacher_delay=delay), val=loader(8), max_epochs=4)
        for content in (False, True)
        for delay in (0, 1)
    ]


def test_a_hook_skips_the_rest_of_the_epoch(twins: Twins) -> None:
    by_number, _, by_content, _ = counts(twins.same("skips"), "batches", "validations", "step", "epoch")
    assert by_number == (6, 0, 6, 4)
    assert 0 < by_content[0] < 4 * BATCHES


# --- kinds of data


class Stream(IterableDataset[Any]):
    """Rows without a length."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        data = torch.randn(self.rows, 4, generator=torch.Generator().manual_seed(2))
        yield from zip(data, torch.arange(self.rows), strict=True)


@case(CASES)
def streams(make: Make) -> Any:
    flags: list[dict[str, Any]] = [
        {"max_epochs": 2},
        {"limit_train_batches": 3, "limit_val_batches": 1, "max_epochs": 2},
        {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_epochs": 2},
        {"max_steps": 7, "max_epochs": -1},
        {"accumulate_grad_batches": 2, "max_epochs": 2},
        {"callbacks": [Stops(2)], "max_epochs": 2},
    ]
    return [fit(make, train=DataLoader(Stream(18), 4), val=DataLoader(Stream(7), 3), **one) for one in flags]


def test_loaders_without_length(twins: Twins) -> None:
    found = counts(twins.same("streams"), "batches", "validations", "step", "epoch")
    assert found == [(10, 2, 10, 2), (6, 2, 6, 2), (10, 5, 10, 2), (7, 1, 7, 2), (10, 2, 6, 2), (2, 1, 2, 1)]


class Named(Model):
    """Its batch is a dict of two loaders' batches: the student sees one, the teacher the other."""

    def student_input(self, batch: Any) -> Any:
        return batch["a"][0].double()

    def teacher_input(self, batch: Any) -> Any:
        return batch["b"][0].double()

    def target(self, batch: Any) -> Any:
        return batch["a"][1] + 100 * batch["b"][1]


@case(CASES)
def combined(make: Make) -> Any:
    def loaders() -> dict[str, Any]:
        return {"a": loader(generator=torch.Generator().manual_seed(3), shuffle=True), "b": loader(20)}

    found = [
        fit(make, Named(), CombinedLoader(loaders(), mode), max_epochs=2)
        for mode in ("max_size_cycle", "min_size")
    ]  # fmt: skip
    return [*found, fit(make, Named(), loaders())]


def test_combined_loaders(twins: Twins) -> None:
    assert counts(twins.same("combined"), "batches") == [(16,), (10,), (8,)]


class Reloading(Model):
    """Gives other rows every time it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def _loader(self, kind: str, rows: int) -> Any:
        self.asked.append((kind, self.trainer.current_epoch))
        return loader(rows + 4 * self.trainer.current_epoch)

    def train_dataloader(self) -> Any:
        return self._loader("train", 8)

    def val_dataloader(self) -> Any:
        return self._loader("val", 4)


@case(CASES)
def reloads(make: Make) -> Any:
    found = []
    for every in (0, 1, 2):
        seen, module = Seen(), Reloading()
        run = make(callbacks=[seen], reload_dataloaders_every_n_epochs=every, max_epochs=4, num_sanity_val_steps=1)
        run.fit(module)
        found.append({"asked": module.asked, "events": seen.events, **state(run, module)})
    return found


def test_loaders_are_made_anew(twins: Twins) -> None:
    never, always, second = (one["asked"] for one in twins.same("reloads"))
    assert [epoch for kind, epoch in never if kind == "train"] == [0]
    assert [epoch for kind, epoch in always if kind == "train"] == [0, 1, 2, 3]
    assert [epoch for kind, epoch in second if kind == "train"] == [0, 2]


class Data(L.LightningDataModule):
    """All loaders, and the hooks that a batch passes."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[Any] = []

    def setup(self, stage: str) -> None:
        self.stages.append(TrainerFn(stage).value)

    def teardown(self, stage: str) -> None:
        self.stages.append(f"end of {TrainerFn(stage).value}")

    def train_dataloader(self) -> Any:
        return shuffled()

    def val_dataloader(self) -> Any:
        return loader(12, 5)

    test_dataloader = predict_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return super().transfer_batch_to_device([batch[0] * 2, batch[1]], device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] - 3, batch[1]]


@case(CASES)
def datamodule(make: Make) -> Any:
    seen, module, data = Seen(), Model(), Data()
    run = make(callbacks=[seen], max_epochs=2)
    run.fit(module, datamodule=data)
    results = [run.validate(module, datamodule=data, verbose=False)]
    results += [run.test(module, datamodule=data, verbose=False)]
    return {
        "results": results,
        "predictions": run.predict(module, datamodule=data),
        "stages": data.stages,
        "events": seen.events,
        **state(run, module),
    }


def test_a_datamodule(twins: Twins) -> None:
    words = ["fit", "validate", "test", "predict"]
    assert twins.same("datamodule")["stages"] == [text for word in words for text in (word, f"end of {word}")]


# --- evaluation alone, and several calls


class Writer(BasePredictionWriter):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Any] = []
        self.whole: list[Any] = []

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *rest: Any) -> None:
        self.batches.append((prediction, indices, rest[1:]))

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, batch_indices: Any) -> None:
        self.whole.append((predictions, batch_indices))


@case(CASES)
def evaluation(make: Make) -> Any:
    module, found = Model(), []
    for _ in range(2):
        for limit in (1.0, 2, 0.4, 0):
            run = make(limit_val_batches=limit, limit_test_batches=limit, limit_predict_batches=limit)
            found.append((run.validate(module, loader(12, 5), verbose=False), dict(run.callback_metrics)))
            found.append((run.test(module, loader(12, 5), verbose=False), dict(run.callback_metrics)))
            found.append(run.predict(module, loader(12, 5)))
            found.append(run.predict(module, [loader(12, 5), DataLoader(Stream(5), 3)]) if limit != 0.4 else None)
        make().fit(module, shuffled())
    writer = Writer()
    make(callbacks=[writer]).predict(module, loader(12, 5, shuffle=True, generator=torch.Generator().manual_seed(5)))
    return {"found": found, "batches": writer.batches, "whole": writer.whole}


def test_evaluation_alone(twins: Twins) -> None:
    expected = twins.same("evaluation")
    _, _, whole, two, *_ = expected["found"]
    assert [len(output) for output, _ in whole] == [5, 5, 2]
    assert torch.equal(torch.cat([rows for _, rows in whole]), torch.arange(12))
    assert [[len(output) for output, _ in one] for one in two] == [[5, 5, 2], [3, 2]]
    ((predictions, indices),) = expected["whole"]
    assert [rows.tolist() for _, rows in predictions] == indices[0]


@case(CASES)
def several_fits(make: Make) -> Any:
    found, seen = [], Seen()
    run, module = make(callbacks=[seen], max_epochs=1), Model()
    for epochs in (1, 2, 3):  # one trainer goes on
        run.fit_loop.max_epochs = epochs
        run.fit(module, shuffled(), loader(8))
        found.append(state(run, module))
    for delay in (0, 1):  # one trainer, another module
        run, seen = make(callbacks=[seen], max_steps=3 + 2 * delay), Seen()
        run.fit(other := Model(teacher_delay=delay), shuffled(), loader(8))
        found += [state(run, other), run.test(other, loader(8), verbose=False)]
    found.append(fit(make, module, val=loader(8)))  # one module, another trainer
    found.append(fit(make, module, val=loader(8), limit_train_batches=3))
    return {"found": found, "events": seen.events}


def test_several_fits_in_a_row(twins: Twins) -> None:
    found = twins.same("several_fits")["found"]
    assert [one["step"] for one in found if isinstance(one, dict)] == [8, 16, 24, 3, 5, 8, 3]

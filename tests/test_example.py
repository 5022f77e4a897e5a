"""Where an example of the networks' input comes from."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_tspipe import _lightning
from lightning_tspipe.example import Examples
from tests.scripts.small import Small, loader, trainer


class Views(Small):
    """Two views; the teacher sees one."""

    def student_input(self, batch: Any) -> Any:
        return [batch[0], {"x": batch[0][:, :2]}]

    def teacher_input(self, batch: Any) -> Any:
        return batch[0]


class Random(Dataset[Any]):
    """Draws random numbers for each of its samples."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        return torch.rand(4) + random.random(), index


class Endless(IterableDataset[Any]):
    """A stream."""

    def __iter__(self) -> Any:
        while True:
            yield torch.rand(4)


class Data(L.LightningDataModule):
    """Gives its loader by a hook."""

    def train_dataloader(self) -> Any:
        return {"labelled": DataLoader(Random(), 4)}


def examples(module: Any, train: Any = None, datamodule: Any = None) -> Examples:
    """What the strategy makes when a fit begins."""
    fit = trainer(1, "auto")
    fit.state.fn = TrainerFn.FITTING
    fit.strategy.connect(module)
    module.trainer = fit
    fit._data_connector.attach_data(module, train_dataloaders=train, datamodule=datamodule)
    return Examples(fit, module, lambda value: value)


def shapes(values: list[Any]) -> list[Any]:
    return [{k: tuple(t.shape) for k, t in v.items()} if isinstance(v, dict) else tuple(v.shape) for v in values]


def test_the_input_hooks_make_it_from_the_data() -> None:
    """A view each, of two rows, without memory; no generator moves, and no sampler is asked."""
    found = examples(Views(), DataLoader(Random(), 4, shuffle=True))
    before = torch.get_rng_state(), random.getstate()
    assert shapes(found.of("student")) == [(2, 4), {"x": (2, 2)}]
    assert shapes(found.of("teacher")) == [(2, 4)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert all(value.is_meta for value in found.of("teacher") if isinstance(value, Tensor))


def test_a_datamodule_and_a_collection_of_loaders() -> None:
    class OfDict(Small):
        def student_input(self, batch: Any) -> Any:
            return batch["labelled"][0]

    assert shapes(examples(OfDict(), datamodule=Data()).of("student")) == [(2, 4)]


def test_example_input_array_comes_first() -> None:
    module = Small()
    module.example_input_array = torch.rand(3, 4)
    assert shapes(examples(module, loader()).of("teacher")) == [(3, 4)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(DataLoader(Endless(), 4), "nothing can be taken from a Endless"), (iter([1]), "from a list_iterator")],
)
def test_a_stream_is_left_alone(data: Any, reason: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"{reason}.*self\.example_input_array"):
        examples(Small(), data).of("student")


def test_a_loader_is_asked_for_once_and_not_kept_for_another_run() -> None:
    """The trainer gets the one that was looked at; a run that failed before it asked leaves nothing to the next."""

    class Counts(Data):
        asked = 0

        def train_dataloader(self) -> Any:
            self.asked += 1
            return super().train_dataloader()

    data, module = Counts(), Small()
    examples(module, datamodule=data)
    source = module.trainer.fit_loop._data_source
    looked_at = _lightning.loader_of(module.trainer)
    assert _lightning.loader_of(module.trainer) is looked_at
    assert source.dataloader() is looked_at
    assert data.asked == 1
    assert source.dataloader() is not looked_at
    looked_at = _lightning.loader_of(module.trainer)
    _lightning.forget_loader(module.trainer)
    assert source.dataloader() is not looked_at

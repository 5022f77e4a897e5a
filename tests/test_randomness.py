"""Looking at samples before a training moves no generator, also none that the user's data holds."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_tspipe.randomness import Generators, kept
from tests.multiproc import TWIN, Fit, run_fits
from tests.scripts.small import Small

CPU = torch.device("cpu")
RNG = numpy.random.default_rng(3)  # a global that a function names


class Held(Dataset[Any]):
    """Draws from generators in every place that a search has to look into."""

    def __init__(self) -> None:
        within = random.Random(1)
        self.parts = {"list": [torch.Generator().manual_seed(2)]}
        self.function, self.method = lambda: within.random() - 1, random.Random(6).random
        self.other = partial(lambda state: float(state.rand()), numpy.random.RandomState(4))

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        numbers = [float(torch.rand((), generator=self.parts["list"][0])), self.function(), self.other(), RNG.random()]
        numbers.append(self.method())
        return torch.tensor(numbers, dtype=torch.float32)


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self) -> float:
        return float(torch.rand((), generator=self.generator))


def test_every_generator_is_put_back() -> None:
    held, noise = Held(), Noise()

    def draws() -> list[float]:
        everywhere = [float(torch.rand(())), random.random(), numpy.random.random(), noise()]
        return [*held[0].tolist(), *everywhere]

    with kept(CPU, DataLoader(held), noise):
        first = draws()
    with kept(CPU, DataLoader(held), noise):
        assert draws() == first
        assert all(a != b for a, b in zip(draws(), first, strict=True))
    assert draws() == first


def test_a_state_can_be_restored() -> None:
    generators = Generators(CPU)
    state = generators.state()
    first = [float(torch.rand(())), random.random(), numpy.random.random()]
    generators.restore(state)
    assert [float(torch.rand(())), random.random(), numpy.random.random()] == first


def own_randomness() -> DataLoader[Any]:
    """Order and noise from one generator, as a user writes it who wants each run to see the same."""
    generator = torch.Generator().manual_seed(1)
    data = list(torch.randn(24, 4, generator=torch.Generator().manual_seed(2)))

    def noisy(rows: list[Tensor]) -> Any:
        x = torch.stack(rows)
        return x + torch.rand(x.shape, generator=generator), torch.rand(len(x), generator=generator)

    return DataLoader(data, 4, shuffle=True, generator=generator, collate_fn=noisy)  # type: ignore[arg-type]


@pytest.mark.parametrize("balance", ["auto", "parameters"])
def test_a_measured_training_sees_the_batches_of_the_twin(balance: str) -> None:
    options = {"max_epochs": 2}
    fits = [Fit(Small, own_randomness, stages, 2, None, {"balance": balance}, options) for stages in (TWIN, 2)]
    (twin,), ranks = run_fits(fits)
    for rank in ranks:
        expected = [float(loss) for loss in twin["losses"]]
        assert [float(loss) for loss in rank["losses"]] == pytest.approx(expected, rel=1e-5)

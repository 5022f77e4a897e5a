"""The same code path on GPUs: equality with the sequential twin, and no wait for the device in a steady step.

The cases with the device "cpu" run everywhere: they show that these tests can pass, and fail, without a GPU too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from tests.scripts.zygote import Zygote

pytestmark = pytest.mark.timeout(120)
GPUS = torch.cuda.device_count()


def on(device: str, gpus: int = 1) -> Any:
    """A parameter for a device, skipped where there are too few GPUs."""
    reason = f"needs {gpus} CUDA device(s), there are {GPUS}"
    marks = [pytest.mark.cuda, pytest.mark.skipif(gpus > GPUS, reason=reason)]
    return pytest.param(device, marks=marks if device == "cuda" else [])


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    server = Zygote(visible_gpus=None)
    yield server
    server.close()


class Pair(TeacherStudentModule):
    """A momentum pair in float64."""

    def __init__(self) -> None:
        super().__init__(momentum=0.9, teacher_delay=1)
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2)).double()
        self.teacher = copy.deepcopy(self.student)

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        assert student_out.device.type == self.trainer.strategy.root_device.type
        return (student_out - teacher_out - target).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9)


class Unsynchronised(L.Callback):
    """Makes every wait of the host for the device an error, from the third batch on."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if batch_idx >= 2 else "default")

    def on_train_epoch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def batches() -> DataLoader[Any]:
    data = torch.randn(48, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data, data[:, :2].sin()), 8, pin_memory=GPUS > 0)


def train(rank: int, out: Path, places: list[str], backend: str | None, unsynchronised: bool) -> None:
    """What every rank runs; no place means the twin. Rank 0 writes the whole module's state."""
    strategy: Any = "auto"
    options: dict[str, Any] = {"accelerator": "gpu" if GPUS else "cpu", "devices": 1}
    if places:
        devices = [torch.device(place) for place in places]
        strategy = TSPipeStrategy(microbatches=2, parallel_devices=devices, process_group_backend=backend)
        options = {}
    trainer = L.Trainer(
        strategy=strategy, max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Unsynchronised()] if unsynchronised else [], **options,
    )  # fmt: skip
    module = Pair()
    trainer.fit(module, batches())
    assert trainer.world_size == max(1, len(places))
    if rank == 0:
        torch.save({name: value.cpu() for name, value in module.state_dict().items()}, out / "state.pt")


def run(
    zygote: Zygote, folder: Path, places: list[str], backend: str | None = None, unsynchronised: bool = False
) -> dict[str, Any]:
    folder.mkdir()
    ranks = max(1, len(places))
    arguments = {"places": places, "backend": backend, "unsynchronised": unsynchronised}
    codes = zygote.run("tests.test_cuda:train", ranks, folder, deadline=90, **arguments)
    assert codes == [0] * ranks, "\n".join((folder / f"{rank}.txt").read_text() for rank in range(ranks))
    return dict(torch.load(folder / "state.pt"))


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("device", [on("cpu"), on("cuda")])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_ranks_that_share_a_device_equal_the_twin(zygote: Zygote, tmp_path: Path, device: str, stages: int) -> None:
    """On a GPU, gloo stages every message through host memory."""
    place = "cuda:0" if device == "cuda" else device
    assert_equal(run(zygote, tmp_path / "pipe", [place] * stages, "gloo"), run(zygote, tmp_path / "twin", []))


@pytest.mark.parametrize("device", [on("cuda", 2)])
def test_nccl_equals_the_twin(zygote: Zygote, tmp_path: Path, device: str) -> None:
    assert_equal(run(zygote, tmp_path / "pipe", ["cuda:0", "cuda:1"], "nccl"), run(zygote, tmp_path / "twin", []))


@pytest.mark.parametrize("device", [on("cuda")])
def test_one_stage_never_waits_for_the_device(zygote: Zygote, tmp_path: Path, device: str) -> None:
    run(zygote, tmp_path / "pipe", ["cuda:0"], None, unsynchronised=True)


@pytest.mark.parametrize("device", [on("cuda", 2)])
def test_nccl_never_waits_for_the_device(zygote: Zygote, tmp_path: Path, device: str) -> None:
    run(zygote, tmp_path / "pipe", ["cuda:0", "cuda:1"], "nccl", unsynchronised=True)

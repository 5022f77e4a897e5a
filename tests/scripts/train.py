"""A training that goes on until something ends it; the caller says what.

TSPIPE_TEST_DIR is where each rank writes ``<rank>.pid`` when it has made some steps.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_tspipe import PipelineMonitor, TSPipeStrategy
from tests.scripts.small import Small, trainer

STEPS_BEFORE = 3
FAULT = ""  # what raises: "loss", "forward:<layer>" or "loader"


class BrokenLayer(nn.Module):
    """Raises in its seventh forward."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls, self.scale = name, 0, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 6:
            raise ArithmeticError(f"broken {self.name}")
        return x * self.scale


class Endless(Dataset[Any]):
    """Many rows."""

    def __len__(self) -> int:
        return 10**7

    def __getitem__(self, index: int) -> Any:
        if FAULT == "loader" and index > 20:
            raise ArithmeticError("broken loader")
        return torch.full((4,), index / 1e7), index


class Model(Small):
    """One layer per stage for three stages."""

    def __init__(self) -> None:
        super().__init__()
        if FAULT.startswith("forward:"):
            self.student[int(FAULT[-1])] = nn.Sequential(self.student[int(FAULT[-1])], BrokenLayer(FAULT))
        self.calls = 0

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        self.calls += 1
        if FAULT == "loss" and self.calls > 3:
            raise ArithmeticError("broken loss")
        return super().loss(student_out, teacher_out, target)


class Marker(L.Callback):
    """Says when training is under way, and sends this rank a signal some time later if it is a victim."""

    def __init__(self, victims: list[int], number: int, delay: float) -> None:
        self._victims, self._number, self._delay = victims, number, delay

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step != STEPS_BEFORE:
            return
        folder, rank = Path(os.environ["TSPIPE_TEST_DIR"]), trainer.global_rank
        (folder / f"{rank}.new").write_text(str(os.getpid()))
        (folder / f"{rank}.new").rename(folder / f"{rank}.pid")
        if rank in self._victims:
            threading.Timer(self._delay, self._strike, [folder / f"{rank}.struck"]).start()

    def _strike(self, file: Path) -> None:
        file.write_text(str(time.time()))
        os.kill(os.getpid(), self._number)


def run(
    rank: int,
    out: Path,
    fault: str = "",
    victims: tuple[int, ...] = (),
    number: int = 0,
    delay: float = 0.0,
    devices: int = 3,
    start_method: Any = "popen",
    stages: Any = "auto",
    monitored: bool = False,
) -> None:
    """One rank, or the whole script; the victims send themselves that signal after the delay."""
    global FAULT  # noqa: PLW0603  the loader's and the model's code sees it in every process
    FAULT = fault
    os.environ.setdefault("TSPIPE_TEST_DIR", str(out))
    torch.set_num_threads(1)
    balance: Any = "auto"
    if fault.startswith("forward:"):  # the broken layer adds one to its stage
        balance = {"student": [1 + (stage == int(fault[-1])) for stage in range(3)], "teacher": [1, 1, 1]}
    strategy = TSPipeStrategy(stages, microbatches=2, balance=balance, start_method=start_method)
    callbacks: list[L.Callback] = [Marker(list(victims), number, delay), *([PipelineMonitor(1)] * monitored)]
    fit = trainer(devices, strategy, callbacks=callbacks, logger=CSVLogger(out) if monitored else False)
    fit.fit(Model(), DataLoader(Endless(), 4))


def run_and_end_main(rank: int, out: Path, number: int) -> None:
    """The main process of a forked job is sent a signal once both ranks train."""

    def strike() -> None:
        while len(list(out.glob("*.pid"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=strike, daemon=True).start()
    run(rank, out, devices=2, start_method="fork")


if __name__ == "__main__":
    run(0, Path(), devices=int(os.environ["TSPIPE_TEST_DEVICES"]))

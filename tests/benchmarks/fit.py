"""A ``Trainer.fit`` on forked processes, timed and weighed on every rank."""

import json
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_tspipe import monitor
from tests.benchmarks.measure import step_seconds
from tests.benchmarks.processes import status


@dataclass(frozen=True)
class Fit:
    """What a fit took.

    Attributes:
        step_s: Seconds of a steady step.
        peak_bytes: Peak memory (`peak_bytes`) of every rank's process until the end of training, the set-up included.
    """

    step_s: float
    peak_bytes: list[int]


class Record(L.Callback):
    """Notes on every rank when each step ended, and the peak memory until training ends, in one file per rank.

    After that a pipeline's module becomes whole again on every rank, as DDP's always is.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends: list[float] = []

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        record = {"ends": self.ends, "peak_bytes": peak_bytes(), **self.more()}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(record))

    def more(self) -> dict[str, Any]:
        """What else goes into the file."""
        return {}


def peak_bytes() -> int:
    """Peak memory of this process so far, without pages of library files; a forked process starts at what it inherits.

    Whoever imports a library has its pages, idle or not, and shares them with all others that did. Only a forked
    process begins without, and would be charged for each page of them as it comes to use it.
    """
    files = status("RssFile") if sys.platform == "linux" else 0
    return monitor.peak_bytes(torch.device("cpu")) - files


def timed_fit(
    module: L.LightningModule,
    loader: DataLoader[tuple[Tensor, ...]],
    strategy: Strategy,
    num_processes: int,
    num_steps: int,
    **options: Any,
) -> Fit:
    """Train for ``num_steps`` steps; the trained weights are in ``module`` afterwards.

    Args:
        module: What to train.
        loader: Batches as the strategy wants them.
        strategy: One that forks its processes.
        num_processes: Processes on this machine.
        num_steps: Optimizer steps.
        options: More of the trainer's.
    """
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=num_processes,
            strategy=strategy,
            max_steps=num_steps,
            callbacks=[Record(Path(folder))],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, loader)
        records = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_processes)]
    short = [rank for rank, record in enumerate(records) if len(record["ends"]) != num_steps]
    if short:
        raise RuntimeError(f"ranks {short} did not end {num_steps} batches")
    return Fit(step_seconds([record["ends"] for record in records]), [record["peak_bytes"] for record in records])

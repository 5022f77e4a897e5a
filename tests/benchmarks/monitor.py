"""What `PipelineMonitor` costs: steps with and without it in one and the same fit, by turns."""

import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_tspipe import PipelineMonitor, TSPipeStrategy
from tests.benchmarks.ours import EmulatedPair
from tests.benchmarks.problem import Problem
from tests.benchmarks.processes import run_forked

EVERY, NUM_BLOCKS = 10, 160
PROBLEM = Problem(2, 24, NUM_BLOCKS * EVERY, 0.0, 0.0, 0.0, 0.0)  # a step is nothing but the runtime's cost


@dataclass(frozen=True)
class Cost:
    """What watching one step in 10 adds where a step is shortest.

    Attributes:
        problem: The problem's name.
        step_s: Seconds of a step without the monitor, the median.
        share: What it adds: the median over pairs of neighbouring blocks of 10 steps, with it and without.
        own_share: Seconds in the monitor's hooks over the seconds of its steps; what it adds to actions is not in it.
    """

    problem: str
    step_s: float
    share: float
    own_share: float


class ByTurns(PipelineMonitor):
    """Works in every second block of steps only, and notes when each step ended and how long the hook took."""

    def __init__(self, folder: Path) -> None:
        super().__init__(EVERY)
        self.folder = folder
        self.ends: list[float] = []
        self.own: list[float] = []

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        start = time.perf_counter()
        if len(self.ends) // EVERY % 2:
            super().on_train_batch_end(trainer, *args)
        self.ends.append(time.perf_counter())
        self.own.append(self.ends[-1] - start)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            (self.folder / "notes.json").write_text(json.dumps([self.ends, self.own]))


def measure_monitor() -> list[Cost]:
    """One fit."""
    [(ends, own)] = run_forked(_train, 1, PROBLEM, timeout_s=PROBLEM.timeout_s)
    steps = [after - before for before, after in itertools.pairwise(ends)]  # the second one first
    starts = range(2 * EVERY, len(ends) - 2 * EVERY, 2 * EVERY)  # of blocks without it, the first one left out
    pairs = [(sum(steps[at - 1 : at + EVERY - 1]), sum(steps[at + EVERY - 1 : at + 2 * EVERY - 1])) for at in starts]
    share = statistics.median(monitored / plain for plain, monitored in pairs) - 1
    hooks = sum(sum(own[at + EVERY : at + 2 * EVERY]) for at in starts)
    return [Cost(PROBLEM.name, statistics.median(steps), share, hooks / sum(monitored for _, monitored in pairs))]


def _train(_: int, problem: Problem) -> tuple[list[float], list[float]]:
    loader = DataLoader(TensorDataset(problem.samples()), batch_size=problem.num_microbatches * problem.rows)
    strategy = TSPipeStrategy(microbatches=problem.num_microbatches, balance="parameters", start_method="fork")
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", devices=problem.num_stages, strategy=strategy, max_steps=problem.num_steps,
            callbacks=[ByTurns(Path(folder))], logger=CSVLogger(folder), enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10**9,
        )  # fmt: skip
        trainer.fit(EmulatedPair(problem), loader)
        ends, own = json.loads(Path(folder, "notes.json").read_text())
    return ends, own

"""What `PipelineMonitor` costs: the steps in which it works against their neighbours in the same fit."""

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

EVERY, NUM_STEPS = 10, 1600
TOUCHED = (0, 1, 2)  # of every ten batches one is timed, in the next its numbers are sent, and then they are logged
DEFAULT = 50  # `log_every_n_steps` of the trainer
PROBLEM = Problem(2, 24, NUM_STEPS, 0.0, 0.0, 0.0, 0.0)  # a step is nothing but the runtime's cost


@dataclass(frozen=True)
class Cost:
    """What watching adds where a step is shortest.

    Attributes:
        problem: The problem's name.
        step_s: Seconds of a step that is left alone, the median.
        more_s: Seconds that one look adds to the three steps that it touches: the median over all looks.
        hook_s: Seconds of its hook after a step, the median, which is of a step that is left alone.
        share: A look, and the hook after each of 50 steps, over their time; by default there is one look in them.
    """

    problem: str
    step_s: float
    more_s: float
    hook_s: float
    share: float


class Timed(PipelineMonitor):
    """Notes when each step ended, and how long its own hook took."""

    def __init__(self, folder: Path) -> None:
        super().__init__(EVERY)
        self.folder = folder
        self.ends: list[tuple[float, float]] = []

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        start = time.perf_counter()
        super().on_train_batch_end(trainer, *args)
        end = time.perf_counter()
        self.ends.append((end, end - start))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            (self.folder / "ends.json").write_text(json.dumps(self.ends))


def measure_monitor() -> list[Cost]:
    """One fit."""
    [pairs] = run_forked(_train, 1, PROBLEM, timeout_s=PROBLEM.timeout_s)
    ends, hooks = zip(*pairs, strict=True)
    steps = [0.0, 0.0, *(after - before for before, after in itertools.pairwise(ends))]  # by number, from 1
    looks = []
    for first in range(2 * EVERY, NUM_STEPS - EVERY, EVERY):
        touched = [steps[first + place] for place in TOUCHED]
        alone = [steps[first + place] for place in range(-3, EVERY - 1) if place not in (*TOUCHED, -1)]
        looks.append((sum(touched), statistics.median(alone)))
    step_s = statistics.median(alone for _, alone in looks)
    more_s = statistics.median(touched - len(TOUCHED) * alone for touched, alone in looks)
    hook_s = statistics.median(hooks)
    return [Cost(PROBLEM.name, step_s, more_s, hook_s, (more_s + DEFAULT * hook_s) / (DEFAULT * step_s))]


def _train(_: int, problem: Problem) -> list[tuple[float, float]]:
    loader = DataLoader(TensorDataset(problem.samples()), batch_size=problem.num_microbatches * problem.rows)
    strategy = TSPipeStrategy(microbatches=problem.num_microbatches, balance="parameters", start_method="fork")
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", devices=problem.num_stages, strategy=strategy, max_steps=problem.num_steps,
            callbacks=[Timed(Path(folder))], logger=CSVLogger(folder), enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10**9,
        )  # fmt: skip
        trainer.fit(EmulatedPair(problem), loader)
        ends: list[tuple[float, float]] = json.loads(Path(folder, "ends.json").read_text())
    return ends

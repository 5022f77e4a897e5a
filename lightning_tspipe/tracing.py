"""The callback that writes what every rank did, beside the plan."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_tspipe.journal import Journal, planned
from lightning_tspipe.monitor import strategy_of
from lightning_tspipe.perfetto import trace_of
from lightning_tspipe.picture import draw_png
from lightning_tspipe.stopwatch import Stopwatch

SHOWN = 2  # steps in the picture


class PipelineTrace(pl.Callback):
    """Records some batches, action by action, and at the end of the training writes them with the plan.

    Args:
        out: path of the files without their endings: `out`.json for Perfetto or chrome://tracing, and `out`.png.
        first: the first batch that is recorded, from 0.
        steps: how many are.

    Raises:
        ValueError: less than 4 steps, of which the first and the last ones are not steady.
        MisconfigurationException: the trainer has another strategy.
    """

    def __init__(self, out: str | Path = "trace", first: int = 0, steps: int = 20) -> None:
        if steps < 4 or first < 0:
            raise ValueError(f"first={first}, steps={steps}: give at least 4 steps, from 0 or a later one on")
        self._out, self._first, self._steps = Path(out), first, steps
        self._batches = 0
        self._watch: Stopwatch | None = None
        self.measured: Journal | None = None  # on rank 0, after the training
        self.planned: Journal | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy_of(trainer, type(self).__name__)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches, self._watch = 0, None
        self._turn(trainer)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        self._batches += 1
        self._turn(trainer)

    def _turn(self, trainer: pl.Trainer) -> None:
        """On before the first batch, off after the last."""
        runtime = strategy_of(trainer, type(self).__name__).runtime
        assert runtime is not None
        if self._batches == self._first:
            self._watch = runtime.stopwatch = Stopwatch(runtime.device, aligned=True)
        elif self._batches == self._first + self._steps:
            runtime.stopwatch = None

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = strategy_of(trainer, type(self).__name__)
        runtime = strategy.runtime
        assert runtime is not None
        runtime.stopwatch = None
        own = json.dumps([] if self._watch is None else self._watch.rows())
        texts = [own] if runtime.comm is None else runtime.comm.gather(own)
        if texts is None or not trainer.is_global_zero:
            return
        measured = Journal.of([json.loads(text) for text in texts])
        if measured.steps < 4:
            rank_zero_info(f"{measured.steps} batches were recorded: no trace is written of less than 4.")
            return
        assert runtime.current is not None
        student, teacher = (
            max(len({e.microbatch for e in row if e.kind == kind}) for row in measured.ranks) for kind in "FT"
        )
        costs = strategy.predicted_costs or measured.costs().per_action(teacher, student)
        plan = planned(runtime.schedule(student, teacher), costs, measured.steps)
        self.measured, self.planned = measured, plan
        write(self._out, measured, plan)


def write(out: Path, measured: Journal, plan: Journal) -> None:
    """Write both files; the plan begins its step where the run begins the one that is typical of it.

    Args:
        out: path without its ending.
        measured: what was recorded.
        plan: as many steps of the plan.
    """
    place = measured.typical(SHOWN)
    step = min(place, plan.steady()[1] - SHOWN)
    plan = plan.shifted(measured.window(0, place, place + SHOWN)[0] - plan.window(0, step, step + SHOWN)[0])
    journals = {"measured": measured, "planned": plan}
    out.parent.mkdir(parents=True, exist_ok=True)
    file, picture = (out.with_name(out.name + ending) for ending in (".json", ".png"))
    file.write_text(json.dumps(trace_of(journals)))
    begin, end = measured.window(0, place, place + SHOWN)
    draw_png(picture, journals, dict.fromkeys(journals, (begin, end)))
    text = "\n".join(f"{name}: {journal.summary()}" for name, journal in journals.items())
    rank_zero_info(f"{text}\n{file} is for https://ui.perfetto.dev, {picture} shows {SHOWN} steps.")

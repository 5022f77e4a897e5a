"""What `PipelineMonitor` logs, from all ranks, and that it waits for nothing and changes nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_tspipe import PipelineMonitor, PipelineTrace, stopwatch
from tests.multiproc import Fit, result_of, run_fits
from tests.scripts.small import Small, loader
from tests.test_runtime import SHORT, Notes
from tests.waits import Watch

pytestmark = pytest.mark.timeout(60)
EVERY, MICROBATCHES, WIDTH = 3, 2, 8
LINE = 2048  # bytes


def sent(trainer: Any) -> dict[str, int]:
    """Messages so far, by kind."""
    comm = trainer.strategy.runtime.comm
    return {} if comm is None else dict(comm.messages)


def monitored(stages: int, folder: Path | None) -> Fit:
    """Eight batches of 8 rows, in two microbatches."""
    watch = Watch(2, 7)  # in which the third batch is timed, told to rank 0, and logged
    callbacks: list[L.Callback] = [watch, Notes(lambda trainer: (sent(trainer), watch.waits, watch.allowed))]
    loggers: Any = False
    if folder is not None:
        callbacks.insert(0, PipelineMonitor(EVERY))
        loggers = [CSVLogger(folder), TensorBoardLogger(folder)]
    trainer = {"callbacks": callbacks, "logger": loggers}
    return Fit(Small, lambda: loader(64, 8), stages, MICROBATCHES, strategy=SHORT, trainer=trainer)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Any, Any]]:
    """By number of stages: the folder of the loggers, what ranks saw with the monitor, and without it."""
    folders = {stages: tmp_path_factory.mktemp(str(stages)) for stages in (1, 3)}
    fits = [monitored(stages, where) for stages in folders for where in (folders[stages], None)]
    seen = iter(run_fits(fits, 50))
    return {stages: (folder, next(seen), next(seen)) for stages, folder in folders.items()}


def rows_of(folder: Path) -> list[dict[str, float]]:
    (file,) = folder.rglob("metrics.csv")
    prefix = "PipelineMonitor/"
    return [
        {name.removeprefix(prefix): float(value) for name, value in row.items() if value}
        for row in csv.DictReader(file.open())
    ]


@pytest.mark.parametrize("stages", [1, 3])
def test_every_logger_has_the_numbers_of_all_ranks(ran: Any, stages: int) -> None:
    folder, (*ranks,), _ = ran[stages]
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [2, 5]  # the third and the sixth of eight
    whole = {"step", "utilization", "bubble", "step_s", "planned_utilization"}  # parameters are no measured costs
    for row in rows:
        names = ("work_s", "wait_s", "sent_mb", "peak_mb")
        assert set(row) == whole | {f"rank_{rank}_{name}" for rank in range(stages) for name in names}
        work = sum(row[f"rank_{rank}_work_s"] for rank in range(stages))
        assert row["utilization"] == pytest.approx(work / stages / row["step_s"], rel=1e-6)
        assert row["bubble"] == pytest.approx(1 - row["utilization"], rel=1e-6)
        for rank in range(stages):
            assert 0 < row[f"rank_{rank}_work_s"] + row[f"rank_{rank}_wait_s"] < row["step_s"]
            assert row[f"rank_{rank}_peak_mb"] > 50
    (file,) = (file.parent for file in folder.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(file))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("PipelineMonitor/utilization")]
    assert found == [(row["step"], pytest.approx(row["utilization"], rel=1e-5)) for row in rows]
    assert len(ranks) == stages


def test_bytes_are_those_of_the_messages(ran: Any) -> None:
    """Activations and gradients between the layers of 8 features, in float32, and what goes by way of the host."""
    folder, ranks, _ = ran[3]
    for row in rows_of(folder):
        for rank, seen in enumerate(ranks):
            counts = [note[0] for note in seen["notes"]]
            batch = int(row["step"])
            new = {kind: counts[batch][kind] - counts[batch - 1][kind] for kind in counts[0]}
            assert new["F"] + new["B"] == (MICROBATCHES if rank in (0, 2) else 2 * MICROBATCHES)
            target = 8 * 8 * (rank == 0)  # int64
            expected = (new["T"] + new["F"] + new["B"]) * 4 * WIDTH * 4 + target + new["line"] * LINE
            rest = sum(new[kind] for kind in "LUD")
            assert row[f"rank_{rank}_sent_mb"] * 1e6 == pytest.approx(expected + 4 * rest, abs=8 * rest + 1e-3)


@pytest.mark.parametrize("stages", [1, 3])
def test_it_waits_for_nothing_and_changes_nothing(ran: Any, stages: int) -> None:
    _, with_it, without = ran[stages]
    for ours, plain in zip(with_it, without, strict=True):
        _, waits, allowed = ours["notes"][-1]
        assert waits == []
        assert len(ours["notes"]) == 8
        assert bool(allowed) == (stages > 1), "the watch saw nothing, not even what it allows"
        for name, tensor in ours["whole"].items():
            torch.testing.assert_close(tensor, plain["whole"][name], rtol=0, atol=0)


def test_it_logs_the_planned_seconds_where_costs_were_measured(tmp_path: Path) -> None:
    """And those of each batch, if asked; the one after a validation does not include it."""

    class Slow(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            clock.now += 1000

    def fit() -> Any:
        stopwatch.time = clock  # type: ignore[assignment]
        trainer = {"callbacks": [PipelineMonitor(1)], "logger": CSVLogger(tmp_path), "val_check_interval": 2}
        options = {"strategy": SHORT | {"balance": "auto"}, "trainer": trainer}
        fits = [Fit(Slow, lambda: loader(32, 8), 2, MICROBATCHES, lambda: loader(8, 8), **options)]  # type: ignore[arg-type]
        run_fits(fits, 40)
        return rows_of(tmp_path)

    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now + stopwatch_time.perf_counter()
    clock.time = stopwatch_time.time
    rows = result_of(fit)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert 0 < row["planned_step_s"] < 1
        assert row["step_s"] < 500


stopwatch_time = stopwatch.time


def test_with_replicas_the_first_pipeline_is_logged_and_drawn(tmp_path: Path) -> None:
    """The trace has the first four batches of eight, in which the monitor pauses."""
    callbacks = [PipelineTrace(tmp_path / "trace", steps=4), PipelineMonitor(2)]
    trainer = {"callbacks": callbacks, "logger": CSVLogger(tmp_path)}
    run_fits([Fit(Small, lambda: loader(64, 4), 4, MICROBATCHES, strategy=SHORT | {"stages": 2}, trainer=trainer)], 40)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [5, 7]
    assert {name[:7] for name in rows[0] if name.startswith("rank_")} == {"rank_0_", "rank_1_"}
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == {0, 1}


def test_it_needs_a_pipeline_a_logger_and_a_number() -> None:
    def message(**options: Any) -> str:
        with pytest.raises(MisconfigurationException) as caught:
            L.Trainer(accelerator="cpu", devices=1, callbacks=[PipelineMonitor()], **options).fit(Small(), loader())
        return str(caught.value)

    assert 'Use `Trainer(strategy="tspipe")`' in result_of(lambda: message(strategy="auto", logger=False))
    assert "Trainer(logger=False)" in result_of(lambda: message(strategy="tspipe", logger=False))
    with pytest.raises(ValueError, match="give at least 1"):
        PipelineMonitor(0)

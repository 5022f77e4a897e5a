"""Lightning's callbacks, profilers and tuner show what they show in the sequential twin, and rank 0 alone shows it."""

from __future__ import annotations

import csv
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_tspipe import _lightning
from tests.scripts.small import trainer
from tests.scripts.zygote import Zygote

SCRIPT = "tests.scripts.tools"


def run(zygote: Zygote, name: str, ranks: int, folder: Path, **arguments: Any) -> list[Any]:
    """What every rank saw, the twin last if there is one."""
    folder.mkdir(exist_ok=True)
    codes = zygote.run(f"{SCRIPT}:{name}", ranks, folder, **arguments)
    texts = [(folder / f"{rank}.txt").read_text() for rank in range(ranks)]
    assert codes == [0] * ranks, "\n".join(texts)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Where pipeline and twin leave files."""
    return tmp_path_factory.mktemp("pipeline"), tmp_path_factory.mktemp("twin")


@pytest.fixture(scope="module")
def watched(zygote: Zygote, folders: tuple[Path, Path]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What the two ranks of a pipeline saw, and the twin."""
    first, second = run(zygote, "watched", 2, folders[0], twin=False)
    (twin,) = run(zygote, "watched", 1, folders[1], twin=True)
    return first, second, twin


class TestWatchers:
    """One fit, test and predict under all callbacks that only watch."""

    def test_the_bar_is_that_of_the_twin_on_rank_0_alone(self, watched: Any, folders: tuple[Path, Path]) -> None:
        first, second, twin = watched
        assert first["bars"] == twin["bars"] == {"train": (8, 8, True, ["loss", "v_num", "val"]), "validate": (3, 3)}
        assert not second["bars"]["train"][2]
        printed = (folders[0] / "0.txt").read_text()
        for text in ("Sanity Checking", "Epoch 1", "Validation DataLoader 0", "Testing DataLoader 0", "Predicting"):
            assert text in printed, text
        assert "Epoch" not in (folders[0] / "1.txt").read_text()

    def test_the_summary_is_of_the_whole_model(self, watched: Any) -> None:
        first, second, twin = watched
        assert first["said"] == twin["said"]
        assert not second["said"]
        (table,) = first["said"]
        assert re.search(r"student\.2 +\| Linear +\| 18 +\| train \| 64 +\| \[2, 8\] +\| \[2, 2\]", table)
        assert re.search(r"^260 +Total params$", table, re.MULTILINE)
        assert re.search(r"^448 +Total Flops", table, re.MULTILINE)

    def test_the_logger_gets_throughput_and_device_stats(self, folders: tuple[Path, Path], watched: Any) -> None:
        tables = []
        for folder in folders:
            (file,) = folder.rglob("metrics.csv")
            with file.open() as lines:
                tables.append(list(csv.DictReader(lines)))
        ours, twins = tables
        assert list(ours[0]) == list(twins[0])
        names = [
            name
            for name in ours[0]
            if re.search("(epoch|step|batches|lengths|samples)$", name) and "Device" not in name
        ]
        assert {"train/samples", "train/batches", "validate/samples", "test/lengths", "predict/samples"} <= set(names)
        assert {"train/device/samples_per_sec", "train/device/flops_per_sec"} <= set(ours[0])
        assert "DeviceStatsMonitor.on_train_batch_end/cpu_percent" in ours[0]
        assert [{name: row[name] for name in names} for row in ours] == [
            {name: row[name] for name in names} for row in twins
        ]
        assert max(int(float(row["train/samples"] or 0)) for row in ours) == 64

    def test_predictions_come_with_the_indices_of_their_rows(self, watched: Any) -> None:
        *ranks, twin = watched
        assert [indices for _, indices in twin["batches"]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        for found in ranks:
            torch.testing.assert_close(found["batches"], twin["batches"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found["epoch"], twin["epoch"], rtol=1e-5, atol=1e-6)

    def test_hooks_of_a_callback_see_every_batch(self, watched: Any) -> None:
        for found in watched:
            assert found["rows"] == [4] * 16
            assert found["elapsed"] > 0


@pytest.mark.timeout(60)
def test_rank_0_says_whether_time_is_over_and_all_stop_at_a_spike(zygote: Zygote, tmp_path: Path) -> None:
    expected = {"late 0": 4, "late 1": 8, "spike": "Training spike detected in batch 4"}
    assert run(zygote, "stopped", 2, tmp_path) == [expected, expected]
    assert json.loads((tmp_path / "skip0.json").read_text()) == [3, 4]
    assert not (tmp_path / "skip1.json").exists()


@pytest.mark.timeout(60)
def test_the_learning_rate_is_found_as_in_the_twin(zygote: Zygote, tmp_path: Path) -> None:
    ranks = run(zygote, "tuned", 2, tmp_path / "pipeline", twin=False)
    (twin,) = run(zygote, "tuned", 1, tmp_path / "twin", twin=True)
    for found in ranks:
        torch.testing.assert_close(found, twin, rtol=1e-11, atol=1e-12)
    for tuner, callback in (twin[:2], twin[2:]):
        assert tuner["lr"] == callback["lr"] != 0.001
        assert all(torch.equal(tuner["after"][name], value) for name, value in tuner["before"].items())
        assert callback["steps"] == 24
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.timeout(60)
def test_flags_of_the_process_and_a_plugin_for_checkpoints(zygote: Zygote, tmp_path: Path) -> None:
    for rank, found in enumerate(run(zygote, "flagged", 2, tmp_path)):
        assert found["flags"] == {(True, True)}
        assert found["written"] == (["epoch=0-step=8.ckpt"] if rank == 0 else [])
        flagged, bare = found["weights"]
        assert all(torch.equal(flagged[name], bare[name]) for name in flagged)
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1


@pytest.mark.timeout(60)
def test_profilers_report_one_span_per_action(zygote: Zygote, tmp_path: Path) -> None:
    plans = run(zygote, "profiled", 2, tmp_path)
    batches, epochs = 16, 2
    for rank, plan in enumerate(plans):
        assert plan["simple"] == plan["advanced"] == plan["pytorch"]
        row = plan["simple"]
        assert row == (["F0", "F1", "T0'", "T1'", "B0", "B1"] if rank == 0 else ["T0", "T1", "F0", "F1", "B0", "B1"])
        expected = {action: batches for action in row if not action.endswith("'")}
        for ahead in (action for action in row if action.endswith("'")):  # an epoch's first batch has none before it
            expected |= {ahead: batches - epochs, ahead.rstrip("'"): epochs}
        texts = {name: (tmp_path / f"fit-{name}-{rank}.txt").read_text() for name in plan}
        rows = re.findall(r"\[TSPipe\](\w+'?)\s*\|\s*\S+\s*\|\s*(\d+)\s", texts["simple"])
        assert {action: int(count) for action, count in rows} == expected
        rows = re.findall(r"\[TSPipe\](\w+'?) .* (\d+)\s*$", texts["pytorch"], re.MULTILINE)
        assert {action: int(count) for action, count in rows} == expected
        for action, count in expected.items():
            _, _, part = texts["advanced"].partition(f"Profile stats for: [TSPipe]{action} rank: {rank}\n")
            part, _, _ = part.partition("Profile stats for")
            name = {"T": "_teacher_forward", "F": "_student_forward", "B": "_backward"}[action[0]]
            calls = re.search(rf"^ +(\d+) .*runtime\.py:\d+\({name}\)", part, re.MULTILINE)
            assert calls is not None, action
            assert int(calls[1]) == count, action


def test_without_a_profiler_there_is_no_span() -> None:
    assert _lightning.profiler_span(trainer(1)) is None
    assert _lightning.profiler_span(trainer(1, profiler="simple")) is not None


@pytest.mark.skipif(find_spec("rich") is None, reason="needs the package rich, which Lightning does not require")
def test_rich_shows_bar_and_summary_on_rank_0_alone(zygote: Zygote, tmp_path: Path) -> None:
    codes = zygote.run(f"{SCRIPT}:rich", 2, tmp_path)
    texts = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert codes == [0, 0], texts
    for text in (
        "Total params: 260",
        "Total FLOPs: 448",
        "Epoch 0/0",
        "8/8",
        "│ 3 │ student.2 │ Linear     │     18 │",
    ):
        assert text in texts[0], text
        assert text not in texts[1], text

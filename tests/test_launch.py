"""Every way to start a pipeline, and what a user finds on every rank while and after it runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

from lightning_tspipe import TSPipeStrategy
from tests.ports import free_port
from tests.scripts.zygote import ROOT, Zygote
from tests.subprocesses import run_script

FITS = "tests.scripts.fits"


def results(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def run(zygote: Zygote, name: str, ranks: int, folder: Path, **arguments: Any) -> None:
    folder.mkdir(exist_ok=True)
    codes = zygote.run(f"{FITS}:{name}", ranks, folder, **arguments)
    texts = [(folder / f"{rank}.txt").read_text() for rank in range(ranks)]
    assert codes == [0] * ranks, "\n".join(texts)


@pytest.fixture(scope="module")
def twin(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("twin")
    run(zygote, "everything", 1, folder, devices=1, twin=True)
    return results(folder, 1)[0]


@pytest.fixture(scope="module")
def full(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one complete run of two ranks, which several tests look into."""
    folder = tmp_path_factory.mktemp("full")
    run(zygote, "everything", 2, folder, deadline=20)
    return folder


def equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Two dicts of weights hold the same numbers, up to rounding."""
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "method"),
    [("tspipe", "popen"), ("tspipe_spawn", "spawn"), ("tspipe_fork", "fork"), ("tspipe_notebook", "fork")],
)
def test_registered_names(name: str, method: str) -> None:
    strategy = StrategyRegistry.get(name)
    assert type(strategy) is TSPipeStrategy
    assert strategy._start_method == method


@pytest.mark.timeout(100)
def test_a_script_starts_its_own_processes(tmp_path: Path, twin: dict[str, Any]) -> None:
    run_script(str(ROOT / "tests/scripts/fits.py"), str(tmp_path))
    for found in results(tmp_path, 2):
        equal(found["weights"], twin["weights"])


@pytest.mark.timeout(100)
def test_torchrun(tmp_path: Path, twin: dict[str, Any]) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    run_script(*command, str(ROOT / "tests/scripts/fits.py"), str(tmp_path))
    for found in results(tmp_path, 2):
        equal(found["weights"], twin["weights"])


@pytest.mark.timeout(100)
def test_spawn(tmp_path: Path, twin: dict[str, Any]) -> None:
    run_script(str(ROOT / "tests/scripts/fits.py"), str(tmp_path), "tspipe_spawn")
    (found,) = results(tmp_path, 1)
    assert not found["meta"]
    equal(found["weights"], twin["weights"])
    assert found["fit"] == pytest.approx(twin["fit"], rel=1e-4, abs=1e-6)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["tspipe_fork", "tspipe_notebook"])
def test_fork(zygote: Zygote, tmp_path: Path, twin: dict[str, Any], name: str) -> None:
    run(zygote, "everything", 1, tmp_path, strategy=name, after=True)
    (found,) = results(tmp_path, 1)
    assert not found["meta"]
    equal(found["weights"], twin["weights"])
    assert found["fit"] == pytest.approx(twin["fit"], rel=1e-4, abs=1e-6)
    assert any(not torch.equal(found["after"][key], found["weights"][key]) for key in found["after"])


@pytest.mark.timeout(60)
def test_one_device(zygote: Zygote, tmp_path: Path, twin: dict[str, Any]) -> None:
    run(zygote, "everything", 1, tmp_path, devices=1, after=True)
    (found,) = results(tmp_path, 1)
    equal(found["weights"], twin["weights"])
    assert found["fit"] == pytest.approx(twin["fit"], rel=1e-4, abs=1e-6)


class TestEveryRank:
    """What one run of two ranks leaves on both."""

    def test_the_module_is_whole_after_fit(self, full: Path, twin: dict[str, Any]) -> None:
        first, second = results(full, 2)
        for found in (first, second):
            assert not found["meta"]
            equal(found["weights"], twin["weights"])
            torch.testing.assert_close(found["predicted"], twin["predicted"], rtol=1e-5, atol=1e-6)
        for name, tensor in first["weights"].items():
            assert torch.equal(tensor, second["weights"][name]), name

    def test_only_the_last_rank_runs_the_loss(self, full: Path, twin: dict[str, Any]) -> None:
        first, second = results(full, 2)
        assert first["values"] == []
        assert second["values"] == pytest.approx(twin["values"], rel=1e-4)

    def test_logged_values_are_everywhere(self, full: Path, twin: dict[str, Any]) -> None:
        names = {"value", "value_step", "value_epoch", "mean_step", "mean_epoch", "last_target", "val"}
        assert names <= set(twin["fit"])
        for found in results(full, 2):
            assert found["fit"] == pytest.approx(twin["fit"], rel=1e-4, abs=1e-6)

    def test_whole_networks_in_evaluation(self, full: Path, twin: dict[str, Any]) -> None:
        for found in results(full, 2):
            assert found["test"]["test"] == pytest.approx(twin["test"]["test"], rel=1e-4)
            assert found["validate"]["val"] == pytest.approx(twin["validate"]["val"], rel=1e-4)
            torch.testing.assert_close(found["predictions"], twin["predictions"], rtol=1e-5, atol=1e-6)

    def test_the_logger_of_rank_0(self, full: Path) -> None:
        (file,) = full.rglob("metrics.csv")
        with file.open() as lines:
            rows = list(csv.DictReader(lines))
        values = [float(row["value_step"]) for row in rows if row["value_step"]]
        means = [float(row["mean_step"]) for row in rows if row["mean_step"]]
        losses = results(full, 2)[1]["values"]
        assert values == pytest.approx([2 * loss for loss in losses], rel=1e-4)
        assert means == pytest.approx(losses, rel=1e-4)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 1])
def test_all_ranks_train_on_the_batch_that_rank_0_drew(zygote: Zygote, tmp_path: Path, workers: int) -> None:
    run(zygote, "noisy", 2, tmp_path, workers=workers)
    first, last = results(tmp_path, 2)
    drawn: list[float] = []
    files = sorted(tmp_path.glob("draws.*"), key=lambda file: file.stat().st_mtime)
    assert files
    for file in files:
        parent, own = map(int, file.name.split(".")[1:])
        assert first["pid"] == (parent if workers else own), "a rank other than the first one has loaded data"
        drawn += [float(line) for line in file.read_text().split()]
    assert len(drawn) == 2 * 24, "a row was loaded more than once"
    assert last["targets"] == drawn
    sums = [sum(drawn[start : start + 4]) for start in range(0, 48, 4)]
    for found in (first, last):
        assert found["sums"] == pytest.approx(sums, rel=1e-5)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("stages", "momentum", "shared"), [(2, 0.9, True), (3, None, True), (3, 0.9, False)])
def test_steady_steps_exchange_activations_gradients_and_headers_only(
    zygote: Zygote, tmp_path: Path, stages: int, momentum: float | None, shared: bool
) -> None:
    run(zygote, "counted", stages, tmp_path, momentum=momentum, stages=stages, shared=shared)
    steps, microbatches, last = 3, 2, stages - 1
    for rank, found in enumerate(results(tmp_path, stages)):
        sent = {
            "T": steps * microbatches * (rank < last),
            "F": steps * microbatches * (rank < last),
            "B": steps * microbatches * (rank > 0),
            "L": steps * (rank > 0),  # loss and logged values
            "Y": steps * (rank == 0),  # the target
            "U": 0,
            "D": 0,  # sums over the ranks: only for clipping by norm and for a loss scale
            "line": steps * (last if rank == 0 else 1),  # headers downstream, names of logged values upstream
        }
        assert found["messages"] == sent, rank
        calls = found["calls"]
        assert set(calls) <= {"send", "recv", "shared"}, (rank, calls)
        assert calls.get("send", 0) + calls.get("shared", 0) == sum(sent.values()), rank
        assert shared != ("send" in calls), (rank, calls)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("strategy", "microbatches"),
    [
        ("tspipe_fork", "auto"),
        ("{class_path: lightning_tspipe.TSPipeStrategy, init_args: {start_method: fork, microbatches: 2}}", 2),
    ],
    ids=["name", "class_path"],
)
def test_command_line(zygote: Zygote, tmp_path: Path, strategy: str, microbatches: Any) -> None:
    run(zygote, "cli", 1, tmp_path, strategy=strategy)
    for found in results(tmp_path, 2):
        assert found == {
            "strategy": "TSPipeStrategy",
            "start_method": "fork",
            "microbatches": microbatches,
            "steps": 8,
        }

"""The command `lightning-tspipe`: every subcommand, from a YAML file, with a module of the current folder."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import lightning_utilities.core.imports
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from tests.multiproc import result_of
from tests.scripts.zygote import ROOT, Zygote
from tests.subprocesses import run_script

MODULE = """
import copy
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import TeacherStudentModule
from tests.scripts.small import network


class Mine(TeacherStudentModule):
    def __init__(self, width: int, lr: float = 0.1, momentum=0.99):
        super().__init__(momentum=momentum, teacher_delay=1)
        self.save_hyperparameters()
        self.lr = lr
        self.student = network(4, width, 2).double()
        self.teacher = copy.deepcopy(self.student)

    def loss(self, student_out, teacher_out, target):
        return (student_out - teacher_out - target[:, None]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.student(batch[0]).mean())

    def test_step(self, batch, batch_idx):
        self.log("test", self.teacher(batch[0]).mean())

    def predict_step(self, batch, batch_idx):
        return self.student(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=self.lr)


class Data(L.LightningDataModule):
    def loader(self):
        rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).double()
        return DataLoader(TensorDataset(rows, torch.ones(16).double()), batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Notes(L.Callback):
    def teardown(self, trainer, module, stage):
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if stage == "predict":
            found["predictions"] = torch.cat(trainer.predict_loop.predictions)
        name = f"{trainer.state.fn.value}-{trainer.world_size}-{trainer.global_rank}.pt"
        torch.save(found | {"momentum": str(module.momentum)}, name)
"""
CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  devices: 2
  max_epochs: 2
  strategy: tspipe
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
  - class_path: my_module.Notes
model:
  class_path: my_module.Mine
  init_args:
    width: 6
    momentum:
      class_path: lightning_tspipe.cosine_momentum
      init_args: {start: 0.95, end: 1.0, num_steps: 8}
data:
  class_path: my_module.Data
"""
OPTIONS = {"microbatches": 2, "recompute": True, "compile": {"backend": "eager"}}
STRATEGY = json.dumps({"class_path": "lightning_tspipe.TSPipeStrategy", "init_args": OPTIONS})
COMMAND = ["-m", "lightning_tspipe.cli"]


def run_commands(rank: int, out: Path, folder: str, commands: list[list[str]]) -> None:
    """What every rank runs; a console script finds its own folder in `sys.path`, not the current one."""
    from lightning_tspipe.cli import main

    torch.set_num_threads(1)
    os.chdir(folder)
    sys.path[:] = [entry for entry in sys.path if entry not in ("", folder)]
    for arguments in commands:
        assert main(arguments) is None, "a console script exits with what this returns"  # type: ignore[func-returns-value]


@pytest.fixture(scope="module")
def folder(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module and a config file, in which pipeline and twin have run every subcommand.

    The logs and checkpoints of `fit` are in ``lightning_logs``, those of the twin in ``twin``.
    """
    folder = tmp_path_factory.mktemp("cli")
    (folder / "my_module.py").write_text(MODULE)
    (folder / "config.yaml").write_text(CONFIG)
    run_script(*COMMAND, "fit", "--config", "config.yaml", folder=folder, timeout=100)
    (checkpoint,), (config,) = (sorted((folder / "lightning_logs").rglob(name)) for name in ("*.ckpt", "config.yaml"))
    options = ["--config", "config.yaml", "--ckpt_path", str(checkpoint)]
    twin = ["--trainer.strategy", "auto", "--trainer.devices", "1", "--trainer.default_root_dir", str(folder / "twin")]
    elsewhere = ["--trainer.default_root_dir", str(folder / "evaluated")]
    evaluations = {"validate": "tspipe", "test": STRATEGY, "predict": STRATEGY}
    commands = {
        1: [["fit", "--config", str(config), *twin], *([name, *options, *twin] for name in evaluations)],
        2: [[name, *options, *elsewhere, "--trainer.strategy", strategy] for name, strategy in evaluations.items()],
    }
    for ranks, lines in commands.items():
        out = tmp_path_factory.mktemp("out")
        codes = zygote.run("tests.test_cli:run_commands", ranks, out, folder=str(folder), commands=lines)
        assert codes == [0] * ranks, [(out / f"{rank}.txt").read_text() for rank in range(ranks)]
    return folder


def found(folder: Path, stage: str, ranks: int, rank: int = 0) -> Any:
    return torch.load(folder / f"{stage}-{ranks}-{rank}.pt", weights_only=False)


@pytest.mark.timeout(120)
def test_fit_trains_as_the_twin_does(folder: Path) -> None:
    (ours,), (twins,) = (list((folder / name).rglob("*.ckpt")) for name in ("lightning_logs", "twin"))
    ours, twins = (torch.load(file, weights_only=True) for file in (ours, twins))
    assert ours["global_step"] == twins["global_step"] == 8
    assert ours["hyper_parameters"]["_class_path"] == "my_module.Mine"
    torch.testing.assert_close(ours["state_dict"], twins["state_dict"], rtol=1e-12, atol=1e-12)
    assert found(folder, "fit", 2) == found(folder, "fit", 2, 1)
    assert found(folder, "fit", 2)["val"] == pytest.approx(found(folder, "fit", 1)["val"], rel=1e-12)
    assert "cosine_momentum(start=0.95" in found(folder, "fit", 2)["momentum"]


def test_the_configuration_is_saved_once_and_can_be_used_again(folder: Path) -> None:
    """The twin was run with it."""
    (config,) = (folder / "lightning_logs").rglob("config.yaml")
    saved, again = (
        yaml.safe_load(file.read_text()) for file in (config, folder / "twin/lightning_logs/version_0/config.yaml")
    )
    assert saved["model"]["class_path"] == "my_module.Mine"
    assert (saved["trainer"]["strategy"], again["trainer"]["strategy"]) == ("tspipe", "auto")
    assert saved["model"] == again["model"]


@pytest.mark.parametrize(("command", "value"), [("validate", "val"), ("test", "test"), ("predict", "predictions")])
def test_evaluation(folder: Path, command: str, value: str) -> None:
    for rank in range(2):
        ours, twins = found(folder, command, 2, rank)[value], found(folder, command, 1)[value]
        torch.testing.assert_close(ours, twins, rtol=1e-12, atol=1e-12)


# --- seeing the pipeline


@pytest.fixture(scope="module")
def seen(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder in which two ranks have run what shows the pipeline, and what each has printed."""
    folder = tmp_path_factory.mktemp("seeing")
    (folder / "my_module.py").write_text(MODULE)
    config = yaml.safe_load(CONFIG)
    config["trainer"] |= {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}}}
    config["trainer"]["callbacks"].append({"class_path": "LearningRateMonitor"})  # it insists on a logger
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    commands = [["plan", "--config", "config.yaml", "--bandwidth_gb_s", "2.5"]]
    commands.append(["trace", "--config", "config.yaml", "--steps", "6", "--out", "seen/run"])
    out = tmp_path_factory.mktemp("out")
    codes = zygote.run("tests.test_cli:run_commands", 2, out, folder=str(folder), commands=commands)
    texts = [(out / f"{rank}.txt").read_text() for rank in range(2)]
    assert codes == [0] * 2, texts
    return folder, texts


def test_plan_measures_and_trains_nothing(seen: tuple[Path, list[str]]) -> None:
    folder, (text, other) = seen
    table = re.split(r"Costs of [12] samples, as measured:\n", text)[1]
    header, _, first, second, *_ = table.splitlines()
    assert [cell.strip() for cell in header.split("|")][:5] == ["stage", "student", "teacher", "T ms", "F ms"]
    for stage, row in enumerate((first, second)):
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[0] == str(stage)
        assert float(cells[4]) > 0
    assert re.search(r'^tspipe, schedule="afab" +\| any +\| \d+ +\| \d+\.\d+ ', table, re.MULTILINE)
    assert re.search(r"^DDP +\| any +\| +\| \d+\.\d+ ", table, re.MULTILINE), (
        "the bandwidth is known, so it is no bound"
    )
    assert "The pipeline is NOT the better choice: an action takes 0." in table
    assert "as measured" not in other
    assert not list(folder.rglob("*.ckpt"))
    assert not list(folder.rglob("config.yaml"))[1:]


def test_trace_shows_what_every_rank_did_beside_the_plan(seen: tuple[Path, list[str]]) -> None:
    folder, (text, other) = seen
    trace = json.loads((folder / "seen/run.json").read_text())
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    ranks = {(process, rank): f"rank {rank}" for process in (0, 1) for rank in (0, 1)}
    assert names == {(0, None): "measured", (1, None): "planned"} | ranks
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {e["args"]["step"] for e in slices if e["pid"] == 0} == set(range(6))
    work = [e for e in slices if e["cat"] != "bubble" and e["args"]["step"] == 2]
    for rank in (0, 1):  # the third of four batches: it has a predecessor and a successor
        ran, plan = ([e["name"] for e in work if (e["pid"], e["tid"]) == (process, rank)] for process in (0, 1))
        assert ran == plan
        assert {name[0] for name in ran} == set("TFB")
    causes = {e["args"]["cause"] for e in slices if e["cat"] == "bubble"}
    assert any(re.match(r"waits for B0 of rank 1: .* ms", cause) for cause in causes)
    assert "waits for rank 0 to announce the next batch" in causes
    with Image.open(folder / "seen/run.png") as picture:
        assert picture.format == "PNG"
    for name in ("measured", "planned"):
        assert re.search(rf"^{name}: step \d+\.\d+ ms, utilization \d\.\d+\nrank \| work +\|", text, re.MULTILINE)
    assert "seen/run.json is for https://ui.perfetto.dev" in text
    assert "ui.perfetto.dev" not in other
    assert not list(folder.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "2", "--t", "[1,2,3]"], "t has 3 costs for 2 stages"),
        (["--stages", "2", "--bandwidth_gb_s", "0"], "bandwidth_gb_s=0.0: give a positive number"),
        (["--stages", "0"], "stages is 0"),
        (["--stages", "2", "--accumulate_grad_batches", "0"], "accumulate_grad_batches=0: give at least 1"),
        (["--stages", "2", "--microbatches", "0"], "microbatches is 0"),
        (["--stages", "2", "--microbatches", "4", "--teacher_microbatches", "3"], "teacher_microbatches is 3 for 4"),
    ],
)
def test_plan_with_bad_costs_says_so(arguments: list[str], message: str) -> None:
    from lightning_tspipe.cli import main

    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["plan", *arguments])


def test_plan_from_costs(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_tspipe.cli import main

    sizes = ["--student_mb", "100", "--teacher_mb", "1000", "--activations_mb", "400", "--bandwidth_gb_s", "1"]
    main(["plan", "--stages", "4", "--t", "1", "--f", "[1,1,1,1]", "--microbatches", "12", *sizes])
    text = capsys.readouterr().out
    assert text.startswith("4 ranks, 12 microbatches, of the teacher Mt; a step is one batch:\n")
    rows = {cells[0]: cells[1:] for cells in ([*map(str.strip, line.split(" | "))] for line in text.splitlines())}
    assert rows['tspipe, schedule="afab"'] == ["any", "12", "48.00", "1.000", "1.00", "1.55", "?"]
    assert rows["DDP"] == ["any", "", "174.00", "0.276", "3.62", "2.6", "?"]
    assert text.splitlines()[-1].startswith("The pipeline is the better choice")
    page = (ROOT / "docs/seeing.md").read_text()
    (shown,) = re.findall(
        r"^lightning-tspipe (plan --stages .*?)\n```\n\n```text\n(.*?)```", page, re.DOTALL | re.MULTILINE
    )
    main(shown[0].replace("\\\n", "").split())
    assert capsys.readouterr().out == shown[1]
    main(["plan", "--stages", "3", "--exact_teacher", "true"])
    assert capsys.readouterr().out.startswith("3 ranks, 6 microbatches")


def test_plan_with_accumulation_as_documented(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_tspipe.cli import main

    page = (ROOT / "docs/schedule.md").read_text()
    ((command, last),) = re.findall(r"`lightning-tspipe (plan .*--accumulate_grad_batches) (\d+)` and its like", page)
    table = [[*map(str.strip, line.strip("| ").split("|"))] for line in page.splitlines() if line.startswith("| ")]
    (counts,) = (row[1:] for row in table if row[0] == "batches per step")
    assert last in counts
    wanted = {row[0].split(",")[0].strip("`"): row[1:] for row in table if len(row) == len(counts) + 1}
    for place, count in enumerate(counts):
        main([*command.split(), count])
        lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
        found = {cells[0].split("=")[1].strip(): cells[4].strip() for cells in lines if cells[0].startswith("tspipe,")}
        for order in ('"afab"', '"afab-split"', '"zb"'):
            assert wanted[order][place] == found[order], (order, count)


def test_plan_needs_a_measurement(tmp_path: Path) -> None:
    def message(strategy: str) -> str:
        from lightning_tspipe.cli import main

        os.chdir(tmp_path)
        sys.path.insert(0, str(tmp_path))
        with pytest.raises(MisconfigurationException) as caught:
            main(["plan", "--config", "config.yaml", "--trainer.devices", "1", "--trainer.strategy", strategy])
        return str(caught.value)

    (tmp_path / "my_module.py").write_text(MODULE)
    (tmp_path / "config.yaml").write_text(CONFIG)
    assert "There are no measured costs to plan with" in result_of(lambda: message("tspipe"))
    assert "`lightning-tspipe plan` watches a pipeline, but the strategy is" in result_of(lambda: message("auto"))


def test_a_dry_plan_starts_no_rank_and_makes_no_weights(tmp_path: Path) -> None:
    look = (
        "    def configure_model(self):\n        assert all(parameter.is_meta for parameter in self.parameters())\n\n"
    )
    (tmp_path / "my_module.py").write_text(MODULE.replace("    def loss(self", look + "    def loss(self"))
    (tmp_path / "config.yaml").write_text(CONFIG)

    def dry(*options: str) -> str:
        """What is printed, or the error."""

        def run() -> str:
            from lightning_tspipe.cli import main

            os.chdir(tmp_path)
            sys.path.insert(0, str(tmp_path))
            with contextlib.redirect_stdout(io.StringIO()) as text:
                try:
                    main(["plan", "--config", "config.yaml", *options])
                except (ValueError, MisconfigurationException) as error:
                    return str(error)
            return text.getvalue()

        return result_of(run)

    text = dry("--tflops", "1e-6", "--bandwidth_gb_s", "1", "--trainer.devices", "2")
    assert "counted at 1e-06 TFLOP/s" in text
    assert re.search(r"^DDP +\| any ", text, re.MULTILINE)
    assert "2 ranks, " in text
    assert "The student has 2 layer(s) for 4 stages" in dry("--tflops", "1", "--trainer.devices", "4")
    assert dry("--tflops", "0") == "tflops=0.0: give a positive number, or leave it out"
    assert "With one stage there is nothing to plan" in dry("--tflops", "1", "--trainer.devices", "1")
    assert "No cut into 2 stages keeps max_memory=100 bytes" in dry("--tflops", "1", "--memory_gb", "1e-7")


def test_the_script_is_declared() -> None:
    (target,) = re.findall(r'^lightning-tspipe = "(.+?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_without_jsonargparse_it_names_the_extra() -> None:
    def message() -> str:
        """In a process in which jsonargparse cannot be found."""

        def version(name: str) -> str:
            if name == "jsonargparse":
                raise importlib.metadata.PackageNotFoundError(name)
            return importlib.metadata.version(name)

        lightning_utilities.core.imports._version = version
        for name in [name for name in sys.modules if re.match(r"lightning\.pytorch\.cli|lightning_tspipe\.cli", name)]:
            del sys.modules[name]
        sys.modules["jsonargparse"] = None  # type: ignore[assignment]
        with pytest.raises(SystemExit) as caught:
            importlib.import_module("lightning_tspipe.cli").main(["fit"])
        return str(caught.value)

    assert "pip install 'lightning-tspipe[cli]'" in result_of(message)

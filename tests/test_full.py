"""The full-size settings: a dry plan of each as it is, and a step of each on random numbers, of narrower networks.

`make full` takes the steps with the networks as they are, which takes 19 GB of memory and some minutes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.scripts.zygote import ROOT, Zygote

FOLDER = ROOT / "examples/configs/full"
WHOLE = bool(os.environ.get("TSPIPE_FULL"))
RANKS = {"moco_v3": 8, "byol": 8, "distill": 8, "dino": 16, "distilbert": 4}
SMALL = "--model.encoder.init_args.model_name"
NARROWER = {
    "moco_v3": [SMALL, "vit_tiny_patch16_224", "--model.features", "192", "--model.hidden", "32"],
    "byol": [SMALL, "resnet14t", "--model.hidden", "32"],
    "dino": [SMALL, "vit_tiny_patch16_224", "--model.features", "192", "--model.outputs", "32"],
    "distill": ["--model.teacher.init_args.model_name", "vit_tiny_patch16_224", "--model.student.init_args.model_name",
                "resnet14t"],
    "distilbert": ["--model.width", "48", "--model.layers", "4", "--data.init_args.shapes", "[[16], [16]]"],
}  # fmt: skip
ON_CPU = {
    "trainer.accelerator": "cpu", "trainer.devices": "2", "trainer.num_nodes": "1", "trainer.fast_dev_run": "true",
    "trainer.enable_model_summary": "false", "trainer.strategy.init_args.microbatches": "2",
    "trainer.strategy.init_args.balance": "parameters", "data.init_args.rows": "4",
}  # fmt: skip


def settings(name: str) -> list[str]:
    return ["--config", f"configs/full/{name}.yaml", "--config", f"configs/full/synthetic/{name}.yaml"]


def test_every_file_is_tried() -> None:
    for folder in (FOLDER, FOLDER / "synthetic"):
        assert {file.stem for file in folder.glob("*.yaml")} == set(RANKS)


@pytest.mark.timeout(180)
def test_dry_plans(zygote: Zygote, tmp_path: Path) -> None:
    """Of the whole networks, on as many ranks as the settings have."""
    options = ["--trainer.accelerator", "cpu", "--tflops", "100", "--bandwidth_gb_s", "200", "--memory_gb", "80"]
    commands = [["plan", *settings(name), *options] for name in RANKS]
    codes = zygote.run("tests.scripts.examples:run_commands", 1, tmp_path, 170, commands=commands)
    text = (tmp_path / "0.txt").read_text()
    assert codes == [0], text
    assert list(map(int, re.findall(r"^(\d+) ranks, \d+ microbatches", text, re.MULTILINE))) == list(RANKS.values())
    assert len(re.findall(r'^tspipe, schedule="afab" .* yes$', text, re.MULTILINE)) == len(RANKS), "it fits"


@pytest.mark.timeout(620 if WHOLE else 120)
@pytest.mark.parametrize("names", [[name] for name in RANKS] if WHOLE else [list(RANKS)], ids="-".join)
def test_a_step(zygote: Zygote, tmp_path: Path, names: list[str]) -> None:
    changed = [part for key, value in ON_CPU.items() for part in (f"--{key}", value)]
    commands = [["fit", *settings(name), *changed, *([] if WHOLE else NARROWER[name])] for name in names]
    codes = zygote.run("tests.scripts.examples:run_commands", 2, tmp_path, 600 if WHOLE else 110, commands=commands)
    text = (tmp_path / "0.txt").read_text()
    assert codes == [0, 0], text
    assert text.count("`Trainer.fit` stopped: `max_steps=1` reached.") == len(names)
    print(*names, *re.findall(r"^rank .: peak .*", text + (tmp_path / "1.txt").read_text(), re.MULTILINE), sep="\n")

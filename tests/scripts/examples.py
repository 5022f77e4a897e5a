"""Runs examples and their settings in forked processes; what they import is imported before the fork."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path

from lightning_tspipe.cli import main
from tests.scripts.zygote import ROOT

for _name in (  # some are optional
    "lightly.loss", "lightly.models.modules.heads", "lightly.transforms", "sklearn.datasets", "sklearn.model_selection",
    "sklearn.neighbors", "timm", "tokenizers", "torchvision.transforms.v2", "transformers.models.bert.modeling_bert",
):  # fmt: skip
    with suppress(ImportError):
        importlib.import_module(_name)


def run_example(rank: int, out: Path, name: str, options: list[str]) -> None:
    """What every rank of an example runs."""
    sys.argv = [name, *options]
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


def run_commands(rank: int, out: Path, commands: list[list[str]]) -> None:
    """What every rank of the command line runs, in the folder of the examples, one command after another."""
    os.chdir(ROOT / "examples")
    for command in commands:
        main(command)

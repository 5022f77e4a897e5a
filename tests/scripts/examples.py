"""Runs examples and their settings in forked processes; what they import is imported before the fork."""

from __future__ import annotations

import importlib
import os
import resource
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tspipe.cli import main
from tests.scripts.zygote import ROOT

for _name in (  # some are optional
    "lightly.loss", "lightly.models.modules.heads", "lightly.transforms", "sklearn.datasets", "sklearn.model_selection",
    "sklearn.neighbors", "timm", "tokenizers", "torchvision.transforms.v2", "transformers.models.bert.modeling_bert",
):  # fmt: skip
    with suppress(ImportError):
        importlib.import_module(_name)


def normalize_by_rows(rows: int) -> None:
    """From here on a batch norm in training normalizes that many rows at a time, as in a pipeline of microbatches.

    The running statistics move as the pipeline's do: once per batch, by the statistics of the whole batch.
    """
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        whole: Any = kind.forward

        def forward(self: Any, x: Tensor, whole: Any = whole) -> Tensor:
            if not self.training:
                return whole(self, x)  # type: ignore[no-any-return]
            with torch.no_grad():
                whole(self, x)  # for the running statistics
            parts = (
                F.batch_norm(part, None, None, self.weight, self.bias, True, 0, self.eps) for part in x.split(rows)
            )
            return torch.cat(list(parts))

        kind.forward = forward  # type: ignore[method-assign]


def run_example(
    rank: int, out: Path, name: str, options: list[str], rows: int | None = None, double: bool = False
) -> None:
    """What every rank of an example runs; `rows` as in `normalize_by_rows`, `double` for networks in float64."""
    if double:
        torch.set_default_dtype(torch.float64)
    if rows is not None:
        normalize_by_rows(rows)
    sys.argv = [name, *options]
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


def run_commands(rank: int, out: Path, commands: list[list[str]]) -> None:
    """What every rank of the command line runs, in the folder of the examples, one command after another."""
    os.chdir(ROOT / "examples")
    for command in commands:
        main(command)
    print(f"rank {rank}: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")

"""Cases that run by the sequential twin and by pipelines of several sizes, and what every rank returned.

A case is a function that gets `Make`, which builds a trainer, and returns anything. All cases of a file run one after
another in the same processes, so that they are as cheap as their trainings.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from tests.scripts.small import trainer, weights
from tests.scripts.zygote import Zygote

Make = Callable[..., L.Trainer]
Case = Callable[[Make], Any]
TWIN = 0  # number of stages that stands for `strategy="auto"`
ON_RANK_0 = "only rank 0 has this"
TOLERANCE = 1e-12
DEADLINE = 80.0


def case(cases: dict[str, Case]) -> Callable[[Case], Case]:
    """Put a function into the cases of a file."""

    def add(function: Case) -> Case:
        cases[function.__name__] = function
        return function

    return add


def run(rank: int, out: Path, module: str, stages: int, microbatches: int) -> None:
    """One rank of all cases of a file."""
    torch.set_num_threads(1)

    def make(
        microbatches: int = microbatches, schedule: str = "auto", teacher: int | str = "auto", **options: Any
    ) -> L.Trainer:
        ours = {"microbatches": microbatches, "teacher_microbatches": teacher, "schedule": schedule}
        strategy: Any = "auto" if stages == TWIN else TSPipeStrategy(balance="parameters", **ours)  # type: ignore[arg-type]
        return trainer(max(1, stages), strategy, **({"num_sanity_val_steps": 0} | options))

    for name, function in importlib.import_module(module).CASES.items():
        print(f"{time.monotonic():.1f}: {name}", flush=True)
        torch.manual_seed(7)
        make.folder = out / "files" / name  # type: ignore[attr-defined]
        torch.save(function(make), out / f"{name}.{rank}.pt")


class Twins:
    """Runs the cases of a file, and compares.

    Args:
        zygote: forks the ranks.
        folder: for what they leave.
        module: name of the file.
        pipelines: numbers of stages and of microbatches.
    """

    def __init__(self, zygote: Zygote, folder: Path, module: str, pipelines: Mapping[int, int]) -> None:
        self._folder, self._pipelines = folder, dict(pipelines)
        for stages, microbatches in ({TWIN: 1} | self._pipelines).items():
            out, ranks = folder / str(stages), max(1, stages)
            out.mkdir()
            arguments = {"module": module, "stages": stages, "microbatches": microbatches}
            codes = zygote.run("tests.twins:run", ranks, out, DEADLINE, **arguments)
            assert codes == [0] * ranks, "\n".join((out / f"{rank}.txt").read_text() for rank in range(ranks))

    def files(self, name: str, stages: int) -> Path:
        """The folder that a case was given for its files."""
        return self._folder / str(stages) / "files" / name

    def ranks(self, name: str, stages: int) -> list[Any]:
        """What every rank returned."""
        files = [self._folder / str(stages) / f"{name}.{rank}.pt" for rank in range(max(1, stages))]
        return [torch.load(file, weights_only=False) for file in files]

    def same(self, name: str) -> Any:
        """Every rank of every pipeline returned what the twin did; that."""
        (expected,) = self.ranks(name, TWIN)
        for stages in self._pipelines:
            for rank, found in enumerate(self.ranks(name, stages)):
                assert_same(found, expected, f"{name}, rank {rank} of {stages}: ")
        return expected


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Equal nestings, keys in equal order; numbers up to rounding in float64."""
    if isinstance(found, str) and found == ON_RANK_0:
        return
    assert type(found) is type(expected), (path, found, expected)
    if isinstance(expected, Mapping):
        assert list(found) == list(expected), path
        for key, value in expected.items():
            assert_same(found[key], value, f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), (path, found, expected)
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{path}/{index}")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, (path, found, expected)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{path}: {text}")
    elif isinstance(expected, float):
        close = math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        assert close or (math.isnan(found) and math.isnan(expected)), (path, found, expected)
    else:
        assert found == expected, (path, found, expected)


def state(trainer: L.Trainer, module: TeacherStudentModule) -> dict[str, Any]:
    """Weights and where the trainer is, after a run."""
    tensors = weights(module) | {f"teacher.{name}": t.detach().clone() for name, t in module.teacher.named_parameters()}
    assert not any(tensor.is_meta for tensor in tensors.values())
    return {
        "weights": tensors,
        "metrics": {name: value.detach().clone() for name, value in trainer.callback_metrics.items()},
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
    }

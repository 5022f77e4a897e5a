"""This library on the emulated problem, through its public API alone."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from lightning_tspipe.placement import Placement
from tests.benchmarks.fit import timed_fit
from tests.benchmarks.measure import Measurement
from tests.benchmarks.problem import CLIP, LEARNING_RATE, Problem
from tests.benchmarks.processes import run_forked

MESSAGE_S = 5e-4  # what the planner is told of a message
PAPER = "the paper's schedule, our runtime"


class EmulatedPair(TeacherStudentModule):
    """A teacher and a student, one emulated layer of each per stage.

    Args:
        problem: What to train.
    """

    student: nn.Sequential

    def __init__(self, problem: Problem) -> None:
        followed = problem.momentum is not None
        super().__init__(
            momentum=problem.momentum,
            teacher_delay=problem.delay if followed else None,
            loss_over=problem.loss_over,
            teacher_mode="eval",
        )
        self.teacher, self.student = problem.networks()

    @override
    def loss(self, student_out: Tensor, teacher_out: Tensor, target: None) -> Tensor:
        return nn.functional.mse_loss(student_out, teacher_out)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=LEARNING_RATE)


def measure_ours(problem: Problem, contender: str = "tspipe") -> Measurement:
    """Train the problem with ``TSPipeStrategy`` on as many processes as it has stages.

    Args:
        problem: What to train.
        contender: ``PAPER`` trains it as Lim et al. do ("TSPipe: Learn from Teacher Faster with Pipelines", ICML 2022,
            https://proceedings.mlr.press/v162/lim22a.html): all forwards, then all backwards, the student's
            microbatches half as large as the teacher's.
    """
    ours = problem.halved() if contender == PAPER else problem
    [(step_s, error)] = run_forked(_train, 1, ours, timeout_s=problem.timeout_s)
    return Measurement(contender, problem.name, step_s, problem.work_s / step_s if step_s else 0.0, error)


def _train(_: int, problem: Problem) -> tuple[float, float]:
    """Drive one fit; seconds of a step, and the largest error of a parameter."""
    module = EmulatedPair(problem)
    loader = DataLoader(TensorDataset(problem.samples()), batch_size=problem.num_microbatches * problem.rows)
    with tempfile.TemporaryDirectory() as folder:
        _plan(problem).save(path := Path(folder, "plan.json"))
        strategy = TSPipeStrategy(
            microbatches=problem.num_microbatches, balance=path, schedule=problem.order, start_method="fork",
            teacher_microbatches=problem.teacher_microbatches or problem.num_microbatches,
        )  # fmt: skip
        fit = timed_fit(module, loader, strategy, problem.num_stages, problem.num_steps, **_exchange(problem))
    return fit.step_s, problem.check(enumerate(module.student))


def _exchange(problem: Problem) -> dict[str, Any]:
    """What a trainer is told so that the stages wait for each other before an optimizer step."""
    if problem.exchange == "clipping":
        return {"gradient_clip_val": CLIP}
    if problem.exchange == "scaler":  # nothing here is cast: autocast leaves float64 alone
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]}
    return {}


def _plan(problem: Problem) -> Placement:
    """One layer of each network per stage, and the costs, which are known."""
    names = tuple((str(stage),) for stage in range(problem.num_stages))
    costs, nothing = problem.costs, (0.0,) * problem.num_stages
    return Placement(
        names, names, t=costs.t, f=costs.f, b=costs.b, w=costs.w, messages=nothing, message=MESSAGE_S,
        weights=nothing, held=nothing,
    )  # fmt: skip

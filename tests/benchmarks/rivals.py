"""torch.distributed.pipelining on the emulated problem: the teacher inside the student's forward, or before it."""

import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from tests.benchmarks.measure import Measurement, step_seconds
from tests.benchmarks.problem import LEARNING_RATE, Problem
from tests.benchmarks.processes import run_forked
from tests.ports import free_port


class FusedStage(nn.Module):
    """One stage of student and teacher in one forward; a pair of activations travels down the pipeline.

    Args:
        student: The student's layer.
        teacher: The teacher's layer.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, student_input: Tensor, teacher_input: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_output = self.teacher(student_input if teacher_input is None else teacher_input)
        return self.student(student_input), teacher_output


class FusedRival:
    """One schedule whose stage forwards run both networks.

    Args:
        schedule: The schedule's class.
        problem: What to train.
        student: This rank's student layer.
        teacher: This rank's teacher layer.
    """

    def __init__(
        self, schedule: type[PipelineScheduleSingle], problem: Problem, student: nn.Module, teacher: nn.Module
    ) -> None:
        stage = _stage(FusedStage(student, teacher), problem)
        self.schedule = schedule(stage, problem.num_microbatches, loss_fn=self.loss)
        self.first, self.last = stage.is_first, stage.is_last

    @staticmethod
    def loss(outputs: tuple[Tensor, Tensor], _target: Tensor) -> Tensor:
        """Mean squared error of one microbatch; the teacher's output came along with the student's."""
        return nn.functional.mse_loss(*outputs)

    def step(self, batch: Tensor) -> None:
        """Forward and backward of one batch; every rank has it, the first alone feeds it in."""
        inputs = (batch,) if self.first else ()
        # the schedule insists on a target; this loss ignores it
        self.schedule.step(*inputs, target=batch if self.last else None, return_outputs=False)


class TwoPassRival:
    """A forward-only pass of the teacher's pipeline, then the student's schedule with its output as the target.

    Args:
        schedule: The student's schedule class.
        problem: What to train.
        student: This rank's student layer.
        teacher: This rank's teacher layer.
    """

    def __init__(
        self, schedule: type[PipelineScheduleSingle], problem: Problem, student: nn.Module, teacher: nn.Module
    ) -> None:
        stage = _stage(student, problem)
        self.teacher = ScheduleGPipe(_stage(teacher, problem), problem.num_microbatches)
        self.schedule = schedule(stage, problem.num_microbatches, loss_fn=nn.functional.mse_loss)
        self.first = stage.is_first

    def step(self, batch: Tensor) -> None:
        """Forward and backward of one batch; every rank has it, the first alone feeds it in."""
        inputs = (batch,) if self.first else ()
        with torch.no_grad():
            teacher_output = self.teacher.eval(*inputs)
        self.schedule.step(*inputs, target=teacher_output, return_outputs=False)


RIVALS: dict[str, partial[Any]] = {
    "GPipe, teacher fused": partial(FusedRival, ScheduleGPipe),
    "1F1B, teacher fused": partial(FusedRival, Schedule1F1B),
    "GPipe, teacher pass first": partial(TwoPassRival, ScheduleGPipe),
    "1F1B, teacher pass first": partial(TwoPassRival, Schedule1F1B),
}


def measure_rival(contender: str, problem: Problem) -> Measurement:
    """Train the problem with one of ``RIVALS`` on as many processes as it has stages."""
    ranks = run_forked(_train, problem.num_stages, contender, problem, free_port(), timeout_s=problem.timeout_s)
    step_s = step_seconds([ends for ends, _ in ranks])
    return Measurement(contender, problem.name, step_s, problem.work_s / step_s, max(error for _, error in ranks))


def _stage(module: nn.Module, problem: Problem) -> PipelineStage:
    return PipelineStage(module, dist.get_rank(), problem.num_stages, torch.device("cpu"))


def _train(rank: int, contender: str, problem: Problem, port: int) -> tuple[list[float], float]:
    """Train on one rank; when each step ended, and the largest error of a parameter of this stage."""
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=problem.num_stages)
    teacher, student = problem.networks()
    rival = RIVALS[contender](problem, student[rank], teacher[rank])
    optimizer = torch.optim.SGD(student[rank].parameters(), lr=LEARNING_RATE)
    ends = []
    for batch in problem.batches():
        optimizer.zero_grad()
        rival.step(batch)
        optimizer.step()
        ends.append(time.perf_counter())
    dist.barrier()
    dist.destroy_process_group()
    return ends, problem.check([student[rank]], first_layer=rank)

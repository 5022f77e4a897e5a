"""torch.distributed.pipelining on the emulated problem: the teacher inside the student's forward, or before it."""

import time
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from tests.benchmarks.measure import Measurement, step_seconds
from tests.benchmarks.problem import LEARNING_RATE, Problem
from tests.benchmarks.processes import run_forked
from tests.ports import free_port


class Rival(Protocol):
    """What runs a step; every rank has the batch."""

    def step(self, batch: Tensor) -> None:
        """Forward and backward of one batch."""


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


class Placed:
    """What has a schedule of torch's, and the layers where that wants them: one per rank, or two.

    Args:
        schedule: Its class.
    """

    def __init__(self, schedule: type[PipelineScheduleSingle] | type[PipelineScheduleMulti]) -> None:
        self.make: Any = schedule
        self.chunks = 1 if issubclass(schedule, PipelineScheduleSingle) else 2

    def places(self, rank: int, problem: Problem) -> list[int]:
        """Which layers a rank has: those of a loop over all ranks, or of one down and up again."""
        count = problem.num_stages
        if self.chunks == 1:
            return [rank]
        return [rank, 2 * count - 1 - rank if self.make is ScheduleZBVZeroBubble else count + rank]

    def schedule(self, stages: list[PipelineStage], problem: Problem, loss: Any) -> Any:
        """It, with stages of this rank."""
        return self.make(stages[0] if self.chunks == 1 else stages, problem.num_microbatches, loss_fn=loss)


class Fused(Placed):
    """A schedule whose stage forwards run both networks."""

    def __call__(self, problem: Problem, layers: dict[int, tuple[nn.Module, nn.Module]]) -> Rival:
        """What one rank runs.

        Args:
            problem: What to train.
            layers: This rank's of student and teacher, by place.
        """
        stages = [_stage(FusedStage(*pair), place, problem) for place, pair in layers.items()]
        schedule = self.schedule(stages, problem, _loss)
        return _FusedStep(schedule, any(s.is_first for s in stages), any(s.is_last for s in stages))


class _FusedStep:
    def __init__(self, schedule: Any, first: bool, last: bool) -> None:
        self.schedule, self.first, self.last = schedule, first, last

    def step(self, batch: Tensor) -> None:
        inputs = (batch,) if self.first else ()
        # the schedule insists on a target; this loss ignores it
        self.schedule.step(*inputs, target=batch if self.last else None, return_outputs=False)


def _loss(outputs: tuple[Tensor, Tensor], _target: Tensor) -> Tensor:
    """Mean squared error of one microbatch; the teacher's output came along with the student's."""
    return nn.functional.mse_loss(*outputs)


class TwoPass(Placed):
    """A forward-only pass of the teacher's pipeline, then the student's schedule with its output as the target.

    Args:
        schedule: The student's. The teacher always has one stage per rank, of as many layers as the student's two.
        serial: Whether nothing begins before what was before has ended on all ranks.
    """

    def __init__(
        self, schedule: type[PipelineScheduleSingle] | type[PipelineScheduleMulti], serial: bool = False
    ) -> None:
        super().__init__(schedule)
        self.serial = serial

    def __call__(self, problem: Problem, layers: dict[int, tuple[nn.Module, nn.Module]]) -> Rival:
        """What one rank runs."""
        rank, count = dist.get_rank(), problem.num_stages
        if self.chunks == 1:
            [(_, teacher)] = layers.values()
        else:
            assert problem.momentum is None, "the teacher's layers are not where the student's are"
            teacher = problem.networks()[0][self.chunks * rank : self.chunks * (rank + 1)]
        passes = ScheduleGPipe(PipelineStage(teacher, rank, count, torch.device("cpu")), problem.num_microbatches)
        stages = [_stage(student, place, problem) for place, (student, _) in layers.items()]
        schedule = self.schedule(stages, problem, nn.functional.mse_loss)
        return _TwoPassStep(passes, schedule, self.make is ScheduleZBVZeroBubble, self.serial)


class _TwoPassStep:
    def __init__(self, teacher: ScheduleGPipe, student: Any, up_again: bool, serial: bool) -> None:
        self.teacher, self.student, self.up_again, self.serial = teacher, student, up_again, serial

    def step(self, batch: Tensor) -> None:
        rank, last = dist.get_rank(), dist.get_world_size() - 1
        inputs = () if rank else (batch,)
        with torch.no_grad():
            target = self.teacher.eval(*inputs)
        if self.up_again and rank == last:  # the student ends on the first rank
            dist.send(target, 0)
        elif self.up_again and not rank:
            dist.recv(target := torch.empty_like(batch), last)
        if self.serial:
            dist.barrier()
        self.student.step(*inputs, target=target, return_outputs=False)
        if self.serial:
            dist.barrier()


RIVALS: dict[str, Fused | TwoPass] = {
    "GPipe, teacher fused": Fused(ScheduleGPipe),
    "1F1B, teacher fused": Fused(Schedule1F1B),
    "GPipe, teacher pass first": TwoPass(ScheduleGPipe),
    "1F1B, teacher pass first": TwoPass(Schedule1F1B),
    "Interleaved 1F1B, teacher fused": Fused(ScheduleInterleaved1F1B),
    "Interleaved zero bubble, teacher fused": Fused(ScheduleInterleavedZeroBubble),
    "ZBV, teacher fused": Fused(ScheduleZBVZeroBubble),
    "Interleaved 1F1B, teacher pass first": TwoPass(ScheduleInterleaved1F1B),
    "Interleaved zero bubble, teacher pass first": TwoPass(ScheduleInterleavedZeroBubble),
    "ZBV, teacher pass first": TwoPass(ScheduleZBVZeroBubble),
}
WHOLE: dict[str, Fused | TwoPass] = {  # one microbatch
    "serial model parallelism": TwoPass(ScheduleGPipe, serial=True),
    "pass-streaming model parallelism": TwoPass(ScheduleGPipe),
}


def measure_rival(contender: str, problem: Problem) -> Measurement:
    """Train the problem with one of ``RIVALS`` or ``WHOLE`` on as many processes as it has stages."""
    rival = (RIVALS | WHOLE)[contender]
    theirs = replace(problem.serial() if contender in WHOLE else problem, chunks=rival.chunks)
    ranks = run_forked(_train, problem.num_stages, contender, theirs, free_port(), timeout_s=problem.timeout_s)
    step_s = step_seconds([ends for ends, _ in ranks])
    return Measurement(contender, problem.name, step_s, problem.work_s / step_s, max(error for _, error in ranks))


def _stage(module: nn.Module, place: int, problem: Problem) -> PipelineStage:
    return PipelineStage(module, place, problem.num_stages * problem.chunks, torch.device("cpu"))


def _train(rank: int, contender: str, problem: Problem, port: int) -> tuple[list[float], float]:
    """Train on one rank; when each step ended, and the largest error of a parameter of this rank."""
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=problem.num_stages)
    teacher, student = problem.networks()
    make = (RIVALS | WHOLE)[contender]
    layers = {place: (student[place], teacher[place]) for place in make.places(rank, problem)}
    rival = make(problem, layers)
    optimizer = torch.optim.SGD([p for layer, _ in layers.values() for p in layer.parameters()], lr=LEARNING_RATE)
    ends = []
    for batch in problem.batches():
        optimizer.zero_grad()
        rival.step(batch)
        optimizer.step()
        for mine, its in layers.values():
            problem.follow(its, mine)
        ends.append(time.perf_counter())
    dist.barrier()
    dist.destroy_process_group()
    return ends, problem.check((place, mine) for place, (mine, _) in layers.items())

"""Real compute on two processes of one thread: this library, Lightning's DDP, and other pipelines."""

import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from lightning_tspipe.balance import Chain, joint_cut
from tests.benchmarks.fit import Fit, peak_bytes, timed_fit
from tests.benchmarks.measure import step_seconds
from tests.benchmarks.pairs import NUM_CLASSES, PAIRS, Distillation
from tests.benchmarks.processes import run_forked
from tests.ports import free_port

NUM_PROCESSES = 2
NUM_STEPS = 8
NUM_ROUNDS, RIVAL_ROUNDS = 4, 2  # other pipelines are far behind; of DDP and this one the fastest of more
LEAST_STEP_S = 0.3
CLOSE = "DDP", "tspipe"
RIVAL_MICROBATCHES = 2, 4  # a microbatch of few samples is slow, and few microbatches leave bubbles
TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Contest:
    """One contender's best round.

    Attributes:
        pair: What was trained.
        contender: Who trained.
        step_s: Seconds of a steady step, in the fastest round.
        samples_per_s: Samples of the whole job per second.
        peak_mib: Peak memory of every process above that of an idle one, the larger of the rounds.
    """

    pair: str
    contender: str
    step_s: float
    samples_per_s: float
    peak_mib: list[float]


def measure_real(full: bool, known: Container[str] = ()) -> Iterator[Contest]:
    """All contenders in turn, so that they see the same machine; a short run has one pair and no other pipelines."""
    [idle] = run_forked(_idle, 1, timeout_s=TIMEOUT_S)
    for pair in PAIRS if full else list(PAIRS)[:1]:
        if pair in known:
            continue
        contenders: dict[str, Callable[[], Fit]] = {
            "DDP": partial(_one, _fit_ddp, pair),
            "tspipe": partial(_one, _fit_tspipe, pair),
        }
        if full:
            sizes = run_forked(_sizes, 1, pair, timeout_s=TIMEOUT_S)[0]
            contenders["serial model parallelism"] = partial(_pipeline, pair, sizes, 1)
            for count in RIVAL_MICROBATCHES:
                contenders[f"1F1B, teacher fused, M={count}"] = partial(_pipeline, pair, sizes, count)
        rounds: dict[str, list[Fit]] = {name: [] for name in contenders}
        for number in range(NUM_ROUNDS if full else RIVAL_ROUNDS):
            for name, run in contenders.items():
                if number < RIVAL_ROUNDS or name in CLOSE:
                    rounds[name].append(run())
        mine = [_contest(pair, name, fits, idle) for name, fits in rounds.items()]
        if mine[0].step_s < LEAST_STEP_S:
            raise RuntimeError(f"DDP takes {mine[0].step_s:.2f} s per step of {pair}, too little to compare")
        yield from mine


def _contest(pair: str, contender: str, rounds: list[Fit], idle: int) -> Contest:
    step_s = min(fit.step_s for fit in rounds)
    peaks = [max(ranks) for ranks in zip(*(fit.peak_bytes for fit in rounds), strict=True)]
    return Contest(pair, contender, step_s, PAIRS[pair].batch_size / step_s, [(peak - idle) / 2**20 for peak in peaks])


def _idle(_: int) -> int:
    return peak_bytes()


def _one(fit: Callable[[int, str], Fit], pair: str) -> Fit:
    found: Fit = run_forked(fit, 1, pair, timeout_s=TIMEOUT_S)[0]
    return found


def _fit_ddp(_: int, pair: str) -> Fit:
    return _fit(pair, DDPStrategy(start_method="fork"), PAIRS[pair].batch_size // NUM_PROCESSES)


def _fit_tspipe(_: int, pair: str) -> Fit:
    own = PAIRS[pair]
    options: dict[str, Any] = {"schedule": own.schedule, "teacher_microbatches": own.of_teacher}
    strategy = TSPipeStrategy(microbatches=own.num_microbatches, start_method="fork", **options)
    return _fit(pair, strategy, PAIRS[pair].batch_size)


def _fit(pair: str, strategy: Strategy, batch_size: int) -> Fit:
    """Train with batches of ``batch_size`` in every process that loads."""
    torch.manual_seed(0)
    samples = NUM_STEPS * PAIRS[pair].batch_size
    data = TensorDataset(PAIRS[pair].inputs(samples), torch.arange(samples) % NUM_CLASSES)
    loader = DataLoader(data, batch_size=batch_size)
    return timed_fit(PAIRS[pair].make(), loader, strategy, NUM_PROCESSES, NUM_STEPS)


# --- other pipelines


class FusedStage(nn.Module):
    """One stage of both networks; all views of the student travel, then all of the teacher.

    Args:
        student, teacher: This stage's layers.
        first: Whether the inputs are the batch's, the same for both.
        views: How many.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, first: bool, views: int) -> None:
        super().__init__()
        self.student, self.teacher, self.first, self.views = student, teacher, first, views

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        of_student, of_teacher = (values, values) if self.first else (values[: self.views], values[self.views :])
        with torch.no_grad():
            teachers = [self.teacher(value) for value in of_teacher]
        # torch sends into memory of the same strides, which gloo refuses if they are not the usual ones
        return tuple(value.contiguous() for value in (*(self.student(value) for value in of_student), *teachers))


def _inputs(module: TeacherStudentModule, batch: Tensor) -> list[Tensor]:
    views = module.student_input((batch,))
    return list(views) if isinstance(views, list) else [views]


def _pipeline(pair: str, sizes: tuple[int, int], num_microbatches: int) -> Fit:
    args = pair, sizes, num_microbatches, free_port()
    ranks = run_forked(_train, NUM_PROCESSES, *args, timeout_s=TIMEOUT_S)
    return Fit(step_seconds([ends for ends, _ in ranks]), [peak for _, peak in ranks])


def _train(rank: int, pair: str, sizes: tuple[int, int], num_microbatches: int, port: int) -> tuple[list[float], int]:
    """When each step ended, and the peak memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=NUM_PROCESSES)
    module: Any = PAIRS[pair].make()
    module.train()
    slices = [slice(None, size) if rank == 0 else slice(size, None) for size in sizes]
    student, teacher = module.student[slices[0]], module.teacher[slices[1]]
    del module.student, module.teacher  # what other ranks have is let go of
    size = PAIRS[pair].batch_size
    inputs, labels = PAIRS[pair].inputs(size), torch.arange(size) % NUM_CLASSES
    views = _inputs(module, inputs)

    def loss(outputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        halves = [list(outputs[: len(views)]), list(outputs[len(views) :])]
        found: Tensor = module.loss(*(half if len(views) > 1 else half[0] for half in halves), target)
        return found

    stage = PipelineStage(FusedStage(student, teacher, rank == 0, len(views)), rank, NUM_PROCESSES, torch.device("cpu"))
    schedule: Any = (ScheduleGPipe if num_microbatches == 1 else Schedule1F1B)(stage, num_microbatches, loss_fn=loss)
    module.student = student
    own = module.configure_optimizers()
    ends = []
    for _ in range(NUM_STEPS):
        own.zero_grad()
        schedule.step(*(views if rank == 0 else ()), target=labels if rank else None, return_outputs=False)
        own.step()
        if module.momentum is not None:
            with torch.no_grad():
                for mine, its in zip(teacher.parameters(), student.parameters(), strict=False):
                    mine.lerp_(its, 1 - module.momentum)
        ends.append(time.perf_counter())
    dist.barrier()
    dist.destroy_process_group()
    return ends, peak_bytes()


def _sizes(_: int, pair: str) -> tuple[int, int]:
    """How many layers of student and teacher the first stage gets, such that both take as long."""
    torch.set_num_threads(1)
    module: Any = PAIRS[pair].make()
    views = len(_inputs(module, PAIRS[pair].inputs(2)))
    value = PAIRS[pair].inputs(PAIRS[pair].batch_size // PAIRS[pair].num_microbatches)
    student = _layer_seconds(module.student, value, True)
    teacher = _layer_seconds(module.teacher, value, False)
    if isinstance(module, Distillation):
        sizes = joint_cut(Chain(student), Chain(teacher), 2)
        return sizes[0][0], sizes[1][0]
    both = [a + b for a, b in zip(student, [*teacher, 0.0], strict=True)]
    (size, _), _ = joint_cut(Chain([views * seconds for seconds in both]), Chain([0.0, 0.0]), 2)
    return size, size


def _layer_seconds(network: nn.Sequential, value: Tensor, backward: bool) -> list[float]:
    """Seconds of each layer on one microbatch, the fastest of a few tries."""
    seconds = []
    for layer in network:
        tries = []
        for _ in range(4):
            x = value.detach().clone()
            x = x.requires_grad_() if backward and x.is_floating_point() else x
            start = time.perf_counter()
            with torch.set_grad_enabled(backward):
                output = layer(x.clone())  # some layers write into their input
                if output.requires_grad:
                    output.sum().backward()
            tries.append(time.perf_counter() - start)
        seconds.append(min(tries))
        value = output.detach()
    return seconds

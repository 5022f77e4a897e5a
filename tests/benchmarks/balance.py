"""How near the cut of ``balance="auto"`` is to the best one, by brute force over layer times measured apart from it."""

import itertools
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18, resnet50, vit_b_16
from typing_extensions import override

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from lightning_tspipe.board import World
from lightning_tspipe.comm import Comm
from lightning_tspipe.measure import LayerCost, MessageCost, Meter, fastest
from lightning_tspipe.partition import Layers, find_layers
from lightning_tspipe.placement import Placement
from lightning_tspipe.recording import tensors_of
from lightning_tspipe.topology import Topology
from tests.benchmarks.processes import run_forked
from tests.ports import free_port

ROWS, MICROBATCHES, IMAGE_SIZE = 16, 4, 64
STAGES = (2, 3, 4)
TEACHERS = {"resnet50": resnet50, "vit_b_16": vit_b_16}
TIMEOUT_S = 300.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Cut:
    """One pair of networks at one number of stages; seconds are of a microbatch on the slowest rank, messages included.

    Attributes:
        teacher: The teacher, which a resnet18 learns from.
        stages: How many.
        chosen_s: With the cut that a fit chose by its own measurement.
        parameters_s: With the cut by parameters.
        best_s: With the best of all cuts.
    """

    teacher: str
    stages: int
    chosen_s: float
    parameters_s: float
    best_s: float


class Distillation(TeacherStudentModule):
    """resnet18 learns from a larger network."""

    def __init__(self, teacher: str) -> None:
        super().__init__()
        options = {"image_size": IMAGE_SIZE} if teacher.startswith("vit") else {}
        self.teacher, self.student = TEACHERS[teacher](**options), resnet18()

    @override
    def loss(self, student_out: Tensor, teacher_out: Tensor, target: Tensor) -> Tensor:
        return (student_out - teacher_out).square().mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.01)


def measure_balance(full: bool) -> list[Cut]:
    """The first teacher at two numbers of stages, or every one at every number.

    Layers are measured by themselves in some processes, before, between and after the fits, and the median counts: a
    convolution with large filters can take a third less in one process than in most. Nothing that the fits have
    measured is used.
    """
    cuts, counts = [], STAGES if full else STAGES[::2]
    message = run_forked(_message_cost, 2, free_port(), timeout_s=TIMEOUT_S)[0]
    for teacher in TEACHERS if full else list(TEACHERS)[:1]:
        measured, chosen = [], {}
        for stages in (*counts, None):
            measured.append(run_forked(_measure, 1, teacher, timeout_s=TIMEOUT_S)[0])
            if stages is not None:
                chosen[stages] = run_forked(_fit, 1, teacher, stages, timeout_s=TIMEOUT_S)[0]
        by_parameters = measured[0][2]
        student, of_teacher = (
            Times(
                np.median([[cost.seconds for cost in costs[place]] for costs in measured], axis=0),
                np.array([0, *(messages * message.seconds(cost.sent) for cost in measured[0][place])]),
            )
            for place, messages in ((0, 2), (1, 1))
        )
        for stages in counts:
            seconds = [slowest(student, of_teacher, sizes) for sizes in (chosen[stages], by_parameters[stages])]
            cuts.append(Cut(teacher, stages, *seconds, best(student, of_teacher, stages)))
    return cuts


@dataclass(frozen=True)
class Times:
    """Seconds of one network: of its layers, and of the messages of a cut before each layer and after the last one."""

    layers: np.ndarray
    messages: np.ndarray

    def stages(self, starts: Sequence[int]) -> np.ndarray:
        """Seconds of each stage."""
        edges = np.append(self.messages[list(starts)], 0.0)
        return np.add.reduceat(self.layers, starts) + edges[:-1] + edges[1:]


def slowest(student: Times, teacher: Times, sizes: tuple[list[int], list[int]]) -> float:
    """Seconds of the slowest rank."""
    pairs = zip((student, teacher), sizes, strict=True)
    return float(sum(times.stages(np.cumsum([0, *of[:-1]])) for times, of in pairs).max())


def best(student: Times, teacher: Times, stages: int) -> float:
    """Seconds of the slowest rank with the best of all pairs of cuts; those of which one is too slow are left out."""
    sums = []
    for times in (student, teacher):
        starts = itertools.combinations(range(1, len(times.layers)), stages - 1)
        sums.append(np.array([times.stages([0, *places]) for places in starts]))
    rows, others = (each[each.max(axis=1).argsort()] for each in sums)
    least, slowest_other = math.inf, others.max(axis=1)
    for row in rows:
        if row.max() >= least:
            break
        fast = others[: np.searchsorted(slowest_other, least)]
        least = min(least, float((fast + row).max(axis=1).min(initial=math.inf)))
    return least


def _measure(_: int, teacher: str) -> tuple[list[LayerCost], list[LayerCost], dict[int, Any]]:
    """What every layer of student and teacher costs, and the cuts by parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Distillation(teacher)
    module.train()
    layers = find_layers(module.student, module.teacher, 2, {}, None, lambda name: [torch.rand(2, *_SHAPE)])
    return (
        _costs(layers, "student"),
        _costs(layers, "teacher"),
        {stages: layers.by_parameters(stages) for stages in STAGES},
    )


_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)


def _costs(layers: Layers, name: str) -> list[LayerCost]:
    meter, apart = Meter(CPU), layers.apart()
    known = tensors_of(layers.networks[name])

    def once() -> tuple[None, list[LayerCost]]:
        costs, views = [], [torch.rand(ROWS // MICROBATCHES, *_SHAPE)]
        for number, layer in enumerate(getattr(layers, name)):
            run: nn.Module = apart.runs(name, number)[0].module
            tensors = [known[key] for key in layer.state_names]
            if name == "teacher":
                views, cost = meter.teacher(run, tensors, views)
            else:
                views, cost = meter.student(run, tensors, views, number == 0)
            costs.append(cost)
        return None, costs

    return fastest(once)[1]


def _message_cost(rank: int, port: int) -> MessageCost:
    """What a message between two processes costs."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    topology, timeout = Topology(rank, 2, 2), timedelta(seconds=TIMEOUT_S)
    comm = Comm(topology, CPU, "gloo", World(topology, timeout))
    cost = Meter(CPU).message(comm)
    comm.drain()
    dist.barrier()
    return cost


class _Keep(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        if trainer.is_global_zero:
            strategy.placement.save(self.path)


def _fit(_: int, teacher: str, stages: int) -> tuple[list[int], list[int]]:
    """The cut that a fit of one step chooses."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    path = Path(tempfile.mkdtemp(), "plan.json")
    images = torch.rand(1, *_SHAPE).expand(ROWS, -1, -1, -1)
    loader = DataLoader(TensorDataset(images, torch.zeros(ROWS)), batch_size=ROWS)
    strategy = TSPipeStrategy(microbatches=MICROBATCHES, start_method="fork")
    trainer = L.Trainer(
        accelerator="cpu", devices=stages, strategy=strategy, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[_Keep(path)],
    )  # fmt: skip
    trainer.fit(Distillation(teacher), loader)
    return Placement.load(path).sizes

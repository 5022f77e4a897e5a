"""How near the cut of ``balance="auto"`` is to the best one, by brute force over layer times measured apart from it."""

import itertools
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18, resnet50, vit_b_16
from typing_extensions import override

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from lightning_tspipe.measure import LayerCost, Meter
from lightning_tspipe.partition import Layers, find_layers
from lightning_tspipe.placement import Placement
from lightning_tspipe.recording import tensors_of
from tests.benchmarks.processes import run_forked

ROWS, MICROBATCHES, IMAGE_SIZE = 16, 4, 64
STAGES = (2, 3, 4)
TEACHERS = {"resnet50": resnet50, "vit_b_16": vit_b_16}
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Cut:
    """One pair of networks at one number of stages; seconds are of a microbatch on the slowest rank.

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


def measure_balance() -> list[Cut]:
    """Every teacher at every number of stages; layers are measured before and after the fits, the faster one counts."""
    cuts = []
    for teacher in TEACHERS:
        times = run_forked(_layer_times, 1, teacher, timeout_s=TIMEOUT_S)[0]
        chosen = {stages: run_forked(_fit, 1, teacher, stages, timeout_s=TIMEOUT_S)[0] for stages in STAGES}
        again = run_forked(_layer_times, 1, teacher, timeout_s=TIMEOUT_S)[0]
        student, of_teacher = (np.minimum(*pair) for pair in zip(times[:2], again[:2], strict=True))
        for stages in STAGES:
            by_parameters = times[2][stages]
            seconds = [slowest(student, of_teacher, sizes) for sizes in (chosen[stages], by_parameters)]
            cuts.append(Cut(teacher, stages, *seconds, best(student, of_teacher, stages)))
    return cuts


def slowest(student: np.ndarray, teacher: np.ndarray, sizes: tuple[list[int], list[int]]) -> float:
    """Seconds of the slowest rank."""
    pairs = ((student, sizes[0]), (teacher, sizes[1]))
    sums = [np.add.reduceat(times, np.cumsum([0, *of[:-1]])) for times, of in pairs]
    return float(max(sums[0] + sums[1]))


def best(student: np.ndarray, teacher: np.ndarray, stages: int) -> float:
    """Seconds of the slowest rank with the best of all pairs of cuts."""
    sums = []
    for times in (student, teacher):
        starts = itertools.combinations(range(1, len(times)), stages - 1)
        sums.append(np.array([np.add.reduceat(times, [0, *places]) for places in starts]))
    return float(min((sums[1] + row).max(axis=1).min() for row in sums[0]))


def _layer_times(_: int, teacher: str) -> tuple[list[float], list[float], dict[int, Any]]:
    """Seconds of every layer of student and teacher, and the cuts by parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Distillation(teacher)
    module.train()
    layers = find_layers(module.student, module.teacher, 2, {}, None, lambda name: [torch.rand(2, *_SHAPE)])
    seconds = [[cost.seconds for cost in _costs(layers, name)] for name in ("student", "teacher")]
    return seconds[0], seconds[1], {stages: layers.by_parameters(stages) for stages in STAGES}


_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)


def _costs(layers: Layers, name: str) -> list[LayerCost]:
    meter, apart = Meter(torch.device("cpu")), layers.apart()
    known, costs = tensors_of(layers.networks[name]), []
    views: list[Any] = [torch.rand(ROWS // MICROBATCHES, *_SHAPE)]
    for number, layer in enumerate(getattr(layers, name)):
        run: nn.Module = apart.runs(name, number)[0].module
        tensors = [known[key] for key in layer.state_names]
        if name == "teacher":
            views, cost = meter.teacher(run, tensors, views)
        else:
            views, cost = meter.student(run, tensors, views, number == 0)
        costs.append(cost)
    return costs


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

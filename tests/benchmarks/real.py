"""Real compute: resnet50 teaches resnet18 on two processes of one thread, against Lightning's DDP."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import ResNet, resnet18, resnet50  # type: ignore[import-untyped]
from typing_extensions import override

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from tests.benchmarks.fit import Fit, peak_bytes, timed_fit
from tests.benchmarks.processes import run_forked

NUM_PROCESSES = 2
NUM_STEPS = 10
NUM_ROUNDS = 2
BATCH_SIZE = 64  # of the whole job; microbatches of 8 instead of 16 make these convolutions a third slower
NUM_MICROBATCHES = 4
IMAGE_SIZE = 64
NUM_CLASSES = 100
LEAST_STEP_S = 0.3
TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Contest:
    """One contender's best round.

    Attributes:
        contender: Who trained.
        step_s: Seconds of a steady step, in the faster round.
        samples_per_s: Samples of the whole job per second.
        peak_mib: Peak memory of every process above that of an idle one, the larger of the rounds.
    """

    contender: str
    step_s: float
    samples_per_s: float
    peak_mib: list[float]


class Distillation(TeacherStudentModule):
    """resnet18 learns from the labels and from a frozen resnet50."""

    teacher: nn.Sequential
    student: nn.Sequential

    def __init__(self) -> None:
        super().__init__()
        self.teacher = flat(resnet50(num_classes=NUM_CLASSES))
        self.student = flat(resnet18(num_classes=NUM_CLASSES))

    @override
    def loss(self, student_out: Tensor, teacher_out: Tensor, target: Tensor) -> Tensor:
        distance = nn.functional.kl_div(
            student_out.log_softmax(-1), teacher_out.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        return distance + nn.functional.cross_entropy(student_out, target)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9)


def flat(network: ResNet) -> nn.Sequential:
    """The network as a sequence of stem, residual blocks and head."""
    stem = [network.conv1, network.bn1, network.relu, network.maxpool]
    blocks = [*network.layer1, *network.layer2, *network.layer3, *network.layer4]
    return nn.Sequential(*stem, *blocks, network.avgpool, nn.Flatten(), network.fc)


def measure_real() -> list[Contest]:
    """DDP and tspipe in turn, so that both see the same machine; tspipe's cuts follow measured layer times."""
    [idle] = run_forked(_idle, 1, timeout_s=TIMEOUT_S)
    [balance] = run_forked(_balance, 1, timeout_s=TIMEOUT_S)
    fits: dict[str, list[Fit]] = {"DDP": [], "tspipe": []}
    for _ in range(NUM_ROUNDS):
        fits["DDP"] += run_forked(_fit_ddp, 1, timeout_s=TIMEOUT_S)
        fits["tspipe"] += run_forked(_fit_tspipe, 1, balance, timeout_s=TIMEOUT_S)
    contests = [_contest(contender, rounds, idle) for contender, rounds in fits.items()]
    if contests[0].step_s < LEAST_STEP_S:
        raise RuntimeError(
            f"DDP takes {contests[0].step_s:.2f} s per step, too little to compare; raise the batch size"
        )
    return contests


def _contest(contender: str, rounds: list[Fit], idle: int) -> Contest:
    step_s = min(fit.step_s for fit in rounds)
    peaks = [max(ranks) for ranks in zip(*(fit.peak_bytes for fit in rounds), strict=True)]
    return Contest(contender, step_s, BATCH_SIZE / step_s, [(peak - idle) / 2**20 for peak in peaks])


def _idle(_: int) -> int:
    return peak_bytes()


def _fit_ddp(_: int) -> Fit:
    return _fit(DDPStrategy(start_method="fork"), BATCH_SIZE // NUM_PROCESSES)


def _fit_tspipe(_: int, balance: dict[str, list[int]]) -> Fit:
    strategy = TSPipeStrategy(microbatches=NUM_MICROBATCHES, balance=balance, start_method="fork")
    return _fit(strategy, BATCH_SIZE)


def _fit(strategy: Strategy, batch_size: int) -> Fit:
    """Train with batches of ``batch_size`` in every process that loads."""
    torch.manual_seed(0)
    num_samples = NUM_STEPS * BATCH_SIZE
    images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE).expand(num_samples, -1, -1, -1)  # one image's memory
    labels = torch.arange(num_samples) % NUM_CLASSES
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size)
    return timed_fit(Distillation(), loader, strategy, NUM_PROCESSES, NUM_STEPS)


def _balance(_: int) -> dict[str, list[int]]:
    """Layers per stage, such that both stages take as long: the student is halved, the teacher evens the rest out."""
    pair = Distillation()
    student = _layer_seconds(pair.student, _forward_and_backward)
    with torch.no_grad():
        teacher = _layer_seconds(pair.teacher.eval(), lambda layer, images: layer(images))
    half = (sum(student) + sum(teacher)) / 2
    student_cut = _cut(student, sum(student) / 2)
    teacher_cut = _cut(teacher, half - sum(student[:student_cut]))
    return {
        "student": [student_cut, len(student) - student_cut],
        "teacher": [teacher_cut, len(teacher) - teacher_cut],
    }


def _forward_and_backward(layer: nn.Module, images: Tensor) -> Tensor:
    output: Tensor = layer(images.requires_grad_().clone())  # some layers write into their input
    output.sum().backward()  # type: ignore[no-untyped-call]
    return output


def _layer_seconds(network: nn.Sequential, run: Callable[[nn.Module, Tensor], Tensor]) -> list[float]:
    """Seconds of each layer on one microbatch, the fastest of a few tries."""
    images = torch.randn(BATCH_SIZE // NUM_MICROBATCHES, 3, IMAGE_SIZE, IMAGE_SIZE)
    seconds = []
    for layer in network:
        tries = []
        for _ in range(4):
            start = time.perf_counter()
            output = run(layer, images.detach().clone())
            tries.append(time.perf_counter() - start)
        seconds.append(min(tries))
        images = output
    return seconds


def _cut(seconds: list[float], goal: float) -> int:
    """How many of the first layers come closest to ``goal`` seconds, with at least one left on either side."""
    sums = list(accumulate(seconds))[:-1]
    return 1 + min(range(len(sums)), key=lambda index: abs(sums[index] - goal))

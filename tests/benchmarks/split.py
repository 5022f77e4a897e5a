"""What a step's backwards in two parts cost over backwards in one piece, on one thread."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torchvision
from torch import Tensor, nn

from lightning_tspipe.memory import keep_freed
from lightning_tspipe.split import WeightBackward, backward_inputs
from tests.benchmarks.processes import run_forked
from tests.benchmarks.products import Products

ROUNDS = 3  # of both in turn, after one that warms caches and memory up
ORDER = "IIWIWIWW"  # of a step's microbatches, as a schedule has it: others come between the parts of one
MICROBATCHES = ORDER.count("I")


@dataclass(frozen=True)
class Network:
    """What is measured.

    Attributes:
        name: As printed.
        make: Gives the network.
        shape: Of a microbatch of images.
        goal: The most that both parts may take over the whole; None where that only is printed.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    goal: float | None = None


@dataclass(frozen=True)
class Split:
    """One network's step: the backwards of its microbatches, the first one into new gradients, the others added.

    Attributes:
        network: Its name.
        whole_s: Processor seconds of the backwards in one piece; median, as the others.
        first_s: Of the first parts, for the inputs.
        rest_s: Of the second ones, for the weights.
        ratio: Both parts over the whole, the median of the rounds.
    """

    network: str
    whole_s: float
    first_s: float
    rest_s: float
    ratio: float


resnet18 = partial(torchvision.models.resnet18, num_classes=10)


def vit(size: int, patch: int, heads: int, width: int) -> nn.Module:
    """Six blocks."""
    return torchvision.models.VisionTransformer(size, patch, 6, heads, width, 4 * width, num_classes=10)


NETWORKS = (
    Network("resnet18, 4 x 224 x 224", resnet18, (4, 3, 224, 224), goal=1.05),
    Network("ViT of 6 blocks, width 384, 4 x 197 tokens", partial(vit, 224, 16, 6, 384), (4, 3, 224, 224), goal=1.05),
    Network("resnet18, 4 x 64 x 64", resnet18, (4, 3, 64, 64)),
    Network("ViT of 6 blocks, width 192, 8 x 65 tokens", partial(vit, 32, 4, 4, 192), (8, 3, 32, 32)),
)


# tokens of a microbatch and their width: what the kernels alone of a ViT's MLPs cost more in two parts
KERNELS = {"kernels of its MLPs alone, 788 x 384": (788, 384), "kernels of its MLPs alone, 520 x 192": (520, 192)}


def measure_split(full: bool) -> Iterator[Split]:
    """The networks that have a goal, or all and then kernels alone, each in a process of its own."""
    for index in range(len(NETWORKS)):
        if not full and NETWORKS[index].goal is None:
            continue
        yield run_forked(partial(_measure, index), 1, timeout_s=600)[0]
    for name in KERNELS if full else ():
        yield run_forked(partial(_measure_kernels, name), 1, timeout_s=600)[0]


def _measure(index: int, _: int) -> Split:
    torch.set_num_threads(1)
    network = NETWORKS[index]
    model = network.make()
    images = [torch.randn(network.shape, requires_grad=True) for _ in range(MICROBATCHES)]
    rounds = []
    for number in range(ROUNDS + 1):
        seconds = []
        for backward in (_whole, _in_parts):
            model.zero_grad()
            for image in images:
                image.grad = None
            seconds += backward(deque(model(image) for image in images), images)
        rounds.append(seconds)
        if not number:
            keep_freed()  # as the strategy does after the first step
    return _split(network.name, rounds[1:])


def _measure_kernels(name: str, _: int) -> Split:
    torch.set_num_threads(1)
    products = Products(*KERNELS[name])
    rounds = [[products.seconds("B" * MICROBATCHES)[0], *products.seconds(ORDER)] for _round in range(ROUNDS + 1)]
    return _split(name, rounds[1:])


def _split(name: str, rounds: Sequence[Sequence[float]]) -> Split:
    whole, first, rest = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median((first + rest) / whole for whole, first, rest in rounds)
    return Split(name, whole, first, rest, ratio)


def _whole(outputs: deque[Tensor], _: Sequence[Tensor]) -> list[float]:
    """Seconds of a step in one piece."""
    given = torch.ones_like(outputs[0])
    start = time.process_time()
    while outputs:
        outputs.popleft().backward(given)
    return [time.process_time() - start]


def _in_parts(outputs: deque[Tensor], images: Sequence[Tensor]) -> list[float]:
    """Seconds of all first parts, and of all second ones."""
    given = torch.ones_like(outputs[0])
    seconds = {"I": 0.0, "W": 0.0}
    inputs, waiting = iter(images), deque[WeightBackward]()
    for part in ORDER:
        start = time.process_time()
        if part == "I":
            waiting.append(backward_inputs([outputs.popleft()], [given], [next(inputs)]))
        else:
            waiting.popleft()()
        seconds[part] += time.process_time() - start
    return list(seconds.values())

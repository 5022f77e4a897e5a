"""What a backward in two parts costs over one in one piece, on one thread."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import nn

from lightning_tspipe.split import backward_inputs
from tests.benchmarks.processes import run_forked

ROUNDS = (
    40  # of both in turn; a quarter of them is faster than what counts, since a busy machine makes single ones slow
)


@dataclass(frozen=True)
class Split:
    """One network.

    Attributes:
        network: Its name.
        whole_s: Processor seconds of a backward in one piece.
        first_s: Of the first part, for the inputs.
        rest_s: Of the second, for the weights.
    """

    network: str
    whole_s: float
    first_s: float
    rest_s: float


def vit() -> nn.Module:
    """Six blocks, 65 tokens."""
    return torchvision.models.VisionTransformer(32, 4, 6, 4, 192, 768, num_classes=10)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (4, 3, 64, 64)),
    "ViT of 6 blocks": (vit, (8, 3, 32, 32)),
}


def measure_split() -> list[Split]:
    """Both networks, in a process of their own."""
    found: list[list[Split]] = run_forked(_measure, 1, timeout_s=300)
    return found[0]


def _measure(_: int) -> list[Split]:
    torch.set_num_threads(1)
    splits = []
    for name, (make, shape) in NETWORKS.items():
        network, seconds = make(), ([], [], [])
        for _round in range(ROUNDS):
            for parts in (False, True):
                network.zero_grad()
                x = torch.randn(shape, requires_grad=True)
                output = network(x)
                given = torch.ones_like(output)
                start = time.process_time()
                if not parts:
                    output.backward(given)
                    seconds[0].append(time.process_time() - start)
                    continue
                rest = backward_inputs([output], [given], [x])
                middle = time.process_time()
                del output
                rest()
                seconds[1].append(middle - start)
                seconds[2].append(time.process_time() - middle)
        splits.append(Split(name, *(sorted(column)[ROUNDS // 4] for column in seconds)))
    return splits

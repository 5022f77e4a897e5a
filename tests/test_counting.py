"""What layers cost by their shapes alone, and dry plans."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from lightning_tspipe.counting import CPU, counted
from lightning_tspipe.measure import LayerCost, Meter
from lightning_tspipe.memory import without_memory
from lightning_tspipe.partition import Layers, find_layers
from lightning_tspipe.recording import tensors_of

ROWS, WIDTH = 6, 8


def transformer() -> nn.Module:
    return VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=4)


def of_two(network: nn.Module, sample: Tensor, stages: int = 2) -> Layers:
    return find_layers(network, network, stages, {}, examples=lambda _: [sample])


def test_operations_of_layers() -> None:
    with without_memory():
        network = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 2, bias=False), nn.Conv1d(ROWS, 3, 1))
    assert all(parameter.is_meta for parameter in network.parameters())
    sample = torch.empty(ROWS, WIDTH, device="meta")
    student, teacher = counted(
        of_two(network, sample), {"student": [sample], "teacher": [sample] * 2}, 2.0, nullcontext
    )
    each = [ROWS * WIDTH * 4, 0, ROWS * 4 * 2, ROWS * 3 * 2]  # a multiplication and an addition are two operations
    assert [cost.forward for cost in student] == each
    assert [cost.forward for cost in teacher] == [2 * cost for cost in each], "two views"
    assert [cost.weights for cost in student] == each
    assert [cost.inputs for cost in student] == [0, *each[1:]], "nobody needs the gradient of the input"
    assert not any(cost.inputs or cost.weights or cost.held for cost in teacher)
    assert network[0].weight.is_meta, "all is put back"


def test_attention_is_counted() -> None:
    """A query, key, value and output of each token, and both products of attention."""
    sample = torch.empty(ROWS, 3, 8, 8, device="meta")
    with without_memory():
        network = transformer()
    student, _ = counted(of_two(network, sample), {"student": [sample], "teacher": [sample]}, 1.0, nullcontext)
    names = [layer.name for layer in of_two(network, sample).student]
    attention = student[names.index("encoder.layers.encoder_layer_0.self_attention")]
    tokens = 5  # four patches and the class
    products = 2 * 2 * ROWS * tokens**2 * 16
    assert attention.forward == 2 * ROWS * tokens * 16 * (4 * 16) + products
    assert attention.inputs + attention.weights == pytest.approx(2 * attention.forward, rel=0.1)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)
    )


@pytest.mark.parametrize("make", [convolutions, transformer])
def test_bytes_are_those_that_a_measurement_finds(make: Any) -> None:
    network, sample = make(), torch.rand(ROWS, 3, 8, 8)
    layers = of_two(network, sample)
    student, teacher = counted(layers, {"student": [sample], "teacher": [sample]}, 1.0, nullcontext)
    known, meter = tensors_of(network), Meter(CPU)
    measured: dict[str, list[LayerCost]] = {"student": [], "teacher": []}
    for name, costs in measured.items():
        views: list[Any] = [sample]
        for number, layer in enumerate(layers.student):
            (runs,) = layers.apart().runs(name, number)
            tensors = [known[key] for key in layer.state_names if key in known]
            if name == "teacher":
                views, cost = meter.teacher(runs.module, tensors, views)
            else:
                views, cost = meter.student(runs.module, tensors, views, number == 0)
            costs.append(cost)
    names = ("sent", "received", "parameters", "trained")
    for ours, theirs in ((student, measured["student"]), (teacher, measured["teacher"])):
        for cost, other in zip(ours, theirs, strict=True):
            expected = {key: getattr(other, key) for key in names} | ({"trained": 0} if ours is teacher else {})
            assert {key: getattr(cost, key) for key in names} | ({"trained": 0} if ours is teacher else {}) == expected
    for size in ("held", "pending"):
        ours, found = (sum(getattr(cost, size) for cost in costs) for costs in (student, measured["student"]))
        assert ours == pytest.approx(found, rel=0.02) != 0

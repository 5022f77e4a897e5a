"""A student stage that keeps its inputs only and runs again in the backward gives the same numbers."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tspipe.layers import Layer
from lightning_tspipe.measure import MessageCost, Meter
from lightning_tspipe.placing import chain_of
from lightning_tspipe.stage import Stage
from tests.multiproc import result_of
from tests.scripts.zygote import Zygote
from tests.test_memory_peak import forget_peak, give_back_at, status

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    """Batch norms, dropouts, and an in-place layer at the beginning."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5),
    )  # fmt: skip


def stage(layers: nn.Module, first: bool = False, **options: Any) -> Stage:
    named = [Layer(name, layer) for name, layer in layers.named_children()]
    return Stage(named, [], 1, first, CPU, 5, **options)


def numbers(first: bool, split: bool, autocast: bool, **options: Any) -> list[Tensor]:
    """All that a step leaves behind: two microbatches of two views, in another order backward than forward."""
    layers = network()
    work = stage(layers, first, **options)
    source = torch.Generator().manual_seed(1)
    found: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for q in range(2):
            found += work.student_forward((1, q), [torch.randn(3 + q, 3, 6, 6, generator=source) for _ in range(2)])
        for q in (1, 0):
            given = [torch.randn(3 + q, 5, generator=source).to(found[0].dtype) for _ in range(2)]
            found += (work.backward_inputs if split else work.backward)((1, q), given)
            found.append(torch.rand(2))  # what a function that draws in the backward would get
        for q in range(2):
            if split:
                work.backward_weights((1, q))
    work.norms["student"].commit(1)
    work.close()
    return [*found, *(p.grad for p in layers.parameters() if p.grad is not None), *layers.buffers()]


@pytest.mark.parametrize("autocast", [False, True])
def test_every_number_is_that_without_it(autocast: bool) -> None:
    def compare() -> str:
        for first, split in itertools.product((False, True), repeat=2):
            expected = numbers(first, split, autocast)
            found = numbers(first, split, autocast, recompute=True)
            assert len(expected) == 4 + 2 + 4 * (not first) + 10 + 6
            for place, pair in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(*pair), (first, split, place)
        return "same"

    assert result_of(compare) == "same"


@pytest.mark.parametrize("recompute", [False, True])
def test_it_holds_the_inputs_only(recompute: bool) -> None:
    """Bytes that autograd keeps between forward and backward, parameters left aside."""

    def held() -> tuple[int, int]:
        layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(8)))
        parameters = {p.data_ptr() for p in layers.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        x = torch.randn(32, 16)
        work = stage(layers, recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            (out,) = work.student_forward((1, 0), [x])
        work.backward((1, 0), [torch.ones_like(out)])
        return sum(kept.values()), x.nbytes

    bytes_, each = result_of(held)
    assert bytes_ == (1 if recompute else 9) * each  # the input, and without recomputation eight activations


@pytest.mark.parametrize("split", [False, True])
def test_layers_run_twice_and_not_more(split: bool) -> None:
    """So hooks of the user fire twice. A backward in parts would otherwise run them once for each of its parts."""

    def calls() -> int:
        layers = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
        seen: list[int] = []
        layers[0].register_forward_hook(lambda *_: seen.append(1))
        work = stage(layers, recompute=True)
        (out,) = work.student_forward((1, 0), [torch.ones(1, 2)])
        if split:
            work.backward_inputs((1, 0), [out])
            work.backward_weights((1, 0))
        else:
            work.backward((1, 0), [out])
        assert all(parameter.grad is not None for parameter in layers.parameters())
        return len(seen)

    assert result_of(calls) == 2


class Counts(nn.Module):
    """Assigns a buffer anew in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * self.calls


@pytest.mark.parametrize("layer", [Counts(), nn.InstanceNorm1d(2, track_running_stats=True)])
def test_layers_that_would_count_twice_are_refused(layer: nn.Module) -> None:
    x = torch.rand(1, 2, 3)
    layers = nn.Sequential(copy.deepcopy(layer))
    stage(layers).student_forward((1, 0), [x])
    name = type(layer).__name__
    with pytest.raises(ValueError, match=rf"a {name} of stage 1 changes its buffer .* Use recompute=False"):
        stage(layers, recompute=True).student_forward((1, 0), [x])


def hold(rank: int, out: Path, recompute: bool) -> None:
    """Writes what the plan counts for four microbatches in flight, and what the process holds."""
    give_back_at(2**16)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(16)]
    rows = [torch.randn(4096, 64) for _ in range(4)]  # 1 MB each
    work = Stage([Layer(str(n), layer) for n, layer in enumerate(layers)], [], 1, False, CPU, 5, recompute=recompute)
    meter, views, costs = Meter(CPU), [rows[0]], []
    for layer in layers:
        views, cost = meter.student(layer, list(layer.parameters()), views, first=False)
        costs.append(cost)
    chain = chain_of(costs, MessageCost(), 2, recompute, recompute)
    planned = 4 * sum(chain.held)
    if recompute:
        planned = 4 * (chain.passed[0] + chain.passed[-1]) + sum(chain.held)
    (result,) = work.student_forward((0, 0), [rows[0]])
    work.backward((0, 0), [torch.ones_like(result)])  # so that all code and the gradients have their memory
    del views, result
    forget_peak()
    before = status("VmRSS")
    for q, inputs in enumerate(rows):
        work.student_forward((1, q), [inputs.clone()])
    for q in range(4):
        work.backward((1, q), [torch.ones_like(rows[q])])
    (out / "found.json").write_text(json.dumps([planned, status("VmHWM") - before]))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_stage_holds_what_the_plan_counts(zygote: Zygote, tmp_path: Path, recompute: bool) -> None:
    """By the process's peak, with activations that are much larger than all else; nothing was freed in it before."""
    assert zygote.run("tests.test_recompute:hold", 1, tmp_path, recompute=recompute) == [0], (
        tmp_path / "0.txt"
    ).read_text()
    planned, held = json.loads((tmp_path / "found.json").read_text())
    assert 0.9 * planned <= held <= 1.2 * planned, (planned, held)  # what a backward makes comes on top

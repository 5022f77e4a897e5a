"""Forwards that keep no outputs which are cheap to compute again give the same numbers, and hold less."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy
from lightning_tspipe.layers import Layer
from lightning_tspipe.measure import Meter
from lightning_tspipe.memory import keep_freed
from lightning_tspipe.selective import Selective, noting, selectively
from lightning_tspipe.stage import Stage
from tests.multiproc import Fit, result_of, run_fits

CPU = torch.device("cpu")
WIDTH = 16


class Block(nn.Module):
    """A transformer's, with cheap functions of other modules beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.GroupNorm(2, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = self.second(x.transpose(1, 2)).transpose(1, 2)
        y = self.up(F.gelu(y, approximate="tanh")) * F.silu(self.gate(y))
        return x + self.down(self.drop(F.mish(F.leaky_relu(y))))


def network() -> nn.Sequential:
    """Also with layers that write into the outputs of cheap functions."""
    torch.manual_seed(0)
    mlp = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.3, inplace=True), nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(Block(), *mlp, nn.SiLU(inplace=True), Block(), nn.Hardswish(), nn.ELU(), nn.Linear(WIDTH, 3))


def numbers(first: bool, split: bool, autocast: bool, selective: bool) -> list[Tensor]:
    """All that a step leaves behind: two microbatches of two views, in another order backward than forward."""
    layers = network()
    named = [Layer(name, layer) for name, layer in layers.named_children()]
    work = Stage(named, [], 1, first, CPU, 5, recompute="selective" if selective else False)
    source = torch.Generator().manual_seed(1)
    found: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for q in range(2):
            found += work.student_forward((1, q), [torch.randn(3 + q, 5, WIDTH, generator=source) for _ in range(2)])
    for q in (1, 0):
        given = [torch.randn(3 + q, 5, 3, generator=source).to(found[0].dtype) for _ in range(2)]
        found += (work.backward_inputs if split else work.backward)((1, q), given)
        found.append(torch.rand(2))  # what a function that draws in the backward would get
    for q in range(2):
        if split:
            work.backward_weights((1, q))
    work.close()
    return [*found, *(p.grad for p in layers.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True])
def test_every_number_is_that_without_it(autocast: bool) -> None:
    def compare() -> str:
        for first, split in itertools.product((False, True), repeat=2):
            expected = numbers(first, split, autocast, False)
            found = numbers(first, split, autocast, True)
            assert len(expected) == 4 + 2 + 4 * (not first) + 2 * 14 + 6
            for place, pair in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(*pair), (first, split, place)
        return "same"

    assert result_of(compare) == "same"


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def kept_floats(selective: bool) -> int:
    """Of a row of `mlp`, between forward and backward."""
    layers, x = mlp(), torch.randn(32, WIDTH)
    known = {parameter.data_ptr() for parameter in layers.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor.detach()

    with noting(note, selective):
        out = layers(x)
    assert out.requires_grad
    return sum(kept.values()) // len(x)


def test_outputs_of_cheap_functions_are_not_kept() -> None:
    """The norm's mean and deviation, its input, and the activation's; without it the outputs of both, too."""
    found = result_of(lambda: (kept_floats(False), kept_floats(True)))
    assert found == (2 + 2 * WIDTH + 8 * WIDTH, 2 + WIDTH + 4 * WIDTH)


def test_the_plan_counts_what_is_kept() -> None:
    """In the activations of a microbatch; the weights' part of a split backward needs no graph then either."""

    def costs() -> list[tuple[int, int, bool]]:
        layers = mlp()
        found = []
        for selective in (False, True):
            _, cost = Meter(CPU, selective).student(layers, list(layers.parameters()), [torch.randn(32, WIDTH)], False)
            found.append((cost.held, cost.pending, cost.keeps_graph))
        return found

    (held, pending, graph), (less, pending_too, graph_too) = result_of(costs)
    assert (held - less) / 4 / 32 == 5 * WIDTH
    assert pending == pending_too
    assert not graph
    assert not graph_too


def test_what_was_written_to_is_an_error_as_without_it() -> None:
    """Autograd itself cannot know of that where hooks pack what it keeps."""

    def errors() -> list[str]:
        found = []
        for selective in (False, True):
            x = torch.randn(4, 4, requires_grad=True)
            with selectively(selective):
                inner = x * 2
                out = F.gelu(inner) @ torch.ones(4, 4, requires_grad=True)
                inner.add_(1)
            with pytest.raises(RuntimeError) as caught:
                out.sum().backward()
            found.append(str(caught.value).partition(":")[0])
        return found

    assert set(result_of(errors)) == {
        "one of the variables needed for gradient computation has been modified by an inplace operation"
    }


def test_memory_that_another_tensor_has_now_is_not_mistaken() -> None:
    """What a cheap function gave may be freed at once, and its place taken."""

    def gradients() -> list[Tensor]:
        found = []
        for selective in (False, True):
            torch.manual_seed(0)
            x, w = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
            with selectively(selective):
                total = torch.zeros(64, 64)
                for _ in range(20):
                    total = total + F.gelu(x)  # a sum keeps nothing, so this is freed
                    other = torch.cat([x[:32], x[32:]]) + 1
                    total = total + other @ w
            total.sum().backward()
            assert x.grad is not None
            assert w.grad is not None
            found += [x.grad, w.grad]
        return found

    x, w, x_too, w_too = result_of(gradients)
    assert torch.equal(x, x_too)
    assert torch.equal(w, w_too)


def test_nothing_stays_when_the_graph_is_gone() -> None:
    def alive() -> list[int]:
        layers, selective = mlp(), Selective()
        found = []
        for backward in (True, False):
            with selective:
                inner = layers[1](layers[0](torch.randn(4, WIDTH)))
                out = layers[3](layers[2](inner))
            reference = weakref.ref(inner)
            del inner
            if backward:
                out.sum().backward()
            del out
            gc.disable()
            found.append(reference() is not None)
        return found

    assert result_of(alive) == [False, False]


def test_a_compiled_stage_refuses() -> None:
    with pytest.raises(ValueError, match=r"recompute=.selective. with compile.*Use recompute=True"):
        TSPipeStrategy(recompute="selective", compile=True)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_memory_that_was_freed_is_kept_until_it_ends() -> None:
    def shares() -> list[float]:
        for block in [torch.ones(4 << 20, dtype=torch.uint8)]:
            del block  # so that such blocks are from the heap
        end = keep_freed()
        blocks = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(20)]
        full = resident()
        del blocks
        freed = resident()
        end()
        return [(full - less) / (80 << 20) for less in (freed, resident())]

    kept, given_back = result_of(shares)
    assert kept < 0.1
    assert given_back > 0.9


class Distill(TeacherStudentModule):
    """A transformer learns from one that is frozen."""

    def __init__(self) -> None:
        super().__init__(loss_over="microbatch")
        self.teacher, self.student = (network().double() for _ in range(2))

    def student_input(self, batch: Any) -> Tensor:
        return batch[0]

    def loss(self, student_out: Tensor, teacher_out: Tensor, target: Any) -> Tensor:
        return F.mse_loss(student_out, teacher_out + 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), 0.1)


def rows() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.rand(14, 5, WIDTH, generator=generator).double()), 8)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_in_the_pipeline_every_rank_has_the_same_numbers(schedule: str) -> None:
    """Bit for bit: losses, gradients and weights of every rank at P=2, with layers that were measured."""
    options: list[dict[str, Any]] = [{}, {"recompute": "selective"}]
    fits = [Fit(Distill, rows, 2, 2, strategy={"schedule": schedule, **more}) for more in options]
    for expected, found in zip(*run_fits(fits, timeout=90), strict=True):
        for name in ("losses", "grads", "local", "whole"):
            assert expected[name]
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)

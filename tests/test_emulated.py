"""The emulated stage waits as often as it should and computes what a linear layer computes."""

import time

import pytest
import torch
from torch import Tensor, nn

from lightning_tspipe.split import backward_inputs
from tests.benchmarks import emulated
from tests.benchmarks.emulated import EmulatedLayer

FORWARD_S, INPUTS_S, WEIGHTS_S = 10.0, 30.0, 60.0


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The waits so far, in seconds rounded to ten; nobody sleeps."""
    record: list[int] = []

    def wait_until(deadline: float) -> None:
        record.append(10 * round((deadline - time.perf_counter()) / 10))

    monkeypatch.setattr(emulated, "wait_until", wait_until)
    return record


def chain(num_stages: int) -> nn.Sequential:
    return nn.Sequential(*[EmulatedLayer(8, FORWARD_S, INPUTS_S, WEIGHTS_S) for _ in range(num_stages)])


def twin(layers: nn.Sequential) -> nn.Sequential:
    """The same parameters in plain linear layers."""
    plain = nn.Sequential(*[nn.Linear(8, 8, dtype=torch.float64) for _ in layers])
    plain.load_state_dict(layers.state_dict())
    return plain


def batch() -> Tensor:
    return torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("input_asks", [False, True])
def test_each_stage_waits_for_each_part_of_a_backward(waits: list[int], num_stages: int, input_asks: bool) -> None:
    """What the first one does not do for its input it does for its weight."""
    loss = chain(num_stages)(batch().requires_grad_(input_asks)).square().mean()
    assert waits == [10] * num_stages
    waits.clear()
    loss.backward()
    first = [30, 60] if input_asks else [90]
    assert sorted(waits) == sorted([30, 60] * (num_stages - 1) + first)


@pytest.mark.parametrize(("wanted", "expected"), [(["input"], [30]), (["weight", "bias"], [60]), (["bias"], [])])
def test_a_gradient_costs_its_own_part(waits: list[int], wanted: list[str], expected: list[int]) -> None:
    layer, x = EmulatedLayer(8, FORWARD_S, INPUTS_S, WEIGHTS_S), batch().requires_grad_()
    tensors = {"input": x, "weight": layer.weight, "bias": layer.bias}
    output = layer(x)
    waits.clear()
    torch.autograd.grad(output.sum(), [tensors[name] for name in wanted])
    assert waits == expected


def test_a_split_backward_waits_in_both_parts(waits: list[int]) -> None:
    layers, x = chain(2), batch().requires_grad_()
    output = layers(x)
    waits.clear()
    rest = backward_inputs([output], [torch.ones_like(output)], [x])
    assert waits == [30, 30]
    assert all(layer.weight.grad is None for layer in layers)
    waits.clear()
    rest()
    assert waits == [60, 60]


def test_a_frozen_teacher_waits_forward_only(waits: list[int]) -> None:
    teacher = chain(2).requires_grad_(False)
    output = teacher(batch())
    assert waits == [10, 10]
    assert not output.requires_grad


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("input_asks", [False, True])
def test_numbers_equal_plain_linear_layers(input_asks: bool) -> None:
    layers = chain(3)
    plain = twin(layers)
    inputs = [batch().requires_grad_(input_asks) for _ in range(2)]
    outputs = [network(x) for network, x in zip((layers, plain), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    for output in outputs:
        output.square().mean().backward()
    for ours, theirs in zip(layers.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-13, atol=1e-15)


def test_a_pass_lasts_as_long_as_told() -> None:
    layer = EmulatedLayer(8, forward_s=0.02, inputs_s=0.01, weights_s=0.03)
    start = time.perf_counter()
    output = layer(batch())
    middle = time.perf_counter()
    output.sum().backward()
    end = time.perf_counter()
    assert middle - start >= 0.02
    assert end - middle >= 0.04
    assert end - start < 0.5  # a busy machine may wake us late


def test_zero_cost_is_the_linear_layer_alone(waits: list[int]) -> None:
    EmulatedLayer(8, 0.0, 0.0, 0.0)(batch()).sum().backward()
    assert not waits

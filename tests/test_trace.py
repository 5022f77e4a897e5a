"""The forward of any module is followed, cut between its layers, and computes what it computes uncut."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lightning_tspipe.arguments import Call, arguments_of, run_network
from lightning_tspipe.balance import balance_by_cost
from lightning_tspipe.layers import Layer
from lightning_tspipe.partition import partition
from lightning_tspipe.recording import tensors_of
from lightning_tspipe.trace import Traced
from tests.multiproc import result_of
from tests.zoo import check, forward, segments_of

CPU = torch.device("cpu")
WIDTH = 4


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def rows(count: int) -> Tensor:
    return torch.rand(count, WIDTH, dtype=torch.float64)


class Mixed(nn.Module):
    """A token, a skip, an in-place activation, dropout by a function, a buffer, and an auxiliary head in training."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.rand(1, WIDTH))
        self.register_buffer("mean", torch.rand(WIDTH))
        self.first, self.second, self.aux, self.last = linear(), linear(), linear(), linear()
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Any:
        n, width = x.shape
        x = x + self.token.expand(n, -1)
        y = self.act(self.first(x))
        y = nn.functional.dropout(y, 0.5, self.training)
        aux = self.aux(y) if self.training else None
        y = self.act(self.norm(self.second(y))) + x
        y += self.mean
        if width > 2:
            y = y.reshape(n * width).view(n, width)
        return {"out": self.last(y), "aux": aux, "skip": (x, self.token)}


class Fickle(nn.Module):
    """Its forward depends on values, so that it runs on no tensor without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.sum()) > 0 else x


class Around(nn.Module):
    """A submodule that cannot be followed, between two that can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fickle, self.last = linear(), Fickle(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fickle(self.first(x).square())) + x


class Counts(nn.Module):
    """Assigns a new buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + len(x)
        return self.inner(x) * self.seen


class Counting(nn.Module):
    """A residual connection around a module with a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.counts = linear(), Counts()

    def forward(self, x: Tensor) -> Tensor:
        return self.counts(self.first(x)) + x


class Twice(nn.Module):
    """Calls one of its layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = linear(), linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.b(self.c(self.b(self.a(x)))))


class Tied(nn.Module):
    """One parameter under two names, at the two ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = linear(), linear(), linear()
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.first(x))))


class Quiet(nn.Module):
    """A part of its forward runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.target, self.last = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.no_grad():
            t = self.target(y) * 2
        return self.last(y * t)


def traced(network: nn.Module, example: Any = None) -> Traced:
    return Traced(network, [rows(2) if example is None else example], CPU)


@pytest.mark.parametrize("make", [Mixed, Around, Counting, Twice, Tied, Quiet])
def test_every_cut_computes_the_same(make: Callable[[], nn.Module]) -> None:
    """At every number of stages, up to that of the layers: outputs, gradients, buffers, with dropout, in both modes."""
    most = len(traced(make().double()).names)
    assert most >= 2

    def worst() -> float:
        return max(check(make().double(), rows, stages) for stages in range(2, most + 1))

    assert result_of(worst) < 1e-13


def test_layers_are_named_and_own_their_states() -> None:
    """A layer begins at each submodule with a state; what is used directly belongs to the layer that uses it first."""
    found = traced(Mixed().double())
    assert found.names == ["first", "aux", "second", "norm", "last"]
    assert set(found.states(0)) == {"token", "first.weight", "first.bias"}
    assert "mean" in found.states(3)
    owners = [set(found.states(layer)) for layer in range(5)]
    assert set().union(*owners) == set(tensors_of(Mixed()))
    assert not any(a & b for a, b in itertools.combinations(owners, 2))


def test_a_layer_that_is_called_twice_is_kept_together() -> None:
    assert traced(Twice().double()).names == ["a", "b", "d"]
    assert set(traced(Twice().double()).states(1)) == {f"{name}.{kind}" for name in "bc" for kind in ("weight", "bias")}


def test_a_tied_parameter_is_on_one_stage() -> None:
    """It is owned once, under both names; its gradient is the sum of both uses (shown above, at every cut)."""
    found = traced(Tied().double())
    assert found.names == ["first", "middle", "last"]
    assert {"first.weight", "last.weight"} <= set(found.states(0))


def test_what_cannot_be_followed_is_one_layer() -> None:
    assert traced(Around().double()).names == ["first", "fickle", "last"]
    assert traced(Counting().double()).names == ["first", "counts"]


def test_hooks_and_the_original_modules_stay() -> None:
    """A submodule with a hook is one layer, its hook runs once per forward, and following changes nothing.

    While the forward is followed the hook sees tensors without memory.
    """
    network = nn.ModuleDict({"body": Mixed()}).double()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network["body"], linear().double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)["out"])

    outer = Outer()
    calls: list[bool] = []
    outer.body.register_forward_hook(lambda module, args, output: calls.append(isinstance(args[0], FakeTensor)))
    outer.body.norm.eval()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in tensors_of(outer).items()}
    modes = [module.training for module in outer.modules()]
    example = rows(2)
    state = torch.get_rng_state(), random.getstate()
    found = traced(outer, example)
    assert found.names == ["body", "head"]
    assert all(calls)
    calls.clear()
    assert [module.training for module in outer.modules()] == modes
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    for name, tensor in tensors_of(outer).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])
    pieces = segments_of(outer, rows(2), 2)
    forward(pieces, rows(2))
    calls.clear()
    forward(pieces, rows(2))
    assert calls == [False]


def test_control_flow_over_shapes_is_followed_for_each_shape() -> None:
    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = linear().double(), linear().double()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(y * len(y) if len(y) > 2 else y - 1)

    network = Shapes()
    pieces = segments_of(network, rows(2), 2)
    for count in (1, 2, 3, 5):
        x = rows(count)
        assert torch.equal(forward(pieces, x)[0], network(x))


def test_another_order_of_layers_for_another_shape_is_an_error() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linear().double(), linear().double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if len(x) < 3 else self.a(self.b(x))

    pieces = segments_of(Turns(), rows(2), 2)
    with pytest.raises(ValueError, match=r"Turns calls 'a' later than it did for the example"):
        forward(pieces, rows(3))


def test_a_network_that_cannot_be_followed_is_told_what_to_do() -> None:
    class Whole(Fickle):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(self.inner(x).sum()) > 0 else x

    with pytest.raises(ValueError, match=r"forward of Whole cannot be cut.*nn\.Sequential.*pipeline_layers"):
        traced(Whole().double())
    with pytest.raises(ValueError, match="example of its input is needed"):
        partition(Mixed(), Mixed(), 2)


class Named(nn.Module):
    """Names its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Fickle(), Fickle()])
        self.head = linear()

    def pipeline_layers(self) -> list[Any]:
        return [self.inner[0], torch.tanh, self.inner[1], self.head]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner[1](torch.tanh(self.inner[0](x))))


def test_a_network_may_name_its_layers() -> None:
    network = Named().double()
    parts = partition(network, nn.Sequential(linear(), linear()), 2, {"student": [2, 2]})
    assert [[layer.name for layer in stage] for stage in parts.student] == [
        ["inner.0", "pipeline_layers[1]"],
        ["inner.1", "head"],
    ]
    assert {name.split(".", 1)[1] for name in parts.owners() if name.startswith("student")} == set(tensors_of(network))
    x = rows(3)
    value: Any = Call((x,), {})
    for layer in (*parts.runs("student", 0), *parts.runs("student", 1)):
        value = layer.module(value)
    assert torch.equal(value, network(x))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda net: [net.inner[0], 3], "gives a int at place 1"),
        (lambda net: [net.inner[0]], "is in none of the modules"),
    ],
)
def test_bad_names_of_layers(layers: Callable[[Any], list[Any]], message: str) -> None:
    network = Named()
    network.pipeline_layers = lambda: layers(network)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message):
        partition(network, linear(), 2)


def test_a_momentum_teacher_follows_a_network_that_is_cut() -> None:
    """Also where the student has more around it; a Sequential of uneven layers is looked into."""
    encoder = Mixed()

    class Out(nn.Module):
        def forward(self, value: Any) -> Tensor:
            return value["out"]  # type: ignore[no-any-return]

    student = nn.Sequential(encoder, Out(), linear()).double()
    teacher = copy.deepcopy(encoder)
    parts = partition(student, teacher, 3, source=encoder, examples=lambda name: [rows(2)])
    owners = parts.owners()
    for name in tensors_of(teacher):
        assert owners[f"teacher.{name}"] == owners[f"student.0.{name}"]
    assert len({owners[f"teacher.{name}"] for name in tensors_of(teacher)}) > 1


def test_a_plain_sequential_is_not_followed() -> None:
    """Its layers are those of its structure, also when they have submodules, as long as they balance."""
    network = nn.Sequential(Fickle(), Fickle(), linear())
    parts = partition(network, copy.deepcopy(network), 2)
    assert not parts.traced
    assert parts.runs("student", 0) == (Layer("0", network[0]), Layer("1", network[1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd with a CUDA device forbids it for reasons of its own")
def test_processes_may_fork_after_a_forward_was_followed() -> None:
    """Tensors without memory would else bring a stand-in for CUDA, with which autograd ends in forked processes."""

    def differentiate() -> float:
        x = torch.ones(2, requires_grad=True)
        (x * 3).sum().backward()
        assert x.grad is not None
        return float(x.grad.sum())

    def follow_and_fork() -> Any:
        network = Mixed()
        partition(network, copy.deepcopy(network), 2, examples=lambda name: [torch.rand(2, WIDTH)])
        return differentiate(), result_of(differentiate)

    assert result_of(follow_and_fork) == (6.0, 6.0)


def test_less_travels_where_it_costs_little() -> None:
    """The largest stage stays within 5 % of the smallest possible one."""
    costs, alive = [10, 10, 10, 1, 10, 10, 10], [0, 5, 5, 1, 5, 5, 5]
    assert balance_by_cost(costs, 2) == [4, 3]
    assert balance_by_cost(costs, 2, alive) == [3, 4]
    assert balance_by_cost([1, 1, 1, 1], 2, [0, 1, 9, 1]) == [2, 2]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, Call((1,), {})),
        ((1, 2), Call(((1, 2),), {})),
        ({"x": 1}, Call((), {"x": 1})),
        ({"x": 1, "mask": 2}, Call((), {"x": 1, "mask": 2})),
        ({"mask": 2}, Call(({"mask": 2},), {})),
        ({"x": 1, "other": 2}, Call(({"x": 1, "other": 2},), {})),
        (Call((1, 2), {"mask": 3}), Call((1, 2), {"mask": 3})),
    ],
)
def test_how_an_input_becomes_arguments(value: Any, expected: Call) -> None:
    class Net(nn.Module):
        def forward(self, x: Any, mask: Any = None) -> Any:
            return x, mask

    assert arguments_of(Net(), value) == expected
    assert arguments_of(nn.Sequential(), {"input": 1}) == Call(({"input": 1},), {})


def test_a_tuple_is_spread_over_arguments_that_are_needed() -> None:
    class Net(nn.Module):
        def forward(self, x: Any, y: Any, scale: Any = 2) -> Any:
            return (x + y) * scale

    assert run_network(Net(), (1, 2)) == 6
    assert run_network(Net(), (1, 2, 3)) == 9
    assert run_network(nn.Identity(), (1, 2)) == (1, 2)


@pytest.mark.parametrize("fault", ["lost gradient", "other values", "stale buffer"])
def test_the_comparison_sees_faults(fault: str) -> None:
    """What the tests of this file and of the zoo rest on."""

    class Faulty(Mixed):
        def __init__(self) -> None:
            super().__init__()
            self.norm.momentum = 0.0 if fault == "stale buffer" else 0.1

        def __deepcopy__(self, memo: Any) -> Any:  # the uncut network is a copy, which has no fault
            other = Mixed().double()
            other.load_state_dict(self.state_dict())
            return other

        def forward(self, x: Tensor) -> Any:
            out = super().forward(x.detach() if fault == "other values" else x)
            if fault == "other values":
                out["out"] = out["out"] * 1.001
            if fault == "lost gradient":
                out["skip"] = (out["skip"][0].detach() + 0 * self.token, self.token)
            return out

    assert result_of(lambda: check(Faulty().double(), rows, 2)) > 1e-6


def test_one_stage_calls_the_network_with_its_arguments() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x * scale

    parts = partition(Net(), nn.Sequential(linear()), 1)
    (run,) = parts.runs("student", 0)
    assert not parts.traced
    assert torch.equal(run.module({"x": torch.ones(2), "scale": torch.full((2,), 3.0)}), torch.full((2,), 3.0))

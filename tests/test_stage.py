"""One rank's work on a microbatch equals plain autograd, and draws random numbers of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tspipe.layers import Layer
from lightning_tspipe.stage import Stage
from tests.multiproc import result_of

CPU = torch.device("cpu")


def stage(*layers: nn.Module, first: bool = False, index: int = 1, seed: int = 5) -> Stage:
    named = [Layer(str(number), layer) for number, layer in enumerate(layers)]
    return Stage(named, copy.deepcopy(named), index, first, CPU, seed)


def linear(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, dtype=torch.float64)


class Pair(nn.Module):
    """A dict with a tensor that needs no gradient, and one that does not depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return {"out": (x[:, :2] * 2 + self.bias, torch.arange(len(x))), "alone": self.bias * 3}


@pytest.fixture(autouse=True)
def kept_generator() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_the_backward_is_that_of_autograd() -> None:
    def gradients() -> Any:
        layers = linear(4, 3), nn.Tanh(), Pair()
        reference = copy.deepcopy(nn.Sequential(*layers))
        work = stage(*layers)
        views = [torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)]
        outputs = work.student_forward((1, 0), views)
        assert not any(leaf.requires_grad for view in outputs for leaf in (view["out"][0], view["alone"]))
        sent = [torch.randn_like(t) for view in outputs for t in (view["out"][0], view["alone"])]
        received = work.backward((1, 0), sent)

        inputs = [view.clone().requires_grad_() for view in views]
        expected = [reference(x) for x in inputs]
        heads = [t for view in expected for t in (view["out"][0], view["alone"])]
        torch.autograd.backward(heads, sent)
        for (name, parameter), other in zip(
            reference.named_parameters(), nn.Sequential(*layers).parameters(), strict=True
        ):
            torch.testing.assert_close(other.grad, parameter.grad, rtol=0, atol=1e-14, msg=name)
        for found, x in zip(received, inputs, strict=True):
            torch.testing.assert_close(found, x.grad, rtol=0, atol=1e-14)
        for view, other in zip(outputs, expected, strict=True):
            assert torch.equal(view["out"][0], other["out"][0].detach())
            assert torch.equal(view["out"][1], other["out"][1])
        return "done"

    assert result_of(gradients) == "done"


def test_the_first_stage_gives_no_gradient_and_an_unused_input_gives_zeros() -> None:
    def found() -> Any:
        first = stage(linear(4, 3), first=True)
        (out,) = first.student_forward((1, 0), [torch.ones(2, 4, dtype=torch.float64)])
        assert first.backward((1, 0), [torch.ones_like(out)]) == []

        class First(nn.Module):
            def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
                return pair[0] * 2

        (out,) = (middle := stage(First())).student_forward((1, 0), [(torch.ones(2), torch.ones(3))])
        return [gradient.tolist() for gradient in middle.backward((1, 0), [torch.ones_like(out)])]

    assert result_of(found) == [[2.0, 2.0], [0.0, 0.0, 0.0]]


class Last(nn.Module):
    """Of a recurrent layer the outputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return self.lstm(x)[0]


def test_layers_whose_backward_is_not_split_are_named_once() -> None:
    def told() -> list[str]:
        work = stage(linear(4, 3), Last(), nn.Tanh())
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for q in range(2):
                (out,) = work.student_forward((1, q), [torch.ones(2, 4, dtype=torch.float64)])
                work.backward_inputs((1, q), [torch.ones_like(out)])
                work.backward_weights((1, q))
        return [str(warning.message) for warning in found]

    (text,) = result_of(told)
    assert "Stage 1 splits its backward, but not that of '1', or not all of it" in text
    assert "gradients of 1 of the weights" in text  # that of the inputs, a product of its own, can wait


def test_the_teacher_keeps_no_graph() -> None:
    (out,) = stage(linear(4, 3)).teacher_forward((1, 0), [torch.ones(2, 4, dtype=torch.float64)])
    assert not out.requires_grad


def test_an_in_place_layer_leaves_its_input_alone() -> None:
    x = torch.tensor([-1.0, 1.0])
    (out,) = stage(nn.ReLU(inplace=True)).teacher_forward((1, 0), [x])
    assert x.tolist() == [-1.0, 1.0]
    assert out.tolist() == [0.0, 1.0]


class TestRandom:
    """Random numbers depend on seed, network, batch, microbatch and layer, and on nothing else."""

    def drawn(self, work: Stage, batch: int, q: int, network: str = "teacher") -> list[float]:
        forward = work.teacher_forward if network == "teacher" else work.student_forward
        (out,) = forward((batch, q), [torch.ones(8)])
        return list(out.tolist())

    def test_order_does_not_matter_and_all_else_does(self) -> None:
        one, other = stage(nn.Dropout()), stage(nn.Dropout())
        works = [(batch, q) for batch in range(3) for q in range(4)]
        forwards = {work: self.drawn(one, *work) for work in works}
        backwards = {work: self.drawn(other, *work) for work in reversed(works)}
        assert forwards == backwards
        students = [self.drawn(one, *work, "student") for work in works]
        elsewhere = [self.drawn(stage(nn.Dropout(), index=2), *work) for work in works]
        assert elsewhere == list(forwards.values())  # where the cuts are does not matter
        later = [self.drawn(stage(nn.Identity(), nn.Dropout()), *work) for work in works]
        reseeded = [self.drawn(stage(nn.Dropout(), seed=6), *work) for work in works]
        for others in (students, later, reseeded):
            assert others != list(forwards.values())
        assert len({tuple(mask) for mask in forwards.values()}) > 6

    def test_others_see_nothing_of_it(self) -> None:
        work = stage(nn.Dropout())
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        first = torch.rand(2)
        self.drawn(work, 1, 0)
        self.drawn(work, 1, 1)
        work.leave()
        assert torch.equal(torch.cat([first, torch.rand(2)]), expected)


def test_a_changed_structure_is_refused() -> None:
    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x if len(x) > 2 else (x,)

    work = stage(Fickle())
    work.teacher_forward((1, 0), [torch.ones(3)])
    with pytest.raises(ValueError, match=r"The teacher changed the structure .* \(stage 1\)"):
        work.teacher_forward((1, 1), [torch.ones(2)])

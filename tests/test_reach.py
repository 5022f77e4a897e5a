"""What a gradient reaches within one stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_tspipe.reach import reach


def leaves(count: int) -> list[Tensor]:
    return [torch.ones(2, 3, requires_grad=True) for _ in range(count)]


def test_parameters_and_inputs_behind_an_output_that_the_loss_does_not_use() -> None:
    both, one, other = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    x, y = leaves(2)
    shared = both(x)
    outputs = [one(shared), other(shared) + y]
    assert reach(outputs, [x, y], [True, True]) == ([True, True], [])
    inputs, rest = reach(outputs, [x, y], [True, False])
    assert inputs == [True, False]
    assert {id(p) for p in rest} == {id(p) for p in other.parameters()}
    inputs, rest = reach(outputs, [x, y], [False, False])
    assert inputs == [False, False]
    assert len(rest) == 6


def test_what_has_no_gradient_by_itself() -> None:
    """An input that is used without gradients, one that passes through, and an output that nothing was trained for."""
    x, y = leaves(2)
    with torch.no_grad():
        quiet = y * 2
    assert reach([x, quiet, x * quiet], [x, y], [False, True, True]) == ([True, False], [])
    assert reach([x, quiet], [x, y], [False, True]) == ([False, False], [])
    assert reach([x], [x, y], [True]) == ([True, False], [])

"""The version rule as a table, the momentum schedule and the update."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_tspipe import cosine_momentum
from lightning_tspipe.teacher import MomentumTeacher, check_momentum, pair_parameters, teacher_version


@pytest.mark.parametrize(
    ("delay", "delay_from_step", "expected"),
    [
        (0, 1, [0, 1, 2, 3, 4, 5]),
        (1, 1, [0, 0, 1, 2, 3, 4]),
        (1, 2, [0, 0, 1, 2, 3, 4]),
        (1, 4, [0, 1, 2, 2, 3, 4]),
        (1, 7, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_version_rule(delay: int, delay_from_step: int, expected: list[int]) -> None:
    """Every row is max(0, n - 1 - delay), with delay 0 before `delay_from_step`."""
    assert [teacher_version(step, delay, delay_from_step) for step in range(1, 7)] == expected


def test_cosine_momentum_ends_and_middle() -> None:
    """Start at step 1, the mean of both ends halfway, the end after `num_steps` and later."""
    momentum = cosine_momentum(0.9, 1.0, 10)
    assert momentum(1) == pytest.approx(0.9)
    assert momentum(6) == pytest.approx(0.95)
    assert momentum(11) == momentum(100) == 1.0
    assert pickle.loads(pickle.dumps(momentum)) == momentum


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_momentum_out_of_range(bad: float) -> None:
    """Each place that takes a momentum refuses one outside of [0, 1]."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        check_momentum(bad)
    with pytest.raises(ValueError, match="between 0 and 1"):
        cosine_momentum(bad, 1.0, 10)


def test_cosine_momentum_needs_steps() -> None:
    """Zero steps have no schedule."""
    with pytest.raises(ValueError, match="num_steps is 0"):
        cosine_momentum(0.9, 1.0, 0)


def test_updates_are_made_once_and_in_order() -> None:
    """Advancing to a version that is held does nothing; update n uses m_n and the student of step n."""
    student = nn.Linear(3, 2).double()
    teacher = copy.deepcopy(student)
    pairs = list(pair_parameters(teacher, student).values())
    momentum = MomentumTeacher(pairs, lambda step: 1 / (step + 1))
    expected = teacher.weight.detach().clone()
    for step in (1, 2, 3):
        nn.init.normal_(student.weight)
        momentum.advance(step, completed=step)
        momentum.advance(step, completed=step)
        share = 1 / (step + 1)
        expected = share * expected + (1 - share) * student.weight.detach()
        torch.testing.assert_close(teacher.weight.detach(), expected, rtol=0, atol=1e-15)
    with pytest.raises(AssertionError):
        momentum.advance(5, completed=5)  # update 4 was never made


def test_pairs_name_what_is_missing() -> None:
    """A teacher parameter without source, or of another shape, is named."""
    with pytest.raises(ValueError, match=r"'1\.weight' has no source"):
        pair_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"'weight' has shape \(3, 2\), its source \(2, 2\)"):
        pair_parameters(nn.Linear(2, 3), nn.Linear(2, 2))

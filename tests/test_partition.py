"""Layers, cuts and owners."""

import copy
import itertools

import pytest
from torch import nn

from lightning_tspipe.balance import balance_by_cost
from lightning_tspipe.layers import layers_of
from lightning_tspipe.partition import partition


def linears(*widths: int) -> nn.Sequential:
    """Linear layers of the given widths."""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def names(stages: tuple[tuple[object, ...], ...]) -> list[list[str]]:
    """Layer names, stage by stage."""
    return [[layer.name for layer in stage] for stage in stages]  # type: ignore[attr-defined]


def test_nested_sequentials_are_flattened_and_other_modules_are_one_layer() -> None:
    """Names are those of the user's module; a Sequential with its own forward, or with hooks, is not taken apart."""

    class Own(nn.Sequential):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return super().forward(x) + x

    hooked = linears(2, 2, 2)
    hooked.register_forward_hook(lambda *_: None)
    network = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU())), Own(nn.Linear(2, 2)), hooked)
    assert [layer.name for layer in layers_of(network)] == ["0.0", "0.1.0", "1", "2"]
    assert [layer.name for layer in layers_of(nn.Linear(1, 1))] == [""]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_balance_is_exact(stages: int) -> None:
    """The largest stage is as small as brute force finds it."""
    costs = [5, 1, 1, 7, 2, 3, 3, 1]
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    edges = [(0, *cut, len(costs)) for cut in cuts]
    best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise(edge)) for edge in edges)
    sizes = balance_by_cost(costs, stages)
    ends = list(itertools.accumulate(sizes, initial=0))
    assert len(sizes) == stages
    assert min(sizes) >= 1
    assert max(sum(costs[a:b]) for a, b in itertools.pairwise(ends)) == best


def test_explicit_cuts_and_owners() -> None:
    """Both networks by one list, or each by its own; owners go by qualified name, buffers included."""
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    result = partition(student, linears(2, 2, 2, 2, 2), 2, {"student": [1, 2], "teacher": [3, 1]})
    assert names(result.student) == [["0"], ["1", "2"]]
    assert names(result.teacher) == [["0", "1", "2"], ["3"]]
    owners = result.owners()
    assert owners["student.1.running_mean"] == 1
    assert owners["teacher.2.weight"] == 0
    assert names(partition(linears(2, 2, 2), linears(2, 2, 2), 2, [1, 1]).teacher) == [["0"], ["1"]]


def test_a_momentum_teacher_follows_its_source() -> None:
    """Every teacher layer is where its source is; a stage behind the source has no teacher layer."""
    encoder = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    student = nn.Sequential(encoder, nn.Linear(2, 2), nn.Linear(2, 2))
    result = partition(student, copy.deepcopy(encoder), 3, [2, 2, 1], source=encoder)
    sliced = partition(student, copy.deepcopy(student[:1]), 3, [2, 2, 1], source=student[:1])
    assert names(sliced.teacher) == [[f"0.{name}" for name in stage] for stage in names(result.teacher)]
    assert names(result.student) == [["0.0", "0.1"], ["0.2", "1"], ["2"]]
    assert names(result.teacher) == [["0", "1"], ["2"], []]
    with pytest.raises(ValueError, match="follows the student's cuts"):
        partition(student, copy.deepcopy(encoder), 3, {"student": [2, 2, 1], "teacher": [1, 1, 1]}, source=encoder)


@pytest.mark.parametrize(
    ("stages", "balance", "message"),
    [
        (4, "auto", "student has 3 layer"),
        (2, "best", "balance='best' is unknown"),
        (2, [1, 1], "2 layers in all"),
        (2, [0, 3], "at least 1"),
        (3, [1, 2], "there are 3 stages"),
        (2, {"pupil": [1, 2]}, "pupil"),
    ],
)
def test_bad_cuts(stages: int, balance: object, message: str) -> None:
    """Each error names what is wrong and what would fit."""
    with pytest.raises(ValueError, match=message):
        partition(linears(2, 2, 2, 2), linears(2, 2, 2, 2), stages, balance)  # type: ignore[arg-type]


def test_parameters_shared_across_stages_are_named() -> None:
    """Tied weights on one stage are fine, on two stages the error has both names."""
    student = linears(2, 2, 2, 2)
    student[2].weight = student[0].weight
    partition(student, linears(2, 2, 2, 2), 1)
    with pytest.raises(ValueError, match=r"student\.0\.weight \(stage 0\) and student\.2\.weight \(stage 1\)"):
        partition(student, linears(2, 2, 2, 2), 2)

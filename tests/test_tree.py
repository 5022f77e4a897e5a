"""Nested outputs come back as they were."""

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from lightning_tspipe import tree


class Pair(NamedTuple):
    """A named tuple of two."""

    left: Any
    right: Any


@dataclass(frozen=True)
class Frozen:
    """A dataclass with a tensor and a constant."""

    value: Any
    name: str = "name"


@dataclass(slots=True)
class Slots:
    """A dataclass without a dict."""

    value: Any


class Cache:
    """An object that holds tensors in a list."""

    def __init__(self, value: Any) -> None:
        self.layers, self.length = [value], 3

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


X = torch.arange(10.0).reshape(5, 2)
TREES = [
    X,
    (X, X + 1),
    [X, "text"],
    {"a": X, "b": (X, None)},
    Pair(X, 3),
    OrderedDict(z=X, y=[X]),
    Frozen(X),
    Slots(X),
    Cache(X),
]


@pytest.mark.parametrize("value", TREES, ids=[type(value).__name__ for value in TREES])
def test_round_trip(value: Any) -> None:
    """Types, constants and order survive, and the structure survives pickling."""
    leaves, structure = tree.flatten(value)
    back = tree.unflatten(leaves, pickle.loads(pickle.dumps(structure)))
    assert type(back) is type(value)
    assert tree.flatten(back)[1] == structure
    assert all(a is b for a, b in zip(leaves, tree.flatten(back)[0], strict=True))


@pytest.mark.parametrize("value", TREES, ids=[type(value).__name__ for value in TREES])
def test_split_then_merge(value: Any) -> None:
    """Microbatches of unequal sizes join to the batch they came from."""
    parts = tree.split(value, [2, 2, 1])
    assert [tree.flatten(part)[0][0].shape[0] for part in parts] == [2, 2, 1]
    merged = tree.merge(parts, [2, 2, 1])
    assert all(torch.equal(a, b) for a, b in zip(tree.flatten(value)[0], tree.flatten(merged)[0], strict=True))


def test_what_has_no_batch_dimension_goes_to_every_microbatch() -> None:
    """A mask of another size and a number are not cut, and outputs without rows cannot be joined."""
    parts = tree.split((X, torch.ones(3), torch.tensor(1.0)), [3, 2])
    assert [part[1].shape[0] for part in parts] == [3, 3]
    for outputs in (torch.tensor(1.0), torch.tensor(2.0)), (torch.ones(1, 2), torch.ones(1, 2)):
        with pytest.raises(ValueError, match="without a batch dimension"):
            tree.merge(outputs, [2, 2])


def test_several_rows_of_a_sample_are_joined() -> None:
    """Such as the tokens or windows of an image, flattened into the batch."""
    value = torch.arange(10.0).reshape(10, 1)
    assert torch.equal(tree.merge(torch.split(value, [4, 4, 2]), [2, 2, 1]), value)


def test_structures_differ_when_nesting_or_constants_do() -> None:
    """That is how a network that changes its output is found out."""
    assert tree.flatten((X, X))[1] != tree.flatten([X, X])[1]
    assert tree.flatten({"a": X})[1] != tree.flatten({"b": X})[1]
    assert tree.flatten((X, 1))[1] != tree.flatten((X, 2))[1]


def test_outputs_of_transformers_come_back_with_their_attributes() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.BaseModelOutput(last_hidden_state=X, hidden_states=(X, X + 1))
    leaves, structure = tree.flatten(value)
    back = tree.unflatten(leaves, pickle.loads(pickle.dumps(structure)))
    assert type(back) is type(value)
    assert back.last_hidden_state is X
    assert back.attentions is None
    assert list(back) == ["last_hidden_state", "hidden_states"]


def test_objects_without_tensors_are_constants_and_slices_are_taken_apart() -> None:
    one, other = Cache(1), Cache(2)
    one.layers, other.layers = [other], [one]
    leaves, structure = tree.flatten(one)
    assert leaves == []
    assert structure[1] is one
    assert tree.flatten(slice(X, None))[0][0] is X

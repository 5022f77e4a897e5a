"""What the loading rank tells the others about a batch, and the cutting of a batch into microbatches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_tspipe import tree
from lightning_tspipe.stage import Network

WAYS_OUT = (
    'Give TSPipeStrategy fewer of them or "auto", use larger batches, or pass drop_last=True to the DataLoader if this '
    "is the last, short one."
)
Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def shapes_of(leaves: list[Tensor]) -> Shapes:
    """Shape and type of each tensor."""
    return tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)


@dataclass(frozen=True)
class Inputs:
    """The input of one network: one structure and its tensors' shapes per view."""

    views: tuple[tuple[tree.Structure, Shapes], ...]
    is_list: bool

    @classmethod
    def of(cls, value: Any) -> Inputs:
        """Describe what an input hook returned; a list means views."""
        views = value if isinstance(value, list) else [value]
        flat = [tree.flatten(view) for view in views]
        return cls(tuple((structure, shapes_of(leaves)) for leaves, structure in flat), isinstance(value, list))


@dataclass(frozen=True)
class BatchInfo:
    """The header: what every rank knows of a batch before any of its tensors arrive. Sent once per batch.

    Args:
        index: number of the batch since training began.
        sizes: rows of each microbatch of the student.
        teacher_sizes: the same of the teacher; one cut is a finer form of the other.
        student, teacher: shapes of the inputs of the networks, whole batch.
        target: structure and shapes of the target.
        batch: structure and shapes of the batch as the loader gave it, for the stand-in that other ranks' hooks get.
        requeue: whether the job saves itself and asks to be queued again when this batch is done (SLURM).
    """

    index: int
    sizes: tuple[int, ...]
    teacher_sizes: tuple[int, ...]
    student: Inputs
    teacher: Inputs
    target: tuple[tree.Structure, Shapes]
    batch: tuple[tree.Structure, Shapes]
    requeue: bool = False

    @property
    def microbatches(self) -> int:
        """How many microbatches the batch is cut into."""
        return len(self.sizes)

    @property
    def teacher_microbatches(self) -> int:
        """How many the teacher has."""
        return len(self.teacher_sizes)

    def rows(self, network: Network, microbatch: int) -> int:
        """How many a microbatch of one of the networks has."""
        return (self.teacher_sizes if network == "teacher" else self.sizes)[microbatch]

    def key(self, network: Network, microbatch: int) -> Hashable:
        """Equal for microbatches whose activations have equal shapes on every stage."""
        rows = sum(self.sizes)
        views = getattr(self, network).views
        trailing = tuple(
            tuple((shape[1:] if shape and shape[0] == rows else shape, dtype) for shape, dtype in shapes)
            for _, shapes in views
        )
        return network, self.rows(network, microbatch), trailing, tuple(structure for structure, _ in views)

    def stand_in(self) -> Any:
        """A batch of the same nesting, shapes and types whose tensors have no memory (device ``meta``)."""
        structure, shapes = self.batch
        return tree.unflatten([torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes], structure)


@dataclass(frozen=True)
class End:
    """The header after the last batch of an epoch; `terminate` asks every rank to end the job (SIGTERM)."""

    terminate: bool = False


@dataclass
class Batch:
    """One batch on one rank. The tensors are there on the loading rank only, microbatch by microbatch, as views."""

    info: BatchInfo
    student: list[list[Any]] = field(default_factory=list)
    teacher: list[list[Any]] = field(default_factory=list)
    target: Any = None
    keys: dict[Network, list[int]] = field(default_factory=dict)  # `BatchInfo.key` in short, of each microbatch


def make_batch(
    index: int,
    batch: Any,
    student: Any,
    teacher: Any,
    target: Any,
    microbatches: int,
    fixed: bool,
    teacher_microbatches: int | None = None,
    teacher_fixed: bool = False,
) -> Batch:
    """Cut what the input hooks returned into microbatches.

    Args:
        index: number of the batch since training began.
        batch: what the loader gave.
        student, teacher, target: what the hooks made of it.
        microbatches: how many are wanted.
        fixed: the user gave that number, so a smaller batch is an error; else there are as many as rows at most.
        teacher_microbatches: the same of the teacher, a multiple or a divisor of `microbatches`; None: as many. A batch
            that has not rows enough for both has as many of either.
        teacher_fixed: the user gave that number.

    Raises:
        ValueError: there is no tensor, views differ in their rows, or there are fewer rows than microbatches.
    """
    rows = check_rows(student, teacher)
    pieces = microbatches if teacher_microbatches is None else teacher_microbatches
    if fixed and rows < microbatches:
        raise ValueError(f"A batch of {rows} row(s) cannot be cut into microbatches={microbatches}. {WAYS_OUT}")
    if teacher_fixed and rows < pieces:
        raise ValueError(f"A batch of {rows} row(s) cannot be cut into teacher_microbatches={pieces}. {WAYS_OUT}")
    count = min(rows, microbatches)
    sizes = even(rows, count)
    leaves, structure = tree.flatten(batch)
    target_leaves, target_structure = tree.flatten(target)
    info = BatchInfo(
        index,
        sizes,
        (teacher_sizes := nested(sizes, pieces if rows >= max(microbatches, pieces) else count)),
        Inputs.of(student),
        Inputs.of(teacher),
        (target_structure, shapes_of(target_leaves)),
        (structure, shapes_of(leaves)),
    )
    return Batch(info, _cut(student, sizes), _cut(teacher, teacher_sizes), target)


def even(rows: int, count: int) -> tuple[int, ...]:
    """Rows in so many parts of nearly equal size, the larger ones first."""
    return tuple(rows // count + (index < rows % count) for index in range(count))


def nested(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Rows of so many parts, each of which is a part of one that is given, or several of them.

    >>> nested((3, 2), 4), nested((2, 2, 1, 1), 2)
    ((2, 1, 1, 1), (4, 2))
    """
    if count > len(sizes):
        return tuple(part for size in sizes for part in even(size, count // len(sizes)))
    each = len(sizes) // count
    return tuple(sum(sizes[first : first + each]) for first in range(0, len(sizes), each))


def _cut(value: Any, sizes: tuple[int, ...]) -> list[list[Any]]:
    views = value if isinstance(value, list) else [value]
    return [list(parts) for parts in zip(*(tree.split(view, sizes) for view in views), strict=True)]


def check_rows(student: Any, teacher: Any) -> int:
    """How many samples both inputs have.

    Raises:
        ValueError: there is no tensor, or their rows differ.
    """
    rows = _rows("student_input", student)
    if _rows("teacher_input", teacher) != rows:
        raise ValueError(
            f"student_input(batch) has {rows} rows and teacher_input(batch) has {_rows('teacher_input', teacher)}: "
            "both networks need the same samples in dimension 0, since they are cut into the same microbatches."
        )
    return rows


def _rows(hook: str, value: Any) -> int:
    views = value if isinstance(value, list) else [value]
    found = {leaves[0].shape[0] if leaves and leaves[0].ndim else 0 for leaves, _ in map(tree.flatten, views)}
    if not found or 0 in found:
        raise ValueError(
            f"{hook}(batch) has no tensor with rows in dimension 0 (it is a {type(value).__name__}). Override {hook} "
            "so that it returns a tensor of shape (batch, ...), or a list of these, one per view."
        )
    if len(found) > 1:
        raise ValueError(f"the views of {hook}(batch) have {sorted(found)} rows: all need the same samples")
    return found.pop()

"""Nested outputs as a flat list of tensors and a picklable description of the nesting."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Structure = tuple[Any, ...]
LEAF: Structure = ("tensor",)
ONE: Structure = ("sequence", list, (LEAF,))  # a list of one tensor, which most messages are
_HOLDERS = (Tensor, tuple, list, Mapping)
_NO_RECORDS = (nn.Module, type, FunctionType, ModuleType)


def flatten(tree: Any) -> tuple[list[Tensor], Structure]:
    """Take a nesting of tuples, lists, dicts, objects and constants apart.

    Args:
        tree: tensors of any shapes, nested in tuples (named ones too), lists, slices, mappings, dataclasses and other
            objects that hold tensors in their attributes; all else is a constant.

    Returns:
        The tensors, depth first, and the structure: equal structures compare equal, and they can be pickled.
    """
    if type(tree) is list and len(tree) == 1 and isinstance(tree[0], Tensor):
        return [tree[0]], ONE
    leaves: list[Tensor] = []
    return leaves, _flatten(tree, leaves)


def _flatten(tree: Any, leaves: list[Tensor], above: tuple[int, ...] = ()) -> Structure:
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return LEAF
    if isinstance(tree, Mapping):
        return ("dict", type(tree), tuple(tree), tuple(_flatten(value, leaves, above) for value in tree.values()))
    if isinstance(tree, tuple | list):
        return ("sequence", type(tree), tuple(_flatten(value, leaves, above) for value in tree))
    if isinstance(tree, slice):
        return (
            "sequence",
            slice,
            tuple(_flatten(value, leaves, above) for value in (tree.start, tree.stop, tree.step)),
        )
    if id(tree) not in above and _is_record(tree):
        found, above = len(leaves), (*above, id(tree))
        items = vars(tree) if hasattr(tree, "__dict__") else {f.name: getattr(tree, f.name) for f in fields(tree)}
        children = tuple(_flatten(value, leaves, above) for value in items.values())
        if len(leaves) > found:
            return ("object", type(tree), tuple(items), children)
    return ("constant", tree)


def _is_record(value: Any) -> bool:
    """Whether an object may hold tensors in its attributes."""
    if is_dataclass(value):
        return not isinstance(value, type)
    kind = type(value)
    # functions, modules, configurations and the like have no tensors that belong to a batch
    return (
        hasattr(value, "__dict__")
        and any(isinstance(v, _HOLDERS) for v in vars(value).values())
        and not issubclass(kind, _NO_RECORDS)
    )


def unflatten(leaves: Sequence[Tensor], structure: Structure) -> Any:
    """Put together what `flatten` took apart."""
    if structure == ONE:
        (leaf,) = leaves
        return [leaf]
    source = iter(leaves)
    tree = _unflatten(source, structure)
    assert next(source, None) is None, "more tensors than the structure has places"
    return tree


def _unflatten(leaves: Iterator[Tensor], structure: Structure) -> Any:
    if structure == LEAF:
        return next(leaves)
    match structure[0]:
        case "dict":
            _, kind, keys, children = structure
            items = {key: _unflatten(leaves, child) for key, child in zip(keys, children, strict=True)}
            return items if kind is dict else kind(**items) if hasattr(kind, "__dataclass_fields__") else kind(items)
        case "sequence":
            _, kind, children = structure
            values = [_unflatten(leaves, child) for child in children]
            return kind(*values) if hasattr(kind, "_fields") or kind is slice else kind(values)
        case "object":
            _, kind, keys, children = structure
            value = object.__new__(kind)
            for key, child in zip(keys, children, strict=True):
                object.__setattr__(value, key, _unflatten(leaves, child))
            return value
        case _:
            return structure[1]


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with every tensor replaced by ``function(tensor)``."""
    leaves, structure = flatten(tree)
    return unflatten([function(leaf) for leaf in leaves], structure)


def split(tree: Any, sizes: Sequence[int], *, scaled: bool = False) -> list[Any]:
    """Cut every tensor whose dimension 0 is the batch into microbatches; others go to each of them whole.

    Args:
        tree: tensors of shape (rows, ...).
        sizes: rows per microbatch; their sum is the number of rows.
        scaled: whether tensors of shape (rows * n, ...) are cut, too, as `merge` joins them.
    """
    leaves, structure = flatten(tree)
    rows = sum(sizes)
    parts = []
    for leaf in leaves:
        each = (leaf.shape[0] // rows if scaled else 1) if leaf.ndim else 0
        fits = each > 0 and leaf.shape[0] == each * rows
        parts.append(torch.split(leaf, [each * size for size in sizes]) if fits else [leaf] * len(sizes))
    return [unflatten([part[index] for part in parts], structure) for index in range(len(sizes))]


def merge(trees: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Concatenate microbatches along dimension 0; the inverse of `split`.

    Args:
        trees: one per microbatch, of tensors of shape (rows, ...) or (rows * n, ...).
        sizes: rows of each microbatch.

    Raises:
        ValueError: a tensor has no batch dimension to concatenate along.
    """
    if len(trees) == 1:
        return trees[0]
    flat = [flatten(tree) for tree in trees]
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    for column in columns:
        each = column[0].shape[0] // sizes[0] if column[0].ndim else None
        if each is None or any(len(leaf) != each * size for leaf, size in zip(column, sizes, strict=True)):
            raise ValueError(
                f"A network returned a tensor without a batch dimension, of shape {tuple(column[0].shape)} for "
                f"{sizes[0]} row(s), or a tapped submodule did, so the outputs of several microbatches cannot be "
                "joined. Return tensors of shape (batch, ...), tap another submodule, or use microbatches=1."
            )
    return unflatten([torch.cat(column) for column in columns], flat[0][1])


class _Pickler(pickle.Pickler):
    """Tensors as bytes: torch's own way does not know every type."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        host = plain(value.cpu())
        return _tensor_of, (as_bytes(host).numpy().tobytes(), tuple(host.shape), host.dtype)


def pickled(value: object) -> bytes:
    """Any object with tensors of any type in it, for `pickle.loads`."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def plain(tensor: Tensor) -> Tensor:
    """The same numbers, one after the other in memory: no transposition, conjugation or negation that is still due."""
    if not tensor.requires_grad and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        return tensor
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: neither gloo nor NCCL takes every type."""
    return tensor.reshape(-1).view(torch.uint8)


def _tensor_of(content: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)

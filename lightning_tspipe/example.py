"""An example of what the networks see, for the shapes that their forwards are followed with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, IterableDataset

from lightning_tspipe import _lightning, tree
from lightning_tspipe.data import check_rows
from lightning_tspipe.module import TeacherStudentModule
from lightning_tspipe.randomness import kept

ROWS = 2
Described = list[tuple[tree.Structure, list[tuple[torch.Size, torch.dtype]]]]


class Examples:
    """Inputs of the networks, without memory, the same on every rank: `example_input_array`, or some of the data.

    Args:
        trainer, module: the user's.
        broadcast: gives every rank what rank 0 has.
    """

    def __init__(self, trainer: pl.Trainer, module: TeacherStudentModule, broadcast: Callable[[Any], Any]) -> None:
        self._trainer, self._module, self._broadcast = trainer, module, broadcast
        self._found: dict[str, Described] | str = {}

    def of(self, network: str) -> list[Any]:
        """One input of a network per view.

        Raises:
            MisconfigurationException: there is no example; the text says what to do.
        """
        if not self._found:
            self._found = self._broadcast(self._look() if self._trainer.global_rank == 0 else None)
        if isinstance(self._found, str):
            raise MisconfigurationException(
                f"The {network} is no nn.Sequential, or has taps, so an example of its input is needed to cut it into "
                f"stages, and there is none: {self._found}. "
                "Set self.example_input_array in your module to such an input."
            )
        return [
            tree.unflatten([torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes], structure)
            for structure, shapes in self._found[network]
        ]

    def sample(self, microbatches: int) -> dict[str, list[Any]] | None:
        """About one microbatch of each network's input, view by view, on this rank's device; None if there is none.

        What is wrong with the data or the hooks is an error when the first batch is loaded.
        """
        try:
            student, teacher = self.inputs(microbatches)
            check_rows(student, teacher)
        except Exception:
            return None
        return {"student": _views(student), "teacher": _views(teacher)}

    def _look(self) -> dict[str, Described] | str:
        try:
            student, teacher = self.inputs()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return {"student": _describe(student), "teacher": _describe(teacher)}

    def inputs(self, microbatches: int | None = None) -> tuple[Any, Any]:
        """What the hooks make of some samples: two, or a batch's share."""
        module, device = self._module, self._trainer.strategy.root_device
        if module.example_input_array is not None:
            value = self._trainer.precision_plugin.convert_input(module.example_input_array)
            value = tree.map_tensors(value, lambda leaf: leaf.to(device))
            return value, value
        loader = _lightning.loader_of(self._trainer)
        names = "on_before_batch_transfer", "on_after_batch_transfer", "student_input", "teacher_input"
        with kept(device, loader, *(getattr(module, name) for name in names)):
            if isinstance(loader, list) and self._trainer.state.fn != TrainerFn.FITTING:
                loader = loader[0]  # evaluations take one after the other
            batch = _lightning.prepare_batch(self._trainer, _sample(loader, microbatches))
            return module.student_input(batch), module.teacher_input(batch)


def _describe(value: Any) -> Described:
    flat = [tree.flatten(view) for view in _views(value)]
    return [(structure, [(leaf.shape, leaf.dtype) for leaf in leaves]) for leaves, structure in flat]


def _views(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _sample(loader: Any, microbatches: int | None) -> Any:
    """Some samples of a loader's data, past its sampler and its workers: two, or as many as a microbatch has."""
    if isinstance(loader, Mapping):
        return {key: _sample(value, microbatches) for key, value in loader.items()}
    if isinstance(loader, list | tuple):
        return [_sample(value, microbatches) for value in loader]
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
        raise TypeError(f"nothing can be taken from a {kind} without using it up")
    dataset: Any = loader.dataset
    if loader.batch_sampler is None:
        return loader.collate_fn(dataset[next(iter(loader.sampler))])
    rows = ROWS
    if microbatches is not None:
        rows = -(-(getattr(loader.batch_sampler, "batch_size", None) or ROWS) // microbatches)
    return loader.collate_fn([dataset[index] for index in range(min(rows, len(dataset)))])

"""Checkpoints as folders to which each rank writes its own part, by torch.distributed.checkpoint.

The layout is that of Lightning's FSDPStrategy: the shards, torch's ``.metadata``, and ``meta.pt`` with everything that
is neither weights nor optimizer state. So Lightning's own tool makes one file of such a folder.
"""

from __future__ import annotations

import shutil
from collections import UserDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_states
from torch.distributed.checkpoint.state_dict_saver import save as save_states

from lightning_tspipe.files import beside, sync_folder
from lightning_tspipe.memory import UNREAD, stand_in

META = "meta.pt"


def is_sharded(path: Path) -> bool:
    """Whether a path is such a folder."""
    return path.is_dir() and (path / META).is_file()


def find(path: Path) -> Path:
    """Where the folder is: one cannot be replaced in one go, so a process may have been killed between two renames."""
    old = beside(path, "old")
    return old if old.exists() and not path.exists() else path


def prepare(path: Path) -> None:
    """Clear away what a process that was killed has left; called on one rank before `save`."""
    if find(path) != path:
        find(path).rename(path)
    for purpose in ("old", "shards"):
        shutil.rmtree(beside(path, purpose), ignore_errors=True)
    if path.is_file():
        path.unlink()


def save(
    checkpoint: dict[str, Any], path: Path, rank: int, group: dist.ProcessGroup | None, alone: bool = False
) -> None:
    """Write a checkpoint; called on every rank of one replica.

    Args:
        checkpoint: Lightning's, whose state dicts hold what this rank has, all by name.
        path: the folder, the same on every rank; nothing of an earlier one stays.
        rank: this rank.
        group: of all ranks that write; None means all processes.
        alone: whether this rank is the only one.
    """
    states = {"model": checkpoint.pop("state_dict")}
    states |= {f"optimizer_{index}": state for index, state in enumerate(checkpoint.pop("optimizer_states", []))}
    shards = beside(path, "shards")
    save_states(states, storage_writer=FileSystemWriter(shards), process_group=group, no_dist=alone)
    if rank:
        return
    torch.save(checkpoint, shards / META)
    old = beside(path, "old")
    if path.is_dir():
        path.rename(old)
    shards.replace(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def load(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """Lightning's checkpoint, with `WeightShards` and `OptimizerShards`, of which a rank needs a part only."""
    checkpoint: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=weights_only)
    paths = FileSystemReader(path).read_metadata().planner_data.values()
    checkpoint["state_dict"] = WeightShards(path)
    if optimizers := {where[0] for where in paths} - {"model"}:
        checkpoint["optimizer_states"] = [OptimizerShards(path, index) for index in range(len(optimizers))]
    return checkpoint


class WeightShards(UserDict[str, Any]):
    """The weights, still on disk: a value is read when it is asked for.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        metadata = FileSystemReader(path).read_metadata()
        for flat, (part, *where) in metadata.planner_data.items():
            if part == "model":
                kind = metadata.state_dict_metadata[flat]
                like = torch.empty(0, device="meta")  # of what is no tensor
                if isinstance(kind, TensorStorageMetadata):
                    like = torch.empty(kind.size, dtype=kind.properties.dtype, device="meta")
                self.data[where[0]] = stand_in(like, self.read, where[0])

    def __getitem__(self, name: str) -> Any:
        value = self.data[name]
        if self._is_unread(name):
            value = self.data[name] = self.read([name])[name]
        return value

    def _is_unread(self, name: str) -> bool:
        value = self.data[name]
        return isinstance(value, Tensor) and UNREAD in vars(value)

    def read(self, names: Collection[str]) -> Mapping[str, Any]:
        """The values on disk of some names."""
        found: Mapping[str, Any] = _read(self._path, lambda where: where[0] == "model" and where[1] in names)["model"]
        return found

    def lent(self, names: Collection[str]) -> dict[str, Any]:
        """A state dict for `lend`, in which these names, as far as nobody has asked for them, are still unread."""
        now = {name for name in self.data if self._is_unread(name) and name not in names}
        values = self.read(now) if now else {}
        return {name: values[name] if name in now else value for name, value in self.data.items()}


@dataclass(frozen=True)
class OptimizerShards:
    """The state of one optimizer, still on disk."""

    path: Path
    index: int

    def read(self, names: Collection[str]) -> dict[str, Any]:
        """A state dict by parameter names, with the state of these parameters only."""
        key = f"optimizer_{self.index}"
        state = _read(
            self.path, lambda where: where[0] == key and (where[1] != "state" or where[2] in names)
        )[key]  # fmt: skip
        groups = state["param_groups"]
        return {"state": {}, **state, "param_groups": [groups[number] for number in sorted(groups)]}


def _read(path: Path, wanted: Callable[[tuple[Any, ...]], bool]) -> dict[Any, Any]:
    """What a folder holds under the wanted paths of keys, as nested dicts (lists become dicts by number)."""
    metadata = FileSystemReader(path).read_metadata()
    places = {name: where for name, where in metadata.planner_data.items() if wanted(where)}
    flat: dict[str, Any] = {}
    for name in places:
        kind = metadata.state_dict_metadata[name]
        flat[name] = None
        if isinstance(kind, TensorStorageMetadata):
            flat[name] = torch.empty(kind.size, dtype=kind.properties.dtype)
    load_states(flat, checkpoint_id=path, no_dist=True)
    nested: dict[Any, Any] = {}
    for name, (*parents, last) in places.items():
        holder = nested
        for parent in parents:
            holder = holder.setdefault(parent, {})
        holder[last] = flat[name]
    return nested

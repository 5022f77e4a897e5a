"""Checkpoint files that are either whole or not there."""

from __future__ import annotations

import copy
import hashlib
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

LARGE = ("state_dict", "optimizer_states")  # the parts of a checkpoint of which each rank copies its own


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and renames, so that a process that is killed leaves the file as it was.

    Lightning's own writes to the folder of temporary files and moves the result. Where that is another file system, a
    move is a copy over the old file. Elsewhere than on local disks this class does what Lightning's does.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        system, name = url_to_fs(str(path))
        if storage_options is not None or not isinstance(system, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(file) as part, part.open("wb") as stream:
            try:
                torch.save(checkpoint, stream)
                stream.flush()
            except RuntimeError as error:  # torch hides what came before: the disk is full, or Ctrl-C
                raise _hidden(error) or error from error
            os.fsync(stream.fileno())

    @override
    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Of a local file, a tensor is read when it is used: ranks that need a part do not hold the whole."""
        system, name = url_to_fs(str(path))
        if not isinstance(system, LocalFileSystem) or not zipfile.is_zipfile(name):
            return super().load_checkpoint(path, map_location, weights_only)
        checkpoint: dict[str, Any] = torch.load(name, map_location, weights_only=weights_only, mmap=True)
        # what the loops, callbacks and generators keep of it would keep all pages that were read, too
        return {key: value if key in LARGE else copy.deepcopy(value) for key, value in checkpoint.items()}


def beside(path: Path, purpose: str) -> Path:
    """A hidden name in the same folder, always the same one, so that what a killed process has left is used again.

    Nothing of the path's own name is in it: Lightning looks for ``last`` and ``hpc_ckpt_`` in the names of a folder.
    """
    return path.with_name(f".{hashlib.sha1(path.name.encode()).hexdigest()[:16]}.{purpose}")


def sync_folder(folder: Path) -> None:
    """Let a rename in a folder survive a loss of power, where the file system can say so."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _hidden(error: BaseException) -> BaseException | None:
    cause = error.__cause__ or error.__context__
    return cause if cause is None or isinstance(cause, OSError | KeyboardInterrupt) else _hidden(cause)


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    part = beside(file, "part")
    try:
        yield part
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)

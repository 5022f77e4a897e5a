"""A checkpoint file is whole or not there, whenever the process that writes it dies."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tspipe import TSPipeStrategy
from lightning_tspipe.errors import PipelineError
from lightning_tspipe.files import AtomicCheckpointIO, beside
from tests.multiproc import result_of
from tests.scripts.small import loader, trainer
from tests.test_checkpoint import PARTS, Exact, assert_same, read


class DiesWriting(L.Callback):
    """From some epoch on, a rank is killed by the system when a file that it writes has so many bytes.

    Args:
        rank: of the victim.
        epoch: the first one of which the checkpoint is not written.
        size: bytes.
    """

    def __init__(self, rank: int, epoch: int, size: int = 3000) -> None:
        self.rank, self.epoch, self.size = rank, epoch, size

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        if (trainer.global_rank, trainer.current_epoch) == (self.rank, self.epoch):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # else Python makes an OSError of it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def fit(folder: Path, epochs: int, resume: Path | None = None, *more: L.Callback) -> None:
    """Train until so many epochs have been made; ``last.ckpt`` is written anew after each."""
    keep = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    strategy = TSPipeStrategy(microbatches=2, start_method="fork")
    run = trainer(2, strategy, max_epochs=epochs, callbacks=[keep, *more], enable_checkpointing=True)
    run.fit(Exact(momentum=0.9), loader(), ckpt_path=resume)


def test_rank_0_dies_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """The file is that of the epoch before, and a training that resumes from it ends as an uninterrupted one."""
    file = tmp_path / "last.ckpt"

    def trainings() -> None:
        with pytest.raises(PipelineError):
            fit(tmp_path, 3, None, DiesWriting(rank=0, epoch=2))
        part = beside(file, "part")
        assert part.stat().st_size == 3000, "it did not die while it wrote beside the file"
        assert read(file)["epoch"] == 1
        fit(tmp_path, 3, file)
        assert not part.exists()
        fit(tmp_path / "whole", 3)

    result_of(trainings, timeout=100)
    for part in PARTS:
        assert_same(read(file), read(tmp_path / "whole/last.ckpt"), part)


def test_what_is_left_has_no_name_that_lightning_looks_for(tmp_path: Path) -> None:
    """It takes ``last`` for the newest checkpoint, and counts all names with ``hpc_ckpt_``."""
    for name in ("last.ckpt", "hpc_ckpt_3.ckpt"):
        left = beside(tmp_path / name, "part")
        assert left.parent == tmp_path
        assert left == beside(tmp_path / name, "part")
        assert left.suffix == ".part"
        assert not {"last", "hpc"} & {left.name[i : i + n] for n in (3, 4) for i in range(len(left.name))}


class Fails:
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise OSError("cannot be written")


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file, io = tmp_path / "sub/a.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"a": 1}, file)
    io.save_checkpoint({"a": 2}, str(file))
    with pytest.raises(OSError, match="cannot be written"):
        io.save_checkpoint({"a": Fails()}, file)
    assert [path.name for path in file.parent.iterdir()] == ["a.ckpt"]
    assert io.load_checkpoint(file) == {"a": 2}
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()
    io.save_checkpoint({"a": 3}, "memory://tspipe/a.ckpt")  # not a local disk
    assert io.load_checkpoint("memory://tspipe/a.ckpt") == {"a": 3}
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({"a": 4}, file, storage_options={})
    assert torch.load(file) == {"a": 2}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_ctrl_c_in_the_middle_of_a_write_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's writer then finds that its positions do not fit, and would hide that the user has pressed a key."""
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, file)
    opened = Path.open

    class Stream:
        def __init__(self, file: Any) -> None:
            self.file, self.count = file, 0

        def write(self, data: Any) -> int:
            self.count += 1
            if self.count == 3:
                raise KeyboardInterrupt
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

    monkeypatch.setattr(Path, "open", lambda path, mode: Stream(opened(path, mode)))
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "tensor": torch.ones(10_000)}, file)
    monkeypatch.undo()
    assert torch.load(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]

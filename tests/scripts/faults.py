"""A short training with checkpoints that is struck somewhere, and what it leaves behind."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader, Subset, TensorDataset
from typing_extensions import override

from lightning_tspipe import TSPipeStrategy
from tests.scripts.small import Small, trainer

EPOCHS, BATCHES, ROWS = 3, 4, 4
STEPS = EPOCHS * BATCHES


class Struck(Exception):
    """What a rank raises that is struck by an exception."""


class Strike:
    """Strikes some ranks once.

    Args:
        rank, out: this rank, and the folder where ``<rank>.struck`` notes the time.
        where: the hook that it happens in, or after; "" for none.
        how: "raise", "disk" (files of this rank cannot grow any more), or the name of a signal, which comes `delay`
            seconds later.
        victims: the ranks.
        nth: which call of the hook on that rank.
        delay: seconds.
    """

    def __init__(self, rank: int, out: Path, where: str, how: str, victims: list[int], nth: int, delay: float) -> None:
        self._rank, self._out, self._where, self._how, self._delay = rank, out, where, how, delay
        self._left = nth if rank in victims else 0

    def at(self, where: str) -> None:
        """The rank is at this place."""
        if where != self._where or self._left == 0:
            return
        self._left -= 1
        if self._left:
            return
        if self._how in ("raise", "disk"):
            self._note()
            if self._how == "raise":
                raise Struck(f"{where} of rank {self._rank}")
            resource.setrlimit(resource.RLIMIT_FSIZE, (random.Random(self._delay).randrange(8000), -1))
        elif self._delay:
            threading.Thread(target=self._signal, daemon=True).start()
        else:
            self._signal()

    def _signal(self) -> None:
        time.sleep(self._delay)
        self._note()
        os.kill(os.getpid(), getattr(signal, self._how))
        while self._how == "SIGINT" and self._delay:  # Python loses one that comes while it deletes an object
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

    def _note(self) -> None:
        (self._out / f"{self._rank}.struck").write_text(str(time.time()))


class Optimizer(torch.optim.SGD):
    """Can be struck in its step."""

    strike: Strike | None = None

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        result = super().step(closure)
        if self.strike is not None:
            self.strike.at("optimizer")
        return result


class Model(Small):
    """In float64, with a momentum teacher; three layers. Every hook can be struck."""

    def __init__(self, strike: Strike) -> None:
        super().__init__(momentum=0.9)
        self.double()
        self.strike = strike

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        self.strike.at("loss")
        value = super().loss(student_out, teacher_out, target)
        self.log("value", value)
        return value

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.strike.at("validation_step")
        self.log("val", self.student(batch[0]).square().mean())

    @override
    def configure_optimizers(self) -> Any:
        self.strike.at("configure_optimizers")
        optimizer = Optimizer(self.student.parameters(), lr=0.1, momentum=0.9)
        optimizer.strike = self.strike
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


HOOKS = ("setup", "configure_model", "on_fit_start", "on_train_start", "on_train_batch_start", "on_after_backward",
         "on_train_batch_end", "on_validation_start", "on_validation_end", "on_save_checkpoint", "on_train_epoch_end",
         "on_train_end", "on_fit_end", "teardown")  # fmt: skip


def _hook(name: str) -> Any:
    def hook(self: Model, *args: Any, **kwargs: Any) -> None:
        self.strike.at(name)

    return hook


for _name in HOOKS:
    setattr(Model, _name, _hook(_name))


class Callback(L.Callback):
    """The same for some hooks of callbacks."""

    def __init__(self, strike: Strike) -> None:
        self.strike = strike

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.strike.at("callback")

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))  # what is printed goes to a file


class Data(TensorDataset):
    """Rows of random numbers; a worker of the loader is struck while it gets one."""

    def __init__(self, strike: Strike) -> None:
        super().__init__(torch.randn(BATCHES * ROWS, 4, generator=torch.Generator().manual_seed(1)).double())
        self.strike = strike

    def __getitem__(self, index: int) -> Any:
        self.strike.at("loader")
        return super().__getitem__(index)


class Loader:
    """Batches in a fixed order; it knows where it is, so that a training resumes in the middle of an epoch."""

    def __init__(self, data: Data, workers: int) -> None:
        self._data, self._workers, self._done = data, workers, 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        self._done %= BATCHES
        rest = Subset(self._data, range(self._done * ROWS, BATCHES * ROWS))
        for batch in DataLoader(rest, ROWS, num_workers=self._workers):
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How many batches have been given."""
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self._done = state["done"]


def _pretend_slurm(rank: int, out: Path, devices: int) -> None:
    """SLURM's variables, and an `scontrol` that notes its arguments in ``scontrol.txt`` and ends the ranks."""
    (out / f"{rank}.id").write_text(f"{os.getpid()}\n")
    os.environ.update(
        SLURM_JOB_ID="1234", SLURM_JOB_NAME="train", SLURM_NTASKS=str(devices), SLURM_NTASKS_PER_NODE=str(devices),
        SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NODEID="0", PATH=f"{out}:{os.environ['PATH']}",
    )  # fmt: skip
    if rank == 0:
        file = out / "scontrol"
        file.write_text(f'#!/bin/sh\necho "$@" >> {out}/scontrol.txt\nkill -TERM $(cat {out}/*.id)\n')
        file.chmod(0o755)


def run(
    rank: int,
    out: Path,
    devices: int,
    where: str = "",
    how: str = "",
    victims: tuple[int, ...] = (),
    nth: int = 1,
    delay: float = 0.0,
    resume: str | None = None,
    workers: int = 0,
    slurm: bool = False,
    every: int = 2,
    files: str = "",
) -> None:
    """One rank of a training, and of a validation after it; ``<rank>.pt`` has its weights at the end.

    Args:
        rank, out, where, how, victims, nth, delay: see `Strike`.
        devices: number of ranks.
        resume: a checkpoint.
        workers: of the loader.
        slurm: whether it takes itself for a job of SLURM.
        every: steps between checkpoints; there are others at the ends of epochs.
        files: folder of the checkpoints; "" is ``files`` in `out`.
    """
    logging.getLogger("lightning").setLevel(logging.ERROR)
    if slurm:
        _pretend_slurm(rank, out, devices)
    strike = Strike(rank, out, where, how, list(victims), nth, delay)
    folder = Path(files or out / "files")
    callbacks: list[L.Callback] = [
        Callback(strike),
        ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, save_on_train_epoch_end=False),
        ModelCheckpoint(folder, "end-{epoch}", save_last=True),
    ]
    options: dict[str, Any] = {"plugins": [SLURMEnvironment()], "default_root_dir": out} if slurm else {}
    fit = trainer(
        devices,
        TSPipeStrategy(microbatches=2),
        max_epochs=EPOCHS,
        callbacks=callbacks,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        **options,
    )
    model, data = Model(strike), Data(strike)
    fit.fit(model, Loader(data, workers), DataLoader(TensorDataset(data.tensors[0]), 12), ckpt_path=resume)
    torch.save(model.state_dict(), out / f"{rank}.pt")
    strike.at("between")
    fit.validate(model, DataLoader(TensorDataset(data.tensors[0]), 12), verbose=False)

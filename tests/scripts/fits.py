"""Trainings that work; every rank leaves what it saw in a file."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from lightning_tspipe import TSPipeStrategy, edge
from tests.scripts.small import Small, loader, network, trainer, weights


class Logging(Small):
    """Logs in every way that there is, and uses whole networks in every kind of evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.values: list[float] = []

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        loss = (student_out - teacher_out).square().mean()
        self.values.append(float(loss))
        self.mean(loss)
        self.log("value", loss.detach() * 2, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log("last_target", target[-1].float())
        return {"loss": loss, "third": loss.detach() * 3}

    def _gap(self, batch: Any) -> Tensor:
        student, teacher = self.student(batch[0]), self.teacher(batch[0])
        assert student.shape == teacher.shape == (len(batch[0]), 2)
        return (student - teacher).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self._gap(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self._gap(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.student(batch[0])


def save(file: Path, value: Any) -> None:
    """Write a file that is either whole or not there."""
    torch.save(value, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)


def scalars(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def everything(
    rank: int, out: Path, devices: int = 2, strategy: str | None = None, twin: bool = False, after: bool = False
) -> None:
    """Fit with validation, test, predict; then the weights."""
    torch.set_num_threads(1)
    logger = CSVLogger(out, name="", version="csv")
    make: Any = strategy or TSPipeStrategy(microbatches=2)
    fit = trainer(devices, "auto" if twin else make, logger=logger, log_every_n_steps=1, max_epochs=2)
    module = Logging()
    fit.fit(module, loader(), loader(8))
    result: dict[str, Any] = {"fit": scalars(fit.callback_metrics), "rank": fit.global_rank, "values": module.values}
    if strategy is None:  # processes that Lightning starts for each call are gone after it
        fit.test(module, loader(8), verbose=False)
        result["test"] = scalars(fit.callback_metrics)
        result["predictions"] = fit.predict(module, loader(8))
        fit.validate(module, loader(8), verbose=False)
        result["validate"] = scalars(fit.callback_metrics)
    result["meta"] = [name for name, tensor in module.named_parameters() if tensor.is_meta]
    result["weights"] = weights(module) | {f"teacher.{k}": v for k, v in module.teacher.state_dict().items()}
    result["predicted"] = module.student(torch.ones(3, 4)).detach()
    if after:
        again = trainer(1, "auto")
        again.fit(module, loader())
        result["after"] = weights(module)
    save(out / f"{fit.global_rank}.pt", result)


# --- data


class Noisy(Dataset[Any]):
    """Rows with noise drawn in the process that loads them, which leaves a record of every draw."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        noise = torch.rand(())
        with (self.out / f"draws.{os.getppid()}.{os.getpid()}").open("a") as file:
            file.write(f"{float(noise)!r}\n")
        return noise.expand(4).clone(), noise


class SeesInput(Small):
    """The teacher hands its input to the loss, which compares it with the target of the same draw."""

    def __init__(self) -> None:
        super().__init__()
        self.student = network(4, 4, 4)
        self.teacher = nn.Sequential(nn.Identity(), nn.Identity())
        self.targets: list[float] = []

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        assert torch.equal(teacher_out, target[:, None].expand(-1, 4))
        self.targets += target.tolist()
        self.log("target", target.sum())
        return (student_out - teacher_out).square().mean()


class Targets(L.Callback):
    """What every rank is told about each batch."""

    def __init__(self) -> None:
        self.sums: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.sums.append(float(trainer.callback_metrics["target"]))


def noisy(rank: int, out: Path, workers: int) -> None:
    """Random augmentation in a worker."""
    torch.manual_seed(rank)
    module, seen = SeesInput(), Targets()
    fit = trainer(2, callbacks=[seen], max_epochs=2)
    fit.fit(module, DataLoader(Noisy(out), 4, num_workers=workers))
    save(out / f"{rank}.pt", {"pid": os.getpid(), "targets": module.targets, "sums": seen.sums})


# --- messages

# every call that moves data, at the level where all of torch.distributed ends up
CALLS = (
    "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base", "allreduce",
    "allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "monitored_barrier", "recv",
    "recv_anysource", "reduce", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "scatter",
    "send",
)  # fmt: skip


class Counting(L.Callback):
    """Counts calls of process groups and messages from one batch's start to another's."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.calls: Counter[str] = Counter()
        self.messages: dict[str, int] = {}
        self.counting = False
        for name in CALLS:
            if hasattr(dist.ProcessGroup, name):
                setattr(dist.ProcessGroup, name, self._wrap(name, getattr(dist.ProcessGroup, name)))
        edge.Sender.exchange = self._wrap("shared", edge.Sender.exchange)  # type: ignore[method-assign]

    def _wrap(self, name: str, call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.counting:
                self.calls[name] += 1
            return call(*args, **kwargs)

        return counted

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        messages = dict(trainer.strategy._comm.messages)  # type: ignore[attr-defined]
        if batch_idx == self.first:
            self.messages, self.counting = messages, True
        if batch_idx == self.last:
            self.messages = {kind: messages[kind] - count for kind, count in self.messages.items()}
            self.counting = False


def counted(rank: int, out: Path, momentum: float | None, stages: int, shared: bool) -> None:
    """From the start of step 3 to the start of step 6; `shared`: small messages go through memory that ranks share."""
    edge.USED = shared
    counting = Counting(2, 5)
    fit = trainer(stages, TSPipeStrategy(microbatches=2), callbacks=[counting])
    module = Small(momentum=momentum)
    fit.fit(module, loader())
    save(out / f"{rank}.pt", {"calls": dict(counting.calls), "messages": counting.messages})


# --- the command line


class Data(L.LightningDataModule):
    """Loaders for the command line."""

    def train_dataloader(self) -> Any:
        return loader()


class Saves(L.Callback):
    """What every rank ran with."""

    def __init__(self, out: str) -> None:
        self.out = out

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        strategy: Any = trainer.strategy
        found = {"strategy": type(strategy).__name__, "start_method": strategy._start_method,
                 "microbatches": strategy._microbatches, "steps": trainer.global_step}  # fmt: skip
        save(Path(self.out, f"{trainer.global_rank}.pt"), found)


def cli(rank: int, out: Path, strategy: str) -> None:
    """LightningCLI with a config file; `strategy` is YAML."""
    config = out / "config.yaml"
    config.write_text(
        f"""
trainer:
  accelerator: cpu
  devices: 2
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
  - class_path: tests.scripts.fits.Saves
    init_args: {{out: {out}}}
  strategy: {strategy}
"""
    )
    LightningCLI(Small, Data, args=["fit", "--config", str(config)], save_config_callback=None)


if __name__ == "__main__":
    everything(0, Path(sys.argv[1]), strategy=sys.argv[2] if len(sys.argv) > 2 else None)

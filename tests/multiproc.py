"""Runs trainings in forked processes and brings back what every rank saw.

One call forks one driver from the process that pytest runs in (which has imported everything), so pytest's own process
never starts `torch.distributed`; the driver forks ranks, as torchrun would start them, and they run one `Trainer.fit`
after the other.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_tspipe import TSPipeStrategy
from tests.ports import free_port
from tests.scripts.hiding import roomy

TWIN = 0  # number of stages that stands for `strategy="auto"`

torch.set_num_threads(1)  # a process that has used OpenMP threads cannot fork children that use them


@dataclass(frozen=True)
class Fit:
    """One training.

    Args:
        make_module: builds the module; called on every rank.
        make_loader: builds the loader of the training; called on every rank.
        stages: number of processes; `TWIN` trains by ``strategy="auto"`` instead.
        microbatches: per batch.
        make_val_loader: builds the loader of the validation, if there is one.
        strategy: more arguments of `TSPipeStrategy`.
        trainer: arguments of `Trainer`.
        seed: torch's seed when the fit begins.
    """

    make_module: Callable[[], L.LightningModule]
    make_loader: Callable[[], Any]
    stages: int
    microbatches: int | str = "auto"
    make_val_loader: Callable[[], Any] | None = None
    strategy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    seed: int = 7


class Witness(L.Callback):
    """Notes what its rank sees, and writes it to a file.

    The file holds a dict:

    - ``losses``: of every batch, as `loss` gave it; ``grads``: of this rank's parameters by name, per optimizer step;
    - ``local``: at the end of training, the parameters and buffers that this rank holds;
    - ``optimizer``: at the end of training, the optimizer's state of this rank's parameters by name, and
      ``groups``: hyperparameters and names of the optimizer's groups;
    - ``metrics``: `callback_metrics` at the end, ``history``: after every validation;
    - ``whole``: the state of the whole module after the fit; ``steps``: how many there were.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seen: dict[str, Any] = {"losses": [], "grads": [], "history": []}

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        loss = (outputs["loss"] if isinstance(outputs, dict) else outputs).detach().clone()
        self.seen["losses"].append(loss * trainer.accumulate_grad_batches)  # Lightning shows it divided by that

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen["grads"].append(_copies({n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}))

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen["history"].append(_copies(trainer.callback_metrics))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        optimizer = trainer.optimizers[0]
        tensors = dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())
        self.seen["local"] = _copies({name: tensor for name, tensor in tensors.items() if not tensor.is_meta})
        self.seen["optimizer"] = {names[id(p)]: _copies(state) for p, state in optimizer.state.items()}
        self.seen["groups"] = [
            {**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups
        ]
        self.seen["metrics"] = _copies(trainer.callback_metrics)
        self.seen["steps"] = trainer.global_step

    def write(self, module: L.LightningModule, rank: int) -> None:
        """Write the file; called when the module is whole again."""
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        self.seen["whole"] = _copies(tensors)
        torch.save(self.seen, self._folder / f"{rank}.pt")


class WitnessedStrategy(TSPipeStrategy):
    """Lets the witness write when the pipeline has been taken down on its rank."""

    witness: Witness

    @override
    def teardown(self) -> None:
        module, rank, failed = self.lightning_module, self.global_rank, self._failed
        super().teardown()
        if module is not None and not failed:
            self.witness.write(module, rank)


def run_fits(fits: Sequence[Fit], timeout: float = 60.0) -> list[list[dict[str, Any]]]:
    """Run trainings one after another; for each the list of what its ranks saw (see `Witness`).

    Args:
        fits: what to run.
        timeout: seconds that all of them may take together; after that every process is killed.

    Raises:
        AssertionError: a process failed or the time was over; the text ends with what the processes printed.
    """
    with tempfile.TemporaryDirectory(prefix="tspipe-") as name:
        folder = Path(name)
        for index in range(len(fits)):
            (folder / str(index)).mkdir()
        run_in_fork(lambda: _drive(fits, folder), folder / "log", timeout)
        return [
            [torch.load(folder / str(index) / f"{rank}.pt", weights_only=False) for rank in range(max(1, fit.stages))]
            for index, fit in enumerate(fits)
        ]


def run_fit(
    make_module: Callable[[], L.LightningModule],
    make_loader: Callable[[], Any],
    stages: int,
    microbatches: int | str = "auto",
    timeout: float = 60.0,
    **trainer: Any,
) -> list[dict[str, Any]]:
    """Run one training by the pipeline; what each rank saw (see `Witness`)."""
    return run_fits([Fit(make_module, make_loader, stages, microbatches, trainer=trainer)], timeout)[0]


def result_of(function: Callable[[], Any], timeout: float = 60.0) -> Any:
    """What a function returns in a forked process; for work that this process must not do if it is to fork later.

    (After a backward on a machine with CUDA, and after some optimizers on any machine, forked children cannot train.)
    """
    with tempfile.TemporaryDirectory(prefix="tspipe-") as name:
        file = Path(name, "result")
        run_in_fork(lambda: torch.save(function(), file), Path(name, "log"), timeout)
        return torch.load(file, weights_only=False)


def run_in_fork(target: Callable[[], Any], log: Path, timeout: float) -> None:
    """Call a function in a forked process in a session of its own. What it started is gone when this returns.

    Args:
        target: what to call.
        log: a file for what it, and the processes that it starts, print.
        timeout: seconds after which all of them are killed.

    Raises:
        AssertionError: it failed or the time was over; the text ends with what was printed.
    """
    process = multiprocessing.get_context("fork").Process(target=_child, args=(target, log))
    process.start()
    assert process.pid is not None
    try:
        process.join(timeout)
        code = process.exitcode
    finally:
        process.kill()
        process.join()
        _end_group(process.pid)
    text = log.read_text(errors="replace")[-8000:] if log.exists() else ""
    assert code is not None, f"no end within {timeout} s:\n{text}"
    assert code == 0, f"exit code {code}:\n{text}"


def _child(target: Callable[[], Any], log: Path) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    # Lightning refuses to fork after a mere look at CUDA by some earlier test; nothing here uses CUDA.
    torch.cuda._is_in_bad_fork = lambda: False
    torch.set_num_threads(1)  # two threads of autograd that ask for torch's pool at once after a fork end the process
    try:
        roomy(target)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _end_group(group: int) -> None:
    """Kill what is left of a process group whose leader has ended, and wait until it is gone."""
    end = time.monotonic() + 5
    while _group_alive(group):
        assert time.monotonic() < end, f"processes of group {group} do not end"
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        time.sleep(0.01)


def _group_alive(group: int) -> bool:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                state, _, found = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
                if int(found) == group and state != "Z":
                    return True
    return False


def _drive(fits: Sequence[Fit], folder: Path) -> None:
    """Run the trainings, those of as many stages one after another in the same ranks."""
    callbacks = [id(callback) for fit in fits for callback in fit.trainer.get("callbacks", [])]
    assert len(set(callbacks)) == len(callbacks), "what a callback knows of one training must not meet another one"
    for stages in dict.fromkeys(fit.stages for fit in fits):
        mine = {folder / str(index): fit for index, fit in enumerate(fits) if fit.stages == stages}
        ports, ranks = [free_port() for _ in mine], range(max(1, stages))
        processes = [multiprocessing.get_context("fork").Process(target=_rank, args=(r, mine, ports)) for r in ranks]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        assert not any(codes), f"the ranks of {stages or 'the sequential twin'} ended with {codes}"


def _rank(rank: int, fits: dict[Path, Fit], ports: list[int]) -> None:
    """One rank of several trainings; where there is one alone, nothing looks like a launcher."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ranks = max(1, next(iter(fits.values())).stages)
    if ranks > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="multiproc",
        )  # fmt: skip
    for port, (folder, fit) in zip(ports, fits.items(), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        _train(fit, folder)


def _train(fit: Fit, folder: Path) -> None:
    witness = Witness(folder)
    options: dict[str, Any] = {
        "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0, **fit.trainer,
    }  # fmt: skip
    options["callbacks"] = [*options.get("callbacks", []), witness]
    strategy: Any = "auto"
    if fit.stages != TWIN:
        strategy = WitnessedStrategy(microbatches=fit.microbatches, **({"balance": "parameters"} | fit.strategy))  # type: ignore[arg-type]
        strategy.witness = witness
    torch.manual_seed(fit.seed)  # on all ranks alike
    module, loader = fit.make_module(), fit.make_loader()
    validation = fit.make_val_loader() if fit.make_val_loader is not None else None
    torch.manual_seed(fit.seed)
    L.Trainer(strategy=strategy, devices=max(1, fit.stages), **options).fit(module, loader, validation)
    if fit.stages == TWIN:
        witness.write(module, 0)


def _copies(tensors: Any) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in tensors.items()}

"""What the command line can do besides Lightning's own: a trainer that plans, and the same from costs alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from typing_extensions import override

from lightning_tspipe.dryplan import dry_placement
from lightning_tspipe.floor import minimal_microbatches
from lightning_tspipe.module import TeacherStudentModule, looks_ahead
from lightning_tspipe.monitor import strategy_of
from lightning_tspipe.placement import Placement
from lightning_tspipe.prospects import GB, Machine, Pair, prospects, report
from lightning_tspipe.schedule import Costs, LossOver, check_scalars
from lightning_tspipe.tracing import PipelineTrace

MB, TERA = 1e6, 1e12


class PipelineTrainer(pl.Trainer):
    """A Trainer that can show its pipeline."""

    def plan(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        bandwidth_gb_s: float | None = None,
        memory_gb: float | None = None,
        tflops: float | None = None,
    ) -> None:
        """Show layers, costs and memory of each rank, and what every way to train would take; nothing is trained.

        Args:
            model: the module.
            datamodule: its data; the measurement needs one batch.
            bandwidth_gb_s: gigabytes per second that a rank can send to another, for DDP and FSDP.
            memory_gb: gigabytes that a rank has; on GPUs their own memory is known.
            tflops: a dry plan: what a rank computes in a second, in 10^12 operations. Costs are counted from shapes
                then, in this process, which makes no weights and starts no ranks.

        Raises:
            MisconfigurationException: another strategy, or costs that are not measured.
            ValueError: a number that is not positive, or a dry plan that does not fit into the memory.
        """
        if tflops is not None:
            self._plan_dry(model, datamodule, tflops, machine(bandwidth_gb_s, memory_gb))
            return
        self._quietly(ShowPlan(machine(bandwidth_gb_s, memory_gb)))
        self.fit(model, datamodule=datamodule)

    def _plan_dry(
        self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None, tflops: float, on: Machine
    ) -> None:
        if not tflops > 0:
            raise ValueError(f"tflops={tflops}: give a positive number, or leave it out")
        strategy = strategy_of(self, "lightning-tspipe plan")
        assert isinstance(model, TeacherStudentModule)
        placement, costs, count = dry_placement(self, model, datamodule, strategy.asked, TERA * tflops, on)
        say(f"Costs of {placement.rows} samples, counted at {tflops:g} TFLOP/s:\n{placement.table()}\n")
        show(model, placement, costs, count, on, strategy.asked.teacher_microbatches, self.accumulate_grad_batches)

    def trace(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        steps: int = 20,
        out: str = "trace",
    ) -> None:
        """Train some steps and write what every rank did, beside the plan: OUT.json for Perfetto, and OUT.png.

        Args:
            model: the module.
            datamodule: its data.
            steps: how many, at least 4.
            out: path of the files without their endings.
        """
        self.fit_loop.max_epochs = self.fit_loop.epoch_loop.max_steps = steps  # no epoch is without a step
        self._quietly(PipelineTrace(out, steps=steps * self.accumulate_grad_batches))
        self.fit(model, datamodule=datamodule)

    def _quietly(self, *more: pl.Callback) -> None:
        """No logs, checkpoints and validations."""
        callbacks: list[pl.Callback] = self.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, Checkpoint)] + list(more)
        self.loggers = [DummyLogger()]
        self.num_sanity_val_steps: int = 0
        self.limit_val_batches: int = 0


class ShowPlan(pl.Callback):
    """Writes the plan of a fit to the standard output once the stages are measured, and lets the fit end there."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy_of(trainer, "lightning-tspipe plan")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = 0
        strategy = strategy_of(trainer, "lightning-tspipe plan")
        placement, costs = strategy.placement, strategy.predicted_costs
        assert isinstance(pl_module, TeacherStudentModule) and placement is not None
        if costs is None or placement.microbatches is None:
            raise MisconfigurationException(
                "There are no measured costs to plan with. Use `balance: auto` or a saved plan, at least two devices "
                "and a training loader with a length; or give costs: `lightning-tspipe plan --stages 2 --t 1 --f 1`."
            )
        if not trainer.is_global_zero:
            return
        machine, device = self._machine, strategy.root_device
        if machine.memory is None and device.type == "cuda":
            machine = replace(machine, memory=float(torch.cuda.get_device_properties(device).total_memory))
        say(f"Costs of {placement.rows} samples, as measured:\n{placement.table()}\n")
        show(
            pl_module,
            placement,
            costs,
            placement.microbatches,
            machine,
            strategy.asked.teacher_microbatches,
            trainer.accumulate_grad_batches,
        )


def show(
    module: TeacherStudentModule,
    placement: Placement,
    costs: Costs,
    microbatches: int,
    on: Machine,
    teacher: int | Literal["auto"],
    accumulation: int,
) -> None:
    """What every way to train would take, to the standard output.

    Args:
        module: whose networks these are.
        placement: on so many stages.
        costs: of a microbatch, if a batch has so many.
        microbatches: per batch.
        on: what it runs on.
        teacher: microbatches of the teacher, as the user has asked for them.
        accumulation: batches of an optimizer step.
    """
    scale = costs.f[0] / placement.f[0] if placement.f[0] else 1.0
    pair = Pair(
        costs,
        lookahead=looks_ahead(module),
        loss_over=module.loss_over,
        student=_bytes(module.student, trained=True),
        teacher=_bytes(module.teacher),
        weights=placement.weights,
        held=tuple(scale * each for each in placement.held),
        passed=tuple(scale * each for each in placement.passed) if placement.recompute else (),
        pending=tuple(scale * each for each in placement.pending),
        # a teacher in train mode keeps the student's number (`Arrangement.teacher_microbatches`)
        teacher_microbatches=None if teacher == "auto" and module.teacher_mode == "train" else teacher,
        rows=round(scale * placement.rows * microbatches),
        accumulation=accumulation,
        teacher_held=tuple(scale * each for each in placement.teacher_held),
    )
    say(report(pair, microbatches, on, prospects(pair, microbatches, on)))


def plan_costs(
    stages: int,
    t: float | list[float] = 1.0,
    f: float | list[float] = 1.0,
    b: float | list[float] = 1.0,
    w: float | list[float] = 1.0,
    microbatches: int | Literal["auto"] = "auto",
    teacher_microbatches: int | Literal["auto"] = "auto",
    message: float = 0.0,
    exact_teacher: bool = False,
    loss_over: LossOver = "batch",
    student_mb: float = 0.0,
    teacher_mb: float = 0.0,
    activations_mb: float = 0.0,
    bandwidth_gb_s: float | None = None,
    memory_gb: float | None = None,
    accumulate_grad_batches: int = 1,
) -> None:
    """Show what every way to train a pair would take, from costs; with --config FILE instead, from a measurement.

    Args:
        stages: number of ranks.
        t: milliseconds of a teacher forward per microbatch and stage; one number, or one per stage.
        f: of a student forward.
        b: of a backward for inputs.
        w: of a backward for weights.
        microbatches: per batch; "auto" takes the fewest that let the teacher fill the bubbles.
        teacher_microbatches: per batch, of the teacher, a multiple or a divisor of `microbatches`; "auto" takes more
            where that makes an order's step shorter.
        message: milliseconds of a message between neighbours.
        exact_teacher: whether the teacher follows without delay, so that it cannot run a batch ahead.
        loss_over: "batch", "microbatch" or "student_microbatch", as of the module.
        student_mb: megabytes of the student's parameters.
        teacher_mb: of the teacher's.
        activations_mb: megabytes that all stages keep of one microbatch for its backward.
        bandwidth_gb_s: gigabytes per second that a rank can send to another, for DDP and FSDP.
        memory_gb: gigabytes that a rank has.
        accumulate_grad_batches: batches of an optimizer step, within which an exact teacher may run a batch ahead.

    Raises:
        ValueError: a cost is negative, there are not as many as stages, or the numbers of microbatches do not fit each
            other.
    """
    if accumulate_grad_batches < 1:
        raise ValueError(f"accumulate_grad_batches={accumulate_grad_batches}: give at least 1")
    check_scalars(stages, 1 if microbatches == "auto" else microbatches, loss_over)
    teacher, forward, inputs, weights = (
        _column(name, cost, stages) for name, cost in zip("tfbw", (t, f, b, w), strict=True)
    )
    costs = Costs(teacher, forward, inputs, weights, 1e-3 * message)
    known = min(student_mb, teacher_mb, activations_mb) > 0
    pair = Pair(
        costs,
        lookahead=not exact_teacher,
        loss_over=loss_over,
        student=MB * student_mb,
        teacher=MB * teacher_mb,
        weights=(MB * (4 * student_mb + teacher_mb) / stages,) * stages if known else (),
        held=(MB * activations_mb / stages,) * stages if known else (),
        teacher_microbatches=teacher_microbatches,
        accumulation=accumulate_grad_batches,
    )
    count = minimal_microbatches(stages, costs, lookahead=pair.lookahead) if microbatches == "auto" else microbatches
    on = machine(bandwidth_gb_s, memory_gb)
    say(report(pair, count, on, prospects(pair, count, on)))


def machine(bandwidth_gb_s: float | None, memory_gb: float | None) -> Machine:
    """In bytes; raises ValueError for what is not positive."""
    for name, value in (("bandwidth_gb_s", bandwidth_gb_s), ("memory_gb", memory_gb)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: give a positive number, or leave it out")
    return Machine(*(None if value is None else GB * value for value in (bandwidth_gb_s, memory_gb)))


def say(text: str) -> None:
    """To the standard output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _column(name: str, milliseconds: float | Sequence[float], stages: int) -> tuple[float, ...]:
    several = [milliseconds] * stages if isinstance(milliseconds, int | float) else list(milliseconds)
    if len(several) != stages:
        raise ValueError(f"{name} has {len(several)} costs for {stages} stages: give one number, or one per stage")
    return tuple(1e-3 * each for each in several)


def _bytes(network: nn.Module, trained: bool = False) -> float:
    found = (p for p in network.parameters() if p.requires_grad or not trained)
    return float(sum(p.numel() * p.element_size() for p in found))

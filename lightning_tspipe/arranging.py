"""Which rank gets which layers, for a trainer and a module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_tspipe import _lightning
from lightning_tspipe.comm import Comm
from lightning_tspipe.example import Examples
from lightning_tspipe.module import TeacherStudentModule, looks_ahead
from lightning_tspipe.orders import SPLIT
from lightning_tspipe.partition import Balance, Layers, Partition, chosen, explicit_cuts, find_layers
from lightning_tspipe.placement import Placement, fits
from lightning_tspipe.placing import Placer, check_same, fewest_in_flight, named, rows_of
from lightning_tspipe.plan import Planner, estimate_costs, fastest_count, most_in_memory
from lightning_tspipe.randomness import kept
from lightning_tspipe.selective import Recompute
from lightning_tspipe.steps import Options
from lightning_tspipe.taps import TapError
from lightning_tspipe.topology import Topology

FEWER = 4  # times less rows in a second measurement, from which the fixed part of a pass follows
FREE = 0.9  # the share of a device's memory that a plan may fill; the rest is fragments, kernels and messages


def read_balance(balance: Balance | Path) -> Balance | Placement:
    """A balance, with a saved plan read if it names one (a path, or a text that ends with .json).

    Raises:
        ValueError: an unknown word, or a plan that cannot be read.
    """
    if isinstance(balance, Path) or (isinstance(balance, str) and balance.endswith(".json")):
        return Placement.load(balance)
    explicit_cuts(balance)
    return balance


class Arrangement:
    """The stages of both networks, and what is known of their costs.

    Args:
        trainer, module: the user's.
        topology: who is who.
        comm: this rank's connections; None for one stage.
        balance: what the user asked for.
        microbatches: per batch; "auto" if that is to be found.
        teacher_microbatches: the same of the teacher.
        schedule: the order of the work, or "auto".
        recompute: whether the student's forwards run again in their backwards, or what is cheap in them.
        max_memory: bytes per rank; None: what the device has.
        broadcast: gives every rank what rank 0 has.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: TeacherStudentModule,
        topology: Topology,
        comm: Comm | None,
        balance: Balance | Placement,
        microbatches: int | str,
        teacher_microbatches: int | str,
        schedule: str,
        recompute: Recompute,
        max_memory: int | None,
        broadcast: Callable[[Any], Any],
    ) -> None:
        self._trainer, self._module, self._topology, self._comm = trainer, module, topology, comm
        self._device = trainer.strategy.root_device
        self._limit = _limit(self._device, max_memory)
        self._broadcast, self._microbatches = broadcast, microbatches
        self._teacher_microbatches = teacher_microbatches
        self._rows: float = 0  # of a batch, where one was measured
        self._schedule, self._recompute, self._selective = schedule, recompute is True, recompute == "selective"
        source = None if module.momentum is None else module.ema_source()
        cuts = {} if isinstance(balance, Placement) else explicit_cuts(balance, source is not None)
        examples = Examples(trainer, module, broadcast)
        with _lightning.without_profiler_hooks(trainer):  # a Sequential with hooks is not cut
            stages = topology.stages
            taps = {"student": module.student_taps, "teacher": module.teacher_taps}
            try:
                networks = module.student, module.teacher
                layers = find_layers(*networks, stages, cuts, source, examples.of, self._device, taps)
            except TapError as error:
                raise MisconfigurationException(str(error)) from error
            fits = trainer.state.fn == TrainerFn.FITTING
            if isinstance(balance, Placement):
                check_same(balance, layers, stages)
                self.parts, self.placement = layers.cut(*balance.sizes), replace(balance, recompute=self._recompute)
            elif balance == "auto" and fits and stages > 1:
                self.parts, self.placement = self._measured(layers, examples, microbatches)
            else:
                self.parts = layers.cut(*chosen(layers, stages, cuts))
                self.placement = named(self.parts)
        if fits and stages > 1:
            rank_zero_info(f"{stages} stages; costs are of one microbatch:\n{self.placement.table()}")

    def _measured(self, layers: Layers, examples: Examples, microbatches: int | str) -> tuple[Partition, Placement]:
        """Measure in the first pipeline; the others take what it finds."""
        stages = self._topology.stages
        count = microbatches if isinstance(microbatches, int) else 3 * (stages - 1)
        sample, small = None, None
        if self._trainer.global_rank == 0:
            sizes = microbatches == "auto" or self._cuts_teacher  # what does not depend on the rows matters then
            sample, small = examples.sample(count), examples.sample(FEWER * count) if sizes else None
            small = small if sample and small and 2 <= rows_of(small) < rows_of(sample) else None
        found: Placement | ValueError | None = None
        if self._topology.replica == 0:
            assert self._comm is not None
            context = self._trainer.precision_plugin.train_step_context
            recompute = self._recompute, self._keeps_inputs, self._selective
            placer = Placer(layers, stages, self._comm, self._device, context, *recompute)
            with kept(self._device, *self._module.modules()):
                in_flight = fewest_in_flight(self._module.loss_over, count, stages)
                found = placer.find(sample, self._limit, in_flight, small)
        found = self._broadcast(found)
        if isinstance(found, ValueError):
            raise found
        assert found is not None
        self._rows = found.rows * count
        return layers.cut(*found.sizes), found

    def planner(self, options: Options | None, post_ahead: int, resumed: int | None) -> Planner:
        """What plans the steps; the costs of the placement are of microbatches as large as its ones from now on.

        Args:
            options: of torch.compile; the backward of a compiled stage is one piece.
            post_ahead: see `Planner`.
            resumed: microbatches per batch of the run that is resumed.
        """
        planner = self._planner(options, post_ahead)
        if self._microbatches != "auto":
            return planner
        known = self.placement.microbatches if resumed is None else resumed
        if not self._rows:  # nothing that was measured would depend on it
            planner.microbatches = known or planner.microbatches
            return planner
        measured = self.placement

        @cache
        def of(microbatches: int) -> tuple[Placement, Planner]:
            self.placement = measured.of_rows(self._rows / microbatches)
            return self.placement, self._planner(options, post_ahead)

        count = known or fastest_count(
            self._topology.stages, planner.microbatches, lambda count: of(count)[1], int(self._rows) // 2
        )
        self.placement, planner = of(count)
        planner.microbatches = count
        return planner

    def _planner(self, options: Options | None, post_ahead: int) -> Planner:
        """For microbatches as large as those of the placement's costs."""
        module = self._module
        costs = self.placement.costs
        if costs is None:
            costs = estimate_costs(self.parts)
            costs = costs.recomputed() if self._recompute else costs
        # a split one keeps what recomputing is to save
        split = bool(costs.whole) and not self._recompute and options is None
        held_split = None
        if split or self._schedule in SPLIT:
            try:
                held_split = self._max_held(True)
            except ValueError:  # no room for what W needs
                if self._schedule in SPLIT:
                    raise
                split = False
        return Planner(
            costs,
            looks_ahead(module),
            module.loss_over,
            self._schedule,
            post_ahead,
            split_backward=split,
            clipping=self._clips,
            accumulation=self._trainer.accumulate_grad_batches,
            max_held=self._max_held(False),
            max_held_split=held_split,
        )

    def teacher_microbatches(self, planner: Planner, microbatches: int, resumed: Mapping[str, Any]) -> int:
        """How many the teacher has: what the user gave, what a resumed run or a saved plan had, or what pays.

        What pays is known from measured times only. A teacher in train mode keeps those of the student: how batches are
        cut shows in its batch statistics and its random numbers.

        Args:
            planner: of the steps.
            microbatches: M.
            resumed: what a checkpoint holds of ours.
        """
        if isinstance(self._teacher_microbatches, int):
            return self._teacher_microbatches
        if resumed.get("microbatches") == microbatches:
            return int(resumed.get("teacher_microbatches") or microbatches)
        if self.placement.microbatches == microbatches and self.placement.teacher_microbatches is not None:
            return self.placement.teacher_microbatches
        if not self._rows or not self._cuts_teacher:
            return microbatches
        return planner.teacher_microbatches(
            microbatches, self._rows, lambda made: fits(self.placement, made, self._limit)
        )

    @property
    def _cuts_teacher(self) -> bool:
        """Whether the teacher's microbatches are ours to choose."""
        return self._teacher_microbatches == "auto" and self._module.teacher_mode == "eval"

    @property
    def _clips(self) -> bool:
        """Whether a scalar of all stages comes before the optimizer step."""
        by_norm = bool(self._trainer.gradient_clip_val) and self._trainer.gradient_clip_algorithm != "value"
        return by_norm or getattr(self._trainer.precision_plugin, "scaler", None) is not None

    @property
    def _keeps_inputs(self) -> bool:
        """Whether a stage holds the activations of one microbatch at a time: a split backward keeps them for W."""
        return self._recompute and self._schedule not in SPLIT

    def _max_held(self, split: bool) -> tuple[int, ...] | None:
        """How many microbatches fit on each rank, with a split backward or a whole one; None for any number."""
        if not self.placement.held or self._limit == math.inf:
            return None
        left = [self._limit - weights for weights in self.placement.weights]
        if not self._keeps_inputs or not self.placement.passed:
            each = self.placement.held
            return most_in_memory(left, tuple(map(max, each, self.placement.pending or each)) if split else each)
        left = [free - held for free, held in zip(left, self.placement.held, strict=True)]
        return most_in_memory(left, self.placement.passed)


def _limit(device: torch.device, max_memory: int | None) -> float:
    if max_memory is not None:
        return max_memory
    return FREE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf

"""The placement of a run and its costs, from shapes alone: no rank is started, and no weight has memory."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_tspipe import _lightning
from lightning_tspipe.counting import CPU, counted
from lightning_tspipe.data import check_rows
from lightning_tspipe.example import Examples
from lightning_tspipe.floor import minimal_microbatches
from lightning_tspipe.measure import MessageCost
from lightning_tspipe.memory import without_memory
from lightning_tspipe.module import TeacherStudentModule, looks_ahead
from lightning_tspipe.partition import find_layers
from lightning_tspipe.placement import Placement
from lightning_tspipe.placing import Cutter, fewest_in_flight
from lightning_tspipe.prospects import Machine
from lightning_tspipe.reporting import Asked
from lightning_tspipe.schedule import Costs


def dry_placement(
    trainer: pl.Trainer,
    module: TeacherStudentModule,
    datamodule: pl.LightningDataModule | None,
    asked: Asked,
    rate: float,
    machine: Machine,
) -> tuple[Placement, Costs, int]:
    """The stages that costs from shapes lead to.

    Args:
        trainer, module, datamodule: the user's; nothing of the trainer has run.
        asked: of the strategy.
        rate: operations per second of a rank.
        machine: its bandwidth gives messages their costs, its memory bounds the cut.

    Returns:
        The placement, the costs of a microbatch, and how many of these a batch has.

    Raises:
        MisconfigurationException: fewer than two stages.
        ValueError: the networks cannot be cut into so many stages, or no cut fits into the memory.
    """
    world = trainer.num_devices * trainer.num_nodes
    stages = world if asked.stages == "auto" else asked.stages
    if stages < 2:
        raise MisconfigurationException(
            "With one stage there is nothing to plan. Give at least two, as `devices`, `num_nodes` or `stages`."
        )
    _lightning.attach(trainer, module, datamodule)
    if datamodule is not None:
        datamodule.prepare_data()
        datamodule.setup("fit")
    with without_memory():
        module.configure_model()
    module.train()
    count = 3 * (stages - 1) if asked.microbatches == "auto" else asked.microbatches
    student, teacher = Examples(trainer, module, lambda value: value).inputs(count)
    sample = {"student": _views(student), "teacher": _views(teacher)}
    source = None if module.momentum is None else module.ema_source()
    context = trainer.precision_plugin.train_step_context
    taps = {"student": module.student_taps, "teacher": module.teacher_taps}
    with context():
        layers = find_layers(module.student, module.teacher, stages, {}, source, lambda name: sample[name], CPU, taps)
    layers.cut(*layers.by_parameters(stages))  # what cannot be cut is an error here
    costs = counted(layers, sample, rate, context, asked.recompute == "selective")
    message = MessageCost(per_byte=1 / machine.bandwidth if machine.bandwidth else 0.0)
    limit = math.inf if machine.memory is None else machine.memory
    recompute = asked.recompute is True
    cutter = Cutter(layers, stages, recompute, recompute)
    placement = cutter.place(
        *costs, message, check_rows(student, teacher), limit, fewest_in_flight(module.loss_over, count, stages)
    )
    found = placement.costs
    assert found is not None
    if asked.microbatches == "auto":
        chosen = minimal_microbatches(stages, found, lookahead=looks_ahead(module), loss_over=module.loss_over)
        found, count = found.scaled(count / chosen), chosen
    return placement, found, count


def _views(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]

"""The strategy: Lightning's calls, each handed to the part that does it."""

from __future__ import annotations

import logging
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tspipe import _lightning, _metrics
from lightning_tspipe.arranging import Arrangement, read_balance
from lightning_tspipe.board import let_go
from lightning_tspipe.checkpoint import Shards
from lightning_tspipe.comm import Comm
from lightning_tspipe.errors import PipelineError
from lightning_tspipe.evaluating import WholeForward
from lightning_tspipe.feed import SharedLoader, SilentLoader
from lightning_tspipe.fitting import Fitting
from lightning_tspipe.module import TeacherStudentModule
from lightning_tspipe.partition import Balance, Partition
from lightning_tspipe.plan import check_plan_arguments
from lightning_tspipe.refuse import (
    SEVERAL_OPTIMIZERS,
    check_compile,
    check_compile_arguments,
    check_optimizers,
    check_strategy_arguments,
    check_trainer,
    check_values,
    followed,
    warn_of_low_momentum,
)
from lightning_tspipe.replicas import Replicas
from lightning_tspipe.reporting import ReportingStrategy
from lightning_tspipe.selective import Recompute
from lightning_tspipe.stage import Stage
from lightning_tspipe.topology import Topology

log = logging.getLogger(__name__)


class TSPipeStrategy(ReportingStrategy):
    """Trains a `TeacherStudentModule` as a pipeline whose bubbles are filled with the teacher of the next batch.

    Args:
        stages: number of stages; "auto" takes all devices. With fewer, there are several pipelines, data-parallel
            replicas that average their gradients.
        microbatches: per batch; "auto" takes the fewest that let the teacher fill the bubbles, or another number with
            which the step is shorter by measured costs.
        schedule: the order of the work; "afab" (all forwards, then all backwards), "1f1b", or "afab-split" and "zb",
            the same two with the backward split into inputs and weights; "auto" takes the fastest by measured costs.
        balance: "auto" (measured), "parameters", the numbers of layers of the stages, a dict of these (`partition`), or
            the path of a plan that `placement.save` has written.
        max_memory: bytes that a rank's weights, gradients, optimizer state and activations may take, which bounds what
            "auto" finds; None: nine tenths of a GPU's memory, any number of bytes on the host.
        start_method: "popen", "spawn", "fork" or "forkserver", as in DDPStrategy.
        process_group_backend: "nccl" or "gloo"; None takes nccl on GPUs and gloo elsewhere.
        timeout: how long one message may take.
        state_dict_type: of checkpoints: "full" is one file, "sharded" a folder to which each rank writes its own part.
        recompute: whether a student stage keeps only what goes in and out of it, and runs again in the backward;
            "selective": it keeps all but what is cheap to compute again.
        compile: whether each stage goes through torch.compile, or the arguments for that.
        teacher_microbatches: per batch, of the teacher, a multiple or a divisor of `microbatches`; "auto" takes
            as many, or more where that pays.

    Raises:
        ValueError: an argument is not among what is listed above.
    """

    strategy_name = "tspipe"

    def __init__(
        self,
        stages: int | Literal["auto"] = "auto",
        microbatches: int | Literal["auto"] = "auto",
        schedule: str = "auto",
        balance: Balance | Path = "auto",
        max_memory: int | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        state_dict_type: Literal["full", "sharded"] = "full",
        recompute: Recompute = False,
        compile: bool | dict[str, Any] = False,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        teacher_microbatches: int | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        check_plan_arguments(microbatches, schedule, teacher_microbatches)
        self._teacher_microbatches = teacher_microbatches
        self._balance = read_balance(balance)
        check_strategy_arguments(stages, max_memory, start_method, process_group_backend, state_dict_type, recompute)
        self._recompute, self._compile = recompute, check_compile_arguments(compile, recompute)
        self._stages, self._microbatches, self._schedule, self._max_memory = stages, microbatches, schedule, max_memory
        self._start_method, self._backend, self._timeout = start_method, process_group_backend, timeout
        self._signals: _lightning.SignalLink | None = None
        self._heard: BaseException | None = None  # the exception that `on_exception` has handled
        self._state_dict_type = state_dict_type
        self._stage: Stage | None = None
        self._partition: Partition | None = None
        self._undo: list[Callable[[], None]] = []

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for name, method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            strategy_registry.register(
                f"tspipe{name}",
                cls,
                description=f"teacher-student pipeline, start_method={method!r}",
                start_method=method,
            )

    @property
    def _module(self) -> TeacherStudentModule:
        module = self.lightning_module
        assert isinstance(module, TeacherStudentModule)
        return module

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        topology = self._topology
        self._signals = _lightning.SignalLink(trainer, topology.world_size == 1, topology.replicas > 1)
        check_trainer(trainer, self.lightning_module, topology.world_size, self._stages)
        check_compile(self._compile, self._schedule, self.root_device)
        module = self._module
        module.check_networks()
        check_values(module)
        self.model = self.precision_plugin.convert_module(module)
        module.train(module.training)  # gives the teacher its own mode
        self._connect(topology)
        self._undo.append(partial(_lightning.forget_loader, trainer))
        arrangement = Arrangement(
            trainer, module, topology, self._comm, self._balance, self._microbatches, self._teacher_microbatches,
            self._schedule, self._recompute, self._max_memory, self.broadcast,
        )  # fmt: skip
        self._partition, self.placement = arrangement.parts, arrangement.placement
        parts = arrangement.parts
        self._shards = Shards(module, parts.owners(), topology.stage, self._comm, self._replicas)
        self._seed = self._resumed.get("seed", self.broadcast(torch.initial_seed()))
        self._shards.take_own(self._seed, followed(module))
        self.model_to_device()
        mine = parts.runs("student", topology.stage), parts.runs("teacher", topology.stage)
        joint = None if self._replicas is None or self._layer_sync is None else self._replicas.joint
        seed, device, first = self._seed + topology.replica, self.root_device, topology.stage == 0
        options = self._compile
        self._stage = Stage(*mine, topology.stage, first, device, seed, joint, self._recompute, options)
        self._patch(trainer, module)
        if trainer.state.fn == TrainerFn.FITTING:
            warn_of_low_momentum(module)
            self.setup_optimizers(trainer)
            post_ahead = 0 if self._comm is None else self._comm.post_ahead
            resumed = self._resumed.get("microbatches")  # a resumed run goes on with the number that it had
            planner = arrangement.planner(options, post_ahead, resumed)
            self._chosen = planner.microbatches if self._microbatches == "auto" else self._microbatches
            teacher = arrangement.teacher_microbatches(planner, self._chosen, self._resumed)
            self._teacher_chosen, fixed = teacher, self._teacher_microbatches != "auto"
            self.placement = replace(arrangement.placement, microbatches=self._chosen, teacher_microbatches=teacher)
            self._fitting = Fitting(
                trainer, module, self._stage, self._comm, planner, self._microbatches, (teacher, fixed), topology,
                self._shards.trained(), self._replicas, self._signals,
            )  # fmt: skip
            self._fitting.connect(self._shards.places(self._groups), self._restore_random_states)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _lightning.optimizers_to_device(self.optimizers, self.root_device)

    def _connect(self, topology: Topology) -> None:
        if self._world is None:
            return
        _lightning.retire_process_observer()
        if topology.replicas > 1:
            self._replicas = Replicas(topology, self.root_device, self._backend or "gloo", self._world)
        if topology.stages > 1:
            self._comm = Comm(topology, self.root_device, self._backend or "gloo", self._world)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:  # Lightning's text sends the user to manual optimization, which is refused too
            if "multiple optimizers" in str(error):
                raise MisconfigurationException(SEVERAL_OPTIMIZERS) from error
            raise
        check_optimizers(self.optimizers)
        assert self._shards is not None
        self._groups = []
        for optimizer in self.optimizers:
            self._module.check_optimizer(optimizer)
            self._groups = self._shards.take_groups(optimizer)

    def _patch(self, trainer: pl.Trainer, module: TeacherStudentModule) -> None:
        """`self.student(x)` and `self.teacher(x)` run through all stages; one pipeline is one replica."""
        assert self._stage is not None
        self._undo.append(self._stage.close)
        for _, metric in _metrics.metrics_of(module):
            if self._replicas is not None:
                self._undo.append(_metrics.sync_within(metric, self._replicas.group))
            elif self._comm is not None:
                self._undo.append(_metrics.stop_syncing(metric))
        _lightning.count_pipelines(trainer, self._topology.stages)
        if self._replicas is None:
            _lightning.forbid_distributed_sampler(trainer)
        if self._comm is None:
            return
        assert self._partition is not None
        whole = WholeForward(self._stage, self._comm, self._partition, self._in_step, self._before_training)
        self._undo += [whole.take_over("student", module.student), whole.take_over("teacher", module.teacher)]

    def _in_step(self) -> bool:
        return self._fitting is not None and self._fitting.in_step

    def _before_training(self) -> bool:
        return self._fitting is not None and self._fitting.before_training and self.global_rank == 0

    @override
    def model_to_device(self) -> None:
        assert self._shards is not None
        self._shards.to(self.root_device)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if self._comm is None:
            return dataloader
        if self._module.trainer.training:
            return SilentLoader(dataloader) if self._topology.stage else dataloader
        # replicas may have loaders of other lengths: they act on a signal when all are done
        together = (self._end_if_asked,) if self._replicas is None else ()
        return SharedLoader(dataloader, self._comm, *together)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if self._fitting is not None and self._fitting.is_stand_in(batch):
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def on_train_start(self) -> None:
        assert self._fitting is not None
        self._fitting.begin()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        assert self._fitting is not None
        return self._fitting.step()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self._fitting is not None
        self._fitting.after_optimizer_step()
        return output

    @override
    def on_train_end(self) -> None:
        assert self._fitting is not None
        self._fitting.end()
        self._end_if_asked()  # what came too late for the last step

    def _end_if_asked(self) -> None:
        """End the job here, on all ranks, if one of them has received a SIGTERM."""
        assert self._signals is not None
        asked = self._signals.received
        if asked if self._world is None else self._world.any(asked):
            self._signals.stop()

    @override
    def on_test_end(self) -> None:
        self._end_if_asked()

    @override
    def on_predict_end(self) -> None:
        self._end_if_asked()

    @override
    def on_validation_start(self) -> None:
        self._share_common()

    @override
    def on_test_start(self) -> None:
        self._share_common()

    @override
    def on_predict_start(self) -> None:
        self._share_common()

    def _share_common(self) -> None:
        assert self._shards is not None
        self._shards.share_common()

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Called before and after the callbacks hear of it; the first call counts."""
        if exception is self._heard:
            return
        self._heard = exception
        where = self.describe(self.global_rank)
        is_rank = self._world is not None or self.world_size == 1  # and not the process that has forked the ranks
        if isinstance(exception, SIGTERMException):  # an orderly end: every rank is at the same step boundary
            exception.code = 128 + signal.SIGTERM
            try:
                if self._fitting is not None:
                    self._fitting.end()
            except BaseException as error:
                self.on_exception(error)
                raise
            if is_rank:
                log.warning("%s ends after step %d, as SIGTERM asks", where, self._module.trainer.global_step)
            return
        self._failed = True
        if isinstance(exception, KeyboardInterrupt):
            text = f"{where} was interrupted (SIGINT, Ctrl-C)"
            if is_rank:
                log.error(text)
        else:
            text = f"{where} failed:\n{''.join(traceback.format_exception(exception))}"
        if self._world is not None and not isinstance(exception, PipelineError):
            self._world.board.report(text)
        let_go(exception)
        _lightning.stop_loading()
        self._disconnect()

    @override
    def teardown(self) -> None:
        fitting, self._fitting = self._fitting, None
        if fitting is not None:
            self._ahead = fitting.ahead()
            fitting.close()
        if self._signals is not None:
            self._signals.close()
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        try:
            if not self._failed:
                self._make_whole([] if fitting is None else self.optimizers)
        except BaseException as exception:
            self.on_exception(exception)
            raise
        finally:
            self._disconnect()
            if self._failed and self._world is not None:
                self._world.board.linger()
                self._world = None
            self._stage = self._heard = self._partition = None
            self._resumed = {}
        if self._failed:
            self.precision_plugin.teardown()
        else:
            super().teardown()

    def _make_whole(self, optimizers: list[Optimizer]) -> None:
        if self._shards is not None:
            self._shards.restore(optimizers, self._groups)
        if self._comm is not None:
            self._comm.drain()

    def _disconnect(self) -> None:
        if self._comm is not None:
            self._comm.close()
        self._comm = self._replicas = self._shards = None
        if self._failed and self._world is not None and dist.is_initialized():
            self._world.close()
            dist.destroy_process_group()  # wakes the peers that wait for this rank


TSPipeStrategy.register_strategies(StrategyRegistry)

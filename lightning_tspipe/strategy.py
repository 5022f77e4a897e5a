"""The strategy: Lightning's calls, each handed to the part that does it."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
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

from lightning_tspipe import _lightning
from lightning_tspipe.arguments import Call
from lightning_tspipe.board import FailureBoard
from lightning_tspipe.checkpoint import KEY, Groups, Shards, random_state, set_random_state
from lightning_tspipe.comm import Comm
from lightning_tspipe.errors import PipelineError
from lightning_tspipe.example import Examples
from lightning_tspipe.feed import SharedLoader, SilentLoader
from lightning_tspipe.fitting import Fitting
from lightning_tspipe.module import TeacherStudentModule
from lightning_tspipe.partition import Balance, partition
from lightning_tspipe.plan import Planner, check_plan_arguments, estimate_costs
from lightning_tspipe.processes import ProcessStrategy
from lightning_tspipe.refuse import SEVERAL_OPTIMIZERS, check_optimizers, check_strategy_arguments, check_trainer
from lightning_tspipe.replicas import Replicas
from lightning_tspipe.schedule import Costs, Schedule
from lightning_tspipe.stage import Network, Stage
from lightning_tspipe.topology import Topology


class TSPipeStrategy(ProcessStrategy):
    """Trains a `TeacherStudentModule` as a pipeline whose bubbles are filled with the teacher of the next batch.

    Args:
        stages: number of stages; "auto" takes all devices. With fewer, there are several pipelines, data-parallel
            replicas that average their gradients.
        microbatches: per batch; "auto" takes the fewest that let the teacher fill the bubbles.
        schedule: the order of the work; "auto" or "afab" (all forwards, then all backwards).
        balance: "auto" or "parameters", the numbers of layers of the stages, or a dict of these (`partition`).
        start_method: "popen", "spawn", "fork" or "forkserver", as in DDPStrategy.
        process_group_backend: "nccl" or "gloo"; None takes nccl on GPUs and gloo elsewhere.
        timeout: how long one message may take.

    Raises:
        ValueError: microbatches or schedule is unknown.
    """

    strategy_name = "tspipe"

    def __init__(
        self,
        stages: int | Literal["auto"] = "auto",
        microbatches: int | Literal["auto"] = "auto",
        schedule: str = "auto",
        balance: Balance = "auto",
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        check_plan_arguments(microbatches, schedule)
        check_strategy_arguments(stages, balance, start_method, process_group_backend)
        self._stages, self._microbatches, self._schedule, self._balance = stages, microbatches, schedule, balance
        self._start_method, self._backend, self._timeout = start_method, process_group_backend, timeout
        self._board: FailureBoard | None = None
        self._comm: Comm | None = None
        self._shards: Shards | None = None
        self._stage: Stage | None = None
        self._fitting: Fitting | None = None
        self._groups: Groups = []
        self._undo: list[Callable[[], None]] = []
        self._failed = False
        self._seed = 0
        self._resumed: Mapping[str, Any] = {}  # what a checkpoint holds of ours

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
    def plan(self) -> Schedule | None:
        """The schedule of the last step; None outside of a fit."""
        return None if self._fitting is None else self._fitting.runtime.current

    @property
    def costs(self) -> Costs | None:
        """The costs that the schedule was made for; None outside of a fit."""
        return None if self._fitting is None else self._fitting.runtime.costs

    @property
    def busy(self) -> dict[str, float]:
        """Seconds that this rank has spent in T, F and B since the fit began."""
        return {} if self._fitting is None else dict(self._fitting.runtime.busy)

    @property
    def _module(self) -> TeacherStudentModule:
        module = self.lightning_module
        assert isinstance(module, TeacherStudentModule)
        return module

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None and self.lightning_module is not None
        self._failed = False
        self.accelerator.setup(trainer)
        check_trainer(trainer, self.lightning_module, self.world_size, self._stages)
        module, stages = self._module, self.world_size if self._stages == "auto" else self._stages
        self._topology = topology = Topology(self.global_rank, self.world_size, stages)
        module.check_networks()
        self.model = self.precision_plugin.convert_module(module)
        module.train(module.training)  # gives the teacher its own mode
        source = None if module.momentum is None else module.ema_source()
        examples = Examples(trainer, module, self.broadcast)
        parts = partition(module.student, module.teacher, stages, self._balance, source, examples.of, self.root_device)
        self._connect(topology)
        self._shards = Shards(module, parts.owners(), topology.stage, self._comm, self._replicas)
        self._seed = self._resumed.get("seed", self.broadcast(torch.initial_seed()))
        self._shards.spread()
        self._shards.release()
        self.model_to_device()
        mine = parts.runs("student", topology.stage), parts.runs("teacher", topology.stage)
        joint = None if self._replicas is None or self._layer_sync is None else self._replicas.joint
        seed = self._seed + topology.replica
        self._stage = Stage(*mine, topology.stage, topology.stage == 0, self.root_device, seed, joint)
        self._patch(trainer, module)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            lookahead = module.momentum is None or module.teacher_delay != 0
            post_ahead = 0 if self._comm is None else self._comm.post_ahead
            planner = Planner(estimate_costs(parts), lookahead, module.loss_over, self._schedule, post_ahead)
            self._fitting = Fitting(
                trainer, module, self._stage, self._comm, planner, self._microbatches, topology,
                self._shards.trained(), self._replicas,
            )  # fmt: skip
            self._fitting.connect(self._shards.places(self._groups), self._restore_random_state)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _lightning.optimizers_to_device(self.optimizers, self.root_device)

    def _connect(self, topology: Topology) -> None:
        if topology.world_size == 1:
            return
        _lightning.retire_process_observer()
        arguments = topology, self.root_device, self._backend or "gloo", self._timeout
        self._board = FailureBoard(topology, self._timeout)
        if topology.replicas > 1:
            self._replicas = Replicas(*arguments, self._board)
        if topology.stages > 1:
            self._comm = Comm(*arguments, self._board)

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
        self._undo = [self._stage.close] if self._stage is not None else []
        for _, metric in _lightning.metrics_of(module):
            if self._replicas is not None:
                metric.process_group = self._replicas.group
            elif self._comm is not None:
                _lightning.stop_syncing(metric)
        if self._replicas is None:
            _lightning.forbid_distributed_sampler(trainer)
        if self._comm is None:
            return
        networks: tuple[Network, ...] = ("student", "teacher")
        for name in networks:
            network = getattr(module, name)
            network.forward = partial(self.run_through, name)
            self._undo.append(lambda network=network: network.__dict__.pop("forward", None))  # type: ignore[misc]

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
        return SharedLoader(dataloader, self._comm)

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

    def run_through(self, network: Network, *args: Any, **kwargs: Any) -> Any:
        """A forward of one network through all stages, the same result on every rank."""
        if self._fitting is not None and self._fitting.in_step:
            raise MisconfigurationException(
                f"self.{network}(...) was called in a training step, where each rank has one stage only. Use the "
                "outputs that `loss` gets; in validation_step, test_step and predict_step the call works."
            )
        assert self._stage is not None and self._comm is not None
        stage = self._stage
        inputs = args[0] if len(args) == 1 and not kwargs else Call(args, kwargs)
        return self._comm.chain(lambda value: stage.run(network, value), inputs)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return super().lightning_module_state_dict() if self._shards is None else self._shards.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = _lightning.plain_optimizer(optimizer)
        if self._shards is None:  # after fit, when it is whole again
            return super().optimizer_state(optimizer)
        return self._shards.optimizer_state(optimizer, self._groups)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        assert self._shards is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self._shards.load_optimizer_state(optimizer, state, self._groups)
            _lightning.optimizers_to_device([optimizer], self.root_device)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if "optimizer_states" in checkpoint:
            checkpoint[KEY] = {"seed": self._seed, **self._random_states()}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(*args, **kwargs)
        self._resumed = checkpoint.get(KEY, {})
        return checkpoint

    def _random_states(self) -> dict[str, Any]:
        """Where the generators of the rank that loads and of the one that runs `loss` are."""
        state = random_state(self.root_device)
        states = [state] if self._comm is None else self._comm.gather(state)
        return {"first": states[0], "last": states[-1]} if states else {}

    def _restore_random_state(self) -> None:
        for name, mine in (("last", self._topology.is_last), ("first", self._topology.stage == 0)):
            if mine and name in self._resumed:
                set_random_state(self._resumed[name], self.root_device)

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        if self._board is not None and not isinstance(exception, PipelineError | SystemExit):
            text = "".join(traceback.format_exception(exception))
            self._board.report(f"{self._topology.describe(self.global_rank)} failed:\n{text}")
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM
        if isinstance(exception, SystemExit) and self._fitting is not None:
            self._failed = False  # an orderly end: every rank is at the same step boundary
            self.on_train_end()

    @override
    def teardown(self) -> None:
        fitting, self._fitting = self._fitting, None
        if fitting is not None:
            fitting.close()
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        if self._shards is not None and not self._failed:
            self._shards.restore([] if fitting is None else self.optimizers, self._groups)
        if self._comm is not None:
            if not self._failed:
                self._comm.drain()
            self._comm.close()
        self._comm = self._replicas = self._shards = self._stage = None
        if self._board is not None and self._failed:
            dist.destroy_process_group()  # wakes the peers that wait for this rank
            self._board.linger()
        self._board = None
        self._resumed = {}
        if self._failed:
            self.precision_plugin.teardown()
        else:
            super().teardown()


TSPipeStrategy.register_strategies(StrategyRegistry)

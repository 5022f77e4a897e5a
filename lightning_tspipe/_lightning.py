"""The private names of Lightning, but for its loaders; `tests/test_lightning.py` holds them.

No file but this one, `_loaders.py`, `_metrics.py` and `recording.py` (torch's fake tensors) touches private names.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import LearningRateFinder, ThroughputMonitor
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.profilers import PassThroughProfiler, PyTorchProfiler
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException, _TunerExitException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous
from torch.optim import Optimizer
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

ScriptLauncher, ProcessLauncher = _SubprocessScriptLauncher, _MultiProcessingLauncher
TunerExit = _TunerExitException
TERMINATE, REQUEUE = 1, 2  # what signals ask for
STORES: list[Any] = []  # of this process's connections, one after another


def set_world_ranks(strategy: Any) -> None:
    """Tell the cluster environment and Lightning's rank-zero helpers who this process is."""
    environment = strategy.cluster_environment
    if environment is not None:
        environment.set_global_rank(strategy.node_rank * strategy.num_processes + strategy.local_rank)
        environment.set_world_size(strategy.num_nodes * strategy.num_processes)
    for helper in (rank_zero_only, fabric_rank_zero_only):
        setattr(helper, "rank", strategy.global_rank)  # noqa: B010  the attribute is not in their types


def init_process_group(strategy: Any, backend: str, timeout: timedelta) -> None:
    """Connect the processes as DDPStrategy does; again, after a failure, under names of their own.

    The store of the first connection stays, so that no rank connects to one that is about to go.
    """
    reset_seed()
    if dist.is_initialized():
        return
    options: dict[str, Any] = {}
    if STORES:
        found = rendezvous("env://", strategy.global_rank, strategy.world_size, timeout=timeout)
        options["store"] = PrefixStore(f"connection {len(STORES)}", next(iter(found))[0])
    device = strategy.root_device if strategy.root_device.type != "cpu" else None
    _init_dist_connection(strategy.cluster_environment, backend, timeout=timeout, device_id=device, **options)
    STORES.append(_get_default_store())


def wrap_checkpoint_io(io: CheckpointIO, make: Callable[[], CheckpointIO]) -> None:
    """Give what wraps another CheckpointIO (`AsyncCheckpointIO`) one to wrap, which it ignores if it has one."""
    if isinstance(io, _WrappingCheckpointIO):
        io.checkpoint_io = make()


def optimizers_to_device(optimizers: list[Optimizer], device: torch.device) -> None:
    """Move the state of optimizers."""
    _optimizers_to_device(optimizers, device)


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer within Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def after_inf_check(scaler: Any, then: Callable[[dict[torch.device, Tensor]], Any]) -> Callable[[], None]:
    """Whenever a `torch.amp.GradScaler` has looked for infinite gradients, `then` replaces what it found.

    Returns:
        What undoes it.
    """
    check = scaler._unscale_grads_
    scaler._unscale_grads_ = lambda *args, **kwargs: then(check(*args, **kwargs))
    return lambda: delattr(scaler, "_unscale_grads_")


def accumulates(trainer: pl.Trainer) -> bool:
    """Whether the current batch is not the last one of its accumulation window (private: no public name exists)."""
    return bool(trainer.fit_loop._should_accumulate())


def take_over_backward(trainer: pl.Trainer, yes: bool) -> None:
    """Backward and zeroing happen within `Strategy.training_step`, so Lightning's closure must do neither."""
    trainer.fit_loop._skip_backward = yes


def zero_grad(trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """What Lightning's closure does before a backward, hooks and progress counters included, at our own moment."""
    loop = trainer.fit_loop.epoch_loop
    if loop.batch_idx % trainer.accumulate_grad_batches == 0:
        loop.automatic_optimization._on_before_zero_grad(optimizer)
        loop.automatic_optimization._optimizer_zero_grad(loop.batch_idx, optimizer)


def prepare_batch(trainer: pl.Trainer, batch: Any) -> Any:
    """What Lightning does to a batch between loader and `training_step`: type, transfer and the three user hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.lightning_module._apply_batch_transfer_handler(
        batch, device=trainer.strategy.root_device, dataloader_idx=0
    )


def attach(trainer: pl.Trainer, module: pl.LightningModule, datamodule: pl.LightningDataModule | None) -> None:
    """Let a trainer know its module and data as a fit does first, without a fit."""
    trainer.strategy._lightning_module = module
    trainer._data_connector.attach_data(module, datamodule=datamodule)
    trainer.state.fn = TrainerFn.FITTING
    trainer.training = True


def loader_of(trainer: pl.Trainer) -> Any:
    """The loader, or collection of loaders, of what the trainer runs, before any of it is iterated.

    The trainer gets the same one when it asks next, so that the user's hook is called once.
    """
    source = _loader_source(trainer)
    found = _request_dataloader(source)

    def again() -> Any:
        del source.dataloader
        return found

    source.dataloader = again
    return found


def forget_loader(trainer: pl.Trainer) -> None:
    """Undo `loader_of` if the trainer has not asked: what fails before leaves nothing to the next run."""
    vars(_loader_source(trainer)).pop("dataloader", None)


def _loader_source(trainer: pl.Trainer) -> Any:
    loops: dict[Any, Any] = {
        TrainerFn.FITTING: trainer.fit_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    return loops[trainer.state.fn]._data_source


def skip_preparation(trainer: pl.Trainer, prepared: Callable[[Any], bool]) -> Callable[[], None]:
    """Batches that `prepare_batch` has seen, and stand-ins, are neither converted nor given to a hook again.

    Returns:
        What undoes it.
    """
    module, precision = trainer.lightning_module, trainer.precision_plugin
    hook, convert = module._on_before_batch_transfer, precision.convert_input

    def on_before_batch_transfer(batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if prepared(batch) else hook(batch, dataloader_idx)

    def undo() -> None:
        del module._on_before_batch_transfer, precision.convert_input

    module._on_before_batch_transfer = on_before_batch_transfer  # type: ignore[method-assign]
    precision.convert_input = lambda data: data if prepared(data) else convert(data)  # type: ignore[method-assign]
    return undo


def first_rank_decides(trainer: Any, first_says: Callable[[Any], Any]) -> Callable[[], None]:
    """Rank 0 says whether `on_train_batch_start` skips (others have a stand-in) and when to validate (clocks differ).

    Returns:
        What undoes it.
    """
    module, undo = trainer.lightning_module, ExitStack()
    places = [(module, "on_train_batch_start")] if is_overridden("on_train_batch_start", module) else []
    if trainer._val_check_time_interval is not None:
        places.append((trainer.fit_loop.epoch_loop, "_should_check_val_fx"))
    for owner, name in places:
        setattr(owner, name, partial(lambda ask, *args: first_says(ask(*args)), getattr(owner, name)))
        undo.callback(delattr, owner, name)
    return undo.close


def clip_by(module: pl.LightningModule, total_norm: Callable[..., Tensor]) -> Callable[[], None]:
    """Within a user's `configure_gradient_clipping`, torch's `clip_grad_norm_` and `get_total_norm` ask `total_norm`.

    Args:
        module: the user's.
        total_norm: gets torch's own function for it, and then that function's arguments.

    Returns:
        What undoes it.
    """
    if not is_overridden("configure_gradient_clipping", module):
        return lambda: None
    hook, utils = module.configure_gradient_clipping, torch.nn.utils
    original = utils.clip_grad._get_total_norm

    def configure_gradient_clipping(*args: Any, **kwargs: Any) -> None:
        utils.clip_grad._get_total_norm = utils.get_total_norm = partial(total_norm, original)
        try:
            hook(*args, **kwargs)
        finally:
            utils.clip_grad._get_total_norm = utils.get_total_norm = original

    module.configure_gradient_clipping = configure_gradient_clipping  # type: ignore[method-assign]
    return lambda: delattr(module, "configure_gradient_clipping")


def profiler_span(trainer: pl.Trainer) -> Callable[[str], AbstractContextManager[Any]] | None:
    """What makes a span of the trainer's profiler, None if there is none."""
    profiler = trainer.profiler  # type: ignore[attr-defined]
    return None if isinstance(profiler, PassThroughProfiler) else profiler.profile


def count_pipelines(trainer: pl.Trainer, stages: int) -> None:
    """A ThroughputMonitor multiplies what one rank sees by the number of ranks, but all stages see the same batch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ThroughputMonitor):
            for throughput in callback._throughputs.values():
                throughput.world_size = trainer.world_size // stages
                throughput.available_flops = callback.available_flops and callback.available_flops * stages


def loses_what_it_tunes(trainer: pl.Trainer, callback: pl.Callback) -> bool:
    """Whether a callback is `Tuner.lr_find`'s, which ends the fit, in processes that end with it."""
    tunes = isinstance(callback, LearningRateFinder) and callback._early_exit
    return tunes and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


@contextmanager
def without_profiler_hooks(trainer: pl.Trainer) -> Iterator[None]:
    """The modules without the hooks that PyTorchProfiler puts on each of them to record its name."""
    profiler = trainer.profiler  # type: ignore[attr-defined]
    register = profiler._register if isinstance(profiler, PyTorchProfiler) else None
    if register is None:
        yield
        return
    register.__exit__(None, None, None)
    try:
        yield
    finally:
        register.__enter__()


def stop_loading() -> None:
    """End the loaders' worker processes, which hold open every connection that was there when they were forked."""
    for found in gc.get_objects() if multiprocessing.active_children() else ():
        if type(found) is _MultiProcessingDataLoaderIter:
            found._shutdown_workers()


def tear_down(trainer: pl.Trainer) -> None:
    """What Lightning does at the end of each call of the trainer."""
    trainer._teardown()


def call_hook(trainer: pl.Trainer, name: str, *args: Any) -> Any:
    """Call a module hook as Lightning does (profiler span, `_current_fx_name` for `self.log`)."""
    return call._call_lightning_module_hook(trainer, name, *args)


class SignalLink:
    """A signal only sets a flag, and Lightning's broadcast before every batch, which would flush the pipeline, is off.

    Lightning's own handlers issue collectives, which hang when one rank alone is signalled, or in another step.

    Args:
        trainer: the trainer.
        alone: whether there is one rank only.
        together: whether there are several pipelines, which act after the same step, once all know.
    """

    def __init__(self, trainer: pl.Trainer, alone: bool, together: bool) -> None:
        self._trainer, self._alone, self._together = trainer, alone, together
        self.received = self.requeue = self._requeued = False
        self._agreed = 0
        connector = trainer._signal_connector
        self._requeue = connector._slurm_sigusr_handler_fn
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        connector._sigterm_notifier_fn = lambda *_: self.ask(TERMINATE)  # type: ignore[method-assign]
        connector._slurm_sigusr_handler_fn = lambda *_: self.ask(REQUEUE)  # type: ignore[method-assign]

    @property
    def asked(self) -> int:
        """What signals have asked for."""
        return TERMINATE * self.received + REQUEUE * self.requeue

    def ask(self, what: int) -> None:
        """A signal has come, here or on another rank."""
        if what & TERMINATE:
            self.received = True
            if self._alone:
                self.act()
        if what & REQUEUE and not self._requeued:
            self.requeue = True

    def agree(self, what: int) -> None:
        """Every pipeline knows what signals have asked of one of them."""
        self._agreed |= what

    @property
    def due(self) -> bool:
        """Whether this pipeline is to end."""
        return bool(self._agreed & TERMINATE) if self._together else self.received

    def take_requeue(self) -> bool:
        """Whether this pipeline is to be queued again; it says so once."""
        due = bool(self._agreed & REQUEUE) if self._together else self.requeue
        if due:
            self._agreed, self.requeue = self._agreed & ~REQUEUE, False
        return due

    def requeue_now(self) -> None:
        """Lightning saves the job and queues it again: once, on every rank in the same place."""
        if not self._requeued:
            self._requeued, self.requeue = True, False
            self._requeue(signal.SIGUSR1, None)  # type: ignore[arg-type]

    def act(self) -> None:
        """Every rank knows: Lightning ends the job at the end of this step."""
        self._trainer._signal_connector.received_sigterm = True

    def stop(self) -> None:
        """End the job here."""
        self.act()
        raise SIGTERMException

    def close(self) -> None:
        """Give Lightning its own methods back."""
        self._trainer.fit_loop.epoch_loop.__dict__.pop("_broadcast_sigterm_tensor", None)
        for name in ("_sigterm_notifier_fn", "_slurm_sigusr_handler_fn"):
            self._trainer._signal_connector.__dict__.pop(name, None)


def retire_process_observer() -> None:
    """From here on the pipeline itself notices a dead rank.

    Lightning's observer kills the main process within 5 s of any child's end, so also in an orderly end by SIGTERM, and
    before the main process can say which rank died.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def forbid_distributed_sampler(trainer: pl.Trainer) -> None:
    """One pipeline is one data-parallel replica: a DistributedSampler would only change the order of the data."""
    trainer._accelerator_connector.use_distributed_sampler = False


def logs_graph(trainer: pl.Trainer) -> bool:
    """Whether a logger runs the model by itself, on rank 0 alone, to draw it."""
    # a DummyLogger, as of `fast_dev_run`, gives whatever attribute it is asked for
    return any(vars(logger).get("_log_graph", False) for logger in trainer.loggers)

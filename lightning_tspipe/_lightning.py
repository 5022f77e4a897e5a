"""The one file that touches private names of Lightning and torchmetrics; `tests/test_lightning.py` holds them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_tspipe.errors import PipelineError

SIGTERM_CODE = 143


def make_launcher(strategy: Any, start_method: Any) -> Any:
    """The launchers of Lightning's ddp family."""
    if start_method == "popen":
        return _SubprocessScriptLauncher(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
    return Launcher(strategy, start_method=start_method)


class Launcher(_MultiProcessingLauncher):
    """Lightning reports an exception of a spawned process in the main process only, and then waits for its result."""

    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the processes and wait for them."""
        try:
            return super().launch(partial(_run_in_child, function), *args, trainer=trainer, **kwargs)
        except ProcessExitedException as error:
            if error.exit_code == SIGTERM_CODE:
                raise SIGTERMException(SIGTERM_CODE) from None
            rank = error.error_index
            raise PipelineError(f"rank {rank} (stage {rank}) died: {error}") from error


def _run_in_child(function: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except BaseException as exception:
        trainer = function.__self__
        trainer.strategy.on_exception(exception)
        trainer._teardown()
        raise


def set_world_ranks(strategy: Any) -> None:
    """Tell the cluster environment and Lightning's rank-zero helpers who this process is."""
    environment = strategy.cluster_environment
    if environment is not None:
        environment.set_global_rank(strategy.node_rank * strategy.num_processes + strategy.local_rank)
        environment.set_world_size(strategy.num_nodes * strategy.num_processes)
    for helper in (rank_zero_only, fabric_rank_zero_only):
        setattr(helper, "rank", strategy.global_rank)  # noqa: B010  the attribute is not in their types


def init_process_group(strategy: Any, backend: str, timeout: timedelta) -> None:
    """Connect the processes as DDPStrategy does."""
    reset_seed()
    device = strategy.root_device if strategy.root_device.type != "cpu" else None
    _init_dist_connection(strategy.cluster_environment, backend, timeout=timeout, device_id=device)


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


def loader_of(trainer: pl.Trainer) -> Any:
    """The loader, or collection of loaders, of what the trainer runs, before any of it is iterated."""
    loops: dict[Any, Any] = {
        TrainerFn.FITTING: trainer.fit_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    return loops[trainer.state.fn]._data_source.dataloader()


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


def first_rank_skips(module: pl.LightningModule, first_says: Callable[[Any], Any]) -> Callable[[], None]:
    """Whether `on_train_batch_start` skips the rest of the epoch is rank 0's to say: the others have a stand-in.

    Returns:
        What undoes it.
    """
    if not is_overridden("on_train_batch_start", module):
        return lambda: None
    hook = module.on_train_batch_start
    module.on_train_batch_start = lambda *args: first_says(hook(*args))  # type: ignore[method-assign]
    return lambda: delattr(module, "on_train_batch_start")


def profiler_span(trainer: pl.Trainer) -> Callable[[str], AbstractContextManager[Any]] | None:
    """What makes a span of the trainer's profiler, None if there is none."""
    profiler = trainer.profiler  # type: ignore[attr-defined]
    return None if isinstance(profiler, PassThroughProfiler) else profiler.profile


def call_hook(trainer: pl.Trainer, name: str, *args: Any) -> Any:
    """Call a module hook as Lightning does (profiler span, `_current_fx_name` for `self.log`)."""
    return call._call_lightning_module_hook(trainer, name, *args)


class LoaderLink:
    """Puts a fetcher of ours in the place of Lightning's, whenever the fit loop makes one.

    The fetcher is the one place that sees whole batches, after all loaders are combined and limited.

    Args:
        trainer: the trainer.
        wrap: makes our fetcher from Lightning's.
        before: called before Lightning makes its first one, and with it the order of a shuffling loader.
    """

    def __init__(self, trainer: pl.Trainer, wrap: Callable[[Any], Fetcher], before: Callable[[], None]) -> None:
        self._loop = trainer.fit_loop
        self._loaders: list[Any] = []
        original = self._loop.setup_data
        made: list[Any] = [None]

        def setup_data() -> None:
            if not self._loaders:
                before()
            original()
            if self._loop._data_fetcher is not None and self._loop._data_fetcher is not made[0]:
                made[0] = fetcher = wrap(self._loop._data_fetcher)
                self._loop._data_fetcher = fetcher  # type: ignore[assignment]
                loader: Any = self._loop._combined_loader
                fetcher.states_now = partial(type(loader)._state_dicts, loader)
                loader._state_dicts = fetcher.loader_states
                self._loaders.append(loader)

        self._loop.setup_data = setup_data  # type: ignore[method-assign]

    def close(self) -> None:
        """Take the hook out again."""
        self._loop.__dict__.pop("setup_data", None)
        for loader in self._loaders:
            loader.__dict__.pop("_state_dicts", None)


class SignalLink:
    """A SIGTERM only sets a flag, and Lightning's broadcast before every batch, which would flush the pipeline, is off.

    Lightning's own handler issues a collective, which hangs when one rank alone is signalled.

    Args:
        trainer: the trainer.
        alone: whether there is one pipeline.
    """

    def __init__(self, trainer: pl.Trainer, alone: bool) -> None:
        self._trainer, self._alone = trainer, alone
        self.received = self.agreed = False
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        trainer._signal_connector._sigterm_notifier_fn = self._notify  # type: ignore[method-assign, assignment]

    @property
    def due(self) -> bool:
        """Whether this pipeline is to end; several pipelines end at the same step, once all know of it."""
        return self.received if self._alone else self.agreed

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
        self._trainer._signal_connector.__dict__.pop("_sigterm_notifier_fn", None)

    def _notify(self, *_: object) -> None:
        self.received = True


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


def metrics_of(module: pl.LightningModule) -> Iterator[tuple[str, Metric]]:
    """Every torchmetrics object of the user's module, by attribute name."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, Metric))


def stop_syncing(metric: Metric) -> None:
    """No collective in `compute`; `_to_sync` would follow `sync_on_compute` only after a `forward` on this rank."""
    metric.sync_on_compute = metric._to_sync = False


def cached_value(metric: Metric) -> Tensor | None:
    """The value that the last `forward` of a metric gave for its batch."""
    value = metric._forward_cache
    return value if isinstance(value, Tensor) else None


def set_cached_value(metric: Metric, value: Tensor | None) -> None:
    """Let a metric that was updated on another rank show that rank's value of the batch."""
    metric._forward_cache = value  # type: ignore[assignment]
    metric._update_count = max(metric._update_count, 1)
    metric._computed = None


def adopt_state(metric: Metric, state: dict[str, Any]) -> None:
    """Let a metric hold the state that another rank's has."""
    for name, value in state.items():
        setattr(metric, name, value)
    metric._computed = None


class Fetcher:
    """What Lightning's epoch loop asks of a data fetcher; subclasses say where the batches come from."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.fetched = 0
        self.done = False
        self.length: int | None = inner.length
        self.states_now: Callable[[], list[Any]] = list  # states of the loaders that have one
        self._start_profiler: Callable[[], None] = lambda: None
        self._stop_profiler: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """A new pass over the data begins."""
        raise NotImplementedError

    def advance(self) -> tuple[Any, bool]:
        """The next batch, and whether it is the last one; raises StopIteration at the end."""
        raise NotImplementedError

    def loader_states(self) -> list[Any]:
        """What a checkpoint holds of the loaders."""
        return self.states_now()

    def __iter__(self) -> Fetcher:
        iter(self._inner)
        self.fetched, self.done, self.length = 0, False, self._inner.length
        self.begin()
        return self

    def __next__(self) -> tuple[Any, int, int]:
        self._start_profiler()
        try:
            batch, last = self.advance()
        except StopIteration:
            self.done = True
            raise
        finally:
            self._stop_profiler()
        self.fetched += 1
        self.done = last if self.length is None else self.fetched >= self.length
        return batch, self.fetched - 1, 0

    def teardown(self) -> None:
        """Stop the workers of the loader."""
        self._inner.teardown()

    def reset(self) -> None:
        """Lightning's name for forgetting the position."""
        self._inner.reset()

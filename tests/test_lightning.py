"""One test per private name that the library leans on: it fails when a release drops the name."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ThroughputMonitor
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities import exceptions
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.data import BatchSampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchmetrics import MeanMetric

from lightning_tspipe import _lightning, _loaders, _metrics, _nodes, recording
from tests.scripts.small import Small, loader, trainer

# where the library finds each private name that it imports or reads from a module
MODULE_NAMES = {
    "_init_dist_connection": "lightning.fabric.utilities.distributed",
    "_optimizers_to_device": "lightning.fabric.utilities.optimizer",
    "_MultiProcessingLauncher": "lightning.pytorch.strategies.launchers",
    "_SubprocessScriptLauncher": "lightning.pytorch.strategies.launchers",
    "_call_lightning_module_hook": "lightning.pytorch.trainer.call",
    "_IndexBatchSamplerWrapper": "lightning.pytorch.overrides.distributed",
    "_get_total_norm": "torch.nn.utils.clip_grad",
    "_engine_run_backward": "torch.autograd.graph",
    "_request_dataloader": "lightning.pytorch.trainer.connectors.data_connector",
    "_select_data_fetcher": "lightning.pytorch.loops.fit_loop",
    "_PrefetchDataFetcher": "lightning.pytorch.loops.fetchers",
    "_WrappingCheckpointIO": "lightning.pytorch.plugins.io.wrapper",
    "_MultiProcessingDataLoaderIter": "torch.utils.data.dataloader",
    "_get_default_store": "torch.distributed.distributed_c10d",
    "FakeTensor": "torch._subclasses",
    "FakeTensorMode": "torch._subclasses",
}
PARAMETERS = {
    "_init_dist_connection": ("cluster_environment", "torch_distributed_backend", "kwargs"),
    "_optimizers_to_device": ("optimizers", "device"),
    "_MultiProcessingLauncher": ("strategy", "start_method"),
    "_SubprocessScriptLauncher": ("cluster_environment", "num_processes", "num_nodes"),
    "_call_lightning_module_hook": ("trainer", "hook_name"),
    "_IndexBatchSamplerWrapper": ("batch_sampler",),
    "_engine_run_backward": ("t_outputs",),
    "_get_total_norm": ("tensors", "norm_type", "error_if_nonfinite", "foreach"),
    "_request_dataloader": ("data_source",),
    "_select_data_fetcher": ("trainer", "stage"),
    "_PrefetchDataFetcher": ("prefetch_batches",),
    "_WrappingCheckpointIO": ("checkpoint_io",),
    "_MultiProcessingDataLoaderIter": ("loader",),
    "_get_default_store": (),
    "FakeTensor": (),
    "FakeTensorMode": ("allow_non_fake_inputs",),
}
# private attributes of objects, tested below by name
ATTRIBUTES = {
    "LightningOptimizer": {"_optimizer"},
    "fit loop": {"_should_accumulate", "_skip_backward", "_data_fetcher", "_combined_loader", "_data_source"},
    "data source": {"dataloader"},
    "combined loader": {"_state_dicts"},
    "epoch loop": {"_broadcast_sigterm_tensor", "_should_check_val_fx"},
    "automatic optimization": {"_on_before_zero_grad", "_optimizer_zero_grad"},
    "module": {"_on_before_batch_transfer", "_apply_batch_transfer_handler"},
    "trainer": {
        "_signal_connector",
        "_accelerator_connector",
        "_teardown",
        "_val_check_time_interval",
        "_data_connector",
    },
    "strategy": {"_lightning_module"},
    "signal connector": {"_sigterm_notifier_fn", "_slurm_sigusr_handler_fn"},
    "metric": {"_forward_cache", "_update_count", "_computed", "_to_sync"},
    "scaler": {"_unscale_grads_"},
    "fetcher": {"_start_profiler", "_stop_profiler"},
    "profiler": {"_register"},
    "throughput monitor": {"_throughputs"},
    "learning rate finder": {"_early_exit"},
    "thread": {"_child_processes"},
    "iterator": {"_shutdown_workers"},
    "exceptions": {"_TunerExitException"},
    # of recording.py
    "hooked module": {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"},
    "module of torch": {"_parameters", "_buffers", "_flat_weights"},
    "compiled module": {"_orig_mod", "_compiled_call_impl"},
    "tensor": {"_version"},
    "storage": {"_cdata"},
    "fake mode": {"avoid_device_init"},
    # of _nodes.py
    "node of addmm": {
        *("_saved_alpha", "_saved_mat1", "_saved_mat2_sym_sizes", "_saved_mat2_sym_strides"),
        "_raw_saved_mat1",
    },
    "node of mm": {"_saved_self", "_saved_mat2_sym_sizes", "_saved_mat2_sym_strides", "_raw_saved_self"},
    "node of a convolution": {
        *("_saved_input", "_saved_weight", "_saved_bias_sym_sizes_opt", "_saved_stride", "_saved_padding"),
        *("_saved_dilation", "_saved_transposed", "_saved_output_padding", "_saved_groups", "_raw_saved_input"),
    },
}


class Probe(L.Callback):
    """The trainer's private parts while it runs."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        loop = trainer.fit_loop
        self.seen = {
            "fit loop": loop,
            "combined loader": loop._combined_loader,
            "data source": loop._data_source,
            "epoch loop": loop.epoch_loop,
            "automatic optimization": loop.epoch_loop.automatic_optimization,
            "module": trainer.lightning_module,
            "trainer": trainer,
            "strategy": trainer.strategy,
            "signal connector": trainer._signal_connector,
            "fetcher": loop._data_fetcher,
            "metric": MeanMetric(),
            "scaler": torch.amp.GradScaler("cpu"),
            "profiler": PyTorchProfiler(),
            "throughput monitor": ThroughputMonitor(len),
            "learning rate finder": LearningRateFinder(),
            "LightningOptimizer": trainer.lightning_module.optimizers(),
            "iterator": _MultiProcessingDataLoaderIter,
            "exceptions": exceptions,
            "hooked module": nn.Linear(1, 1),
            "module of torch": nn.LSTM(1, 1),
            "compiled module": torch.compile(nn.Linear(1, 1), backend="eager"),
            "tensor": torch.ones(1),
            "storage": torch.ones(1).untyped_storage(),
            "fake mode": FakeTensorMode(),
            "node of addmm": nn.Linear(1, 1)(torch.ones(1, 1)).grad_fn,
            "node of mm": nn.Linear(1, 1, bias=False)(torch.ones(1, 1)).grad_fn,
            "node of a convolution": nn.Conv1d(1, 1, 1)(torch.ones(1, 1, 1)).grad_fn,
        }


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """The objects of a run under Lightning's own strategy."""
    probe = Probe()
    trainer(1, "auto", callbacks=[probe]).fit(Small(), loader(8))
    return probe.seen


@pytest.mark.parametrize("name", MODULE_NAMES)
def test_names_of_modules(name: str) -> None:
    found = inspect.signature(getattr(importlib.import_module(MODULE_NAMES[name]), name)).parameters
    assert set(PARAMETERS[name]) <= set(found)


@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part in ATTRIBUTES if part != "thread" for name in sorted(ATTRIBUTES[part])]
)
def test_names_of_objects(parts: dict[str, Any], part: str, name: str) -> None:
    assert hasattr(parts[part], name)


def test_every_private_name_is_listed() -> None:
    """A private name that the library starts to use has to be added here."""
    files = (_lightning, _loaders, _metrics, _nodes, recording)
    source = "".join(map(inspect.getsource, files))
    used = set(re.findall(r"(?<!self)\._([a-z]\w*)", source)) | set(re.findall(r"\._loop\._([a-z]\w*)", source))
    kinds = [kind for file in files for kind in vars(file).values() if inspect.isclass(kind)]
    kinds = [kind for kind in kinds if kind.__module__.startswith("lightning_tspipe.")]
    own = {name for kind in kinds for name in (*vars(kind), *re.findall(r"self\.(_\w+)", inspect.getsource(kind)))}
    listed = set(MODULE_NAMES).union(*ATTRIBUTES.values())
    packages = set(re.findall(r"lightning_tspipe\.(_\w+)", source)) | {"_subclasses"}  # whose names are listed
    assert {f"_{name}" for name in used} - own - packages <= listed


def test_the_wrapped_optimizer_is_within(parts: dict[str, Any]) -> None:
    wrapped = parts["LightningOptimizer"]
    assert isinstance(wrapped, LightningOptimizer)
    assert isinstance(_lightning.plain_optimizer(wrapped), torch.optim.SGD)


@pytest.mark.parametrize("name", ["_optimizer_step", "_make_closure"])
def test_the_closure_asks_for_skip_backward(parts: dict[str, Any], name: str) -> None:
    source = inspect.getsource(type(parts["automatic optimization"]))
    assert "_skip_backward" in source
    assert name in source


def test_fetchers_are_what_ours_stands_for() -> None:
    ours, theirs = _loaders.Fetcher, _DataFetcher
    wanted = {name for name in vars(theirs) if not name.startswith("_") and callable(getattr(theirs, name))}
    missing = {name for name in wanted if not hasattr(ours, name)}
    assert not missing, "Lightning's fetchers have methods that ours lack"


def test_the_fit_loop_broadcasts_the_signal_before_each_batch(parts: dict[str, Any]) -> None:
    assert "_broadcast_sigterm_tensor()" in inspect.getsource(type(parts["epoch loop"]))


def test_the_observer_of_children_has_its_name() -> None:
    module = importlib.import_module("lightning.pytorch.strategies.launchers.subprocess_script")
    assert module._launch_process_observer
    source = Path(str(importlib.import_module("lightning.fabric.strategies.launchers.subprocess_script").__file__))
    text = source.read_text()
    assert 'name="child-process-observer"' in text
    assert "self._child_processes" in text


def test_a_sampler_notes_what_it_has_drawn() -> None:
    from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper

    sampler: Any = _IndexBatchSamplerWrapper(BatchSampler(range(3), 2, drop_last=False))
    assert _loaders.rows_drawn(sampler) == []
    assert list(sampler) == _loaders.rows_drawn(sampler) == [[0, 1], [2]]
    _loaders.set_rows_drawn(sampler, [[4]])
    assert sampler.seen_batch_indices == [[4]]
    assert _loaders.rows_drawn([[1, 2]]) == []


def test_metric_states() -> None:
    """A metric takes over the state and the last value of another."""
    here, there = MeanMetric(), MeanMetric()
    there(torch.tensor(3.0))
    assert _metrics.cached_value(there) == 3.0
    _metrics.set_cached_value(here, _metrics.cached_value(there))
    assert _metrics.cached_value(here) == 3.0
    _metrics.adopt_state(here, there.metric_state, 1)
    assert here.compute() == 3.0


def test_torch_clips_by_the_norm_that_is_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = importlib.import_module("torch.nn.utils.clip_grad")
    monkeypatch.setattr(functions, "_get_total_norm", lambda *args: torch.tensor(8.0))
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    assert parameter.grad.item() == pytest.approx(1 / 8)


def test_metrics_are_found_by_attribute_name() -> None:
    module = Small()
    module.inner = nn.ModuleDict({"mean": MeanMetric()})
    assert [name for name, _ in _metrics.metrics_of(module)] == ["inner.mean"]

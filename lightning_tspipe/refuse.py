"""What the pipeline cannot do, each with the reason and the way out, said on every rank before anything runs."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_tspipe import _lightning
from lightning_tspipe.memory import EMPTY, RELEASED, dropped, state_of, without_values
from lightning_tspipe.module import TeacherStudentModule
from lightning_tspipe.recording import is_compiled, tensors_of

_AVERAGES = "it averages the whole model, which no rank holds. Average the saved checkpoints instead"
_FINETUNES = "it adds parameter groups while training. Give all groups in configure_optimizers"
_ON_EXCEPTION = (
    "when one rank fails the others are in the middle of a step, so no whole model can be saved. Save in good time, by "
    "ModelCheckpoint(every_n_train_steps=...)"
)
_CALLBACKS = {
    "StochasticWeightAveraging": _AVERAGES,
    "WeightAveraging": _AVERAGES,
    "EMAWeightAveraging": _AVERAGES,
    "BatchSizeFinder": "it runs trial fits that reload the whole model. Find the batch size with strategy='auto'",
    "BackboneFinetuning": _FINETUNES,
    "BaseFinetuning": _FINETUNES,
    "ModelPruning": "it compares all weights, which no rank holds. Prune after fit, by torch.nn.utils.prune",
    "OnExceptionCheckpoint": _ON_EXCEPTION,
}
LOW_MOMENTUM = 0.9
SEVERAL_OPTIMIZERS = (
    "strategy='tspipe' cannot run several optimizers: the stages step once per batch. Return one optimizer with "
    "several parameter groups."
)


def check_strategy_arguments(
    stages: object,
    max_memory: object,
    start_method: str,
    backend: str | None,
    state_dict_type: str,
    recompute: object,
) -> None:
    """Raises ValueError for a constructor argument of the strategy that can never work."""
    if stages != "auto" and (not isinstance(stages, int) or stages < 1):
        raise ValueError(f'stages={stages!r}: give a number of at least 1, or "auto"')
    if max_memory is not None and (not isinstance(max_memory, int) or max_memory < 1):
        raise ValueError(f"max_memory={max_memory!r}: give a number of bytes per rank, or None")
    for name, value, choices in (
        ("start_method", start_method, ("popen", "spawn", "fork", "forkserver")),
        ("process_group_backend", backend, (None, "nccl", "gloo")),
        ("state_dict_type", state_dict_type, ("full", "sharded")),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(map(repr, choices))}")
    if recompute != "selective" and not isinstance(recompute, bool):
        raise ValueError(f'recompute={recompute!r}: give True, False or "selective"')


def check_compile_arguments(compile: object, recompute: object) -> dict[str, Any] | None:
    """What the strategy's `compile` means: keyword arguments of torch.compile, or None.

    Raises:
        ValueError: it means nothing.
    """
    if compile is False:
        return None
    known = [name for name in inspect.signature(torch.compile).parameters if name != "model"]
    if compile is not True and (not isinstance(compile, Mapping) or not set(compile) <= set(known)):
        raise ValueError(
            f"compile={compile!r}: give True, False, or a dict of arguments of torch.compile: {', '.join(known)}"
        )
    if recompute == "selective":
        raise ValueError(
            'recompute="selective" with compile: a compiled stage calls no functions that could run again. Use '
            "recompute=True, or leave it to torch.compile (torch._functorch.config.activation_memory_budget)."
        )
    return {} if isinstance(compile, bool) else dict(compile)


def check_compile(options: Mapping[str, Any] | None, schedule: str, device: torch.device) -> None:
    """Warn, on rank 0, where a compiled stage cannot do what the schedule wants.

    Raises:
        MisconfigurationException: torch.compile lacks what it needs.
    """
    if options is None or options.get("disable"):
        return
    backend = options.get("backend") or "inductor"
    compilers = [os.environ.get("CXX", "g++"), "clang++", "cl"]
    if backend == "inductor" and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise MisconfigurationException(
            "compile=True needs a C++ compiler on CPU, and there is none: install g++, or name one by the environment "
            'variable CXX, or use compile={"backend": "aot_eager"}, which needs none, or compile=False.'
        )
    graphs = options.get("mode") in ("reduce-overhead", "max-autotune")
    if device.type == "cuda" and (graphs or (options.get("options") or {}).get("triton.cudagraphs")):
        raise MisconfigurationException(
            "compile with CUDA graphs: they write the outputs of every call to the same place, and a pipeline holds "
            'those of several microbatches. Use compile=True, or {"mode": "max-autotune-no-cudagraphs"}.'
        )
    if schedule in ("afab-split", "zb") and backend != "eager":
        rank_zero_warn(
            f"schedule={schedule!r} splits the backward, but that of a compiled stage is one piece: it runs with the "
            "inputs' part, or on the first stage with the weights' part. Use compile=False, or schedule='auto'."
        )


def check_trainer(trainer: pl.Trainer, module: pl.LightningModule, devices: int, stages: int | str) -> None:
    """Raises MisconfigurationException for a module, Trainer flag or callback that does not work in a pipeline."""
    for reason in _reasons(trainer, module, devices, stages):
        raise MisconfigurationException(f"strategy='tspipe' cannot run this: {reason}.")


def followed(module: TeacherStudentModule) -> dict[int, Tensor]:
    """What each tensor of a momentum teacher, by identity, begins as, if it has no values of its own."""
    if module.momentum is None:
        return {}
    sources = tensors_of(module.ema_source())
    pairs = {name: (t, sources[name]) for name, t in tensors_of(module.teacher).items() if name in sources}
    return {id(tensor): source for tensor, source in pairs.values() if tensor.shape == source.shape}


def check_values(module: TeacherStudentModule) -> None:
    """Raises MisconfigurationException for tensors without memory whose values can come from nowhere.

    Warns, on rank 0, of those whose values are not what their constructor wanted.
    """
    for name, tensor in tensors_of(module).items():
        if state_of(tensor) == RELEASED:
            raise MisconfigurationException(
                f"{name!r} is lost: a run of this module has failed, and another rank held it. Build the module anew, "
                "or pass `ckpt_path`."
            )
    if module.momentum is None:
        for name, tensor in module.teacher.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and state_of(tensor) == EMPTY:
                raise MisconfigurationException(
                    f"The teacher is frozen, and nothing was loaded into its {name!r}, so it would be random. Load its "
                    "weights where it is built, by `self.teacher.load_state_dict(torch.load(file, mmap=True))`; or, if "
                    "a random teacher is meant, build it in `__init__`, outside of `init_module`."
                )
    if names := list(without_values(module, followed(module))):
        owner = module.get_submodule(names[0].rpartition(".")[0])
        raise MisconfigurationException(
            f"{names[0]!r} was built without memory, and {type(owner).__name__} has no `reset_parameters` to give it "
            f"values ({len(names)} such tensor(s) in all). Write that method, load a state dict, or build the module "
            "outside of `configure_model` and `init_module(empty_init=True)`."
        )
    if names := dropped(module, followed(module)):
        rank_zero_warn(
            f"{names[0]!r} was built without memory, so what its constructor gave it is lost ({len(names)} such "
            "parameter(s) in all): it begins as `reset_parameters` of its own module makes it. Load a state dict, "
            "write the values in that method, or build the module outside of `configure_model` and `init_module`."
        )


def warn_of_low_momentum(module: TeacherStudentModule) -> None:
    """Warn, on rank 0, when being one update late keeps more than a tenth of the gap between the networks open.

    A late teacher lacks the share 1 - m of that gap; m is that of the first update that comes late.
    """
    if module.momentum is None or module.teacher_delay == 0:
        return
    step = max(1, module.delay_from_step - 1)
    momentum = module.momentum(step) if callable(module.momentum) else module.momentum
    if momentum < LOW_MOMENTUM:
        rank_zero_warn(
            f"momentum is {momentum:g} at step {step}, and the pipeline's teacher is one update late: it lacks "
            f"{1 - momentum:.0%} of its gap to the student. Use teacher_delay=0, a momentum of at least "
            f"{LOW_MOMENTUM:g}, or delay_from_step for a synchronous start."
        )


def check_optimizers(optimizers: list[Optimizer]) -> None:
    """Raises MisconfigurationException for optimizers that need the whole model at once."""
    if len(optimizers) > 1:
        raise MisconfigurationException(SEVERAL_OPTIMIZERS)
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise MisconfigurationException(
            "strategy='tspipe' cannot run LBFGS: it evaluates the closure several times per step. Use a first-order "
            "optimizer such as AdamW."
        )


def _reasons(trainer: pl.Trainer, module: pl.LightningModule, devices: int, stages: int | str) -> Iterator[str]:
    if not isinstance(module, TeacherStudentModule):
        yield (f"{type(module).__name__} is no TeacherStudentModule. Subclass lightning_tspipe.TeacherStudentModule, "
               "assign self.teacher and self.student, and write loss")  # fmt: skip
        return
    if stages != "auto" and stages != devices:
        if isinstance(stages, int) and stages > devices:
            yield f"stages={stages} is more than the {devices} device(s). Use devices={stages}, or fewer stages"
        elif isinstance(stages, int) and devices % stages:
            yield (f"{devices} devices cannot be divided into pipelines of stages={stages}. Use a multiple of {stages} "
                   "devices, or stages='auto'")  # fmt: skip
    if not module.automatic_optimization:
        yield "manual optimization: the stages' backwards are placed by the schedule. Use automatic optimization"
    for hook in ("backward", "optimizer_zero_grad"):
        if is_overridden(hook, module):
            yield f"{type(module).__name__} overrides {hook}, which the schedule calls in pieces. Remove the override"
    if type(module).training_step is not TeacherStudentModule.training_step:
        yield (f"{type(module).__name__} overrides training_step, which no rank of a pipeline can run whole. Write "
               "loss, and the hooks student_input, teacher_input and target")  # fmt: skip
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind in type(callback).__mro__:
            if kind.__name__ in _CALLBACKS:
                yield f"the callback {kind.__name__}: {_CALLBACKS[kind.__name__]}"
        if getattr(callback, "save_on_exception", False):
            yield f"{type(callback).__name__}(save_on_exception=True): {_ON_EXCEPTION}"
        if _lightning.loses_what_it_tunes(trainer, callback):
            yield ("Tuner.lr_find in processes that end with the call: what they find is lost. Use strategy='tspipe' "
                   "in a script, or the callback LearningRateFinder, which sets the rate and goes on")  # fmt: skip
    if devices > 1 and _lightning.logs_graph(trainer):
        yield "log_graph=True of a logger runs the whole model on rank 0 alone. Use log_graph=False"
    device = trainer.strategy.root_device
    if device.type not in ("cpu", "cuda"):
        yield f"the accelerator {device.type!r} has no point-to-point messages here. Use accelerator='cpu' or 'gpu'"
    plugin = type(trainer.precision_plugin).__name__
    if plugin in ("TransformerEnginePrecision", "BitsandbytesPrecision"):
        yield f"{plugin} replaces layers by ones that need all ranks together. Use precision='bf16-mixed' or '32-true'"
    for name in ("student", "teacher"):
        if is_compiled(getattr(module, name, None)):
            yield (f"self.{name} has gone through torch.compile, and a stage cannot run a part of that. Assign the "
                   "network itself, and use TSPipeStrategy(compile=True), which compiles stage by stage")  # fmt: skip
    if any(isinstance(child, torch.nn.SyncBatchNorm) for child in module.modules()):
        yield (
            "SyncBatchNorm layers: batch norm statistics are per microbatch and deferred. Use BatchNorm, and "
            "Trainer(sync_batchnorm=True) to take them over all replicas"
        )

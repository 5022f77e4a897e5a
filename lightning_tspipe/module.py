"""The user's contract: a LightningModule with a `teacher`, a `student` and a `loss`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_tspipe._lightning import accumulates
from lightning_tspipe.arguments import run_network
from lightning_tspipe.memory import lend
from lightning_tspipe.schedule import LOSSES, LossOver
from lightning_tspipe.taps import problem_with, run_tapped, taken_apart, uncalled
from lightning_tspipe.teacher import Momentum, MomentumTeacher, check_momentum, pair_parameters, teacher_version

MOMENTUM = "tspipe momentum"  # in a checkpoint: (step, momentum) of the last update, if that is a number


class TeacherStudentModule(pl.LightningModule):
    """Base class of a teacher-student training; assign `self.teacher` and `self.student` and write `loss`.

    The same class trains unchanged under ``strategy="auto"`` and ``"ddp"``: that sequential twin is the reference for
    every number that the pipeline produces.

    Args:
        momentum: None (the teacher is frozen), a float, or a callable of the optimizer step n = 1, 2, ... A hook may
            assign `self.momentum`: update n uses what it was when optimizer step n was made.
        teacher_delay: 0 or 1 updates that the teacher is late; None means 1 in the pipeline and 0 elsewhere.
        delay_from_step: steps before this one use delay 0.
        teacher_mode: "eval" or "train"; None means eval when frozen and train with momentum.
        loss_over: "batch": the loss sees the whole batch; "microbatch": it is the mean over the microbatches;
            "student_microbatch": the same, and each sees the teacher's whole batch, as keys of a contrastive loss.
        save_teacher: None saves a momentum teacher and leaves a frozen one out of checkpoints.

    Raises:
        ValueError: an argument is outside of what is listed above.
    """

    teacher: nn.Module
    student: nn.Module
    # Names of submodules of a network. If there are any, `loss` gets what they return, as `student_taps=` and
    # `teacher_taps=`: a dict by name, or a list of these if there are views.
    student_taps: Sequence[str] = ()
    teacher_taps: Sequence[str] = ()

    def __init__(
        self,
        momentum: Momentum | None = None,
        teacher_delay: Literal[0, 1] | None = None,
        delay_from_step: int = 1,
        teacher_mode: Literal["eval", "train"] | None = None,
        loss_over: LossOver = "batch",
        save_teacher: bool | None = None,
    ) -> None:
        super().__init__()
        _check_choice("teacher_delay", teacher_delay, (None, 0, 1))
        _check_choice("teacher_mode", teacher_mode, (None, "eval", "train"))
        _check_choice("loss_over", loss_over, LOSSES)
        if delay_from_step < 1:
            raise ValueError(f"delay_from_step={delay_from_step}: steps are counted from 1")
        if momentum is not None and not callable(momentum):
            check_momentum(momentum)
        self.momentum = momentum
        self.teacher_delay = teacher_delay
        self.delay_from_step = delay_from_step
        self.teacher_mode = teacher_mode or ("eval" if momentum is None else "train")
        self.loss_over = loss_over
        self.save_teacher = momentum is not None if save_teacher is None else save_teacher
        self._momentum_teacher: MomentumTeacher | None = None
        self._made_with: tuple[int, float] | None = None  # the last optimizer step, and the momentum then
        self._twin_optimizer: Any = None
        if not self.save_teacher:
            self.register_state_dict_post_hook(_drop_teacher)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(_tolerate_missing_teacher)  # type: ignore[no-untyped-call]

    # the last two are for type checkers: a subclass may add `student_taps` and `teacher_taps`, or not
    def loss(
        self, student_out: Any, teacher_out: Any, target: Any, *args: Any, **kwargs: Any
    ) -> Tensor | Mapping[str, Any]:
        """The one thing a user must write.

        Args:
            student_out: what `student` returned, tensors of shape (batch, ...); a list of these if there are views.
            teacher_out: the same for `teacher`.
            target: what `target(batch)` returned.
            *args: nothing.
            **kwargs: `student_taps` and `teacher_taps`, if either has a name; with ``loss_over="student_microbatch"``
                `rows`, a slice: which of the teacher's rows those of the student are.

        Returns:
            A scalar tensor, or a dict with ``"loss"`` and more entries.
        """
        raise MisconfigurationException(
            f"`{type(self).__name__}` has no `loss`: define `loss(self, student_out, teacher_out, target)`."
        )

    def student_input(self, batch: Any) -> Any:
        """What the student sees: ``batch[0]``; a list gives several views, each run by itself."""
        return batch[0] if isinstance(batch, tuple | list) else batch

    def teacher_input(self, batch: Any) -> Any:
        """What the teacher sees: by default the student's input."""
        return self.student_input(batch)

    def target(self, batch: Any) -> Any:
        """What `loss` gets as its third argument: ``batch[1]`` if there is one, else None."""
        return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None

    def ema_source(self) -> nn.Module:
        """The submodule of the student that a momentum teacher follows, paired by parameter name."""
        return self.student

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "teacher" and isinstance(value, nn.Module):
            value.requires_grad_(False)  # here, since DDP looks for trainable parameters before any step runs
            value.train(self.training and self.teacher_mode == "train")

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output; override it for anything else."""
        return self.student(*args, **kwargs)

    @override
    def train(self, mode: bool = True) -> TeacherStudentModule:
        """Set the mode of everything but the teacher, whose mode in training is `teacher_mode`."""
        super().train(mode)
        if isinstance(getattr(self, "teacher", None), nn.Module):
            self.teacher.train(mode and self.teacher_mode == "train")
        return self

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One sequential step on one device: the reference that the pipeline equals. The pipeline does not call it."""
        step = self.trainer.global_step + 1
        self._prepare_twin(step)
        if self._momentum_teacher is not None:
            self._momentum_teacher.advance(self.version_of(step, default_delay=0), step - 1)
        with torch.no_grad():
            teacher_out = _run_views(self.teacher, self.teacher_input(batch), self.teacher_taps)
        if self._momentum_teacher is not None and not accumulates(self.trainer):
            self._momentum_teacher.advance(step - 1, step - 1)  # the optimizer is about to replace this student
        student_out = _run_views(self.student, self.student_input(batch), self.student_taps)
        return run_loss(self, student_out, teacher_out, self.target(batch))

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; parameters without memory get that of the state dict."""
        with lend():
            return super().load_state_dict(state_dict, strict, assign)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the momentum of an update that may still have to be made."""
        if self._made_with is not None:
            checkpoint[MOMENTUM] = self._made_with

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Know it again."""
        self._made_with = checkpoint.get(MOMENTUM)

    def momentum_of(self, step: int) -> float:
        """The momentum m_n of update n = `step`, made now or later."""
        if self._made_with is not None and self._made_with[0] == step:
            return self._made_with[1]
        assert self.momentum is not None
        return self.momentum(step) if callable(self.momentum) else self.momentum

    def note_momentum(self, step: int) -> None:
        """Optimizer step `step` has been made: a hook may change a float before its update is made."""
        self._made_with = None if self.momentum is None or callable(self.momentum) else (step, self.momentum)

    def version_of(self, step: int, default_delay: int) -> int:
        """The version of the teacher that optimizer step `step` uses (`teacher.teacher_version`)."""
        delay = default_delay if self.teacher_delay is None else self.teacher_delay
        return teacher_version(step, delay, self.delay_from_step)

    def check_networks(self) -> None:
        """Check what was assigned; raises MisconfigurationException that names what is missing."""
        for name in ("student", "teacher"):
            if not isinstance(getattr(self, name, None), nn.Module):
                raise MisconfigurationException(
                    f"`{type(self).__name__}` has no `self.{name}`: assign an nn.Module to it in `__init__`."
                )
        shared = {id(p) for p in self.student.parameters()} & {id(p) for p in self.teacher.parameters()}
        if shared:
            names = [name for name, p in self.teacher.named_parameters() if id(p) in shared]
            raise MisconfigurationException(
                f"teacher and student share parameters (teacher.{names[0]}): assign `copy.deepcopy(self.student)`."
            )
        if self.momentum is not None:
            pair_parameters(self.teacher, self.ema_source())
        self._check_loss()

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises MisconfigurationException if the optimizer would train the teacher."""
        names = {id(parameter): name for name, parameter in self.teacher.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in names:
                    raise MisconfigurationException(
                        f"The optimizer was given the teacher's parameter {names[id(parameter)]!r}. The teacher is not "
                        "trained by gradients: pass `self.student.parameters()`, not `self.parameters()`."
                    )

    def _check_loss(self) -> None:
        for network, names in (("student", self.student_taps), ("teacher", self.teacher_taps)):
            if problem := problem_with(getattr(self, network), names):
                raise MisconfigurationException(f"`{network}_taps` of `{type(self).__name__}` {problem}")
        why = "has taps" if self.student_taps or self.teacher_taps else f"has loss_over={self.loss_over!r}"
        if more := _more_arguments(self):
            try:
                inspect.signature(self.loss).bind(None, None, None, **dict.fromkeys(more))
            except TypeError as error:
                raise MisconfigurationException(
                    f"`{type(self).__name__}` {why}, and its `loss` does not take what comes with it ({error}): define "
                    f"`loss(self, student_out, teacher_out, target, {', '.join(more)})`."
                ) from error

    def _prepare_twin(self, step: int) -> None:
        """Set the teacher's mode, and follow the optimizer so that the last update before a checkpoint is made."""
        if self.teacher.training != (self.teacher_mode == "train"):
            self.teacher.train(self.teacher_mode == "train")
        optimizer = self.optimizers(use_pl_optimizer=False)
        if optimizer is self._twin_optimizer:
            if self._momentum_teacher is not None and self._momentum_teacher.version >= step:
                self._momentum_teacher.version = self.version_of(step, default_delay=0)  # the LR finder went back
            return
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.check_networks()
        self.check_optimizer(optimizer)
        self._twin_optimizer = optimizer
        if self.momentum is not None:
            pairs = list(pair_parameters(self.teacher, self.ema_source()).values())
            self._momentum_teacher = MomentumTeacher(pairs, self.momentum_of, self.version_of(step, default_delay=0))
            optimizer.register_step_post_hook(self._after_optimizer_step)

    def _after_optimizer_step(self, *_: Any) -> None:
        """Make update n now if step n + 1 uses it, so that a validation and a checkpoint see it."""
        assert self._momentum_teacher is not None
        step = self.trainer.global_step + 1  # Lightning counts the step after the optimizer has made it
        self.note_momentum(step)
        if self.version_of(step + 1, default_delay=0) == step:
            self._momentum_teacher.advance(step, step)


def looks_ahead(module: TeacherStudentModule) -> bool:
    """Whether the teacher may run a batch ahead in the pipeline: it is frozen, or one update late."""
    return module.momentum is None or module.teacher_delay != 0


def _more_arguments(module: TeacherStudentModule) -> list[str]:
    """What `loss` gets by name."""
    taps = ["student_taps", "teacher_taps"] if module.student_taps or module.teacher_taps else []
    return [*taps, *(["rows"] if module.loss_over == "student_microbatch" else [])]


def run_loss(module: TeacherStudentModule, student: Any, teacher: Any, target: Any, rows: slice = slice(None)) -> Any:
    """Call `loss` with what the networks gave: `Tapped` of a network with taps, lists if there are views."""
    more = {"rows": rows} if "rows" in _more_arguments(module) else {}
    if not (module.student_taps or module.teacher_taps):
        return module.loss(student, teacher, target, **more)
    (student_out, student_taps), (teacher_out, teacher_taps) = taken_apart(student), taken_apart(teacher)
    for network, found in (("student", student_taps), ("teacher", teacher_taps)):
        for view in found if isinstance(found, list) else [found]:
            for name in getattr(module, f"{network}_taps"):
                if name not in view:
                    raise MisconfigurationException(uncalled(getattr(module, network), name))
    taps = {"student_taps": student_taps, "teacher_taps": teacher_taps}
    return module.loss(student_out, teacher_out, target, **taps, **more)


def _run_views(network: nn.Module, inputs: Any, taps: Sequence[str]) -> Any:
    def run(view: Any) -> Any:
        return run_tapped(network, view, taps) if taps else run_network(network, view)

    return [run(view) for view in inputs] if isinstance(inputs, list) else run(inputs)


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose from {', '.join(map(repr, choices))}")


def _drop_teacher(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}teacher.")]:
        del state_dict[key]


def _tolerate_missing_teacher(module: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not key.startswith("teacher.")]

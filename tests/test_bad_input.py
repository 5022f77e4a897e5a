"""What cannot work is refused on every rank, with the cause and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy, cosine_momentum
from lightning_tspipe.partition import partition
from lightning_tspipe.refuse import check_trainer
from tests.multiproc import result_of
from tests.scripts.small import Small, loader, network, trainer
from tests.scripts.zygote import Zygote

# case of tests/scripts/bad_input.py -> what the text on every rank must contain: the cause, and the way out
CASES: dict[str, tuple[str, ...]] = {
    "NoStudent": ("no `self.student`", "assign an nn.Module"),
    "NoTeacher": ("no `self.teacher`", "assign an nn.Module"),
    "NoSource": ("'3.weight' has no source", "override `ema_source()`"),
    "OtherShapes": ("'0.weight' has shape (9, 4), its source (8, 4)", "needs the shapes of the student"),
    "OneLayer": ("1 layer(s) for 2 stages", "Use fewer devices"),
    "SharedAcrossStages": ("student.0.weight (stage 0) and student.2.weight (stage 1)", "on one stage"),
    "NoExample": ("there is none: RuntimeError: no such data", "Set self.example_input_array"),
    "CannotBeCut": ("The forward of ByValue cannot be cut into stages", "`pipeline_layers()`"),
    "ForgetsALayer": ("'head.weight' of Residual is in none of the modules", "Put it into one of them"),
    "TeacherIsStudent": ("share parameters (teacher.0.weight)", "copy.deepcopy(self.student)"),
    "UnknownBalance": ("balance='speed' is unknown", "choose from"),
    "WrongCuts": ("2 layers in all", "add up to 3"),
    "NoTensor": ("no tensor with rows in dimension 0", "Override student_input"),
    "DifferentRows": ("4 rows and teacher_input(batch) has 3", "the same samples"),
    "SmallBatch": ("A batch of 4 row(s) cannot be cut into microbatches=5", "drop_last=True"),
    "LossOfManyNumbers": ("a tensor of shape (4, 2)", "Reduce it"),
    "LossIsNoTensor": ("must return a scalar tensor", "it returned a float"),
    "DictWithoutLoss": ("must return a scalar tensor, or a dict with a scalar tensor under 'loss'",),
    "DetachedLoss": ("does not depend on the student", "do not detach it"),
    "LossOfAnotherParameter": ("does not depend on the student", "Compute it from `student_out`"),
    "NoLoss": ("`NoLoss` has no `loss`", "define `loss(self, student_out, teacher_out, target)`"),
    "FickleStudent": ("The student changed the structure", "(stage 1)", "Return the same nesting"),
    "FickleStudentWithin": ("The student changed the structure", "(stage 0)", "Return the same nesting"),
    "FickleTeacher": ("The teacher changed the structure", "(stage 1)", "Return the same nesting"),
    "TrainsTeacher": ("given the teacher's parameter '0.weight'", "pass `self.student.parameters()`"),
    "TwoOptimizers": ("several optimizers", "one optimizer with several parameter groups"),
    "UsesLBFGS": ("cannot run LBFGS", "AdamW"),
    "ManualOptimization": ("manual optimization", "Use automatic optimization"),
    "CallsStudentInLoss": ("self.student(...) was called in a training step", "Use the outputs that `loss` gets"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(60)
def test_every_rank_says_cause_and_fix(zygote: Zygote, tmp_path: Path, case: str) -> None:
    codes = zygote.run("tests.scripts.bad_input:run", 2, tmp_path, deadline=30, case=case)
    output = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert codes == [1, 1], output
    errors = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for error in errors:
        for text in CASES[case]:
            assert text in error["text"], errors
    assert any(error["type"] in ("MisconfigurationException", "ValueError") for error in errors), errors


@pytest.mark.timeout(60)
def test_processes_that_lightning_forks_hand_the_error_to_the_script(zygote: Zygote, tmp_path: Path) -> None:
    codes = zygote.run("tests.scripts.bad_input:run_forked", 1, tmp_path, deadline=40, case="LossOfManyNumbers")
    assert codes == [1], (tmp_path / "0.txt").read_text()
    text = json.loads((tmp_path / "0.json").read_text())["text"]
    assert "a tensor of shape (4, 2)" in text
    assert "Reduce it" in text


# --- checks that need no second process


class Overrides(Small):
    """Subclasses add one hook that the schedule owns."""


class OverridesBackward(Overrides):
    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class OverridesZeroGrad(Overrides):
    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        pass


class OverridesTrainingStep(Overrides):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


class UsesDataloaderIter(Overrides):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return next(dataloader_iter)


class SyncNorm(Small):
    def __init__(self) -> None:
        super().__init__()
        self.student = network(4, 8).append(nn.SyncBatchNorm(8))


def manual() -> Small:
    module = Small()
    module.automatic_optimization = False
    return module


@pytest.mark.parametrize(
    ("make", "cause", "fix"),
    [
        (L.LightningModule, "LightningModule is no TeacherStudentModule", "Subclass"),
        (manual, "manual optimization", "Use automatic optimization"),
        (OverridesBackward, "overrides backward", "Remove the override"),
        (OverridesZeroGrad, "overrides optimizer_zero_grad", "Remove the override"),
        (OverridesTrainingStep, "overrides training_step", "Write loss"),
        (UsesDataloaderIter, "overrides training_step", "Write loss"),
        (SyncNorm, "SyncBatchNorm", "Use BatchNorm"),
    ],
)
def test_refused_modules(make: Callable[[], L.LightningModule], cause: str, fix: str) -> None:
    with pytest.raises(MisconfigurationException, match=cause) as caught:
        check_trainer(trainer(2), make(), 2, "auto")
    assert fix in str(caught.value)


@pytest.mark.parametrize(
    ("callback", "fix"),
    [
        (StochasticWeightAveraging(swa_lrs=0.1), "Average the saved checkpoints"),
        (WeightAveraging(), "Average the saved checkpoints"),
        (EMAWeightAveraging(), "Average the saved checkpoints"),
        (BatchSizeFinder(), "Find the batch size with strategy='auto'"),
        (BackboneFinetuning(), "Give all groups in configure_optimizers"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, L.Callback) else "",
)
def test_refused_callbacks(callback: L.Callback, fix: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"the callback {type(callback).__name__}") as caught:
        check_trainer(trainer(2, callbacks=[callback]), Small(), 2, "auto")
    assert fix in str(caught.value)


@pytest.mark.parametrize("name", ["TransformerEnginePrecision", "BitsandbytesPrecision"])
def test_refused_precision_plugins(name: str) -> None:
    fake = trainer(2)
    fake.strategy.precision_plugin = type(name, (type(fake.precision_plugin),), {})()
    with pytest.raises(MisconfigurationException, match=name) as caught:
        check_trainer(fake, Small(), 2, "auto")
    assert "bf16-mixed" in str(caught.value)


def fake_trainer(device: str) -> Any:
    """A trainer on a device that this machine may lack."""
    return SimpleNamespace(
        callbacks=[],
        strategy=SimpleNamespace(root_device=torch.device(device)),
        precision_plugin=trainer(2).precision_plugin,
    )


@pytest.mark.parametrize("device", ["mps", "xla"])
def test_refused_accelerators(device: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"accelerator '{device}'") as caught:
        check_trainer(fake_trainer(device), Small(), 2, "auto")
    assert "accelerator='cpu' or 'gpu'" in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "cause", "fix"),
    [
        (4, r"stages=4 is more than the 3 device\(s\)", "Use devices=4"),
        (2, "3 devices cannot be divided into pipelines of stages=2", "Use a multiple of 2 devices, or stages='auto'"),
    ],
)
def test_refused_stage_counts(stages: int, cause: str, fix: str) -> None:
    with pytest.raises(MisconfigurationException, match=cause) as caught:
        check_trainer(trainer(3), Small(), 3, stages)
    assert fix in str(caught.value)


@pytest.mark.parametrize("stages", [1, 3])
def test_stages_that_divide_the_devices_are_allowed(stages: int) -> None:
    check_trainer(trainer(3), Small(), 3, stages)


@pytest.mark.parametrize(
    ("balance", "cause"),
    [
        ("speed", "balance='speed' is unknown: choose from 'auto', 'parameters'"),
        ([1, 1], "add up to 3"),
        ([1, 1, 1], "3 stage"),
        ([3, 0], "at least 1"),
        ({"student": [1, 2], "teacher": [2, 2]}, "balance gives the teacher"),
        ({"pupil": [1, 2]}, r"keys \['pupil'\]: only 'student' and 'teacher'"),
    ],
)
def test_refused_cuts(balance: Any, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        partition(network(4, 8, 8, 2), network(4, 8, 8, 2), 2, balance)


def test_cuts_for_a_momentum_teacher_are_refused() -> None:
    student = network(4, 8, 8, 2)
    with pytest.raises(ValueError, match="Give cuts for the student alone"):
        partition(student, network(4, 8, 8, 2), 2, {"student": [1, 2], "teacher": [2, 1]}, source=student)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"The teacher has 1 layer\(s\) for 2 stages. Use fewer devices"):
        partition(network(4, 8, 8, 2), network(4, 2), 2)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 1.5},
        {"momentum": -0.1},
        {"momentum": float("nan")},
        {"teacher_delay": 2},
        {"teacher_delay": -1},
        {"delay_from_step": 0},
        {"teacher_mode": "training"},
        {"loss_over": "sample"},
    ],
    ids=str,
)
def test_refused_module_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TeacherStudentModule(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"microbatches": 0},
        {"microbatches": -2},
        {"microbatches": "many"},
        {"microbatches": 1.5},
        {"schedule": "zigzag"},
        {"stages": 0},
        {"stages": "all"},
        {"balance": "speed"},
        {"start_method": "thread"},
        {"process_group_backend": "carrier-pigeon"},
    ],
    ids=str,
)
def test_refused_strategy_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TSPipeStrategy(**options)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [((0.9, 1.0, 0), "num_steps"), ((1.5, 1.0, 3), "momentum is 1.5"), ((0.9, -1.0, 3), "momentum is -1.0")],
)
def test_refused_cosine(arguments: tuple[float, float, int], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        cosine_momentum(*arguments)


def test_a_callable_momentum_is_checked_when_it_is_used() -> None:
    def error() -> str:
        with pytest.raises(ValueError, match="momentum") as raised:
            trainer(1).fit(Small(momentum=lambda step: 2.0), loader())
        return str(raised.value)

    assert "momentum is 2.0" in result_of(error)


class TestTwin:
    """The sequential twin refuses the same module errors."""

    @pytest.mark.parametrize(
        ("case", "cause"),
        [
            ("NoSource", "has no source"),
            ("OtherShapes", "has shape"),
            ("TrainsTeacher", "the teacher's parameter"),
            ("NoLoss", "define `loss"),
        ],
    )
    def test_it_names_the_cause(self, case: str, cause: str) -> None:
        from tests.scripts import bad_input

        with pytest.raises((MisconfigurationException, ValueError), match=cause):
            trainer(1, "auto").fit(getattr(bad_input, case)(), loader())

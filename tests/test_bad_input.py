"""What cannot work is refused on every rank, with the cause and the way out."""

from __future__ import annotations

import json
import os
import warnings
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
    BaseFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import Precision
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
    "UnknownTap": ("`student_taps` of `UnknownTap` names '01', which is no submodule of this Sequential", "'1'"),
    "TapWithinALayer": (
        "The tap '1.0' of Sequential is inside of '1', which is one indivisible layer",
        "Tap '1' itself",
    ),
    "TapNeverCalled": ("The tap 'blocks' of Residual was never called", "an nn.ModuleList is not, its items are"),
    "TapOfNamedLayers": ("The student has taps and names its layers by pipeline_layers()", "Remove that method"),
    "TeacherIsStudent": ("share parameters (teacher.0.weight)", "copy.deepcopy(self.student)"),
    "UnknownBalance": ("balance='speed' is unknown", "choose from"),
    "WrongCuts": ("2 layers in all", "add up to 3"),
    "LossWithoutRows": (
        "has loss_over='student_microbatch', and its `loss` does not take what comes with it",
        "define `loss(self, student_out, teacher_out, target, rows)`",
    ),
    "OrderOfMicrobatches": ('order "1f1b" needs a loss per microbatch', 'set loss_over="microbatch"'),
    "NoTensor": ("no tensor with rows in dimension 0", "Override student_input"),
    "DifferentRows": ("4 rows and teacher_input(batch) has 3", "the same samples"),
    "SmallBatch": ("A batch of 4 row(s) cannot be cut into microbatches=5", "drop_last=True"),
    "SmallBatchOfTheTeacher": ("A batch of 4 row(s) cannot be cut into teacher_microbatches=8", "drop_last=True"),
    "OneRowMeasured": (
        "The batch norm '1.1' of the student got a microbatch with one value",
        "fewer microbatches",
    ),
    "OneRow": ("The batch norm '1.0.inner.1' of the", "with one value per channel", "a larger batch"),
    "OneRowFollowed": (
        "The batch norm 'inner.1' of the Normalized got",
        "with one value per channel",
        "drop_last=True",
    ),
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
    "LogsInAnInputHook": ("was called while a batch is loaded", "Log it in `loss`"),
    "LogsTheBatchInAHook": ("got a tensor without memory", "Log it in `loss`"),
    "LogsInACallback": ("got a tensor without memory", "Log it in `loss`"),
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


# --- what is refused before anything runs, on two ranks


class OverridesBackward(Small):
    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class OverridesZeroGrad(Small):
    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        pass


class OverridesTrainingStep(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


class UsesDataloaderIter(Small):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return next(dataloader_iter)


class SyncNorm(Small):
    def __init__(self) -> None:
        super().__init__()
        self.student = network(4, 8).append(nn.SyncBatchNorm(8))


class Compiled(Small):
    def __init__(self) -> None:
        super().__init__()
        self.student = torch.compile(self.student)


class CompiledInPlace(Small):
    def __init__(self) -> None:
        super().__init__()
        self.teacher.compile()


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        pass

    def finetune_function(self, *args: Any) -> None:
        pass


class WithBackbone(Small):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)


def manual() -> Small:
    module = Small()
    module.automatic_optimization = False
    return module


def precision(name: str) -> dict[str, Any]:
    """A trainer's option: a plugin of this name, as of a package that is not installed."""
    return {"plugins": [type(name, (Precision,), {})()]}


def with_callback(callback: L.Callback) -> dict[str, Any]:
    return {"callbacks": [callback], "enable_checkpointing": True}


# name -> module, options of the trainer, arguments of the strategy; the cause, and the way out
REFUSED: dict[str, tuple[Callable[[], L.LightningModule], dict[str, Any], dict[str, Any], str, str]] = {
    "plain module": (BoringModel, {}, {}, "BoringModel is no TeacherStudentModule", "Subclass"),
    "manual": (manual, {}, {}, "manual optimization", "Use automatic optimization"),
    "backward": (OverridesBackward, {}, {}, "OverridesBackward overrides backward", "Remove the override"),
    "zero_grad": (OverridesZeroGrad, {}, {}, "OverridesZeroGrad overrides optimizer_zero_grad", "Remove the override"),
    "training_step": (OverridesTrainingStep, {}, {}, "OverridesTrainingStep overrides training_step", "Write loss"),
    "dataloader_iter": (UsesDataloaderIter, {}, {}, "UsesDataloaderIter overrides training_step", "Write loss"),
    "SyncBatchNorm": (SyncNorm, {}, {}, "SyncBatchNorm", "Use BatchNorm"),
    "compiled": (Compiled, {}, {}, "self.student has gone through torch.compile", "TSPipeStrategy(compile=True)"),
    "compiled in place": (CompiledInPlace, {}, {}, "self.teacher has gone through", "Assign the network itself"),
    "too many stages": (Small, {}, {"stages": 4}, "stages=4 is more than the 2 device(s)", "Use devices=4"),
    "TransformerEngine": (
        Small, precision("TransformerEnginePrecision"), {}, "TransformerEnginePrecision replaces layers", "bf16-mixed"
    ),
    "bitsandbytes": (
        Small, precision("BitsandbytesPrecision"), {}, "BitsandbytesPrecision replaces layers", "'32-true'"
    ),
    "save_on_exception": (
        Small, with_callback(ModelCheckpoint(save_on_exception=True)), {},
        "ModelCheckpoint(save_on_exception=True): when one rank fails", "every_n_train_steps",
    ),
} | {
    type(callback).__name__: (WithBackbone, with_callback(callback), {}, f"the callback {name}: ", fix)
    for callback, name, fix in (
        (StochasticWeightAveraging(swa_lrs=0.1), "StochasticWeightAveraging", "Average the saved checkpoints"),
        (WeightAveraging(), "WeightAveraging", "Average the saved checkpoints"),
        (EMAWeightAveraging(), "EMAWeightAveraging", "Average the saved checkpoints"),
        (BackboneFinetuning(), "BackboneFinetuning", "Give all groups in configure_optimizers"),
        (Unfreezes(), "BaseFinetuning", "Give all groups in configure_optimizers"),
        (ModelPruning("l1_unstructured"), "ModelPruning", "Prune after fit"),
        (OnExceptionCheckpoint("."), "OnExceptionCheckpoint", "every_n_train_steps"),
    )
}  # fmt: skip


# names of cases -> arguments of a module whose teacher may be late
MOMENTA: dict[str, dict[str, Any]] = {
    "0.5": {"momentum": 0.5},
    "low when it begins": {"momentum": cosine_momentum(0.5, 1.0, 10), "teacher_delay": 1},
    "high when the delay begins": {"momentum": cosine_momentum(0.5, 1.0, 10), "delay_from_step": 10},
    "0.9": {"momentum": 0.9},
    "not late": {"momentum": 0.5, "teacher_delay": 0},
    "frozen": {},
}


def run_refused(rank: int, out: Path) -> None:
    """Every case on one rank; what each was told."""
    os.chdir(out)  # one of the callbacks saves there
    told: dict[str, str] = {}
    for name, (make, options, strategy, _, _) in REFUSED.items():
        fit = trainer(2, TSPipeStrategy(microbatches=2, **strategy), default_root_dir=out, **options)
        try:
            fit.fit(make(), loader())
        except MisconfigurationException as error:
            told[name] = str(error)
    for name, options in MOMENTA.items():
        fit = trainer(2, max_steps=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit.fit(Small(**options), loader())
        told[name] = "\n".join(str(warning.message) for warning in caught)
    (out / f"{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def told(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """For both ranks, what they were told in each case."""
    folder = tmp_path_factory.mktemp("refused")
    codes = zygote.run("tests.test_bad_input:run_refused", 2, folder)
    assert codes == [0, 0], [(folder / f"{rank}.txt").read_text() for rank in range(2)]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_every_rank(told: list[dict[str, str]], case: str) -> None:
    *_, cause, fix = REFUSED[case]
    for texts in told:
        assert f"strategy='tspipe' cannot run this: {cause}" in texts[case]
        assert fix in texts[case]


def test_rank_0_warns_of_a_low_momentum(told: list[dict[str, str]]) -> None:
    first, second = told
    for name in MOMENTA:
        assert ("it lacks 50% of its gap" in first[name]) == (name in ("0.5", "low when it begins")), first[name]
        assert "momentum" not in second[name]
    assert "Use teacher_delay=0" in first["0.5"]


def test_the_batch_size_finder_is_refused() -> None:
    """By Lightning on several devices, and here on one."""
    with pytest.raises(MisconfigurationException, match="the callback BatchSizeFinder") as caught:
        check_trainer(trainer(1, callbacks=[BatchSizeFinder()]), Small(), 1, "auto")
    assert "Find the batch size with strategy='auto'" in str(caught.value)
    with pytest.raises(MisconfigurationException, match="not supported with distributed strategies"):
        BatchSizeFinder().setup(trainer(2), Small())


# --- checks that need no second process


def test_a_logger_that_draws_the_model_is_refused(tmp_path: Path) -> None:
    draws = trainer(2, logger=TensorBoardLogger(tmp_path, log_graph=True))
    with pytest.raises(MisconfigurationException, match="log_graph=True") as caught:
        check_trainer(draws, Small(), 2, "auto")
    assert "Use log_graph=False" in str(caught.value)
    check_trainer(draws, Small(), 1, "auto")
    check_trainer(trainer(2, logger=True, fast_dev_run=True), Small(), 2, "auto")  # its logger has any attribute


def fake_trainer(device: str) -> Any:
    """A trainer on a device that this machine may lack."""
    return SimpleNamespace(
        callbacks=[],
        loggers=[],
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
        {"teacher_microbatches": 0},
        {"teacher_microbatches": "half"},
        {"teacher_microbatches": 4},
        {"teacher_microbatches": 4, "microbatches": 6},
        {"schedule": "zigzag"},
        {"stages": 0},
        {"stages": "all"},
        {"balance": "speed"},
        {"start_method": "thread"},
        {"state_dict_type": "half"},
        {"process_group_backend": "carrier-pigeon"},
        {"recompute": "layers"},
        {"recompute": 1},
        {"compile": "inductor"},
        {"compile": {"backends": "inductor"}},
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

"""Trainings that must be refused; every rank writes the error that it got."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_tspipe import TSPipeStrategy
from tests.scripts.small import Small, loader, network, trainer


class NoStudent(Small):
    def __init__(self) -> None:
        super().__init__()
        del self.student


class NoTeacher(Small):
    def __init__(self) -> None:
        super().__init__()
        del self.teacher


class NoSource(Small):
    def __init__(self) -> None:
        super().__init__(momentum=0.9)
        self.teacher = network(4, 8, 8, 2, 2)


class OtherShapes(Small):
    def __init__(self) -> None:
        super().__init__(momentum=0.9)
        self.teacher = network(4, 9, 8, 2)


class LossWithoutRows(Small):
    def __init__(self) -> None:
        super().__init__()
        self.loss_over = "student_microbatch"


class OneLayer(Small):
    def __init__(self) -> None:
        super().__init__()
        self.student = network(4, 2)


class SharedAcrossStages(Small):
    def __init__(self) -> None:
        super().__init__()
        self.student = network(4, 4, 4, 4)
        self.teacher = network(4, 4)
        self.teacher.append(nn.Tanh())
        self.student[2].weight = self.student[0].weight


class Residual(nn.Module):
    """No Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network(4, 4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + x)


class ByValue(Residual):
    """Its forward depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(self.body(x).sum()) > -1e9 else self.head(x)


class NoExample(Small):
    def __init__(self) -> None:
        super().__init__()
        self.student = Residual()

    def student_input(self, batch: Any) -> Any:
        raise RuntimeError("no such data")


class CannotBeCut(Small):
    def __init__(self) -> None:
        super().__init__()
        self.student = ByValue()


class ForgetsALayer(Small):
    def __init__(self) -> None:
        super().__init__()
        self.student = Residual()
        self.student.pipeline_layers = lambda: [self.student.body]  # type: ignore[operator, union-attr]


class Tapped(Small):
    """Its loss takes taps."""

    def loss(self, student_out: Any, teacher_out: Any, target: Any, student_taps: Any, teacher_taps: Any) -> Any:
        return (student_out - teacher_out).square().mean()


class UnknownTap(Tapped):
    student_taps = ("1", "01")


class TapWithinALayer(Tapped):
    student_taps = ("1", "1.0")

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(4, 4), network(4, 4, 4), nn.Linear(4, 2))
        self.student[1].register_forward_hook(lambda *_: None)


class TapNeverCalled(Tapped):
    teacher_taps = ("blocks",)

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Residual()
        self.teacher.blocks = nn.ModuleList([self.teacher.body])


class TapOfNamedLayers(Tapped):
    student_taps = ("0",)

    def __init__(self) -> None:
        super().__init__()
        self.student.pipeline_layers = lambda: list(self.student)  # type: ignore[assignment]


class TeacherIsStudent(Small):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = self.student


class NoTensor(Small):
    def student_input(self, batch: Any) -> Any:
        return "a caption"


class DifferentRows(Small):
    def teacher_input(self, batch: Any) -> Any:
        return batch[0][:-1]


class LossOfManyNumbers(Small):
    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return (student_out - teacher_out).square()


class LossIsNoTensor(Small):
    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return 1.0


class DictWithoutLoss(Small):
    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return {"total": (student_out - teacher_out).square().mean()}


class DetachedLoss(Small):
    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return (student_out.detach() - teacher_out).square().mean()


class LossOfAnotherParameter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return (self.scale * teacher_out).square().mean()


class NoLoss(Small):
    loss = Small.__mro__[1].loss  # type: ignore[attr-defined]


class Fickle(nn.Module):
    """Returns a tensor for the first batches and a tuple later."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(2, 2), 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.inner(x) if self.calls <= 4 else {"out": self.inner(x)}


class FickleStudent(Small):
    def __init__(self) -> None:
        super().__init__()
        self.student.append(Fickle())


class FickleStudentWithin(Small):
    """The change happens between stages, where the next rank receives the output."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(network(4, 2), Fickle(), network(2, 8, 8, 2))


class FickleTeacher(Small):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.student).append(Fickle())


class Normalized(nn.Module):
    """A batch norm that is not at the top, in a network that is no Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.last = nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        return self.last(x + self.inner(x))


class OneRowMeasured(Small):
    """Batches of four rows in four microbatches."""

    def __init__(self) -> None:
        super().__init__(momentum=0.9)
        inner = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        self.student = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(8, 2))
        self.teacher = copy.deepcopy(self.student)


class OneRow(Small):
    """The cuts are given, so that nothing is measured or followed."""

    def __init__(self) -> None:
        super().__init__(momentum=0.9)
        self.student = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Normalized(), nn.Tanh()), nn.Linear(2, 2))
        self.teacher = copy.deepcopy(self.student)


class OneRowFollowed(Small):
    """Nothing has memory, as far as it is another rank's."""

    def __init__(self) -> None:
        super().__init__(momentum=0.9)
        del self.student, self.teacher

    def configure_model(self) -> None:
        if not hasattr(self, "student"):
            self.student = Normalized()
            self.teacher = copy.deepcopy(self.student)


class TrainsTeacher(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoOptimizers(Small):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.student]


class UsesLBFGS(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.student.parameters())


class ManualOptimization(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class CallsStudentInLoss(Small):
    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return self.student(torch.ones(3, 4)).mean() + student_out.mean()


class LogsInAnInputHook(Small):
    def student_input(self, batch: Any) -> Any:
        self.log("rows", float(len(batch[0])))
        return batch[0]


class LogsTheBatchInAHook(Small):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log_dict({"loss": outputs["loss"], "mean": batch[0].mean()})


class LogsInACallback(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int) -> None:
        self.log("mean", batch[0].mean())


CALLBACKS: dict[str, Any] = {"LogsInACallback": LogsInACallback}
STRATEGIES: dict[str, dict[str, Any]] = {
    "FickleStudentWithin": {"balance": {"student": [2, 3]}},
    "UnknownBalance": {"balance": "speed"},
    "WrongCuts": {"balance": [1, 1]},
    "OrderOfMicrobatches": {"schedule": "1f1b"},
    "SmallBatch": {"microbatches": 5},
    "SmallBatchOfTheTeacher": {"teacher_microbatches": 8},
    "OneRowMeasured": {"microbatches": 4},
    "OneRow": {"microbatches": 4, "balance": {"student": [1, 3]}},
    "OneRowFollowed": {"microbatches": 4, "balance": "parameters"},
}


def run(rank: int, out: Path, case: str) -> None:
    """One rank of one case."""
    kind = globals().get(case, Small)
    module = kind() if issubclass(kind, Small) else Small()
    try:
        strategy = TSPipeStrategy(**({"microbatches": 2} | STRATEGIES.get(case, {})))
        fit = trainer(2, strategy, callbacks=[CALLBACKS[case]()] if case in CALLBACKS else [])
        fit.fit(module, loader())
    except BaseException as error:
        answer = {"type": type(error).__name__, "text": str(error)}
        (out / f"{rank}.json").write_text(json.dumps(answer))
        raise


def run_forked(rank: int, out: Path, case: str) -> None:
    """The same, with processes that Lightning forks: the script itself gets the error."""
    try:
        trainer(2, "tspipe_fork").fit(globals()[case](), loader())
    except BaseException as error:
        (out / "0.json").write_text(json.dumps({"type": type(error).__name__, "text": str(error)}))
        raise

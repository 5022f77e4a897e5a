"""Networks that are no nn.Sequential train in the real pipeline as in the sequential twin."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from lightning_tspipe import TeacherStudentModule
from tests.multiproc import TWIN, Fit, run_fits

ROWS, BATCH = 22, 8  # the last batch is short


class Both(nn.Module):
    """Takes named arguments, and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = VisionTransformer(16, 8, 2, 2, 8, 16, dropout=0.0, num_classes=3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, image: Tensor, shift: Tensor | None = None) -> Any:
        logits = self.body(image) * self.scale
        return {"logits": logits if shift is None else logits + shift[:, None], "scale": logits * self.scale}


class Distill(TeacherStudentModule):
    """A vision transformer learns from a frozen residual network; validation runs whole networks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        torch.manual_seed(0)
        self.teacher = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).double()
        self.student = Both().double()

    def student_input(self, batch: Any) -> Any:
        return {"image": batch[0], "shift": batch[1]}

    def teacher_input(self, batch: Any) -> Any:
        return batch[0]

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return (student_out["logits"] - teacher_out).square().mean() + student_out["scale"].mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        gap = self.student(batch[0], shift=batch[1])["logits"] - self.teacher(batch[0])
        self.log("gap", gap.square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=1e-2, momentum=0.9)


class Follow(Distill):
    """A residual network and a head on top of it; the momentum teacher follows the former."""

    def __init__(self) -> None:
        super().__init__(momentum=0.9, teacher_delay=0)
        encoder = self.teacher
        self.student = nn.Sequential(encoder, nn.Linear(3, 3).double())
        self.student.requires_grad_()
        self.teacher = copy.deepcopy(encoder)

    def student_input(self, batch: Any) -> Any:
        return batch[0]

    def ema_source(self) -> nn.Module:
        return self.student[0]  # type: ignore[index]

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return (student_out - teacher_out).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("gap", (self.student(batch[0]) - self.teacher(batch[0])).square().mean(), sync_dist=True)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 3, 16, 16, dtype=torch.float64, generator=generator)
    return DataLoader(TensorDataset(images, torch.randn(ROWS, dtype=torch.float64, generator=generator)), BATCH)


@pytest.mark.parametrize("make", [Distill, Follow])
def test_the_pipeline_is_the_twin(make: Any) -> None:
    """Losses, gradients, weights, buffers and validations are equal on every rank at P=2 and 3."""
    micro = 1 if make is Follow else 2  # a batch norm that trains sees one microbatch at a time
    fits = [Fit(make, loader, stages, micro, loader, {"balance": "auto"}, {"max_epochs": 1}) for stages in (TWIN, 2, 3)]
    (twin,), *others = run_fits(fits, timeout=100)
    for ranks in others:
        seen: set[str] = set()
        for rank in ranks:
            assert [float(loss) for loss in rank["losses"]] == pytest.approx(
                [float(x) for x in twin["losses"]], abs=1e-12
            )
            for step, grads in enumerate(rank["grads"]):
                seen |= set(grads)
                for name, grad in grads.items():
                    torch.testing.assert_close(
                        grad,
                        twin["grads"][step][name],
                        rtol=0,
                        atol=1e-12,
                        msg=lambda text, name=name: f"{name}: {text}",
                    )
            for name, value in twin["whole"].items():
                torch.testing.assert_close(
                    rank["whole"][name], value, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
                )
            for mine, expected in zip(rank["history"], twin["history"], strict=True):
                torch.testing.assert_close(mine["gap"], expected["gap"], rtol=0, atol=1e-12)
            assert len(rank["local"]) < len(twin["local"])
        assert seen == set(twin["grads"][0])

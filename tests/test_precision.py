"""Precisions, the loss scale and clipping by norm: one number for all stages, and the twin's weights bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_tspipe import cosine_momentum
from tests.multiproc import TWIN, Fit, run_fits
from tests.scripts.small import Small, loader

pytestmark = pytest.mark.timeout(90)


class Trained(Small):
    """A momentum pair with batch norm and Adam."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"momentum": 0.9, "teacher_delay": 0} | options))
        self.student.insert(1, nn.BatchNorm1d(8))
        self.teacher.insert(1, nn.BatchNorm1d(8))

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        assert student_out.dtype == teacher_out.dtype
        self.log("bits", float(torch.finfo(student_out.dtype).bits), prog_bar=True)
        return (student_out - teacher_out).square().mean()

    def configure_optimizers(self) -> Any:
        if self.student[0].weight.dtype == torch.float16:  # where Adam's small numbers are zero
            return torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(self.student.parameters(), lr=0.01)


def half() -> MixedPrecision:
    """What `precision="16-mixed"` is on a GPU, here on CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3))


def fits(make_module: Callable[[], Any], stages: tuple[int, ...], trainer: Callable[[], dict[str, Any]]) -> Any:
    """What every rank saw, for the twin and then for each number of stages; one microbatch, as the twin has."""
    runs = [Fit(make_module, loader, p, 1, make_val_loader=loader, trainer=trainer()) for p in (TWIN, *stages)]
    (twin,), *pipelines = run_fits(runs, timeout=80)
    return twin, pipelines


def assert_same(twin: dict[str, Any], pipelines: list[list[dict[str, Any]]]) -> None:
    """Weights of every rank, losses and optimizer state are the twin's, bit by bit.

    Running statistics are deferred, so that they are rounded elsewhere.
    """
    for ranks in pipelines:
        for rank in ranks:
            assert list(rank["whole"]) == list(twin["whole"])
            for name, value in twin["whole"].items():
                found = rank["whole"][name]
                assert found.dtype == value.dtype
                if "running_" in name:
                    rounding = len(twin["losses"]) * torch.finfo(value.dtype).eps  # once per step
                    torch.testing.assert_close(found, value, rtol=rounding, atol=rounding, msg=name)
                else:
                    assert torch.equal(found, value), name
            for name, state in rank["optimizer"].items():
                for key, value in state.items():
                    assert torch.equal(value, twin["optimizer"][name][key]), (name, key)
            assert [float(loss) for loss in rank["losses"]] == [float(loss) for loss in twin["losses"]]
            assert rank["metrics"] == twin["metrics"]


@pytest.mark.parametrize(
    ("precision", "held", "bits"),
    [
        ("32-true", torch.float32, 32),
        ("64-true", torch.float64, 64),
        ("bf16-true", torch.bfloat16, 16),
        ("16-true", torch.float16, 16),
        ("bf16-mixed", torch.float32, 16),
        (None, torch.float32, 16),
    ],
)
def test_every_precision_equals_the_twin(precision: Any, held: torch.dtype, bits: int) -> None:
    """Outputs reach `loss` in the type that the layers compute in: nothing is converted on the way."""
    twin, pipelines = fits(Trained, (1, 2, 3), lambda: {"precision": precision} if precision else {"plugins": [half()]})
    assert twin["whole"]["student.0.weight"].dtype == held
    assert twin["metrics"]["bits"] == bits
    assert_same(twin, pipelines)


class Explode(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Any) -> Any:
        return gradient * math.inf


class Exploding(nn.Linear):
    """A layer whose input's gradient is infinite in some batches."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(Explode.apply(x) if self.training and self.calls in (2, 5) else x)


class Overflowing(Trained):
    """Only the first layer's gradients are infinite, at two steps: with several stages, only rank 0 sees it."""

    def __init__(self, loss_over: Any = "batch") -> None:
        super().__init__(loss_over=loss_over)
        self.student[2] = Exploding(8, 8)


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.05}])
def test_an_infinite_gradient_anywhere_skips_the_step_everywhere(clip: dict[str, Any]) -> None:
    twin, pipelines = fits(Overflowing, (2, 3), lambda: {"plugins": [half()], **clip})
    assert twin["optimizer"]["student.0.weight"]["step"] == 8 - 2
    assert_same(twin, pipelines)


@pytest.mark.parametrize("over", ["batch", "microbatch"])
def test_the_scale_reaches_every_microbatch(over: str) -> None:
    """With a scale that is a power of two, gradients are those without a scale."""

    def run(plugin: MixedPrecision) -> Any:
        return Fit(lambda: Trained(loss_over=over), loader, 2, 2, trainer={"plugins": [plugin], "max_steps": 1})

    scaled, plain = half(), half()
    plain.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for one, other in zip(*run_fits([run(scaled), run(plain)]), strict=True):
        (gradients,), (expected,) = one["grads"], other["grads"]
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-2, atol=1e-4)


class Clipped(Trained):
    """In float64; one layer is frozen, so that a stage may have nothing to train."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.student[-1].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.student.parameters() if p.requires_grad], lr=0.5)


class ClipsByItself(Clipped):
    """Clips by its own rule."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, 0.02 if self.trainer.global_step else 0.01, "norm")


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (Clipped, {"gradient_clip_val": 0.02}),
        (Clipped, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "norm", "accumulate_grad_batches": 3}),
        (Clipped, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
        (ClipsByItself, {}),
        (lambda: Clipped(momentum=cosine_momentum(0.5, 1.0, 8), teacher_delay=1), {"gradient_clip_val": 0.02}),
    ],
    ids=["norm", "norm, accumulated", "value", "own rule", "late teacher"],
)
def test_clipping_equals_the_twin(module: Any, flags: dict[str, Any]) -> None:
    twin, pipelines = fits(module, (2, 4), lambda: {"precision": "64-true", **flags})
    assert_same(twin, pipelines)
    if module is Clipped:
        free = {name: value for name, value in flags.items() if "clip" not in name}
        ((unclipped,),) = run_fits([Fit(module, loader, TWIN, trainer={"precision": "64-true", **free})])
        assert not torch.equal(twin["whole"]["student.0.weight"], unclipped["whole"]["student.0.weight"])

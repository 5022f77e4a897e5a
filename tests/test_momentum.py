"""A momentum that hooks change, as Lightning's callbacks do: the same updates as by a callable of the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tspipe import TSPipeStrategy
from tests.multiproc import TWIN, Fit, result_of, run_fits
from tests.scripts.small import Small, loader, trainer, weights

pytestmark = pytest.mark.timeout(90)


def rising(step: int) -> float:
    return 1 - 1 / (1 + step)


class Wide(Small):
    """In float64, with a teacher that begins elsewhere."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.double()

    def student_input(self, batch: Any) -> Any:
        return batch[0].double()


class ByHook(Wide):
    """Sets the momentum of each step before it."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.momentum = rising(self.trainer.global_step + 1)


class ByCallback(L.Callback):
    """The same, after the step before."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.momentum = rising(trainer.global_step + 1)


@pytest.mark.parametrize("delay", [0, 1])
def test_a_momentum_that_hooks_change(delay: Any) -> None:
    options = {"momentum": rising(1), "teacher_delay": delay}
    data = lambda: loader(32, 4)  # noqa: E731
    runs = [
        Fit(lambda: Wide(momentum=rising, teacher_delay=delay), data, TWIN),
        Fit(lambda: ByHook(**options), data, TWIN),
        Fit(lambda: ByHook(**options), data, 2, 2),
        Fit(lambda: Wide(**options), data, 2, 2, trainer={"callbacks": [ByCallback()]}),
        Fit(lambda: Wide(**options), data, TWIN),
    ]
    (expected,), *found, (constant,) = run_fits(runs)
    for seen in (seen for ranks in found for seen in ranks):
        for name, value in expected["whole"].items():
            torch.testing.assert_close(seen["whole"][name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert not torch.allclose(constant["whole"]["teacher.0.weight"], expected["whole"]["teacher.0.weight"])


@pytest.mark.parametrize("stages", [TWIN, 2])
def test_it_resumes_with_an_update_to_make(tmp_path: Path, stages: int) -> None:
    """The update of the last step before a checkpoint is made after it, with the momentum of that step."""

    def train(folder: Path, epochs: int, resume: Path | None = None) -> Any:
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        strategy = TSPipeStrategy(microbatches=2, start_method="fork", balance="parameters") if stages else "auto"
        module = ByHook(momentum=0.1, teacher_delay=1)
        run = trainer(max(1, stages), strategy, max_epochs=epochs, callbacks=[keep], enable_checkpointing=True)
        run.fit(module, loader(8, 4), ckpt_path=resume)
        return weights(module)

    def trainings() -> Any:
        train(tmp_path / "first", 1)
        return train(tmp_path / "whole", 2), train(tmp_path / "rest", 2, tmp_path / "first/epoch=0.ckpt")

    whole, resumed = result_of(trainings)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name

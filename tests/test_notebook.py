"""A notebook's session: its one process forks the ranks of each call, and has the weights when the call returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.connectors import accelerator_connector
from lightning.pytorch.tuner import Tuner
from torch.multiprocessing.spawn import ProcessRaisedException

from tests.scripts.fits import save, scalars
from tests.scripts.small import Small, loader, trainer, weights
from tests.scripts.zygote import Zygote


class Cells(Small):
    """In float64, with a momentum teacher and every kind of evaluation."""

    def __init__(self) -> None:
        super().__init__(momentum=0.9, teacher_delay=1)
        self.double()

    def student_input(self, batch: Any) -> Any:
        return batch[0].double()

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        loss = super().loss(student_out, teacher_out, target)
        self.log("loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.teacher(batch[0].double()).mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.student(batch[0].double())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.student.parameters(), lr=0.01)


def session(rank: int, out: Path, twin: bool) -> None:
    """What a notebook's cells do, in one process that Lightning takes for an interactive one."""
    torch.set_num_threads(1)
    accelerator_connector._IS_INTERACTIVE = True  # as if sys.ps1 had been there when Lightning was imported
    devices, strategy = (1, "auto") if twin else (2, "tspipe_notebook")
    module, found = Cells(), []
    for _ in range(2):
        fit = trainer(devices, strategy)
        fit.fit(module, loader())
        found.append({"weights": weights(module), "metrics": scalars(fit.callback_metrics)})
        assert not any(tensor.is_meta for tensor in module.state_dict().values())
    found.append(fit.test(module, loader(8), verbose=False))
    with torch.no_grad():
        found.append([module.student(batch[0].double()) for batch in loader(8)])
    if not twin:
        assert fit.predict(module, loader(8)) is None  # Lightning brings no predictions back from forked processes
        with pytest.raises(NotImplementedError, match="creating a new Trainer"):
            fit.fit(module, loader())
        with pytest.raises(ProcessRaisedException, match=r"what they find is lost.*the callback LearningRateFinder"):
            Tuner(trainer(devices, strategy)).lr_find(Cells(), loader(), update_attr=False)
        with pytest.raises(MisconfigurationException, match="not compatible with an interactive environment"):
            trainer(devices, "tspipe")
    save(out / f"{rank}.pt", found)


@pytest.mark.timeout(60)
def test_the_weights_are_in_the_session_and_train_on(zygote: Zygote, tmp_path: Path) -> None:
    results = []
    for name in ("twin", "notebook"):
        folder = tmp_path / name
        folder.mkdir()
        codes = zygote.run("tests.test_notebook:session", 1, folder, twin=name == "twin")
        assert codes == [0], (folder / "0.txt").read_text()
        results.append(torch.load(folder / "0.pt", weights_only=False))
    twin, ours = results
    torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-12)
    first, second, *_ = ours
    assert all(not torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])

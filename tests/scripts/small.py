"""The smallest distillation that several tests train, with a place for each thing that a test wants to be different."""

from __future__ import annotations

import copy
import logging
import warnings
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy

ROWS, BATCH = 32, 4


def network(*widths: int) -> nn.Sequential:
    """Linear layers of these widths."""
    return nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)])


class Small(TeacherStudentModule):
    """A student of three layers and a teacher of the same shape."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        torch.manual_seed(0)
        self.student = network(4, 8, 8, 2)
        self.teacher = copy.deepcopy(self.student)
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter.add_(0.1)

    def loss(self, student_out: Any, teacher_out: Any, target: Any) -> Any:
        return (student_out - teacher_out).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


def loader(rows: int = ROWS, batch: int = BATCH, **options: Any) -> DataLoader[Any]:
    """Random rows, the same on every rank."""
    data = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data, torch.arange(rows)), batch_size=batch, **options)


def trainer(devices: int, strategy: Any = None, **options: Any) -> L.Trainer:
    """A quiet trainer on CPU."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {
        "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu",
    }  # fmt: skip
    strategy = strategy or TSPipeStrategy(microbatches=2, balance="parameters")  # so that runs are alike
    return L.Trainer(devices=devices, strategy=strategy, **(quiet | options))


def weights(module: TeacherStudentModule) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

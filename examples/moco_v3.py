"""MoCo v3 on handwritten digits, pipelined over two processes: python examples/moco_v3.py.

Two augmented views of each image go through a student and a momentum teacher; the student learns to find, among what
the teacher made of the other views of the whole batch (and of all replicas), that of its own image. No label is used:
they come in at the end, when the nearest neighbours of each test image among 100 labelled ones vote on its class.
Method: Chen, Xie, He, "An empirical study of training self-supervised vision transformers", ICCV 2021,
https://arxiv.org/abs/2104.02057. Projection and prediction heads, and the gathering over replicas, are lightly's.
"""

import copy
import math
from functools import partial

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.utils import dist
from lightly.utils.scheduler import CosineWarmupScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import DataLoader

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy, cosine_momentum  # the import registers "tspipe"

LABELS = 100


def convnet(width: int, features: int) -> nn.Sequential:
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for stride in (2, 1, 2):
        layers += [nn.Conv2d(width, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, features))


class MoCo(TeacherStudentModule):
    def __init__(
        self, encoder: nn.Module | None = None, features: int = 64, hidden: int = 128, outputs: int = 32,
        momentum: float = 0.95, steps: int = 600, lr: float = 2e-3, weight_decay: float = 1e-4,
        temperature: float = 0.2, teacher_delay: int | None = None,
    ):  # fmt: skip
        # each microbatch of queries sees the keys of the whole batch: the same loss, and a student's memory of 1F1B
        super().__init__(cosine_momentum(momentum, 1.0, num_steps=steps), teacher_delay, loss_over="student_microbatch")
        self.save_hyperparameters(ignore="encoder")
        encoder, head = encoder or convnet(32, features), partial(MoCoProjectionHead, batch_norm=True)
        projected = nn.Sequential(encoder, head(features, hidden, outputs, num_layers=3))
        self.student = nn.Sequential(projected, head(outputs, hidden, outputs, num_layers=2))
        self.teacher = copy.deepcopy(projected)

    def ema_source(self):  # the teacher has no prediction head
        return self.student[0]

    def student_input(self, batch):  # a list: two views, each by itself through the networks
        return [batch[0], batch[1]]

    def target(self, batch):
        return None

    def contrast(self, queries, keys, rows):
        """Which of all keys belongs to which query: [rows, features] of one view each, and where the queries are."""
        queries, keys = F.normalize(queries), F.normalize(keys)
        labels = (torch.arange(len(keys), device=keys.device) + dist.rank() * len(keys))[rows]
        if dist.world_size() > 1:  # the world of a loss are the replicas
            keys = torch.cat(dist.gather(keys))
        heat = self.hparams.temperature
        return 2 * heat * F.cross_entropy(queries @ keys.T / heat, labels)

    def loss(self, student_out, teacher_out, target, rows):
        pairs = zip(student_out, reversed(teacher_out), strict=True)
        loss = sum(self.contrast(queries, keys, rows) for queries, keys in pairs)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            self.student.parameters(), self.hparams.lr, weight_decay=self.hparams.weight_decay
        )
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [{"scheduler": CosineWarmupScheduler(optimizer, steps // 10, steps), "interval": "step"}]


def augmented(x):
    """Each image turned, scaled, sheared and shifted by chance, with noise. Shape: [rows, 1, 8, 8]."""
    angle, scale = (torch.rand(len(x)) - 0.5) * math.radians(20), 1 + 0.2 * (torch.rand(len(x)) - 0.5)
    shift, shear = (torch.rand(len(x), 2) - 0.5) * 0.4, (torch.rand(len(x)) - 0.5) * 0.4
    top = torch.stack([scale * angle.cos(), -scale * angle.sin() + shear, shift[:, 0]], 1)
    bottom = torch.stack([scale * angle.sin(), scale * angle.cos(), shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False) + 0.15 * torch.randn(x.shape)


def two_views(images):
    x = torch.stack(images)
    return augmented(x), augmented(x)


class Digits(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        digits = load_digits()
        x, y = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
        self.x, self.test_x, y, self.test_y = train_test_split(x, y, test_size=500, random_state=0, stratify=y)
        _, known = train_test_split(torch.arange(len(y)), test_size=LABELS, random_state=0, stratify=y)
        self.known = self.x[known], y[known]

    def train_dataloader(self):
        return DataLoader(list(self.x), 64, shuffle=True, drop_last=True, collate_fn=two_views)

    @torch.no_grad()
    def neighbour_accuracy(self, encoder):
        """Share of the test images whose 5 nearest labelled neighbours, by cosine, vote for the right class."""
        encoder, (x, y) = copy.deepcopy(encoder).eval(), self.known
        voters = KNeighborsClassifier(5, metric="cosine", weights="distance").fit(encoder(x).numpy(), y)
        return voters.score(encoder(self.test_x).numpy(), self.test_y)


def main(
    strategy: str = "tspipe", microbatches: int = 2, delay: int | None = None, seed: int = 0, epochs: int = 30,
    momentum: float = 0.95,
):  # fmt: skip
    torch.set_num_threads(1)  # so that one process is one core
    L.seed_everything(seed, verbose=False)
    data = Digits()
    module = MoCo(momentum=momentum, steps=epochs * len(data.train_dataloader()), teacher_delay=delay)
    before = data.neighbour_accuracy(module.student[0][0])
    trainer = L.Trainer(
        accelerator="cpu", devices=1 if strategy == "auto" else 2, max_epochs=epochs, logger=False,
        strategy=TSPipeStrategy(microbatches=microbatches) if strategy == "tspipe" else strategy,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    L.seed_everything(seed, verbose=False)  # so that all strategies see the same batches
    trainer.fit(module, data)
    if trainer.is_global_zero:
        after = data.neighbour_accuracy(module.student[0][0])
        print(f"nearest neighbours' accuracy on {len(data.test_y)} images   before {before:.4f}   after {after:.4f}")
        print(f"loss {trainer.callback_metrics['loss']:.4f} after {trainer.global_step} steps of {strategy}")


if __name__ == "__main__":
    auto_cli(main)

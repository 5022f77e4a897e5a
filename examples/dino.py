"""DINO with multi-crop on Fashion-MNIST, pipelined over two processes: python examples/dino.py.

Two large crops of each image go through a student and a momentum teacher, and four small ones, of another size, through
the student alone, which learns to say of each crop what the teacher says of another one. The teacher's answers are
centered and sharpened. No label is used: they come in at the end, when the nearest neighbours of each test image among
1000 labelled ones vote on its class, by the features of the teacher before and after the training.
Method: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021,
https://arxiv.org/abs/2104.14294. The loss, the projection head and the schedule of the momentum are lightly's.
"""

import copy
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FashionMNIST

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy  # the import registers "tspipe"

LABELS, LARGE, SMALL = 1000, 20, 12  # labelled images; pixels of a crop's side


def convnet(width: int, features: int) -> nn.Sequential:
    """An encoder for images of any size."""
    layers, inputs = [], 1
    for channels, stride in ((width, 2), (2 * width, 1), (4 * width, 2)):
        layers += [nn.Conv2d(inputs, channels, 3, stride, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        inputs = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, features))


class DINO(TeacherStudentModule):
    def __init__(
        self, encoder: nn.Module | None = None, features: int = 64, hidden: int = 128, bottleneck: int = 32,
        outputs: int = 256, batch_norm: bool = True, momentum: float = 0.98, lr: float = 2e-3,
        warmup_epochs: int = 3, teacher_delay: int | None = None,
    ):  # fmt: skip
        super().__init__(momentum, teacher_delay)
        self.save_hyperparameters(ignore="encoder")
        encoder = encoder or convnet(12, features)
        head = partial(DINOProjectionHead, features, hidden, bottleneck, outputs, batch_norm=batch_norm)
        self.student, self.teacher = nn.Sequential(encoder, head()), nn.Sequential(copy.deepcopy(encoder), head())
        self.teacher.load_state_dict(self.student.state_dict())
        self.criterion = DINOLoss(outputs, 0.07, 0.04, warmup_teacher_temp_epochs=warmup_epochs)

    def on_train_batch_start(self, batch, batch_idx):  # the momentum of the step that begins
        step, steps = self.trainer.global_step, self.trainer.estimated_stepping_batches
        self.momentum = cosine_schedule(step, steps, self.hparams.momentum, 1.0)

    def student_input(self, batch):  # lists: each view by itself through the networks
        return list(batch)

    def teacher_input(self, batch):
        return list(batch[:2])

    def target(self, batch):
        return None

    def loss(self, student_out, teacher_out, target):
        loss = self.criterion(teacher_out, student_out, epoch=self.current_epoch)  # the temperature is the epoch's
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        parameters = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.hparams.lr, weight_decay=0.04)
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [{"scheduler": CosineWarmupScheduler(optimizer, steps // 10, steps), "interval": "step"}]


def crops(x, size, smallest, largest):
    """A square of each image, of a share of its side that is drawn by chance, maybe flipped. [rows, 1, size, size]"""
    share = smallest + (largest - smallest) * torch.rand(len(x))
    shift, flip = (2 * torch.rand(len(x), 2) - 1) * (1 - share)[:, None], 1 - 2 * torch.randint(2, (len(x),))
    zero = torch.zeros(len(x))
    top, bottom = torch.stack([share * flip, zero, shift[:, 0]], 1), torch.stack([zero, share, shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), [len(x), 1, size, size], align_corners=False)
    light = 0.6 + 0.8 * torch.rand(len(x), 1, 1, 1)
    return light * F.grid_sample(x, grid, align_corners=False) + 0.05 * torch.randn(len(x), 1, size, size)


def multi_crop(images):
    x = torch.stack(images)
    return [crops(x, LARGE, 0.7, 1.0) for _ in range(2)] + [crops(x, SMALL, 0.4, 0.7) for _ in range(4)]


class Fashion(L.LightningDataModule):
    """4000 images from the file beside this one, or all of them from a folder of torchvision's."""

    def __init__(self, folder: str | None = None):
        super().__init__()
        if folder:
            x, test_x = (FashionMNIST(folder, train, download=True).data for train in (True, False))
            y, test_y = (FashionMNIST(folder, train).targets for train in (True, False))
        else:
            with np.load(Path(__file__).parent / "data/fashion.npz") as file:
                x, y, test_x, test_y = (torch.from_numpy(file[name]) for name in ("x", "y", "test_x", "test_y"))
        self.x, self.test_x, self.y, self.test_y = x[:, None] / 255, test_x[:, None] / 255, y, test_y

    def train_dataloader(self):
        return DataLoader(list(self.x), 100, shuffle=True, drop_last=True, collate_fn=multi_crop)

    @torch.no_grad()
    def neighbour_accuracy(self, encoder):
        """Share of the test images whose 10 nearest labelled neighbours, by cosine, vote for the right class."""
        encoder = copy.deepcopy(encoder).eval()
        known, asked = (encoder(F.interpolate(x, LARGE)).numpy() for x in (self.x[:LABELS], self.test_x))
        voters = KNeighborsClassifier(10, metric="cosine", weights="distance").fit(known, self.y[:LABELS])
        return voters.score(asked, self.test_y)


def main(
    strategy: str = "tspipe", microbatches: int = 2, delay: int | None = None, seed: int = 0, epochs: int = 12,
    momentum: float = 0.98, folder: str | None = None,
):  # fmt: skip
    torch.set_num_threads(1)  # so that one process is one core
    L.seed_everything(seed, verbose=False)
    module, data = DINO(momentum=momentum, teacher_delay=delay), Fashion(folder)
    before = data.neighbour_accuracy(module.teacher[0])
    trainer = L.Trainer(
        accelerator="cpu", devices=1 if strategy == "auto" else 2, max_epochs=epochs, logger=False,
        strategy=TSPipeStrategy(microbatches=microbatches) if strategy == "tspipe" else strategy,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    L.seed_everything(seed, verbose=False)  # so that all strategies see the same batches
    trainer.fit(module, data)
    if trainer.is_global_zero:
        after = data.neighbour_accuracy(module.teacher[0])
        print(f"nearest neighbours' accuracy on {len(data.test_y)} images   before {before:.4f}   after {after:.4f}")
        print(f"loss {trainer.callback_metrics['loss']:.4f} after {trainer.global_step} steps of {strategy}")


if __name__ == "__main__":
    auto_cli(main)

"""Mean Teacher on Fashion-MNIST, pipelined over two processes: python examples/mean_teacher.py.

Of 3000 images 100 have a label. The student learns these, and to agree with a momentum teacher on all images, each of
which both see with noise of their own; the weight of that grows over the first third of the training. `--weight 0`
trains on the labels alone. What is reported is the teacher's accuracy.
Method: Tarvainen, Valpola, "Mean teachers are better role models", NeurIPS 2017, https://arxiv.org/abs/1703.01780.
"""

import copy
import math
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.datasets import FashionMNIST

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy  # the import registers "tspipe"

LABELS, UNKNOWN = 100, -1


def convnet(width: int) -> nn.Sequential:
    layers, inputs = [], 1
    for outputs in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(16 * inputs, 10))


class MeanTeacher(TeacherStudentModule):
    def __init__(self, width: int = 16, weight: float = 10.0, momentum: float = 0.99, teacher_delay: int | None = None):
        super().__init__(momentum=momentum, teacher_delay=teacher_delay)
        self.save_hyperparameters()
        self.student = convnet(width)
        self.teacher = copy.deepcopy(self.student)

    def student_input(self, batch):  # (the student's view, the teacher's view, labels)
        return batch[0]

    def teacher_input(self, batch):
        return batch[1]

    def target(self, batch):
        return batch[2]

    def loss(self, student_out, teacher_out, target):
        progress = self.trainer.global_step / (0.3 * self.trainer.estimated_stepping_batches)
        weight = self.hparams.weight * math.exp(-5 * (1 - min(progress, 1)) ** 2)  # the paper's ramp-up
        known = F.cross_entropy(student_out, target, ignore_index=UNKNOWN)
        agreement = F.mse_loss(student_out.softmax(1), teacher_out.softmax(1))
        self.log_dict({"known": known, "agreement": agreement, "weight": weight})
        return known + weight * agreement

    def validation_step(self, batch, batch_idx):  # in a pipeline, self.teacher(...) runs through all stages here
        self.log("accuracy", (self.teacher(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.student.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def augmented(images):
    """Each image flipped and shifted by up to 2 pixels, by chance. Shape: [rows, 1, 28, 28]."""
    flips, corners = torch.rand(len(images)) < 0.5, torch.randint(5, (len(images), 2))
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    pairs = zip(F.pad(images, [2] * 4), corners.tolist(), strict=True)
    return torch.stack([image[:, i : i + 28, j : j + 28] for image, (i, j) in pairs])


def two_views(samples):
    x, y = default_collate(samples)
    return augmented(x), augmented(x), y


class Fashion(L.LightningDataModule):
    """4000 images from the file beside this one, or all of them from a folder of torchvision's."""

    def __init__(self, folder: str | None = None, labels: int = LABELS):
        super().__init__()
        if folder:
            x, test_x = (FashionMNIST(folder, train, download=True).data for train in (True, False))
            y, test_y = (FashionMNIST(folder, train).targets for train in (True, False))
        else:
            with np.load(Path(__file__).parent / "data/fashion.npz") as file:
                x, y, test_x, test_y = (torch.from_numpy(file[name]) for name in ("x", "y", "test_x", "test_y"))
        known = torch.cat([(y == label).nonzero()[: labels // 10, 0] for label in range(10)])
        some_y = torch.full(y.shape, UNKNOWN).index_copy(0, known, y[known].long())
        self.train = TensorDataset(x[:, None] / 255, some_y)
        self.test = TensorDataset(test_x[:, None] / 255, test_y.long())
        self.share = torch.where(some_y == UNKNOWN, 0.75 / (len(y) - labels), 0.25 / labels)  # a quarter has labels

    def train_dataloader(self):
        sampler = torch.utils.data.WeightedRandomSampler(self.share, len(self.train))
        return DataLoader(self.train, 100, sampler=sampler, drop_last=True, collate_fn=two_views)

    def val_dataloader(self):
        return DataLoader(self.test, 500)


def main(
    strategy: str = "tspipe", microbatches: int = 2, delay: int | None = None, seed: int = 0, epochs: int = 20,
    weight: float = 10.0, momentum: float = 0.99, folder: str | None = None,
):  # fmt: skip
    torch.set_num_threads(1)  # so that one process is one core
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=1 if strategy == "auto" else 2, max_epochs=epochs, logger=False,
        strategy=TSPipeStrategy(microbatches=microbatches) if strategy == "tspipe" else strategy,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    module, data = MeanTeacher(weight=weight, momentum=momentum, teacher_delay=delay), Fashion(folder)
    L.seed_everything(seed, verbose=False)  # so that all strategies see the same batches
    trainer.fit(module, data)
    if trainer.is_global_zero:
        accuracy = trainer.callback_metrics["accuracy"]
        print(f"test accuracy {accuracy:.4f} after {trainer.global_step} steps of {strategy}")


if __name__ == "__main__":
    auto_cli(main)

"""Knowledge distillation on handwritten digits, pipelined over two processes: python examples/distill_digits.py.

A convolutional teacher learns from 1297 images with their labels. A student of a quarter of its weights then gets the
same images with the teacher's outputs, and labels for 50 of them. Everyone sees the images shifted by up to a pixel.
`--soft 0` leaves the teacher out. What the pipeline gains is shown by demo.py.
Method: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", https://arxiv.org/abs/1503.02531.
"""

import os

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy  # the import registers "tspipe"

LABELS, UNKNOWN = 50, -1


def convnet(width: int, depth: int) -> nn.Sequential:
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


class Distill(TeacherStudentModule):
    def __init__(
        self, teacher: nn.Module | None = None, student: nn.Module | None = None, soft: float = 1.0,
        lr: float = 1e-2, weights: str | None = None,
    ):  # fmt: skip
        super().__init__()  # momentum=None: the teacher is frozen
        self.save_hyperparameters(ignore=["teacher", "student"])
        self.teacher, self.student = teacher or convnet(32, 2), student or convnet(16, 2)
        if weights:
            self.teacher.load_state_dict(torch.load(weights, weights_only=True))

    def loss(self, student_out, teacher_out, target):
        heat = 2.0
        soft = F.kl_div(F.log_softmax(student_out / heat, 1), F.softmax(teacher_out / heat, 1), reduction="batchmean")
        hard = F.cross_entropy(student_out, target, ignore_index=UNKNOWN, reduction="sum") / len(target)
        loss = self.hparams.soft * heat**2 * soft + hard
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):  # in a pipeline, self.student(...) runs through all stages here
        self.log("accuracy", (self.student(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.student.parameters())
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Digits(L.LightningDataModule):
    def __init__(self, rows: int = 128):
        super().__init__()
        digits = load_digits()
        x, y = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
        x, test_x, y, test_y = train_test_split(x, y, test_size=500, random_state=0, stratify=y)
        _, self.known = train_test_split(torch.arange(len(y)), test_size=LABELS, random_state=0, stratify=y)
        some_y = torch.full_like(y, UNKNOWN).index_copy(0, self.known, y[self.known])
        self.full, self.some, self.test = TensorDataset(x, y), TensorDataset(x, some_y), TensorDataset(test_x, test_y)
        self.rows = rows

    def shifted(self, dataset, rows):
        random = torch.Generator().manual_seed(0)  # every run sees the same batches, shifted alike

        def collate(samples):
            x, y = default_collate(samples)
            corners = torch.randint(3, (len(x), 2), generator=random).tolist()
            pairs = zip(F.pad(x, [1] * 4), corners, strict=True)
            return torch.stack([image[:, i : i + 8, j : j + 8] for image, (i, j) in pairs]), y

        return DataLoader(dataset, rows, shuffle=True, drop_last=True, generator=random, collate_fn=collate)

    def train_dataloader(self):
        return self.shifted(self.some, self.rows)

    def val_dataloader(self):
        return DataLoader(self.test, len(self.test))


def train_teacher(teacher, loader, epochs=8):
    optimizer = torch.optim.Adam(teacher.parameters(), lr=5e-3)
    teacher.requires_grad_(True)
    for _ in range(epochs):
        for x, y in loader:
            F.cross_entropy(teacher(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    teacher.requires_grad_(False)


def main(
    strategy: str = "tspipe", microbatches: int = 2, seed: int = 0, epochs: int = 16, soft: float = 1.0,
    precision: str = "32-true",
):  # fmt: skip
    torch.set_num_threads(1)  # so that one process is one core
    L.seed_everything(seed, verbose=False)
    module, data = Distill(soft=soft), Digits()
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # "tspipe" starts this script again, and shares rank 0's weights
        train_teacher(module.teacher, data.shifted(data.full, 64))
    trainer = L.Trainer(
        accelerator="cpu", devices=1 if strategy == "auto" else 2, max_epochs=epochs, precision=precision,
        strategy=TSPipeStrategy(microbatches=microbatches) if strategy == "tspipe" else strategy,
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, data)
    if trainer.is_global_zero:
        x, y = data.test.tensors
        teacher = (module.teacher(x.to(module.dtype)).argmax(1) == y).float().mean()
        print(f"test accuracy of {len(y)} images   teacher {teacher:.4f}", end="   ")
        print(f"student {trainer.callback_metrics['accuracy']:.4f}   loss {trainer.callback_metrics['loss']:.8f}")


if __name__ == "__main__":
    auto_cli(main)

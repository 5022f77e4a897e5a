"""Feature distillation on handwritten digits, pipelined over two processes: python examples/feature_digits.py.

A deep, thin student of 15 convolutions of width 8 has the teacher's outputs, and in its middle a hint of what the
teacher's features are there and, in three places, where the teacher looks. By the outputs alone it learns less, or
nothing: `--hint 0 --attention 0` shows that. It sees no label.
Methods: Romero et al., "FitNets", ICLR 2015, https://arxiv.org/abs/1412.6550, and Zagoruyko, Komodakis, "Paying more
attention to attention", ICLR 2017, https://arxiv.org/abs/1612.03928.
"""

import os
from collections import OrderedDict

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy  # the import registers "tspipe"

GROUPS = ("low", "middle", "high")


def convnet(width: int, depth: int) -> nn.Sequential:
    """Three groups of convolutions, and a classifier."""
    layers, inputs = OrderedDict(), 1
    for name in GROUPS:
        convolutions = []
        for _ in range(depth):
            convolutions += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers[name] = nn.Sequential(*convolutions)
    return nn.Sequential(
        layers | {"pool": nn.AdaptiveMaxPool2d(2), "flat": nn.Flatten(), "classify": nn.Linear(4 * width, 10)}
    )


def attention(features):  # where a layer looks: [rows, channels, height, width] -> [rows, height * width]
    return F.normalize(features.square().mean(1).flatten(1))


class FeatureDistill(TeacherStudentModule):
    student_taps = teacher_taps = GROUPS  # what these submodules return, `loss` gets

    def __init__(
        self, depth: int = 5, hint: float = 1.0, attention: float = 1.0, lr: float = 5e-3, weights: str | None = None
    ):
        super().__init__()  # momentum=None: the teacher is frozen
        self.save_hyperparameters()
        self.teacher, self.student = convnet(24, 1), convnet(8, depth)
        if weights:
            self.teacher.load_state_dict(torch.load(weights, weights_only=True))
        self.regressor = nn.Conv2d(8, 24, 1)  # of the hint; it belongs to the loss, so it is trained where that is made

    def loss(self, student_out, teacher_out, target, student_taps, teacher_taps):
        heat, weight = 2.0, self.hparams
        soft = F.kl_div(F.log_softmax(student_out / heat, 1), F.softmax(teacher_out / heat, 1), reduction="batchmean")
        hint = F.mse_loss(self.regressor(student_taps["middle"]), teacher_taps["middle"])
        pairs = [(attention(student_taps[name]), attention(teacher_taps[name])) for name in GROUPS]
        looks = sum((ours - theirs).square().sum(1).mean() for ours, theirs in pairs)
        self.log_dict({"soft": soft, "hint": hint, "attention": looks})
        return heat**2 * soft + weight.hint * hint + weight.attention * looks

    def validation_step(self, batch, batch_idx):  # in a pipeline, self.student(...) runs through all stages here
        self.log("accuracy", (self.student(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        parameters = [*self.student.parameters(), *self.regressor.parameters()]
        return torch.optim.Adam(parameters, lr=self.hparams.lr)


class Digits(L.LightningDataModule):
    def __init__(self):
        super().__init__()
        digits = load_digits()
        x, y = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
        x, test_x, y, test_y = train_test_split(x, y, test_size=500, random_state=0, stratify=y)
        self.known, self.unknown = TensorDataset(x, y), TensorDataset(test_x, test_y)

    def train_dataloader(self):
        return DataLoader(self.known, 64, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.unknown, 500)


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
    strategy: str = "tspipe", microbatches: int = 2, seed: int = 0, epochs: int = 10,
    hint: float = 1.0, attention: float = 1.0, precision: str = "32-true",
):  # fmt: skip
    torch.set_num_threads(1)  # so that one process is one core
    L.seed_everything(seed, verbose=False)
    module, data = FeatureDistill(hint=hint, attention=attention), Digits()
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # "tspipe" starts this script again, and shares rank 0's weights
        train_teacher(module.teacher, data.train_dataloader())
    L.seed_everything(seed, verbose=False)  # so that all strategies see the same batches
    trainer = L.Trainer(
        accelerator="cpu", devices=1 if strategy == "auto" else 2, max_epochs=epochs, precision=precision,
        strategy=TSPipeStrategy(microbatches=microbatches) if strategy == "tspipe" else strategy,
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, data)
    if trainer.is_global_zero:
        x, y = data.unknown.tensors
        teacher = (module.teacher(x.to(module.dtype)).argmax(1) == y).float().mean()
        print(f"test accuracy of {len(y)} images   teacher {teacher:.4f}   student", end="")
        print(f" {trainer.callback_metrics['accuracy']:.4f} after {trainer.global_step} steps of {strategy}")


if __name__ == "__main__":
    auto_cli(main)

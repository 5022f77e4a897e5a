"""Knowledge distillation on handwritten digits, pipelined over two processes: python examples/distill_digits.py.

A convolutional teacher is trained first. A much smaller student then learns from it under ``strategy="tspipe"`` and, to
compare, under ``strategy="auto"`` (the sequential twin: same class, same batches, one process) and without a teacher.
Method: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", https://arxiv.org/abs/1503.02531.
"""

import argparse
import logging
import os
import time
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tspipe import TeacherStudentModule  # the import registers "tspipe"
from lightning_tspipe.simulate import draw, timeline

DROPPED = 5  # first steps, left out of all timings


def convnet(width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


class Distill(TeacherStudentModule):
    def __init__(self, teacher: nn.Module, student: nn.Module):
        super().__init__()  # momentum=None: the teacher is frozen
        self.teacher, self.student = teacher, student

    def loss(self, student_out, teacher_out, target):
        heat = 4.0
        soft = F.kl_div(F.log_softmax(student_out / heat, 1), F.softmax(teacher_out / heat, 1), reduction="batchmean")
        return 0.9 * heat**2 * soft + 0.1 * F.cross_entropy(student_out, target)

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=2e-3)

    def test_step(self, batch, batch_idx):  # self.student(...) runs through all stages here
        self.log("accuracy", (self.student(batch[0]).argmax(1) == batch[1]).float().mean())


class Classify(L.LightningModule):
    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.student(batch[0]), batch[1])

    configure_optimizers, test_step = Distill.configure_optimizers, Distill.test_step


class Stopwatch(L.Callback):
    """Step time and, in a pipeline, utilization of the steady steps, and the schedule."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == DROPPED:
            self.start, self.busy = time.perf_counter(), busy(trainer)

    def on_train_end(self, trainer, _):
        seconds = time.perf_counter() - self.start
        self.step = seconds / (trainer.global_step - DROPPED)
        if trainer.world_size > 1:
            shares = [trainer.strategy.broadcast((busy(trainer) - self.busy) / seconds, src=rank) for rank in range(2)]
            self.utilization, self.plan = sum(shares) / len(shares), trainer.strategy.plan
            self.costs = trainer.strategy.costs


def busy(trainer: L.Trainer) -> float:
    return sum(getattr(trainer.strategy, "busy", {}).values())


def run(module, data, epochs, strategy="auto", devices=1):
    """Train, test, and return the trainer, the accuracy and the stopwatch."""
    watch = Stopwatch()
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=epochs, callbacks=[watch], logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    train, test = data
    order = torch.Generator().manual_seed(0)  # every run sees the same batches
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True, drop_last=True, generator=order))
    (result,) = trainer.test(module, DataLoader(test, batch_size=len(test)), verbose=False)
    return trainer, result["accuracy"], watch


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="of the students")
    parser.add_argument("--teacher-epochs", type=int, default=10)
    parser.add_argument("--teacher-width", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that one process is one core
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    digits = load_digits()
    x, y = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=500, random_state=0, stratify=y)
    data = TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)

    def student():
        L.seed_everything(1, verbose=False)
        return convnet(8, 1)

    L.seed_everything(0, verbose=False)
    teacher = convnet(options.teacher_width, 4)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # "tspipe" starts this script again, and shares rank 0's weights
        _, teacher_accuracy, _ = run(Classify(teacher), data, options.teacher_epochs)

    trainer, distilled, pipeline = run(Distill(teacher, student()), data, options.epochs, "tspipe", devices=2)
    if not trainer.is_global_zero:
        return
    _, _, twin = run(Distill(teacher, student()), data, options.epochs)
    _, plain, _ = run(Classify(student()), data, options.epochs)
    print(f"test accuracy    teacher {teacher_accuracy:.3f}   distilled {distilled:.3f}   plain {plain:.3f}")
    ours, other = pipeline.step, twin.step
    print(f"step time        pipeline {ours * 1e3:.1f} ms over 2 processes   twin {other * 1e3:.1f} ms in one")
    print(f"speed-up         {other / ours:.2f} over the sequential twin")
    print(f"utilization      {pipeline.utilization:.2f} of the ranks' time is spent in T, F and B")
    print(f"\nschedule of a step (a prime marks the next batch)\n{pipeline.plan}")
    print(f"\nas planned, from an estimate by parameter counts\n{draw(timeline(pipeline.plan, pipeline.costs))}")


if __name__ == "__main__":
    main()

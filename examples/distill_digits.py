"""Knowledge distillation on handwritten digits, pipelined over two processes: python examples/distill_digits.py.

A convolutional teacher learns from 1297 images with their labels. A student of a 28th of its weights then gets the
same images with the teacher's outputs, and labels for 50 of them; to compare, the same student learns from these 50
alone, in as many steps, from the same weights. Everyone sees the images shifted by up to a pixel. So the teacher stands
in for missing labels: given all of them, this student does as well by itself.
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
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy  # the import registers "tspipe"
from lightning_tspipe.simulate import draw, timeline

LABELS, UNKNOWN = 50, -1
DROPPED = 5  # first steps, left out of all timings


def convnet(width, depth):
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


class Classify(L.LightningModule):
    def __init__(self, student, lr=1e-2):
        super().__init__()
        self.student, self.lr = student, lr

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.student(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.student.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def test_step(self, batch, batch_idx):  # in a pipeline, self.student(...) runs through all stages here
        self.log("accuracy", (self.student(batch[0]).argmax(1) == batch[1]).float().mean())


class Distill(TeacherStudentModule):
    def __init__(self, teacher, student):
        super().__init__()  # momentum=None: the teacher is frozen
        self.teacher, self.student, self.lr = teacher, student, 1e-2

    def loss(self, student_out, teacher_out, target):
        heat = 2.0
        soft = F.kl_div(F.log_softmax(student_out / heat, 1), F.softmax(teacher_out / heat, 1), reduction="batchmean")
        hard = F.cross_entropy(student_out, target, ignore_index=UNKNOWN, reduction="sum") / len(target)
        return heat**2 * soft + hard

    configure_optimizers, test_step = Classify.configure_optimizers, Classify.test_step


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


def busy(trainer):
    return sum(getattr(trainer.strategy, "busy", {}).values())


def run(module, train, test, epochs, rows, strategy="auto"):
    """Train, test, and return the trainer, the accuracy and the stopwatch."""
    random = torch.Generator().manual_seed(0)  # every run sees the same batches, shifted alike

    def shifted(samples):
        x, y = default_collate(samples)
        corners = torch.randint(3, (len(x), 2), generator=random).tolist()
        pairs = zip(F.pad(x, [1] * 4), corners, strict=True)
        return torch.stack([image[:, i : i + 8, j : j + 8] for image, (i, j) in pairs]), y

    watch = Stopwatch()
    trainer = L.Trainer(
        accelerator="cpu", devices=1 if strategy == "auto" else 2, max_epochs=epochs,
        strategy=TSPipeStrategy(microbatches=2) if strategy == "tspipe" else strategy,  # "auto" may differ between runs
        callbacks=[watch], logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, rows, shuffle=True, drop_last=True, generator=random, collate_fn=shifted))
    (result,) = trainer.test(module, DataLoader(test, batch_size=len(test)), verbose=False)
    return trainer, result["accuracy"], watch


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", default="tspipe", help="of the distillation: tspipe (two processes), auto (one)")
    parser.add_argument("--small", action="store_true", help="a smaller teacher and less training")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    options = parser.parse_args()
    size, teacher_epochs, epochs, rows = ((32, 2), 6, 6, 64) if options.small else ((64, 4), 10, 16, 128)
    torch.set_num_threads(1)  # so that one process is one core
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    digits = load_digits()
    x, y = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
    x, test_x, y, test_y = train_test_split(x, y, test_size=500, random_state=0, stratify=y)
    _, known = train_test_split(torch.arange(len(y)), test_size=LABELS, random_state=0, stratify=y)
    some_y = torch.full_like(y, UNKNOWN).index_copy(0, known, y[known])
    repeated = known[torch.arange(len(y)) % LABELS]  # as many images per epoch as the other student gets
    full, some, alone = TensorDataset(x, y), TensorDataset(x, some_y), TensorDataset(x[repeated], y[repeated])
    test = TensorDataset(test_x, test_y)

    def student():
        L.seed_everything(options.seed + 1, verbose=False)
        return convnet(16, 2)

    L.seed_everything(options.seed, verbose=False)
    teacher = convnet(*size)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # "tspipe" starts this script again, and shares rank 0's weights
        _, teacher_accuracy, _ = run(Classify(teacher, lr=5e-3), full, test, teacher_epochs, rows=64)

    trainer, distilled, ours = run(Distill(teacher, student()), some, test, epochs, rows, options.strategy)
    if not trainer.is_global_zero:
        return
    _, plain, _ = run(Classify(student()), alone, test, epochs, rows)
    print(f"test accuracy    teacher {teacher_accuracy:.3f}   distilled {distilled:.3f}   plain {plain:.3f}")
    if options.strategy == "auto":
        return
    _, same, twin = run(Distill(teacher, student()), some, test, epochs, rows)
    print(f"                 distilled by the sequential twin {same:.3f}")
    print(f"step time        pipeline {ours.step * 1e3:.1f} ms over 2 processes   twin {twin.step * 1e3:.1f} ms in one")
    print(f"speed-up         {twin.step / ours.step:.2f} over the sequential twin")
    print(f"utilization      {ours.utilization:.2f} of the ranks' time is spent in T, F and B")
    print(f"\nschedule of a step (a prime marks the next batch)\n{ours.plan}")
    print(f"\nas planned, from the measured costs\n{draw(timeline(ours.plan, ours.costs))}")


if __name__ == "__main__":
    main()

"""What `make demo` runs: the distillation of distill_digits.py in the pipeline, and what it is compared with.

The sequential twin is the same distillation in one process. The plain student learns from the 50 labelled images alone,
in as many steps, from the same weights. So the teacher stands in for missing labels: given all of them, this student
does as well by itself.
"""

import logging
import os
import time
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from distill_digits import LABELS, Digits, Distill, convnet
from jsonargparse import auto_cli
from torch.utils.data import TensorDataset

from lightning_tspipe import TSPipeStrategy
from lightning_tspipe.simulate import draw, timeline

DROPPED = 5  # first steps, left out of all timings


class Classify(L.LightningModule):
    def __init__(self, student, lr=1e-2):
        super().__init__()
        self.student = student
        self.save_hyperparameters("lr")

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.student(batch[0]), batch[1])

    configure_optimizers, validation_step = Distill.configure_optimizers, Distill.validation_step


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


def run(module, train, test, epochs, strategy="auto"):
    """Train, test, and return the trainer, the accuracy and the stopwatch."""
    watch = Stopwatch()
    trainer = L.Trainer(
        accelerator="cpu", devices=1 if strategy == "auto" else 2, max_epochs=epochs,
        strategy=TSPipeStrategy(microbatches=2) if strategy == "tspipe" else strategy,  # "auto" may differ between runs
        callbacks=[watch], logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, train)
    (result,) = trainer.validate(module, test, verbose=False)
    return trainer, result["accuracy"], watch


def main(strategy: str = "tspipe", small: bool = False, seed: int = 0):
    (width, depth), teacher_epochs, epochs, rows = ((32, 2), 6, 6, 64) if small else ((64, 4), 10, 16, 128)
    torch.set_num_threads(1)  # so that one process is one core
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    L.seed_everything(seed, verbose=False)
    teacher, data = convnet(width, depth), Digits(rows)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # "tspipe" starts this script again, and shares rank 0's weights
        train = data.shifted(data.full, 64)
        _, teacher_accuracy, _ = run(Classify(teacher, lr=5e-3), train, data.val_dataloader(), teacher_epochs)

    def student():
        L.seed_everything(seed + 1, verbose=False)
        return convnet(16, 2)

    def distill(strategy):
        return run(Distill(teacher, student()), data.train_dataloader(), data.val_dataloader(), epochs, strategy)

    trainer, distilled, ours = distill(strategy)
    if not trainer.is_global_zero:
        return
    x, y = data.full.tensors
    repeated = data.known[torch.arange(len(y)) % LABELS]  # as many images per epoch as the other student gets
    alone = TensorDataset(x[repeated], y[repeated])
    _, plain, _ = run(Classify(student()), data.shifted(alone, rows), data.val_dataloader(), epochs)
    print(f"test accuracy    teacher {teacher_accuracy:.3f}   distilled {distilled:.3f}   plain {plain:.3f}")
    if strategy == "auto":
        return
    _, same, twin = distill("auto")
    print(f"                 distilled by the sequential twin {same:.3f}")
    print(f"step time        pipeline {ours.step * 1e3:.1f} ms over 2 processes   twin {twin.step * 1e3:.1f} ms in one")
    print(f"speed-up         {twin.step / ours.step:.2f} over the sequential twin")
    print(f"utilization      {ours.utilization:.2f} of the ranks' time is spent in T, F and B")
    print(f"\nschedule of a step (a prime marks the next batch)\n{ours.plan}")
    print(f"\nas planned, from the measured costs\n{draw(timeline(ours.plan, ours.costs))}")


if __name__ == "__main__":
    auto_cli(main)

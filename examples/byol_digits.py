"""BYOL on handwritten digits, pipelined over two processes: python examples/byol_digits.py.

Two augmented views of each image go through a student and a momentum teacher; the student learns to predict what the
teacher makes of the other view. No label is used: they come in at the end, when the nearest neighbours of each test
image among 100 labelled ones vote on its class, by the features of the encoder before and after the training.
Method: Grill et al., "Bootstrap your own latent", NeurIPS 2020, https://arxiv.org/abs/2006.07733.
"""

import argparse
import copy
import logging
import math
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import DataLoader

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy, cosine_momentum

LABELS = 100


def head(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class BYOL(TeacherStudentModule):
    def __init__(self, steps, width=32, features=64):
        super().__init__(momentum=cosine_momentum(0.95, 1.0, num_steps=steps))
        layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        for stride in (2, 1, 2):
            layers += [nn.Conv2d(width, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, features))
        projected = nn.Sequential(encoder, head(features, 128, 32))
        self.student = nn.Sequential(projected, head(32, 128, 32))  # the second head is BYOL's predictor
        self.teacher = copy.deepcopy(projected)

    @property
    def encoder(self):
        return self.student[0][0]

    def ema_source(self):  # the teacher has no predictor
        return self.student[0]

    def student_input(self, batch):  # a list: two views, each by itself through the networks
        return [batch[0], batch[1]]

    def target(self, batch):
        return None

    def loss(self, student_out, teacher_out, target):
        (first, second), (first_goal, second_goal) = student_out, teacher_out
        agreement = F.cosine_similarity(first, second_goal) + F.cosine_similarity(second, first_goal)
        loss = 2 - agreement.mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=2e-3, weight_decay=1e-4)


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


@torch.no_grad()
def neighbour_accuracy(encoder, x, y, test_x, test_y):
    """Share of the test images whose 5 nearest labelled neighbours, by cosine, vote for the right class."""
    training = encoder.training
    encoder.eval()
    voters = KNeighborsClassifier(5, metric="cosine", weights="distance").fit(encoder(x).numpy(), y)
    accuracy = voters.score(encoder(test_x).numpy(), test_y)
    encoder.train(training)
    return accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", default="tspipe", help="tspipe (two processes) or auto (one)")
    parser.add_argument("--microbatches", type=int, default=2, help="of tspipe; batch norms see each by itself")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the augmentation")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that one process is one core
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    digits = load_digits()
    x, y = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
    x, test_x, y, test_y = train_test_split(x, y, test_size=500, random_state=0, stratify=y)
    _, known = train_test_split(torch.arange(len(y)), test_size=LABELS, random_state=0, stratify=y)
    labelled = x[known], y[known], test_x, test_y

    L.seed_everything(options.seed, verbose=False)
    loader = DataLoader(list(x), batch_size=64, shuffle=True, drop_last=True, collate_fn=two_views)
    module = BYOL(steps=options.epochs * len(loader))
    before = neighbour_accuracy(module.encoder, *labelled)
    pipeline = options.strategy == "tspipe"
    trainer = L.Trainer(
        accelerator="cpu", devices=2 if pipeline else 1,
        strategy=TSPipeStrategy(microbatches=options.microbatches) if pipeline else options.strategy,
        max_epochs=options.epochs, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        after = neighbour_accuracy(module.encoder, *labelled)
        print(f"nearest neighbours' accuracy on {len(test_y)} images   before {before:.3f}   after {after:.3f}")
        print(f"loss {trainer.callback_metrics['loss']:.3f} after {trainer.global_step} steps of {options.strategy}")


if __name__ == "__main__":
    main()

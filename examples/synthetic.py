"""Random numbers in the shape of any data, to try a module and its settings without data: configs/full shows how."""

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset


class Samples(Dataset):
    def __init__(self, shapes, below, names, count):
        self.shapes, self.below, self.names, self.count = shapes, below or [0] * len(shapes), names, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(index)
        pairs = zip(self.shapes, self.below, strict=True)
        values = [torch.randint(n, s, generator=random) if n else torch.rand(s, generator=random) for s, n in pairs]
        return dict(zip(self.names, values, strict=True)) if self.names else values


class Synthetic(L.LightningDataModule):
    """Samples of several tensors.

    Args:
        shapes: of a sample's tensors; an empty one is a number.
        below: for each tensor 0 (real numbers from 0 to 1), or the integer below which its integers are.
        names: a sample is a dict with these keys, instead of a list.
        rows: of a batch.
        batches: of an epoch.
    """

    def __init__(
        self, shapes: list[list[int]], below: list[int] | None = None, names: list[str] | None = None, rows: int = 2,
        batches: int = 2,
    ):  # fmt: skip
        super().__init__()
        self.samples, self.rows = Samples(shapes, below, names, rows * batches), rows

    def train_dataloader(self):
        return DataLoader(self.samples, self.rows)

"""ImageNet, or any other folder with a folder of images for each class, as the methods here want it: configs/full."""

import lightning as L
from lightly.transforms import BYOLTransform, DINOTransform
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def without_labels(samples):
    return default_collate([views for views, _ in samples])


class ImageNet(L.LightningDataModule):
    """Images with labels, or views of them without.

    Args:
        folder: with the folders `train` and `val`.
        views: "one" and its label; "two" augmented as BYOL and MoCo v3 have it; "crops" of DINO, 2 large and 6 small.
        rows: of a batch.
        workers: processes that load.
    """

    def __init__(self, folder: str, views: str = "one", rows: int = 256, workers: int = 8):
        super().__init__()
        self.folder, self.views, self.rows, self.workers = folder, views, rows, workers

    def loader(self, part, transform, collate=None, **options):
        images = ImageFolder(f"{self.folder}/{part}", transform)
        return DataLoader(images, self.rows, num_workers=self.workers, collate_fn=collate, **options)

    def train_dataloader(self):
        training = {"shuffle": True, "drop_last": True}
        if self.views != "one":
            transform = BYOLTransform() if self.views == "two" else DINOTransform(n_local_views=6)
            return self.loader("train", transform, without_labels, **training)
        turned = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.ToTensor(), v2.Normalize(MEAN, SPREAD)]
        return self.loader("train", v2.Compose(turned), **training)

    def val_dataloader(self):
        if self.views != "one":
            return []
        middle = [v2.Resize(256), v2.CenterCrop(224), v2.ToTensor(), v2.Normalize(MEAN, SPREAD)]
        return self.loader("val", v2.Compose(middle))

"""MNIST and Fashion-MNIST, read by torchvision and given the shape of CIFAR, so that every net takes them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from model.data import DATASETS
from model.data.images import Images, Split
from model.data.vision import read_vision


@DATASETS.register("mnist")
def mnist(*, data_dir: str = "data", download: bool = True) -> Images:
    """60,000 training and 10,000 test handwritten digits of 28x28, black-padded to 32x32, in three equal channels.

    Mean and std are the customary ones, of the images before padding. The augmentation is `crop`: a mirrored digit
    is no digit.

    Args:
        data_dir: The folder that has or gets `MNIST/raw/`.
        download: Download what is missing (12 MB).

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998.

    Raises:
        InputError: The files are missing or damaged, and cannot be downloaded.
    """
    return _mnist("MNIST", data_dir, download, mean=0.1307, std=0.3081, augmentation="crop")


@DATASETS.register("fashion_mnist")
def fashion_mnist(*, data_dir: str = "data", download: bool = True) -> Images:
    """60,000 training and 10,000 test garments of 28x28, black-padded to 32x32, in three equal channels.

    Mean and std are the customary ones, of the images before padding. The augmentation is `crop_flip`: a mirrored
    garment is the same kind of garment.

    Args:
        data_dir: The folder that has or gets `FashionMNIST/raw/`.
        download: Download what is missing (31 MB).

    Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a novel image dataset", arXiv:1708.07747, 2017.

    Raises:
        InputError: The files are missing or damaged, and cannot be downloaded.
    """
    return _mnist("FashionMNIST", data_dir, download, mean=0.2860, std=0.3530, augmentation="crop_flip")


def _mnist(kind: str, data_dir: str, download: bool, mean: float, std: float, augmentation: str) -> Images:
    train, test, classes = read_vision(kind, data_dir, download)

    def split(images: torch.Tensor, labels: torch.Tensor) -> Split:
        return Split(F.pad(images, (2, 2, 2, 2))[:, None].repeat(1, 3, 1, 1), labels)  # (N, 28, 28) -> (N, 3, 32, 32)

    return Images(split(*train), None, split(*test), classes, (mean,) * 3, (std,) * 3, augmentation)

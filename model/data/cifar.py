"""CIFAR-10 and CIFAR-100, read by torchvision."""

from __future__ import annotations

import torch

from model.data import DATASETS
from model.data.images import Images, Split
from model.data.vision import read_vision


@DATASETS.register("cifar10")
def cifar10(*, data_dir: str = "data", download: bool = True) -> Images:
    """50,000 training and 10,000 test photographs of 32x32x3 in 10 classes.

    Args:
        data_dir: The folder that has or gets `cifar-10-batches-py/` (or `cifar-10-python.tar.gz`).
        download: Download what is missing (170 MB).

    Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

    Raises:
        InputError: The files are missing or damaged, and cannot be downloaded.
    """
    return _cifar("CIFAR10", data_dir, download, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.243, 0.261))


@DATASETS.register("cifar100")
def cifar100(*, data_dir: str = "data", download: bool = True) -> Images:
    """50,000 training and 10,000 test photographs of 32x32x3 in 100 classes.

    Args:
        data_dir: The folder that has or gets `cifar-100-python/` (or `cifar-100-python.tar.gz`).
        download: Download what is missing (169 MB).

    Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

    Raises:
        InputError: The files are missing or damaged, and cannot be downloaded.
    """
    return _cifar("CIFAR100", data_dir, download, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))


def _cifar(
    kind: str, data_dir: str, download: bool, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Images:
    train, test, classes = read_vision(kind, data_dir, download)

    def split(images: torch.Tensor, labels: torch.Tensor) -> Split:
        return Split(images.permute(0, 3, 1, 2).contiguous(), labels)  # (N, H, W, C) -> (N, C, H, W)

    return Images(split(*train), None, split(*test), classes, mean, std, augmentation="crop_flip")

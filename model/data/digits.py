"""Handwritten digits that come with scikit-learn: the dataset that needs no download."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.data import DATASETS
from model.data.images import Images, Split, divide_per_class, histogram, mean_and_std
from model.rng import derive_seed


@DATASETS.register("digits")
def digits() -> Images:
    """1,797 handwritten digits of 8x8 pixels, enlarged to 32x32x3; the test split is a fixed fifth of each class.

    Mirroring would make other signs of them, so their augmentation is `crop` (half a pixel to one pixel of the
    original).

    Source: Alpaydin, Kaynak, "Optical recognition of handwritten digits", UCI 1998, the part in scikit-learn.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    everything = Split(_enlarge(torch.from_numpy(bunch.images)), torch.from_numpy(bunch.target).long())
    test, train = divide_per_class(everything.labels, 0.2, derive_seed("digits", "test"))
    train_split = everything.select(train)
    mean, std = mean_and_std(histogram(train_split.images))
    return Images(
        train=train_split,
        val=None,
        test=everything.select(test),
        classes=tuple(str(name) for name in bunch.target_names),
        mean=mean,
        std=std,
        augmentation="crop",
    )


def _enlarge(images: Tensor) -> Tensor:
    """Returns `(N, 8, 8)` images of values 0..16 as `(N, 3, 32, 32)` uint8."""
    # The weights of a fourfold bilinear enlargement are multiples of 1/64, so float32 holds every step exactly
    # and the rounding is the same on every machine.
    grey = F.interpolate(images[:, None].float(), scale_factor=4, mode="bilinear", align_corners=False)
    return (grey * 255 / 16).round().to(torch.uint8).repeat(1, 3, 1, 1)

"""Tiny images that a tiny net learns in seconds."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from model.data import DATASETS
from model.data.images import Images, Split, histogram, mean_and_std
from model.rng import derive_seed


@DATASETS.register("synthetic")
def synthetic(
    *,
    num_classes: Annotated[int, Field(ge=2, le=1000)] = 4,
    train_size: Annotated[int, Field(ge=2, le=1_000_000)] = 400,
    test_size: Annotated[int, Field(ge=1, le=1_000_000)] = 100,
    image_size: Annotated[int, Field(ge=8, le=64)] = 16,
    noise: Annotated[float, Field(ge=0, le=10)] = 0.15,
    data_seed: int = 0,
) -> Images:
    """One smooth colour pattern per class, under noise: learnt to more than 90 % in a few epochs.

    Args:
        num_classes: Patterns.
        train_size: Training images (validation is carved from them), spread evenly over the classes.
        test_size: Test images, spread evenly over the classes.
        image_size: Height and width in pixels.
        noise: Standard deviation of the noise in every pixel; the patterns' own is about 0.15.
        data_seed: Draws patterns and noise; the run's seed does not change the data.

    Source: made here, for tests and first steps.
    """
    generator = torch.Generator().manual_seed(derive_seed(data_seed, "synthetic"))
    coarse = torch.randn(num_classes, 3, 3, 3, generator=generator)
    patterns = F.interpolate(coarse, size=(image_size, image_size), mode="bilinear", align_corners=True)

    def draw(size: int) -> Split:
        labels = torch.arange(size) % num_classes
        grain = torch.randn(size, 3, image_size, image_size, generator=generator)
        images = 0.5 + 0.25 * patterns[labels] + noise * grain
        return Split((images * 255).round().clamp(0, 255).to(torch.uint8), labels)

    train, test = draw(train_size), draw(test_size)
    mean, std = mean_and_std(histogram(train.images))
    return Images(
        train=train,
        val=None,
        test=test,
        classes=tuple(f"pattern{i}" for i in range(num_classes)),
        mean=mean,
        std=std,
        augmentation="none",
    )

"""From a dataset as it is read to the loaders of a run: carve, subset, normalise, fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from model.data.images import Images, Split, divide_per_class
from model.data.loader import BatchLoader
from model.data.views import AUGMENTATIONS
from model.errors import InputError
from model.rng import derive_seed


@dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        train: Shuffled and augmented.
        val: Plain images: carved from the training list, or the dataset's own.
        test: Plain images, if the dataset has a test split. Only `evaluate.py` reads it.
        classes: The name of each label.
        shape: `(C, H, W)` of an image.
        mean: Per channel, on a [0, 1] scale.
        std: Per channel, on the same scale.
        fingerprint: SHA-256 over what is trained on, validated on, and the class names.
        summary: One line about all this.
    """

    train: BatchLoader
    val: BatchLoader
    test: BatchLoader | None
    num_classes: int
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    summary: str

    def facts(self) -> dict[str, Any]:
        """Returns what a checkpoint must say of the data for its net to be used again, as plain types."""
        plain = {name: list(getattr(self, name)) for name in ("classes", "shape", "mean", "std")}
        return {"num_classes": self.num_classes, **plain}


def prepare(
    images: Images,
    name: str,
    seed: int,
    device: torch.device,
    *,
    batch_size: Annotated[int, Field(ge=2, le=65536)] = 128,
    eval_batch_size: Annotated[int, Field(ge=1, le=65536)] = 512,
    augmentation: Literal["crop_flip", "crop", "flip", "none"] | None = None,
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    val_seed: int = 0,
    subset_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
    mean: list[float] | None = None,
    std: list[Annotated[float, Field(gt=0)]] | None = None,
) -> Data:
    """Turns a dataset into the loaders of a run. Its options are common to all datasets.

    Args:
        images: The dataset.
        name: What to call it.
        seed: The run's seed: decides order and views, but neither the validation split nor the subset.
        device: Where the images are held.
        batch_size: Training samples per step; a last batch of one sample is joined to the batch before it.
        eval_batch_size: Validation and test samples per step: a matter of speed and memory.
        augmentation: Random views of training images: zero-padded 4-pixel crop, mirroring; null: the dataset's own.
        val_fraction: Share of each class of the training list that is kept for validation; unused with an own split.
        val_seed: Picks the validation split and the subset, so that runs with different seeds share them.
        subset_fraction: Share of each class (at least one image) to train on, of what validation leaves.
        mean: Normalisation per channel on a [0, 1] scale; null: the dataset's.
        std: Normalisation per channel on a [0, 1] scale; null: the dataset's.

    Raises:
        InputError: A class would be without training or validation images, or mean or std do not fit.
    """
    mean_used = _constants("mean", mean, images.mean, images)
    std_used = _constants("std", std, images.std, images)
    if min(std_used) <= 0:
        raise InputError(f"dataset.std: {list(std_used)} is not above 0 in every channel; give dataset.std", "data")
    chosen = augmentation or images.augmentation

    val_split = images.val
    if val_split is None:
        val_indices, train_indices = divide_per_class(images.train.labels, val_fraction, derive_seed(val_seed, "val"))
        _check_classes(images, val_fraction, train_indices, val_indices)
        val_split, val_note = images.train, f"carved, seed {val_seed}"
    else:
        train_indices, val_indices = torch.arange(len(images.train)), torch.arange(len(val_split))
        val_note = "the dataset's own"
    subset, _ = divide_per_class(
        images.train.labels[train_indices], subset_fraction, derive_seed(val_seed, "subset"), at_least=1
    )
    train_indices = train_indices[subset]

    def loader(
        split: Split, indices: Tensor | None, size: int, name: str = "none", shuffle: bool = False
    ) -> BatchLoader:
        return BatchLoader(
            split,
            indices=indices,
            batch_size=size,
            mean=mean_used,
            std=std_used,
            augmentation=name,
            shuffle=shuffle,
            seed=seed,
            device=device,
        )

    train_on_device = images.train.to(device)  # once, so that a carved validation split shares it
    val_on_device = train_on_device if val_split is images.train else val_split
    train = loader(train_on_device, train_indices, batch_size, chosen, shuffle=True)
    val = loader(val_on_device, val_indices, eval_batch_size)
    test = None if images.test is None else loader(images.test, None, eval_batch_size)
    channels, height, width = images.train.images.shape[1:]
    subset_note = "" if subset_fraction == 1 else f" (subset {subset_fraction:g})"
    summary = (
        f"{name}: {train.num_samples:,} train{subset_note}, {val.num_samples:,} val ({val_note}), "
        f"{f'{test.num_samples:,}' if test else 'no'} test images of {channels}x{height}x{width}, "
        f"{len(images.classes):,} classes, "
        f"augmentation {chosen} ({AUGMENTATIONS[chosen].num_views} view{'s' * (chosen != 'none')})"
    )
    return Data(
        train=train,
        val=val,
        test=test,
        num_classes=len(images.classes),
        classes=images.classes,
        shape=(channels, height, width),
        mean=mean_used,
        std=std_used,
        fingerprint=_fingerprint(images.classes, (images.train, train_indices), (val_split, val_indices)),
        summary=summary,
    )


pipeline_options = prepare  # what it is to a registry: the keyword-only parameters are the common options


def _constants(
    key: str, given: Sequence[float] | None, default: tuple[float, ...], images: Images
) -> tuple[float, ...]:
    values = default if given is None else tuple(given)
    channels = images.train.images.shape[1]
    if len(values) != channels:
        raise InputError(
            f"dataset.{key}: {len(values)} value{'s' * (len(values) != 1)} given but the images have {channels} "
            "channels; give one for each",
            "data",
        )
    return values


def _check_classes(images: Images, val_fraction: float, train_indices: Tensor, val_indices: Tensor) -> None:
    labels, num_classes = images.train.labels, len(images.classes)
    for_training = labels[train_indices].bincount(minlength=num_classes)
    for_validation = labels[val_indices].bincount(minlength=num_classes)
    short = ((for_training == 0) | (for_validation == 0)).nonzero().flatten().tolist()
    if short:
        others = f" (and {len(short) - 1} more classes)" if len(short) > 1 else ""
        raise InputError(
            f"dataset.val_fraction: {val_fraction} leaves class '{images.classes[short[0]]}'{others} with "
            f"{for_training[short[0]]} training and {for_validation[short[0]]} validation images; "
            "each class needs one of both: change val_fraction or add images",
            "data",
        )


def _fingerprint(classes: tuple[str, ...], *parts: tuple[Split, Tensor]) -> str:
    digest = hashlib.sha256(repr(classes).encode())
    for split, indices in parts:
        digest.update(repr((len(indices), tuple(split.images.shape[1:]))).encode())
        for some in indices.split(4096):  # a part at a time: no second copy of a large dataset
            digest.update(split.images[some].contiguous().numpy().data)
            digest.update(split.labels[some].numpy().data)
    return digest.hexdigest()

"""What every dataset hands over: uint8 images in memory, labels, class names and normalisation constants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import InputError


@dataclass(frozen=True)
class Split:
    """Samples, in an order of their own that never changes.

    Attributes:
        images: `(N, C, H, W)` uint8.
        labels: `(N,)` int64.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or self.images.dtype != torch.uint8:
            raise InputError(f"images are {_kind(self.images)}; expected uint8 of (N, C, H, W)", reason="data")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise InputError(
                f"labels are {_kind(self.labels)}; expected int64 of ({len(self.images)},), one per image",
                reason="data",
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Returns the split on `device`: itself, without a copy, where it is there already."""
        return Split(self.images.to(device), self.labels.to(device))

    def select(self, positions: Tensor) -> Split:
        """Returns a copy of the samples at `positions`, in that order."""
        return Split(self.images[positions], self.labels[positions])


@dataclass(frozen=True)
class Images:
    """A dataset as it is read, before anything is carved from it.

    Attributes:
        train: The training split.
        val: The dataset's own validation split, if it has one.
        test: The test split, if there is one.
        classes: The name of each label.
        mean: Per channel, of images on a [0, 1] scale.
        std: Per channel, on the same scale.
        augmentation: The augmentation that suits these images (a name of `views.AUGMENTATIONS`).

    Raises:
        InputError: A split is empty, of another image shape than `train`, or has a label without a class.
    """

    train: Split
    val: Split | None
    test: Split | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str

    def __post_init__(self) -> None:
        shape = self.train.images.shape[1:]
        for name, split in (("training", self.train), ("validation", self.val), ("test", self.test)):
            if split is None:
                continue
            if not len(split):
                raise InputError(f"the {name} split has no images", reason="data")
            if split.images.shape[1:] != shape:
                raise InputError(
                    f"the {name} images are {tuple(split.images.shape[1:])}, the training images {tuple(shape)}",
                    reason="data",
                )
            # Found here, this is a sentence; found in the loss on a GPU, it is an assert that ends the process.
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                raise InputError(
                    f"the {name} labels are {low}..{high} but there are {len(self.classes)} classes; "
                    f"labels must be 0..{len(self.classes) - 1}",
                    reason="data",
                )


def divide_per_class(labels: Tensor, fraction: float, seed: int, at_least: int = 0) -> tuple[Tensor, Tensor]:
    """Divides samples in two, class by class, at random.

    With the same seed a smaller fraction takes a subset of what a larger one takes.

    Args:
        labels: `(N,)` int64.
        fraction: The share of each class to take, rounded to the nearest whole number of samples.
        seed: Picks the samples.
        at_least: How many samples to take of each class even where the fraction rounds to fewer.

    Returns:
        The positions that are taken and those that are left, both ascending.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped = order[labels[order].argsort(stable=True)]  # class after class, shuffled within each
    counts = labels.bincount()
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    quota = (counts.double() * fraction + 0.5).floor().long().clamp(min=at_least)
    taken = rank < quota.repeat_interleave(counts)
    return grouped[taken].sort().values, grouped[~taken].sort().values


def histogram(images: Tensor) -> Tensor:
    """Returns how often each of the 256 values occurs in each channel, `(C, 256)` int64."""
    channels = images.transpose(0, 1)
    # one channel of some images at a time: bincount widens its input to eight bytes a value
    return torch.stack(
        [torch.stack([part.flatten().bincount(minlength=256) for part in c.split(4096)]).sum(0) for c in channels]
    )


def mean_and_std(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation per channel, on a [0, 1] scale, of a `histogram`."""
    counts = counts.double()
    values = torch.arange(256, dtype=torch.float64) / 255
    total = counts.sum(1)
    mean = (counts @ values) / total
    variance = (counts * (values - mean[:, None]).square()).sum(1) / total
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of {tuple(tensor.shape)}"

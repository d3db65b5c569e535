"""What every dataset hands over: images in memory or in files, labels, class names and normalisation constants."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.data.decode import Array, cut_centre, read_image
from model.errors import InputError

# The customary constants and augmentation of photographs that are too many to be looked at first.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PHOTOGRAPHS = ("random_resized_crop", "horizontal_flip")


@dataclass(frozen=True)
class Split:
    """Samples in memory, in an order of their own that never changes.

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

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def read(self, index: int, whole: bool) -> Tensor:
        """Returns an image, `(C, H, W)` uint8; it is whole anyway."""
        return self.images[index]

    def update(self, digest: hashlib._Hash, indices: Tensor) -> None:
        """Adds the samples at `indices`, every pixel of them, to a digest."""
        digest.update(repr((len(indices), self.shape)).encode())
        for some in indices.split(4096):  # a part at a time: no second copy of a large dataset
            digest.update(self.images[some].cpu().contiguous().numpy().data)
            digest.update(self.labels[some].cpu().numpy().data)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of all samples, every pixel of them."""
        digest = hashlib.sha256()
        self.update(digest, torch.arange(len(self)))
        return digest.hexdigest()

    def keys(self, indices: Tensor) -> Iterator[bytes]:
        """Yields what tells each of the images at `indices` from others: a hash of every pixel, whatever the label."""
        for some in indices.split(4096):
            for image in self.images[some].cpu().contiguous().flatten(1).numpy():
                yield hashlib.blake2b(image.data, digest_size=16).digest()

    def to(self, device: torch.device) -> Split:
        """Returns the split on `device`: itself, without a copy, where it is there already."""
        return self if self.images.device == device else Split(self.images.to(device), self.labels.to(device))

    def select(self, positions: Tensor) -> Split:
        """Returns a copy of the samples at `positions`, in that order."""
        return Split(self.images[positions], self.labels[positions])


@dataclass(frozen=True)
class FileSplit:
    """Samples that stay in their files and are decoded whenever they are shown.

    Attributes:
        folder: Where `paths` start.
        paths: `(N,)` bytes. One array, because worker processes would copy a million strings merely by looking at
            them (each has a count of references).
        sizes: `(N,)` int64, bytes of each file.
        labels: `(N,)` int64.
        image_size: Height and width of what is shown.
        resize_size: Of the shorter side, before the centre is cut out; at least `image_size`.
        origin: What tells these files from those that have stood here at another time.

    Raises:
        InputError: `resize_size` is too small.
    """

    folder: str
    paths: Array
    sizes: Tensor
    labels: Tensor
    image_size: int
    resize_size: int
    origin: str = ""

    def __post_init__(self) -> None:
        if self.resize_size < self.image_size:
            raise InputError(
                f"dataset.resize_size: {self.resize_size} is below dataset.image_size, {self.image_size}; raise it",
                reason="data",
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of an image as it is shown."""
        return 3, self.image_size, self.image_size

    def read(self, index: int, whole: bool) -> Tensor:
        """Returns an image, `(3, H, W)` uint8: all of it, or the centre that is shown where nothing is augmented.

        Raises:
            InputError: The file is not a readable image.
        """
        image = read_image(f"{self.folder}/{os.fsdecode(self.paths[index])}")
        if not whole:
            image = cut_centre(image, self.resize_size, self.image_size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def update(self, digest: hashlib._Hash, indices: Tensor) -> None:
        """Adds path, size and label of the files at `indices` to a digest.

        Not their content: nobody waits at every start until 150 GB are read.
        """
        digest.update(repr((len(indices), self.shape, self.resize_size)).encode())
        some = self.select(indices)
        for file in zip(some.paths.tolist(), some.sizes.tolist(), some.labels.tolist(), strict=True):
            digest.update(repr(file).encode())

    def keys(self, indices: Tensor) -> Iterator[bytes]:
        """Yields what tells each of the files at `indices` from others: its path, in the folder that links lead to."""
        folder = os.fsencode(Path(self.folder).resolve())
        for path in self.paths[indices.numpy()].tolist():
            yield folder + b"/" + path

    def fingerprint(self) -> str:
        """Returns the SHA-256 of all files as they are: path, size, label, time of change; and of what decodes them."""
        digest = hashlib.sha256(f"{self.origin} pillow {importlib.metadata.version('pillow')}".encode())
        self.update(digest, torch.arange(len(self)))
        return digest.hexdigest()

    def select(self, positions: Tensor) -> FileSplit:
        """Returns the samples at `positions`, in that order."""
        # numpy takes a tensor of one element for a number
        part = self.paths[positions.numpy()], self.sizes[positions], self.labels[positions]
        return FileSplit(self.folder, *part, self.image_size, self.resize_size, self.origin)


AnySplit = Split | FileSplit


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
        augmentation: The augmentation that suits these images: a name, or a list of transforms.
        round_down: Whether a share of a class that is carved for validation is rounded down, not to the nearest.

    Raises:
        InputError: A split is empty, of another image shape than `train`, or has a label without a class.
    """

    train: AnySplit
    val: AnySplit | None
    test: AnySplit | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str | Sequence[str | Mapping[str, Any]]
    round_down: bool = False

    def __post_init__(self) -> None:
        shape = self.train.shape
        for name, split in (("training", self.train), ("validation", self.val), ("test", self.test)):
            if split is None:
                continue
            if not len(split):
                raise InputError(f"the {name} split has no images", reason="data")
            if split.shape != shape:
                raise InputError(f"the {name} images are {split.shape}, the training images {shape}", reason="data")
            # Found here, this is a sentence; found in the loss on a GPU, it is an assert that ends the process.
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                raise InputError(
                    f"the {name} labels are {low}..{high} but there are {len(self.classes)} classes; "
                    f"labels must be 0..{len(self.classes) - 1}",
                    reason="data",
                )


def divide_per_class(
    labels: Tensor, fraction: float, seed: int, at_least: int = 0, round_down: bool = False
) -> tuple[Tensor, Tensor]:
    """Divides samples in two, class by class, at random.

    With the same seed a smaller fraction takes a subset of what a larger one takes.

    Args:
        labels: `(N,)` int64.
        fraction: The share of each class to take, rounded to the nearest whole number of samples.
        seed: Picks the samples.
        at_least: How many samples to take of each class even where the fraction rounds to fewer.
        round_down: Round down instead.

    Returns:
        The positions that are taken and those that are left, both ascending.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped = order[labels[order].argsort(stable=True)]  # class after class, shuffled within each
    counts = labels.bincount()
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    quota = (counts.double() * fraction + (0 if round_down else 0.5)).floor().long().clamp(min=at_least)
    taken = rank < quota.repeat_interleave(counts)
    return grouped[taken].sort().values, grouped[~taken].sort().values


def ancestor_subset(n: int, fraction: float) -> Tensor:
    """Returns the positions, of a list of `n`, that the ancestor's experiments with part of the data train on.

    Source: the first of a list of all positions, shuffled in place after `numpy.random.seed(230)`.
    """
    order = np.arange(n)
    np.random.RandomState(230).shuffle(order)
    return torch.from_numpy(order[: int(fraction * n)])


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

"""Batches as functions of (seed, epoch, sample index); from memory one gather makes one, and nothing waits."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from model.data.images import AnySplit, Split
from model.data.views import PLAIN, Augmentation, apply_views, draw_views
from model.outputs import Batch
from model.rng import derive_seed


class Loader(ABC):
    """Yields the batches of an epoch; order and views are functions of (seed, epoch, sample index) only.

    Args:
        split: The dataset's own list of samples.
        indices: `(n,)` int64, which samples of the list to draw; all of them if None.
        batch_size: Samples per step.
        mean: Per channel, on a [0, 1] scale.
        std: Per channel, on the same scale.
        augmentation: A family of views; `PLAIN` shows every image as it is (view 0).
        shuffle: Draw a new order each epoch instead of that of `indices`.
        seed: Decides order and views.
        device: Where the batches are made.

    Raises:
        ValueError: `indices` has no element or points outside the list.
    """

    def __init__(
        self,
        split: AnySplit,
        *,
        indices: Tensor | None = None,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation = PLAIN,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device,
    ) -> None:
        indices = torch.arange(len(split)) if indices is None else indices.cpu()
        if not len(indices) or int(indices.min()) < 0 or int(indices.max()) >= len(split):
            raise ValueError(f"indices must be at least one position in a list of {len(split)} samples")
        self.split = split
        self.indices = indices
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.shuffle = shuffle
        self.seed = seed
        self.device = device
        self._labels = split.labels.to(device)
        # (x / 255 - mean) / std, with the division by 255 moved into the constants
        self._offset = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._scale = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)

    def plain(self) -> Self:
        """Returns a loader of the same samples in their natural order, as they are."""
        same = copy.copy(self)
        same.augmentation, same.shuffle = PLAIN, False
        return same

    @property
    def num_samples(self) -> int:
        return len(self.indices)

    @property
    def num_views(self) -> int | None:
        """How many views an image has; None where they are too many to be numbered."""
        return self.augmentation.num_views

    @property
    def labels(self) -> Tensor:
        """The labels of the samples drawn, `(n,)` int64 on the device, in the order of `indices`."""
        return self._labels[self.indices.to(self.device)]

    def __len__(self) -> int:
        """Returns the steps per epoch."""
        steps, rest = divmod(self.num_samples, self.batch_size)
        # Batch norm cannot train on a single sample, so a last batch of one is joined to the batch before it.
        return steps + (rest > 1 or (rest == 1 and steps == 0))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from step `start` on; the steps before it cost nothing."""
        indices = self.indices
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            indices = indices[torch.randperm(len(indices), generator=generator)]
        if self.num_views is None:
            views = torch.full_like(indices, -1)
        else:
            views = draw_views(self.seed, epoch, indices, self.num_views)
        ends = [step * self.batch_size for step in range(len(self))] + [len(indices)]
        parts = [slice(first, last) for first, last in itertools.pairwise(ends)][start:]
        if not parts:
            return
        shown = self._images(epoch, indices, parts)
        # Moved once per epoch: from here on the host only slices.
        indices, views = indices.to(self.device), views.to(self.device)
        for part, images in zip(parts, shown, strict=True):
            yield self._batch(images, indices[part], views[part])

    @abstractmethod
    def _images(self, epoch: int, indices: Tensor, parts: Sequence[slice]) -> Iterator[Tensor]:
        """Yields, for each part of `indices`, the images there, `(N, C, H, W)` uint8 on the device, without views."""

    def _batch(self, images: Tensor, indices: Tensor, views: Tensor) -> Batch:
        images = apply_views(images, views, self.augmentation)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        return Batch(images.sub_(self._offset).div_(self._scale), self._labels[indices], indices, views)


class BatchLoader(Loader):
    """Holds all samples on the device: one gather makes a batch.

    Args:
        split: Shared, not copied, where it is on `device` already.
        device: Where the samples are held and the batches made.
        options: The others of a `Loader`.
    """

    split: Split

    def __init__(self, split: Split, *, device: torch.device, **options: Any) -> None:
        super().__init__(split.to(device), device=device, **options)

    def _images(self, epoch: int, indices: Tensor, parts: Sequence[slice]) -> Iterator[Tensor]:
        indices = indices.to(self.device)
        for part in parts:
            yield self.split.images[indices[part]]

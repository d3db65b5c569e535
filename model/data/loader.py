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
from model.errors import InputError
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
        order_seed: Decides the order alone; None: `seed`.
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
        order_seed: int | None = None,
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
        self.order_seed = seed if order_seed is None else order_seed
        self.device = device
        self._part, self._parts = 0, 1
        self._labels = split.labels.to(device)
        # (x / 255 - mean) / std, with the division by 255 moved into the constants
        self._offset = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._scale = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)

    def plain(self) -> Self:
        """Returns a loader of the same samples in their natural order, as they are."""
        same = copy.copy(self)
        same.augmentation, same.shuffle = PLAIN, False
        return same

    def share(self, part: int, parts: int) -> None:
        """Leaves this process one of so many parts of every batch of an epoch; order and batches are those of all.

        Raises:
            InputError: Some step would have less than two samples for a process.
        """
        if min(self.batch_size, self.num_samples) < 2 * parts:
            line = f"steps of at most {min(self.batch_size, self.num_samples)} samples for {parts} processes"
            raise InputError(f"{line}: each needs two; start fewer, or raise dataset.batch_size", "data")
        self._part, self._parts = part, parts

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
        return self._steps(self.num_samples, self._parts)

    def _steps(self, samples: int, parts: int = 1) -> int:
        steps, rest = divmod(samples, self.batch_size)
        # Batch norm cannot train on a single sample: a last batch without two for each is joined to the one before it.
        return steps + (rest >= 2 * parts or (rest > 0 and steps == 0))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from step `start` on; the steps before it cost nothing."""
        yield from self._show(*self.draw(epoch), epoch, start, self._part, self._parts)

    def draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Returns the samples of an epoch in its order, and their views: each `(n,)` int64 on the CPU."""
        indices = self.indices
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.order_seed, "order", epoch))
            indices = indices[torch.randperm(len(indices), generator=generator)]
        if self.num_views is None:
            return indices, torch.full_like(indices, -1)
        return indices, draw_views(self.seed, epoch, indices, self.num_views)

    def show(self, indices: Tensor, views: Tensor, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yields samples under views, as many at a time as an epoch would.

        Args:
            indices: `(n,)` int64 on the CPU, positions in the list of samples.
            views: `(n,)` int64 on the CPU: of each sample, as in `Batch`.
            epoch: What views without a number are drawn for.
            start: The first batch to yield; those before it cost nothing.
        """
        yield from self._show(indices, views, epoch, start)

    def _show(
        self, indices: Tensor, views: Tensor, epoch: int, start: int, part: int = 0, parts: int = 1
    ) -> Iterator[Batch]:
        ends = [step * self.batch_size for step in range(self._steps(len(indices), parts))] + [len(indices)]
        batches = list(itertools.pairwise(ends))[start:]
        if not batches:
            return
        bounds = [[first + (last - first) * k // parts for k in (part, part + 1)] for first, last in batches]
        slices = [slice(*each) for each in bounds]
        shown = self._images(epoch, indices, slices)
        # Moved once: from here on the host only slices.
        labels, placed = self._labels[indices.to(self.device)], views.to(self.device)
        for (first, last), own, images in zip(batches, slices, shown, strict=True):
            share = (own.stop - own.start) / (last - first)
            yield Batch(self._normalised(images, placed[own]), labels[own], indices[own], views[own], share)

    @abstractmethod
    def _images(self, epoch: int, indices: Tensor, parts: Sequence[slice]) -> Iterator[Tensor]:
        """Yields, for each part of `indices`, the images there, `(N, C, H, W)` uint8 on the device, without views."""

    def _normalised(self, images: Tensor, views: Tensor) -> Tensor:
        images = apply_views(images, views, self.augmentation)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        return images.sub_(self._offset).div_(self._scale)


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

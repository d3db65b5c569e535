"""Batches straight from memory: one gather, no worker processes, nothing that waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.data.images import Split
from model.data.views import AUGMENTATIONS, apply_views, draw_views
from model.outputs import Batch
from model.rng import derive_seed


class BatchLoader:
    """Yields the batches of an epoch; order and views are functions of (seed, epoch, sample index) only.

    Args:
        split: The dataset's own list of samples; shared, not copied, where it is on `device` already.
        indices: `(n,)` int64, which samples of the list to draw; all of them if None.
        batch_size: Samples per step.
        mean: Per channel, on a [0, 1] scale.
        std: Per channel, on the same scale.
        augmentation: A name of `AUGMENTATIONS`; `none` shows every image as it is (view 0).
        shuffle: Draw a new order each epoch instead of that of `indices`.
        seed: Decides order and views.
        device: Where the samples are held and the batches made.

    Raises:
        ValueError: `indices` has no element or points outside the list.
    """

    def __init__(
        self,
        split: Split,
        *,
        indices: Tensor | None = None,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: str = "none",
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device,
    ) -> None:
        indices = torch.arange(len(split)) if indices is None else indices.cpu()
        if not len(indices) or int(indices.min()) < 0 or int(indices.max()) >= len(split):
            raise ValueError(f"indices must be at least one position in a list of {len(split)} samples")
        self.split = split.to(device)
        self.indices = indices
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.shuffle = shuffle
        self.seed = seed
        self.device = device
        # (x / 255 - mean) / std, with the division by 255 moved into the constants
        self._offset = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._scale = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)

    def plain(self) -> BatchLoader:
        """Returns a loader of the same samples in their natural order, as they are."""
        same = copy.copy(self)
        same.augmentation, same.shuffle = "none", False
        return same

    @property
    def num_samples(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """The labels of the samples drawn, `(n,)` int64 on the device, in the order of `indices`."""
        return self.split.labels[self.indices.to(self.device)]

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
        views = draw_views(self.seed, epoch, indices, AUGMENTATIONS[self.augmentation].num_views)
        # Moved once per epoch: from here on the host only slices.
        indices, views = indices.to(self.device), views.to(self.device)
        for step in range(start, len(self)):
            first = step * self.batch_size
            last = len(indices) if step == len(self) - 1 else first + self.batch_size
            yield self._batch(indices[first:last], views[first:last])

    def _batch(self, indices: Tensor, views: Tensor) -> Batch:
        images = apply_views(self.split.images[indices], views, self.augmentation)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        return Batch(images.sub_(self._offset).div_(self._scale), self.split.labels[indices], indices, views)

"""Training batches with more in them than samples under one view: a second view of each, or images without labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from model.data.images import AnySplit
from model.data.loader import Loader
from model.outputs import Batch


class JoinedLoader:
    """The batches of a training set, each with what comes to it from other loaders.

    Like those of `Loader` they are functions of (seed, epoch, step) only.

    Args:
        train: Decides how long an epoch is.
        second: Of the same samples in the same order: its images become `Batch.strong_images`.
        unlabelled: Behind the samples of each step stands one batch of it; it begins again whenever it ends, in a new
            order, whatever the epoch of `train`.
    """

    def __init__(self, train: Loader, second: Loader | None = None, unlabelled: Loader | None = None) -> None:
        self.train = train
        self.second = second
        self.unlabelled = unlabelled

    @property
    def split(self) -> AnySplit:
        return self.train.split

    @property
    def seed(self) -> int:
        return self.train.seed

    def __len__(self) -> int:
        return len(self.train)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from step `start` on."""
        strong = self.second.epoch(epoch, start) if self.second else itertools.repeat(None)
        extra = endless(self.unlabelled, epoch * len(self) + start) if self.unlabelled else itertools.repeat(None)
        for batch, shown, more in zip(self.train.epoch(epoch, start), strong, extra, strict=False):
            yield with_unlabelled(batch if shown is None else replace(batch, strong_images=shown.images), more)


def endless(loader: Loader, position: int) -> Iterator[Batch]:
    """Yields the batches of a loader's epochs, one after the other, from a position on, counted in batches."""
    first, start = divmod(position, len(loader))
    for epoch in itertools.count(first):
        yield from loader.epoch(epoch, start if epoch == first else 0)


def with_unlabelled(batch: Batch, more: Batch | None) -> Batch:
    """Returns a batch with the images of another behind its own, whose labels are left out."""
    if more is None:
        return batch
    unknown = torch.full_like(more.indices, -1)
    return replace(
        batch,
        images=torch.cat([batch.images, more.images]),
        indices=torch.cat([batch.indices, unknown]),
        views=torch.cat([batch.views, unknown]),
    )

"""Batches that other loaders add to."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from model.data.images import Split
from model.data.joined import JoinedLoader, endless
from model.data.loader import BatchLoader
from model.data.views import Augmentation

CPU = torch.device("cpu")


def loader_of(samples: int, batch_size: int, *, seed: int = 0, pad: int = 0, pixel: int | None = None) -> BatchLoader:
    """Returns a shuffled loader; sample i is an image of nothing but i, or of `pixel`."""
    values = torch.arange(samples) if pixel is None else torch.full((samples,), pixel)
    images = values.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    split = Split(images, torch.arange(samples) % 5)
    constants = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    views = Augmentation(pad, horizontal=True)
    return BatchLoader(
        split, batch_size=batch_size, augmentation=views, shuffle=True, seed=seed, device=CPU, **constants
    )


def test_a_second_view_is_of_the_same_samples_in_the_same_order() -> None:
    joined = JoinedLoader(loader_of(40, 8), second=loader_of(40, 8, pad=2))
    for epoch in range(2):
        for batch in joined.epoch(epoch):
            assert batch.strong_images is not None
            assert batch.strong_images.shape == batch.images.shape
            # The middle pixel of an image is its sample's number in every view.
            assert torch.equal(batch.images[:, 0, 4, 4].long(), batch.indices)
            assert torch.equal(batch.strong_images[:, 0, 4, 4].long(), batch.indices)
            assert not torch.equal(batch.strong_images, batch.images), "another view"


def test_unlabelled_images_stand_behind_the_labelled_ones() -> None:
    train = loader_of(20, 8)
    joined = JoinedLoader(train, unlabelled=loader_of(30, 5, pixel=200))
    assert len(joined) == len(train)
    for batch, alone in zip(joined.epoch(0), train.epoch(0), strict=True):
        number = len(alone.labels)
        assert torch.equal(batch.labels, alone.labels)
        assert torch.equal(batch.images[:number], alone.images)
        assert torch.equal(batch.indices[:number], alone.indices)
        assert (batch.images[number:] == 200).all()
        assert len(batch.images) == len(batch.indices) == len(batch.views) == number + 5
        assert (batch.indices[number:] == -1).all()


def test_unlabelled_images_go_round_whatever_the_epoch_of_the_labelled_ones() -> None:
    """30 images, 5 to a step, 3 steps to an epoch: two epochs show each of them once."""
    joined = JoinedLoader(loader_of(24, 8), unlabelled=loader_of(30, 5, seed=1))
    for first in (0, 2):
        seen = [batch.images[len(batch.labels) :, 0, 4, 4] for e in (first, first + 1) for batch in joined.epoch(e)]
        assert sorted(torch.cat(seen).long().tolist()) == list(range(30))


def test_it_goes_on_in_the_middle_of_an_epoch_with_the_same_batches() -> None:
    joined = JoinedLoader(loader_of(40, 8), loader_of(40, 8, pad=1), loader_of(13, 4, seed=1))
    for epoch, start in ((0, 3), (5, 2), (7, 0)):
        whole = list(joined.epoch(epoch))[start:]
        rest = list(joined.epoch(epoch, start))
        assert len(rest) == len(whole) == 5 - start
        for one, other in zip(whole, rest, strict=True):
            for name in ("images", "labels", "indices", "views", "strong_images"):
                assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("position", [0, 1, 2, 3, 7])
def test_an_endless_loader_is_its_epochs_one_after_the_other(position: int) -> None:
    loader = loader_of(12, 4)
    in_a_row = [batch.indices for epoch in range(4) for batch in loader.epoch(epoch)]
    found = [batch.indices for batch in islice(endless(loader, position), 4)]
    assert [indices.tolist() for indices in found] == [i.tolist() for i in in_a_row[position : position + 4]]

import numpy as np
import pytest
import torch

from model.data.images import Split
from model.data.loader import BatchLoader
from model.data.views import Augmentation, draw_views
from model.errors import InputError
from model.rng import derive_seed

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
CPU = torch.device("cpu")
CROP, CROP_FLIP = Augmentation(pad=4), Augmentation(pad=4, horizontal=True)


def split_of(n: int, size: int = 8) -> Split:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % 3)


def loader_of(split: Split | int = 50, **options) -> BatchLoader:
    split = split_of(split) if isinstance(split, int) else split
    return BatchLoader(split, **{"batch_size": 8, "mean": MEAN, "std": STD, "device": CPU, **options})


def joined(batches, field: str) -> torch.Tensor:
    return torch.cat([getattr(batch, field) for batch in batches])


def normalised(images: torch.Tensor) -> np.ndarray:
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.numpy().astype(np.float64) / 255 - mean) / std


def test_images_are_normalised_float32_in_channels_last():
    split = split_of(11)
    (batch,) = loader_of(split, batch_size=11).epoch(0)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(batch.images.numpy(), normalised(split.images), atol=1e-5)
    assert torch.equal(batch.labels, split.labels)
    assert torch.equal(batch.indices, torch.arange(11))
    assert torch.equal(batch.views, torch.zeros(11, dtype=torch.int64))


def test_what_is_padded_is_black_before_normalisation():
    white = Split(torch.full((200, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64))
    images = joined(loader_of(white, augmentation=CROP).epoch(0), "images").numpy()
    black, full = (normalised(torch.full((1, 3, 1, 1), value)).reshape(3) for value in (0, 255))
    for channel in range(3):
        found = np.unique(images[:, channel])
        np.testing.assert_allclose(found, [black[channel], full[channel]], rtol=1e-5)


def test_the_split_is_never_written_to():
    split = split_of(20)
    before = split.images.clone()
    for epoch in range(2):
        list(loader_of(split, augmentation=CROP_FLIP).epoch(epoch))
        list(loader_of(split).epoch(epoch))
    assert torch.equal(split.images, before)


def test_an_epochs_order_is_a_permutation_that_depends_on_seed_and_epoch_only():
    order = joined(loader_of(shuffle=True, seed=1).epoch(3), "indices")
    assert torch.equal(order.sort().values, torch.arange(50))
    generator = torch.Generator().manual_seed(derive_seed(1, "order", 3))
    assert torch.equal(order, torch.randperm(50, generator=generator))
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(order, joined(loader_of(shuffle=True, seed=1, batch_size=7).epoch(3), "indices"))
    assert not torch.equal(order, joined(loader_of(shuffle=True, seed=1).epoch(4), "indices"))
    assert not torch.equal(order, joined(loader_of(shuffle=True, seed=2).epoch(3), "indices"))


def test_drawing_batches_leaves_the_global_generators_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader_of(shuffle=True, augmentation=CROP_FLIP).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_without_shuffling_the_order_is_that_of_the_indices():
    indices = torch.tensor([7, 3, 40, 12])
    assert torch.equal(joined(loader_of(indices=indices).epoch(5), "indices"), indices)


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7])
def test_starting_at_a_step_yields_exactly_the_tail_of_the_epoch(start):
    loader = loader_of(shuffle=True, augmentation=CROP_FLIP)
    tail, whole = list(loader.epoch(2, start)), list(loader.epoch(2))
    assert len(tail) == max(0, len(loader) - start)
    for one, other in zip(tail, whole[start:], strict=True):
        for field in ("images", "labels", "indices", "views"):
            assert torch.equal(getattr(one, field), getattr(other, field))


def test_a_samples_view_does_not_depend_on_batch_size_or_order_or_subset():
    def shown(**options):
        batches = list(loader_of(augmentation=CROP_FLIP, seed=4, **options).epoch(1))
        indices, views = (joined(batches, field).tolist() for field in ("indices", "views"))
        shown_images = zip(views, joined(batches, "images"), strict=True)
        return dict(zip(indices, shown_images, strict=True))

    reference = shown(shuffle=True)
    assert len({view for view, _ in reference.values()}) > 10
    for options in (
        {"shuffle": True, "batch_size": 3},
        {"shuffle": False, "batch_size": 50},
        {"shuffle": True, "indices": torch.tensor([49, 2, 30])},
    ):
        for index, (view, image) in shown(**options).items():
            assert view == reference[index][0]
            assert torch.equal(image, reference[index][1])


def test_views_change_from_epoch_to_epoch():
    loader = loader_of(augmentation=CROP_FLIP, seed=4)
    for epoch in range(3):
        assert torch.equal(joined(loader.epoch(epoch), "views"), draw_views(4, epoch, torch.arange(50), 162))
    assert not torch.equal(joined(loader.epoch(0), "views"), joined(loader.epoch(1), "views"))


def test_indices_are_positions_in_the_datasets_own_list():
    split = split_of(50)
    loader = loader_of(split, indices=torch.arange(10, 50, 3), shuffle=True)
    for batch in loader.epoch(0):
        np.testing.assert_allclose(batch.images.numpy(), normalised(split.images[batch.indices]), atol=1e-5)
        assert torch.equal(batch.labels, split.labels[batch.indices])
    assert loader.num_samples == 14
    assert torch.equal(loader.labels, split.labels[10:50:3])


def test_every_split_of_samples_into_batches_has_each_sample_once_and_no_batch_of_one():
    for n in range(1, 30):
        split = split_of(n)
        for batch_size in range(1, 12):
            loader = loader_of(split, batch_size=batch_size, shuffle=True)
            batches = list(loader.epoch(0))
            sizes = [len(batch.labels) for batch in batches]
            assert len(batches) == len(loader)
            assert torch.equal(joined(batches, "indices").sort().values, torch.arange(n))
            if batch_size > 1:
                assert n == 1 or min(sizes) > 1
            assert all(size == batch_size for size in sizes[:-1])
            assert sizes[-1] <= max(batch_size + 1, 2)


def test_a_last_batch_of_one_sample_is_joined_to_the_batch_before_it():
    assert [len(batch.labels) for batch in loader_of(17, batch_size=8).epoch(0)] == [8, 9]
    assert [len(batch.labels) for batch in loader_of(18, batch_size=8).epoch(0)] == [8, 8, 2]
    assert [len(batch.labels) for batch in loader_of(1, batch_size=8).epoch(0)] == [1]


@pytest.mark.parametrize("indices", [[], [50], [-1, 3]])
def test_indices_outside_the_list_are_refused(indices):
    with pytest.raises(ValueError, match="50 samples"):
        loader_of(50, indices=torch.tensor(indices, dtype=torch.int64))


def test_a_split_on_the_device_is_shared_and_not_copied():
    split = split_of(10)
    assert loader_of(split).split.images.data_ptr() == split.images.data_ptr()


def test_drawing_batches_never_waits_for_the_device():
    # Tensors of the meta device have no values: whatever asks the device for one raises.
    loader = loader_of(shuffle=True, augmentation=CROP_FLIP, device=torch.device("meta"))
    assert [tuple(batch.images.shape) for batch in loader.epoch(0)] == [(8, 3, 8, 8)] * 6 + [(2, 3, 8, 8)]


def test_shares_of_a_step_are_its_samples_divided_and_none_is_too_small_for_batch_norm():
    for n in range(6, 40):
        for batch_size in range(6, 20, 3):
            for parts in (1, 2, 3):
                loaders = [
                    loader_of(n, batch_size=batch_size, shuffle=True, augmentation=CROP_FLIP) for _ in range(parts)
                ]
                for part, loader in enumerate(loaders):
                    loader.share(part, parts)
                order, views = loaders[0].draw(1)
                steps = list(zip(*(loader.epoch(1) for loader in loaders), strict=True))
                assert {len(loader) for loader in loaders} == {len(steps)}
                for field, expected in (("indices", order), ("views", views)):
                    assert torch.equal(torch.cat([joined(shares, field) for shares in steps]), expected)
                for shares in steps:
                    sizes = [len(batch.labels) for batch in shares]
                    assert min(sizes) >= 2
                    assert max(sizes) <= min(sizes) + 1
                    assert [batch.share for batch in shares] == [size / sum(sizes) for size in sizes]


def test_a_share_shows_what_it_would_show_in_the_whole_batch_and_only_epochs_are_shared():
    whole, second = (loader_of(52, shuffle=True, augmentation=CROP_FLIP) for _ in range(2))
    second.share(1, 2)
    for start in (0, 3):
        for batch, part in zip(whole.epoch(2, start), second.epoch(2, start), strict=True):
            assert torch.equal(part.images, batch.images[len(batch.labels) // 2 :])
            assert torch.equal(part.labels, batch.labels[len(batch.labels) // 2 :])
    drawn = whole.draw(0)
    assert torch.equal(joined(second.show(*drawn), "images"), joined(whole.show(*drawn), "images"))


@pytest.mark.parametrize(("samples", "batch_size"), [(50, 5), (5, 50)])
def test_a_step_that_is_too_small_for_its_processes_is_refused(samples, batch_size):
    loader = loader_of(samples, batch_size=batch_size)
    loader.share(0, 2)
    with pytest.raises(InputError, match=r"^steps of at most 5 samples for 3 processes: each needs two"):
        loader.share(0, 3)

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from model.data.images import (
    FileSplit,
    Images,
    Split,
    ancestor_subset,
    divide_per_class,
    histogram,
    mean_and_std,
)
from model.errors import InputError


def split_of(labels: list[int], shape: tuple[int, ...] = (3, 8, 8)) -> Split:
    return Split(torch.zeros((len(labels), *shape), dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64))


def images_of(train: Split, val: Split | None = None, test: Split | None = None) -> Images:
    return Images(train, val, test, ("a", "b"), (0.5,) * 3, (0.5,) * 3, "none")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), "float32 of"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"\(2, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"one per image"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32), "int32"),
    ],
)
def test_a_split_of_wrong_types_or_shapes_is_refused(images, labels, message):
    with pytest.raises(InputError, match=message) as caught:
        Split(images, labels)
    assert caught.value.reason == "data"


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0]])
@pytest.mark.parametrize("which", ["training", "validation", "test"])
def test_a_label_out_of_range_is_found_before_training(labels, which):
    bad, good = split_of(labels), split_of([0, 1])
    splits = [bad if name == which else good for name in ("training", "validation", "test")]
    with pytest.raises(InputError, match=f"the {which} labels are .* but there are 2 classes") as caught:
        images_of(*splits)
    assert caught.value.reason == "data"


def test_an_empty_split_and_one_of_another_shape_are_refused():
    with pytest.raises(InputError, match="the training split has no images"):
        images_of(split_of([]))
    with pytest.raises(InputError, match=r"the test images are \(3, 9, 8\), the training images \(3, 8, 8\)"):
        images_of(split_of([0, 1]), None, split_of([0, 1], (3, 9, 8)))


def test_division_takes_its_share_of_every_class():
    labels = torch.tensor([0] * 40 + [1] * 101 + [2] * 7)[torch.randperm(148)]
    for fraction in (0.1, 0.25, 0.5, 1.0):
        taken, rest = divide_per_class(labels, fraction, seed=3)
        assert torch.equal(torch.cat([taken, rest]).sort().values, torch.arange(148))
        counts = labels[taken].bincount(minlength=3).tolist()
        assert counts == [int(count * fraction + 0.5) for count in (40, 101, 7)]
        assert torch.equal(taken, taken.sort().values)
        assert torch.equal(rest, rest.sort().values)


def test_division_depends_on_the_seed_only_and_grows_by_adding():
    labels = torch.arange(300) % 3
    small, larger = (divide_per_class(labels, fraction, seed=8)[0] for fraction in (0.1, 0.3))
    torch.manual_seed(1)
    assert torch.equal(divide_per_class(labels, 0.1, seed=8)[0], small)
    assert not torch.equal(divide_per_class(labels, 0.1, seed=9)[0], small)
    assert set(small.tolist()) < set(larger.tolist())


def test_division_takes_at_least_what_is_asked_for():
    labels = torch.tensor([0] * 100 + [1] * 3)
    taken, _ = divide_per_class(labels, 0.01, seed=0, at_least=1)
    assert labels[taken].bincount().tolist() == [1, 1]


def test_every_sample_is_equally_likely_to_be_taken():
    labels = torch.arange(40) % 2
    taken = torch.stack([divide_per_class(labels, 0.25, seed)[0] for seed in range(500)]).flatten()
    expected = 125  # 500 draws of a quarter; standard deviation about 10
    assert int((taken.bincount() - expected).abs().max()) < 50


def test_mean_and_std_are_those_of_all_pixels():
    images = torch.randint(0, 256, (37, 3, 5, 9), dtype=torch.uint8)
    counts = histogram(images)
    assert counts.shape == (3, 256)
    assert counts.sum(1).tolist() == [37 * 45] * 3
    mean, std = mean_and_std(counts)
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_the_histogram_of_more_images_than_one_part_is_complete():
    assert histogram(torch.full((9000, 1, 1, 1), 7, dtype=torch.uint8))[0, 7] == 9000


def test_select_copies_the_samples_in_the_order_asked_for():
    split = Split(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.arange(4))
    assert split.select(torch.tensor([2, 0])).images.flatten().tolist() == [2, 0]
    assert split.select(torch.tensor([2, 0])).labels.tolist() == [2, 0]


def files_of(**changes) -> FileSplit:
    paths = np.array([b"a/0.jpg", b"a/1.jpg", b"b/x.jpg"])
    made = FileSplit("/photographs", paths, torch.tensor([10, 11, 12]), torch.tensor([0, 0, 1]), 16, 20)
    return dataclasses.replace(made, **changes)


def digest_of(split: Split | FileSplit, *indices: int) -> str:
    digest = hashlib.sha256()
    split.update(digest, torch.tensor(indices))
    return digest.hexdigest()


def test_a_split_of_files_has_the_shape_that_it_shows():
    assert len(files_of()) == 3
    assert files_of().shape == (3, 16, 16)
    assert split_of([0, 1], (3, 9, 8)).shape == (3, 9, 8)
    images = images_of(files_of(), None, split_of([0, 1], (3, 16, 16)))
    assert images.train.shape == images.test.shape
    with pytest.raises(InputError, match=r"the validation images are \(3, 8, 8\), the training images \(3, 16, 16\)"):
        images_of(files_of(), split_of([0, 1]))


def test_the_image_must_fit_into_the_resized_image():
    assert files_of(resize_size=16).resize_size == 16
    with pytest.raises(InputError, match=r"dataset\.resize_size: 15 is below dataset\.image_size, 16") as caught:
        files_of(resize_size=15)
    assert caught.value.reason == "data"


def test_the_digest_of_files_is_of_path_size_and_label_and_of_what_is_shown():
    reference = digest_of(files_of(), 0, 2)
    assert digest_of(files_of(folder="/elsewhere"), 0, 2) == reference
    assert digest_of(files_of(sizes=torch.tensor([10, 99, 12])), 0, 2) == reference  # a file that is not asked for
    others = [
        digest_of(files_of(paths=np.array([b"a/0.jpg", b"a/1.jpg", b"b/y.jpg"])), 0, 2),
        digest_of(files_of(sizes=torch.tensor([10, 11, 13])), 0, 2),
        digest_of(files_of(labels=torch.tensor([0, 0, 0])), 0, 2),
        digest_of(files_of(image_size=15), 0, 2),
        digest_of(files_of(resize_size=21), 0, 2),
        digest_of(files_of(), 2, 0),
        digest_of(files_of(), 0),
    ]
    assert len({reference, *others}) == 8


def test_the_digest_of_images_in_memory_is_of_every_pixel_and_label():
    split = Split(torch.arange(4 * 12, dtype=torch.uint8).view(4, 3, 2, 2), torch.tensor([3, 1, 0, 2]))
    expected = hashlib.sha256(b"(2, (3, 2, 2))")
    expected.update(split.images.numpy()[[3, 1]].tobytes() + split.labels.numpy()[[3, 1]].tobytes())
    assert digest_of(split, 3, 1) == expected.hexdigest()


def test_files_are_selected_in_the_order_asked_for():
    part = files_of().select(torch.tensor([2, 0]))
    assert part.paths.tolist() == [b"b/x.jpg", b"a/0.jpg"]
    assert (part.sizes.tolist(), part.labels.tolist()) == ([12, 10], [1, 0])
    assert (part.folder, part.image_size, part.resize_size) == ("/photographs", 16, 20)
    assert files_of().select(torch.tensor([1])).paths.tolist() == [b"a/1.jpg"]


def test_a_file_is_read_upright_in_rgb_whole_or_as_it_is_shown(tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "0.png", exif=exif)
    paths, one = np.array([b"0.png"]), torch.tensor([0])
    split = FileSplit(str(tmp_path), paths, one, one, image_size=24, resize_size=24)
    np.testing.assert_array_equal(split.read(0, whole=True), np.stack([upright] * 3))
    np.testing.assert_array_equal(split.read(0, whole=False), np.stack([upright[:, 8:32]] * 3))


def test_a_share_may_be_rounded_down():
    labels = torch.tensor([0] * 40 + [1] * 31 + [2] * 29 + [3] * 9)
    taken, rest = divide_per_class(labels, 0.1, seed=3, round_down=True)
    assert labels[taken].bincount(minlength=4).tolist() == [4, 3, 2, 0]
    assert len(taken) + len(rest) == len(labels)
    nearest, _ = divide_per_class(labels, 0.1, seed=3)
    assert set(taken.tolist()) < set(nearest.tolist())


def test_the_ancestors_subset_is_that_of_its_published_list():
    assert ancestor_subset(50_000, 0.05)[:5].tolist() == [23925, 31661, 2191, 16118, 14378]
    assert len(ancestor_subset(50_000, 0.05)) == 2500
    for n, fraction in ((1, 0.5), (7, 0.5), (1000, 0.123), (1000, 1.0)):
        listed = list(range(n))
        np.random.RandomState(230).shuffle(listed)  # as it was drawn: a list, in place
        assert ancestor_subset(n, fraction).tolist() == listed[: int(np.floor(fraction * n))]

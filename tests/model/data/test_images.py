import numpy as np
import pytest
import torch

from model.data.images import Images, Split, divide_per_class, histogram, mean_and_std
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

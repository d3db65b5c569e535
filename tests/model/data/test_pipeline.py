import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from model.data import DATASETS, augmentations, create, resolve_unlabelled
from model.data.images import Images, Split, ancestor_subset
from model.data.loader import BatchLoader
from model.data.pipeline import Data, add_unlabelled, make_loader, prepare
from model.data.stream import StreamLoader
from model.data.views import Augmentation
from model.errors import InputError

CPU = torch.device("cpu")


def split_of(counts: list[int], seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Split(images, labels)


def images_of(counts=(40, 60, 25), **changes) -> Images:
    made = Images(
        train=split_of(list(counts)),
        val=None,
        test=split_of([5] * len(counts), seed=1),
        classes=tuple("abcdef"[: len(counts)]),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        augmentation="crop_flip",
    )
    return dataclasses.replace(made, **changes)


def data_of(images: Images | None = None, seed: int = 0, **options) -> Data:
    return prepare(images or images_of(), "toy", seed, CPU, **options)


def test_validation_is_carved_from_each_class_and_disjoint_from_training():
    data = data_of(val_fraction=0.2)
    assert data.val.labels.bincount().tolist() == [8, 12, 5]
    assert data.train.labels.bincount().tolist() == [32, 48, 20]
    both = torch.cat([data.train.indices, data.val.indices])
    assert torch.equal(both.sort().values, torch.arange(125))


def test_the_validation_split_depends_on_val_seed_only():
    reference = data_of().val.indices
    for other in (data_of(seed=9), data_of(subset_fraction=0.3), data_of(batch_size=3, augmentation="none")):
        assert torch.equal(other.val.indices, reference)
    assert not torch.equal(data_of(val_seed=1).val.indices, reference)


def test_an_own_validation_split_is_used_and_nothing_is_carved():
    own = split_of([4, 4, 4], seed=5)
    data = data_of(images_of(val=own), val_fraction=0.5)
    assert data.train.num_samples == 125
    (batch,) = data.val.epoch(0)
    assert torch.equal(batch.labels, own.labels)
    assert torch.equal(batch.indices, torch.arange(12))
    assert "12 val (the dataset's own)" in data.summary


def test_subset_fraction_takes_its_share_of_each_class_of_what_validation_leaves():
    whole, half = data_of(val_fraction=0.2), data_of(val_fraction=0.2, subset_fraction=0.5)
    assert half.train.labels.bincount().tolist() == [16, 24, 10]
    assert set(half.train.indices.tolist()) < set(whole.train.indices.tolist())
    assert torch.equal(half.train.indices, data_of(val_fraction=0.2, subset_fraction=0.5, seed=7).train.indices)
    other = data_of(val_fraction=0.2, subset_fraction=0.5, val_seed=7).train.indices
    assert not torch.equal(half.train.indices, other)


def test_a_subset_has_at_least_one_image_of_each_class_and_smaller_ones_are_inside_larger_ones():
    fractions = (1e-6, 0.05, 0.1, 0.5, 1.0)
    subsets = [set(data_of(subset_fraction=fraction).train.indices.tolist()) for fraction in fractions]
    assert len(subsets[0]) == 3
    for smaller, larger in itertools.pairwise(subsets):
        assert smaller < larger


def test_only_training_images_are_augmented_and_shuffled():
    data = data_of()
    assert data.train.augmentation == Augmentation(pad=4, horizontal=True)
    assert data.train.shuffle
    for loader in (data.val, data.test):
        batches = list(loader.epoch(3))
        assert all(int(batch.views.max()) == 0 for batch in batches)
        assert torch.equal(torch.cat([batch.indices for batch in batches]), loader.indices)


def test_a_batch_shows_the_image_of_the_original_list_at_its_index():
    images = images_of()
    data = data_of(images, augmentation="none", subset_fraction=0.5)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.mean, images.std))
    for loader, split in ((data.train, images.train), (data.val, images.train), (data.test, images.test)):
        for batch in loader.epoch(0):
            restored = ((batch.images * std + mean) * 255).round().to(torch.uint8)
            assert torch.equal(restored, split.images[batch.indices])
            assert torch.equal(batch.labels, split.labels[batch.indices])


def test_training_and_validation_share_one_copy_of_the_images():
    images = images_of()
    data = data_of(images)
    assert data.train.split.images.data_ptr() == data.val.split.images.data_ptr() == images.train.images.data_ptr()


def test_own_constants_and_augmentation_replace_the_datasets():
    data = data_of(mean=[0.1, 0.2, 0.3], std=[1, 2, 3], augmentation="flip")
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert data.train.augmentation == Augmentation(horizontal=True)
    (batch,) = data_of(mean=[0, 0, 0], std=[1, 1, 1], augmentation="none", batch_size=1000).train.epoch(0)
    assert 0 <= float(batch.images.min()) < 0.05
    assert 0.95 < float(batch.images.max()) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.5]}, "dataset.mean: 1 value given but the images have 3 channels"),
        ({"std": [0.5] * 4}, "dataset.std: 4 values given but the images have 3 channels"),
        ({"std": [0.5, 0.0, 0.5]}, r"dataset.std: \[0.5, 0.0, 0.5\] is not above 0"),
        ({"val_fraction": 0.001}, "val_fraction: 0.001 leaves class 'a' .and 2 more.* 40 training and 0 validation"),
        ({"val_fraction": 0.999}, "leaves class 'a' .* 0 training and 40 validation"),
    ],
)
def test_options_that_do_not_fit_the_data_are_one_sentence(options, message):
    with pytest.raises(InputError, match=message) as caught:
        data_of(**options)
    assert caught.value.reason == "data"
    assert "\n" not in str(caught.value)


def test_a_class_too_small_to_carve_from_is_named():
    with pytest.raises(InputError, match=r"leaves class 'b' with 3 training and 0 validation images; each class"):
        data_of(images_of((40, 3, 25)))


def test_images_that_are_all_alike_ask_for_a_std():
    with pytest.raises(InputError, match=r"give dataset\.std"):
        data_of(images_of(std=(0.2, 0.0, 0.2)))
    assert data_of(images_of(std=(0.2, 0.0, 0.2)), std=[1, 1, 1]).std == (1, 1, 1)


def test_the_fingerprint_changes_with_one_pixel_one_label_or_one_class_name():
    reference = data_of()
    assert len(reference.fingerprint) == 64
    assert data_of().fingerprint == reference.fingerprint

    trained_on, validated_on = int(reference.train.indices[3]), int(reference.val.indices[0])
    changed = []
    for position in (trained_on, validated_on):
        images = images_of()
        images.train.images[position, 1, 2, 3] ^= 1
        changed.append(data_of(images).fingerprint)
    # Labels are exchanged, so that the carve keeps its counts.
    images = images_of()
    labels = images.train.labels
    first, second = int((labels == 0).nonzero()[0]), int((labels == 1).nonzero()[0])
    labels[first], labels[second] = 1, 0
    changed.append(data_of(images).fingerprint)
    changed.append(data_of(images_of(classes=("a", "b", "x"))).fingerprint)
    changed.append(data_of(val_seed=1).fingerprint)
    changed.append(data_of(subset_fraction=0.5).fingerprint)
    assert len({reference.fingerprint, *changed}) == 7


def test_the_fingerprint_does_not_depend_on_what_is_not_in_the_data():
    reference = data_of().fingerprint
    for other in (data_of(seed=4), data_of(batch_size=2), data_of(augmentation="none"), data_of(std=[1, 1, 1])):
        assert other.fingerprint == reference
    # an image that is neither trained on nor validated on
    subset = data_of(subset_fraction=0.5)
    used = {*subset.train.indices.tolist(), *subset.val.indices.tolist()}
    images = images_of()
    images.train.images[next(i for i in range(125) if i not in used)] ^= 255
    assert data_of(images, subset_fraction=0.5).fingerprint == subset.fingerprint


def test_the_data_describe_themselves_in_one_line():
    assert data_of(images_of((1200, 60, 25)), val_fraction=0.2, val_seed=3).summary == (
        "toy: 1,028 train, 257 val (carved, seed 3), 15 test images of 3x8x8, 3 classes, "
        "augmentation crop_flip (162 views)"
    )
    assert data_of(images_of(test=None), subset_fraction=0.5, augmentation="none").summary == (
        "toy: 56 train (subset 0.5), 13 val (carved, seed 0), no test images of 3x8x8, 3 classes, "
        "augmentation none (1 view)"
    )


def test_the_facts_for_a_checkpoint_are_plain_lists_and_numbers():
    assert data_of().facts() == {
        "num_classes": 3,
        "classes": ["a", "b", "c"],
        "shape": [3, 8, 8],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
    }


def test_without_a_test_split_there_is_no_test_loader():
    assert data_of(images_of(test=None)).test is None


def test_selecting_on_the_test_split_carves_nothing_and_says_so():
    images = images_of(val=split_of([4, 4, 4], seed=5))
    data = data_of(images, validate_on="test")
    assert data.val is data.test
    assert (data.selected_on, data_of().selected_on) == ("test", "val")
    assert data.train.num_samples == 125
    (batch,) = data.val.epoch(0)
    assert torch.equal(batch.labels, images.test.labels)
    assert data.summary.startswith("toy: 125 train, val IS THE TEST SPLIT, 15 test images of")
    assert data.fingerprint not in {data_of(images).fingerprint, data_of(validate_on="val").fingerprint}
    with pytest.raises(InputError, match=r"dataset\.validate_on: dataset 'toy' has no test split"):
        data_of(images_of(test=None), validate_on="test")


def test_the_ancestors_subset_is_of_the_whole_list_or_of_what_validation_leaves():
    on_test = data_of(validate_on="test", subset_fraction=0.2, subset_rule="ancestor").train.indices
    assert torch.equal(on_test, ancestor_subset(125, 0.2).sort().values)
    left = data_of(val_fraction=0.2).train.indices
    carved = data_of(val_fraction=0.2, subset_fraction=0.2, subset_rule="ancestor", val_seed=0).train.indices
    assert torch.equal(carved, left[ancestor_subset(100, 0.2)].sort().values)
    with pytest.raises(InputError, match=r"dataset\.subset_fraction: 0\.001 of 112 images is none"):
        data_of(subset_fraction=0.001, subset_rule="ancestor")


def test_a_dataset_may_ask_for_rounding_down():
    counts = (19, 25, 30)
    data = data_of(images_of(counts, round_down=True))
    assert data.val.labels.bincount().tolist() == [1, 2, 3]
    assert data_of(images_of(counts)).val.labels.bincount().tolist() == [2, 3, 3]


def test_a_list_of_crop_and_flips_takes_the_fast_path_and_any_other_list_is_streamed():
    fast = data_of(augmentation=["vertical_flip", {"name": "crop", "padding": 2}, "horizontal_flip"])
    assert isinstance(fast.train, BatchLoader)
    assert fast.train.augmentation == Augmentation(2, horizontal=True, vertical=True)
    assert fast.summary.endswith("augmentation vertical_flip + crop + horizontal_flip (100 views)")
    slow = data_of(augmentation=["crop", {"name": "rotation", "degrees": 5}])
    assert isinstance(slow.train, StreamLoader)
    assert slow.summary.endswith("augmentation crop + rotation")
    assert isinstance(slow.val, BatchLoader)
    assert data_of(augmentation=[]).summary.endswith("augmentation none (1 view)")
    batches = list(slow.train.epoch(0))
    assert all((batch.views == -1).all() for batch in batches)
    assert torch.equal(torch.cat([batch.indices for batch in batches]).sort().values, slow.train.indices)


def test_the_named_augmentations_are_short_for_lists():
    for name, listed in (("crop_flip", ["crop", "horizontal_flip"]), ("flip", ["horizontal_flip"]), ("none", [])):
        for one, other in zip(*(data_of(augmentation=a).train.epoch(1) for a in (name, listed)), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.views, other.views)


def test_erased_pixels_are_about_0_after_the_runs_own_normalisation():
    white = images_of(train=Split(torch.full((60, 3, 8, 8), 255, dtype=torch.uint8), torch.arange(60) % 3))
    erasing = [{"name": "random_erasing", "probability": 1.0}]
    mean, std = (0.1, 0.5, 0.8), (0.2, 0.25, 0.3)
    data = data_of(white, augmentation=erasing, mean=list(mean), std=list(std))
    erased = torch.cat([b.images for b in data.train.epoch(0)]).permute(1, 0, 2, 3).flatten(1).amin(1)
    assert (erased.abs() <= 0.5 / 255 / torch.tensor(std) + 1e-6).all()


def test_workers_change_nothing_but_speed():
    listed = ["crop", "color_jitter"]
    alone, helped = (data_of(augmentation=listed, num_workers=n) for n in (0, 2))
    assert (alone.fingerprint, alone.summary) == (helped.fingerprint, helped.summary)
    for one, other in zip(alone.train.epoch(0), helped.train.epoch(0), strict=True):
        assert torch.equal(one.images, other.images)


def test_an_unchecked_list_is_checked_here():
    with pytest.raises(InputError, match=r"dataset\.augmentation\.0\.name: unknown augmentation 'crops'"):
        data_of(augmentation=["crops"])


def test_torchvision_is_not_loaded_for_a_run_that_needs_none_of_it():
    code = """
import sys, torch
from model.data import create, DATASETS
for augmentation in ("crop_flip", ["horizontal_flip", "vertical_flip"], None):
    section, _ = DATASETS.resolve({"name": "synthetic", "augmentation": augmentation})
    list(create(section, seed=0, device=torch.device("cpu")).train.epoch(0))
DATASETS.resolve({"name": "synthetic", "augmentation": ["rotation", {"name": "rand_augment", "magnitude": 40}]})
print([name for name in ("torchvision", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_resolved_section_is_all_that_create_needs():
    section, problems = DATASETS.resolve({"name": "synthetic", "train_size": 80, "batch_size": 10, "val_fraction": 0.2})
    assert not problems
    data = create(section, seed=3, device=CPU)
    assert (data.num_classes, data.shape, len(data.train), data.val.num_samples) == (4, (3, 16, 16), 7, 16)
    assert len(data.classes) == 4
    assert data.train.seed == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 65537),
        ("eval_batch_size", 2.5),
        ("augmentation", "cutmix"),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("subset_fraction", 0.0),
        ("subset_fraction", 1.1),
        ("val_seed", "1"),
        ("validate_on", "train"),
        ("subset_rule", "first"),
        ("num_workers", -1),
        ("mean", 0.5),
        ("std", [0.5, 0.0, 0.5]),
    ],
)
def test_common_options_are_checked_for_every_dataset(option, value):
    for name in DATASETS:
        _, problems = DATASETS.resolve({"name": name, "data_dir": "x", option: value})
        assert any(key.split(".")[0] == option for key, _ in problems), name


# --- more than samples under one view ------------------------------------------------------------------------


def test_without_more_what_is_trained_on_is_the_training_set():
    data = data_of()
    assert data.lessons is data.train
    assert data.second is None
    assert data.unlabelled is None


def test_a_second_view_has_its_own_transforms_and_the_same_samples():
    data = data_of(second_augmentation=["crop", "horizontal_flip", "rand_augment"], batch_size=16)
    assert torch.equal(data.second.indices, data.train.indices)
    assert data.second.num_views is None
    assert "second view crop + horizontal_flip + rand_augment" in data.summary
    batch = next(iter(data.lessons.epoch(0)))
    assert batch.strong_images.shape == batch.images.shape == (16, 3, 8, 8)


def test_a_second_view_by_the_same_transforms_is_another_view():
    data = data_of(augmentation="crop_flip", second_augmentation="crop_flip", batch_size=64)
    batch = next(iter(data.lessons.epoch(0)))
    same = (batch.images == batch.strong_images).flatten(1).all(1)
    assert same.float().mean() < 0.2, "1 of 162 views, and of 8x8 images with random pixels"
    again = next(
        iter(data_of(augmentation="crop_flip", second_augmentation="crop_flip", batch_size=64).lessons.epoch(0))
    )
    assert torch.equal(batch.strong_images, again.strong_images)


def test_what_is_wrong_with_a_second_view_names_it():
    with pytest.raises(InputError, match=r"dataset\.second_augmentation.*did you mean 'crop'"):
        data_of(second_augmentation=["crops"])


def test_samples_are_labelled_by_position_where_they_are_trained_on():
    images = images_of()
    data = data_of(images, subset_fraction=0.5)
    samples = data.samples()
    expected = torch.full((125,), -1)
    expected[data.train.indices] = images.train.labels[data.train.indices]
    assert torch.equal(samples.labels, expected)
    assert samples.num_classes == 3


def with_unlabelled(images: Images | None, data: Data, **options) -> Data:
    return add_unlabelled(data, images, "toy", {"batch_size": 8, "augmentation": None, "num_workers": None} | options)


def test_the_rest_is_what_is_neither_trained_nor_validated_on():
    data = data_of(subset_fraction=0.25)
    more = with_unlabelled(None, data)
    parts = [more.unlabelled.indices, data.train.indices, data.val.indices]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(125))
    assert more.unlabelled.split is data.train.split, "no second copy"
    assert f"{len(parts[0])} unlabelled images of toy, 8 to a step" in more.summary
    assert more.unlabelled.augmentation == data.train.augmentation


def test_of_another_dataset_all_training_images_are_taken_and_seen_as_the_student_sees_its_own():
    other = images_of((30, 3), mean=(0.1,) * 3, std=(0.9,) * 3)
    data = data_of()
    more = with_unlabelled(other, data, batch_size=11, augmentation="none")
    assert more.unlabelled.num_samples == 33
    assert more.unlabelled.num_views == 1
    batch = next(iter(more.unlabelled.epoch(0)))
    pixels = other.train.images[batch.indices] / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    torch.testing.assert_close(batch.images, (pixels - mean) / std)


def test_images_that_select_the_epoch_are_not_learnt_from_under_another_name():
    images = images_of()
    data = data_of(images, subset_fraction=0.5)
    again = with_unlabelled(images_of(), data)
    assert not torch.isin(again.unlabelled.indices, data.val.indices).any()
    assert torch.isin(data.train.indices, again.unlabelled.indices).all(), "but the others all are"
    part = torch.cat([data.train.indices[:9], data.val.indices])
    some = with_unlabelled(images_of(train=images.train.select(part), test=None), data)
    assert some.unlabelled.num_samples == 9, "in whatever list they stand"
    assert images.test is not None
    for own in (data, data_of(images, validate_on="test")):
        tested = torch.cat([images.test.images, images.train.images[:5]])
        labels = torch.cat([images.test.labels, images.train.labels[:5]])
        among = with_unlabelled(images_of(train=Split(tested, labels), test=None), own)
        carved = own.val.indices if own is data else torch.empty(0)
        assert among.unlabelled.num_samples == 5 - int((carved < 5).sum())


def test_a_loader_that_draws_image_by_image_takes_them_from_the_cpu_wherever_another_has_moved_them(monkeypatch):
    here = images_of().train
    monkeypatch.setattr(Split, "to", lambda self, device: here if device == CPU else pytest.fail("to another device"))
    moved = Split(here.images.clone(), here.labels)
    options = {"num_workers": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3, "batch_size": 4, "seed": 0, "device": CPU}
    sections = augmentations.resolve(["crop", {"name": "rand_augment"}])[0]
    loader = make_loader(moved, sections, indices=torch.arange(8), **options)
    assert isinstance(loader, StreamLoader)
    assert loader.split is here


def test_unlabelled_images_change_the_fingerprint():
    data = data_of(subset_fraction=0.5)
    found = {data.fingerprint, with_unlabelled(None, data).fingerprint, with_unlabelled(images_of(), data).fingerprint}
    assert len(found) == 3


def test_unlabelled_images_that_will_not_do_are_refused():
    with pytest.raises(InputError, match=r"leaves 0 of its training images over; lower dataset\.subset_fraction"):
        with_unlabelled(None, data_of())
    larger = Split(torch.zeros(4, 3, 9, 9, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InputError, match=r"its images are \(3, 9, 9\), those of dataset \(3, 8, 8\)"):
        with_unlabelled(images_of(train=larger, test=None), data_of())


def test_an_unlabelled_section_takes_the_options_of_its_dataset_and_its_own():
    assert resolve_unlabelled(None) == (None, [])
    rest, problems = resolve_unlabelled("rest")
    assert problems == []
    assert rest == {"name": "rest", "batch_size": 128, "augmentation": None, "num_workers": None}
    section, problems = resolve_unlabelled({"name": "synthetic", "train_size": 64, "batch_size": 16})
    assert problems == []
    assert resolve_unlabelled(section) == (section, [])
    assert "val_fraction" not in section, "nothing is carved from them"
    assert [key for key, _ in resolve_unlabelled({"name": "synthetic", "val_fraction": 0.1})[1]] == ["val_fraction"]
    assert [key for key, _ in resolve_unlabelled({"name": "rest", "train_size": 3})[1]] == ["train_size"]
    assert [key for key, _ in resolve_unlabelled("rset")[1]] == ["name"]


def test_the_data_of_a_run_comes_with_its_unlabelled_images():
    section, _ = DATASETS.resolve({"name": "synthetic", "train_size": 200, "batch_size": 16, "subset_fraction": 0.2})
    for unlabelled in ("rest", {"name": "synthetic", "train_size": 90, "batch_size": 9}):
        more = create(section, seed=0, device=CPU, unlabelled=resolve_unlabelled(unlabelled)[0])
        batch = next(iter(more.lessons.epoch(0)))
        assert len(batch.images) == len(batch.labels) + more.unlabelled.batch_size

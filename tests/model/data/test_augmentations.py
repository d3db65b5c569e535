import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from model.data.augmentations import NAMED, TRANSFORMS, Canvas, as_views, create, resolve
from model.data.pipeline import prepare
from model.data.views import PLAIN, Augmentation, apply_views
from model.registry import check_options

MEAN = (0.5, 0.3, 0.1)


def noise(height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def made(*augmentation, size: int = 32):
    sections, problems = resolve(augmentation)
    assert not problems
    return create(sections, Canvas((3, size, size), MEAN))


def shown(image: torch.Tensor, *augmentation, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return made(*augmentation, size=image.shape[1])(image)


def test_no_transforms_show_the_image_itself():
    image = noise()
    assert torch.equal(shown(image), image)


@pytest.mark.parametrize(("name", "axis"), [("horizontal_flip", 2), ("vertical_flip", 1)])
def test_flips_mirror_as_often_as_they_are_told_to(name, axis):
    image = noise(8, 8)
    for probability in (0.0, 0.3, 1.0):
        flip = made({"name": name, "probability": probability}, size=8)
        torch.manual_seed(0)
        seen = [flip(image) for _ in range(1000)]
        mirrored = [torch.equal(one, image.flip(axis)) for one in seen]
        assert all(is_mirrored or torch.equal(one, image) for one, is_mirrored in zip(seen, mirrored, strict=True))
        deviation = (probability * (1 - probability) / 1000) ** 0.5
        assert abs(sum(mirrored) / 1000 - probability) <= 4 * deviation
    assert len({shown(image, name, seed=seed).numpy().tobytes() for seed in range(20)}) == 2


@pytest.mark.parametrize("padding", [1, 4])
def test_crop_shows_every_window_of_the_black_padded_image_and_nothing_else(padding):
    image = noise(8, 8)
    padded = torch.nn.functional.pad(image, [padding] * 4)
    windows = {
        padded[:, top : top + 8, left : left + 8].numpy().tobytes()
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }
    crop = made({"name": "crop", "padding": padding}, size=8)
    torch.manual_seed(0)
    assert {crop(image).contiguous().numpy().tobytes() for _ in range(2000)} == windows


def test_rotation_turns_by_an_angle_within_its_limits():
    image = noise()
    for seed in range(10):
        torch.manual_seed(seed)
        angle = float(torch.empty(1).uniform_(-40, 40))
        assert torch.equal(shown(image, {"name": "rotation", "degrees": 40}, seed=seed), tv.rotate(image, angle))
    assert torch.equal(shown(image, {"name": "rotation", "degrees": 0}), image)


def jitter(image: torch.Tensor, seed: int = 0, **strengths: float) -> torch.Tensor:
    strengths = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, **strengths}
    return shown(image, {"name": "color_jitter", **strengths}, seed=seed)


def test_color_jitter_changes_what_it_is_told_to():
    grey, colour = torch.full((3, 8, 8), 100, dtype=torch.uint8), noise(8, 8)
    assert torch.equal(jitter(colour), colour)
    brighter = [int(jitter(grey, seed, brightness=0.2).unique()) for seed in range(200)]
    assert {min(brighter), max(brighter)} <= set(range(79, 121))
    assert max(brighter) - min(brighter) > 35
    # A grey image of one value has no contrast, saturation or hue to change.
    assert (jitter(grey, contrast=0.9, saturation=0.9, hue=0.5).int() - 100).abs().max() <= 3  # each truncates
    saturated = jitter(colour, saturation=0.5)
    assert not torch.equal(saturated, colour)
    grey_of = (tv.rgb_to_grayscale(one, 1).float() for one in (colour, saturated))
    assert next(grey_of).mean() == pytest.approx(next(grey_of).mean(), abs=3)  # luminance stays


def test_color_jitter_has_the_strengths_of_seed_002_by_default():
    image = noise()
    torch.manual_seed(3)
    assert torch.equal(shown(image, "color_jitter", seed=3), _with_seed(3, v2.ColorJitter(0.2, 0.2, 0.2), image))


def _with_seed(seed: int, reference, image: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(seed)
    return reference(image)


def test_random_resized_crop_shows_shares_of_the_area_within_its_scale():
    x = torch.arange(256, dtype=torch.uint8)
    ramps = torch.stack([x.expand(256, 256), x[:, None].expand(256, 256), torch.zeros(256, 256, dtype=torch.uint8)])
    section = {"name": "random_resized_crop", "scale": [0.25, 0.5], "ratio": [0.5, 2.0]}
    crop = made(section, size=64)
    torch.manual_seed(0)
    areas, ratios = [], []
    for _ in range(200):
        out = crop(ramps)
        assert out.shape == (3, 64, 64)
        # A ramp stays a ramp, so that its slope tells the side of the part; the edges are left out.
        width, height = ((out[c].double().diff(dim=1 - c)[8:-8, 8:-8].mean() * 64).item() for c in (0, 1))
        areas.append(width * height / 256**2)
        ratios.append(width / height)
    assert 0.25 - 0.02 <= min(areas) < 0.3
    assert 0.45 < max(areas) <= 0.5 + 0.02
    assert 0.48 <= min(ratios) < 0.65
    assert 1.55 < max(ratios) <= 2.1


def test_random_resized_crop_of_all_of_a_square_is_a_plain_resize():
    image = noise(50, 50)
    sections, _ = resolve([{"name": "random_resized_crop", "scale": [1, 1], "ratio": [1, 1]}])
    out = create(sections, Canvas((3, 32, 32), MEAN))(image)
    assert torch.equal(out, tv.resize(image, [32, 32], antialias=True))


@pytest.mark.parametrize(
    ("section", "reference"),
    [
        ("random_resized_crop", lambda: v2.RandomResizedCrop(32)),
        ("rotation", lambda: v2.RandomRotation(15)),
        ("rand_augment", lambda: v2.RandAugment(2, 9)),
        ({"name": "rand_augment", "num_ops": 3, "magnitude": 20}, lambda: v2.RandAugment(3, 20)),
        ("auto_augment", lambda: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)),
        ({"name": "auto_augment", "policy": "cifar10"}, lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)),
    ],
)
def test_a_transform_is_torchvisions_of_that_name(section, reference):
    reference = reference()
    for seed in range(20):
        image = noise(40, 36, seed)
        sections, _ = resolve([section])
        torch.manual_seed(seed)
        out = create(sections, Canvas((3, 32, 32), MEAN))(image)
        assert torch.equal(out, _with_seed(seed, reference, image))


def test_random_erasing_fills_one_rectangle_with_the_mean():
    image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    erased = 0
    for seed in range(200):
        out = shown(image, {"name": "random_erasing", "probability": 1.0}, seed=seed)
        changed = (out != 200).any(0)
        rows, columns = changed.any(1), changed.any(0)
        assert changed.sum() == rows.sum() * columns.sum()  # a rectangle
        assert 0.01 < changed.double().mean() < 0.35
        filled = out[:, changed].unique(dim=1)
        for channel, mean in enumerate(MEAN):
            assert abs(int(filled[channel]) / 255 - mean) <= 0.5 / 255  # 0 after normalisation, to within rounding
        erased += not torch.equal(shown(image, "random_erasing", seed=seed), image)
    assert 70 < erased < 130


def test_the_order_of_the_list_is_the_order_of_the_transforms():
    image = noise()
    erasing, brighter = {"name": "random_erasing", "probability": 1.0}, {"name": "color_jitter", "brightness": 0.9}
    torch.manual_seed(1)
    expected = made(brighter)(made(erasing)(image))
    assert torch.equal(shown(image, erasing, brighter, seed=1), expected)
    assert not torch.equal(shown(image, brighter, erasing, seed=1), expected)


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_every_transform_keeps_type_and_size_and_draws_from_torchs_generator_only(name):
    image = noise()
    before, python_state, numpy_state = image.clone(), random.getstate(), np.random.get_state()[1].copy()
    first = [shown(image, name, seed=seed) for seed in range(10)]
    assert random.getstate() == python_state
    assert (np.random.get_state()[1] == numpy_state).all()
    random.seed(1)
    np.random.seed(1)
    for seed, out in enumerate(first):
        assert out.shape == image.shape
        assert out.dtype == torch.uint8
        assert torch.equal(shown(image, name, seed=seed), out)
    assert torch.equal(image, before)
    assert len({out.contiguous().numpy().tobytes() for out in first}) > 1


def test_only_random_resized_crop_asks_for_whole_images():
    for name in TRANSFORMS:
        assert made("horizontal_flip", name).whole == (name == "random_resized_crop")


@pytest.mark.parametrize(
    ("listed", "family"),
    [
        (NAMED["crop_flip"], Augmentation(4, horizontal=True)),
        (NAMED["crop"], Augmentation(4)),
        (NAMED["flip"], Augmentation(horizontal=True)),
        (NAMED["none"], PLAIN),
        (["horizontal_flip", "vertical_flip"], Augmentation(horizontal=True, vertical=True)),
        (["vertical_flip", {"name": "crop", "padding": 2}], Augmentation(2, vertical=True)),
        ([{"name": "horizontal_flip", "probability": 0.4}], None),
        (["horizontal_flip", "horizontal_flip"], None),
        (["crop", "rotation"], None),
    ],
)
def test_lists_of_crop_and_even_flips_are_numbered_views(listed, family):
    sections, problems = resolve(listed)
    assert not problems
    assert as_views(sections) == family


def seen(transforms, image: torch.Tensor) -> set[bytes]:
    torch.manual_seed(0)
    return {transforms(image).contiguous().numpy().tobytes() for _ in range(1000)}


def test_a_list_shows_the_very_images_that_its_numbered_views_are():
    image = noise(6, 6)
    listed = ["vertical_flip", {"name": "crop", "padding": 1}, "horizontal_flip"]
    family = as_views(resolve(listed)[0])
    views = apply_views(image.expand(36, -1, -1, -1), torch.arange(36), family)
    assert seen(made(*listed, size=6), image) == {view.numpy().tobytes() for view in views}


@pytest.mark.parametrize(
    ("augmentation", "key", "message"),
    [
        (
            "cutmix",
            "augmentation",
            'expected crop_flip, crop, flip, none, or a list of names and {"name": ..., options}; got',
        ),
        (3, "augmentation", "got 3"),
        (["crop", 3], "augmentation", "got ['crop', 3]"),
        (["flipp"], "augmentation.0.name", "unknown augmentation 'flipp'; known: auto_augment, color_jitter"),
        (["crop", "rotations"], "augmentation.1.name", "did you mean 'rotation'"),
        ([{"padding": 2}], "augmentation.0.name", "is missing"),
        ([{"name": "crop", "pading": 2}], "augmentation.0.pading", "did you mean 'padding'"),
        (["crop", {"name": "rand_augment", "magnitude": 31}], "augmentation.1.magnitude", "31 is above 30"),
        ([{"name": "rotation", "degrees": "{10}"}], "augmentation.0.degrees", "expected a number, got '{10}'"),
        ([{"name": "random_resized_crop", "scale": [0.5, 0.1]}], "augmentation.0.scale", "expected [smallest, la"),
        ([{"name": "random_resized_crop", "ratio": [1.0]}], "augmentation.0.ratio", "got [1.0]"),
        ([{"name": "random_resized_crop", "scale": [0, 1]}], "augmentation.0.scale.0", "0 is not above 0"),
        ([{"name": "auto_augment", "policy": "svhn"}], "augmentation.0.policy", "is not one of 'cifar10' or"),
    ],
)
def test_what_is_wrong_with_a_list_is_found_when_params_are_checked(augmentation, key, message):
    _, problems = check_options({"augmentation": augmentation}, prepare)
    assert [found for found, _ in problems] == [key]
    (text,) = (text for _, text in problems)
    assert "\n" not in text
    assert message in text


def test_every_problem_of_a_list_is_reported_and_a_good_one_is_kept_as_it_was_written():
    bad = ["crops", {"name": "rand_augment", "magnitude": 31, "ops": 2}]
    assert [key for key, _ in check_options({"augmentation": bad}, prepare)[1]] == [
        "augmentation.0.name",
        "augmentation.1.magnitude",
        "augmentation.1.ops",
    ]
    for good in (["crop", {"name": "rotation", "degrees": 10}], [], "flip", None):
        assert check_options({"augmentation": good}, prepare)[0]["augmentation"] == good

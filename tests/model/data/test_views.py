import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from model.data.views import PLAIN, Augmentation, apply_views, draw_views
from model.rng import derive_seed

CROP_FLIP = Augmentation(pad=4, horizontal=True)
FAMILIES = [
    pytest.param(Augmentation(pad, horizontal, vertical), id=f"pad {pad}{' h' * horizontal}{' v' * vertical}")
    for pad in (0, 1, 4)
    for horizontal in (False, True)
    for vertical in (False, True)
]


def images_of(n: int, height: int = 32, width: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def shown_by_hand(image: np.ndarray, view: int, augmentation: Augmentation) -> np.ndarray:
    """One image under one view, pixel by pixel, from the definition in the module's docstring."""
    pad = augmentation.pad
    side = 2 * pad + 1
    mirroring, shift = divmod(view, side * side)
    allowed = [kind for kind in ("horizontal", "vertical") if getattr(augmentation, kind)]
    mirrored = {kind: bool(mirroring >> position & 1) for position, kind in enumerate(allowed)}
    assert mirroring < 2 ** len(allowed)
    top, left = divmod((shift + side * side // 2) % (side * side), side)
    _, height, width = image.shape
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            source_y, source_x = y + top - pad, x + left - pad
            if 0 <= source_y < height and 0 <= source_x < width:
                to_y = height - 1 - y if mirrored.get("vertical") else y
                to_x = width - 1 - x if mirrored.get("horizontal") else x
                out[:, to_y, to_x] = image[:, source_y, source_x]
    return out


@pytest.mark.parametrize("augmentation", FAMILIES)
def test_every_view_equals_a_pixel_by_pixel_crop_and_flip(augmentation):
    views = torch.arange(augmentation.num_views)
    images = images_of(len(views), height=7, width=9)
    shown = apply_views(images, views, augmentation)
    assert shown.dtype == torch.uint8
    for image, view, out in zip(images.numpy(), views.tolist(), shown.numpy(), strict=True):
        np.testing.assert_array_equal(out, shown_by_hand(image, view, augmentation))


@pytest.mark.parametrize("augmentation", FAMILIES)
def test_views_equal_torchvisions_pad_crop_and_flip(augmentation):
    views = torch.arange(augmentation.num_views)
    images = images_of(len(views))
    shown = apply_views(images, views, augmentation)
    for image, top, left, mirrored, upside_down, out in zip(images, *augmentation.decode(views), shown, strict=True):
        expected = tv.crop(tv.pad(image, [augmentation.pad] * 4), int(top), int(left), 32, 32)
        expected = tv.horizontal_flip(expected) if mirrored else expected
        assert torch.equal(out, tv.vertical_flip(expected) if upside_down else expected)


@pytest.mark.parametrize(
    ("augmentation", "count"),
    [
        (CROP_FLIP, 162),
        (Augmentation(pad=4), 81),
        (Augmentation(horizontal=True), 2),
        (Augmentation(vertical=True), 2),
        (Augmentation(horizontal=True, vertical=True), 4),
        (Augmentation(4, True, True), 324),
        (PLAIN, 1),
    ],
)
def test_views_are_numbered_one_to_one(augmentation, count):
    assert augmentation.num_views == count
    top, left, mirrored, upside_down = (part.tolist() for part in augmentation.decode(torch.arange(count)))
    assert len(set(zip(top, left, mirrored, upside_down, strict=True))) == count
    for corner in (top, left):
        assert min(corner) >= 0
        assert max(corner) <= 2 * augmentation.pad


@pytest.mark.parametrize("augmentation", FAMILIES)
def test_view_0_is_the_plain_image(augmentation):
    images = images_of(5)
    assert torch.equal(apply_views(images, torch.zeros(5, dtype=torch.int64), augmentation), images)


def test_the_images_handed_in_are_left_as_they_are():
    images = images_of(4)
    before = images.clone()
    apply_views(images, torch.tensor([5, 90, 161, 0]), CROP_FLIP)
    assert torch.equal(images, before)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 40), (4, 33, 7)])
def test_any_number_of_channels_and_any_image_size_will_do(shape):
    channels, height, width = shape
    views = torch.tensor([0, 7, 100, 161])
    images = images_of(4, height, width, channels)
    for image, view, out in zip(images, views, apply_views(images, views, CROP_FLIP), strict=True):
        np.testing.assert_array_equal(out.numpy(), shown_by_hand(image.numpy(), int(view), CROP_FLIP))


def splitmix64(state: int) -> int:
    mask = 2**64 - 1
    state &= mask
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


def test_views_are_drawn_by_splitmix64():
    # The generator's published first output for state 0, so that the oracle itself is checked.
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    indices = torch.tensor([0, 1, 49999, 2**40])
    key = derive_seed(3, "view", 7)
    expected = [(splitmix64(key + i * 0x9E3779B97F4A7C15) >> 32) * 162 >> 32 for i in indices.tolist()]
    assert draw_views(3, 7, indices, 162).tolist() == expected


@pytest.mark.parametrize("num_views", [2, 81, 162])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (230, 1), (230, 2)])
def test_views_are_drawn_uniformly(num_views, seed, epoch):
    expected = 1000
    counts = draw_views(seed, epoch, torch.arange(expected * num_views), num_views).bincount(minlength=num_views)
    assert len(counts) == num_views
    chi_square = float(((counts - expected).double() ** 2 / expected).sum())
    freedom = num_views - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 10


def test_neighbouring_samples_and_epochs_draw_independently():
    indices = torch.arange(100_000)
    this, following = (draw_views(1, epoch, indices, 162) for epoch in (0, 1))
    chance = 1 / 162
    tolerance = 5 * (chance / len(indices)) ** 0.5
    for one, other in ((this, following), (this[1:], this[:-1]), (this, draw_views(2, 0, indices, 162))):
        assert abs(float((one == other).double().mean()) - chance) < tolerance


def test_a_samples_view_does_not_depend_on_the_other_samples_or_their_order():
    indices = torch.arange(1000)
    views = draw_views(5, 2, indices, 162)
    for trial in range(10):
        some = torch.randperm(1000, generator=torch.Generator().manual_seed(trial))[: 100 * trial + 1]
        assert torch.equal(draw_views(5, 2, some, 162), views[some])
    assert torch.equal(draw_views(5, 2, indices[:0], 162), views[:0])

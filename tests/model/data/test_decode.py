import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from model.data.decode import cached, cut_centre, decode, decode_all
from model.errors import InputError


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def saved(path: Path, image: Image.Image, **options) -> str:
    image.save(path, **options)
    return str(path)


def test_an_image_of_the_right_size_is_taken_as_it_is(tmp_path):
    pixels = noise(16, 16)
    path = saved(tmp_path / "a.png", Image.fromarray(pixels))
    np.testing.assert_array_equal(decode(path, 16), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32), (32, 32), (5, 9), (33, 32)])
def test_other_sizes_show_the_resized_centre_square(tmp_path, height, width):
    # A plane is what bilinear interpolation leaves a plane, so the result is known away from the edges.
    y, x = np.mgrid[:height, :width]
    plane = np.stack([40 + 3 * x, 40 + 3 * y, np.full_like(x, 77)], axis=2).astype(np.uint8)
    side, size = min(height, width), 16
    out = decode(saved(tmp_path / "a.png", Image.fromarray(plane)), size).astype(float)
    place = (np.arange(size) + 0.5) * side / size - 0.5
    inner = slice(4, -4)
    np.testing.assert_allclose(out[0, 8][inner], 40 + 3 * (place + (width - side) / 2)[inner], atol=0.51)
    np.testing.assert_allclose(out[1, :, 8][inner], 40 + 3 * (place + (height - side) / 2)[inner], atol=0.51)
    assert (out[2] == 77).all()


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    out = decode(saved(tmp_path / "a.png", Image.fromarray(stripes)), 16)
    assert 120 < out.min() <= out.max() < 136  # taking every eighth column would give 0 or 255


def test_a_rotated_photograph_is_shown_upright(tmp_path):
    upright = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    path = saved(tmp_path / "a.png", Image.fromarray(np.rot90(upright).copy()), exif=exif)
    np.testing.assert_array_equal(decode(path, 16), upright.transpose(2, 0, 1))


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def palette_with_transparency() -> Image.Image:
    image = Image.fromarray(GREY).convert("P")
    image.info["transparency"] = bytes(range(256))
    return image


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", Image.fromarray(GREY), GREY),
        ("alpha.png", Image.fromarray(GREY).convert("RGBA"), GREY),
        ("grey_alpha.png", Image.fromarray(GREY).convert("LA"), GREY),
        ("palette.gif", Image.fromarray(GREY).convert("P"), GREY),
        ("palette.png", palette_with_transparency(), GREY),
        ("bits.png", Image.fromarray(GREY >= 128).convert("1"), (GREY >= 128) * 255),
        ("deep.png", Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        ("deep.tif", Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        ("wide.tif", Image.fromarray(GREY.astype(np.int32) * 257), GREY),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path, name, image, expected):
    out = decode(saved(tmp_path / name, image), 16)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, np.stack([expected] * 3))


def test_a_cmyk_photograph_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    out = decode(saved(tmp_path / "a.jpg", image, quality=100), 16)
    assert out[0].min() > 245
    assert out[1:].max() < 10


@pytest.mark.parametrize(("resize_size", "image_size"), [(16, 16), (20, 16), (33, 24), (64, 57)])
def test_the_centre_is_that_of_torchvisions_resize_and_centre_crop_of_a_pillow_image(resize_size, image_size):
    reference = v2.Compose([v2.Resize(resize_size), v2.CenterCrop(image_size)])
    for height, width in np.random.default_rng(0).integers(10, 120, (40, 2)):
        image = Image.fromarray(noise(height, width))
        np.testing.assert_array_equal(cut_centre(image, resize_size, image_size), reference(image))


@pytest.mark.parametrize("size", [(1, 1), (1, 100_000), (100_000, 1), (3000, 2)])
def test_the_centre_of_a_strip_is_cut_without_resizing_all_of_it(size, monkeypatch):
    resize = Image.Image.resize

    def modest(image: Image.Image, to: tuple[int, int], *how) -> Image.Image:
        assert max(to) <= 16 * 256
        return resize(image, to, *how)

    monkeypatch.setattr(Image.Image, "resize", modest)
    out = np.asarray(cut_centre(Image.new("RGB", size, (10, 20, 30)), 256, 224))
    assert out.shape == (224, 224, 3)
    assert (out == (10, 20, 30)).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1)])
def test_tiny_and_thin_images_are_enlarged(tmp_path, height, width):
    image = Image.new("RGB", (width, height), (10, 20, 30))
    out = decode(saved(tmp_path / "a.png", image), 16)
    assert (out == np.array([10, 20, 30]).reshape(3, 1, 1)).all()


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    out = decode(saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:]), 16)
    assert out[0].min() > 250
    assert out[2].max() < 5


def damaged(folder: Path, kind: str) -> str:
    path = folder / f"{kind}.jpg"
    Image.fromarray(noise(64, 64)).save(path)
    whole = path.read_bytes()
    if kind == "floating point":
        return saved(folder / "float.tif", Image.fromarray(np.zeros((8, 8), dtype=np.float32)))
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[kind])
    return str(path)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "missing", "floating point"])
def test_an_unreadable_image_is_an_error_with_its_path(tmp_path, kind):
    good = saved(tmp_path / "good.png", Image.fromarray(noise(16, 16)))
    bad = damaged(tmp_path, kind)
    with pytest.raises(InputError) as caught:
        decode_all([good] * 200 + [bad] + [good] * 200, 16)
    assert str(caught.value).startswith(f"{bad} is not a readable image (")
    assert caught.value.reason == "data"
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_an_error_with_its_path(tmp_path, monkeypatch):
    path = saved(tmp_path / "bomb.png", Image.new("1", (300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(InputError, match=r"bomb\.png is not a readable image .*decompression bomb"):
        decode_all([path], 16)


def test_all_images_are_decoded_each_in_its_place(tmp_path):
    paths = [saved(tmp_path / f"{i}.png", Image.new("L", (8, 8), i)) for i in range(150)]
    out = decode_all(paths, 8)
    assert out.shape == (150, 3, 8, 8)
    assert (out == np.arange(150).reshape(150, 1, 1, 1)).all()


def array() -> np.ndarray:
    return np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def refuse() -> np.ndarray:
    raise AssertionError("made again")


def test_an_array_is_made_once_and_then_read(tmp_path):
    path = tmp_path / "new" / "folder" / "a.npy"
    np.testing.assert_array_equal(cached(path, (2, 3, 4), "uint8", array), array())
    again = cached(path, (2, 3, 4), "uint8", refuse)
    np.testing.assert_array_equal(again, array())
    assert again.flags.writeable  # torch warns about tensors over read-only memory
    assert [p.name for p in path.parent.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("kept", [0, 5, 20, 100, -1])
def test_a_truncated_cache_is_made_anew(tmp_path, kept):
    path = tmp_path / "a.npy"
    cached(path, (2, 3, 4), "uint8", array)
    path.write_bytes(path.read_bytes()[:kept])
    np.testing.assert_array_equal(cached(path, (2, 3, 4), "uint8", array), array())
    cached(path, (2, 3, 4), "uint8", refuse)


@pytest.mark.parametrize("other", [np.zeros((2, 3), np.uint8), np.zeros((2, 3, 4)), np.array([{}], dtype=object)])
def test_a_cache_of_another_shape_or_type_is_made_anew(tmp_path, other):
    path = tmp_path / "a.npy"
    np.save(path, other)
    np.testing.assert_array_equal(cached(path, (2, 3, 4), "uint8", array), array())


@pytest.mark.parametrize("garbage", [b"PK\x03\x04 no zip", b"\x93NUMPY\x01\x00", b"\x80\x04N.", bytes(1000)])
def test_a_cache_that_is_no_array_is_made_anew(tmp_path, garbage):
    path = tmp_path / "a.npy"
    path.write_bytes(garbage)
    np.testing.assert_array_equal(cached(path, (2, 3, 4), "uint8", array), array())


def test_an_unwritable_cache_folder_is_a_warning_only(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match=r"cannot keep decoded images in .*file.* give dataset\.cache_dir"):
        made = cached(tmp_path / "file" / "a.npy", (2, 3, 4), "uint8", array)
    np.testing.assert_array_equal(made, array())


def test_a_write_that_fails_halfway_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(file, *_, **__):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        cached(tmp_path / "a.npy", (2, 3, 4), "uint8", array)
    assert not list(tmp_path.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(cached(tmp_path / "a.npy", (2, 3, 4), "uint8", array), array())

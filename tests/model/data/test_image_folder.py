import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.data import DATASETS, create, decode, image_folder
from model.data.images import FileSplit
from model.errors import InputError

CPU = torch.device("cpu")


def fill(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png", compress_level=0)
    return folder


@pytest.fixture
def root(tmp_path):
    fill(tmp_path / "photos" / "train", {"cat": 12, "ant": 10, "bee": 11})
    fill(tmp_path / "photos" / "test", {"cat": 3, "ant": 2, "bee": 4}, seed=1)
    return tmp_path / "photos"


def read(root: Path, **options):
    return DATASETS.create({"name": "image_folder", "data_dir": str(root), "image_size": 8, **options})


def pixels_of(folder: Path) -> np.ndarray:
    """The images of a split by the plainest of means."""
    paths = sorted(folder.glob("*/*.png"))
    return np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths])


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded again")

    def forbid():
        monkeypatch.setattr(decode, "decode", refuse)

    return forbid


def test_images_are_read_class_after_class_in_the_order_of_names(root):
    images = read(root)
    assert images.classes == ("ant", "bee", "cat")
    for split, name in ((images.train, "train"), (images.test, "test")):
        np.testing.assert_array_equal(split.images.numpy(), pixels_of(root / name))
    assert images.train.labels.tolist() == [0] * 10 + [1] * 11 + [2] * 12
    assert images.test.labels.tolist() == [0] * 2 + [1] * 4 + [2] * 3
    assert images.val is None
    assert images.augmentation == "crop_flip"


def test_mean_and_std_are_those_of_the_training_images_exactly(root):
    pixels = pixels_of(root / "train") / 255
    for images in (read(root), read(root)):  # decoded and cached
        np.testing.assert_allclose(images.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(images.std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_an_own_validation_folder_is_the_validation_split(root):
    fill(root / "val", {"cat": 2, "ant": 2, "bee": 2}, seed=2)
    images = read(root)
    np.testing.assert_array_equal(images.val.images.numpy(), pixels_of(root / "val"))
    assert images.train.images.shape[0] == 33


def test_hidden_entries_and_files_beside_the_class_folders_are_ignored(root):
    expected = read(root, cache_dir=str(root.parent / "cache"))
    (root / "train" / ".thumbnails").mkdir()
    (root / "train" / "labels.csv").write_text("x")
    (root / "train" / "ant" / ".DS_Store").write_text("x")
    (root / "README.md").write_text("x")
    images = read(root, cache_dir=str(root.parent / "cache"))
    assert images.classes == expected.classes
    assert torch.equal(images.train.images, expected.train.images)


def test_images_in_folders_below_a_class_folder_belong_to_the_class(root):
    shutil.move(root / "train" / "bee", root / "train" / "ant" / "deeper")
    shutil.rmtree(root / "test" / "bee")
    images = read(root)
    assert images.classes == ("ant", "cat")
    assert images.train.labels.tolist() == [0] * 21 + [1] * 12


def test_a_second_start_decodes_nothing(root, no_decoding):
    first = read(root)
    no_decoding()
    second = read(root)
    for one, other in ((first.train, second.train), (first.test, second.test)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert (first.mean, first.std) == (second.mean, second.std)


def test_the_cache_may_lie_elsewhere_and_the_images_folder_stays_as_it_was(root, tmp_path):
    before = sorted(root.rglob("*"))
    read(root, cache_dir=str(tmp_path / "cache"))
    assert sorted(root.rglob("*")) == before
    assert list((tmp_path / "cache").glob("*.npy"))
    read(root)
    assert (root / ".kdlab-cache").is_dir()


def test_the_cache_is_found_however_the_folder_is_spelled(root, no_decoding, monkeypatch, tmp_path):
    read(root)
    no_decoding()
    monkeypatch.chdir(root)
    read(Path())
    monkeypatch.chdir(root.parent)
    read(Path("photos"))
    monkeypatch.setenv("HOME", str(root.parent))
    read(Path("~/photos"))
    root.rename(tmp_path / "moved")
    read(tmp_path / "moved")


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def repaint(path: Path) -> None:
    size = path.stat().st_size
    Image.new("RGB", (8, 8), "red").save(path, compress_level=0)
    assert path.stat().st_size == size  # only the time tells


@pytest.mark.parametrize(
    "change",
    [touch, repaint, Path.unlink, lambda path: path.rename(path.with_name("zzz.png"))],
    ids=["touched", "repainted", "removed", "renamed"],
)
def test_a_changed_file_is_seen(root, no_decoding, change):
    read(root)
    change(root / "train" / "ant" / "000.png")
    images = read(root)
    np.testing.assert_array_equal(images.train.images.numpy(), pixels_of(root / "train"))
    np.testing.assert_allclose(images.mean, pixels_of(root / "train").mean((0, 2, 3)) / 255)
    no_decoding()
    read(root)


def test_another_image_size_is_another_cache(root, no_decoding):
    read(root)
    assert read(root, image_size=12).train.images.shape == (33, 3, 12, 12)
    no_decoding()
    assert read(root).train.images.shape == (33, 3, 8, 8)
    assert read(root, image_size=12).train.images.shape == (33, 3, 12, 12)


@pytest.mark.parametrize("damage", [b"", b"garbage", slice(0, -7)])
def test_a_corrupt_cache_is_decoded_anew(root, no_decoding, damage):
    expected = read(root)
    for path in (root / ".kdlab-cache").iterdir():
        path.write_bytes(damage if isinstance(damage, bytes) else path.read_bytes()[damage])
    images = read(root)
    assert torch.equal(images.train.images, expected.train.images)
    assert images.std == expected.std
    no_decoding()
    read(root)


def test_an_unwritable_cache_folder_is_a_warning(root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot keep decoded images"):
        images = read(root, cache_dir=str(tmp_path / "file"))
    assert len(images.train) == 33


@pytest.mark.parametrize("layout", ["only train/", "class folders"])
def test_without_a_test_folder_a_fixed_tenth_of_each_class_is_divided_off(root, layout, no_decoding):
    shutil.rmtree(root / "test")
    folder = root if layout == "only train/" else root / "train"
    images = read(folder)
    assert images.test.labels.bincount().tolist() == [1, 1, 1]
    assert images.train.labels.bincount().tolist() == [9, 10, 11]
    both = torch.cat([images.train.images, images.test.images]).numpy()
    everything = pixels_of(root / "train")
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in everything)
    np.testing.assert_allclose(images.mean, images.train.images.double().mean((0, 2, 3)) / 255)
    no_decoding()
    again = read(folder)
    assert torch.equal(again.test.images, images.test.images)
    assert again.mean == images.mean


def test_a_test_folder_that_is_added_later_frees_the_divided_images_and_changes_the_constants(root, tmp_path):
    shutil.move(root / "test", tmp_path / "test")
    without = read(root)
    shutil.move(tmp_path / "test", root / "test")
    images = read(root)
    assert (len(without.train), len(images.train)) == (30, 33)
    np.testing.assert_allclose(images.mean, pixels_of(root / "train").mean((0, 2, 3)) / 255)


def test_the_pipeline_carves_validation_from_training_images(root):
    section, problems = DATASETS.resolve(
        {"name": "image_folder", "data_dir": str(root), "image_size": 8, "val_fraction": 0.2}
    )
    assert not problems
    data = create(section, seed=0, device=CPU)
    assert data.train.labels.bincount().tolist() == [8, 9, 10]
    assert data.val.labels.bincount().tolist() == [2, 2, 2]
    assert data.test.num_samples == 9
    assert data.shape == (3, 8, 8)


def error_of(root: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        read(root, **options)
    assert caught.value.reason == "data"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    assert f"there is no folder {tmp_path / 'none'}" in error_of(tmp_path / "none")


def test_classes_that_differ_between_splits_are_named(root):
    (root / "test" / "bee").rename(root / "test" / "wasp")
    assert f"{root / 'test'} lacks the class folders 'bee'" in error_of(root)
    fill(root / "test", {"bee": 1})
    assert f"{root / 'test'} has the class folders 'wasp', which train/ lacks" in error_of(root)


def test_a_class_folder_without_images_is_named(root):
    (root / "train" / "ant" / ".hidden").write_text("x")
    for path in (root / "train" / "ant").glob("*.png"):
        path.unlink()
    assert f"class folder {root / 'train' / 'ant'} has no images" in error_of(root)


def test_a_tree_without_train_or_without_classes_is_explained(root, tmp_path):
    (root / "train").rename(root / "training")
    assert "has test/ but no train/" in error_of(root)
    (tmp_path / "empty").mkdir()
    assert "has 0 class folders" in error_of(tmp_path / "empty")
    assert "has 1 class folders" in error_of(fill(tmp_path / "one", {"ant": 3}))


def test_a_class_of_one_image_cannot_be_divided(tmp_path):
    assert "class 'bee' has one image only" in error_of(fill(tmp_path / "few", {"ant": 5, "bee": 1}))


@pytest.mark.parametrize("contents", [b"", b"no image", None])
def test_an_unreadable_image_is_an_error_with_its_path(root, contents):
    path = root / "train" / "bee" / "004.png"
    path.write_bytes(path.read_bytes()[:100] if contents is None else contents)
    assert str(path) in error_of(root)
    assert not list(root.glob(".kdlab-cache/*"))  # nothing half-decoded is kept


def test_a_link_to_nowhere_is_an_error_with_its_path(root):
    path = root / "train" / "bee" / "link.png"
    path.symlink_to(root / "nowhere.png")
    assert str(path) in error_of(root)


def test_a_set_that_would_fill_the_memory_is_refused_before_decoding(root, monkeypatch, no_decoding):
    no_decoding()
    monkeypatch.setattr(image_folder, "LIMIT", 42 * 3 * 64 - 1)
    assert "42 images of 3x8x8 take" in error_of(root)
    assert "lower dataset.image_size, or set dataset.stream" in error_of(root)
    assert image_folder.LIMIT < 16 * 10**9


def test_a_file_name_that_is_no_text_is_read(root):
    source = root / "train" / "ant" / "000.png"
    source.rename(source.with_name(os.fsdecode(b"\xff.png")))
    assert len(read(root).train) == 33
    streamed = read(root, stream=True).train
    np.testing.assert_array_equal(streamed.read(9, whole=True), pixels_of(root / "train")[9])  # the last of the ants


def test_streamed_images_are_those_of_memory_but_not_decoded_before_they_are_due(root, no_decoding):
    memory = read(root)
    no_decoding()
    images = read(root, stream=True)
    assert images.classes == memory.classes
    for files, decoded in ((images.train, memory.train), (images.test, memory.test)):
        assert isinstance(files, FileSplit)
        assert torch.equal(files.labels, decoded.labels)
        assert files.shape == (3, 8, 8)
        assert files.sizes.tolist() == [Path(f"{files.folder}/{p.decode()}").stat().st_size for p in files.paths]
        for index in (0, len(files) - 1):
            assert torch.equal(files.read(index, whole=False), decoded.images[index])
    assert (images.mean, images.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert images.augmentation == ("random_resized_crop", "horizontal_flip")
    assert images.val is None


def test_streamed_images_have_no_limit_of_memory_and_leave_no_cache(root, monkeypatch):
    before = sorted(root.rglob("*"))
    monkeypatch.setattr(image_folder, "LIMIT", 0)
    assert read(root, stream=True, image_size=1024).train.shape == (3, 1024, 1024)
    assert sorted(root.rglob("*")) == before


def test_streamed_images_without_a_test_folder_are_divided_as_those_in_memory(root):
    shutil.rmtree(root / "test")
    fill(root / "val", {"cat": 2, "ant": 2, "bee": 2}, seed=2)
    files, memory = read(root, stream=True), read(root)
    for name in ("train", "val", "test"):
        one, other = getattr(files, name), getattr(memory, name)
        assert len(one) == len(other)
        for index in (0, len(one) - 1):
            assert torch.equal(one.read(index, whole=False), other.images[index])


def test_streamed_images_may_be_resized_to_more_than_is_shown(root):
    split = read(root, stream=True, resize_size=12).train
    image = Image.open(root / "train" / "ant" / "000.png").resize((12, 12), Image.Resampling.BILINEAR)
    shown = np.asarray(image.crop((2, 2, 10, 10))).transpose(2, 0, 1)
    np.testing.assert_array_equal(split.read(0, whole=False), shown)
    np.testing.assert_array_equal(split.read(0, whole=True), pixels_of(root / "train")[0])
    assert "resize_size is for streamed images" in error_of(root, resize_size=12)
    assert "dataset.resize_size: 10 is below dataset.image_size, 12" in error_of(
        root, stream=True, image_size=12, resize_size=10
    )


def test_a_streamed_run_ends_with_the_path_of_a_damaged_image(root):
    (root / "train" / "bee" / "004.png").write_bytes(b"no image")
    section, _ = DATASETS.resolve({"name": "image_folder", "data_dir": str(root), "image_size": 8, "stream": True})
    data = create({**section, "val_fraction": 0.2, "num_workers": 1}, seed=0, device=CPU)
    with pytest.raises(InputError, match=r"bee/004\.png is not a readable image"):
        list(data.train.epoch(0)) + list(data.val.epoch(0))

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.data import DATASETS, create
from model.data.stream import StreamLoader
from model.errors import InputError

CPU = torch.device("cpu")
WNIDS = ("n01440764", "n01443537", "n02102040")


@pytest.fixture
def root(tmp_path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for wnid in reversed(WNIDS):
            folder = tmp_path / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (*random.integers(240, 300, 2), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{wnid}_{i}.JPEG", quality=50)
    return tmp_path


def section(root: Path, **options) -> dict:
    resolved, problems = DATASETS.resolve({"name": "imagenet", "data_dir": str(root), **options})
    assert not problems
    return resolved


def test_the_official_validation_set_is_the_test_split_and_validation_is_carved(root):
    data = create(section(root, val_fraction=0.2), seed=0, device=CPU)
    assert data.classes == WNIDS
    assert data.train.labels.bincount().tolist() == [8, 8, 8]
    assert data.val.labels.bincount().tolist() == [2, 2, 2]
    assert data.test.labels.bincount().tolist() == [3, 3, 3]
    assert data.test.split.folder == str(root / "val")
    assert data.val.split.folder == str(root / "train")


def test_images_are_streamed_at_the_customary_size_with_the_customary_constants(root):
    data = create(section(root, num_workers=0, eval_batch_size=9), seed=0, device=CPU)
    assert isinstance(data.train, StreamLoader)
    assert data.shape == (3, 224, 224)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert data.summary.endswith("augmentation random_resized_crop + horizontal_flip")
    (batch,) = data.test.epoch(0)
    image = Image.open(root / "val" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG")
    short = min(image.size)
    resized = image.resize([256 * side // short for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - 224) / 2) for side in resized.size)
    shown = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float64) / 255
    expected = (shown - data.mean) / data.std
    np.testing.assert_allclose(batch.images[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def error_of(root: Path) -> str:
    with pytest.raises(InputError) as caught:
        create(section(root), seed=0, device=CPU)
    assert caught.value.reason == "data"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_is_named(root):
    for path in (root / "val" / WNIDS[1]).iterdir():
        path.rename(root / "val" / path.name)  # as the official archive is, before it is sorted into folders
    (root / "val" / WNIDS[1]).rmdir()
    assert f"{root / 'val'} lacks the class folders '{WNIDS[1]}'" in error_of(root)
    for wnid in (WNIDS[0], WNIDS[2]):
        shutil.rmtree(root / "val" / wnid)
    assert f"{root / 'val'} has 0 class folders" in error_of(root)
    shutil.rmtree(root / "val")
    assert f"there is no folder {root / 'val'}; {root} must hold train/<wnid>/<images> and val/<wnid>" in error_of(root)
    shutil.rmtree(root / "train")
    assert f"there is no folder {root / 'train'}" in error_of(root)

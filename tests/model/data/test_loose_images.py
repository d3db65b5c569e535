"""Images without classes, from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from model.data import DATASETS, create, resolve_unlabelled
from model.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with images here and there; each is of one grey."""
    for number, name in enumerate(("a.png", "more/b.png", "more/deeper/c.png", ".hidden.png")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (10 * number,) * 3).save(path)
    return tmp_path / "images"


def test_all_images_below_a_folder_are_found_whatever_folders_they_lie_in(folder: Path) -> None:
    images = DATASETS.create({"name": "loose_images", "data_dir": str(folder), "image_size": 16})
    assert images.train.images.shape == (3, 3, 16, 16)
    assert sorted(images.train.images[:, 0, 8, 8].tolist()) == [0, 10, 20]
    streamed = DATASETS.create({"name": "loose_images", "data_dir": str(folder), "image_size": 16, "stream": True})
    assert len(streamed.train) == 3
    assert streamed.train.shape == (3, 16, 16)


def test_they_come_to_the_steps_of_a_run_as_unlabelled(folder: Path) -> None:
    section, _ = DATASETS.resolve({"name": "synthetic", "train_size": 60, "batch_size": 8})
    extra, problems = resolve_unlabelled(
        {"name": "loose_images", "data_dir": str(folder), "image_size": 16, "batch_size": 2, "augmentation": "none"}
    )
    assert problems == []
    splits = create(section, seed=0, device=CPU, unlabelled=extra)
    batch = next(iter(splits.lessons.epoch(0)))
    assert (len(batch.images), len(batch.labels)) == (11, 8), "a last batch of one is joined to the one before it"


@pytest.mark.parametrize("stream", [False, True])
def test_images_that_a_run_validates_or_is_tested_on_are_not_among_them(tmp_path: Path, stream: bool) -> None:
    for number in range(30):
        split = "test" if number < 6 else "train"
        path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (8 * number,) * 3).save(path)
    options = {"image_size": 16, "stream": stream, "num_workers": 0, "augmentation": "none"}
    section, problems = DATASETS.resolve(
        {"name": "image_folder", "data_dir": str(tmp_path), "batch_size": 4, **options}
    )
    extra, more = resolve_unlabelled({"name": "loose_images", "data_dir": str(tmp_path), "batch_size": 4, **options})
    assert [*problems, *more] == []
    splits = create(section, seed=0, device=CPU, unlabelled=extra)
    assert splits.val.num_samples == 2
    assert splits.unlabelled is not None
    assert splits.unlabelled.num_samples == 30 - 6 - 2
    greys, held_out = (
        {image.min().item() for batch in loader.epoch(0) for image in batch.images}
        for loader in (splits.unlabelled, splits.val)
    )
    assert not greys & held_out
    with pytest.raises(InputError, match="only one of it and dataset is streamed"):
        create(section, seed=0, device=CPU, unlabelled={**extra, "stream": not stream})


def test_they_are_no_task_of_their_own(folder: Path) -> None:
    section, problems = DATASETS.resolve({"name": "loose_images", "data_dir": str(folder)})
    assert problems == []
    with pytest.raises(InputError, match="dataset 'loose_images' has no classes to learn; name it as unlabelled"):
        create(section, seed=0, device=CPU)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    for path, text in ((tmp_path, "has no images"), (tmp_path / "nowhere", "cannot read .*nowhere")):
        with pytest.raises(InputError, match=text):
            DATASETS.create({"name": "loose_images", "data_dir": str(path)})


def test_what_can_be_decoded_only_while_streaming_is_said(folder: Path) -> None:
    with pytest.raises(InputError, match="resize_size is for streamed images"):
        DATASETS.create({"name": "loose_images", "data_dir": str(folder), "resize_size": 20})

import io
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from model.data import DATASETS, caltech, create
from model.errors import InputError

SIZES = (3, 4, 6)  # of the classes, in turn
PIXELS = np.mgrid[:30, :40, :3].sum(0).astype(np.uint8) * 3


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG")
    return file.getvalue()


class Dataset(NamedTuple):
    """A small dataset in the layout of the real one, unpacked."""

    name: str
    data_dir: Path
    folder: Path
    counts: torch.Tensor  # images of each class

    def read(self, **options):
        section = {"name": self.name, "data_dir": str(self.data_dir), "image_size": 16, "val_fraction": 0.4, **options}
        resolved, problems = DATASETS.resolve(section)
        assert not problems
        return create(resolved, seed=0, device=torch.device("cpu"))


NAMES = {
    "caltech101": ([f"animal{i:03}" for i in range(101)], "image_{1:04}.jpg"),
    "caltech256": ([*(f"{i:03}.thing" for i in range(1, 257)), "257.clutter"], "{0:03}_{1:04}.jpg"),
}


@pytest.fixture(scope="module", params=NAMES)
def dataset(request, tmp_path_factory) -> Dataset:
    names, pattern = NAMES[request.param]
    data_dir = tmp_path_factory.mktemp("data")
    folder = data_dir / request.param / f"{request.param[-3:]}_ObjectCategories"
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(SIZES[number % 3]):
            (folder / name / pattern.format(number + 1, i + 1)).write_bytes(jpeg())
    # What else is in the archives: a class that is none, a file and a folder between the images.
    if request.param == "caltech101":
        (folder / "BACKGROUND_Google").mkdir()
        (folder / "BACKGROUND_Google" / "image_0001.jpg").write_bytes(jpeg())
    else:
        (folder / names[197] / "RENAME2").write_text("mv")
        (folder / names[55] / "greg").mkdir()
        (folder / names[55] / "greg" / "more.jpg").write_bytes(b"")
    return Dataset(request.param, data_dir, folder, torch.tensor([SIZES[i % 3] for i in range(len(names))]))


def test_validation_is_a_share_of_each_class_rounded_down_and_there_is_no_test_split(dataset):
    data = dataset.read()
    shares = (dataset.counts * 4).div(10, rounding_mode="floor")
    assert data.num_classes == len(dataset.counts) == {"caltech101": 101, "caltech256": 257}[dataset.name]
    assert "BACKGROUND_Google" not in data.classes
    assert torch.equal(data.val.labels.bincount(), shares)
    assert torch.equal(data.train.labels.bincount(), dataset.counts - shares)
    assert data.test is None
    assert (data.mean, data.std) == ((0.5,) * 3, (0.5,) * 3)
    assert data.summary.endswith("augmentation random_resized_crop + horizontal_flip")


def test_a_test_split_is_carved_first_and_does_not_change_with_the_validation_split(dataset):
    fractions = {"test_fraction": 0.45, "val_fraction": 0.5}
    data, other = dataset.read(**fractions), dataset.read(**fractions, val_seed=1)
    held_out = dataset.counts * 45 // 100
    assert torch.equal(data.test.labels.bincount(), held_out)
    assert torch.equal(data.val.labels.bincount(), (dataset.counts - held_out) // 2)
    assert data.test.split.paths.tolist() == other.test.split.paths.tolist()
    assert not torch.equal(data.val.indices, other.val.indices)
    everything = [*data.test.split.paths, *data.train.split.paths]
    assert len(set(everything)) == len(everything) == dataset.counts.sum()


def test_without_a_test_split_nothing_can_be_selected_on_it(dataset):
    with pytest.raises(InputError, match=r"dataset\.validate_on: dataset 'caltech\d+' has no test split"):
        dataset.read(validate_on="test")
    assert dataset.read(validate_on="test", test_fraction=0.4).selected_on == "test"


def test_images_are_shown_at_the_size_asked_for(dataset):
    batch = next(dataset.read(image_size=24, resize_size=30, num_workers=0).val.epoch(0))
    decoded = np.asarray(Image.open(io.BytesIO(jpeg())))[3:27, 8:32]  # the shorter side of 30x40 is 30 already
    np.testing.assert_allclose(batch.images[0].permute(1, 2, 0).numpy(), (decoded / 255 - 0.5) / 0.5, atol=1e-5)


def test_a_folder_that_lacks_classes_is_an_error(dataset, tmp_path):
    some = tmp_path / dataset.folder.relative_to(dataset.data_dir)
    for name in sorted(path.name for path in dataset.folder.iterdir())[:3]:
        shutil.copytree(dataset.folder / name, some / name)
    with pytest.raises(InputError, match=rf"has \d class folders instead of {len(dataset.counts)}") as caught:
        dataset._replace(data_dir=tmp_path).read()
    assert caught.value.reason == "data"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_downloaded_from_the_institute_unless_that_is_not_allowed(name, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(caltech, "fetch", lambda *arguments: fetched.append(arguments))
    for download in (True, False):
        section = {"name": name, "data_dir": str(tmp_path), "download": download}
        with pytest.raises(InputError, match="cannot read"):  # as nothing was fetched
            DATASETS.create(section)
    folder = tmp_path / name / f"{name[-3:]}_ObjectCategories"
    archive = {"caltech101": caltech.CALTECH101, "caltech256": caltech.CALTECH256}[name]
    assert fetched == [(archive, folder, True), (archive, folder, False)]


@pytest.mark.parametrize("name", ["Caltech101", "Caltech256"])
def test_archives_are_those_that_torchvision_knows(name, tmp_path, monkeypatch):
    from torchvision.datasets import caltech as reference

    asked = {}

    def stop(address, *_, filename, md5, **__):
        asked.update(address=address, filename=filename, md5=md5)
        raise ConnectionError

    monkeypatch.setattr(reference, "download_and_extract_archive", stop)
    with pytest.raises(ConnectionError):
        getattr(reference, name)(tmp_path, download=True)
    archive = getattr(caltech, name.upper())
    assert (archive.address + archive.name, archive.name, archive.md5) == tuple(asked.values())

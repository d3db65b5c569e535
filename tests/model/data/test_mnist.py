import gzip
import struct

import numpy as np
import pytest
import torchvision

from model.data import DATASETS
from model.errors import InputError

KINDS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


def idx(array: np.ndarray) -> bytes:
    """The IDX format: two zero bytes, 8 for unsigned bytes, the number of dimensions, each of them, the values."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture(params=KINDS)
def mnist(request, serve, md5, tmp_path, monkeypatch):
    """Four tiny files in the format of MNIST on a local server, which torchvision takes for the real one."""
    source = getattr(torchvision.datasets, KINDS[request.param])
    server, address, asked = serve
    random = np.random.default_rng(0)
    made, resources = {}, []
    for split, n in (("train", 30), ("t10k", 20)):
        made[split] = (random.integers(0, 256, (n, 28, 28), dtype=np.uint8), random.permutation(n) % 10)
        for part, array in zip(("images-idx3", "labels-idx1"), made[split], strict=True):
            path = server / f"{split}-{part}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array)))
            resources.append((path.name, md5(path)))
    monkeypatch.setattr(source, "mirrors", [address])
    monkeypatch.setattr(source, "resources", resources)

    class Mnist:
        name, root = request.param, tmp_path / "data"
        raw = root / source.__name__ / "raw"

        def read(self, download=True):
            return DATASETS.create({"name": self.name, "data_dir": str(self.root), "download": download})

    Mnist.source, Mnist.server, Mnist.asked, Mnist.made = source, server, asked, made
    return Mnist()


def check(images, made) -> None:
    for split, (data, labels) in ((images.train, made["train"]), (images.test, made["t10k"])):
        expected = np.pad(data, ((0, 0), (2, 2), (2, 2)))[:, None].repeat(3, axis=1)
        np.testing.assert_array_equal(split.images.numpy(), expected)
        np.testing.assert_array_equal(split.labels.numpy(), labels)


def test_mnist_is_downloaded_and_padded_to_the_shape_of_cifar(mnist):
    images = mnist.read()
    check(images, mnist.made)
    assert images.train.images.shape == (30, 3, 32, 32)
    assert len(images.classes) == 10
    assert len(mnist.asked) == 4


def test_constants_and_augmentation_are_the_customary_ones(mnist):
    images = mnist.read()
    mean, std, augmentation = {
        "mnist": (0.1307, 0.3081, "crop"),
        "fashion_mnist": (0.2860, 0.3530, "crop_flip"),
    }[mnist.name]
    assert images.mean == (mean,) * 3
    assert images.std == (std,) * 3
    assert images.augmentation == augmentation


def test_files_that_are_there_are_used_without_any_download(mnist, monkeypatch):
    mnist.read()
    monkeypatch.setattr(mnist.source, "mirrors", ["http://127.0.0.1:9/"])
    check(mnist.read(download=False), mnist.made)
    check(mnist.read(download=True), mnist.made)


@pytest.mark.parametrize("download", [True, False])
def test_archives_that_are_there_are_unpacked_without_any_download(mnist, monkeypatch, download):
    mnist.raw.parent.mkdir(parents=True)
    mnist.server.rename(mnist.raw)
    monkeypatch.setattr(mnist.source, "mirrors", ["http://127.0.0.1:9/"])
    check(mnist.read(download), mnist.made)


def says_what_to_provide(mnist, error) -> bool:
    message = str(error.value)
    wanted = [str(mnist.raw), mnist.source.mirrors[0], *(part for pair in mnist.source.resources for part in pair)]
    return error.value.reason == "data" and "\n" not in message and all(part in message for part in wanted)


def test_an_unreachable_download_names_folder_files_checksums_and_address(mnist, monkeypatch):
    monkeypatch.setattr(mnist.source, "mirrors", ["http://127.0.0.1:9/"])
    for download in (True, False):
        with pytest.raises(InputError) as caught:
            mnist.read(download)
        assert says_what_to_provide(mnist, caught)


def test_a_corrupt_archive_names_what_to_provide(mnist):
    archive = mnist.server / mnist.source.resources[0][0]
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(InputError, match="corrupted") as caught:
        mnist.read()
    assert says_what_to_provide(mnist, caught)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
@pytest.mark.parametrize("kept", [0, 3, 17, -5])
def test_a_damaged_unpacked_file_is_one_sentence(mnist, which, kept):
    mnist.read()
    path = mnist.raw / mnist.source.resources[which][0].removesuffix(".gz")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError) as caught:
        mnist.read()
    assert says_what_to_provide(mnist, caught)

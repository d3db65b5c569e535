import pickle
import tarfile

import numpy as np
import pytest
import torchvision

from model.data import DATASETS
from model.errors import InputError

FAMILY = {
    "cifar10": ("CIFAR10", "labels", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", 10),
    "cifar100": ("CIFAR100", "fine_labels", ["train"], "test", 100),
}
NOWHERE = "http://127.0.0.1:9/"  # the discard port: refused at once


def dump_like_2009(value) -> bytes:
    """Pickles as Python 2 and its numpy did for the archives of CIFAR: another module, and numbers for dtype flags."""
    pickled = pickle.dumps(value, protocol=2).replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
    assert pickled.count(b"\x89\x88\x87") == 1  # False, True, tuple of three
    return pickled.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")  # 0, 1, tuple of three


@pytest.fixture(params=FAMILY)
def cifar(request, serve, md5, tmp_path, monkeypatch):
    """A tiny archive in the format of CIFAR on a local server, which torchvision takes for the real one."""
    kind, label_key, train_files, test_file, num_classes = FAMILY[request.param]
    source = getattr(torchvision.datasets, kind)
    server, address, asked = serve
    folder = tmp_path / "made" / source.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    made = {}
    for name in [*train_files, test_file]:
        data = random.integers(0, 256, (2 * num_classes, 3072), dtype=np.uint8)
        labels = random.permutation(2 * num_classes) % num_classes
        made[name] = (data.reshape(-1, 3, 32, 32), labels)
        (folder / name).write_bytes(dump_like_2009({"data": data, label_key: labels.tolist()}))
    meta = {source.meta["key"]: [f"class{i}" for i in range(num_classes)]}
    (folder / source.meta["filename"]).write_bytes(pickle.dumps(meta, protocol=2))
    archive = server / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, source.base_folder)
    monkeypatch.setattr(source, "url", address + source.filename)
    monkeypatch.setattr(source, "tgz_md5", md5(archive))
    monkeypatch.setattr(source, "train_list", [[name, md5(folder / name)] for name in train_files])
    monkeypatch.setattr(source, "test_list", [[test_file, md5(folder / test_file)]])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(folder / source.meta["filename"])})

    class Cifar:
        name, root = request.param, tmp_path / "data"
        train = tuple(np.concatenate(parts) for parts in zip(*(made[name] for name in train_files), strict=True))
        test = made[test_file]

        def read(self, download=True):
            return DATASETS.create({"name": self.name, "data_dir": str(self.root), "download": download})

    Cifar.source, Cifar.archive, Cifar.asked, Cifar.unpacked = source, archive, asked, folder
    return Cifar()


def test_cifar_is_downloaded_unpacked_and_read(cifar):
    images = cifar.read()
    for split, (data, labels) in ((images.train, cifar.train), (images.test, cifar.test)):
        np.testing.assert_array_equal(split.images.numpy(), data)
        np.testing.assert_array_equal(split.labels.numpy(), labels)
        assert split.images.is_contiguous()
    assert images.val is None
    assert images.augmentation == "crop_flip"
    assert len(images.classes) == {"cifar10": 10, "cifar100": 100}[cifar.name]
    assert images.classes[3] == "class3"
    assert cifar.asked == {f"/{cifar.source.filename}"}


def test_cifar_constants_are_the_customary_ones(cifar):
    images = cifar.read()
    assert (images.mean, images.std) == {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    }[cifar.name]


def test_unpacked_cifar_is_used_without_any_download(cifar, monkeypatch):
    cifar.root.mkdir()
    cifar.unpacked.rename(cifar.root / cifar.source.base_folder)
    monkeypatch.setattr(cifar.source, "url", NOWHERE + cifar.source.filename)
    before = sorted(path.name for path in cifar.root.rglob("*"))
    for download in (True, False):
        np.testing.assert_array_equal(cifar.read(download).train.images.numpy(), cifar.train[0])
    assert sorted(path.name for path in cifar.root.rglob("*")) == before  # a read-only folder will do


@pytest.mark.parametrize("download", [True, False])
def test_an_archive_that_is_there_is_unpacked_without_any_download(cifar, monkeypatch, download):
    cifar.root.mkdir()
    cifar.archive.rename(cifar.root / cifar.archive.name)
    monkeypatch.setattr(cifar.source, "url", NOWHERE + cifar.source.filename)
    np.testing.assert_array_equal(cifar.read(download).test.images.numpy(), cifar.test[0])


def says_what_to_provide(cifar, error) -> bool:
    message = str(error.value)
    wanted = (str(cifar.root), cifar.source.filename, cifar.source.tgz_md5, cifar.source.url.rsplit("/", 1)[0])
    return error.value.reason == "data" and "\n" not in message and all(part in message for part in wanted)


def test_an_unreachable_download_names_folder_file_checksum_and_address(cifar, monkeypatch):
    monkeypatch.setattr(cifar.source, "url", NOWHERE + cifar.source.filename)
    with pytest.raises(InputError, match="Connection refused") as caught:
        cifar.read()
    assert says_what_to_provide(cifar, caught)


def test_a_download_that_is_not_found_or_not_allowed_names_what_to_provide(cifar):
    with pytest.raises(InputError, match=r"set dataset\.download to true") as caught:
        cifar.read(download=False)
    assert says_what_to_provide(cifar, caught)
    assert not cifar.root.exists()
    cifar.archive.unlink()
    with pytest.raises(InputError, match="404") as caught:
        cifar.read()
    assert says_what_to_provide(cifar, caught)
    caught.value.__cause__.close()  # the server's answer, which an HTTPError holds open


@pytest.mark.parametrize("damage", ["truncated", "not an archive"])
def test_a_corrupt_archive_names_what_to_provide(cifar, damage):
    whole = cifar.archive.read_bytes()
    cifar.archive.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"<html>log in first</html>")
    with pytest.raises(InputError, match="corrupted") as caught:
        cifar.read()
    assert says_what_to_provide(cifar, caught)
    assert not (cifar.root / cifar.source.base_folder).exists()
    # once the server is well again, so is the next start
    cifar.archive.write_bytes(whole)
    assert len(cifar.read().test.images)


def test_a_damaged_unpacked_file_is_unpacked_anew(cifar):
    cifar.read()
    cifar.asked.clear()
    damaged = cifar.root / cifar.source.base_folder / cifar.source.test_list[0][0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    np.testing.assert_array_equal(cifar.read().test.images.numpy(), cifar.test[0])
    assert not cifar.asked  # from the archive, not from the net


@pytest.mark.parametrize("contents", [b"", b"\x80\x02}q\x00.", b"no pickle"])
def test_a_batch_file_that_cannot_be_read_is_one_sentence(cifar, md5, monkeypatch, contents):
    # The right checksum and wrong contents: what a reader meets where somebody repacked the archive.
    broken = cifar.unpacked / cifar.source.test_list[0][0]
    broken.write_bytes(contents)
    monkeypatch.setattr(cifar.source, "test_list", [[broken.name, md5(broken)]])
    cifar.root.mkdir()
    cifar.unpacked.rename(cifar.root / cifar.source.base_folder)
    with pytest.raises(InputError) as caught:
        cifar.read()
    assert says_what_to_provide(cifar, caught)


def test_labels_out_of_range_are_found_when_read(cifar, md5, monkeypatch):
    cifar.read()
    name = cifar.source.test_list[0][0]
    path = cifar.root / cifar.source.base_folder / name
    entry = pickle.loads(path.read_bytes(), encoding="latin1")
    key = "labels" if "labels" in entry else "fine_labels"
    path.write_bytes(pickle.dumps({**entry, key: [1000] * len(entry[key])}))
    monkeypatch.setattr(cifar.source, "test_list", [[name, md5(path)]])
    with pytest.raises(InputError, match=r"the test labels are 1000\.\.1000 but there are"):
        cifar.read()

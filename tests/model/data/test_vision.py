import io
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.data import vision
from model.data.vision import Archive, _alone, fetch
from model.errors import InputError

NOWHERE = "http://127.0.0.1:9/"  # the discard port: refused at once


def test_one_process_at_a_time_downloads(tmp_path):
    root = tmp_path / "data"
    entered = threading.Event()

    def other() -> None:
        with _alone(root):
            entered.set()

    with _alone(root):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(5)
    thread.join()
    with _alone(root):
        pass  # given back


def packed(files: dict[str, bytes], mode: str = "w") -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode=mode) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return archive.getvalue()


IMAGES = {"images/ant/1.jpg": b"one", "images/bee/1.jpg": b"two"}
ARCHIVES = {
    "all.tar": packed(IMAGES),
    "all.zip": zipped({f"all/{name}": content for name, content in IMAGES.items()}),
    "nested.zip": zipped(
        {
            "nested/images.tar.gz": packed(IMAGES, "w:gz"),
            "nested/outlines.tar": b"",
            "__MACOSX/nested/._images.tar.gz": b"",
        }
    ),
}


@pytest.fixture(params=ARCHIVES)
def archive(request, serve, md5) -> tuple[Archive, Path, set[str]]:
    """An archive of the folder `images` on a local server, its file there, and what was asked for."""
    server, address, asked = serve
    path = server / request.param
    path.write_bytes(ARCHIVES[request.param])
    return Archive(address, path.name, md5(path)), path, asked


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder.parent)): path.read_bytes() for path in folder.rglob("*.jpg")}


def test_a_folder_is_downloaded_and_unpacked_once(archive, tmp_path):
    wanted, _, asked = archive
    folder = tmp_path / "new" / "images"
    fetch(wanted, folder, download=True)
    assert contents(folder) == IMAGES
    assert asked == {f"/{wanted.name}"}
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted(["images", wanted.name])
    asked.clear()
    (folder.parent / wanted.name).unlink()
    for download in (True, False):
        fetch(wanted, folder, download)
    assert not asked


@pytest.mark.parametrize("download", [True, False])
def test_an_archive_beside_the_folder_is_unpacked_without_any_download(archive, tmp_path, download):
    wanted, path, asked = archive
    path.rename(tmp_path / wanted.name)
    fetch(wanted, tmp_path / "images", download)
    assert contents(tmp_path / "images") == IMAGES
    assert not asked


def test_what_another_process_has_unpacked_meanwhile_is_used(archive, tmp_path, monkeypatch):
    wanted, _, asked = archive
    folder = tmp_path / "images"

    @contextmanager
    def second(root: Path):
        folder.mkdir()
        yield

    monkeypatch.setattr(vision, "_alone", second)
    fetch(wanted, folder, download=True)
    assert not asked


def error_of(archive: Archive, folder: Path, download: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        fetch(archive, folder, download)
    message = str(caught.value)
    assert caught.value.reason == "data"
    assert "\n" not in message
    assert f"put into {folder.parent}: {archive.name} (md5 {archive.md5}) from {archive.address}" in message
    assert not folder.exists()
    return message


def test_what_cannot_be_downloaded_is_named_with_checksum_and_address(archive, tmp_path):
    wanted, _, asked = archive
    folder = tmp_path / "new" / "images"
    assert "set dataset.download to true" in error_of(wanted, folder, download=False)
    assert not asked
    assert "Connection refused" in error_of(Archive(NOWHERE, wanted.name, wanted.md5), folder)
    assert not folder.parent.exists()


def test_a_damaged_archive_is_named_and_once_it_is_well_again_so_is_the_next_start(archive, tmp_path):
    wanted, path, _ = archive
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "corrupted" in error_of(wanted, tmp_path / "images")
    path.write_bytes(whole)
    fetch(wanted, tmp_path / "images", download=True)
    assert contents(tmp_path / "images") == IMAGES


def test_an_archive_without_the_folder_or_half_unpacked_leaves_no_folder(archive, tmp_path, monkeypatch):
    wanted, _, _ = archive
    assert f"{wanted.name} has no folder pictures" in error_of(wanted, tmp_path / "pictures")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    assert "No space left on device" in error_of(wanted, tmp_path / "images")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["server"]

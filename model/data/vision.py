"""Datasets that torchvision downloads, checks and reads; what goes wrong becomes a sentence."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError

Samples = tuple[Tensor, Tensor]  # images as torchvision keeps them, labels


def read_vision(kind: str, data_dir: str, download: bool) -> tuple[Samples, Samples, tuple[str, ...]]:
    """Returns training samples, test samples and class names of a dataset of torchvision.

    Files that are there are used; an archive that is there is unpacked; only then something is downloaded.

    Args:
        kind: A class of `torchvision.datasets` with `data` and `targets`.
        data_dir: Its root.
        download: Whether downloading is allowed.

    Raises:
        InputError: The files are missing or damaged, and could not be downloaded.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    source = getattr(datasets, kind)
    root = Path(data_dir).expanduser()
    folder, address, archives = _archives(source, root)

    # Whatever is raised in here, a wrong checksum, no network, a full disk or bytes that are no pickle, says the
    # same to the user: these files are needed in that folder.
    try:
        try:
            train, test = _read(source, root, download=False)
        except Exception:
            if not download and not all(check_integrity(folder / name, md5) for name, md5 in archives):
                raise
            with _alone(root):
                train, test = _read(source, root, download=True)
    except Exception as error:
        raise _unreadable(kind, root, error, download, folder, archives, address) from error
    return _samples(train), _samples(test), tuple(train.classes)


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        address: Where it lies, with the "/" at the end.
        name: Its name there and here.
        md5: Of its content.
    """

    address: str
    name: str
    md5: str


def fetch(archive: Archive, folder: Path, download: bool) -> None:
    """Makes sure that a folder of an archive is there, unpacked; an archive beside it is not downloaded again.

    Args:
        archive: What has the folder, or has an archive that has it.
        folder: Where it must be.
        download: Whether downloading is allowed.

    Raises:
        InputError: The folder is missing and could not be made.
    """
    from torchvision.datasets.utils import check_integrity, download_url

    beside = folder.parent
    if folder.is_dir():
        return
    try:
        if not download and not check_integrity(beside / archive.name, archive.md5):
            raise FileNotFoundError(f"no folder {folder.name}, no sound {archive.name}")
        with _alone(beside):
            if not folder.is_dir():  # another process may have been first
                download_url(archive.address + archive.name, beside, archive.name, archive.md5)
                _unpack(beside / archive.name, folder)
    except Exception as error:
        wanted = [(archive.name, archive.md5)]
        raise _unreadable(folder.name, beside, error, download, beside, wanted, archive.address) from error


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks a folder of an archive beside its place and renames it: an interruption leaves nothing half done."""
    from torchvision.datasets.utils import extract_archive

    with tempfile.TemporaryDirectory(dir=folder.parent) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        extract_archive(archive, name)
        for inner in Path(name).rglob(f"{folder.name}.tar.gz"):
            extract_archive(inner, name)
        found = [path for path in Path(name).rglob(folder.name) if path.is_dir()]
        if not found:
            raise FileNotFoundError(f"{archive.name} has no folder {folder.name}")
        found[0].rename(folder)


def _unreadable(
    kind: str, root: Path, error: Exception, download: bool, folder: Path, archives: list[tuple[str, str]], address: str
) -> InputError:
    wanted = ", ".join(f"{name} (md5 {md5})" for name, md5 in archives)
    return InputError(
        f"dataset.data_dir: cannot read {kind} in {root.absolute()} ({_one_line(error)}); "
        f"{'' if download else 'set dataset.download to true, or '}"
        f"remove damaged files and put into {folder.absolute()}: {wanted} from {address}",
        "data",
    )


def _archives(source: Any, root: Path) -> tuple[Path, str, list[tuple[str, str]]]:
    """Returns where the archives of a dataset belong, where they are on the net, and (name, md5) of each."""
    if hasattr(source, "tgz_md5"):
        return root, source.url.removesuffix(source.filename), [(source.filename, source.tgz_md5)]
    return root / source.__name__ / "raw", source.mirrors[0], source.resources


def _read(source: Any, root: Path, download: bool) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        # numpy 2.4.0 to 2.4.4 warn of pickles as old as CIFAR's, and Python 3.12 of archives unpacked without a
        # filter (torchvision has checked their md5): nothing that a user could mend.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return source(root, train=True, download=download), source(root, train=False, download=download)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Lets one process at a time download: the trials of a search all start at once."""
    name = hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:16]
    with Path(tempfile.gettempdir(), f"kdlab-download-{os.getuid()}-{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        existed = root.exists()
        root.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except BaseException:
            if not existed:
                shutil.rmtree(root, ignore_errors=True)  # it holds nothing but what torchvision began to fetch
            raise


def _samples(dataset: Any) -> Samples:
    return torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())

"""Image files in class folders, found without opening one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.data.images import FileSplit
from model.errors import InputError


@dataclass(frozen=True)
class Listing:
    """The files of a split, class after class, each class in the order of the paths.

    Attributes:
        folder: What `names` start from.
        classes: Sorted names.
        names: One path per image.
        sizes: Bytes of each file.
        labels: One per image.
        manifest: SHA-256 over split, path below the split's folder, size and time of change of every file.
    """

    folder: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    labels: tuple[int, ...]
    manifest: str

    def paths(self) -> list[str]:
        return [f"{self.folder}/{name}" for name in self.names]

    def files(self, image_size: int, resize_size: int | None) -> FileSplit:
        """Returns the split whose files are decoded when they are due; `resize_size` None is `image_size`."""
        paths = np.array([os.fsencode(name) for name in self.names])
        sizes, labels = torch.tensor(self.sizes), torch.tensor(self.labels)
        return FileSplit(self.folder, paths, sizes, labels, image_size, resize_size or image_size, self.manifest)


def list_files(
    folder: Path,
    split: str,
    keep: Callable[[os.DirEntry[str]], bool] = lambda entry: True,
    without: Collection[str] = (),
) -> Listing:
    """Lists the images of a folder with a folder per class; hidden files are ignored.

    Args:
        folder: The folder.
        split: What to call it in the manifest.
        keep: Which entries below a class folder count; a folder that does not is not looked into.
        without: Class folders to leave out.

    Raises:
        InputError: The folder cannot be read, has fewer than two classes, or a class has no images.
    """
    try:
        return _list_files(folder, split, keep, without)
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}; check the files", "data") from error


def _list_files(
    folder: Path, split: str, keep: Callable[[os.DirEntry[str]], bool], without: Collection[str]
) -> Listing:
    classes: list[str] = []
    names: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    manifest = hashlib.sha256()
    for entry in _visible(folder):
        if not entry.is_dir() or entry.name in without:
            continue
        files = list(_below(entry.path, keep))
        if not files:
            raise InputError(f"class folder {entry.path} has no images; add some or remove the folder", "data")
        for file in files:
            stat = file.stat()
            name = file.path[len(str(folder)) + 1 :]
            manifest.update(f"{split}/{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
            names.append(name)
            sizes.append(stat.st_size)
        labels += [len(classes)] * len(files)
        classes.append(entry.name)
    if len(classes) < 2:
        raise InputError(f"{folder} has {len(classes)} class folders; it needs at least two, with images", "data")
    return Listing(str(folder), tuple(classes), tuple(names), tuple(sizes), tuple(labels), manifest.hexdigest())


def list_loose_files(folder: Path) -> Listing:
    """Lists all images below a folder, as if they were of one class; hidden files are ignored.

    Raises:
        InputError: The folder cannot be read, or has no images.
    """
    try:
        files = list(_below(str(folder), lambda entry: True))
        stats = [file.stat() for file in files]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}; check the files", "data") from error
    if not files:
        raise InputError(f"{folder} has no images; add some, or name another unlabelled.data_dir", "data")
    names = tuple(file.path[len(str(folder)) + 1 :] for file in files)
    manifest = hashlib.sha256()
    for name, stat in zip(names, stats, strict=True):
        manifest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    sizes = tuple(stat.st_size for stat in stats)
    return Listing(str(folder), ("unlabelled",), names, sizes, (0,) * len(names), manifest.hexdigest())


def check_classes(listings: Mapping[str, Listing]) -> None:
    """Sees whether all splits have the classes of `train`.

    Raises:
        InputError: One has others; the message names some.
    """
    expected = set(listings["train"].classes)
    for listing in listings.values():
        if missing := sorted(expected - set(listing.classes)):
            raise InputError(f"{listing.folder} lacks the class folders {_some(missing)}, which train/ has", "data")
        if unknown := sorted(set(listing.classes) - expected):
            raise InputError(f"{listing.folder} has the class folders {_some(unknown)}, which train/ lacks", "data")


def _below(folder: str, keep: Callable[[os.DirEntry[str]], bool]) -> Iterator[os.DirEntry[str]]:
    for entry in filter(keep, _visible(folder)):
        if entry.is_dir():
            yield from _below(entry.path, keep)
        else:
            yield entry


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(str(folder)) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _some(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""Any images in folders, one folder per class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from model.data import DATASETS
from model.data.decode import cached, decode_all
from model.data.images import Images, Split, divide_per_class, histogram, mean_and_std
from model.errors import InputError
from model.rng import derive_seed

FORMAT = 1  # of the cache; raise it when the same files would be decoded to other pixels
LIMIT = 16 * 10**9  # bytes of decoded images held in memory


@dataclass(frozen=True)
class Listing:
    """The files of a split, class after class, each class in the order of the paths.

    Attributes:
        classes: Sorted names.
        paths: One per image.
        labels: One per image.
        manifest: SHA-256 over split, path below the split's folder, size and time of change of every file.
    """

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    manifest: str


@DATASETS.register("image_folder")
def image_folder(
    *,
    data_dir: str,
    image_size: Annotated[int, Field(ge=8, le=512)] = 32,
    cache_dir: str | None = None,
) -> Images:
    """Images in `train/`, `test/` and optionally `val/`, with a folder per class; decoded once, then cached.

    With no `test/`, or with the class folders directly in `data_dir`, a fixed tenth of each class becomes the test
    split. Hidden files are ignored; every other file in a class folder must be an image. Photographs are the usual
    case, so the augmentation is `crop_flip`; choose `crop` where mirroring changes what an image shows.

    Args:
        data_dir: The folder.
        image_size: Height and width: larger and smaller images are resized, their centre square is taken.
        cache_dir: Where decoded images are kept; null: `.kdlab-cache` inside `data_dir`.

    Source: the user's own images.

    Raises:
        InputError: There are no images, a file is not one, splits differ in their classes, or all is too large.
    """
    root = Path(data_dir).expanduser()
    try:
        listings = _list_splits(root)
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}; check the files", "data") from error
    count = sum(len(listing.paths) for listing in listings.values())
    if count * 3 * image_size**2 > LIMIT:
        raise InputError(
            f"{root}: {count:,} images of 3x{image_size}x{image_size} take {count * 3 * image_size**2 / 1e9:.1f} GB "
            f"of memory, above the limit of {LIMIT / 1e9:.0f} GB; lower dataset.image_size",
            "data",
        )
    cache = Path(cache_dir).expanduser() if cache_dir else root / ".kdlab-cache"

    splits = {name: _load(listing, image_size, cache) for name, listing in listings.items()}
    train, test = splits["train"], splits.get("test")
    classes = listings["train"].classes
    if test is None:
        train, test = _divide_off_test(train, classes)
    # The name has the number of images, because with and without test/ different images of train/ are for training.
    histogram_path = cache / f"{_key(listings['train'], image_size)}-histogram-{len(train)}.npy"
    counts = cached(histogram_path, (3, 256), "int64", lambda: histogram(train.images).numpy())
    mean, std = mean_and_std(torch.from_numpy(counts))
    return Images(train, splits.get("val"), test, classes, mean, std, augmentation="crop_flip")


def _list_splits(root: Path) -> dict[str, Listing]:
    if not root.is_dir():
        raise InputError(f"dataset.data_dir: there is no folder {root}; it must hold train/<class>/<images>", "data")
    found = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    if not found:
        return {"train": _list_split(root, "train")}
    if "train" not in found:
        raise InputError(f"{root} has {' and '.join(f'{n}/' for n in found)} but no train/; add train/<class>/", "data")
    listings = {name: _list_split(root / name, name) for name in found}
    expected = set(listings["train"].classes)
    for name, listing in listings.items():
        if missing := sorted(expected - set(listing.classes)):
            raise InputError(f"{root / name} lacks the class folders {_some(missing)}, which train/ has", "data")
        if unknown := sorted(set(listing.classes) - expected):
            raise InputError(f"{root / name} has the class folders {_some(unknown)}, which train/ lacks", "data")
    return listings


def _list_split(folder: Path, split: str) -> Listing:
    classes: list[str] = []
    paths: list[str] = []
    labels: list[int] = []
    manifest = hashlib.sha256()
    for entry in _visible(folder):
        if not entry.is_dir():
            continue
        files = list(_files(entry.path))
        if not files:
            raise InputError(f"class folder {entry.path} has no images; add some or remove the folder", "data")
        for file in files:
            stat = file.stat()
            relative = file.path[len(str(folder)) + 1 :]
            manifest.update(
                f"{split}/{relative}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
            paths.append(file.path)
        labels += [len(classes)] * len(files)
        classes.append(entry.name)
    if len(classes) < 2:
        raise InputError(f"{folder} has {len(classes)} class folders; it needs at least two, with images", "data")
    return Listing(tuple(classes), tuple(paths), tuple(labels), manifest.hexdigest())


def _files(folder: str) -> Iterator[os.DirEntry[str]]:
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _files(entry.path)
        else:
            yield entry


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(str(folder)) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _key(listing: Listing, image_size: int) -> str:
    return hashlib.sha256(f"{FORMAT} {image_size} {listing.manifest}".encode()).hexdigest()


def _load(listing: Listing, image_size: int, cache: Path) -> Split:
    shape = (len(listing.paths), 3, image_size, image_size)
    path = cache / f"{_key(listing, image_size)}.npy"
    images = cached(path, shape, "uint8", lambda: decode_all(listing.paths, image_size))
    return Split(torch.from_numpy(images), torch.tensor(listing.labels))


def _divide_off_test(train: Split, classes: tuple[str, ...]) -> tuple[Split, Split]:
    counts = train.labels.bincount()
    if int(counts.min()) < 2:
        raise InputError(
            f"class '{classes[int(counts.argmin())]}' has one image only, so no test image can be divided off; "
            "add images or a test/ folder",
            "data",
        )
    test, rest = divide_per_class(train.labels, 0.1, derive_seed("image_folder", "test"), at_least=1)
    return train.select(rest), train.select(test)


def _some(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

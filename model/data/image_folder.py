"""Any images in folders, one folder per class."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from pydantic import Field

from model.data import DATASETS
from model.data.decode import cached, decode_all
from model.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PHOTOGRAPHS,
    FileSplit,
    Images,
    Split,
    divide_per_class,
    histogram,
    mean_and_std,
)
from model.data.listing import Listing, check_classes, list_files
from model.errors import InputError
from model.rng import derive_seed

FORMAT = 1  # of the cache; raise it when the same files would be decoded to other pixels
LIMIT = 16 * 10**9  # bytes of decoded images held in memory


@DATASETS.register("image_folder")
def image_folder(
    *,
    data_dir: str,
    image_size: Annotated[int, Field(ge=8, le=1024)] = 32,
    stream: bool = False,
    resize_size: Annotated[int, Field(ge=8, le=2048)] | None = None,
    cache_dir: str | None = None,
) -> Images:
    """Images in `train/`, `test/` and optionally `val/`, with a folder per class; decoded once, then cached.

    With no `test/`, or with the class folders directly in `data_dir`, a fixed tenth of each class becomes the test
    split. Hidden files are ignored; every other file in a class folder must be an image. Photographs are the usual
    case, so the augmentation is `crop_flip`, and of streamed images `random_resized_crop` and `horizontal_flip`;
    choose one without mirroring where that changes what an image shows.

    Args:
        data_dir: The folder.
        image_size: Height and width: larger and smaller images are resized, their centre square is taken.
        stream: Decode images whenever they are shown, instead of all of them once into memory. Mean and std are then
            ImageNet's by default: to compute them would take a pass over all files.
        resize_size: When streaming, the shorter side before the centre of `image_size` is cut out; null: `image_size`.
        cache_dir: Where decoded images are kept; null: `.kdlab-cache` inside `data_dir`.

    Source: the user's own images.

    Raises:
        InputError: There are no images, a file is not one, splits differ in their classes, or all is too large.
    """
    root = Path(data_dir).expanduser()
    listings = _list_splits(root)
    classes = listings["train"].classes
    if stream:
        files = {name: listing.files(image_size, resize_size) for name, listing in listings.items()}
        shown = _with_test(files["train"], files.get("test"), classes)
        return Images(shown[0], files.get("val"), shown[1], classes, IMAGENET_MEAN, IMAGENET_STD, PHOTOGRAPHS)
    if resize_size is not None:
        raise InputError("dataset.resize_size is for streamed images; set dataset.stream to true or remove it", "data")
    count = sum(len(listing.names) for listing in listings.values())
    if count * 3 * image_size**2 > LIMIT:
        raise InputError(
            f"{root}: {count:,} images of 3x{image_size}x{image_size} take {count * 3 * image_size**2 / 1e9:.1f} GB "
            f"of memory, above the limit of {LIMIT / 1e9:.0f} GB; lower dataset.image_size, or set dataset.stream",
            "data",
        )
    cache = Path(cache_dir).expanduser() if cache_dir else root / ".kdlab-cache"
    splits = {name: _load(listing, image_size, cache) for name, listing in listings.items()}
    train, test = _with_test(splits["train"], splits.get("test"), classes)
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
        return {"train": list_files(root, "train")}
    if "train" not in found:
        raise InputError(f"{root} has {' and '.join(f'{n}/' for n in found)} but no train/; add train/<class>/", "data")
    listings = {name: list_files(root / name, name) for name in found}
    check_classes(listings)
    return listings


def _key(listing: Listing, image_size: int) -> str:
    return hashlib.sha256(f"{FORMAT} {image_size} {listing.manifest}".encode()).hexdigest()


def _load(listing: Listing, image_size: int, cache: Path) -> Split:
    shape = (len(listing.names), 3, image_size, image_size)
    path = cache / f"{_key(listing, image_size)}.npy"
    images = cached(path, shape, "uint8", lambda: decode_all(listing.paths(), image_size))
    return Split(torch.from_numpy(images), torch.tensor(listing.labels))


SplitT = TypeVar("SplitT", Split, FileSplit)


def _with_test(train: SplitT, test: SplitT | None, classes: tuple[str, ...]) -> tuple[SplitT, SplitT]:
    """Returns both splits; where there is no test split, one is divided off."""
    if test is not None:
        return train, test
    counts = train.labels.bincount()
    if int(counts.min()) < 2:
        raise InputError(
            f"class '{classes[int(counts.argmin())]}' has one image only, so no test image can be divided off; "
            "add images or a test/ folder",
            "data",
        )
    taken, rest = divide_per_class(train.labels, 0.1, derive_seed("image_folder", "test"), at_least=1)
    return train.select(rest), train.select(taken)

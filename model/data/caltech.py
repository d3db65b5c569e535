"""Caltech-101 and Caltech-256: photographs of many sizes, decoded as they are shown."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import Field

from model.data import DATASETS
from model.data.images import PHOTOGRAPHS, Images, divide_per_class
from model.data.listing import list_files
from model.data.vision import Archive, fetch
from model.errors import InputError
from model.rng import derive_seed

CALTECH101 = Archive(
    "https://data.caltech.edu/records/mzrjq-6wc02/files/", "caltech-101.zip", "3138e1922a9193bfa496528edbbc45d0"
)
CALTECH256 = Archive(
    "https://data.caltech.edu/records/nyy15-4j048/files/",
    "256_ObjectCategories.tar",
    "67b4f42ca05d46448c6bb8ecd2220f6d",
)

ImageSize = Annotated[int, Field(ge=8, le=1024)]
ResizeSize = Annotated[int, Field(ge=8, le=2048)] | None
Fraction = Annotated[float, Field(ge=0, lt=1)]


@DATASETS.register("caltech101")
def caltech101(
    *,
    data_dir: str = "data",
    download: bool = True,
    image_size: ImageSize = 224,
    resize_size: ResizeSize = None,
    test_fraction: Fraction = 0.0,
) -> Images:
    """8,677 photographs in 101 classes, without the clutter that came with them.

    There is no official division: `val_fraction` of each class, rounded down, is for validation (by default 820
    images; 7,857 are left), and there is no test split unless one is asked for.

    Args:
        data_dir: The folder that has or gets `caltech101/101_ObjectCategories/` (or `caltech101/caltech-101.zip`).
        download: Download what is missing (137 MB).
        image_size: Height and width.
        resize_size: The shorter side before the centre of `image_size` is cut out, where nothing is augmented; null:
            `image_size`.
        test_fraction: Share of each class, rounded down, that becomes the test split before anything else is carved.

    Source: Fei-Fei, Fergus, Perona, "Learning generative visual models from few training examples", 2004.

    Raises:
        InputError: The files are missing or damaged, and cannot be downloaded.
    """
    folder = Path(data_dir).expanduser() / "caltech101" / "101_ObjectCategories"
    fetch(CALTECH101, folder, download)
    return _caltech(folder, 101, image_size, resize_size, test_fraction, without=("BACKGROUND_Google",))


@DATASETS.register("caltech256")
def caltech256(
    *,
    data_dir: str = "data",
    download: bool = True,
    image_size: ImageSize = 224,
    resize_size: ResizeSize = None,
    test_fraction: Fraction = 0.0,
) -> Images:
    """30,607 photographs in 257 classes, the last of which is clutter.

    There is no official division: `val_fraction` of each class, rounded down, is for validation, and there is no test
    split unless one is asked for.

    Args:
        data_dir: The folder that has or gets `caltech256/256_ObjectCategories/` (or the `.tar` of that name beside it).
        download: Download what is missing (1.2 GB).
        image_size: Height and width.
        resize_size: The shorter side before the centre of `image_size` is cut out, where nothing is augmented; null:
            `image_size`.
        test_fraction: Share of each class, rounded down, that becomes the test split before anything else is carved.

    Source: Griffin, Holub, Perona, "Caltech-256 object category dataset", 2007.

    Raises:
        InputError: The files are missing or damaged, and cannot be downloaded.
    """
    folder = Path(data_dir).expanduser() / "caltech256" / "256_ObjectCategories"
    fetch(CALTECH256, folder, download)
    return _caltech(folder, 257, image_size, resize_size, test_fraction)


def _caltech(
    folder: Path,
    num_classes: int,
    image_size: int,
    resize_size: int | None,
    test_fraction: float,
    without: Collection[str] = (),
) -> Images:
    # The archive of Caltech-256 has a few other files between the images, and a folder in one of the class folders.
    listing = list_files(folder, "all", keep=lambda entry: entry.name.endswith(".jpg"), without=without)
    if len(listing.classes) != num_classes:
        raise InputError(
            f"{folder} has {len(listing.classes)} class folders instead of {num_classes}; "
            "remove it to have it unpacked again, or name dataset image_folder",
            "data",
        )
    train, test = listing.files(image_size, resize_size), None
    if test_fraction > 0:
        taken, rest = divide_per_class(train.labels, test_fraction, derive_seed("caltech", "test"), round_down=True)
        train, test = train.select(rest), train.select(taken)
    half = (0.5, 0.5, 0.5)
    return Images(train, None, test, listing.classes, half, half, PHOTOGRAPHS, round_down=True)

"""ImageNet, as everybody unpacks it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from model.data import DATASETS
from model.data.images import IMAGENET_MEAN, IMAGENET_STD, PHOTOGRAPHS, Images
from model.data.listing import check_classes, list_files
from model.errors import InputError


@DATASETS.register("imagenet")
def imagenet(
    *,
    data_dir: str,
    image_size: Annotated[int, Field(ge=8, le=1024)] = 224,
    resize_size: Annotated[int, Field(ge=8, le=2048)] = 256,
) -> Images:
    """1,281,167 training and 50,000 test photographs in 1,000 classes (or any of them); decoded as they are shown.

    The test split is the official validation set, whose labels are the only public ones: nothing may be chosen by it.
    Validation is carved from `train/`. Classes are in the order of their identifiers, as in published nets.

    Args:
        data_dir: The folder with `train/<wnid>/` and `val/<wnid>/`.
        image_size: Height and width.
        resize_size: The shorter side before the centre of `image_size` is cut out, where nothing is augmented.

    Source: Russakovsky et al., "ImageNet large scale visual recognition challenge", IJCV 2015.

    Raises:
        InputError: A folder is missing or has other classes than the other.
    """
    root = Path(data_dir).expanduser()
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise InputError(
                f"dataset.data_dir: there is no folder {root / name}; {root} must hold train/<wnid>/<images> "
                "and val/<wnid>/<images>, from image-net.org",
                "data",
            )
    listings = {"train": list_files(root / "train", "train"), "val": list_files(root / "val", "val")}
    check_classes(listings)
    train, test = (listing.files(image_size, resize_size) for listing in listings.values())
    return Images(train, None, test, listings["train"].classes, IMAGENET_MEAN, IMAGENET_STD, PHOTOGRAPHS)

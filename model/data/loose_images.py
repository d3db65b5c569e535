"""Image files without classes: what a run can use beside its labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from model.data import DATASETS
from model.data.decode import decode_all
from model.data.image_folder import LIMIT
from model.data.images import IMAGENET_MEAN, IMAGENET_STD, PHOTOGRAPHS, Images, Split
from model.data.listing import list_loose_files
from model.errors import InputError


@DATASETS.register("loose_images")
def loose_images(
    *,
    data_dir: str,
    image_size: Annotated[int, Field(ge=8, le=1024)] = 32,
    stream: bool = False,
    resize_size: Annotated[int, Field(ge=8, le=2048)] | None = None,
) -> Images:
    """All images below a folder, whatever folders they lie in; they have no labels, so they go under `unlabelled`.

    Hidden files are ignored; every other file must be an image.

    Args:
        data_dir: The folder.
        image_size: Height and width: larger and smaller images are resized, their centre square is taken.
        stream: Decode images whenever they are shown, instead of all of them once into memory.
        resize_size: When streaming, the shorter side before the centre of `image_size` is cut out; null: `image_size`.

    Source: the user's own images.

    Raises:
        InputError: There are no images, a file is not one, or all is too large.
    """
    listing = list_loose_files(Path(data_dir).expanduser())
    constants = IMAGENET_MEAN, IMAGENET_STD, PHOTOGRAPHS if stream else "crop_flip"
    if stream:
        return Images(listing.files(image_size, resize_size), None, None, listing.classes, *constants)
    if resize_size is not None:
        raise InputError("unlabelled.resize_size is for streamed images; set unlabelled.stream to true", "data")
    size = len(listing.names) * 3 * image_size**2
    if size > LIMIT:
        line = f"{data_dir}: {len(listing.names):,} images take {size / 1e9:.1f} GB of memory"
        raise InputError(f"{line}; lower unlabelled.image_size, or set unlabelled.stream", "data")
    images = torch.from_numpy(decode_all(listing.paths(), image_size))
    return Images(Split(images, torch.tensor(listing.labels)), None, None, listing.classes, *constants)

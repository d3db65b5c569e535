"""Image files to pixels: all to one array by all cores, once; or one at a time, each time it is shown."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from model.errors import InputError

Array = np.ndarray[Any, Any]


def cached(path: Path, shape: tuple[int, ...], dtype: str, make: Callable[[], Array]) -> Array:
    """Returns the array kept at `path`; where there is none of that shape and type, makes and keeps it.

    A cache that cannot be written costs time, not the run: it is a warning.
    """
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        if array.shape == shape and array.dtype == dtype:
            return array
    except (OSError, ValueError, EOFError):
        pass  # there is none, or it is damaged
    array = make()
    # Written beside its place and renamed: another process sees all of the file or none of it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"cannot keep decoded images in {path.parent} ({error}); give dataset.cache_dir", stacklevel=2)
    return array


def decode_all(paths: Sequence[str], image_size: int) -> Array:
    """Decodes image files into one array, `(N, 3, image_size, image_size)` uint8.

    Raises:
        InputError: A file is not a readable image; the message has its path.
    """
    images = np.empty((len(paths), 3, image_size, image_size), dtype=np.uint8)

    def work(start: int) -> None:
        for position in range(start, min(start + 64, len(paths))):
            images[position] = decode(paths[position], image_size)

    logging.getLogger(__name__).info("decoding %s images, once", f"{len(paths):,}")
    # Threads, because Pillow lets go of the interpreter lock while it decodes. The first error cancels the rest.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(work, range(0, len(paths), 64)):
            pass
    return images


def decode(path: str, image_size: int) -> Array:
    """Reads the centre square of an image as `(3, image_size, image_size)` uint8.

    Resizing is bilinear and antialiased; an image of the right size is taken as it is.
    """
    image = read_image(path)
    if image.size != (image_size, image_size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image).transpose(2, 0, 1)


def cut_centre(image: Image.Image, resize_size: int, image_size: int) -> Image.Image:
    """Resizes the shorter side of an image to `resize_size` and cuts out the central square of `image_size`.

    Resizing is bilinear and antialiased. Roundings are torchvision's, so that nets trained with its `Resize` and
    `CenterCrop` see what they are used to.
    """
    short = min(image.size)
    if max(image.size) > 16 * short:  # of a strip only the middle: resized whole, it might fill the memory
        image = _centre(image, *(min(side, 16 * short) for side in image.size))
    size = [resize_size if side == short else int(resize_size * side / short) for side in image.size]
    return _centre(image.resize(size, Image.Resampling.BILINEAR), image_size, image_size)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def read_image(path: str) -> Image.Image:
    """Reads an image upright in RGB; of an animation the first frame; transparency is dropped.

    Raises:
        InputError: The file is not a readable image; the message has its path.
    """
    try:
        with Image.open(path) as file:
            return _to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # on damaged bytes Pillow raises almost anything: OSError, SyntaxError, struct.error
        raise InputError(
            f"{path} is not a readable image ({' '.join(str(error).split())}); replace or remove it", "data"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip to 255, not scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P":  # straight to RGB warns where the palette has transparent entries
        image = image.convert("RGBA")
    return image.convert("RGB")

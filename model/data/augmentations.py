"""Augmentation as an ordered list of transforms, each an entry of a registry.

A transform takes one image, uint8 `(C, H, W)`, not normalised. Its random choices come from torch's generator of the
CPU, which the loader seeds for each sample; so an entry must draw from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError as _Fault
from torch import Tensor

from model.data.views import Augmentation
from model.registry import Problem, Registry, checked_by

TRANSFORMS = Registry("augmentation")

Transform = Callable[[Tensor], Tensor]
Listed = Sequence[str | Mapping[str, Any]]  # as in params.json: a name, or {"name": ..., options}

NAMED: dict[str, Listed] = {
    "crop_flip": ["crop", "horizontal_flip"],
    "crop": ["crop"],
    "flip": ["horizontal_flip"],
    "none": [],
}


@dataclass(frozen=True)
class Canvas:
    """The images that transforms are made for.

    Attributes:
        shape: `(C, H, W)` of an image as a net sees it.
        mean: Per channel, on a [0, 1] scale.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1:]


@dataclass(frozen=True)
class Transforms:
    """Transforms, one after the other; with no steps, an image stays as it is.

    Attributes:
        steps: In their order.
        whole: Whether an image file is decoded whole for them, instead of resized and cut to the image size.
    """

    steps: tuple[Transform, ...] = ()
    whole: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        for step in self.steps:
            image = step(image)
        return image


def resolve(augmentation: str | Listed) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Checks an augmentation and fills in its options.

    Returns:
        A section for each transform, and every problem as (key below `augmentation`, text); with problems the sections
        are not usable.
    """
    sections, problems = [], []
    for position, element in enumerate(NAMED[augmentation] if isinstance(augmentation, str) else augmentation):
        section, found = TRANSFORMS.resolve({"name": element} if isinstance(element, str) else element)
        sections.append(section)
        problems += [(f"{position}.{key}".rstrip("."), text) for key, text in found]
    return sections, problems


_RULE = f'{", ".join(NAMED)}, or a list of names and {{"name": ..., options}}'
Augmenting = Annotated[
    Literal["crop_flip", "crop", "flip", "none"] | list[str | dict[str, Any]] | None, checked_by(resolve, _RULE)
]


def as_views(sections: Sequence[Mapping[str, Any]]) -> Augmentation | None:
    """Returns the family of numbered views that transforms amount to; None where they amount to none.

    Padded crops and even mirroring have the same views with the same chances in any order.
    """
    options = {section["name"]: section for section in sections}
    numbered = options.keys() <= {"crop", "horizontal_flip", "vertical_flip"} and len(options) == len(sections)
    if not numbered or any(section.get("probability", 0.5) != 0.5 for section in sections):
        return None
    pad = options["crop"]["padding"] if "crop" in options else 0
    return Augmentation(pad, horizontal="horizontal_flip" in options, vertical="vertical_flip" in options)


def create(sections: Sequence[Mapping[str, Any]], canvas: Canvas) -> Transforms:
    """Returns the transforms of checked sections."""
    whole = any(section["name"] == "random_resized_crop" for section in sections)
    return Transforms(tuple(TRANSFORMS.create(section, canvas) for section in sections), whole)


# --- the transforms ---------------------------------------------------------------------------------------

Probability = Annotated[float, Field(ge=0, le=1)]


def _ascending(values: list[float]) -> list[float]:
    if len(values) != 2 or values[0] > values[1]:
        raise _Fault("range", "expected [smallest, largest], got {values}", {"values": str(values)})
    return values


Areas = Annotated[list[Annotated[float, Field(gt=0, le=1)]], AfterValidator(_ascending)]
Ratios = Annotated[list[Annotated[float, Field(gt=0)]], AfterValidator(_ascending)]
AREAS = [0.08, 1.0]
RATIOS = [3 / 4, 4 / 3]


@TRANSFORMS.register("crop")
def crop(canvas: Canvas, *, padding: Annotated[int, Field(ge=1, le=128)] = 4) -> Transform:
    """A window of the image's own size, anywhere on the black-padded image.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2.

    Args:
        padding: Black pixels on each side.
    """
    from torchvision.transforms import v2

    return v2.RandomCrop(canvas.size, padding=padding, pad_if_needed=True)


@TRANSFORMS.register("horizontal_flip")
def horizontal_flip(canvas: Canvas, *, probability: Probability = 0.5) -> Transform:
    """Mirrors left to right.

    Source: Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep CNNs", NeurIPS 2012, section 4.1.

    Args:
        probability: How often.
    """
    from torchvision.transforms import v2

    return v2.RandomHorizontalFlip(probability)


@TRANSFORMS.register("vertical_flip")
def vertical_flip(canvas: Canvas, *, probability: Probability = 0.5) -> Transform:
    """Mirrors top to bottom.

    Source: as for `horizontal_flip`, the other axis.

    Args:
        probability: How often.
    """
    from torchvision.transforms import v2

    return v2.RandomVerticalFlip(probability)


@TRANSFORMS.register("rotation")
def rotation(canvas: Canvas, *, degrees: Annotated[float, Field(ge=0, le=180)] = 15.0) -> Transform:
    """Turns about the centre by an angle drawn evenly from both directions; nearest pixel, black corners.

    Source: Simard, Steinkraus, Platt, "Best practices for CNNs applied to visual document analysis", ICDAR 2003.

    Args:
        degrees: The largest angle.
    """
    from torchvision.transforms import v2

    return v2.RandomRotation(degrees)


@TRANSFORMS.register("color_jitter")
def color_jitter(
    canvas: Canvas,
    *,
    brightness: Annotated[float, Field(ge=0)] = 0.2,
    contrast: Annotated[float, Field(ge=0)] = 0.2,
    saturation: Annotated[float, Field(ge=0)] = 0.2,
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0,
) -> Transform:
    """Changes the colours, in an order drawn anew each time; a strength of 0 leaves a quality as it is.

    Source: Howard, "Some improvements on deep convolutional neural network based image classification", ICLR 2014.

    Args:
        brightness: The factor is drawn evenly from `1 - brightness` (at least 0) to `1 + brightness`.
        contrast: The same for contrast.
        saturation: The same for saturation.
        hue: The shift is drawn evenly from `-hue` to `hue`, in turns of the colour wheel.
    """
    from torchvision.transforms import v2

    return v2.ColorJitter(brightness, contrast, saturation, hue)


@TRANSFORMS.register("random_resized_crop")
def random_resized_crop(canvas: Canvas, *, scale: Areas = AREAS, ratio: Ratios = RATIOS) -> Transform:
    """A part of random area and shape, resized (bilinear, antialiased); image files are decoded whole for it.

    Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6.

    Args:
        scale: The smallest and the largest share of the area.
        ratio: The smallest and the largest width over height.
    """
    from torchvision.transforms import v2

    return v2.RandomResizedCrop(canvas.size, scale=tuple(scale), ratio=tuple(ratio))


@TRANSFORMS.register("rand_augment")
def rand_augment(
    canvas: Canvas,
    *,
    num_ops: Annotated[int, Field(ge=1, le=14)] = 2,
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9,
) -> Transform:
    """RandAugment: operations drawn anew each time, all at one strength.

    Source: Cubuk et al., "RandAugment: practical automated data augmentation with a reduced search space", 2019.

    Args:
        num_ops: Operations, one after the other.
        magnitude: Their strength, out of 30.
    """
    from torchvision.transforms import v2

    return v2.RandAugment(num_ops, magnitude)


@TRANSFORMS.register("auto_augment")
def auto_augment(canvas: Canvas, *, policy: Literal["cifar10", "imagenet"] = "imagenet") -> Transform:
    """AutoAugment: one of the pairs of operations that a search found.

    Source: Cubuk et al., "AutoAugment: learning augmentation policies from data", CVPR 2019.

    Args:
        policy: The data that the search was for.
    """
    from torchvision.transforms import v2

    return v2.AutoAugment(v2.AutoAugmentPolicy(policy))


@TRANSFORMS.register("random_erasing")
def random_erasing(canvas: Canvas, *, probability: Probability = 0.5) -> Transform:
    """Fills a rectangle with the mean, that is about 0 once images are normalised.

    Source: Zhong et al., "Random erasing data augmentation", AAAI 2020.

    Deviation: The mean is rounded to a whole pixel value.

    Args:
        probability: How often.
    """
    from torchvision.transforms import v2

    return v2.RandomErasing(probability, value=[round(255 * mean) for mean in canvas.mean])

"""Sizes of nets side by side: `python -m model.sizes resnet152 cnn,num_channels=16 experiments/cnn_distill`.

A net is named as in params.json, its options after commas; or it is the student of an experiment directory. No
checkpoint is needed and no image computed. MB are 10^6 bytes; MACs are the multiply-accumulates of one image,
activations the numbers that convolution, batch norm and linear layers put out for it. The percentages are of the first
net. The student of a directory is measured for the images and classes of its dataset, where those are known from
params.json alone, and without what simkd gives it, which depends on its teacher: evaluate.py counts that.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import legacy
from model.errors import InputError
from model.metrics import count_macs, count_parameters, weight_bytes
from model.nets import NETS

DEFAULTS = (32, 10)
# Image size and classes of the datasets that differ from that.
DATASETS = {"cifar100": (32, 100), "imagenet": (224, 1000), "caltech101": (224, 101), "caltech256": (224, 257)}
HEADERS = (
    "net",
    "parameters",
    "weights and buffers (MB)",
    "MACs (M)",
    "activations",
    "parameters + activations",
    "parameters (%)",
    "MACs (%)",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="+", metavar="NET", help="name[,option=value...] or an experiment directory")
    parser.add_argument("--image_size", type=int, help="height and width in pixels; default: the dataset's, or 32")
    parser.add_argument("--num_classes", type=int, help="default: the dataset's, or 10")
    return parser.parse_args()


def read_section(text: str) -> dict[str, Any]:
    """Returns the complete section of params.json that an argument stands for.

    Raises:
        InputError: The net or an option of it is unknown; or the directory's params.json cannot be used.
    """
    path = Path(text, "params.json")
    section, problems = NETS.resolve(_read_params(path)["student"] if path.is_file() else _parse(text))
    if problems:
        raise InputError("; ".join(f"{text}: {key}: {problem}" for key, problem in problems))
    if "pretrained" in section:  # nothing is fetched: the weights' values do not matter
        section["pretrained"] = False
    return section


def images_of(text: str) -> tuple[int, int]:
    """Returns the image size and the number of classes that an argument's net is for, as far as they are known."""
    path = Path(text, "params.json")
    dataset = _read_params(path).get("dataset") if path.is_file() else None
    if not isinstance(dataset, dict):
        return DEFAULTS
    image_size, num_classes = DATASETS.get(str(dataset.get("name")), DEFAULTS)
    given = dataset.get("image_size")
    return (given if isinstance(given, int) and given > 0 else image_size), num_classes


def unmeasured(text: str) -> str:
    """Returns what of an argument's net is not measured, for its row."""
    path = Path(text, "params.json")
    losses = _read_params(path).get("loss") if path.is_file() else None
    named = [loss.get("name") for loss in (losses if isinstance(losses, list) else [losses]) if isinstance(loss, dict)]
    return " (without simkd's projector)" if "simkd" in named else ""


def _read_params(path: Path) -> dict[str, Any]:
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
        if legacy.is_flat(params):
            params, _, problems = legacy.translate(params)
            if problems:
                raise ValueError("; ".join(f"{key}: {problem}" for key, problem in problems))
        return {"dataset": params.get("dataset"), "student": params["student"], "loss": params.get("loss")}
    except (KeyError, TypeError, AttributeError):
        raise InputError(f'{path}: has no "student": {{"name": ...}}; add it, or name the net itself') from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from None


def _parse(text: str) -> dict[str, Any]:
    name, *options = re.split(r",(?=\w+=)", text)  # a value may be a list
    if "," in name:
        raise InputError(f"{text}: an option is name=value, such as cnn,num_channels=16")
    section: dict[str, Any] = {"name": name}
    for option in options:
        key, _, value = option.partition("=")
        if key in section:
            raise InputError(f"{text}: {key} is given twice; keep one")
        try:
            section[key] = json.loads(value)
        except (ValueError, RecursionError):
            section[key] = value
    return section


def count_activations(net: nn.Module, shape: Sequence[int]) -> int:
    """Returns how many numbers convolution, batch norm and linear layers put out for one image.

    Args:
        net: Returns logits.
        shape: `(C, H, W)` of an image.
    """
    counts: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(output.numel())

    dummy = copy.deepcopy(net).to("meta").eval()
    for layer in dummy.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.BatchNorm1d | nn.BatchNorm2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        dummy(torch.empty(1, *shape, device="meta"))
    return sum(counts)


def measure(text: str, image_size: int, num_classes: int) -> tuple[int, int, int, int]:
    """Returns (parameters, bytes of weights and buffers, MACs, activations) of an argument's net.

    Raises:
        InputError: There is no such net, or it does not take such images.
    """
    section, shape = read_section(text), (3, image_size, image_size)
    try:
        net = NETS.create(section, num_classes).to("meta")
        return count_parameters(net), weight_bytes(net), count_macs(net, shape), count_activations(net, shape)
    except (RuntimeError, ValueError, AssertionError) as error:  # a net's own reason
        why = str(error).partition("\n")[0]
        raise InputError(f"{text} with images of {image_size}x{image_size}, {num_classes} classes: {why}") from None


def table(nets: Sequence[str], image_size: int | None = None, num_classes: int | None = None) -> str:
    """Returns a Markdown table of the sizes of nets that take colour images of `image_size` squared.

    Args:
        nets: As on the command line.
        image_size: For all of them; None: as `images_of` says.
        num_classes: The same for the number of classes.

    Raises:
        InputError: One of them cannot be measured.
    """
    from tabulate import tabulate

    shown = [(image_size or size, num_classes or classes) for size, classes in map(images_of, nets)]
    sizes = [measure(text, *images) for text, images in zip(nets, shown, strict=True)]
    rows = []
    for text, images, (parameters, size, macs, activations) in zip(nets, shown, sizes, strict=True):
        label = text.replace("|", "\\|") + unmeasured(text)
        label += "" if len(set(shown)) == 1 else f" ({images[0]} px, {images[1]} classes)"
        counts = f"{parameters:,}", f"{size / 1e6:.2f}", f"{macs / 1e6:,.2f}", f"{activations:,}"
        relative = (100 * parameters / sizes[0][0], 100 * macs / sizes[0][2])
        rows.append([label, *counts, f"{parameters + activations:,}", *(f"{x:.2f}" for x in relative)])
    align = ["left", *["right"] * (len(HEADERS) - 1)]
    return tabulate(rows, HEADERS, tablefmt="pipe", colalign=align, disable_numparse=True)


def main() -> int:
    args = parse_args()
    try:
        for option in ("image_size", "num_classes"):
            if vars(args)[option] is not None and vars(args)[option] < 1:
                raise InputError(f"--{option}: {vars(args)[option]} is below 1")
        print(table(args.nets, args.image_size, args.num_classes))
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())

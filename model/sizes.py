"""Sizes of nets side by side: `python -m model.sizes resnet152 cnn,num_channels=16 experiments/cnn_distill`.

A net is named as in params.json, its options after commas; or it is the student of an experiment directory. No
checkpoint is needed and no image computed. MB are 10^6 bytes; MACs are the multiply-accumulates of one image,
activations the numbers that convolution, batch norm and linear layers put out for it. The percentages are of the first
net.
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
    parser.add_argument("--image_size", type=int, default=32, help="height and width in pixels; default: 32")
    parser.add_argument("--num_classes", type=int, default=10, help="default: 10")
    return parser.parse_args()


def read_section(text: str) -> dict[str, Any]:
    """Returns the complete section of params.json that an argument stands for.

    Raises:
        InputError: The net or an option of it is unknown; or the directory's params.json cannot be used.
    """
    path = Path(text, "params.json")
    section, problems = NETS.resolve(_read_student(path) if path.is_file() else _parse(text))
    if problems:
        raise InputError("; ".join(f"{text}: {key}: {problem}" for key, problem in problems))
    if "pretrained" in section:  # nothing is fetched: the weights' values do not matter
        section["pretrained"] = False
    return section


def _read_student(path: Path) -> Any:
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
        if legacy.is_flat(params):
            params, _, problems = legacy.translate(params)
            if problems:
                raise ValueError("; ".join(f"{key}: {problem}" for key, problem in problems))
        return params["student"]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f'{path}: has no "student": {{"name": ...}}; add it, or name the net itself') from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from None


def _parse(text: str) -> dict[str, Any]:
    name, *options = re.split(r",(?=\w+=)", text)  # a value may be a list
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


def table(nets: Sequence[str], image_size: int, num_classes: int) -> str:
    """Returns a Markdown table of the sizes of nets that take colour images of `image_size` squared.

    Raises:
        InputError: One of them cannot be measured.
    """
    from tabulate import tabulate

    sizes = [measure(text, image_size, num_classes) for text in nets]
    rows = []
    for text, (parameters, size, macs, activations) in zip(nets, sizes, strict=True):
        counts = f"{parameters:,}", f"{size / 1e6:.2f}", f"{macs / 1e6:,.2f}", f"{activations:,}"
        relative = (100 * parameters / sizes[0][0], 100 * macs / sizes[0][2])
        rows.append(
            [text.replace("|", "\\|"), *counts, f"{parameters + activations:,}", *(f"{x:.2f}" for x in relative)]
        )
    align = ["left", *["right"] * (len(HEADERS) - 1)]
    return tabulate(rows, HEADERS, tablefmt="pipe", colalign=align, disable_numparse=True)


def main() -> int:
    args = parse_args()
    try:
        for option in ("image_size", "num_classes"):
            if vars(args)[option] < 1:
                raise InputError(f"--{option}: {vars(args)[option]} is below 1")
        print(table(args.nets, args.image_size, args.num_classes))
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())

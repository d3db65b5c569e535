"""Parameters and multiply-accumulates against published numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model.nets import NETS


def create_without_memory(section: dict[str, Any], num_classes: int) -> nn.Module:
    with torch.device("meta"):
        net: nn.Module = NETS.create(section, num_classes)
    return net


# The ancestor's numbers (shared/spec/upstream.md, section 3); the thin ResNets' are those of He et al. 2015, table 6,
# to all digits, and with 1x1 shortcuts and 100 classes that of RepDistiller's resnet20.
@pytest.mark.parametrize(
    ("section", "num_classes", "parameters"),
    [
        ({"name": "cnn"}, 10, 357_514),
        ({"name": "cnn", "num_channels": 8}, 10, 22_954),
        ({"name": "cnn", "num_channels": 16}, 10, 90_186),
        ({"name": "cnn", "num_channels": 64}, 10, 1_423_626),
        ({"name": "resnet18"}, 10, 11_173_962),
        ({"name": "resnet34"}, 10, 21_282_122),
        ({"name": "resnet50"}, 10, 23_520_842),
        ({"name": "resnet101"}, 10, 42_512_970),
        ({"name": "resnet152"}, 10, 58_156_618),
        ({"name": "resnet20"}, 10, 269_722),
        ({"name": "resnet32"}, 10, 464_154),
        ({"name": "resnet44"}, 10, 658_586),
        ({"name": "resnet56"}, 10, 853_018),
        ({"name": "resnet110"}, 10, 1_727_962),
        ({"name": "resnet20", "shortcut": "conv"}, 100, 278_324),
        ({"name": "tiny"}, 10, 5_466),
        ({"name": "torchvision/resnet50"}, 1000, 25_557_032),
        ({"name": "torchvision/mobilenet_v3_small"}, 1000, 2_542_856),
    ],
    ids=str,
)
def test_number_of_parameters_is_the_published_one(section: dict[str, Any], num_classes: int, parameters: int) -> None:
    net = create_without_memory(section, num_classes)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


@pytest.mark.parametrize(("name", "millions", "digits"), [("cnn", 10.6, 1), ("resnet18", 555, 0)])
def test_multiply_accumulates_of_a_32x32_image_are_the_published_ones(name: str, millions: float, digits: int) -> None:
    net = create_without_memory({"name": name}, 10).eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 32, 32, device="meta"))
    assert round(counter.get_total_flops() / 2 / 1e6, digits) == millions

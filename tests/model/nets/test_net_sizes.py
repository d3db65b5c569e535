"""Parameters and multiply-accumulates against published numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from model.metrics import count_macs
from model.nets import NETS


def create_without_memory(section: dict[str, Any], num_classes: int) -> nn.Module:
    with torch.device("meta"):
        net: nn.Module = NETS.create(section, num_classes)
    return net


# Counted on the networks as published: the ancestor's and seed 002's. The thin ResNets'
# are those of He et al. 2015, table 6, to all digits.
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
        ({"name": "wrn"}, 10, 36_479_194),
        ({"name": "preresnet110"}, 10, 1_703_258),
        ({"name": "resnext29"}, 10, 34_426_698),
        ({"name": "resnext29_2x64d"}, 10, 9_128_778),
        ({"name": "resnext29_4x64d"}, 10, 27_104_586),
        ({"name": "resnext29_8x64d"}, 10, 89_598_282),
        ({"name": "resnext29_32x4d"}, 10, 4_774_218),
        ({"name": "resnext29_32x8d"}, 10, 18_976_074),
        ({"name": "densenet"}, 10, 769_162),
        ({"name": "densenet40"}, 10, 1_059_298),
        ({"name": "densenet_cifar"}, 10, 1_000_618),
        ({"name": "densenet121"}, 10, 6_956_298),
        ({"name": "resnet20"}, 10, 269_722),
        ({"name": "resnet32"}, 10, 464_154),
        ({"name": "resnet44"}, 10, 658_586),
        ({"name": "resnet56"}, 10, 853_018),
        ({"name": "resnet110"}, 10, 1_727_962),
        ({"name": "tiny"}, 10, 5_466),
        ({"name": "torchvision/resnet50"}, 1000, 25_557_032),
        ({"name": "torchvision/mobilenet_v3_small"}, 1000, 2_542_856),
    ],
    ids=str,
)
def test_number_of_parameters_is_the_published_one(section: dict[str, Any], num_classes: int, parameters: int) -> None:
    net = create_without_memory(section, num_classes)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cnn", "10.6"),
        ("resnet18", "555"),
        ("resnet34", "1159"),
        ("resnet50", "1298"),
        ("resnet101", "2510"),
        ("resnet152", "3722"),
        ("wrn", "5243"),
        ("preresnet110", "248"),
        ("resnext29", "5387"),
        ("resnext29_2x64d", "1409"),
        ("resnext29_4x64d", "4228"),
        ("resnext29_8x64d", "14093"),
        ("resnext29_32x4d", "772"),
        ("resnext29_32x8d", "3039"),
        ("densenet", "288"),
        ("densenet40", "282.9"),
        ("densenet_cifar", "125.3"),
        ("densenet121", "888"),
    ],
)
def test_multiply_accumulates_of_a_32x32_image_are_the_published_ones(name: str, millions: str) -> None:
    macs = count_macs(create_without_memory({"name": name}, 10), (3, 32, 32))
    digits = len(millions.partition(".")[2])
    assert f"{macs / 1e6:.{digits}f}" == millions


# The CIFAR-100 benchmark of RepDistiller and mdistiller, as published and as a FLOP counter counts RepDistiller's nets,
# with 100 classes.
@pytest.mark.parametrize(
    ("section", "parameters", "millions"),
    [
        ({"name": "resnet20", "shortcut": "conv"}, 278_324, "41"),
        ({"name": "resnet32", "shortcut": "conv"}, 472_756, "69"),
        ({"name": "resnet56", "shortcut": "conv"}, 861_620, "126"),
        ({"name": "resnet110", "shortcut": "conv"}, 1_736_564, "253"),
        ({"name": "resnet8x4"}, 1_233_540, "177"),
        ({"name": "resnet32x4"}, 7_433_860, "1083"),
        ({"name": "resnet50"}, 23_705_252, "1298"),
        ({"name": "wrn_16_2"}, 703_284, "101"),
        ({"name": "wrn_40_1"}, 569_780, "83"),
        ({"name": "wrn_40_2"}, 2_255_156, "328"),
        ({"name": "vgg8"}, 3_965_028, "96"),
        ({"name": "vgg13", "last_stage_size": 4}, 9_462_180, "285"),
        ({"name": "mobilenetv2_half"}, 812_836, "6.5"),
        ({"name": "shufflenetv1"}, 949_258, "39"),
        ({"name": "shufflenetv2"}, 1_355_528, "45"),
    ],
    ids=str,
)
def test_a_net_of_the_distillation_benchmark_has_its_size(
    section: dict[str, Any], parameters: int, millions: str
) -> None:
    net = create_without_memory(section, 100)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    digits = len(millions.partition(".")[2])
    assert f"{count_macs(net, (3, 32, 32)) / 1e6:.{digits}f}" == millions

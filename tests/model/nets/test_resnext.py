"""Both families of ResNeXt-29."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_nets import copy_in_order, randomise
from torch import nn
from torch.testing import assert_close
from torchvision.models.resnet import Bottleneck, ResNet

from model.nets import NETS
from model.nets.resnext import resnext
from model.nets.resnext_cifar import ResNeXtCifar

NAMES = [
    "resnext29",
    "resnext29_2x64d",
    "resnext29_4x64d",
    "resnext29_8x64d",
    "resnext29_32x4d",
    "resnext29_32x8d",
]


def torchvision_reference(groups: int, width_per_group: int, stem: int) -> nn.Module:
    """Returns torchvision's ResNeXt with another stem and without its fourth stage."""
    net = ResNet(Bottleneck, [3, 3, 3, 1], 10, groups=groups, width_per_group=width_per_group)
    net.conv1 = nn.Conv2d(3, 64, stem, padding=stem // 2, bias=False)
    net.maxpool, net.layer4 = nn.Identity(), nn.Identity()
    net.fc = nn.Linear(1024, 10)
    return net.eval()


# torchvision's first stage is 256 channels wide outside; so is kuangliu's where all groups together have 128.
@pytest.mark.parametrize(
    ("family", "cardinality", "group_width", "stem"),
    [(resnext, 32, 4, 1), (resnext, 2, 64, 1), (ResNeXtCifar, 4, 8, 3)],
)
def test_logits_and_features_are_torchvisions(
    family: Callable[..., nn.Module], cardinality: int, group_width: int, stem: int
) -> None:
    net: Any = randomise(family(10, cardinality=cardinality, group_width=group_width))
    reference: Any = torchvision_reference(cardinality, group_width, stem).double()
    copy_in_order(net, reference)
    features: list[torch.Tensor] = []
    for stage in (reference.layer1, reference.layer2, reference.layer3):
        stage.register_forward_hook(lambda _module, _inputs, maps: features.append(maps))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = net.forward_with_features(images)
        assert_close(outputs.logits, reference(images))
    assert_close(outputs.features, tuple(features))


@pytest.mark.parametrize("name", NAMES)
def test_there_are_29_layers(name: str) -> None:
    with torch.device("meta"):
        net = NETS.create({"name": name}, 10)
    kinds = (nn.Conv2d, nn.Linear)
    layers = [path for path, module in net.named_modules() if isinstance(module, kinds) and "shortcut" not in path]
    assert len(layers) == 29


@pytest.mark.parametrize(
    ("name", "stem", "channels"),
    [
        ("resnext29", 3, [256, 512, 1024]),
        ("resnext29_8x64d", 1, [1024, 2048, 4096]),
        ("resnext29_32x8d", 1, [512, 1024, 2048]),
    ],
)
def test_the_families_differ_in_stem_and_width(name: str, stem: int, channels: list[int]) -> None:
    with torch.device("meta"):
        net = NETS.create({"name": name}, 10)
        outputs = net.forward_with_features(torch.empty(2, 3, 32, 32))
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    assert first.kernel_size == (stem, stem)
    assert [tuple(f.shape) for f in outputs.features] == [
        (2, c, s, s) for c, s in zip(channels, (32, 16, 8), strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_any_size_of_image_will_do(name: str) -> None:
    with torch.device("meta"):
        net = NETS.create({"name": name}, 10)
        assert net.input_size is None
        assert net(torch.empty(2, 3, 33, 47)).shape == (2, 10)

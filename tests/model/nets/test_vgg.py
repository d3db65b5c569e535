from __future__ import annotations

import pytest
import torch
from reference_nets import copy_in_order, randomise
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.vgg import cfgs, make_layers

from model.errors import InputError
from model.metrics import count_macs, count_parameters
from model.nets import NETS

# torchvision's letters, which are the paper's.
CONFIGURATIONS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E", "vgg19_bn_linear": "E"}

every_vgg = pytest.mark.parametrize("name", CONFIGURATIONS)


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def with_torchvisions_layers(name: str) -> nn.Sequential:
    pool = [nn.AdaptiveAvgPool2d(7)] if name == "vgg19_bn_linear" else []
    width = 512 * 49 if pool else 512
    layers = make_layers(cfgs[CONFIGURATIONS[name]], batch_norm=True)
    return nn.Sequential(*layers, *pool, nn.Flatten(), nn.Linear(width, 10))


# JoonyoungYi/KD-pytorch and kuangliu/pytorch-cifar, vgg.py, and Heejoon Koo's Knowledge-Distillation, by instantiation.
@pytest.mark.parametrize(
    ("name", "num_classes", "parameters", "millions"),
    [
        ("vgg11", 10, 9_231_114, 152.8),
        ("vgg13", 10, 9_416_010, 228.3),
        ("vgg16", 10, 14_728_266, 313.2),
        ("vgg19", 10, 20_040_522, 398.1),
        ("vgg19_bn_linear", 10, 20_286_282, 398.4),
        ("vgg19_bn_linear", 100, 22_544_292, None),
    ],
)
def test_size_is_the_published_one(name: str, num_classes: int, parameters: int, millions: float | None) -> None:
    with torch.device("meta"):
        net = NETS.create({"name": name}, num_classes)
    assert count_parameters(net) == parameters
    if millions is not None:
        assert round(count_macs(net, (3, 32, 32)) / 1e6, 1) == millions


@every_vgg
def test_logits_and_maps_before_pooling_are_those_of_torchvisions_layers(name: str) -> None:
    reference = with_torchvisions_layers(name)
    net = NETS.create({"name": name}, 10).double().eval()
    copy_in_order(randomise(reference), net)
    maps, stages = images(), []
    with torch.no_grad():
        for layer in reference:
            if isinstance(layer, nn.MaxPool2d):
                stages.append(maps)
            maps = layer(maps)
        outputs = net.forward_with_features(images())
    assert_close(outputs.logits, maps)
    assert_close(list(outputs.features), stages)


@every_vgg
def test_there_is_a_stage_for_each_resolution(name: str) -> None:
    with torch.device("meta"):
        outputs = NETS.create({"name": name}, 10).forward_with_features(torch.empty(2, 3, 32, 32))
    expected = [(2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8), (2, 512, 4, 4), (2, 512, 2, 2)]
    assert [tuple(feature.shape) for feature in outputs.features] == expected


@pytest.mark.parametrize("size", [28, 64])
def test_images_of_another_size_are_refused_with_both_sizes(size: int) -> None:
    with torch.device("meta"):
        net = NETS.create({"name": "vgg11"}, 10)
        with pytest.raises(InputError, match=f"VGG takes images of 32x32 pixels, got {size}x{size}"):
            net(torch.empty(2, 3, size, size))

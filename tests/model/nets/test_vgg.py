from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

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


@pytest.mark.parametrize(("name", "num_convs"), [("vgg8", 1), ("vgg13", 2)])
def test_with_a_last_stage_of_size_4_no_pooling_comes_before_it_and_an_average_after_it(
    name: str, num_convs: int
) -> None:
    pools: list[list[str | int]] = [["M"], ["M"], ["M"], [], []]
    cells: list[str | int] = []
    for width, pool in zip((64, 128, 256, 512, 512), pools, strict=True):
        cells += [width] * num_convs + pool
    layers = make_layers(cells, batch_norm=True)
    reference: Any = randomise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)))
    net: Any = NETS.create({"name": name, "last_stage_size": 4}, 10).double().eval()
    copy_in_order(reference, net)
    ends = accumulate(3 * num_convs + len(pool) for pool in pools)
    with torch.no_grad():
        outputs = net.forward_with_features(images())
        assert_close(outputs.logits, reference(images()))
        stages = [reference[: end - len(pool)](images()) for end, pool in zip(ends, pools, strict=True)]
    assert [feature.shape[-1] for feature in outputs.features] == [32, 16, 8, 4, 4]
    assert_close(list(outputs.features), stages)


def test_the_last_stage_has_size_4_in_vgg8_and_2_in_vgg13_unless_told_otherwise() -> None:
    sizes = {name: NETS.resolve({"name": name})[0]["last_stage_size"] for name in ("vgg8", "vgg13")}
    assert sizes == {"vgg8": 4, "vgg13": 2}


@pytest.mark.parametrize("name", ["vgg8", "vgg13"])
def test_weights_fit_either_size_of_the_last_stage(name: str) -> None:
    with torch.device("meta"):
        small, large = (NETS.create({"name": name, "last_stage_size": size}, 10) for size in (2, 4))
    shapes, expected = ([(k, v.shape) for k, v in net.state_dict().items()] for net in (small, large))
    assert shapes == expected


def test_another_size_of_the_last_stage_is_refused() -> None:
    _, problems = NETS.resolve({"name": "vgg13", "last_stage_size": 3})
    assert problems == [("last_stage_size", "3 is not one of 2 or 4")]


def test_keys_are_the_features_stages_and_the_classifier_alone() -> None:
    with torch.device("meta"):
        keys = NETS.create({"name": "vgg11"}, 10).state_dict()
    layers = [f"features.{stage}.{layer}" for stage, depth in enumerate((1, 1, 2, 2, 2)) for layer in range(depth)]
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(keys) == [f"{layer}.{name}" for layer in layers for name in names] + [
        "classifier.weight",
        "classifier.bias",
    ]


def test_vgg8_begins_with_he_weights_and_a_small_classifier() -> None:
    torch.manual_seed(0)
    net = NETS.create({"name": "vgg8"}, 100)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # He et al., Delving Deep into Rectifiers, equation 14; of the classifier, what RepDistiller draws.
            std = (2 / (9 * module.out_channels)) ** 0.5 if isinstance(module, nn.Conv2d) else 0.01
            # The standard deviation of n normal numbers has a relative error of 1 / sqrt(2n): five of these.
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * module.weight.numel()))
            assert module.bias is not None
            assert not module.bias.any()


@pytest.mark.parametrize("size", [28, 64])
def test_images_of_another_size_are_refused_with_both_sizes(size: int) -> None:
    with torch.device("meta"):
        net = NETS.create({"name": "vgg11"}, 10)
        with pytest.raises(InputError, match=f"VGG takes images of 32x32 pixels, got {size}x{size}"):
            net(torch.empty(2, 3, size, size))

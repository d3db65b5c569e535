from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from reference_nets import copy_in_order, randomise
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models
from torchvision.ops import Conv2dNormActivation

from model.metrics import count_macs, count_parameters
from model.nets import NETS


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def stage_ends(net: models.MobileNetV2, num_blocks: tuple[int, ...]) -> list[nn.Module]:
    """Returns, for each stage, torchvision's layers up to its end; the stem stands before the first."""
    return [net.features[: 1 + end] for end in accumulate(num_blocks)]


# mobilenetv2 of Fronik-Lihaotian/knowledgeDistillation by instantiation, with 1000 classes as torchvision documents it;
# 1280 multiply-accumulates for each class more. mobilenetv2_cifar of kuangliu/pytorch-cifar, by instantiation.
@pytest.mark.parametrize(
    ("name", "num_classes", "size", "parameters", "millions"),
    [
        ("mobilenetv2", 257, 224, 2_553_089, 299.8),
        ("mobilenetv2", 101, 224, 2_353_253, 299.6),
        ("mobilenetv2", 1000, 224, 3_504_872, 300.8),
        ("mobilenetv2_cifar", 10, 32, 2_296_922, 91.2),
    ],
)
def test_size_is_the_published_one(name: str, num_classes: int, size: int, parameters: int, millions: float) -> None:
    with torch.device("meta"):
        net = NETS.create({"name": name}, num_classes)
    assert count_parameters(net) == parameters
    assert round(count_macs(net, (3, size, size)) / 1e6, 1) == millions


@pytest.mark.parametrize("width_multiplier", [0.35, 1.0, 1.4])
def test_mobilenetv2_has_the_maps_and_logits_of_torchvisions(width_multiplier: float) -> None:
    reference = randomise(models.MobileNetV2(num_classes=5, width_mult=width_multiplier))
    net = NETS.create({"name": "mobilenetv2", "width_multiplier": width_multiplier}, 5).double().eval()
    copy_in_order(reference, net)
    with torch.no_grad():
        outputs = net.forward_with_features(images(48))
        assert_close(outputs.logits, reference(images(48)))
        stages = stage_ends(reference, (1, 2, 3, 4, 3, 3, 1))
        assert_close(list(outputs.features), [layers(images(48)) for layers in stages])


@pytest.mark.parametrize("width_multiplier", [0.1, 0.25, 0.5, 0.75, 1.3, 2.0])
def test_channels_are_rounded_as_torchvision_rounds_them(width_multiplier: float) -> None:
    with torch.device("meta"):
        net = NETS.create({"name": "mobilenetv2", "width_multiplier": width_multiplier}, 10)
        reference = models.MobileNetV2(num_classes=10, width_mult=width_multiplier)
    assert [tuple(p.shape) for p in net.parameters()] == [tuple(p.shape) for p in reference.parameters()]


# RepDistiller's nets begin with the same.
@pytest.mark.parametrize("name", ["mobilenetv2", "mobilenetv2_half"])
def test_a_net_begins_with_torchvisions_distributions(name: str) -> None:
    torch.manual_seed(0)
    net = NETS.create({"name": name}, 101)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            # The standard deviation of n normal numbers has a relative error of 1 / sqrt(2n): five of these.
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * module.weight.numel()))
    assert net.classifier.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not net.classifier.bias.any()


class Plus(nn.Module):
    """A block of torchvision's with a convolution beside it."""

    def __init__(self, block: nn.Module, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.block = block
        self.shortcut = Conv2dNormActivation(in_channels, out_channels, 1, activation_layer=None)

    def forward(self, maps: Tensor) -> Tensor:
        total: Tensor = self.block(maps) + self.shortcut(maps)
        return total


def with_an_expansion_everywhere_and_relus(width_multiplier: float) -> models.MobileNetV2:
    rows = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    net = models.MobileNetV2(10, width_multiplier, rows, round_nearest=1)
    net.features[1].conv.insert(0, Conv2dNormActivation(int(32 * width_multiplier), int(32 * width_multiplier), 1))
    for module in [*net.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    return net


def kuanglius_net_of_torchvisions_parts() -> models.MobileNetV2:
    net = with_an_expansion_everywhere_and_relus(1.0)
    net.features[0][0].stride = (1, 1)
    for position, before, after in ((1, 32, 16), (2, 16, 24), (11, 64, 96), (17, 160, 320)):
        net.features[position] = Plus(net.features[position], before, after)
    return net


# RepDistiller's differs from torchvision's, at the benchmark's size, in its first block, its ReLUs and one stride.
@pytest.mark.parametrize(
    ("name", "create_reference"),
    [
        ("mobilenetv2_cifar", kuanglius_net_of_torchvisions_parts),
        ("mobilenetv2_half", lambda: with_an_expansion_everywhere_and_relus(0.5)),
    ],
)
def test_a_net_for_small_images_has_expansions_shortcuts_and_relus_as_its_model(
    name: str, create_reference: Callable[[], models.MobileNetV2]
) -> None:
    reference = randomise(create_reference())
    net = NETS.create({"name": name}, 10).double().eval()
    copy_in_order(reference, net)
    with torch.no_grad():
        outputs = net.forward_with_features(images(32))
        assert_close(outputs.logits, reference(images(32)))
        stages = stage_ends(reference, (1, 2, 3, 4, 3, 3, 1))
        assert_close(list(outputs.features), [layers(images(32)) for layers in stages])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("mobilenetv2", [112, 56, 28, 14, 14, 7, 7]), ("mobilenetv2_cifar", [224, 224, 112, 56, 56, 28, 28])],
)
def test_there_is_a_stage_for_each_row_of_the_table(name: str, sizes: list[int]) -> None:
    with torch.device("meta"):
        outputs = NETS.create({"name": name}, 10).forward_with_features(torch.empty(2, 3, 224, 224))
    channels = [16, 24, 32, 64, 96, 160, 320]
    assert [tuple(f.shape) for f in outputs.features] == [(2, c, s, s) for c, s in zip(channels, sizes, strict=True)]
    assert outputs.embedding.shape == (2, 1280)


def test_mobilenetv2_half_has_half_the_channels_and_halves_the_size_four_times() -> None:
    with torch.device("meta"):
        outputs = NETS.create({"name": "mobilenetv2_half"}, 10).forward_with_features(torch.empty(2, 3, 32, 32))
    channels, sizes = [8, 12, 16, 32, 48, 80, 160], [16, 16, 8, 4, 4, 2, 2]
    assert [tuple(f.shape) for f in outputs.features] == [(2, c, s, s) for c, s in zip(channels, sizes, strict=True)]
    assert outputs.embedding.shape == (2, 1280)


def test_freezing_the_features_leaves_the_classifier() -> None:
    with torch.device("meta"):
        net = NETS.create({"name": "mobilenetv2"}, 101)
    net.features.requires_grad_(False)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("width_multiplier", 0.0, "0.0 is not above 0"), ("dropout_rate", 1.0, "1.0 is not below 1")],
)
def test_an_option_that_makes_no_net_is_refused(option: str, value: float, message: str) -> None:
    _, [(key, problem)] = NETS.resolve({"name": "mobilenetv2", option: value})
    assert key == option
    assert message in problem

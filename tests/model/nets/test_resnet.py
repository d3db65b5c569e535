from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference_nets import copy_in_order, randomise
from torch import nn
from torch.testing import assert_close
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation

from model.nets import NETS
from model.nets.resnet_cifar import PadShortcut

THIN = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
WIDE = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
FOURFOLD = ["resnet8x4", "resnet32x4"]


def layers(net: nn.Module) -> list[nn.Module]:
    """Returns the layers that the paper counts: convolutions and the classifier, shortcuts not."""
    kinds = (nn.Conv2d, nn.Linear)
    return [layer for path, layer in net.named_modules() if isinstance(layer, kinds) and "shortcut" not in path]


@pytest.mark.parametrize("name", THIN + WIDE + FOURFOLD)
def test_the_name_says_the_number_of_layers(name: str) -> None:
    with torch.device("meta"):
        assert len(layers(NETS.create({"name": name}, 10))) == int(name.removeprefix("resnet").removesuffix("x4"))


@pytest.mark.parametrize(
    ("name", "channels", "sizes"),
    [
        ("resnet18", [64, 128, 256, 512], [32, 16, 8, 4]),
        ("resnet50", [256, 512, 1024, 2048], [32, 16, 8, 4]),
        ("resnet20", [16, 32, 64], [32, 16, 8]),
        ("resnet32x4", [64, 128, 256], [32, 16, 8]),
    ],
)
def test_each_stage_after_the_first_halves_the_resolution(name: str, channels: list[int], sizes: list[int]) -> None:
    with torch.device("meta"):
        outputs = NETS.create({"name": name}, 10).forward_with_features(torch.empty(2, 3, 32, 32))
    assert [tuple(f.shape) for f in outputs.features] == [(2, c, s, s) for c, s in zip(channels, sizes, strict=True)]
    assert outputs.embedding.shape == (2, channels[-1])


@pytest.mark.parametrize("section", [{"name": "resnet18"}, {"name": "resnet20"}, {"name": "tiny"}], ids=str)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (33, 47), (64, 64)])
def test_any_size_of_image_will_do(section: dict[str, str], height: int, width: int) -> None:
    with torch.device("meta"):
        net = NETS.create(section, 10)
        assert net.input_size is None
        assert net(torch.empty(2, 3, height, width)).shape == (2, 10)


def test_the_pad_shortcut_subsamples_and_appends_zero_channels() -> None:
    maps = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).reshape(2, 3, 5, 4)
    padded = PadShortcut(3, 7, 2)(maps)
    assert padded.shape == (2, 7, 3, 2)
    assert torch.equal(padded[:, :3], maps[:, :, [0, 2, 4]][:, :, :, [0, 2]])
    assert not padded[:, 3:].any()


def test_pad_shortcuts_have_no_parameters_and_conv_shortcuts_stand_where_the_shape_changes() -> None:
    def shortcut_keys(kind: str) -> set[str]:
        net = NETS.create({"name": "resnet20", "shortcut": kind}, 10)
        return {key.partition(".shortcut")[0] for key, _ in net.named_parameters() if "shortcut" in key}

    assert shortcut_keys("pad") == set()
    assert shortcut_keys("conv") == {"layer2.0", "layer3.0"}


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_without_its_branches_a_thin_resnet_is_its_shortcuts(shortcut: str) -> None:
    net = NETS.create({"name": "resnet20", "shortcut": shortcut}, 10).eval()
    for path, module in net.named_modules():
        if path.endswith("bn2"):
            nn.init.zeros_(module.weight)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net.bn1(net.conv1(images)).relu()
        features = net.forward_with_features(images).features
        assert_close(features[0], expected)
        for stage, feature in ((net.layer2, features[1]), (net.layer3, features[2])):
            expected = stage[0].shortcut(expected).relu()
            assert_close(feature, expected)


@pytest.mark.parametrize(
    "section",
    [{"name": "resnet20", "shortcut": "pad"}, {"name": "resnet20", "shortcut": "conv"}, {"name": "resnet8x4"}],
    ids=str,
)
def test_a_resnet_of_6n_2_layers_has_he_initialisation(section: dict[str, str]) -> None:
    torch.manual_seed(0)
    net = NETS.create(section, 10)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            # He et al., Delving Deep into Rectifiers, equation 14: variance 2 / (k * k * output channels).
            std = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            # The standard deviation of n normal numbers has a relative error of 1 / sqrt(2n): five of these.
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * module.weight.numel()))


def test_another_shortcut_is_refused() -> None:
    _, problems = NETS.resolve({"name": "resnet20", "shortcut": "C"})
    assert problems == [("shortcut", "'C' is not one of 'pad' or 'conv'")]


def test_resnet8x4_has_the_maps_and_logits_of_torchvisions_blocks() -> None:
    stages = [
        BasicBlock(before, after, stride, Conv2dNormActivation(before, after, 1, stride, activation_layer=None))
        for before, after, stride in ((32, 64, 1), (64, 128, 2), (128, 256, 2))
    ]
    pooling = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    reference: Any = randomise(nn.Sequential(Conv2dNormActivation(3, 32), *stages, *pooling, nn.Linear(256, 7)))
    net: Any = NETS.create({"name": "resnet8x4"}, 7).double().eval()
    copy_in_order(reference, net)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = net.forward_with_features(images)
        assert_close(outputs.logits, reference(images))
        assert_close(outputs.features, tuple(reference[:end](images) for end in (2, 3, 4)))

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference_nets import copy_in_order, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import models

from model.nets import NETS
from model.nets.densenet import BasicLayer, DenseNet

# Growth rate and layers of each stage: Huang et al. 2017, table 1.
IMAGENET = {
    "densenet121": (32, (6, 12, 24, 16)),
    "densenet161": (48, (6, 12, 36, 24)),
    "densenet169": (32, (6, 12, 32, 32)),
    "densenet201": (32, (6, 12, 48, 32)),
}
BOTTLENECK = IMAGENET | {"densenet_cifar": (12, (6, 12, 24, 16)), "densenet": (12, (16, 16, 16))}


def torchvision_reference(growth_rate: int, num_layers: Sequence[int]) -> nn.Module:
    """Returns torchvision's DenseNet with the stem for small images."""
    net = models.DenseNet(growth_rate, tuple(num_layers), 2 * growth_rate, num_classes=10)
    net.features.conv0 = nn.Conv2d(3, 2 * growth_rate, 3, padding=1, bias=False)
    net.features.norm0 = net.features.relu0 = net.features.pool0 = nn.Identity()
    return net.eval()


def create_without_memory(name: str) -> nn.Module:
    with torch.device("meta"):
        net: nn.Module = NETS.create({"name": name}, 10)
    return net


@pytest.mark.parametrize("name", BOTTLENECK)
def test_the_tensors_are_torchvisions_in_its_order(name: str) -> None:
    with torch.device("meta"):
        reference = torchvision_reference(*BOTTLENECK[name])
    shapes = [tensor.shape for tensor in create_without_memory(name).state_dict().values()]
    assert shapes == [tensor.shape for tensor in reference.state_dict().values()]


@pytest.mark.parametrize("name", ["densenet", "densenet_cifar"])
def test_logits_and_maps_are_torchvisions(name: str) -> None:
    net: Any = randomise(NETS.create({"name": name}, 10))
    reference: Any = torchvision_reference(*BOTTLENECK[name]).double()
    copy_in_order(net, reference)
    preacts: list[Tensor] = []
    for path, module in reference.features.named_modules():
        if path == "norm5" or (path.startswith("transition") and path.endswith("norm")):
            # A copy, because its ReLUs write over their input.
            module.register_forward_hook(lambda _module, _inputs, maps: preacts.append(maps.clone()))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = net.forward_with_features(images)
        assert_close(outputs.logits, reference(images))
    assert_close(outputs.preacts, tuple(preacts))


def test_without_bottlenecks_a_layer_appends_one_convolution_of_all_before_it() -> None:
    net: Any = randomise(DenseNet(10, (2, 1), 4, layer=BasicLayer, compression=1.0))
    weights = net.state_dict()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def norm(key: str, maps: Tensor) -> Tensor:
        statistics = (weights[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(maps, *statistics)

    def append(key: str, maps: Tensor) -> Tensor:
        new = F.conv2d(norm(f"{key}.bn1", maps).relu(), weights[f"{key}.conv1.weight"], padding=1)
        return torch.cat([maps, new], 1)

    maps = F.conv2d(images, weights["conv1.weight"], padding=1)  # 8 channels
    maps = append("dense1.1", append("dense1.0", maps))  # 8 + 2 * 4
    first = norm("trans1.bn1", maps)
    maps = F.avg_pool2d(F.conv2d(first.relu(), weights["trans1.conv1.weight"]), 2)  # 16, nothing is compressed
    last = norm("bn", append("dense2.0", maps))
    pooled = F.avg_pool2d(last.relu(), 16).flatten(1)
    with torch.no_grad():
        outputs = net.forward_with_features(images)
    assert_close(outputs.preacts, (first, last))
    assert_close(outputs.logits, F.linear(pooled, weights["fc.weight"], weights["fc.bias"]))


@pytest.mark.parametrize(
    ("name", "layers"),
    [("densenet", 100), ("densenet40", 40), ("densenet_cifar", 121), *((name, int(name[8:])) for name in IMAGENET)],
)
def test_the_name_says_the_number_of_layers(name: str, layers: int) -> None:
    net = create_without_memory(name)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules()) == layers


@pytest.mark.parametrize(
    ("name", "channels", "sizes"),
    [
        ("densenet", [216, 300, 342], [32, 16, 8]),
        ("densenet40", [168, 312, 456], [32, 16, 8]),
        ("densenet121", [256, 512, 1024, 1024], [32, 16, 8, 4]),
    ],
)
def test_a_stage_is_taken_at_its_own_resolution_with_all_its_maps(
    name: str, channels: list[int], sizes: list[int]
) -> None:
    outputs: Any = create_without_memory(name).forward_with_features(torch.empty(2, 3, 32, 32, device="meta"))
    assert [tuple(f.shape) for f in outputs.features] == [(2, c, s, s) for c, s in zip(channels, sizes, strict=True)]


@pytest.mark.parametrize("name", ["densenet", "densenet40"])
def test_a_pass_uses_each_batch_norm_once(name: str) -> None:
    net = NETS.create({"name": name}, 10).train()
    net(torch.randn(2, 3, 32, 32))
    assert {norm.num_batches_tracked.item() for norm in net.modules() if isinstance(norm, nn.BatchNorm2d)} == {1}


@pytest.mark.parametrize("name", ["densenet", "densenet40", "densenet121"])
def test_any_size_of_image_will_do(name: str) -> None:
    net: Any = create_without_memory(name)
    assert net.input_size is None
    assert net(torch.empty(2, 3, 33, 47, device="meta")).shape == (2, 10)

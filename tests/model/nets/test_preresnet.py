from __future__ import annotations

from typing import Any

import torch
from reference_nets import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from model.nets import NETS
from model.nets.preresnet import PreResNet


def reference(weights: dict[str, Tensor], num_blocks: int, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns logits and the maps before the ReLU that ends each stage: equation 1 of He et al. 2016, key by key."""

    def norm(key: str, maps: Tensor) -> Tensor:
        statistics = (weights[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(maps, *statistics)

    maps, sums = F.conv2d(images, weights["conv1.weight"], padding=1), []
    for stage in (1, 2, 3):
        for block in range(num_blocks):
            key, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            branch = F.conv2d(norm(f"{key}.bn1", maps).relu(), weights[f"{key}.conv1.weight"])
            branch = F.conv2d(norm(f"{key}.bn2", branch).relu(), weights[f"{key}.conv2.weight"], None, stride, 1)
            branch = F.conv2d(norm(f"{key}.bn3", branch).relu(), weights[f"{key}.conv3.weight"])
            if block == 0:  # wherever the number of channels changes: 16 -> 64 -> 128 -> 256
                maps = F.conv2d(maps, weights[f"{key}.downsample.0.weight"], stride=stride)
            maps = maps + branch
        sums.append(maps)
    preacts = [norm("layer2.0.bn1", sums[0]), norm("layer3.0.bn1", sums[1]), norm("bn", sums[2])]
    pooled = F.avg_pool2d(preacts[2].relu(), 8).flatten(1)
    return F.linear(pooled, weights["fc.weight"], weights["fc.bias"]), preacts


def test_preresnet110_has_164_layers() -> None:
    with torch.device("meta"):
        net = NETS.create({"name": "preresnet110"}, 10)
    kinds = (nn.Conv2d, nn.Linear)
    layers = [path for path, module in net.named_modules() if isinstance(module, kinds) and "downsample" not in path]
    assert len(layers) == 164


def test_logits_and_maps_are_those_of_the_formula() -> None:
    net: Any = randomise(PreResNet(10, (2, 2, 2)))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = net.forward_with_features(images)
    logits, preacts = reference(net.state_dict(), 2, images)
    assert_close(outputs.logits, logits)
    assert_close(outputs.preacts, tuple(preacts))


def test_stages_are_taken_at_their_own_resolution() -> None:
    with torch.device("meta"):
        outputs = NETS.create({"name": "preresnet110"}, 10).forward_with_features(torch.empty(2, 3, 32, 32))
    assert [tuple(f.shape) for f in outputs.features] == [(2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8)]


def test_a_pass_uses_each_batch_norm_once() -> None:
    net = PreResNet(10, (2, 2, 2)).train()
    net(torch.randn(2, 3, 32, 32))
    assert {norm.num_batches_tracked.item() for norm in net.modules() if isinstance(norm, nn.BatchNorm2d)} == {1}


def test_any_size_of_image_will_do() -> None:
    with torch.device("meta"):
        net = NETS.create({"name": "preresnet110"}, 10)
        assert net.input_size is None
        assert net(torch.empty(2, 3, 33, 47)).shape == (2, 10)

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference_nets import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from model.nets import NETS
from model.nets.shufflenetv1 import ShuffleNetV1, channel_shuffle


def shuffled(maps: np.ndarray, groups: int) -> np.ndarray:
    """Returns the paper's shuffle: reshape the channels into (g, n), transpose, flatten."""
    count, channels, height, width = maps.shape
    grouped = maps.reshape(count, groups, channels // groups, height, width)
    return grouped.transpose(0, 2, 1, 3, 4).reshape(maps.shape)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_shuffle_is_reshape_and_transpose_of_the_channels(groups: int, memory_format: torch.memory_format) -> None:
    maps = torch.randn(2, 12, 3, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format)
    assert np.array_equal(channel_shuffle(maps, groups).numpy(), shuffled(maps.numpy(), groups))


def test_a_shuffle_deals_the_channels_of_the_groups_out_in_turn() -> None:
    channels = channel_shuffle(torch.arange(6.0).view(1, 6, 1, 1), 3).flatten().tolist()
    assert channels == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_shuffle_returns_maps_with_the_channels_last(memory_format: torch.memory_format) -> None:
    maps = torch.randn(2, 12, 3, 5).to(memory_format=memory_format)
    assert channel_shuffle(maps, 3).is_contiguous(memory_format=torch.channels_last)


def reference(
    weights: dict[str, Tensor], num_units: tuple[int, ...], groups: int, images: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Returns logits and the maps before the ReLU that ends each stage: figure 2 of the paper, key by key."""

    def norm(key: str, maps: Tensor) -> Tensor:
        statistics = (weights[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(maps, *statistics)

    maps, preacts = norm("bn1", F.conv2d(images, weights["conv1.weight"])).relu(), []
    for stage, depth in enumerate(num_units):
        for unit in range(depth):
            key = f"stages.{stage}.{unit}"
            first = 1 if stage == unit == 0 else groups
            branch = norm(f"{key}.bn1", F.conv2d(maps, weights[f"{key}.conv1.weight"], groups=first)).relu()
            branch = torch.from_numpy(shuffled(branch.numpy(), first))
            stride = 2 if unit == 0 else 1
            branch = F.conv2d(branch, weights[f"{key}.conv2.weight"], None, stride, 1, groups=branch.shape[1])
            branch = norm(f"{key}.bn2", branch).relu()
            branch = norm(f"{key}.bn3", F.conv2d(branch, weights[f"{key}.conv3.weight"], groups=groups))
            if unit == 0:
                # Pixels beyond the edge count as zeros.
                pooled = F.unfold(maps, 3, padding=1, stride=2).unflatten(1, (-1, 9)).mean(2)
                preact = torch.cat((branch, pooled.view(len(maps), -1, *branch.shape[2:])), 1)
            else:
                preact = maps + branch
            maps = preact.relu()
        preacts.append(preact)
    return F.linear(maps.flatten(2).mean(2), weights["linear.weight"], weights["linear.bias"]), preacts


def test_logits_and_maps_are_those_of_the_formula() -> None:
    net: Any = randomise(NETS.create({"name": "shufflenetv1"}, 10))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = net.forward_with_features(images)
        logits, preacts = reference(net.state_dict(), (4, 8, 4), 3, images)
    assert_close(outputs.logits, logits)
    assert_close(outputs.preacts, tuple(preacts))


def test_each_stage_begins_with_half_the_resolution() -> None:
    with torch.device("meta"):
        outputs = NETS.create({"name": "shufflenetv1"}, 10).forward_with_features(torch.empty(2, 3, 32, 32))
    assert [tuple(f.shape) for f in outputs.features] == [(2, 240, 16, 16), (2, 480, 8, 8), (2, 960, 4, 4)]
    assert outputs.embedding.shape == (2, 960)


def test_every_1x1_convolution_is_grouped_but_the_stem_and_the_first_one_after_it() -> None:
    with torch.device("meta"):
        net = NETS.create({"name": "shufflenetv1"}, 10)
    dense = [path for path, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    assert dense == ["conv1", "stages.0.0.conv1"]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (33, 47)])
def test_any_size_of_image_will_do(height: int, width: int) -> None:
    with torch.device("meta"):
        net = ShuffleNetV1(10, (2, 2), (48, 96), groups=3)
        assert net.input_size is None
        assert net(torch.empty(2, 3, height, width)).shape == (2, 10)

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference_nets import copy_in_order, randomise
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import ShuffleNetV2
from torchvision.ops import Conv2dNormActivation

from model.nets import NETS
from model.nets.shufflenetv2 import interleave


def torchvision_reference() -> Any:
    """Returns torchvision's ShuffleNetV2 1x with the benchmark's stem."""
    net: Any = ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], num_classes=10)
    net.conv1 = Conv2dNormActivation(3, 24, 1)
    net.maxpool = nn.Identity()
    return randomise(net)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_interleaved_maps_are_the_concatenation_shuffled_in_two_groups(memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 6, 3, 5, generator=generator).to(memory_format=memory_format) for _ in range(2))
    joined = np.concatenate((first.numpy(), second.numpy()), 1)
    shuffled = joined.reshape(2, 2, 6, 3, 5).transpose(0, 2, 1, 3, 4).reshape(2, 12, 3, 5)
    assert np.array_equal(interleave(first, second).numpy(), shuffled)
    assert interleave(first, second).is_contiguous(memory_format=torch.channels_last)


def test_logits_and_features_are_torchvisions() -> None:
    reference = torchvision_reference()
    net: Any = NETS.create({"name": "shufflenetv2"}, 10).double().eval()
    copy_in_order(reference, net)
    with torch.no_grad():
        outputs = net.forward_with_features(images())
        assert_close(outputs.logits, reference(images()))
        maps, stages = reference.conv1(images()), []
        for stage in (reference.stage2, reference.stage3, reference.stage4):
            maps = stage(maps)
            stages.append(maps)
    assert_close(outputs.features, tuple(stages))


def test_gradients_are_torchvisions() -> None:
    reference = torchvision_reference()
    net: Any = NETS.create({"name": "shufflenetv2"}, 10).double().eval()
    copy_in_order(reference, net)
    gradients = [torch.autograd.grad(n(images()).square().sum(), list(n.parameters())) for n in (net, reference)]
    assert_close(*gradients)


def test_every_preact_is_the_output_of_a_batch_norm_of_its_stage_that_only_a_relu_read() -> None:
    reference = torchvision_reference()
    net: Any = NETS.create({"name": "shufflenetv2"}, 10).double().eval()
    copy_in_order(reference, net)
    made: list[Tensor] = []
    for path, module in reference.stage4.named_modules():
        if path.endswith(("branch1.3", "branch2.6")):
            # A copy, because its ReLUs write over their input.
            module.register_forward_hook(lambda _module, _inputs, maps: made.append(maps.clone()))
    with torch.no_grad():
        reference(images())
        preact = net.forward_with_features(images()).preacts[-1]
    # Where each channel comes from, by the shuffles alone: two branches of the down unit, then one of each unit.
    sources = np.arange(5 * 232).reshape(5, 232)
    channels = np.stack((sources[0], sources[1]), 1).ravel()
    for branch in sources[2:]:
        channels = np.stack((channels[:232], branch), 1).ravel()
    assert_close(preact, torch.cat(made, 1)[:, channels.tolist()])


def test_each_stage_begins_with_half_the_resolution() -> None:
    with torch.device("meta"):
        outputs = NETS.create({"name": "shufflenetv2"}, 10).forward_with_features(torch.empty(2, 3, 32, 32))
    assert [tuple(f.shape) for f in outputs.features] == [(2, 116, 16, 16), (2, 232, 8, 8), (2, 464, 4, 4)]
    assert outputs.embedding.shape == (2, 1024)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (33, 47)])
def test_any_size_of_image_will_do(height: int, width: int) -> None:
    with torch.device("meta"):
        net: Any = NETS.create({"name": "shufflenetv2"}, 10)
        assert net.input_size is None
        assert net(torch.empty(2, 3, height, width)).shape == (2, 10)

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from model.nets import NETS
from model.nets.initialisation import he_normal_by_fan_out


@pytest.mark.parametrize("groups", [1, 8])
def test_the_variance_is_2_over_kernel_area_times_output_channels(groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 256, (3, 5), groups=groups)
    he_normal_by_fan_out(conv)
    # The standard deviation of n normal numbers has a relative error of 1 / sqrt(2n): five of these.
    tolerance = 5 / math.sqrt(2 * conv.weight.numel())
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (3 * 5 * 256)), rel=tolerance)
    assert conv.weight.abs().max() > 3 * conv.weight.std(), "this is not a normal distribution"


# The initialisations of the originals, as their code has them.
@pytest.mark.parametrize("name", ["wrn", "preresnet110", "densenet", "densenet40", "resnext29"])
def test_convolutions_of_the_ancestors_nets_begin_so(name: str) -> None:
    torch.manual_seed(0)
    section = {"name": name, "widen_factor": 2} if name == "wrn" else {"name": name}
    for module in NETS.create(section, 10).modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * module.weight.numel()))


@pytest.mark.parametrize("name", ["densenet_cifar", "resnext29_32x4d"])
def test_convolutions_of_kuangliu_nets_begin_as_torch_makes_them(name: str) -> None:
    torch.manual_seed(0)
    for module in NETS.create({"name": name}, 10).modules():
        if isinstance(module, nn.Conv2d):
            limit = 1 / math.sqrt(module.weight[0].numel())  # uniform, the limit by fan-in
            assert 0.9 * limit < module.weight.abs().max() <= limit


@pytest.mark.parametrize("name", ["wrn", "preresnet110", "densenet", "densenet40", "resnext29"])
def test_batch_norms_begin_as_the_identity_but_at_half_scale_in_densenet40(name: str) -> None:
    section = {"name": name, "widen_factor": 1} if name == "wrn" else {"name": name}
    for module in NETS.create(section, 10).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == (0.5 if name == "densenet40" else 1.0)).all()
            assert not module.bias.any()


def test_classifiers_of_the_wrn_and_of_resnext29_begin_without_bias() -> None:
    wrn = NETS.create({"name": "wrn", "widen_factor": 1}, 10)
    resnext29 = NETS.create({"name": "resnext29"}, 10)
    assert not wrn.fc.bias.any()
    assert not resnext29.classifier.bias.any()
    # He's normal by fan-in: 1024 channels into 10 classes.
    std = resnext29.classifier.weight.std().item()
    assert std == pytest.approx(math.sqrt(2 / 1024), rel=5 / math.sqrt(2 * 10 * 1024))

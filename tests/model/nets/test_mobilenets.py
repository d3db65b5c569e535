from __future__ import annotations

import pytest
import torch
from reference_nets import copy_in_order, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import models
from torchvision.ops import Conv2dNormActivation

from model.metrics import count_macs, count_parameters
from model.nets import NETS
from model.nets.mobilenets import OverlappingGroupConv2d

# What each of the four groups sees of 8 channels: the thesis, section 4.1.
INDEX_MAP = [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 0, 1]]


def dense_weight(conv: OverlappingGroupConv2d) -> Tensor:
    """Returns the weight of the dense 1x1 convolution that the overlapping one is, with zeros where it is blind."""
    weight = conv.conv.weight.detach()
    out_channels, half = weight.shape[:2]
    dense = weight.new_zeros(out_channels, 2 * half, 1, 1)
    for row in range(out_channels):
        group = row // (out_channels // 4)
        for column in range(half):
            dense[row, (group * half // 2 + column) % (2 * half)] = weight[row, column]
    return dense


def test_each_group_of_outputs_sees_half_of_the_inputs_and_a_quarter_is_shared() -> None:
    conv = OverlappingGroupConv2d(8, 4)
    for group, seen in enumerate(INDEX_MAP):
        for position, channel in enumerate(seen):
            with torch.no_grad():
                conv.conv.weight.zero_()[group, position] = 1.0
                response = conv(torch.arange(8.0).view(1, 8, 1, 1)).flatten()
            assert response[group] == channel


@pytest.mark.parametrize(("in_channels", "out_channels"), [(4, 4), (8, 32), (24, 96), (32, 32)])
def test_it_is_a_dense_convolution_with_half_of_the_weights(in_channels: int, out_channels: int) -> None:
    conv = randomise(OverlappingGroupConv2d(in_channels, out_channels))
    images = torch.randn(2, in_channels, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(conv(images), F.conv2d(images, dense_weight(conv)))
    assert count_parameters(conv) == in_channels * out_channels // 2


# Fronik-Lihaotian/Channel-overlapping-group-convolution, by instantiation.
@pytest.mark.parametrize(
    ("name", "parameters", "millions"),
    [("mobilenets_s", 1_023_909, 112.1), ("mobilenets_m", 1_500_901, 176.6), ("mobilenets_e6", 1_977_893, 241.2)],
)
def test_size_is_the_published_one(name: str, parameters: int, millions: float) -> None:
    with torch.device("meta"):
        net = NETS.create({"name": name}, 101)
    assert count_parameters(net) == parameters
    assert round(count_macs(net, (3, 224, 224)) / 1e6, 1) == millions


def test_every_block_of_m_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        stem, *stages, head = NETS.create({"name": "mobilenets_m"}, 101).features
    assert count_parameters(stem) == 928
    assert [[count_parameters(block) for block in stage] for stage in stages] == [
        [1472],
        [2928, 4752],
        [5536, 7872, 7872],
        [12032, 28032, 28032, 28032],
        [36288, 60480, 60480],
        [85184, 162240, 162240],
        [264960],
    ]
    assert count_parameters(head) == 412_160


def of_torchvisions_parts(expansion: int) -> models.MobileNetV2:
    """Returns the net with dense convolutions: torchvision's, with SiLU, and an expansion of 1 that is carried out."""
    table = [(16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)]
    rows = [[1 if channels == 16 else expansion, channels, n, s] for channels, n, s in table]
    net = models.MobileNetV2(num_classes=7, inverted_residual_setting=rows)
    net.features[1].conv.insert(0, Conv2dNormActivation(32, 32, 1))
    for module in [*net.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.SiLU())
    for block in net.features[1:-1]:
        block.conv[0][2] = nn.Identity()  # the expansion has no activation
    return net


@pytest.mark.parametrize(("name", "expansion"), [("mobilenets_s", 2), ("mobilenets_m", 4), ("mobilenets_e6", 6)])
def test_logits_are_those_of_a_mobilenetv2_with_dense_convolutions_and_silu(name: str, expansion: int) -> None:
    net = randomise(NETS.create({"name": name}, 7))
    dense = NETS.create({"name": name}, 7).double()
    dense.load_state_dict(net.state_dict())
    for block in (block for stage in dense.features[1:-1] for block in stage):
        weight = dense_weight(block.expand[0])
        block.expand[0] = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False, dtype=torch.float64)
        block.expand[0].weight.data = weight
    reference = of_torchvisions_parts(expansion).double().eval()
    copy_in_order(dense, reference)
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(net(images), reference(images))


def test_overlapping_convolutions_begin_like_the_dense_ones_of_mobilenetv2() -> None:
    torch.manual_seed(0)
    net = NETS.create({"name": "mobilenets_m"}, 101)
    weights = [module.conv.weight for module in net.modules() if isinstance(module, OverlappingGroupConv2d)]
    for weight in weights:
        # He's variance by fan-out; five standard errors of the standard deviation of n normal numbers.
        assert weight.std().item() == pytest.approx((2 / len(weight)) ** 0.5, rel=5 / (2 * weight.numel()) ** 0.5)

"""MobileNets whose expanding convolutions run in groups that overlap, meant for images of 224x224 pixels."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from model.nets import NETS
from model.nets.mobilenetv2 import InvertedResidual, InvertedResidualNet, Row, conv_norm, paper_rows, plain_shortcut


class OverlappingGroupConv2d(nn.Module):
    """A 1x1 convolution in four groups: quarter g of the output sees quarters g and g + 1 (modulo 4) of the input.

    It has half the weights of a dense one.

    Args:
        in_channels: A multiple of 4.
        out_channels: A multiple of 4.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * in_channels, out_channels, 1, groups=4, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        # One convolution of the doubled input: at the sizes of this net, two grouped convolutions of the input itself
        # take 1.2 to 2.2 times as long on a CPU, forward and backward. Copied, not indexed: on a GPU the gradient of an
        # index is summed in no fixed order.
        quarters = maps.unflatten(1, (4, -1))  # (N, C, H, W) -> (N, 4, C/4, H, W)
        return self.conv(torch.cat((quarters, quarters.roll(-1, 1)), dim=2).flatten(1, 2))  # (N, 2C, H, W)


def overlap_block(in_channels: int, stride: int, row: Row) -> InvertedResidual:
    """Returns an inverted residual whose expanding convolution overlaps and is followed by no activation."""
    hidden = row.expansion * in_channels
    return InvertedResidual(
        nn.Sequential(OverlappingGroupConv2d(in_channels, hidden), nn.BatchNorm2d(hidden)),
        nn.Sequential(conv_norm(hidden, hidden, row.kernel_size, stride=stride, groups=hidden), nn.SiLU()),
        conv_norm(hidden, row.channels),
        plain_shortcut(in_channels, row.channels, stride),
    )


def mobilenets(num_classes: int, expansion: int, dropout_rate: float) -> nn.Module:
    """Returns the net with the given expansion in all rows but the first."""
    return InvertedResidualNet(
        num_classes, paper_rows(expansion), overlap_block, nonlinearity=nn.SiLU, dropout_rate=dropout_rate
    ).initialise()


@NETS.register("mobilenets_s")
def mobilenets_s(num_classes: int, *, dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.2) -> nn.Module:
    """MobileNetV2 with overlapping groups and expansion 2, meant for 224x224 pixels: 1.0 M parameters, 101 classes.

    Args:
        dropout_rate: Share of the classifier's inputs that is set to zero in training.

    Source: MobileNets-S of Fronik-Lihaotian/Channel-overlapping-group-convolution, and its author's thesis, section 4.
    """
    return mobilenets(num_classes, 2, dropout_rate)


@NETS.register("mobilenets_m")
def mobilenets_m(num_classes: int, *, dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.2) -> nn.Module:
    """MobileNetV2 with overlapping groups and expansion 4, meant for 224x224 pixels: 1.5 M parameters, 101 classes.

    Args:
        dropout_rate: Share of the classifier's inputs that is set to zero in training.

    Source: MobileNets-M of Fronik-Lihaotian/Channel-overlapping-group-convolution, and its author's thesis, section 4.
    """
    return mobilenets(num_classes, 4, dropout_rate)


@NETS.register("mobilenets_e6")
def mobilenets_e6(num_classes: int, *, dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.2) -> nn.Module:
    """MobileNetV2 with overlapping groups and expansion 6, meant for 224x224 pixels: 2.0 M parameters, 101 classes.

    Args:
        dropout_rate: Share of the classifier's inputs that is set to zero in training.

    Source: Fronik-Lihaotian/Channel-overlapping-group-convolution, and its author's thesis, section 4.
    """
    return mobilenets(num_classes, 6, dropout_rate)

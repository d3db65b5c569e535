"""EfficientNet-B0 in kuangliu's form for images of 32x32 pixels."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from model.nets import NETS
from model.nets.mobilenetv2 import InvertedResidual, InvertedResidualNet, Row, conv_norm, plain_shortcut


class SqueezeExcitation(nn.Module):
    """Weighs each channel by a factor in (0, 1) that two 1x1 convolutions make of all channels' means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.squeeze(maps.mean((2, 3), keepdim=True)))  # (N, C, H, W) -> (N, C', 1, 1)
        return maps * self.excite(hidden).sigmoid()


class Inert(nn.Sequential):
    """Layers that have weights and do nothing."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps


def block(in_channels: int, stride: int, row: Row) -> InvertedResidual:
    """Returns an inverted residual with squeeze-and-excitation and SiLU; an expansion by 1 is there but inert."""
    hidden = row.expansion * in_channels
    expand = (conv_norm(in_channels, hidden), nn.SiLU())
    return InvertedResidual(
        Inert(*expand) if row.expansion == 1 else nn.Sequential(*expand),
        nn.Sequential(
            conv_norm(hidden, hidden, row.kernel_size, stride=stride, groups=hidden),
            nn.SiLU(),
            SqueezeExcitation(hidden, in_channels // 4),
        ),
        conv_norm(hidden, row.channels),
        plain_shortcut(in_channels, row.channels, stride),
    )


# The paper's table 1; the second row onwards halves the size where the paper does.
ROWS = (
    Row(1, 16, 1, 1, 3),
    Row(6, 24, 2, 2, 3),
    Row(6, 40, 2, 2, 5),
    Row(6, 80, 3, 2, 3),
    Row(6, 112, 3, 1, 5),
    Row(6, 192, 4, 2, 5),
    Row(6, 320, 1, 1, 3),
)


class EfficientNetB0(InvertedResidualNet):
    """Has no layer between the last stage and the classifier, and a stem that keeps the size.

    Attributes:
        unused_parameters: Names of parameters that no logit depends on.
    """

    unused_parameters = frozenset(
        {"features.1.0.expand.0.0.weight", "features.1.0.expand.0.1.weight", "features.1.0.expand.0.1.bias"}
    )


@NETS.register("efficientnet_b0_cifar")
def efficientnet_b0_cifar(num_classes: int, *, dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.2) -> nn.Module:
    """EfficientNet-B0 for small images: stem of stride 1, no last convolution, no drop-connect: 3.6 M parameters.

    As published, the first block has an expanding convolution that its forward pass skips: 1,088 of the 3,599,686
    parameters (10 classes) do nothing.

    Args:
        dropout_rate: Share of the classifier's inputs that is set to zero in training.

    Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019, table 1, in
    the form of kuangliu/pytorch-cifar (before July 2020).
    """
    return EfficientNetB0(
        num_classes, ROWS, block, nonlinearity=nn.SiLU, stem_stride=1, head_channels=None, dropout_rate=dropout_rate
    )

"""The thin ResNets that He et al. designed for CIFAR: 6n + 2 layers in three stages of 16, 32 and 64 channels."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from model.nets import NETS
from model.nets.initialisation import he_normal_by_fan_out
from model.nets.resnet import ResNet, conv_shortcut

ShortcutKind = Literal["pad", "conv"]


class PadShortcut(nn.Module):
    """Takes every `stride`-th pixel and appends channels of zeros: the paper's option A, without parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, maps: Tensor) -> Tensor:
        # (N, C, H, W) -> (N, C + extra, ceil(H / stride), ceil(W / stride))
        return F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))


def thin_resnet(depth: int, num_classes: int, shortcut: ShortcutKind) -> nn.Module:
    """Returns the net of `depth` = 6n + 2 layers; its convolutions have He's initialisation, as in the paper."""
    net = ResNet(
        num_classes,
        ((depth - 2) // 6,) * 3,
        widths=(16, 32, 64),
        shortcut=PadShortcut if shortcut == "pad" else conv_shortcut,
    )
    he_normal_by_fan_out(net)
    return net


@NETS.register("resnet20")
def resnet20(num_classes: int, *, shortcut: ShortcutKind = "pad") -> nn.Module:
    """Thin ResNet of 20 layers for small images: 0.27 M parameters.

    Args:
        shortcut: Where the shape changes: zero channels (`pad`, option A) or a 1x1 convolution (`conv`, option B).

    Source: He et al., Deep Residual Learning for Image Recognition (2015), section 4.2.
    """
    return thin_resnet(20, num_classes, shortcut)


@NETS.register("resnet32")
def resnet32(num_classes: int, *, shortcut: ShortcutKind = "pad") -> nn.Module:
    """Thin ResNet of 32 layers for small images: 0.46 M parameters.

    Args:
        shortcut: Where the shape changes: zero channels (`pad`, option A) or a 1x1 convolution (`conv`, option B).

    Source: He et al., Deep Residual Learning for Image Recognition (2015), section 4.2.
    """
    return thin_resnet(32, num_classes, shortcut)


@NETS.register("resnet44")
def resnet44(num_classes: int, *, shortcut: ShortcutKind = "pad") -> nn.Module:
    """Thin ResNet of 44 layers for small images: 0.66 M parameters.

    Args:
        shortcut: Where the shape changes: zero channels (`pad`, option A) or a 1x1 convolution (`conv`, option B).

    Source: He et al., Deep Residual Learning for Image Recognition (2015), section 4.2.
    """
    return thin_resnet(44, num_classes, shortcut)


@NETS.register("resnet56")
def resnet56(num_classes: int, *, shortcut: ShortcutKind = "pad") -> nn.Module:
    """Thin ResNet of 56 layers for small images: 0.85 M parameters.

    Args:
        shortcut: Where the shape changes: zero channels (`pad`, option A) or a 1x1 convolution (`conv`, option B).

    Source: He et al., Deep Residual Learning for Image Recognition (2015), section 4.2.
    """
    return thin_resnet(56, num_classes, shortcut)


@NETS.register("resnet110")
def resnet110(num_classes: int, *, shortcut: ShortcutKind = "pad") -> nn.Module:
    """Thin ResNet of 110 layers for small images: 1.7 M parameters.

    Args:
        shortcut: Where the shape changes: zero channels (`pad`, option A) or a 1x1 convolution (`conv`, option B).

    Source: He et al., Deep Residual Learning for Image Recognition (2015), section 4.2.
    """
    return thin_resnet(110, num_classes, shortcut)

"""The ResNets that He et al. designed for CIFAR, 6n + 2 layers in three stages, and the wider ones of a benchmark."""

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


def fourfold_resnet(depth: int, num_classes: int) -> nn.Module:
    """Returns the net of `depth` = 6n + 2 layers whose stages are four times as wide, and its stem twice."""
    net = ResNet(num_classes, ((depth - 2) // 6,) * 3, widths=(64, 128, 256), stem_width=32)
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


@NETS.register("resnet8x4")
def resnet8x4(num_classes: int) -> nn.Module:
    """ResNet of 8 layers, four times as wide as the thin ones, for small images: 1.2 M parameters, 100 classes.

    Source: Tian et al., "Contrastive Representation Distillation", 2020, supplementary material, "network
    architectures"; their code, RepDistiller.
    """
    return fourfold_resnet(8, num_classes)


@NETS.register("resnet32x4")
def resnet32x4(num_classes: int) -> nn.Module:
    """ResNet of 32 layers, four times as wide as the thin ones, for small images: 7.4 M parameters, 100 classes.

    Source: Tian et al., "Contrastive Representation Distillation", 2020, supplementary material, "network
    architectures"; their code, RepDistiller.
    """
    return fourfold_resnet(32, num_classes)

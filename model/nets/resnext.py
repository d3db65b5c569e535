"""ResNeXt-29 in kuangliu's form for small images: a 1x1 stem, and blocks twice as wide outside as inside.

The attribute names are kuangliu's. The net that Xie et al. designed for CIFAR is another one: see `resnext_cifar`.
"""

from __future__ import annotations

from torch import nn

from model.nets import NETS
from model.nets.resnet import Bottleneck, ResNet


def resnext(num_classes: int, cardinality: int, group_width: int) -> nn.Module:
    """Returns the net of three stages of three blocks.

    The original pools 8x8 maps before the classifier; the global average is the same for 32x32 images, and takes any
    size.

    Args:
        num_classes: Number of logits.
        cardinality: Groups of the 3x3 convolutions.
        group_width: Channels of a group in the first stage.
    """

    class GroupedBottleneck(Bottleneck):
        expansion = 2
        groups = cardinality

    width = cardinality * group_width
    widths = (width, 2 * width, 4 * width)
    return ResNet(num_classes, (3, 3, 3), widths=widths, stem_width=64, stem_size=1, block=GroupedBottleneck)


@NETS.register("resnext29_2x64d")
def resnext29_2x64d(num_classes: int) -> nn.Module:
    """ResNeXt-29 with 2 groups of 64 channels, in kuangliu's form: 9.1 M parameters.

    Source: kuangliu/pytorch-cifar, models/resnext.py.
    """
    return resnext(num_classes, cardinality=2, group_width=64)


@NETS.register("resnext29_4x64d")
def resnext29_4x64d(num_classes: int) -> nn.Module:
    """ResNeXt-29 with 4 groups of 64 channels, in kuangliu's form: 27.1 M parameters.

    Source: kuangliu/pytorch-cifar, models/resnext.py.
    """
    return resnext(num_classes, cardinality=4, group_width=64)


@NETS.register("resnext29_8x64d")
def resnext29_8x64d(num_classes: int) -> nn.Module:
    """ResNeXt-29 with 8 groups of 64 channels, in kuangliu's form: 89.6 M parameters; not the paper's, `resnext29`.

    Source: kuangliu/pytorch-cifar, models/resnext.py.
    """
    return resnext(num_classes, cardinality=8, group_width=64)


@NETS.register("resnext29_32x4d")
def resnext29_32x4d(num_classes: int) -> nn.Module:
    """ResNeXt-29 with 32 groups of 4 channels, in kuangliu's form: 4.8 M parameters.

    Source: kuangliu/pytorch-cifar, models/resnext.py.
    """
    return resnext(num_classes, cardinality=32, group_width=4)


@NETS.register("resnext29_32x8d")
def resnext29_32x8d(num_classes: int) -> nn.Module:
    """ResNeXt-29 with 32 groups of 8 channels, in kuangliu's form: 19.0 M parameters.

    Source: a teacher of ooodragon94/KD, which names it without defining it: the rule of kuangliu/pytorch-cifar.
    """
    return resnext(num_classes, cardinality=32, group_width=8)

"""ResNeXt-29 in kuangliu's form for small images: a 1x1 stem, and blocks twice as wide outside as inside.

The attribute names are kuangliu's. The net that Xie et al. designed for CIFAR is another one: see `resnext_cifar`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.nets import NETS
from model.nets.resnet import Stage, conv_shortcut
from model.outputs import Outputs


class GroupedBottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions, the last twice as wide. Returns the sum before the block's last ReLU."""

    expansion = 2

    def __init__(self, in_channels: int, width: int, stride: int, cardinality: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=cardinality, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, self.expansion * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * width)
        self.shortcut = conv_shortcut(in_channels, self.expansion * width, stride)

    def forward(self, maps: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(maps)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        return self.bn3(self.conv3(branch)) + self.shortcut(maps)


class ResNeXt(nn.Module):
    """A stem and three stages of three blocks, each after the first of twice the width at half the resolution.

    The original pools 8x8 maps before the classifier; the global average is the same for 32x32 images, and takes any
    size.

    Args:
        num_classes: Number of logits.
        cardinality: Groups of the 3x3 convolutions.
        group_width: Channels of a group in the first stage.
    """

    input_size: int | None = None
    activation = staticmethod(F.relu)

    def __init__(self, num_classes: int, *, cardinality: int, group_width: int) -> None:
        super().__init__()
        channels = 64
        self.conv1 = nn.Conv2d(3, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stage_names = ("layer1", "layer2", "layer3")
        width = cardinality * group_width
        for name in self.stage_names:
            blocks = []
            for position in range(3):
                stride = 2 if position == 0 and name != "layer1" else 1
                blocks.append(GroupedBottleneck(channels, width, stride, cardinality))
                channels = GroupedBottleneck.expansion * width
            self.add_module(name, Stage(*blocks))
            width *= 2
        self.linear = nn.Linear(channels, num_classes)

    @property
    def stage_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The batch norm behind each stage's last ReLU, before the shortcut is added."""
        return tuple(getattr(self, name)[-1].bn3 for name in self.stage_names)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        preacts, features = [], []
        maps = F.relu(self.bn1(self.conv1(images)))
        for name in self.stage_names:
            preact, maps = getattr(self, name)(maps)
            preacts.append(preact)
            features.append(maps)
        embedding = maps.mean((2, 3))  # (N, D, H, W) -> (N, D)
        return Outputs(self.linear(embedding), tuple(features), tuple(preacts), embedding)


@NETS.register("resnext29_2x64d")
def resnext29_2x64d(num_classes: int) -> nn.Module:
    """ResNeXt-29 with 2 groups of 64 channels, in kuangliu's form: 9.1 M parameters.

    Source: kuangliu/pytorch-cifar, models/resnext.py.
    """
    return ResNeXt(num_classes, cardinality=2, group_width=64)


@NETS.register("resnext29_4x64d")
def resnext29_4x64d(num_classes: int) -> nn.Module:
    """ResNeXt-29 with 4 groups of 64 channels, in kuangliu's form: 27.1 M parameters.

    Source: kuangliu/pytorch-cifar, models/resnext.py.
    """
    return ResNeXt(num_classes, cardinality=4, group_width=64)


@NETS.register("resnext29_8x64d")
def resnext29_8x64d(num_classes: int) -> nn.Module:
    """ResNeXt-29 with 8 groups of 64 channels, in kuangliu's form: 89.6 M parameters; not the paper's, `resnext29`.

    Source: kuangliu/pytorch-cifar, models/resnext.py.
    """
    return ResNeXt(num_classes, cardinality=8, group_width=64)


@NETS.register("resnext29_32x4d")
def resnext29_32x4d(num_classes: int) -> nn.Module:
    """ResNeXt-29 with 32 groups of 4 channels, in kuangliu's form: 4.8 M parameters.

    Source: kuangliu/pytorch-cifar, models/resnext.py.
    """
    return ResNeXt(num_classes, cardinality=32, group_width=4)


@NETS.register("resnext29_32x8d")
def resnext29_32x8d(num_classes: int) -> nn.Module:
    """ResNeXt-29 with 32 groups of 8 channels, in kuangliu's form: 19.0 M parameters.

    Source: a teacher of ooodragon94/KD, which names it without defining it: the rule of kuangliu/pytorch-cifar.
    """
    return ResNeXt(num_classes, cardinality=32, group_width=8)

"""The ResNeXt-29 that Xie et al. designed for CIFAR: a 3x3 stem, and stages of 256, 512 and 1024 channels.

The attribute names are the ancestor's, so its checkpoints load. kuangliu's family, with a 1x1 stem and wider blocks,
is in `resnext`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.nets import NETS
from model.nets.initialisation import he_normal_by_fan_out
from model.nets.resnet import Stage
from model.outputs import Outputs


class ResNeXtBottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions. Returns the sum before the block's last ReLU."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int, cardinality: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(width)
        self.conv_conv = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=cardinality, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv_expand = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()  # without layers it is the identity
        if in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut.add_module("shortcut_conv", shortcut)
            self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(out_channels))

    def forward(self, maps: Tensor) -> Tensor:
        branch = F.relu(self.bn_reduce(self.conv_reduce(maps)))
        branch = F.relu(self.bn(self.conv_conv(branch)))
        return self.bn_expand(self.conv_expand(branch)) + self.shortcut(maps)


class ResNeXtCifar(nn.Module):
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
        channels, out_channels, width = 64, 256, cardinality * group_width
        self.conv_1_3x3 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(channels)
        self.stage_names = ("stage_1", "stage_2", "stage_3")
        for name in self.stage_names:
            stage = Stage()
            for position in range(3):
                stride = 2 if position == 0 and name != "stage_1" else 1
                block = ResNeXtBottleneck(channels, width, out_channels, stride, cardinality)
                stage.add_module(f"{name}_bottleneck_{position}", block)
                channels = out_channels
            self.add_module(name, stage)
            width, out_channels = 2 * width, 2 * out_channels
        self.classifier = nn.Linear(channels, num_classes)
        he_normal_by_fan_out(self)
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @property
    def stage_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The batch norm behind each stage's last ReLU, before the shortcut is added."""
        return tuple(getattr(self, name)[-1].bn_expand for name in self.stage_names)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        preacts, features = [], []
        maps = F.relu(self.bn_1(self.conv_1_3x3(images)))
        for name in self.stage_names:
            preact, maps = getattr(self, name)(maps)
            preacts.append(preact)
            features.append(maps)
        embedding = maps.mean((2, 3))  # (N, D, H, W) -> (N, D)
        return Outputs(self.classifier(embedding), tuple(features), tuple(preacts), embedding)


@NETS.register("resnext29")
def resnext29(num_classes: int) -> nn.Module:
    """ResNeXt-29, 8x64d, of the paper and the ancestor: 34.4 M parameters; another family than `resnext29_8x64d`.

    Source: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", 2017, section 5.3; shortcuts and
    initialisation of haitongli/knowledge-distillation-pytorch.
    """
    return ResNeXtCifar(num_classes, cardinality=8, group_width=64)

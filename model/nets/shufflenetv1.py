"""ShuffleNet in the form of the CIFAR-100 distillation benchmark, for small images.

The paper's net begins with a 3x3 convolution of stride 2 and a max-pooling. This one begins with a 1x1 convolution that
keeps the size, so that the three stages see 16x16, 8x8 and 4x4 pixels of a 32x32 image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.nets import NETS
from model.nets.resnet import Stage
from model.outputs import Outputs


def channel_shuffle(maps: Tensor, groups: int) -> Tensor:
    """Returns the channels dealt out in turn: the first of every group, then the second of every group, and so on.

    Source: Zhang et al., "ShuffleNet", 2018, section 3.1.

    Args:
        maps: `(N, C, H, W)`, C a multiple of the groups.
        groups: Number of groups of consecutive channels.
    """
    # With the channels last, as nets and images are here, this is one copy, and the result has them last, too; torch's
    # own channel_shuffle returns them first.
    shuffled = maps.permute(0, 2, 3, 1).unflatten(-1, (groups, -1)).transpose(-1, -2)  # (N, H, W, C/g, g)
    return shuffled.flatten(-2).permute(0, 3, 1, 2)  # (N, C, H, W)


class ShuffleUnit(nn.Module):
    """Grouped 1x1, depthwise 3x3 and grouped 1x1 convolutions around which a shortcut leads.

    With stride 1 the two are added; with stride 2 the shortcut averages 3x3 pixels, and its channels are appended to
    those of the convolutions. Returns the maps before the unit's last ReLU: the stage applies it and keeps both.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: 1 (with as many output channels as input channels) or 2.
        groups: Of the last convolution.
        first_groups: Of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.first_groups = first_groups
        width = out_channels if stride == 1 else out_channels - in_channels
        narrow = width // 4
        self.conv1 = nn.Conv2d(in_channels, narrow, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride=stride, padding=1, groups=narrow, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, width, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(maps)))
        if self.first_groups > 1:
            branch = channel_shuffle(branch, self.first_groups)
        branch = F.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        if self.stride == 1:
            return branch + maps
        return torch.cat((branch, F.avg_pool2d(maps, 3, 2, 1)), 1)


class ShuffleNetV1(nn.Module):
    """A stem of one 1x1 convolution and stages that each begin with a unit of stride 2.

    Args:
        num_classes: Number of logits.
        num_units: Units of each stage, at least 2.
        widths: Output channels of each stage.
        groups: Of the 1x1 convolutions, but for the first one after the stem, which sees too few channels.
        stem_width: Channels of the stem.
    """

    input_size: int | None = None
    activation = staticmethod(F.relu)

    def __init__(
        self, num_classes: int, num_units: Sequence[int], widths: Sequence[int], *, groups: int, stem_width: int = 24
    ) -> None:
        super().__init__()
        channels = stem_width
        self.conv1 = nn.Conv2d(3, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages = nn.ModuleList()
        for depth, width in zip(num_units, widths, strict=True):
            units: list[nn.Module] = []
            for position in range(depth):
                first_groups = groups if units or self.stages else 1
                units.append(ShuffleUnit(channels, width, 2 if position == 0 else 1, groups, first_groups))
                channels = width
            self.stages.append(Stage(*units))
        self.linear = nn.Linear(channels, num_classes)

    @property
    def stage_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The last batch norm of each stage; its output and the shortcut's add up to the stage's preact."""
        return tuple(stage[-1].bn3 for stage in self.stages)  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        preacts, features = [], []
        maps = F.relu(self.bn1(self.conv1(images)))
        for stage in self.stages:
            preact, maps = stage(maps)
            preacts.append(preact)
            features.append(maps)
        embedding = maps.mean((2, 3))  # (N, D, H, W) -> (N, D)
        return Outputs(self.linear(embedding), tuple(features), tuple(preacts), embedding)


@NETS.register("shufflenetv1")
def shufflenetv1(num_classes: int) -> nn.Module:
    """ShuffleNet with three groups for small images: 0.95 M parameters, 100 classes.

    Source: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", 2018,
    table 1, g = 3; Tian et al., "Contrastive Representation Distillation", 2020, supplementary material, "network
    architectures", and their code, RepDistiller, where it is `ShuffleV1`.
    Deviation: as in that code, the stem is a 1x1 convolution without pooling, a ReLU follows the depthwise convolution,
    too, and in the first unit of a stage the narrow layers have a quarter of the appended channels, not of the stage's.
    """
    return ShuffleNetV1(num_classes, (4, 8, 4), (240, 480, 960), groups=3)

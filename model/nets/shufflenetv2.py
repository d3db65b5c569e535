"""ShuffleNetV2 in the form of the CIFAR-100 distillation benchmark, for small images.

The paper's net begins with a 3x3 convolution of stride 2 and a max-pooling. This one begins with a 1x1 convolution that
keeps the size, so that the three stages see 16x16, 8x8 and 4x4 pixels of a 32x32 image.

A unit passes half of its input on and replaces the other half, so that a stage ends with channels which different units
have rectified. Here the units hand on what no ReLU has seen yet: a channel is rectified where a unit or the end of the
stage reads it. The net is the same function, because a channel is rectified once or twice to the same effect, and every
channel of a stage has a preact. RepDistiller gives the passed half as it is after its ReLU, and the channels before the
shuffle, so that the features are not the ReLU of the preacts there. Since half of the preacts come from earlier units,
there is no batch norm of the stage, and the net cannot be the teacher of a loss that asks for one (overhaul).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.nets import NETS
from model.nets.mobilenetv2 import conv_norm
from model.outputs import Outputs


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Returns the channels of two maps in turn, which is the concatenation shuffled in two groups.

    Source: Ma et al., "ShuffleNet V2", 2018, figure 3.

    Args:
        first: `(N, C, H, W)`.
        second: Of the same shape.
    """
    # One copy, with the channels last as nets and images are here.
    pairs = torch.stack((first.permute(0, 2, 3, 1), second.permute(0, 2, 3, 1)), -1)  # (N, H, W, C, 2)
    return pairs.flatten(-2).permute(0, 3, 1, 2)  # (N, 2C, H, W)


class Branch(nn.Sequential):
    """1x1, depthwise 3x3 and 1x1 convolutions with batch norms, and one ReLU after the first."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__(
            conv_norm(in_channels, width),
            nn.ReLU(),
            conv_norm(width, width, 3, stride=stride, groups=width),
            conv_norm(width, width),
        )


class DownUnit(nn.Module):
    """Halves the size with two branches of all input channels, each of which makes half of the output's.

    Takes rectified maps and returns some that are not.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width = out_channels // 2
        self.short = nn.Sequential(
            conv_norm(in_channels, in_channels, 3, stride=2, groups=in_channels), conv_norm(in_channels, width)
        )
        self.branch = Branch(in_channels, width, 2)

    def forward(self, maps: Tensor) -> Tensor:
        return interleave(self.short(maps), self.branch(maps))


class Unit(nn.Module):
    """Passes the first half of its channels on and replaces the second one.

    Takes and returns maps that are not rectified.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = Branch(channels // 2, channels // 2, 1)

    def forward(self, preact: Tensor) -> Tensor:
        passed, replaced = preact.chunk(2, 1)
        return interleave(passed, self.branch(F.relu(replaced)))


class ShuffleNetV2(nn.Module):
    """A stem of one 1x1 convolution, stages that each begin with a unit of stride 2, and a 1x1 convolution.

    Args:
        num_classes: Number of logits.
        num_units: Units of each stage, the first one included.
        widths: Output channels of each stage, even.
        stem_width: Channels of the stem.
        head_width: Channels of the last convolution.
    """

    input_size: int | None = None
    activation = staticmethod(F.relu)

    def __init__(
        self,
        num_classes: int,
        num_units: Sequence[int],
        widths: Sequence[int],
        *,
        stem_width: int = 24,
        head_width: int = 1024,
    ) -> None:
        super().__init__()
        self.stem = conv_norm(3, stem_width)
        self.stages = nn.ModuleList()
        channels = stem_width
        for depth, width in zip(num_units, widths, strict=True):
            self.stages.append(nn.Sequential(DownUnit(channels, width), *(Unit(width) for _ in range(depth - 1))))
            channels = width
        self.head = conv_norm(channels, head_width)
        self.linear = nn.Linear(head_width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        preacts, features = [], []
        maps = F.relu(self.stem(images))
        for stage in self.stages:
            preacts.append(stage(maps))
            maps = F.relu(preacts[-1])
            features.append(maps)
        embedding = F.relu(self.head(maps)).mean((2, 3))  # (N, D, H, W) -> (N, D)
        return Outputs(self.linear(embedding), tuple(features), tuple(preacts), embedding)


@NETS.register("shufflenetv2")
def shufflenetv2(num_classes: int) -> nn.Module:
    """ShuffleNetV2 of size 1x for small images: 1.4 M parameters, 100 classes.

    Source: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", 2018, table 5, 1x;
    Tian et al., "Contrastive Representation Distillation", 2020, supplementary material, "network architectures", and
    their code, RepDistiller, where it is `ShuffleV2`.
    Deviation: as in that code, the stem is a 1x1 convolution without pooling.
    """
    return ShuffleNetV2(num_classes, (4, 8, 4), (116, 232, 464))

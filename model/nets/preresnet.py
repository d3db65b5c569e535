"""Pre-activation ResNets: batch norm and ReLU stand before each convolution, and the shortcut stays clean.

A stage ends with a sum that nothing has normalised yet. Its map is what the next layer makes of that sum first: the
batch norm and the ReLU of the next stage's first block, or the final ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from model.nets import NETS
from model.nets.initialisation import he_normal_by_fan_out
from model.outputs import Outputs


class Stage(nn.ModuleList):
    """Blocks of one resolution. The net itself applies the first block's batch norm and ReLU, and keeps their maps."""

    @property
    def first_norm(self) -> nn.BatchNorm2d:
        return cast(nn.BatchNorm2d, self[0].bn1)

    def forward(self, maps: Tensor, activated: Tensor) -> Tensor:
        first, *others = self
        maps = first(maps, activated)
        for block in others:
            maps = block(maps)
        return maps


class PreActivationNet(nn.Module):
    """A convolution, stages, a last batch norm and ReLU, the global average, and a linear layer.

    The ancestor pools 8x8 maps before the classifier; the global average is the same for 32x32 images, and takes any
    size. A subclass makes the layers, under the ancestor's names, so that its checkpoints load.
    """

    input_size: int | None = None
    activation = staticmethod(F.relu)
    conv1: nn.Conv2d
    fc: nn.Linear

    @property
    def stages(self) -> tuple[Stage, ...]:
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        raise NotImplementedError

    @property
    def stage_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The batch norm that takes each stage's sum; its output is the preact."""
        return (*(stage.first_norm for stage in self.stages[1:]), self.last_norm)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        preacts, features = [], []
        maps = self.conv1(images)
        activated = F.relu(self.stages[0].first_norm(maps))
        for stage, norm in zip(self.stages, self.stage_norms, strict=True):
            maps = stage(maps, activated)
            preacts.append(norm(maps))
            activated = F.relu(preacts[-1])
            features.append(activated)
        embedding = activated.mean((2, 3))  # (N, D, H, W) -> (N, D)
        return Outputs(self.fc(embedding), tuple(features), tuple(preacts), embedding)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide, and a shortcut around them.

    Takes the maps and, where the caller has it already, what `bn1` and its ReLU make of them.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.downsample = nn.Sequential()  # without layers it is the identity
        if stride != 1 or in_channels != out_channels:
            self.downsample.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, maps: Tensor, activated: Tensor | None = None) -> Tensor:
        branch = self.conv1(F.relu(self.bn1(maps)) if activated is None else activated)
        branch = self.conv2(F.relu(self.bn2(branch)))
        branch = self.conv3(F.relu(self.bn3(branch)))
        return branch + self.downsample(maps)


class PreResNet(PreActivationNet):
    """The net of bottlenecks: `num_blocks` in each of the stages of width 16, 32 and 64."""

    bn: nn.BatchNorm2d

    def __init__(self, num_classes: int, num_blocks: Sequence[int]) -> None:
        super().__init__()
        channels = 16
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for number, (width, depth) in enumerate(zip((16, 32, 64), num_blocks, strict=True), start=1):
            blocks = []
            for position in range(depth):
                blocks.append(Bottleneck(channels, width, stride=2 if position == 0 and number > 1 else 1))
                channels = Bottleneck.expansion * width
            self.add_module(f"layer{number}", Stage(blocks))
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        he_normal_by_fan_out(self)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(getattr(self, f"layer{number}") for number in (1, 2, 3))

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn


@NETS.register("preresnet110")
def preresnet110(num_classes: int) -> nn.Module:
    """The ancestor's "PreResNet-110", really of 164 layers: its 54 blocks have three convolutions, not two; 1.7 M
    parameters.

    Source: He et al., "Identity Mappings in Deep Residual Networks", 2016, table 2 (pre-activation ResNet-164); name of
    haitongli/knowledge-distillation-pytorch.
    Deviation: the first block's shortcut takes the maps before batch norm and ReLU, as the ancestor's does.
    """
    return PreResNet(num_classes, (18, 18, 18))

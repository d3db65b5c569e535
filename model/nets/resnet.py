"""ResNets of ImageNet's widths with a stem for small images: 3x3, stride 1, no max-pooling (kuangliu's form).

The attribute names are the ancestor's, so its checkpoints load. It pools 4x4 maps before the classifier; the global
average here is the same for 32x32 images, and takes any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from model.nets import NETS
from model.outputs import Outputs


def conv_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Returns the identity, or a 1x1 convolution with batch norm where the shape changes (the paper's option B)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


Shortcut = Callable[[int, int, int], nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. Returns the sum before the block's last ReLU: the stage applies it and keeps both."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(in_channels, width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, maps: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(maps)))
        return self.bn2(self.conv2(branch)) + self.shortcut(maps)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last `expansion` times as wide. Returns the sum before its last ReLU."""

    expansion = 4
    groups = 1  # of the 3x3 convolution

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=self.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, self.expansion * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * width)
        self.shortcut = shortcut(in_channels, self.expansion * width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, maps: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(maps)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        return self.bn3(self.conv3(branch)) + self.shortcut(maps)


class Stage(nn.Sequential):
    """Blocks of one resolution. Returns the last block's maps before and after their ReLU."""

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        for block in self:
            preact = block(maps)
            maps = F.relu(preact)
        return preact, maps


class ResNet(nn.Module):
    """A stem and `len(widths)` stages, each after the first at half the resolution.

    Args:
        num_classes: Number of logits.
        num_blocks: Blocks of each stage.
        widths: Width of each stage.
        stem_width: Channels of the stem; by default the first of `widths`.
        stem_size: Kernel of the stem's convolution.
        block: The kind of block.
        shortcut: Makes a block's shortcut from (input channels, output channels, stride).
    """

    input_size: int | None = None
    activation = staticmethod(F.relu)

    def __init__(
        self,
        num_classes: int,
        num_blocks: Sequence[int],
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
        stem_width: int | None = None,
        stem_size: int = 3,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        shortcut: Shortcut = conv_shortcut,
    ) -> None:
        super().__init__()
        channels = stem_width or widths[0]
        self.conv1 = nn.Conv2d(3, channels, stem_size, padding=stem_size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stage_names = tuple(f"layer{number}" for number in range(1, len(widths) + 1))
        for name, width, depth in zip(self.stage_names, widths, num_blocks, strict=True):
            blocks = []
            for position in range(depth):
                stride = 2 if position == 0 and name != "layer1" else 1
                blocks.append(block(channels, width, stride, shortcut))
                channels = block.expansion * width
            self.add_module(name, Stage(*blocks))
        self.linear = nn.Linear(channels, num_classes)

    @property
    def stage_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The last batch norm of each stage; its output and the shortcut's add up to the stage's preact."""
        return tuple(getattr(self, name)[-1].last_norm for name in self.stage_names)

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


@NETS.register("resnet18")
def resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 with a stem for small images, the ancestor's teacher: 11.2 M parameters.

    Source: He et al., Deep Residual Learning for Image Recognition (2015), table 1; stem of kuangliu/pytorch-cifar.
    """
    return ResNet(num_classes, (2, 2, 2, 2))


@NETS.register("resnet34")
def resnet34(num_classes: int) -> nn.Module:
    """ResNet-34 with a stem for small images: 21.3 M parameters.

    Source: He et al., Deep Residual Learning for Image Recognition (2015), table 1; stem of kuangliu/pytorch-cifar.
    """
    return ResNet(num_classes, (3, 4, 6, 3))


@NETS.register("resnet50")
def resnet50(num_classes: int) -> nn.Module:
    """ResNet-50 with a stem for small images: 23.5 M parameters.

    Source: He et al., Deep Residual Learning for Image Recognition (2015), table 1; stem of kuangliu/pytorch-cifar.
    """
    return ResNet(num_classes, (3, 4, 6, 3), block=Bottleneck)


@NETS.register("resnet101")
def resnet101(num_classes: int) -> nn.Module:
    """ResNet-101 with a stem for small images: 42.5 M parameters.

    Source: He et al., Deep Residual Learning for Image Recognition (2015), table 1; stem of kuangliu/pytorch-cifar.
    """
    return ResNet(num_classes, (3, 4, 23, 3), block=Bottleneck)


@NETS.register("resnet152")
def resnet152(num_classes: int) -> nn.Module:
    """ResNet-152 with a stem for small images: 58.2 M parameters.

    Source: He et al., Deep Residual Learning for Image Recognition (2015), table 1; stem of kuangliu/pytorch-cifar.
    """
    return ResNet(num_classes, (3, 8, 36, 3), block=Bottleneck)

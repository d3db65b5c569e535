"""Wide ResNets for small images: pre-activation nets of few and wide layers."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from model.nets import NETS
from model.nets.initialisation import he_normal_by_fan_out
from model.nets.preresnet import PreActivationNet, Stage


class WideBlock(nn.Module):
    """Two 3x3 convolutions with dropout between them, and a shortcut around them.

    Takes the maps and, where the caller has it already, what `bn1` and its ReLU make of them: where the width changes,
    the shortcut convolves that.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout_rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout_rate)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, maps: Tensor, activated: Tensor | None = None) -> Tensor:
        if activated is None:
            activated = F.relu(self.bn1(maps))
        branch = F.relu(self.bn2(self.conv1(activated)))
        branch = self.conv2(self.dropout(branch))
        return branch + (maps if self.convShortcut is None else self.convShortcut(activated))


class WideResNet(PreActivationNet):
    """The net of `depth` = 6n + 4 convolutions: a stem, n blocks in each of three stages, and each stage's shortcut.

    Args:
        num_classes: Number of logits.
        depth: Number of convolutions; with a factor of 1 the first stage needs no shortcut, and there is one less.
        widen_factor: The stages are 16, 32 and 64 times this wide.
        dropout_rate: Share of the inputs of each block's second convolution that is set to zero in training.
    """

    bn1: nn.BatchNorm2d

    def __init__(self, num_classes: int, *, depth: int, widen_factor: int, dropout_rate: float) -> None:
        super().__init__()
        channels = 16
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for number, width in enumerate((16 * widen_factor, 32 * widen_factor, 64 * widen_factor), start=1):
            blocks = []
            for position in range((depth - 4) // 6):
                stride = 2 if position == 0 and number > 1 else 1
                blocks.append(WideBlock(channels, width, stride, dropout_rate))
                channels = width
            # The ancestor's keys have a level more: block1.layer.0.
            self.add_module(f"block{number}", nn.ModuleDict({"layer": Stage(blocks)}))
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        nn.init.zeros_(self.fc.bias)
        he_normal_by_fan_out(self)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(getattr(self, f"block{number}").layer for number in (1, 2, 3))

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn1


@NETS.register("wrn")
def wrn(
    num_classes: int,
    *,
    depth: Literal[10, 16, 22, 28, 34, 40] = 28,
    widen_factor: Annotated[int, Field(ge=1, le=20)] = 10,
    dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.3,
) -> nn.Module:
    """Wide ResNet for small images; the default is the ancestor's WRN-28-10: 36.5 M parameters.

    Args:
        depth: Number of convolutions, those of the shortcuts included.
        widen_factor: The stages are 16, 32 and 64 times this wide.
        dropout_rate: Share of the inputs of each block's second convolution that is set to zero in training.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", 2016, table 1 and section 2.4.
    """
    return WideResNet(num_classes, depth=depth, widen_factor=widen_factor, dropout_rate=dropout_rate)


@NETS.register("wrn_16_2")
def wrn_16_2(num_classes: int) -> nn.Module:
    """`wrn` of depth 16 and factor 2, without dropout: 0.70 M parameters, 100 classes.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", 2016, table 1; the choice of Tian et al., "Contrastive
    Representation Distillation", 2020, table 1.
    """
    return WideResNet(num_classes, depth=16, widen_factor=2, dropout_rate=0.0)


@NETS.register("wrn_40_1")
def wrn_40_1(num_classes: int) -> nn.Module:
    """`wrn` of depth 40 and factor 1, without dropout: 0.57 M parameters, 100 classes.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", 2016, table 1; the choice of Tian et al., "Contrastive
    Representation Distillation", 2020, table 1.
    """
    return WideResNet(num_classes, depth=40, widen_factor=1, dropout_rate=0.0)


@NETS.register("wrn_40_2")
def wrn_40_2(num_classes: int) -> nn.Module:
    """`wrn` of depth 40 and factor 2, without dropout: 2.3 M parameters, 100 classes.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", 2016, table 1; the choice of Tian et al., "Contrastive
    Representation Distillation", 2020, table 1.
    """
    return WideResNet(num_classes, depth=40, widen_factor=2, dropout_rate=0.0)

"""MobileNetV2 for images of 224x224 pixels, kuangliu's form of it for 32x32, and what its relatives share with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from model.nets import NETS
from model.nets.initialisation import he_normal_by_fan_out
from model.nets.resnet import conv_shortcut
from model.outputs import Outputs


class Row(NamedTuple):
    """A row of the paper's table 2: the blocks of one stage, of which the first one strides."""

    expansion: int
    channels: int
    num_blocks: int
    stride: int
    kernel_size: int = 3


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int = 1, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Returns a convolution that keeps the size (up to its stride) and a batch norm."""
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class InvertedResidual(nn.Module):
    """Expands with a 1x1 convolution, filters each channel and projects; no activation follows the projection.

    Args:
        expand: Input channels -> hidden channels, with its activation.
        depthwise: Filters each hidden channel, with its activation.
        project: Hidden channels -> output channels; ends with a batch norm.
        shortcut: Input -> what is added to the output; None where nothing is.
    """

    def __init__(
        self, expand: nn.Module, depthwise: nn.Module, project: nn.Sequential, shortcut: nn.Module | None
    ) -> None:
        super().__init__()
        self.expand = expand
        self.depthwise = depthwise
        self.project = project
        self.shortcut = shortcut

    @property
    def last_norm(self) -> nn.Module:
        return self.project[-1]

    def forward(self, maps: Tensor) -> Tensor:
        branch = self.project(self.depthwise(self.expand(maps)))
        return branch if self.shortcut is None else branch + self.shortcut(maps)


Block = Callable[[int, int, Row], InvertedResidual]  # (input channels, stride, row)


class InvertedResidualNet(nn.Module):
    """A stem, a stage of inverted residuals for each row of a table, a global average and a linear layer.

    A stage ends linearly: its maps have no activation of their own, so that `preacts` and `features` are the same.

    Args:
        num_classes: Number of logits.
        rows: The table.
        block: Makes a block.
        nonlinearity: Of the stem and the head.
        stem_channels: Output channels of the first convolution.
        stem_stride: Its stride.
        head_channels: Output channels of the 1x1 convolution after the stages; None for no such layer.
        dropout_rate: Share of the classifier's inputs that is set to zero in training.
    """

    input_size: int | None = None
    activation = nn.Identity()

    def __init__(
        self,
        num_classes: int,
        rows: Sequence[Row],
        block: Block,
        *,
        nonlinearity: type[nn.Module],
        stem_channels: int = 32,
        stem_stride: int = 2,
        head_channels: int | None = 1280,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        stem = nn.Sequential(conv_norm(3, stem_channels, 3, stride=stem_stride), nonlinearity())
        stages = []
        channels = stem_channels
        for row in rows:
            blocks = []
            for position in range(row.num_blocks):
                blocks.append(block(channels, row.stride if position == 0 else 1, row))
                channels = row.channels
            stages.append(nn.Sequential(*blocks))
        head: nn.Module = nn.Identity()
        if head_channels is not None:
            head = nn.Sequential(conv_norm(channels, head_channels), nonlinearity())
            channels = head_channels
        self.features = nn.Sequential(stem, *stages, head)
        self.dropout = nn.Dropout(dropout_rate)
        self.classifier = nn.Linear(channels, num_classes)

    @property
    def stage_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The last batch norm of each stage; its output and the shortcut's, if any, add up to the stage's maps."""
        return tuple(stage[-1].last_norm for stage in self.features[1:-1])  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        stem, *stages, head = self.features
        maps = stem(images)
        stage_maps = []
        for stage in stages:
            maps = stage(maps)
            stage_maps.append(maps)
        embedding = self.dropout(head(maps).mean((2, 3)))  # (N, D, H, W) -> (N, D)
        return Outputs(self.classifier(embedding), tuple(stage_maps), tuple(stage_maps), embedding)

    def initialise(self) -> InvertedResidualNet:
        """Draws the weights as MobileNetV2's usual implementations do, and returns the net."""
        he_normal_by_fan_out(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        return self


def divisible(channels: float) -> int:
    """Returns the multiple of 8 that is nearest to a number of channels, at least 8 and not 10 % below it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def plain_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """Returns the identity where the shape stays, else none."""
    return nn.Identity() if stride == 1 and in_channels == out_channels else None


def paper_block(in_channels: int, stride: int, row: Row) -> InvertedResidual:
    """Returns the paper's block, with ReLU6; there is no convolution that would expand by 1."""
    hidden = row.expansion * in_channels
    return InvertedResidual(
        nn.Identity() if row.expansion == 1 else nn.Sequential(conv_norm(in_channels, hidden), nn.ReLU6()),
        nn.Sequential(conv_norm(hidden, hidden, row.kernel_size, stride=stride, groups=hidden), nn.ReLU6()),
        conv_norm(hidden, row.channels),
        plain_shortcut(in_channels, row.channels, stride),
    )


def benchmark_block(in_channels: int, stride: int, row: Row) -> InvertedResidual:
    """Returns RepDistiller's block: ReLU, and an expanding convolution in every block."""
    hidden = row.expansion * in_channels
    return InvertedResidual(
        nn.Sequential(conv_norm(in_channels, hidden), nn.ReLU()),
        nn.Sequential(conv_norm(hidden, hidden, row.kernel_size, stride=stride, groups=hidden), nn.ReLU()),
        conv_norm(hidden, row.channels),
        plain_shortcut(in_channels, row.channels, stride),
    )


def cifar_block(in_channels: int, stride: int, row: Row) -> InvertedResidual:
    """Returns kuangliu's block: ReLU, an expanding convolution in every block, a shortcut wherever the size stays."""
    block = benchmark_block(in_channels, stride, row)
    block.shortcut = conv_shortcut(in_channels, row.channels, 1) if stride == 1 else None
    return block


def paper_rows(expansion: int = 6) -> tuple[Row, ...]:
    """Returns the paper's table, or one with another expansion in all rows but the first."""
    return (
        Row(1, 16, 1, 1),
        Row(expansion, 24, 2, 2),
        Row(expansion, 32, 3, 2),
        Row(expansion, 64, 4, 2),
        Row(expansion, 96, 3, 1),
        Row(expansion, 160, 3, 2),
        Row(expansion, 320, 1, 1),
    )


@NETS.register("mobilenetv2")
def mobilenetv2(
    num_classes: int,
    *,
    width_multiplier: Annotated[float, Field(gt=0, le=8)] = 1.0,
    dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> nn.Module:
    """MobileNetV2, meant for images of 224x224 pixels: 2.4 M parameters with 101 classes.

    Args:
        width_multiplier: Scales the channels of all layers, to multiples of 8; the last convolution gets no less than
            1280.
        dropout_rate: Share of the classifier's inputs that is set to zero in training.

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2; initial weights of
    torchvision.
    """
    return InvertedResidualNet(
        num_classes,
        [row._replace(channels=divisible(width_multiplier * row.channels)) for row in paper_rows()],
        paper_block,
        nonlinearity=nn.ReLU6,
        stem_channels=divisible(32 * width_multiplier),
        head_channels=divisible(1280 * max(1.0, width_multiplier)),
        dropout_rate=dropout_rate,
    ).initialise()


@NETS.register("mobilenetv2_cifar")
def mobilenetv2_cifar(num_classes: int) -> nn.Module:
    """MobileNetV2 for images of 32x32 pixels, which it halves three times instead of five: 2.3 M parameters.

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2; strides, ReLU and
    shortcuts of kuangliu/pytorch-cifar.
    """
    first, second, *others = paper_rows()
    rows = [first, second._replace(stride=1), *others]
    return InvertedResidualNet(num_classes, rows, cifar_block, nonlinearity=nn.ReLU, stem_stride=1)


@NETS.register("mobilenetv2_half")
def mobilenetv2_half(num_classes: int) -> nn.Module:
    """MobileNetV2 of half the width for images of 32x32 pixels, halved four times: 0.81 M parameters, 100 classes.

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2; strides, ReLU and
    initial weights of Tian et al., "Contrastive Representation Distillation", 2020, supplementary material, "network
    architectures", and their code, RepDistiller, where it is `MobileNetV2`.
    """
    first, second, *others = paper_rows()
    return InvertedResidualNet(
        num_classes,
        [row._replace(channels=row.channels // 2) for row in (first, second._replace(stride=1), *others)],
        benchmark_block,
        nonlinearity=nn.ReLU,
        stem_channels=16,
    ).initialise()

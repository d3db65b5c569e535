"""The ancestor's 5-layer CNN: the student of its tables."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from model.errors import InputError
from model.nets import NETS
from model.outputs import Outputs


def require_size(net: nn.Module, images: Tensor) -> None:
    """Sees whether images have the one size that a net takes, its `input_size`.

    Raises:
        InputError: They have not.
    """
    height, width = images.shape[-2:]
    if not height == width == net.input_size:
        raise InputError(
            f"{type(net).__name__} takes images of {net.input_size}x{net.input_size} pixels, got {height}x{width}; "
            "resize them, or use a net for any size"
        )


class CNN(nn.Module):
    """Three convolutions and two linear layers; the attribute names are the ancestor's, so its checkpoints load."""

    input_size: int | None = 32
    activation = staticmethod(F.relu)

    def __init__(self, num_classes: int, *, num_channels: int, dropout_rate: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, num_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.conv2 = nn.Conv2d(num_channels, 2 * num_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * num_channels)
        self.conv3 = nn.Conv2d(2 * num_channels, 4 * num_channels, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(4 * num_channels)
        self.fc1 = nn.Linear(4 * num_channels * 4 * 4, 4 * num_channels)
        self.fcbn1 = nn.BatchNorm1d(4 * num_channels)
        self.dropout = nn.Dropout(dropout_rate)
        self.fc2 = nn.Linear(4 * num_channels, num_classes)

    @property
    def stage_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The batch norm before each stage's ReLU."""
        return self.bn1, self.bn2, self.bn3

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        require_size(self, images)
        preacts, features = [], []
        maps = images  # (N, 3, 32, 32) -> (N, C, 16, 16) -> (N, 2C, 8, 8) -> (N, 4C, 4, 4)
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            preacts.append(F.max_pool2d(bn(conv(maps)), 2))
            maps = F.relu(preacts[-1])
            features.append(maps)
        hidden = self.fc1(maps.flatten(1))  # (N, 4C * 4 * 4) -> (N, 4C)
        embedding = self.dropout(F.relu(self.fcbn1(hidden)))
        return Outputs(self.fc2(embedding), tuple(features), tuple(preacts), embedding)


@NETS.register("cnn")
def cnn(
    num_classes: int,
    *,
    num_channels: Annotated[int, Field(ge=1, le=4096)] = 32,
    dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.5,
) -> nn.Module:
    """The ancestor's CNN of three convolutions and two linear layers, for images of 32x32 pixels.

    Args:
        num_channels: Channels of the first convolution; the second has twice, the third four times as many.
        dropout_rate: Share of the classifier's inputs that is set to zero in training.

    Source: haitongli/knowledge-distillation-pytorch, model/net.py, class Net.
    """
    return CNN(num_classes, num_channels=num_channels, dropout_rate=dropout_rate)

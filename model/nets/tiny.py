"""A net for tests: as small as can be while it has all that a real one has."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from model.nets import NETS
from model.outputs import Outputs


class Tiny(nn.Module):
    """Two convolutions with batch norm, a global average, dropout and a linear layer."""

    input_size: int | None = None
    activation = staticmethod(F.relu)

    def __init__(self, num_classes: int, *, width: int, dropout_rate: float) -> None:
        super().__init__()
        # Stride 2 from the first layer on: a step costs a quarter of one at full resolution.
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.dropout = nn.Dropout(dropout_rate)
        self.linear = nn.Linear(2 * width, num_classes)

    @property
    def stage_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The batch norm before each stage's ReLU."""
        return self.bn1, self.bn2

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        preact1 = self.bn1(self.conv1(images))  # (N, 3, H, W) -> (N, width, H/2, W/2)
        feature1 = F.relu(preact1)
        preact2 = self.bn2(self.conv2(feature1))  # -> (N, 2 width, H/4, W/4)
        feature2 = F.relu(preact2)
        embedding = self.dropout(feature2.mean((2, 3)))  # -> (N, 2 width)
        return Outputs(self.linear(embedding), (feature1, feature2), (preact1, preact2), embedding)


@NETS.register("tiny")
def tiny(
    num_classes: int,
    *,
    width: Annotated[int, Field(ge=1, le=1024)] = 16,
    dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0,
) -> nn.Module:
    """Two convolutions and a linear layer, for tests and first tries: 5,466 parameters with 10 classes.

    Args:
        width: Channels of the first convolution; the second has twice as many.
        dropout_rate: Share of the classifier's inputs that is set to zero in training.

    Source: kdlab's own.
    """
    return Tiny(num_classes, width=width, dropout_rate=dropout_rate)

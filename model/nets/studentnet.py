"""The student of the VGGs: one convolution where they have several, and 64 channels throughout."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from model.nets import NETS
from model.nets.vgg import VGG


@NETS.register("studentnet")
def studentnet(num_classes: int, *, num_blocks: Annotated[int, Field(ge=3, le=4)] = 4) -> nn.Module:
    """Blocks of convolution, batch norm, ReLU and max-pooling, for images of 32x32 pixels: 0.12 M parameters.

    Args:
        num_blocks: 4 as in the published code, or 3 as in its description.

    Source: JoonyoungYi/KD-pytorch (2019), StudentNet.
    """
    return VGG(num_classes, (1,) * num_blocks, (64,) * num_blocks)

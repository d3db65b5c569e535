"""A small student that normalises last: convolution, ReLU, max-pooling, then batch norm."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from model.nets import NETS
from model.nets.cnn import require_size
from model.outputs import Outputs


class StudentModel(nn.Module):
    """Three convolutions of 32, 64 and 128 channels and a linear layer."""

    input_size: int | None = 32
    activation = staticmethod(F.relu)
    stage_norms: tuple[nn.BatchNorm2d, ...] = ()  # its batch norms stand after the ReLUs

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = (3, 32, 64, 128)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(channels))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in channels[1:])
        self.classifier = nn.Linear(128 * 4 * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        require_size(self, images)
        preacts, features = [], []
        maps = images  # (N, 3, 32, 32) -> (N, 32, 16, 16) -> (N, 64, 8, 8) -> (N, 128, 4, 4)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            preacts.append(conv(maps))
            features.append(F.relu(preacts[-1]))
            maps = norm(F.max_pool2d(features[-1], 2))
        embedding = maps.flatten(1)  # (N, 128, 4, 4) -> (N, 2048)
        return Outputs(self.classifier(embedding), tuple(features), tuple(preacts), embedding)


@NETS.register("studentmodel")
def studentmodel(num_classes: int) -> nn.Module:
    """Three convolutions, each before ReLU, max-pooling and batch norm, for 32x32 pixels: 0.11 M parameters.

    Source: the student of Heejoon Koo's Knowledge-Distillation (2021).
    """
    return StudentModel(num_classes)

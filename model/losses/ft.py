"""Factor transfer: the student's translation of its last map is to be the teacher's paraphrase of its own."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.adapters import match_sizes, unit
from model.losses.base import Loss
from model.losses.stages import Stages
from model.outputs import Batch, Outputs, Probe

RATE = 0.5  # channels of a factor, as a share of the teacher's


def factor_energy(factors: Tensor) -> Tensor:
    """Returns the mean of squares over the channels, as vectors of length 1.

    Args:
        factors: `(N, C, H, W)`; the result is `(N, H * W)`, all 0 for a sample whose factors are.
    """
    return unit(factors.square().mean(1).flatten(1), dim=1)


def ft_loss(student_factors: Tensor, teacher_factors: Tensor) -> Tensor:
    """Returns the absolute difference of the factors' energies, mean over the batch and the positions.

    Source: Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", 2018, section 3
    with p = 1.
    Deviation: the paper compares the factors themselves, of length 1; here, as in RepDistiller, it is the mean of their
    squares over the channels, as in attention transfer.

    Args:
        student_factors: `(N, C, H, W)`.
        teacher_factors: `(N, C', H', W')`; the larger of both is average-pooled to the size of the smaller.
    """
    own, other = match_sizes(student_factors, teacher_factors)
    return (factor_energy(own) - factor_energy(other)).abs().mean()


def layers(kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], *widths: int, norm: bool = False) -> nn.Sequential:
    """Returns 3x3 convolutions that keep the size, with LeakyReLU of slope 0.1 and, on request, batch norms."""
    made: list[nn.Module] = []
    for before, after in pairwise(widths):
        made.append(kind(before, after, 3, padding=1))
        made += [nn.BatchNorm2d(after)] if norm else []
        made.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*made)


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's maps: three convolutions to the factors and three transposed ones back."""

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        self.encoder = layers(nn.Conv2d, channels, channels, factors, factors)
        self.decoder = layers(nn.ConvTranspose2d, factors, factors, channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        return self.decoder(self.encoder(maps))


@LOSSES.register("ft")
class FTLoss(Loss):
    """Absolute difference of where the factors of both nets' last maps are strong, mean over the batch and positions.

    The teacher's factors are the code of an autoencoder, the paraphraser. It learns in the first `initial_epochs`
    epochs, in which the student does not, with weight 1; afterwards it is fixed, and a translator of the student's maps
    learns with the student. The other losses count from then on.

    Source: Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", 2018, section
    3, as in RepDistiller.
    Deviation: as in that code, it is the mean squares of the factors over the channels that are compared. The student
    is in train mode throughout, and optimizer and schedule go on from one stage to the other.

    Args:
        initial_epochs: Epochs in which the paraphraser learns, and nothing else.
    """

    needs = frozenset({"features"})
    needs_teacher = True
    usual_weight = 200.0
    initial_weight = 1.0
    trains_classifier = False
    least_at_teacher = False

    paraphraser: Paraphraser
    translator: nn.Sequential

    def __init__(self, *, initial_epochs: Annotated[int, Field(ge=1)] = 30) -> None:
        super().__init__()
        self.initial_epochs = initial_epochs
        self.epoch = 0

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        stages = Stages("ft", "features", student, teacher)
        own, other = stages.student.shapes[-1][0], stages.teacher.shapes[-1][0]
        factors = max(int(RATE * other), 1)
        self.paraphraser = Paraphraser(other, factors)
        self.translator = layers(nn.Conv2d, own, own, factors, factors, norm=True)

    def on_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        target = teacher.features[-1]
        if self.epoch < self.initial_epochs:
            return {"ft_paraphraser": F.mse_loss(self.paraphraser(target), target)}
        with torch.no_grad():
            factors = self.paraphraser.encoder(target)
        return {"ft": ft_loss(self.translator(student.features[-1]), factors)}

    def describe(self) -> str:
        return (
            "mean absolute difference of the factors' energies (mean of f^2 over the channels, of length 1) on the last"
            f" map, mean over the batch and the map (in the first {self.initial_epochs} epochs, alone and x 1: the"
            " paraphraser's MSE)"
        )

"""Variational information distillation: regression of the teacher's maps with a learnt variance for each channel."""

from __future__ import annotations

import itertools
import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.adapters import match_sizes
from model.losses.stages import StagedLoss, StageList, Stages, describe_pairs, paired
from model.outputs import Batch, Outputs, Probe

EPS = 1e-5  # the least variance


def vid_loss(predicted: Tensor, teacher_maps: Tensor, rho: Tensor) -> Tensor:
    """Returns `[(predicted - teacher)^2 / v + log v] / 2`, mean over batch and maps, with `v = softplus(rho) + 1e-5`.

    It is the negative logarithm of a normal density, less a constant, and may be below 0.

    Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer", 2019, section 2.

    Args:
        predicted: `(N, C, H, W)`, made from the student's maps.
        teacher_maps: `(N, C, H, W)`.
        rho: `(C,)`.
    """
    if predicted.shape != teacher_maps.shape:
        raise ValueError(f"predicted maps {tuple(predicted.shape)}, teacher maps {tuple(teacher_maps.shape)}")
    variance = (F.softplus(rho) + EPS).view(1, -1, 1, 1)
    return ((predicted - teacher_maps).square() / variance + variance.log()).mean() / 2


class Predictor(nn.Module):
    """Predicts the teacher's maps from the student's: three 1x1 convolutions, and a variance for each channel.

    Args:
        student_channels, teacher_channels: Of the maps.
        initial_variance: Of every channel, above 1e-5.
    """

    def __init__(self, student_channels: int, teacher_channels: int, initial_variance: float = 5.0) -> None:
        super().__init__()
        widths = [student_channels, *[teacher_channels] * 3]
        first, second, third = (nn.Conv2d(*pair, kernel_size=1, bias=False) for pair in itertools.pairwise(widths))
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        # The inverse of softplus; in a list of plain tensors it would never be trained.
        self.rho = nn.Parameter(torch.full((teacher_channels,), math.log(math.expm1(initial_variance - EPS))))

    def forward(self, student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
        own, other = match_sizes(student_maps, teacher_maps)
        return vid_loss(self.mean(own), other, self.rho)


@LOSSES.register("vid")
class VIDLoss(StagedLoss):
    """Negative log-likelihood of the teacher's maps, predicted from the student's, with a learnt variance per channel.

    It is `[(mean - teacher)^2 / v + log v] / 2`, mean over the batch and the maps, sum over the stages; the mean comes
    from three 1x1 convolutions. Below 0 it is as right as above.

    Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer", 2019, section 2, as in
    RepDistiller.
    Deviation: a mean over the map as in RepDistiller, not a sum.

    Args:
        initial_variance: Of every channel before training.
        student_stages: The student's stages, counted from 1; null: all, one to one, if both nets have as many; else the
            last stage of every map size that both have.
        teacher_stages: The teacher's stages that they meet; null as before.
    """

    needs = frozenset({"features"})
    needs_teacher = True
    trains_classifier = False
    least_at_teacher = False

    def __init__(
        self,
        *,
        initial_variance: Annotated[float, Field(ge=1e-3, le=100)] = 5.0,
        student_stages: StageList | None = None,
        teacher_stages: StageList | None = None,
    ) -> None:
        super().__init__(student_stages, teacher_stages)
        self.initial_variance = initial_variance
        self.predictors = nn.ModuleList()

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        stages = Stages("vid", "features", student, teacher)
        self.pairs = stages.pairs(self.student_stages, self.teacher_stages)
        for own, other in (stages.shapes(*pair) for pair in self.pairs):
            self.predictors.append(Predictor(own[0], other[0], self.initial_variance))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        maps = paired(self.pairs, student.features, teacher.features)
        levels = [predictor(*pair) for predictor, pair in zip(self.predictors, maps, strict=True)]
        return {"vid": torch.stack(levels).sum()}

    def describe(self) -> str:
        return (
            f"[(predicted - teacher)^2 / v + log v] / 2 (v learnt per channel, from {self.initial_variance:g}), sum"
            f" over {describe_pairs(self.pairs)}, mean over the batch and the map"
        )

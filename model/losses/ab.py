"""Activation boundaries: which of the teacher's responses its ReLU lets through."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from model.losses import LOSSES
from model.losses.adapters import fitting
from model.losses.stages import StagedLoss, StageList, Stages, describe_pairs, paired
from model.outputs import Batch, Outputs, Probe

SCALE = 3 / 1000  # of the reference


def ab_loss(student_maps: Tensor, teacher_maps: Tensor, margin: float = 1.0) -> Tensor:
    """Returns how far the student's responses are on the wrong side, squared, sum over a map, mean over the batch.

    It is to be above the margin where the teacher is positive, and below minus the margin elsewhere.

    Source: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", 2019,
    section 3; the factor 3 / 1000 of RepDistiller.

    Args:
        student_maps: `(N, C, H, W)`, through the connector.
        teacher_maps: `(N, C, H, W)`, before the ReLU.
        margin: At least 0.
    """
    if student_maps.shape != teacher_maps.shape:
        raise ValueError(f"student maps {tuple(student_maps.shape)}, teacher maps {tuple(teacher_maps.shape)}")
    lacking = torch.where(teacher_maps > 0, margin - student_maps, margin + student_maps).clamp(min=0)
    return SCALE * lacking.square().sum() / len(student_maps)


@LOSSES.register("ab")
class ABLoss(StagedLoss):
    """Squared distance to the teacher's side of the ReLU, in a stage of its own before the other losses count.

    Each of the student's maps before the ReLU passes a convolution with batch norm, unless it has the teacher's shape
    already. Where the teacher is positive, it is to be above `margin`, elsewhere below `-margin`. Distances are sums
    over a map, the deepest with weight 1, each one before it with half of the next one's. In the first
    `initial_epochs` epochs this loss counts alone, afterwards it is 0 and the others count: it gives the student
    weights to begin with. So its weight says nothing about its share; it acts as a factor of the learning rate in those
    epochs.

    Source: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", 2019,
    section 3, as in RepDistiller.
    Deviation: the student is in train mode throughout, and optimizer and schedule go on from one stage to the other.

    Args:
        margin: How far beyond 0 a response is to be.
        initial_epochs: Epochs in which it counts, and alone.
        student_stages: The student's stages from the first to the last, counted from 1; null: all, one to one, if both
            nets have as many; else the last stage of every map size that both have.
        teacher_stages: The teacher's stages that they meet; null as before.
    """

    needs = frozenset({"preacts"})
    needs_teacher = True
    trains_classifier = False
    ordered = True
    initial_only = True
    least_at_teacher = False

    def __init__(
        self,
        *,
        margin: Annotated[float, Field(gt=0)] = 1.0,
        initial_epochs: Annotated[int, Field(ge=1)] = 30,
        student_stages: StageList | None = None,
        teacher_stages: StageList | None = None,
    ) -> None:
        super().__init__(student_stages, teacher_stages)
        self.margin = margin
        self.initial_epochs = initial_epochs
        self.connectors = nn.ModuleList()

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        stages = Stages("ab", "preacts", student, teacher)
        self.pairs = stages.pairs(self.student_stages, self.teacher_stages)
        for own, other in self.pairs:
            student_shape, teacher_shape = stages.shapes(own, other)
            if student_shape == teacher_shape:
                self.connectors.append(nn.Identity())
                continue
            convolution = fitting(student_shape, teacher_shape)
            if convolution is None:
                raise stages.error(f"student stage {own} cannot be fitted to teacher stage {other}")
            self.connectors.append(nn.Sequential(convolution, nn.BatchNorm2d(teacher_shape[0])))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        distances = student.logits.new_zeros(())
        maps = paired(self.pairs, student.preacts, teacher.preacts)
        for connector, (own, other) in zip(self.connectors, maps, strict=True):
            distances = distances / 2 + ab_loss(connector(own), other, self.margin)
        return {"ab": distances}

    def describe(self) -> str:
        return (
            f"squared distance to the activation boundaries x {SCALE:g} (margin {self.margin:g}), sum over"
            f" {describe_pairs(self.pairs)} (the last x 1, each one before it x 1/2 of the next) and over a map, mean"
            f" over the batch (in the first {self.initial_epochs} epochs, alone)"
        )

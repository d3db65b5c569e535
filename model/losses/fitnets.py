"""Regression of one of the teacher's maps: "hints"."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.base import Loss
from model.losses.stages import Shape, Stages
from model.outputs import Batch, Outputs, Probe


def fitting(student: Shape, teacher: Shape) -> nn.Module | None:
    """Returns the convolution that makes maps of the teacher's shape from the student's; None if there is none.

    It halves the size, doubles it, or takes off the difference without padding.
    """
    (student_channels, *student_size), (teacher_channels, *teacher_size) = student, teacher
    channels = student_channels, teacher_channels
    # Without biases: a batch norm follows.
    if student_size == [2 * size for size in teacher_size]:
        return nn.Conv2d(*channels, 3, stride=2, padding=1, bias=False)
    if [2 * size for size in student_size] == teacher_size:
        return nn.ConvTranspose2d(*channels, 4, stride=2, padding=1, bias=False)
    height, width = (own - other + 1 for own, other in zip(student_size, teacher_size, strict=True))
    return nn.Conv2d(*channels, (height, width), bias=False) if min(height, width) > 0 else None


@LOSSES.register("fitnets")
class FitNetsLoss(Loss):
    """Cross-entropy plus `hint_weight` times the mean squared difference of one stage's maps.

    The student's maps pass a learnt convolution with batch norm and ReLU, which fits their shape to the teacher's.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, section 2.2, as in RepDistiller.
    Deviation: the paper trains the student up to the guided stage first and distils logits afterwards; here, as in
    RepDistiller, hint and labels teach together, and the regressor has a batch norm.

    Args:
        hint_weight: Weight of the hint.
        student_stage: The guided stage, counted from 1.
        teacher_stage: The stage that gives the hint, counted from 1.
    """

    needs = frozenset({"logits", "features"})
    needs_teacher = True

    def __init__(
        self,
        *,
        hint_weight: Annotated[float, Field(gt=0)] = 100.0,
        student_stage: Annotated[int, Field(ge=1)] = 2,
        teacher_stage: Annotated[int, Field(ge=1)] = 2,
    ) -> None:
        super().__init__()
        self.hint_weight = hint_weight
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.regressor = nn.Sequential()

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        stages = Stages("fitnets", "features", student, teacher)
        student_shape, teacher_shape = stages.shapes(self.student_stage, self.teacher_stage)
        convolution = fitting(student_shape, teacher_shape)
        if convolution is None:
            pair = f"student stage {self.student_stage} and teacher stage {self.teacher_stage}"
            raise stages.error(f"{pair} cannot be fitted: the student's maps are smaller, and not by half")
        self.regressor.extend([convolution, nn.BatchNorm2d(teacher_shape[0]), nn.ReLU()])

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        guided = self.regressor(student.features[self.student_stage - 1])
        hint = F.mse_loss(guided, teacher.features[self.teacher_stage - 1])
        return {"ce": F.cross_entropy(student.logits, batch.labels), "hint": self.hint_weight * hint}

    def describe(self) -> str:
        return (
            f"CE x 1 + MSE x {self.hint_weight:.4g} (student stage {self.student_stage}, fitted to teacher stage"
            f" {self.teacher_stage}), mean over the batch and the maps"
        )

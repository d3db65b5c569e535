"""Regression of one of the teacher's maps: "hints"."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.adapters import fitting
from model.losses.base import Loss
from model.losses.stages import Stages
from model.outputs import Batch, Outputs, Probe


@LOSSES.register("fitnets")
class FitNetsLoss(Loss):
    """Mean squared difference of one stage's maps.

    The student's maps pass a learnt convolution with batch norm and ReLU, which fits their shape to the teacher's.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, section 2.2, as in RepDistiller.
    Deviation: the paper trains the student up to the guided stage first and distils logits afterwards; here, as in
    RepDistiller, hint and labels teach together, and the regressor has a batch norm.

    Args:
        student_stage: The guided stage, counted from 1.
        teacher_stage: The stage that gives the hint, counted from 1.
    """

    needs = frozenset({"features"})
    needs_teacher = True
    usual_weight = 100.0
    trains_classifier = False
    least_at_teacher = False  # the regressor begins with random weights

    def __init__(
        self,
        *,
        student_stage: Annotated[int, Field(ge=1)] = 2,
        teacher_stage: Annotated[int, Field(ge=1)] = 2,
    ) -> None:
        super().__init__()
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
            raise stages.error(f"{pair} cannot be fitted: the student's maps are smaller, by no whole number")
        self.regressor.extend([convolution, nn.BatchNorm2d(teacher_shape[0]), nn.ReLU()])

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        guided = self.regressor(student.features[self.student_stage - 1])
        return {"fitnets": F.mse_loss(guided, teacher.features[self.teacher_stage - 1])}

    def describe(self) -> str:
        return (
            f"MSE of student stage {self.student_stage}, fitted to teacher stage {self.teacher_stage}, mean over the"
            " batch and the maps"
        )

"""Distillation from a teacher that is written down, not trained: right, and never quite sure."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.base import Loss
from model.losses.logits import is_label
from model.outputs import Batch, Outputs

Form = Literal["code", "paper"]


def virtual_teacher(labels: Tensor, num_classes: int, correct_probability: float, dtype: torch.dtype) -> Tensor:
    """Returns `(N, C)`: the given probability for the label, the rest in equal parts for the other classes."""
    others = (1 - correct_probability) / (num_classes - 1)
    target = is_label(labels, num_classes).to(dtype)
    return others + (correct_probability - others) * target


def tfkd_loss(
    student_logits: Tensor, labels: Tensor, correct_probability: float, temperature: float, form: Form = "code"
) -> Tensor:
    """Returns `KL(softened virtual teacher || student)`, mean over the batch, without T^2.

    Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", 2020, equation 9.

    Args:
        student_logits: `(N, C)`, C at least 2.
        labels: `(N,)`.
        correct_probability: Between 0 and 1.
        temperature: Above 0.
        form: See `TFKDLoss`.
    """
    teacher = virtual_teacher(labels, student_logits.shape[1], correct_probability, student_logits.dtype)
    softened = F.log_softmax((teacher if form == "code" else teacher.log()) / temperature, dim=1)
    own = F.log_softmax(student_logits if form == "code" else student_logits / temperature, dim=1)
    return (softened.exp() * (softened - own)).sum(dim=1).mean()


@LOSSES.register("tfkd")
class TFKDLoss(Loss):
    """`KL(virtual teacher || student)`, mean over the batch: the regularisation of teacher-free distillation.

    The virtual teacher gives `correct_probability` to the label and the rest evenly to the other classes, and is
    softened by the temperature. There are two readings of that, and no factor T^2 in either:

    - `code`, as the authors' CIFAR-100 runs had it: the probabilities themselves are divided by T, as if they were
      logits, and the student is not softened. Even at T = 1 the target is then far from sure.
    - `paper`, the equation: teacher and student at temperature T, the virtual teacher's logits being the logarithms of
      its probabilities. At T = 1 this is label smoothing, less the target's entropy; the gradient fades with 1/T.

    The authors' objective is `(1 - a) CE + a * multiplier * KL`, their KL a mean over the classes as well. So their
    ResNet18 on CIFAR-100 (a 0.1, T 20, multiplier 100) is `[{"name": "ce", "weight": 0.9}, {"name": "tfkd", "weight":
    0.1}]`, and their MobileNetV2 (a 0.95, T 40, multiplier 1) has the weights 0.05 and 0.95 / 100. Their paper's a is
    the share of this term: name it as the weight here, and `1 - a` as that of `ce`.

    Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", 2020, equation 9, and
    the authors' code and remarks (yuanli2333/Teacher-free-Knowledge-Distillation, issues 3, 6 and 19).
    Deviation: mean over the batch; their code divides by the number of classes, too.

    Args:
        correct_probability: Of the label in the virtual teacher; the authors have 0.99, and 0.9 at the least.
        temperature: Softens the virtual teacher, and in the form `paper` the student, too.
        form: Which reading, `code` or `paper`.
    """

    needs_labels = True
    usual_weight = 0.1
    least_at_teacher = False

    def __init__(
        self,
        *,
        correct_probability: Annotated[float, Field(gt=0, lt=1)] = 0.99,
        temperature: Annotated[float, Field(gt=0, le=1000)] = 20.0,
        form: Form = "code",
    ) -> None:
        super().__init__()
        self.correct_probability = correct_probability
        self.temperature = temperature
        self.form: Form = form

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        loss = tfkd_loss(student.logits, batch.labels, self.correct_probability, self.temperature, self.form)
        return {"tfkd": loss}

    def describe(self) -> str:
        softened = "its probabilities" if self.form == "code" else "its and the student's logits"
        return (
            f"KL from a virtual teacher with {self.correct_probability:g} for the label x 1, T {self.temperature:g}"
            f" dividing {softened}, no T^2, mean over the batch"
        )

"""Distillation with the label's class and the other classes taken apart."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from model.errors import InputError
from model.losses import LOSSES
from model.losses.base import Loss
from model.losses.logits import is_label, non_target_log_probs, notice_two_classes, standardised
from model.outputs import Batch, Outputs, Probe


def dkd_parts(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns the two parts of the KL divergence of each sample, both `(N,)`, without T^2.

    The first is `KL(b_t || b_s)` with `b = (p_y, 1 - p_y)`, "target class"; the second `KL(q_t || q_s)` with q the
    softmax over the other classes, 0 if there is only one. The first plus `1 - p_t(y)` times the second is the whole
    divergence. All in log space: finite, and so are the gradients, at gaps of tens of thousands.

    Source: Zhao et al., "Decoupled Knowledge Distillation", 2022, section 3.

    Args:
        student_logits: `(N, C)`, C at least 2.
        teacher_logits: `(N, C)`.
        labels: `(N,)`.
        temperature: Above 0.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}")
    target = is_label(labels, student_logits.shape[1])

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log p_y and log(1 - p_y)."""
        log_probs = F.log_softmax(logits / temperature, dim=1)
        return (log_probs * target).sum(dim=1), log_probs.masked_fill(target, -torch.inf).logsumexp(dim=1)

    student_target, student_rest = split(student_logits)
    teacher_target, teacher_rest = split(teacher_logits)
    target_part = teacher_target.exp() * (teacher_target - student_target)
    target_part = target_part + teacher_rest.exp() * (teacher_rest - student_rest)

    student_others = non_target_log_probs(student_logits / temperature, labels)
    teacher_others = non_target_log_probs(teacher_logits / temperature, labels)
    # Both are 0 in the label's place: what exp makes of that is multiplied by 0.
    others_part = (teacher_others.exp() * (teacher_others - student_others)).sum(dim=1)
    return target_part, others_part


def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Returns `T^2 (alpha * KL(b_t || b_s) + beta * KL(q_t || q_s))`, mean over the batch: see `dkd_parts`."""
    target_part, others_part = dkd_parts(student_logits, teacher_logits, labels, temperature)
    return temperature**2 * (alpha * target_part + beta * others_part).mean()


@LOSSES.register("dkd")
class DKDLoss(Loss):
    """`T^2 * (alpha * KL(b_t || b_s) + beta * KL(q_t || q_s))`, mean over the batch: decoupled distillation.

    b is (p_y, 1 - p_y), the probability of the label and of all else; q is the softmax over the other classes, at the
    same temperature. In plain distillation the second term is weighed by `1 - p_t(y)`, so that a certain teacher tells
    little about the other classes; here by `beta`. With two classes it is 0.

    The authors add cross-entropy and let the weight rise in the first 20 epochs, which here is a schedule of it:
    `[{"name": "ce"}, {"name": "dkd", "weight": {"name": "constant", "warmup_epochs": 20}}]`. Their `beta` on CIFAR-100
    is 8, but 2 for ResNet56 to 20 and 110 to 32, and 6 for VGG13 to VGG8 or MobileNetV2, WRN-40-2 to WRN-16-2 or
    WRN-40-1, and ResNet50 to WRN-16-2; on ImageNet `alpha` 1, `beta` 0.5 and `temperature` 1.
    With `standardise`, whose authors are others: `temperature` 2, `alpha` 9 and nine times that `beta`.

    Source: Zhao et al., "Decoupled Knowledge Distillation", 2022, section 3; `standardise`: Sun et al., "Logit
    Standardization in Knowledge Distillation", 2024, section 4.

    Args:
        alpha: Weight of the label's part.
        beta: Weight of the other classes' part.
        temperature: Divides both networks' logits before the softmax.
        standardise: Replace both networks' logits by their z-scores, sample by sample, before the temperature; beware
            of a student whose logits begin constant, as in `kd`.
    """

    needs_teacher = True
    needs_labels = True

    def __init__(
        self,
        *,
        alpha: Annotated[float, Field(ge=0)] = 1.0,
        beta: Annotated[float, Field(ge=0)] = 8.0,
        temperature: Annotated[float, Field(gt=0, le=1000)] = 4.0,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        if alpha == 0 and beta == 0:
            raise InputError("alpha and beta are both 0: nothing is left to learn; raise one")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.standardise = standardise

    @property
    def teacher_temperature(self) -> float | None:
        return None if self.standardise else self.temperature  # of z-scores, each sample has its own

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        notice_two_classes("dkd", student)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        own, other = student.logits, teacher.logits
        if self.standardise:
            own, other = standardised(own), standardised(other)
        return {"dkd": dkd_loss(own, other, batch.labels, self.alpha, self.beta, self.temperature)}

    def describe(self) -> str:
        squared = self.temperature**2
        line = (
            f"KL of label against rest x {self.alpha * squared:.4g} + KL among the rest x {self.beta * squared:.4g}"
            f" (alpha {self.alpha:g}, beta {self.beta:g}, T^2 at T {self.temperature:g}), mean over the batch"
        )
        return f"{line}; logits standardised" if self.standardise else line

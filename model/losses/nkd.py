"""Distillation with soft targets for the label, and normalised ones for the other classes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.base import Loss
from model.losses.logits import is_label, non_target_log_probs, notice_two_classes
from model.outputs import Batch, Outputs, Probe


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float, temperature: float
) -> Tensor:
    """Returns `-p_t(y) log p_s(y) - gamma T^2 sum_(c not y) q_t(c) log q_s(c)`, mean over the batch.

    p is the softmax at temperature 1, q that over all classes but the label's at T. The label is left out before the
    softmax, which is as finite as log_softmax is. With two classes the second part is 0.

    Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
    Loss and Customized Soft Labels", 2023, section 3.

    Args:
        student_logits: `(N, C)`, C at least 2.
        teacher_logits: `(N, C)`.
        labels: `(N,)`.
        gamma: Weight of the other classes' part.
        temperature: Of that part; above 0.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}")
    target = is_label(labels, student_logits.shape[1])
    target_part = (F.softmax(teacher_logits, dim=1) * F.log_softmax(student_logits, dim=1) * target).sum(dim=1)
    student_others = non_target_log_probs(student_logits / temperature, labels)
    teacher_others = non_target_log_probs(teacher_logits / temperature, labels)
    others_part = (teacher_others.exp() * student_others).sum(dim=1)  # in the label's place: 1 * 0
    return -(target_part + gamma * temperature**2 * others_part).mean()


@LOSSES.register("nkd")
class NKDLoss(Loss):
    """`-p_t(y) log p_s(y) - gamma * T^2 * sum over other classes of q_t log q_s`, mean over the batch.

    Two cross-entropies, so that the minimum is not 0. p is at temperature 1; q is normalised over all classes but the
    label's, at the temperature. With two classes the second is 0. The authors add cross-entropy with weight 1; they
    take `gamma` 3.5 and `temperature` 3 on CIFAR-100, 1.5 and 1 on ImageNet.

    Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
    Loss and Customized Soft Labels", 2023, section 3, and the authors' code, from which the T^2 is.

    Args:
        gamma: Weight of the other classes' part.
        temperature: Divides both networks' logits in the other classes' part.
    """

    needs_teacher = True
    needs_labels = True
    least_at_teacher = False

    def __init__(
        self,
        *,
        gamma: Annotated[float, Field(ge=0)] = 3.5,
        temperature: Annotated[float, Field(gt=0, le=1000)] = 3.0,
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.temperature = temperature

    @property
    def teacher_temperature(self) -> float | None:
        return 1.0 if self.temperature == 1 else None  # the label's part is at 1

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        notice_two_classes("nkd", student)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {"nkd": nkd_loss(student.logits, teacher.logits, batch.labels, self.gamma, self.temperature)}

    def describe(self) -> str:
        return (
            f"CE weighed by p_t of the label x 1 + soft CE among the rest x {self.gamma * self.temperature**2:.4g}"
            f" (gamma {self.gamma:g}, T^2 at T {self.temperature:g}), mean over the batch"
        )

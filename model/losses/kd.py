"""Distillation of softened logits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.base import Loss
from model.outputs import Batch, Outputs

Reduction = Literal["batchmean", "mean"]


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, reduction: Reduction = "batchmean"
) -> Tensor:
    """Returns `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, a scalar.

    The factor T^2 keeps the gradient's size about the same whatever the temperature. Both sides come from
    log_softmax, so that logit gaps of hundreds stay finite. The teacher's side is not detached here.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.

    Args:
        student_logits: `(N, C)`.
        teacher_logits: `(N, C)`.
        temperature: Above 0.
        reduction: `batchmean` is the KL divergence, summed over classes and averaged over the batch. `mean`
            divides by the number of classes as well, as kl_div's default does and the ancestor did.
    """
    if student_logits.shape != teacher_logits.shape:  # kl_div would broadcast a teacher batch of one in silence
        raise ValueError(f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}")
    student_log_probs = F.log_softmax(student_logits / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=1)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True)
    divergence = divergence * (temperature**2 / len(student_logits))
    return divergence / student_logits.shape[1] if reduction == "mean" else divergence


@LOSSES.register("kd")
class KDLoss(Loss):
    """`(1 - alpha) * CE(student, labels) + alpha * T^2 * KL(teacher || student)`; a term of weight 0 is not computed.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    Deviation: the paper leaves the weights open; here they sum to 1, the cross-entropy at temperature 1.

    Args:
        alpha: Weight of the teacher term; `1 - alpha` weighs the labels.
        temperature: Divides both networks' logits before the softmax; higher means softer targets.
        reduction: `batchmean` is the KL divergence averaged over the batch; `mean` also divides it by the number
            of classes, as the ancestor's code did.
    """

    def __init__(
        self,
        *,
        alpha: Annotated[float, Field(ge=0, le=1)],
        temperature: Annotated[float, Field(gt=0, le=1000)],
        reduction: Reduction = "batchmean",
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.needs_teacher = alpha > 0

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.alpha < 1:
            terms["ce"] = (1 - self.alpha) * F.cross_entropy(student.logits, batch.labels)
        if self.needs_teacher:
            assert teacher is not None, "without it a part of the loss would be missing in silence"
            terms["kd"] = self.alpha * kd_loss(student.logits, teacher.logits, self.temperature, self.reduction)
        return terms

    def describe(self) -> str:
        over = "batch" if self.reduction == "batchmean" else "batch and the classes"
        return (
            f"CE x {1 - self.alpha:.4g} + KL x {self.alpha:.4g} x {self.temperature**2:.4g}"
            f" (alpha {self.alpha:g}, T^2 at T {self.temperature:g}), mean over the {over}"
        )

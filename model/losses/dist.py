"""Distillation of correlations: of a sample's probabilities, and of a class's."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F

from model.errors import InputError
from model.losses import LOSSES
from model.losses.base import Loss
from model.outputs import Batch, Outputs

EPSILON = 1e-8


def correlations(own: Tensor, other: Tensor, dim: int) -> Tensor:
    """Returns Pearson's coefficient along a dimension of two matrices; of a constant row, 0.

    The denominator is the product of the two norms plus 1e-8, as in the authors' code.
    """
    own = own - own.mean(dim=dim, keepdim=True)
    other = other - other.mean(dim=dim, keepdim=True)
    norms = vector_norm(own, dim=dim) * vector_norm(other, dim=dim)
    return (own * other).sum(dim=dim) / (norms + EPSILON)


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    """Returns `T^2 (beta (1 - mean_i r(i)) + gamma (1 - mean_c r(c)))`, a scalar.

    `r(i)` is the correlation of the two networks' probabilities over the classes of sample i, `r(c)` that over the
    samples of class c. The second says nothing of a batch of one and is then left out.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022, sections 3 and 4.

    Args:
        student_logits: `(N, C)`.
        teacher_logits: `(N, C)`.
        beta: Weight of the part of samples.
        gamma: Weight of the part of classes.
        temperature: Above 0.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}")
    own, other = (F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    loss = beta * (1 - correlations(own, other, dim=1).mean())
    if len(own) > 1:
        loss = loss + gamma * (1 - correlations(own, other, dim=0).mean())
    return temperature**2 * loss


@LOSSES.register("dist")
class DISTLoss(Loss):
    """`T^2 * (beta * (1 - r of samples) + gamma * (1 - r of classes))` with r Pearson's correlation of probabilities.

    It asks of the student the teacher's order and proportions, not its very probabilities, which helps with a teacher
    much stronger than the student. The part of classes compares the samples of a batch: with batches that are small
    against the number of classes it is noisy, and of several processes each compares its own samples. Beside it the
    authors have cross-entropy with weight 1; they take `temperature` 4 on CIFAR-100 and 1 on ImageNet.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022, sections 3 and 4, and the authors'
    code.
    Deviation: from the paper, whose listing has no factor T^2; the authors' code has it, and so its weights are meant.

    Args:
        beta: Weight of the correlation over the classes, of each sample.
        gamma: Weight of the correlation over the samples, of each class; without effect in a batch of one.
        temperature: Divides both networks' logits before the softmax.
    """

    needs_teacher = True
    usual_weight = 2.0

    def __init__(
        self,
        *,
        beta: Annotated[float, Field(ge=0)] = 1.0,
        gamma: Annotated[float, Field(ge=0)] = 1.0,
        temperature: Annotated[float, Field(gt=0, le=1000)] = 4.0,
    ) -> None:
        super().__init__()
        if beta == 0 and gamma == 0:
            raise InputError("beta and gamma are both 0: nothing is left to learn; raise one")
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {"dist": dist_loss(student.logits, teacher.logits, self.beta, self.gamma, self.temperature)}

    def describe(self) -> str:
        squared = self.temperature**2
        return (
            f"(1 - correlation) of samples x {self.beta * squared:.4g} + of classes x {self.gamma * squared:.4g}"
            f" (beta {self.beta:g}, gamma {self.gamma:g}, T^2 at T {self.temperature:g}), means over batch and classes"
        )

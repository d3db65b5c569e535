"""Relational distillation: the distances between a batch's samples and the angles that they form."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.errors import InputError
from model.losses import LOSSES
from model.losses.adapters import embedding_widths, unit
from model.losses.base import Loss
from model.outputs import Batch, Outputs, Probe

CHUNK = 2**22  # entries of one array of the angles' computation, 16 MiB; some fifteen of them are there at a time


def distances(embedding: Tensor) -> Tensor:
    """Returns the distances of all pairs of samples, in units of their mean over pairs of different samples.

    Args:
        embedding: `(N, D)`, N at least 2; the result is `(N, N)`, 0 on the diagonal.
    """
    number = len(embedding)
    # Not by matrix products, whose rounding would be seen in the distances of close pairs.
    each = torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist")
    each = each.clamp_min(1e-6) * (1 - torch.eye(number, dtype=each.dtype, device=each.device))
    return each * (number * (number - 1) / each.sum())


def rkd_distance_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Returns the smooth L1 difference of both nets' distances, mean over all `N^2` pairs of samples.

    Of a single sample it is 0.

    Source: Park et al., "Relational Knowledge Distillation", 2019, section 3.2, distance-wise loss.

    Args:
        student_embedding: `(N, D)`.
        teacher_embedding: `(N, D')`.
    """
    if len(student_embedding) < 2:
        return 0 * student_embedding.sum()
    return F.smooth_l1_loss(distances(student_embedding), distances(teacher_embedding))


def angles(embedding: Tensor, first: int, last: int) -> Tensor:
    """Returns the cosines of the angles that all pairs of samples form at some of them.

    Args:
        embedding: `(N, D)`; the result is `(last - first, N, N)`, at `[k, i, j]` that between `x_i - x_k` and
            `x_j - x_k`, and 0 where one of these is 0.
        first: The first vertex k.
        last: The one behind the last.
    """
    sides = unit(embedding[None] - embedding[first:last, None], dim=2)
    return sides @ sides.mT


def angle_differences(student_embedding: Tensor, teacher_embedding: Tensor, first: int, last: int) -> Tensor:
    """Returns the smooth L1 difference of both nets' `angles`, sum over the triplets with a vertex among some."""
    own, other = (angles(embedding, first, last) for embedding in (student_embedding, teacher_embedding))
    return F.smooth_l1_loss(own, other, reduction="sum")


class AngleLoss(torch.autograd.Function):
    """Sums `angle_differences` over all vertices, a few at a time, and the student's gradient along with them.

    Left to autograd, the values of all `N^3` triplets would have to be kept for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, student_embedding: Tensor, teacher_embedding: Tensor, chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        student_embedding = student_embedding.detach()
        gradient = torch.zeros_like(student_embedding)
        total = student_embedding.new_zeros(())
        for first in range(0, len(student_embedding), chunk):
            with torch.set_grad_enabled(wanted):
                leaf = student_embedding.requires_grad_(wanted)
                part = angle_differences(leaf, teacher_embedding.detach(), first, first + chunk)
            total += part.detach()
            if wanted:
                gradient += torch.autograd.grad(part, leaf)[0]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None


def rkd_angle_loss(student_embedding: Tensor, teacher_embedding: Tensor, chunk: int | None = None) -> Tensor:
    """Returns the smooth L1 difference of both nets' angles, mean over all `N^3` triplets of samples.

    Of a single sample it is 0. The teacher's side is detached.

    Source: Park et al., "Relational Knowledge Distillation", 2019, section 3.2, angle-wise loss.

    Args:
        student_embedding: `(N, D)`.
        teacher_embedding: `(N, D')`.
        chunk: How many vertices at a time; None: so many that one array has about `CHUNK` entries.
    """
    number, width = len(student_embedding), max(student_embedding.shape[1], teacher_embedding.shape[1])
    chunk = chunk or max(CHUNK // (number * max(number, width)), 1)
    total: Tensor = AngleLoss.apply(student_embedding, teacher_embedding, chunk)
    return total / number**3


@LOSSES.register("rkd")
class RKDLoss(Loss):
    """`distance_weight` times the smooth L1 difference of distances plus `angle_weight` times that of angles.

    Distances are those of all pairs of a batch's embeddings, in units of their mean; angles are the cosines of all
    triplets. Their number grows with the third power of the batch's size; the memory that they take does not. Of
    several processes each compares the samples of its own part.

    Source: Park et al., "Relational Knowledge Distillation", 2019, section 3.2, as in RepDistiller.

    Args:
        distance_weight: Weight of the distances; 0 leaves them out.
        angle_weight: Weight of the angles; 0 leaves them out.
    """

    needs = frozenset({"embedding"})
    needs_teacher = True
    trains_classifier = False
    batch_factor = None

    def __init__(
        self,
        *,
        distance_weight: Annotated[float, Field(ge=0)] = 25.0,
        angle_weight: Annotated[float, Field(ge=0)] = 50.0,
    ) -> None:
        super().__init__()
        if distance_weight == angle_weight == 0:
            raise InputError("distance_weight and angle_weight are both 0: nothing is left of the loss; raise one")
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        embedding_widths("rkd", student, teacher)  # refuses nets without embedding

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        assert student.embedding is not None
        assert teacher.embedding is not None
        terms = {}
        if self.distance_weight:
            terms["rkd_distance"] = self.distance_weight * rkd_distance_loss(student.embedding, teacher.embedding)
        if self.angle_weight:
            terms["rkd_angle"] = self.angle_weight * rkd_angle_loss(student.embedding, teacher.embedding)
        return terms

    def describe(self) -> str:
        return (
            f"smooth L1 of distances x {self.distance_weight:.4g} + smooth L1 of angles x {self.angle_weight:.4g}"
            " between embeddings, mean over all pairs and all triplets"
        )

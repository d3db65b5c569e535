"""Probabilistic knowledge transfer: which samples of a batch are neighbours in the space of the embedding."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from model.losses import LOSSES
from model.losses.adapters import embedding_widths
from model.losses.base import Loss
from model.outputs import Batch, Outputs, Probe

EPS = 1e-7


def neighbours(embedding: Tensor, eps: float = EPS) -> Tensor:
    """Returns `(cos + 1) / 2` of all pairs of samples, itself included, each row divided by its sum.

    Args:
        embedding: `(N, D)`; the result is `(N, N)`.
        eps: Added to the norms.
    """
    directions = embedding / (torch.linalg.vector_norm(embedding, dim=1, keepdim=True) + eps)
    # Rounding can take a cosine below -1, and the logarithm of what follows would be a NaN.
    kernel = ((directions @ directions.mT + 1) / 2).clamp_min(0)
    return kernel / kernel.sum(1, keepdim=True)


def pkt_loss(student_embedding: Tensor, teacher_embedding: Tensor, eps: float = EPS) -> Tensor:
    """Returns `t log(t / s)`, mean over all pairs of samples; s and t are the probabilities of `neighbours`.

    Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", 2018, section 3,
    with the cosine kernel.
    Deviation: the divergence is a mean over all entries, as in the authors' code, not a sum.

    Args:
        student_embedding: `(N, D)`.
        teacher_embedding: `(N, D')`.
        eps: Added to norms and probabilities.
    """
    own, other = neighbours(student_embedding, eps), neighbours(teacher_embedding, eps)
    return (other * ((other + eps) / (own + eps)).log()).mean()


@LOSSES.register("pkt")
class PKTLoss(Loss):
    """Divergence of the teacher's and the student's probabilities that one sample of a batch is another's neighbour.

    The probabilities are `(cos + 1) / 2` of two embeddings, divided by the sum over a sample's partners. The mean over
    all pairs is small, hence the usual weight; a batch of twice the size has about half the loss. Of several processes
    each compares the samples of its own part.

    Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", 2018, section 3,
    with the cosine kernel, as in RepDistiller.
    Deviation: the divergence is a mean over all pairs, as in the authors' code, not a sum.

    Args:
        eps: Added to norms and probabilities.
    """

    needs = frozenset({"embedding"})
    needs_teacher = True
    usual_weight = 30000.0
    trains_classifier = False
    batch_factor = 0.5

    def __init__(self, *, eps: Annotated[float, Field(gt=0, le=1e-3)] = EPS) -> None:
        super().__init__()
        self.eps = eps

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        embedding_widths("pkt", student, teacher)  # refuses nets without embedding

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        assert student.embedding is not None
        assert teacher.embedding is not None
        return {"pkt": pkt_loss(student.embedding, teacher.embedding, self.eps)}

    def describe(self) -> str:
        return f"KL of the samples' neighbourhoods (cosines of embeddings, eps {self.eps:g}), mean over all pairs"

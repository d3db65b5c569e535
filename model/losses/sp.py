"""Similarity preservation: which samples of a batch are alike on the last map."""

from __future__ import annotations

from torch import Tensor

from model.losses import LOSSES
from model.losses.adapters import unit
from model.losses.base import Loss
from model.losses.stages import Stages
from model.outputs import Batch, Outputs, Probe


def similarities(maps: Tensor) -> Tensor:
    """Returns the inner products of all pairs of samples, each row of length 1.

    Args:
        maps: `(N, ...)`; the result is `(N, N)`, with a row of 0 for a sample that is all 0.
    """
    vectors = maps.flatten(1)
    return unit(vectors @ vectors.mT, dim=1)


def sp_loss(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Returns the squared difference of both nets' similarities, mean over all pairs of samples.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019.

    Args:
        student_maps: `(N, C, H, W)`.
        teacher_maps: `(N, C', H', W')`, of any shape.
    """
    return (similarities(student_maps) - similarities(teacher_maps)).square().mean()


@LOSSES.register("sp")
class SPLoss(Loss):
    """Squared difference of the similarities of a batch's samples on the last map, mean over all pairs.

    A sample's similarities to all of the batch are inner products, as a vector of length 1. A batch of twice the size
    has about half the loss. Of several processes each compares the samples of its own part.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019, as in RepDistiller.
    """

    needs = frozenset({"features"})
    needs_teacher = True
    usual_weight = 3000.0
    trains_classifier = False
    batch_factor = 0.5

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        Stages("sp", "features", student, teacher)  # refuses nets without maps

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {"sp": sp_loss(student.features[-1], teacher.features[-1])}

    def describe(self) -> str:
        return "MSE of the samples' similarities on the last map (rows of length 1), mean over all pairs"

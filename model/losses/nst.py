"""Neuron selectivity transfer: the patterns of a stage's channels, as a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from model.losses import LOSSES
from model.losses.adapters import match_sizes, unit
from model.losses.stages import StagedLoss, StageList, Stages, describe_pairs, paired
from model.outputs import Batch, Outputs, Probe


def mean_kernel(own: Tensor, other: Tensor) -> Tensor:
    """Returns `(x . y)^2`, mean over the batch and all pairs of a channel x of the one and a channel y of the other.

    Neither way of summing has an intermediate that is larger than both of its arguments.

    Args:
        own: `(N, C, P)`, P positions.
        other: `(N, C', P)`.
    """
    (number, channels, positions), others = own.shape, other.shape[1]
    if channels * others <= positions**2:
        total = (own @ other.mT).square().sum()
    else:  # |X Y^T|^2 = <X^T X, Y^T Y>
        total = ((own.mT @ own) * (other.mT @ other)).sum()
    return total / (number * channels * others)


def nst_loss(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Returns the squared distance of the mean channel of both nets in the space of `k(x, y) = (x . y)^2`.

    Each channel's map is a vector of length 1; the mean over the batch is taken.

    Source: Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, section 4.

    Args:
        student_maps: `(N, C, H, W)`.
        teacher_maps: `(N, C', H', W')`; the larger of both is average-pooled to the size of the smaller.
    """
    own, other = (unit(maps.flatten(2), dim=2) for maps in match_sizes(student_maps, teacher_maps))
    with torch.no_grad():
        constant = mean_kernel(other, other)
    return constant + mean_kernel(own, own) - 2 * mean_kernel(own, other)


@LOSSES.register("nst")
class NSTLoss(StagedLoss):
    """Squared maximum mean discrepancy of the two nets' channels with the kernel `(x . y)^2`, sum over the stages.

    A channel's map counts as a vector of length 1.

    Source: Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, section 4,
    with the polynomial kernel, as in RepDistiller.

    Args:
        student_stages: The student's stages, counted from 1; null: all, one to one, if both nets have as many; else the
            last stage of every map size that both have.
        teacher_stages: The teacher's stages that they meet; null as before.
    """

    needs = frozenset({"features"})
    needs_teacher = True
    usual_weight = 50.0
    trains_classifier = False

    def __init__(self, *, student_stages: StageList | None = None, teacher_stages: StageList | None = None) -> None:
        super().__init__(student_stages, teacher_stages)

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        self.pairs = Stages("nst", "features", student, teacher).pairs(self.student_stages, self.teacher_stages)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        maps = paired(self.pairs, student.features, teacher.features)
        return {"nst": torch.stack([nst_loss(*pair) for pair in maps]).sum()}

    def describe(self) -> str:
        return (
            f"squared MMD of the channels (kernel (x . y)^2, maps of length 1), sum over {describe_pairs(self.pairs)},"
            " mean over the batch and the channels"
        )

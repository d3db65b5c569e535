"""Attention transfer: where on a map the responses are strong."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from model.losses import LOSSES
from model.losses.adapters import match_sizes, unit
from model.losses.stages import StagedLoss, StageList, Stages, describe_pairs, paired
from model.outputs import Batch, Outputs, Probe


def attention(maps: Tensor, p: float = 2.0) -> Tensor:
    """Returns the mean of `|f|^p` over the channels, as vectors of length 1.

    Args:
        maps: `(N, C, H, W)`; the result is `(N, H * W)`, all 0 for a sample whose maps are.
        p: At least 1; the higher, the more the strongest channels count.
    """
    return unit(maps.abs().pow(p).mean(1).flatten(1), dim=1)


def at_loss(student_maps: Tensor, teacher_maps: Tensor, p: float = 2.0) -> Tensor:
    """Returns the squared difference of the attention maps of one pair of stages, mean over samples and positions.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, section 3.1.
    Deviation: theirs is a norm of the difference in the paper; here, as in their code and in RepDistiller, it is a mean
    of squares.

    Args:
        student_maps: `(N, C, H, W)`.
        teacher_maps: `(N, C', H', W')`; the larger of both is average-pooled to the size of the smaller.
        p: Power of the responses, at least 1.
    """
    own, other = match_sizes(student_maps, teacher_maps)
    return (attention(own, p) - attention(other, p)).square().mean()


@LOSSES.register("at")
class ATLoss(StagedLoss):
    """Squared difference of attention maps, `mean_c |f|^p` of length 1, mean over samples and positions, all stages.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, section 3.1, as in RepDistiller.
    Deviation: the paper has a norm of the difference; here, as in the authors' code, it is a mean of squares.

    Args:
        p: Power of the responses; the higher, the more the strongest channels count.
        student_stages: The student's stages, counted from 1; null: all, one to one, if both nets have as many; else the
            last stage of every map size that both have.
        teacher_stages: The teacher's stages that they meet; null as before.
    """

    needs = frozenset({"features"})
    needs_teacher = True
    usual_weight = 1000.0
    trains_classifier = False

    def __init__(
        self,
        *,
        p: Annotated[float, Field(ge=1, le=10)] = 2.0,
        student_stages: StageList | None = None,
        teacher_stages: StageList | None = None,
    ) -> None:
        super().__init__(student_stages, teacher_stages)
        self.p = p

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        self.pairs = Stages("at", "features", student, teacher).pairs(self.student_stages, self.teacher_stages)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        maps = paired(self.pairs, student.features, teacher.features)
        return {"at": torch.stack([at_loss(own, other, self.p) for own, other in maps]).sum()}

    def describe(self) -> str:
        return (
            f"MSE of attention maps (mean of |f|^{self.p:g} over the channels, of length 1), sum over"
            f" {describe_pairs(self.pairs)}, mean over the batch and the map"
        )

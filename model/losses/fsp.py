"""Flow of the solution procedure: how channels of one stage go with those of the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from model.losses import LOSSES
from model.losses.adapters import match_sizes
from model.losses.stages import StagedLoss, StageList, Stages, describe_pairs, paired
from model.outputs import Batch, Outputs, Probe


def flow(maps: Tensor, following: Tensor) -> Tensor:
    """Returns the products of each two channels of a stage's map and the next one's, mean over the positions.

    Args:
        maps: `(N, C, H, W)`.
        following: `(N, D, H', W')`; the larger of both is average-pooled to the size of the smaller.

    Returns:
        `(N, D, C)`.
    """
    maps, following = (each.flatten(2) for each in match_sizes(maps, following))
    return following @ maps.transpose(1, 2) / maps.shape[2]


def fsp_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Returns the squared difference of the flows, mean over a matrix and the batch, sum over neighbouring stages.

    Source: Yim et al., "A Gift from Knowledge Distillation", 2017, equations 1 and 2.
    Deviation: the paper sums over a matrix; here, as in RepDistiller, it is a mean.

    Args:
        student_maps: Of each stage, from the first to the last, at least two, `(N, C_i, H_i, W_i)`.
        teacher_maps: As many, `(N, C_i, H_i', W_i')`.
    """
    own, other = (
        [flow(maps, following) for maps, following in pairwise(stages)] for stages in (student_maps, teacher_maps)
    )
    return torch.stack([(s - t).square().mean() for s, t in zip(own, other, strict=True)]).sum()


@LOSSES.register("fsp")
class FSPLoss(StagedLoss):
    """Squared difference of the flows between neighbouring stages, in a stage of its own before the others count.

    A flow is the matrix of products of channels of two stages, mean over the positions. In the first `initial_epochs`
    epochs this loss counts alone, afterwards it is 0 and the others count: it gives the student weights to begin with.
    So its weight says nothing about its share; it acts as a factor of the learning rate in those epochs.

    Source: Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
    Learning", 2017, section 3, as in RepDistiller.
    Deviation: as in that code a matrix's squares are averaged, not summed. There is no flow from the stem to the first
    stage, as a stem is no stage. The student is in train mode throughout, and optimizer and schedule go on from one
    stage to the other.

    Args:
        initial_epochs: Epochs in which it counts, and alone.
        student_stages: The student's stages from the first to the last, counted from 1, at least two; null: all, one to
            one, if both nets have as many; else the last stage of every map size that both have.
        teacher_stages: The teacher's stages that they meet, with as many channels; null as before.
    """

    needs = frozenset({"features"})
    needs_teacher = True
    trains_classifier = False
    ordered = True
    initial_only = True

    def __init__(
        self,
        *,
        initial_epochs: Annotated[int, Field(ge=1)] = 30,
        student_stages: StageList | None = None,
        teacher_stages: StageList | None = None,
    ) -> None:
        super().__init__(student_stages, teacher_stages)
        self.initial_epochs = initial_epochs

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        stages = Stages("fsp", "features", student, teacher)
        self.pairs = stages.pairs(self.student_stages, self.teacher_stages)
        if len(self.pairs) < 2:
            raise stages.error("a flow is between two stages, and only one is paired")
        for own, other in self.pairs:
            student_shape, teacher_shape = stages.shapes(own, other)
            if student_shape[0] != teacher_shape[0]:
                raise stages.error(
                    f"student stage {own} and teacher stage {other} have {student_shape[0]} and {teacher_shape[0]}"
                    " channels, which must be as many"
                )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        own, other = zip(*paired(self.pairs, student.features, teacher.features), strict=True)
        return {"fsp": fsp_loss(own, other)}

    def describe(self) -> str:
        return (
            f"MSE of the flows between neighbouring stages, sum over {describe_pairs(self.pairs)}, mean over the batch"
            f" and the matrix (in the first {self.initial_epochs} epochs, alone)"
        )

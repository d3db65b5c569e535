"""Correlation congruence, in the form that is known from benchmarks: products of neighbouring samples' differences."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from model.losses import LOSSES
from model.losses.adapters import embedding_widths
from model.losses.base import Loss
from model.outputs import Batch, Outputs, Probe


def cc_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Returns `sum_d delta[i, d] * delta[i + 1, d]`, mean over neighbours in the batch; `delta = |student - teacher|`.

    Of a single sample it is 0.

    Source: RepDistiller, for Peng et al., "Correlation Congruence for Knowledge Distillation", 2019.

    Args:
        student_embedding: `(N, D)`.
        teacher_embedding: `(N, D)`.
    """
    if student_embedding.shape != teacher_embedding.shape:
        shapes = f"{tuple(student_embedding.shape)}, teacher embedding {tuple(teacher_embedding.shape)}"
        raise ValueError(f"student embedding {shapes}")
    delta = (student_embedding - teacher_embedding).abs()
    return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)


@LOSSES.register("cc")
class CCLoss(Loss):
    """Products of the embeddings' absolute differences in neighbouring samples of a batch.

    They are summed over the width and averaged over the batch. Both nets' embeddings pass a linear map of their own
    first, which is trained. Beware: the maps can shrink to lower the loss, whatever the student does, so keep its
    weight small; and the value depends on the order of the batch. Of several processes each takes the neighbours of its
    own part.

    Source: Peng et al., "Correlation Congruence for Knowledge Distillation", 2019, as in RepDistiller.
    Deviation: the paper compares matrices of a kernel between all samples; this is what RepDistiller computes under the
    same name, and published.

    Args:
        width: Length of the vectors that the linear maps make.
    """

    needs = frozenset({"embedding"})
    needs_teacher = True
    usual_weight = 0.02
    trains_classifier = False
    least_at_teacher = False  # the two linear maps begin with different weights
    batch_factor = None
    order_matters = True

    def __init__(self, *, width: Annotated[int, Field(ge=1)] = 128) -> None:
        super().__init__()
        self.width = width

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        own, other = embedding_widths("cc", student, teacher)
        self.student_map = nn.Linear(own, self.width)
        self.teacher_map = nn.Linear(other, self.width)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {"cc": cc_loss(self.student_map(student.embedding), self.teacher_map(teacher.embedding))}

    def describe(self) -> str:
        return (
            f"products of |student - teacher| in neighbouring samples (embeddings through linear maps to {self.width},"
            " both trained), sum over the map's outputs, mean over the batch"
        )

"""Cross-entropy with the labels: training without a teacher."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.base import Loss
from model.outputs import Batch, Outputs


@LOSSES.register("ce")
class CELoss(Loss):
    """Cross-entropy of the student's logits with the labels, mean over the batch.

    Source: label smoothing as in Szegedy et al., "Rethinking the Inception Architecture", 2016, section 7.

    Args:
        label_smoothing: Share of the target spread evenly over all classes.
    """

    needs_labels = True
    least_at_teacher = False

    def __init__(self, *, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)}

    def describe(self) -> str:
        smoothing = f" with label smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return f"CE x 1{smoothing}, mean over the batch"

"""Distillation at a temperature that is learnt against the student."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from model.losses import LOSSES
from model.losses.base import Loss
from model.losses.kd import kd_loss
from model.outputs import Batch, Outputs


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return ctx.factor * gradients[0], None


def reversal(epoch: int, epochs: int) -> float:
    """Returns what the temperature's gradient is multiplied by in an epoch, counted from 0.

    Half a cosine from 0, before the first epoch, to -1 in the last of `epochs`; -1 from then on.

    Source: Li et al., "Curriculum Temperature for Knowledge Distillation", 2023, section 3.
    """
    return (math.cos(math.pi * min((epoch + 1) / epochs, 1.0)) - 1) / 2


@LOSSES.register("ctkd")
class CTKDLoss(Loss):
    """`T^2 * KL(teacher || student)` at `T = 1 + 20 * sigmoid(theta)`, theta learnt to make it harder.

    One theta for all samples (the "global" form). It is optimised with the student, but its gradient is multiplied by a
    number that falls from 0 to -1: the student lowers the loss, theta raises it, more and more so. It begins at 1, and
    so the temperature at 15.62. Beside it the authors have cross-entropy with weight 0.1:
    `[{"name": "ce", "weight": 0.1}, {"name": "ctkd"}]`. The weight of this loss scales theta's gradient, too.

    Source: Li et al., "Curriculum Temperature for Knowledge Distillation", 2023, section 3.

    Args:
        reversal_epochs: How many epochs theta's gradient takes to be fully reversed; the authors have 10 on CIFAR-100
            and 5 on ImageNet.
    """

    needs_teacher = True
    teacher_temperature = None  # it is learnt
    usual_weight = 0.9

    def __init__(self, *, reversal_epochs: Annotated[int, Field(ge=1)] = 10) -> None:
        super().__init__()
        self.reversal_epochs = reversal_epochs
        self.theta = nn.Parameter(torch.ones(()))
        self.on_epoch(0)

    def on_epoch(self, epoch: int) -> None:
        self.factor = reversal(epoch, self.reversal_epochs)

    def temperature(self) -> Tensor:
        """Returns the temperature, a scalar between 1 and 21; its gradient is the reversed one."""
        return 1 + 20 * torch.sigmoid(ScaledGradient.apply(self.theta, self.factor))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {"ctkd": kd_loss(student.logits, teacher.logits, self.temperature())}

    def describe(self) -> str:
        with torch.no_grad():
            temperature = self.temperature().item()
        return (
            f"KL x T^2, mean over the batch; T = 1 + 20 sigmoid(theta), now {temperature:.4g}, learnt with a gradient"
            f" that is reversed over {self.reversal_epochs} epochs"
        )

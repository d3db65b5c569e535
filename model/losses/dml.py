"""Nets that learn together, each from the labels and from the others: deep mutual learning."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.base import Loss
from model.losses.kd import kd_loss
from model.outputs import Batch, Outputs


def mimicry(logits: list[Tensor], temperature: float = 1.0) -> list[Tensor]:
    """Returns, for each net of a cohort, the mean over the others of `T^2 KL(other || net)`, the others detached.

    Source: Zhang et al., "Deep Mutual Learning", 2018, equations 5 and 10.

    Args:
        logits: `(N, C)` of each net, at least two.
        temperature: Above 0; 1 in the paper.
    """
    lessons = [
        [kd_loss(own, other.detach(), temperature) for j, other in enumerate(logits) if j != k]
        for k, own in enumerate(logits)
    ]
    return [torch.stack(lesson).mean() for lesson in lessons]


@LOSSES.register("dml")
class DMLLoss(Loss):
    """Mutual learning: the student and its peers teach each other at every step; there is no teacher.

    The term `dml` is the student's own, `KL(peer || student)`, and stands beside the `ce` that its section names. Each
    peer learns from `peers`: its cross-entropy with the labels plus its own KL terms. No gradient crosses from one net
    to another, so with `weight` other than 1 the peers learn at another rate than the student.

    Source: Zhang et al., "Deep Mutual Learning", 2018, section 2.
    Deviation: the nets take their steps at once, from the same logits, where the paper updates one after the other.

    Args:
        peers: The nets that learn beside the student, each a section as `student`; null: one of the student's own kind
            with other initial weights. They are kept in the checkpoints beside the student and are not a part of it.
        temperature: Divides all logits before the softmax.
    """

    trains_classifier = False  # it brings nets together, wherever that may be: beside it something must say where
    least_at_teacher = False  # there is no teacher

    def __init__(
        self,
        *,
        peers: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None,
        temperature: Annotated[float, Field(gt=0, le=1000)] = 1.0,
    ) -> None:
        super().__init__()
        self.sections = peers or [{}]
        self.temperature = temperature

    @property
    def peer_sections(self) -> list[dict[str, Any]]:
        return self.sections

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        own, *others = mimicry([student.logits, *student.peer_logits], self.temperature)
        labels = batch.labels
        learnt = [F.cross_entropy(logits[: len(labels)], labels) for logits in student.peer_logits]
        return {"dml": own, "peers": torch.stack([*learnt, *others]).sum()}

    def describe(self) -> str:
        number = len(self.sections)
        return (
            f"KL of {number} peer{'s' * (number > 1)} to the student at T {self.temperature:g}, and for each peer"
            " CE x 1 + KL of the others; mean over the batch and the others"
        )

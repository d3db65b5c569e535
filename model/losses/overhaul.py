"""Regression of the teacher's maps before their ReLU: "overhaul" distillation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.adapters import pooled
from model.losses.stages import StagedLoss, StageList, Stages, describe_pairs, paired
from model.outputs import Batch, Outputs, Probe


def margins(weight: Tensor, bias: Tensor) -> Tensor:
    """Returns the mean negative response `E[x | x < 0]` of each channel of a batch norm, `x ~ N(bias, weight^2)`.

    A channel of which less than a thousandth is negative gets `-3 |weight|`.

    Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019, section 3.

    Args:
        weight: `(C,)`, gamma; its sign does not matter. With 0, x is the bias.
        bias: `(C,)`, beta.
    """
    std = weight.abs()
    ratio = bias / std  # infinite for a constant channel; that of 0, a NaN, is not above 0.001 either
    below = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / (2 * torch.pi) ** 0.5
    return torch.where(below > 0.001, bias - std * density / below, -3 * std)


def partial_l2(student_maps: Tensor, teacher_maps: Tensor, margin: Tensor) -> Tensor:
    """Returns the squared distance to the teacher's map, summed over the map and averaged over the batch.

    The teacher's responses below the margin are raised to it. Where a target is negative and the student is below it
    already, nothing is counted: behind the ReLU both are 0.

    Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019, section 3.

    Args:
        student_maps: `(N, C, H, W)`, through the connector.
        teacher_maps: `(N, C, H, W)`, before the ReLU.
        margin: `(C,)`.
    """
    if student_maps.shape != teacher_maps.shape:
        raise ValueError(f"student maps {tuple(student_maps.shape)}, teacher maps {tuple(teacher_maps.shape)}")
    target = torch.maximum(teacher_maps, margin.view(1, -1, 1, 1))
    counted = (student_maps > target) | (teacher_maps > 0)
    return ((student_maps - target).square() * counted).sum() / len(student_maps)


class Connector(nn.Module):
    """Fits the student's channels to the teacher's; returns the distance of what comes out from the teacher's maps.

    The teacher's maps are average-pooled where they are larger.
    """

    margin: Tensor

    def __init__(self, student_channels: int, margin: Tensor) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_channels, len(margin), 1, bias=False)
        nn.init.normal_(self.conv.weight, std=(2 / len(margin)) ** 0.5)
        self.norm = nn.BatchNorm2d(len(margin))
        self.register_buffer("margin", margin)

    def forward(self, student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
        return partial_l2(
            self.norm(self.conv(student_maps)), pooled(teacher_maps, *student_maps.shape[2:]), self.margin
        )


@LOSSES.register("overhaul")
class OverhaulLoss(StagedLoss):
    """Partial L2 distance of maps before the ReLU, a map of each size.

    The distances are sums over a map, the deepest with weight 1, each one before it with half of the next one's.
    The authors took a weight of 1e-3 for 32x32 images, which is the usual one here, and 1e-4 for 224x224. Beware of
    light students and of those unlike their teacher, where it can do harm: their MobileNetV2, taught by a ResNet50, had
    28.13 % error without the term, 30.22 % with it and 27.52 % with a hundredth of its weight. Search it on a
    logarithmic scale.

    Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation", 2019, section 3, and the authors' code and
    remarks (clovaai/overhaul-distillation).

    Args:
        teacher_statistics: In training the teacher's batch norms normalise with the statistics of the `batch`, as the
            authors advise, or with their own `running` ones. Validation always uses the latter. Of several processes
            each has the statistics of its own part of the batch.
        student_stages: The student's stages from the first to the last, counted from 1; null: the last stage of every
            map size that both nets have.
        teacher_stages: The teacher's stages that they meet, whose maps are not smaller; null as before.
    """

    needs = frozenset({"preacts"})
    needs_teacher = True
    usual_weight = 1e-3
    trains_classifier = False
    ordered = True
    least_at_teacher = False  # the connectors begin with random weights

    def __init__(
        self,
        *,
        teacher_statistics: Literal["batch", "running"] = "batch",
        student_stages: StageList | None = None,
        teacher_stages: StageList | None = None,
    ) -> None:
        super().__init__(student_stages, teacher_stages)
        self.teacher_statistics = teacher_statistics
        self.connectors = nn.ModuleList()

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        stages = Stages("overhaul", "preacts", student, teacher)
        norms = getattr(teacher.net, "stage_norms", ())
        if len(norms) != len(stages.teacher.shapes):
            raise stages.error("the teacher has no batch norm in front of each stage's last activation")
        if getattr(teacher.net, "activation", F.relu) is not F.relu:
            raise stages.error("the last activation of the teacher's stages is not a ReLU")
        self.pairs = stages.pairs(self.student_stages, self.teacher_stages, by_size=True)
        for own, other in self.pairs:
            student_shape, teacher_shape = stages.shapes(own, other)
            if any(size > most for size, most in zip(student_shape[1:], teacher_shape[1:], strict=True)):
                raise stages.error(f"the maps of student stage {own} are larger than those of teacher stage {other}")
            norm = norms[other - 1]
            margin = margins(norm.weight.detach(), norm.bias.detach())
            self.connectors.append(Connector(student_shape[0], margin))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        maps = paired(self.pairs, student.preacts, teacher.preacts)
        distances = [connector(*pair) for connector, pair in zip(self.connectors, maps, strict=True)]
        halved = [distance / 2**level for level, distance in enumerate(reversed(distances))]
        return {"overhaul": torch.stack(halved).sum()}

    def describe(self) -> str:
        return (
            f"partial L2 of {describe_pairs(self.pairs)} (the last x 1, each one before it x 1/2 of the next), summed"
            f" over a map, mean over the batch; in training the teacher's batch norms have {self.teacher_statistics}"
            " statistics"
        )

"""Knowledge review: each of the student's stages, with all that are deeper, learns from the teacher's."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.adapters import embedding_widths, pooled
from model.losses.stages import StagedLoss, StageList, Stages, describe_pairs, paired
from model.outputs import Batch, Outputs, Probe


def hcl_loss(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """Returns the squared difference of maps as they are and pooled to 4x4, 2x2 and 1x1, the hierarchical context loss.

    The weights are 1, 1/2, 1/4 and 1/8, divided by their sum; sizes that are not smaller than the map are left out, and
    those that are left have weights from 1/2 on.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", 2021, section 3; the weights of mdistiller.

    Args:
        student_maps: `(N, C, H, W)`, fused and fitted.
        teacher_maps: `(N, C, H, W)`.
    """
    if student_maps.shape != teacher_maps.shape:
        raise ValueError(f"student maps {tuple(student_maps.shape)}, teacher maps {tuple(teacher_maps.shape)}")
    loss, weight, weights = F.mse_loss(student_maps, teacher_maps), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(student_maps.shape[2:]):
            weight /= 2
            weights += weight
            loss = loss + weight * F.mse_loss(pooled(student_maps, size, size), pooled(teacher_maps, size, size))
    return loss / weights


class Fusion(nn.Module):
    """Attention-based fusion of a stage's maps with what is left of the deeper ones, fitted to the teacher's channels.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", 2021, section 3, as in mdistiller.

    Args:
        student_channels: Of the stage's maps.
        channels: In between.
        teacher_channels: Of what comes out.
        deepest: There is nothing deeper to fuse with.
    """

    def __init__(self, student_channels: int, channels: int, teacher_channels: int, deepest: bool = False) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(student_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.fit = nn.Sequential(
            nn.Conv2d(channels, teacher_channels, 3, padding=1, bias=False), nn.BatchNorm2d(teacher_channels)
        )
        self.gates = None if deepest else nn.Conv2d(2 * channels, 2, 1)

    def forward(self, maps: Tensor, residual: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns the fitted maps `(N, teacher_channels, *size)` and the residual for the next stage.

        Args:
            maps: `(N, student_channels, H, W)`.
            residual: `(N, channels, H', W')`; None at the deepest stage.
            size: Height and width of the teacher's maps.
        """
        fused = self.narrow(maps)
        if self.gates is not None:
            assert residual is not None
            residual = resized(residual, (fused.shape[2], fused.shape[3]))
            own, other = self.gates(torch.cat([fused, residual], dim=1)).sigmoid().split(1, dim=1)
            fused = fused * own + residual * other
        fused = resized(fused, size)
        return self.fit(fused), fused


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns maps with their nearest values at another height and width."""
    return maps if maps.shape[2:] == size else F.interpolate(maps, size)


@LOSSES.register("reviewkd")
class ReviewKDLoss(StagedLoss):
    """Squared differences, at several scales, of the student's fused maps and the teacher's before the ReLU.

    From the deepest level on, the embedding as a map of 1x1, each level of the student is fused with what is left of
    the deeper ones, and fitted to the teacher's. The authors' weight is 5 for resnet32x4 to resnet8x4, 0.6 for resnet56
    to resnet20, 1 for resnet110 to resnet32 and 8 for ShuffleNetV2, all with a warm-up of 20 epochs:
    `"weight": {"name": "constant", "value": 5, "warmup_epochs": 20}`.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", 2021, section 3, as in mdistiller.

    Args:
        max_channels: Channels of a fused map; as many as features of the student's embedding, if it has fewer.
        student_stages: The student's stages from the first to the last, counted from 1; null: all, one to one, if both
            nets have as many; else the last stage of every map size that both have.
        teacher_stages: The teacher's stages that they meet; null as before.
    """

    needs = frozenset({"features", "preacts", "embedding"})
    needs_teacher = True
    usual_weight = 5.0
    trains_classifier = False
    ordered = True
    least_at_teacher = False

    def __init__(
        self,
        *,
        max_channels: Annotated[int, Field(ge=1)] = 512,
        student_stages: StageList | None = None,
        teacher_stages: StageList | None = None,
    ) -> None:
        super().__init__(student_stages, teacher_stages)
        self.max_channels = max_channels
        self.channels = max_channels
        self.fusions = nn.ModuleList()  # from the deepest level to the first

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        stages = Stages("reviewkd", "features", student, teacher)
        self.pairs = stages.pairs(self.student_stages, self.teacher_stages)
        if not teacher.outputs.preacts:
            raise stages.error(f"{stages.teacher.name} does not give those before the last activation, which it reads")
        widths = embedding_widths("reviewkd", student, teacher)
        self.channels = min(self.max_channels, widths[0])
        self.fusions.append(Fusion(widths[0], self.channels, widths[1], deepest=True))
        for own, other in reversed(self.pairs):
            student_shape, teacher_shape = stages.shapes(own, other)
            self.fusions.append(Fusion(student_shape[0], self.channels, teacher_shape[0]))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        assert student.embedding is not None
        assert teacher.embedding is not None
        levels = [*paired(self.pairs, student.features, teacher.preacts)]
        levels.append((student.embedding[:, :, None, None], teacher.embedding[:, :, None, None]))
        losses: list[Tensor] = []
        residual = None
        for fusion, (maps, target) in zip(self.fusions, reversed(levels), strict=True):
            fitted, residual = fusion(maps, residual, (target.shape[2], target.shape[3]))
            losses.append(hcl_loss(fitted, target))
        return {"reviewkd": torch.stack(losses).sum()}

    def describe(self) -> str:
        return (
            f"MSE at several scales of maps fused from the deepest on ({self.channels} channels), sum over the"
            f" embedding and {describe_pairs(self.pairs)}, mean over the batch and the map"
        )

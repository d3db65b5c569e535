"""A student that ends in its teacher's classifier: a projector makes maps as the teacher's of its own last ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from model.outputs import Outputs, features_of
from model.taps import classifier_of, set_taps


def projector(student_channels: int, teacher_channels: int, factor: int) -> nn.Sequential:
    """Returns convolutions 1x1, 3x3 and 1x1, with batch norm and a ReLU between them, that keep the size of a map.

    Args:
        student_channels: Of the maps that go in.
        teacher_channels: Of those that come out.
        factor: The middle one has that many times fewer channels than the teacher.
    """
    middle = max(teacher_channels // factor, 1)
    widths = (student_channels, middle, middle, teacher_channels)
    layers: list[nn.Module] = []
    for before, after, kernel in zip(widths, widths[1:], (1, 3, 1), strict=False):
        layers += [nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])  # the last ReLU is the net's own: it gives the maps before and after it


class ProjectedNet(nn.Module):
    """A student whose last maps pass a projector; a frozen classifier of the teacher takes their mean.

    `forward_with_features` gives the student's maps and the projected ones as one stage more; the embedding is the mean
    of these. The student's own classifier is taken out; layers between its last maps and its classifier stay, idle.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", 2022, section 3.

    Args:
        student: Loses its classifier.
        student_channels: Channels of its last maps.
        teacher_channels: Channels of the teacher's.
        size: Height and width of the projected maps; the student's are average-pooled to it if they are larger.
        factor: See `projector`.
        num_classes: Number of logits.
        bias: Whether the classifier has one.
        taps: The student's, if its maps are those of its taps: its section of params.json does not always name them.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        student_channels: int,
        teacher_channels: int,
        size: tuple[int, int],
        factor: int,
        num_classes: int,
        bias: bool,
        taps: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if taps:
            set_taps(student, taps)
        parent, _, name = classifier_of(student).rpartition(".")
        setattr(student.get_submodule(parent), name, nn.Identity())
        self.student = student
        self.size = size
        self.input_size = getattr(student, "input_size", None)
        self.projector = projector(student_channels, teacher_channels, factor)
        self.classifier = nn.Linear(teacher_channels, num_classes, bias=bias).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        outputs = features_of(self.student, images)
        maps = outputs.features[-1]
        height, width = (min(own, most) for own, most in zip(maps.shape[2:], self.size, strict=True))
        if maps.shape[2:] != (height, width):
            maps = F.adaptive_avg_pool2d(maps, (height, width))
        preact = self.projector(maps)
        projected = F.relu(preact)  # (N, student's C, H, W) -> (N, teacher's C, h, w)
        embedding = projected.mean((2, 3))
        return replace(
            outputs,
            logits=self.classifier(embedding),
            features=(*outputs.features, projected),
            preacts=(*outputs.preacts, preact) if outputs.preacts else (),  # a tapped net gives none
            embedding=embedding,
        )


def equipped(net: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Returns a net with the parts that a loss gives it for good, all weights of these new.

    Args:
        net: As the section of params.json makes it; it is a part of the net that is returned.
        record: What the loss's `equip` said: plain values, empty for a net without such parts.
    """
    if not record:
        return net
    options = dict(record["projected"])
    return ProjectedNet(net, **{**options, "size": tuple(options["size"])})

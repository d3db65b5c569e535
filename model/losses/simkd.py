"""Regression of the teacher's last map, whose classifier the student takes over."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.adapters import match_sizes
from model.losses.base import Loss
from model.losses.stages import Stages
from model.outputs import Batch, Outputs, Probe, features_of
from model.projected import ProjectedNet, equipped
from model.taps import classifier_of, taps_of


def simkd_loss(projected: Tensor, teacher_maps: Tensor) -> Tensor:
    """Returns the squared difference of the projected map and the teacher's, mean over the batch and the map.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", 2022, section 3.

    Args:
        projected: `(N, C, H, W)`.
        teacher_maps: `(N, C, H', W')`; the larger of both is average-pooled to the size of the smaller.
    """
    return F.mse_loss(*match_sizes(projected, teacher_maps))


@LOSSES.register("simkd")
class SimKDLoss(Loss):
    """Squared difference of the projected last map and the teacher's, mean over the batch and the map.

    The net that is trained is the student without its classifier, a projector and a frozen copy of the teacher's
    classifier; all of them are in its checkpoints. No other loss is needed: there is no classifier to train. Layers of
    the student between its last map and its classifier, if there are any, stay as they are and are not used. It
    takes a teacher whose classifier is one linear layer on the mean of the last map.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", 2022, section 3.

    Args:
        factor: The projector's middle layer has that many times fewer channels than the teacher's map.
    """

    needs = frozenset({"features"})
    needs_teacher = True

    def __init__(self, *, factor: Annotated[int, Field(ge=1)] = 2) -> None:
        super().__init__()
        self.factor = factor
        self.parts: dict[str, Any] = {}
        self.classifier_state: dict[str, Tensor] = {}  # not a buffer: the net has it

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        stages = Stages("simkd", "features", student, teacher)
        own, other = stages.shapes(len(stages.student.shapes), len(stages.teacher.shapes))
        classifier = teacher.net.get_submodule(classifier_of(teacher.net))
        fits = isinstance(classifier, nn.Linear) and classifier.in_features == other[0]
        if not fits or not takes_the_mean(teacher, classifier):
            raise stages.error(
                "the student gets the teacher's classifier, which must be one linear layer on the mean of the last map,"
                f" and that of teacher {teacher.name!r} is not"
            )
        assert isinstance(classifier, nn.Linear)
        self.parts = {
            "student_channels": own[0],
            "teacher_channels": other[0],
            "size": [min(pair) for pair in zip(own[1:], other[1:], strict=True)],
            "factor": self.factor,
            "num_classes": classifier.out_features,
            "bias": classifier.bias is not None,
            "taps": list(taps_of(student.net)),
        }
        self.classifier_state = {name: value.detach().clone() for name, value in classifier.state_dict().items()}

    def equip(self, student: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        record = {"projected": self.parts}
        device = next(student.parameters()).device
        net = equipped(student, record)
        assert isinstance(net, ProjectedNet)
        net.classifier.load_state_dict(self.classifier_state)
        return net.to(device), record

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        projected, target = student.features[-1], teacher.features[-1]
        if projected.shape[1] != target.shape[1]:
            raise ValueError(
                f"the student's last map has {projected.shape[1]} channels, the teacher's {target.shape[1]}: loss"
                " 'simkd' is for the student that its `equip` returns"
            )
        return {"simkd": simkd_loss(projected, target)}

    def describe(self) -> str:
        return (
            f"MSE of the last map, projected (1x1, 3x3, 1x1, channels / {self.factor}), to the teacher's, mean over the"
            " batch and the map; the classifier is the teacher's, frozen"
        )


@torch.no_grad()
def takes_the_mean(probe: Probe, classifier: nn.Module) -> bool:
    """Tells whether a net's logits are what its classifier makes of the mean of its last map; tried with noise."""
    if not probe.shape:
        return True
    net = copy.deepcopy(probe.net).eval()  # the net itself stays in its mode
    weight = next(net.parameters())
    noise = torch.randn(2, *probe.shape, generator=torch.Generator().manual_seed(0))
    outputs = features_of(net, noise.to(weight.device, weight.dtype))
    expected = classifier(outputs.features[-1].mean((2, 3)))
    return bool(((outputs.logits - expected).abs().max() <= 1e-3 * outputs.logits.abs().max()).item())

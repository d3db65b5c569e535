"""Oracles: the formula in numpy on maps whose regression is known, convolutions written as loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.engine import outputs_of, probe
from model.errors import InputError
from model.losses import LOSSES
from model.losses.fitnets import FitNetsLoss
from model.losses.stages import Shape
from model.nets import NETS
from model.outputs import Batch, Outputs, Probe
from model.teacher import FrozenTeacher

CLASSES = 5


def probe_of(name: str, *shapes: Shape) -> Probe:
    maps = tuple(torch.empty(1, *shape, device="meta") for shape in shapes)
    return Probe(name, nn.Identity(), Outputs(torch.empty(1, CLASSES, device="meta"), features=maps))


def loss_of(**options: Any) -> FitNetsLoss:
    section, problems = LOSSES.resolve({"name": "fitnets", **options})
    assert problems == []
    return LOSSES.create(section)


def attached(student: Shape, teacher: Shape, **options: Any) -> FitNetsLoss:
    loss = loss_of(student_stage=1, teacher_stage=1, **options)
    loss.attach(probe_of("small", student), probe_of("large", teacher))
    return loss


def batch_of(size: int) -> Batch:
    labels = torch.arange(size) % CLASSES
    images = torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Batch(images, labels, labels, torch.zeros_like(labels))


def outputs(maps: Tensor) -> Outputs:
    return Outputs(torch.linspace(-2, 2, len(maps) * CLASSES).view(-1, CLASSES).to(maps.dtype), features=(maps,))


def maps_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- what fits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 4, 4), (6, 6, 6)), ((4, 4, 8), (6, 8, 8)), ((4, 8, 4), (6, 6, 6))],
)
def test_maps_that_cannot_be_fitted_are_refused_in_one_sentence_with_both_shapes(
    student: Shape, teacher: Shape
) -> None:
    with pytest.raises(InputError) as error:
        attached(student, teacher)
    shapes = ["x".join(map(str, shape)) for shape in (student, teacher)]
    assert str(error.value) == (
        "loss 'fitnets' reads the stages' features: student stage 1 and teacher stage 1 cannot be fitted: the"
        f" student's maps are smaller, by no whole number; student 'small' has {shapes[0]}, teacher 'large' has"
        f" {shapes[1]}; choose other stages or other nets"
    )


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="student 'small' has no stage 2; student 'small' has 4x8x8, teacher"):
        loss_of().attach(probe_of("small", (4, 8, 8)), probe_of("large", (4, 8, 8), (8, 4, 4)))


# --- the formula -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_hint_is_the_mean_squared_difference_of_the_regressed_map(training: bool) -> None:
    student, teacher = maps_of(4, 7, 7), maps_of(3, 7, 7, seed=1).relu()
    loss = attached((4, 7, 7), (3, 7, 7)).double().train(training)
    weight, gamma, beta = (p.detach() for p in loss.parameters())
    with torch.no_grad():
        gamma.copy_(torch.tensor([0.5, 1.0, 2.0]))
        beta.copy_(torch.tensor([0.1, -0.2, 0.3]))
    # A 1x1 convolution is a matrix on channels.
    mixed = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0].numpy(), student.numpy())
    mean = mixed.mean(axis=(0, 2, 3), keepdims=True) if training else 0.0  # of a new batch norm: 0 and 1
    variance = mixed.var(axis=(0, 2, 3), keepdims=True) if training else 1.0
    scale, shift = (v.numpy().reshape(1, -1, 1, 1) for v in (gamma, beta))
    regressed = np.maximum((mixed - mean) / np.sqrt(variance + 1e-5) * scale + shift, 0)
    terms = loss(outputs(student), outputs(teacher), batch_of(6))
    assert list(terms) == ["fitnets"]
    assert terms["fitnets"].item() == pytest.approx(((regressed - teacher.numpy()) ** 2).mean(), rel=1e-12)


def test_the_size_is_fitted_by_the_convolution_alone() -> None:
    student, teacher = maps_of(4, 8, 8), maps_of(3, 4, 4, seed=1)
    loss = attached((4, 8, 8), (3, 4, 4)).double().eval()
    kernel = loss.state_dict()["regressor.0.weight"].numpy()
    padded = np.pad(student.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    regressed = np.empty((6, 3, 4, 4))
    for y in range(4):
        for x in range(4):
            window = padded[:, :, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
            regressed[:, :, y, x] = np.einsum("ochw,nchw->no", kernel, window)
    regressed = np.maximum(regressed / np.sqrt(1 + 1e-5), 0)
    hint = loss(outputs(student), outputs(teacher), batch_of(6))["fitnets"]
    assert hint.item() == pytest.approx(((regressed - teacher.numpy()) ** 2).mean(), rel=1e-12)


def test_a_batch_repeated_twice_has_the_same_hint() -> None:
    student, teacher = maps_of(4, 7, 7), maps_of(3, 7, 7, seed=1)
    loss = attached((4, 7, 7), (3, 7, 7)).double()
    once = loss(outputs(student), outputs(teacher), batch_of(6))["fitnets"]
    twice = loss(outputs(student.repeat(2, 1, 1, 1)), outputs(teacher.repeat(2, 1, 1, 1)), batch_of(12))["fitnets"]
    assert twice.item() == pytest.approx(once.item(), rel=1e-12)


def test_the_stages_that_are_named_are_compared() -> None:
    shapes: list[Shape] = [(2, 8, 8), (3, 8, 8), (4, 8, 8)]
    loss = loss_of(student_stage=3, teacher_stage=1)
    loss.attach(probe_of("small", *shapes), probe_of("large", *shapes))
    student, teacher = (
        Outputs(torch.zeros(6, CLASSES), features=tuple(torch.rand(6, *s) for s in shapes)) for _ in "st"
    )
    regressed = loss.eval().regressor(student.features[2])
    hint = loss(student, teacher, batch_of(6))["fitnets"]
    assert hint.item() == pytest.approx(F.mse_loss(regressed, teacher.features[0]).item(), rel=1e-6)


def test_the_defaults_are_those_of_the_reference_implementation() -> None:
    resolved, problems = LOSSES.resolve({"name": "fitnets"})
    assert problems == []
    assert resolved == {"name": "fitnets", "student_stage": 2, "teacher_stage": 2, "weight": None}
    assert loss_of().usual_weight == 100
    assert loss_of().describe() == (
        "MSE of student stage 2, fitted to teacher stage 2, mean over the batch and the maps"
    )


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("student_stage", 0, "0 is below 1"),
        ("teacher_stage", 1.5, "expected a whole number, got 1.5"),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: object, problem: str) -> None:
    assert LOSSES.resolve({"name": "fitnets", option: value})[1] == [(option, problem)]


# --- on nets -----------------------------------------------------------------------------------------------


def test_training_lowers_the_hint() -> None:
    torch.manual_seed(0)
    student, net = (NETS.create({"name": "tiny", "width": width}, CLASSES) for width in (4, 8))
    loss = loss_of()
    loss.attach(probe(student, "student", (3, 16, 16)), probe(net, "teacher", (3, 16, 16)))
    teacher, batch = FrozenTeacher(net), batch_of(32)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.05, momentum=0.9)
    hints = []
    for _ in range(40):
        terms = loss(
            outputs_of(student, batch.images, loss.needs), outputs_of(teacher, batch.images, loss.needs), batch
        )
        hints.append(terms["fitnets"].item())
        optimizer.zero_grad()
        (10 * terms["fitnets"]).backward()
        optimizer.step()
    assert hints[-1] < 0.3 * hints[0]

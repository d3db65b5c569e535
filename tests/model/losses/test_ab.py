"""Oracles: values of a reference implementation, the paper's formula in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden import batch_of, check_golden, student_maps, teacher_maps
from torch import Tensor, nn

from model.errors import InputError
from model.losses import LOSSES
from model.losses.ab import ABLoss, ab_loss
from model.losses.stages import Shape
from model.outputs import Outputs, Probe

CLASSES = 5


def probe_of(name: str, *shapes: Shape) -> Probe:
    preacts = tuple(torch.empty(1, *shape, device="meta") for shape in shapes)
    return Probe(name, nn.Identity(), Outputs(torch.empty(1, CLASSES, device="meta"), preacts=preacts))


def loss_of(student: list[Shape], teacher: list[Shape], **options: Any) -> ABLoss:
    section, problems = LOSSES.resolve({"name": "ab", **options})
    assert problems == []
    loss: ABLoss = LOSSES.create(section)
    loss.attach(probe_of("small", *student), probe_of("large", *teacher))
    return loss


def outputs(*preacts: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(preacts[0]), CLASSES, dtype=preacts[0].dtype), preacts=preacts)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numpy_ab(student: Tensor, teacher: Tensor, margin: float) -> float:
    s, t = student.detach().numpy(), teacher.numpy()
    squares = (s + margin) ** 2 * ((s > -margin) & (t <= 0)) + (s - margin) ** 2 * ((s <= margin) & (t > 0))
    return float(3 / 1000 * squares.sum() / len(s))


# --- the formula ------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_those_of_the_reference() -> None:
    student = student_maps(6)
    check_golden("AB_m1_n1", ab_loss(student, teacher_maps()), student)


@pytest.mark.parametrize("margin", [0.25, 1.0, 2.0])
def test_the_loss_is_the_papers_formula(margin: float) -> None:
    student, teacher = 2 * noise(4, 3, 5, 6), noise(4, 3, 5, 6, seed=1)
    teacher[0] = 0  # is not positive
    assert ab_loss(student, teacher, margin).item() == pytest.approx(numpy_ab(student, teacher, margin), rel=1e-12)


def test_responses_beyond_the_margin_on_the_right_side_cost_nothing() -> None:
    teacher = noise(4, 3, 5, 5)
    assert ab_loss(2 * teacher.sign(), teacher).item() == 0
    assert ab_loss(0.5 * teacher.sign(), teacher).item() == pytest.approx(3 / 1000 * 75 / 4)
    assert ab_loss(-2 * teacher.sign(), teacher).item() == pytest.approx(3 / 1000 * 9 * 75)


def test_maps_of_different_shape_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match="student maps"):
        ab_loss(noise(2, 3, 4, 4), noise(2, 1, 4, 4))


def test_the_deepest_stage_counts_once_and_each_one_before_it_half_of_the_next() -> None:
    shapes: list[Shape] = [(2, 8, 8), (3, 4, 4), (4, 2, 2)]
    loss = loss_of(shapes, shapes)
    assert list(loss.parameters()) == [], "maps of equal shape need no connector"
    student, teacher = ([noise(3, *shape, seed=seed + i) for i, shape in enumerate(shapes)] for seed in (0, 10))
    each = [numpy_ab(own, other, 1.0) for own, other in zip(student, teacher, strict=True)]
    terms = loss(outputs(*student), outputs(*teacher), batch_of(torch.arange(3)))
    assert list(terms) == ["ab"]
    assert terms["ab"].item() == pytest.approx(each[0] / 4 + each[1] / 2 + each[2], rel=1e-12)


def test_maps_of_another_shape_pass_a_convolution_with_batch_norm() -> None:
    loss = loss_of([(2, 8, 8), (3, 4, 4)], [(5, 8, 8), (6, 2, 2)]).double()
    kinds = [[type(layer) for layer in connector.children()] for connector in loss.connectors]
    assert kinds == [[nn.Conv2d, nn.BatchNorm2d]] * 2
    student = [noise(4, 2, 8, 8), noise(4, 3, 4, 4, seed=1)]
    teacher = [noise(4, 5, 8, 8, seed=2), noise(4, 6, 2, 2, seed=3)]
    mixed = np.einsum("oc,nchw->nohw", loss.connectors[0][0].weight.detach().numpy()[:, :, 0, 0], student[0].numpy())  # type: ignore[index]
    mean, variance = (f(mixed, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.var))
    first = numpy_ab(torch.tensor((mixed - mean) / np.sqrt(variance + 1e-5)), teacher[0], 1.0)
    second = numpy_ab(loss.connectors[1](student[1]), teacher[1], 1.0)
    value = loss(outputs(*student), outputs(*teacher), batch_of(torch.arange(4)))["ab"]
    assert value.item() == pytest.approx(first / 2 + second, rel=1e-10)


# --- options ----------------------------------------------------------------------------------------------


def test_maps_that_cannot_be_fitted_are_refused_in_one_sentence() -> None:
    with pytest.raises(InputError) as error:
        loss_of([(3, 4, 4)], [(3, 6, 6)], student_stages=[1], teacher_stages=[1])
    assert str(error.value) == (
        "loss 'ab' reads the stages' preacts: student stage 1 cannot be fitted to teacher stage 1; student 'small' has"
        " 3x4x4, teacher 'large' has 3x6x6; choose other stages or other nets"
    )


def test_the_defaults_are_those_of_the_reference_implementation() -> None:
    resolved, problems = LOSSES.resolve({"name": "ab"})
    assert problems == []
    assert (resolved["margin"], resolved["initial_epochs"]) == (1.0, 30)
    loss = loss_of([(3, 4, 4)], [(3, 4, 4)])
    assert loss.usual_weight == 1
    assert not loss.trains_classifier
    assert loss.describe() == (
        "squared distance to the activation boundaries x 0.003 (margin 1), sum over student stages [1] to teacher"
        " stages [1] (the last x 1, each one before it x 1/2 of the next) and over a map, mean over the batch (in the"
        " first 30 epochs, alone)"
    )


@pytest.mark.parametrize(
    ("option", "value", "problem"), [("margin", 0, "0 is not above 0.0"), ("initial_epochs", 0, "0 is below 1")]
)
def test_an_option_out_of_range_is_refused(option: str, value: object, problem: str) -> None:
    assert LOSSES.resolve({"name": "ab", option: value})[1] == [(option, problem)]

"""Oracles: the equation and the authors' reading of it in numpy, closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden import BATCH, CLASSES, golden_labels, softmax, student_logits, terms_of
from logit_claims import (
    constants_added_to_a_sample_change_nothing,
    finite_at_extreme_logits,
    permuted_batch_has_the_same_loss,
    permuted_classes_have_the_same_loss,
    repeated_batch_has_the_same_loss,
)
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.tfkd import Form, TFKDLoss, tfkd_loss, virtual_teacher

FORMS: list[Form] = ["code", "paper"]


def teacher_of(correct_probability: float) -> np.ndarray:
    rows = np.full((BATCH, CLASSES), (1 - correct_probability) / (CLASSES - 1))
    rows[np.arange(BATCH), golden_labels().numpy()] = correct_probability
    return rows


def by_hand(correct_probability: float, temperature: float, form: Form) -> tuple[float, np.ndarray]:
    """Returns the loss and its gradient on the golden logits."""
    z_s = student_logits().detach().numpy()
    teacher = teacher_of(correct_probability)
    if form == "code":
        target, own, slope = softmax(teacher / temperature), softmax(z_s), 1.0
    else:
        powers = teacher ** (1 / temperature)
        target, own, slope = powers / powers.sum(axis=1, keepdims=True), softmax(z_s / temperature), 1 / temperature
    return (target * np.log(target / own)).sum(axis=1).mean(), slope * (own - target) / BATCH


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 20.0, 40.0])
@pytest.mark.parametrize("correct_probability", [0.9, 0.99])
def test_loss_and_gradient_are_the_equations(correct_probability: float, temperature: float, form: Form) -> None:
    student = student_logits()
    loss = tfkd_loss(student, golden_labels(), correct_probability, temperature, form)
    (gradient,) = torch.autograd.grad(loss, student)
    value, expected = by_hand(correct_probability, temperature, form)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("correct_probability", [0.5, 0.99])
def test_the_virtual_teacher_is_right_and_even_about_the_rest(correct_probability: float) -> None:
    found = virtual_teacher(golden_labels(), CLASSES, correct_probability, torch.float64)
    np.testing.assert_allclose(found.numpy(), teacher_of(correct_probability), rtol=1e-12)
    np.testing.assert_allclose(found.sum(dim=1).numpy(), 1, rtol=1e-12)


def test_in_the_papers_form_at_T_1_it_is_cross_entropy_with_smoothed_labels_less_a_constant() -> None:
    student = student_logits()
    smoothing = 0.1
    sure, other = 1 - smoothing + smoothing / CLASSES, smoothing / CLASSES
    entropy = -(sure * np.log(sure) + (CLASSES - 1) * other * np.log(other))
    smoothed = F.cross_entropy(student, golden_labels(), label_smoothing=smoothing).item()
    assert tfkd_loss(student, golden_labels(), sure, 1.0, "paper").item() == pytest.approx(
        smoothed - entropy, rel=1e-12
    )


def test_the_higher_the_temperature_the_more_even_the_target() -> None:
    """At a temperature without end the target is uniform; only in the form of the code that is a lasting pull."""
    student = student_logits()
    uniform = (-np.log(CLASSES) - F.log_softmax(student, dim=1)).mean().item()
    assert tfkd_loss(student, golden_labels(), 0.99, 1000.0, "code").item() == pytest.approx(uniform, rel=1e-3)
    gradients = [
        torch.autograd.grad(tfkd_loss(student, golden_labels(), 0.99, t, "paper"), student)[0].norm().item()
        for t in (1.0, 20.0, 1000.0)
    ]
    assert gradients == sorted(gradients, reverse=True)


@pytest.mark.parametrize("form", FORMS)
def test_the_student_that_is_the_softened_teacher_has_no_loss(form: Form) -> None:
    teacher = torch.tensor(teacher_of(0.99))
    student = (teacher / 20 if form == "code" else teacher.log()).requires_grad_()
    loss = tfkd_loss(student, golden_labels(), 0.99, 20.0, form)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert gradient.abs().max() <= 1e-16


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "claim",
    [
        repeated_batch_has_the_same_loss,
        permuted_batch_has_the_same_loss,
        permuted_classes_have_the_same_loss,
        constants_added_to_a_sample_change_nothing,
        finite_at_extreme_logits,
    ],
)
def test_tfkd_loss_keeps_a_claim(claim: Any, form: Form) -> None:
    claim(lambda student, teacher, labels: tfkd_loss(student, labels, 0.99, 20.0, form))


def test_the_authors_objective_is_the_list_that_the_docstring_names() -> None:
    """Their loss for ResNet18 on CIFAR-100: 0.9 CE + 0.1 * 100 * (KL divided by batch and classes)."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 100, dtype=torch.float64, generator=generator)
    labels = torch.tensor([3, 99, 0, 50])
    teacher = torch.full((4, 100), 0.01 / 99, dtype=torch.float64)
    teacher[torch.arange(4), labels] = 0.99
    target = torch.softmax(teacher / 20, dim=1)
    theirs = 0.1 * 100 * (target * (target.log() - F.log_softmax(student, dim=1))).sum() / (4 * 100)
    ours = TFKDLoss.usual_weight * terms_of(TFKDLoss(), student, None, labels)["tfkd"]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_there_is_no_teacher_and_a_label_for_every_sample() -> None:
    loss = TFKDLoss()
    assert (loss.needs_teacher, loss.needs_labels, loss.least_at_teacher) == (False, True, False)
    assert list(terms_of(loss, student_logits(), None, golden_labels())) == ["tfkd"]


def test_every_option_counts() -> None:
    values = {
        terms_of(TFKDLoss(**options), student_logits(), None, golden_labels())["tfkd"].item()
        for options in ({}, {"form": "paper"}, {"temperature": 5.0}, {"correct_probability": 0.9})
    }
    assert len(values) == 4


def test_describe_states_the_constants() -> None:
    assert TFKDLoss().describe() == (
        "KL from a virtual teacher with 0.99 for the label x 1, T 20 dividing its probabilities, no T^2, mean over the"
        " batch"
    )
    assert "T 2 dividing its and the student's logits" in TFKDLoss(temperature=2.0, form="paper").describe()


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("correct_probability", 1, "1 is not below 1"),
        ("correct_probability", 0, "0 is not above 0"),
        ("temperature", 0, "0 is not above 0"),
        ("form", "other", "'other' is not one of 'code' or 'paper'"),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: object, problem: str) -> None:
    (found,) = LOSSES.resolve({"name": "tfkd", option: value})[1]
    assert found[0] == option
    assert found[1].startswith(problem)


def test_types_of_the_teacher_follow_the_students() -> None:
    def value(dtype: torch.dtype) -> Tensor:
        return tfkd_loss(student_logits(dtype), golden_labels(), 0.99, 20.0, "code")

    assert value(torch.float32).dtype == torch.float32
    assert value(torch.float32).item() == pytest.approx(value(torch.float64).item(), rel=1e-5)

"""Oracles: the paper's formula in numpy, plain distillation, values of a reference implementation."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from golden import (
    BATCH,
    CLASSES,
    GOLDEN,
    check_golden_logits,
    golden_labels,
    golden_logits,
    softmax,
    terms_of,
)
from logit_claims import CLAIMS, least_at_the_teacher, repeated_batch_has_the_same_loss
from torch import Tensor, nn

from model.errors import InputError, Notice
from model.losses import LOSSES
from model.losses.dkd import DKDLoss, dkd_loss, dkd_parts
from model.losses.kd import kd_loss
from model.losses.logits import standardised
from model.outputs import Outputs, Probe


def usual(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return dkd_loss(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0)


def paper_dkd(student: Tensor, teacher: Tensor, alpha: float, beta: float, temperature: float) -> float:
    """Returns the paper's equation, with binary and non-target probabilities formed by hand, sample by sample."""
    total = 0.0
    for z_s, z_t, y in zip(student.detach().numpy(), teacher.numpy(), golden_labels().numpy(), strict=True):
        p_s, p_t = softmax(z_s / temperature), softmax(z_t / temperature)
        b_s, b_t = (np.array([p[y], 1 - p[y]]) for p in (p_s, p_t))
        q_s, q_t = (np.delete(p, y) / np.delete(p, y).sum() for p in (p_s, p_t))
        total += alpha * (b_t * np.log(b_t / b_s)).sum() + beta * (q_t * np.log(q_t / q_s)).sum()
    return float(temperature**2 * total / BATCH)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1, 8, 4), (1, 0.5, 1), (0, 1, 2), (1, 0, 2), (0.3, 2, 10)])
def test_the_loss_is_the_papers_formula(alpha: float, beta: float, temperature: float) -> None:
    student, teacher = golden_logits()
    found = dkd_loss(student, teacher, golden_labels(), alpha, beta, temperature).item()
    assert found == pytest.approx(paper_dkd(student, teacher, alpha, beta, temperature), rel=1e-12)


@pytest.mark.parametrize(
    ("case", "alpha", "beta", "temperature"), [("DKD_a1_b8_T4", 1, 8, 4), ("DKD_a1_b0.5_T1", 1, 0.5, 1)]
)
def test_loss_and_gradient_are_those_of_the_reference(case: str, alpha: float, beta: float, temperature: float) -> None:
    labels = golden_labels()
    check_golden_logits(case, lambda student, teacher: dkd_loss(student, teacher, labels, alpha, beta, temperature))


def test_with_standardised_logits_they_are_those_of_its_reference() -> None:
    loss = DKDLoss(alpha=9.0, beta=72.0, temperature=2.0, standardise=True)
    check_golden_logits(
        "LS_DKD_a9_b72_T2", lambda student, teacher: terms_of(loss, student, teacher, golden_labels())["dkd"]
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_with_beta_as_the_teachers_doubt_it_is_plain_distillation(temperature: float) -> None:
    student, teacher = golden_logits()
    labels = golden_labels()
    target_part, others_part = dkd_parts(student, teacher, labels, temperature)
    doubt = 1 - torch.softmax(teacher / temperature, dim=1)[torch.arange(BATCH), labels]
    whole = temperature**2 * (target_part + doubt * others_part).mean()
    plain = kd_loss(student, teacher, temperature)
    assert whole.item() == pytest.approx(plain.item(), rel=1e-13)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (whole, plain)]
    np.testing.assert_allclose(*gradients, rtol=1e-10, atol=1e-15)
    if temperature == 4:
        assert whole.item() == pytest.approx(GOLDEN["KD_T4"]["loss"], rel=1e-13)


@pytest.mark.parametrize("claim", [*CLAIMS, least_at_the_teacher])
def test_dkd_loss_keeps_a_claim(claim: Any) -> None:
    if claim is least_at_the_teacher:
        least_at_the_teacher(usual, gradient_tolerance=1e-14)  # beta 8 times T, of the probabilities' rounding
    else:
        claim(usual)


def test_claims_reject_a_sum_over_the_batch() -> None:
    """As `size_average=False` makes of `mean` in MMRazor's configuration: 32 times too heavy."""

    def summed(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return usual(student, teacher, labels) * len(labels)

    with pytest.raises(AssertionError):
        repeated_batch_has_the_same_loss(summed)


@pytest.mark.parametrize("gap", [10.0, 91.0, 103.0, 200.0, 1e4])
def test_at_gaps_where_probabilities_vanish_it_is_still_the_limit(gap: float) -> None:
    """Sure teacher, student just as sure of another class: the label's part is the gap, in float32 as well."""
    student, teacher = torch.zeros(1, CLASSES), torch.zeros(1, CLASSES)
    student[0, 1] = teacher[0, 0] = gap
    student.requires_grad_()
    loss = dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=0.0, temperature=1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(gap, rel=1e-2 if gap < 50 else 1e-6)
    expected = torch.zeros(1, CLASSES)
    expected[0, 0], expected[0, 1] = -1, 1
    torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-3 if gap < 50 else 1e-6)


@pytest.mark.parametrize("gap", [91.0, 200.0, 1e4])
def test_a_student_that_is_sure_of_the_label_against_its_teacher_pays_the_whole_gap(gap: float) -> None:
    """A target that is masked by -1000 instead of left out would make this at most 1000."""
    student, teacher = torch.zeros(1, CLASSES), torch.zeros(1, CLASSES)
    student[0, 0] = teacher[0, 1] = gap
    loss = dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=0.0, temperature=1.0)
    assert loss.item() == pytest.approx(gap - np.log(CLASSES - 1), rel=1e-6)


def test_of_two_classes_only_the_labels_part_is_left() -> None:
    student = torch.tensor([[1.0, -2.0], [0.3, 0.1]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0], [-1.0, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    target_part, others_part = dkd_parts(student, teacher, labels, 3.0)
    assert torch.equal(others_part, torch.zeros(2, dtype=torch.float64))
    assert 9 * target_part.mean().item() == pytest.approx(kd_loss(student, teacher, 3.0).item(), rel=1e-13)


def test_each_weight_scales_its_part_down_to_nothing() -> None:
    student, teacher = golden_logits()
    labels = golden_labels()

    def value(alpha: float, beta: float) -> float:
        return terms_of(DKDLoss(alpha=alpha, beta=beta), student, teacher, labels)["dkd"].item()

    assert value(3, 5) == pytest.approx(3 * value(1, 0) + 5 * value(0, 1), rel=1e-12)
    with pytest.raises(InputError, match="alpha and beta are both 0"):
        value(0, 0)


def test_standardising_makes_the_scale_of_logits_meaningless() -> None:
    student, teacher = golden_logits()
    values = [
        terms_of(DKDLoss(standardise=standardise), scale * student, teacher, golden_labels())["dkd"].item()
        for standardise in (True, False)
        for scale in (1, 3)
    ]
    assert values[0] == pytest.approx(values[1], rel=2e-7)
    assert values[2] != pytest.approx(values[3], rel=1e-2)
    by_hand = usual(standardised(student), standardised(teacher), golden_labels()).item()
    assert values[0] == pytest.approx(by_hand, rel=1e-12)


def test_it_is_one_method_without_cross_entropy() -> None:
    loss = DKDLoss()
    assert (loss.needs, loss.needs_teacher, loss.needs_labels, loss.usual_weight) == ({"logits"}, True, True, 1)
    assert list(terms_of(loss, *golden_logits(), golden_labels())) == ["dkd"]


def test_describe_states_the_weights_that_forward_applies() -> None:
    student, teacher = golden_logits()
    loss = DKDLoss(alpha=0.5, beta=2.0, temperature=3.0)
    found = re.fullmatch(r"KL of label against rest x (\S+) \+ KL among the rest x (\S+) \(.*\), .*", loss.describe())
    assert found is not None
    parts = [part.mean().item() for part in dkd_parts(student, teacher, golden_labels(), 3.0)]
    described = sum(float(weight) * part for weight, part in zip(found.groups(), parts, strict=True))
    assert described == pytest.approx(terms_of(loss, student, teacher, golden_labels())["dkd"].item(), rel=1e-3)
    assert DKDLoss(standardise=True).describe() == (
        "KL of label against rest x 16 + KL among the rest x 128 (alpha 1, beta 8, T^2 at T 4), mean over the batch;"
        " logits standardised"
    )


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [("alpha", -1, "-1 is below 0"), ("beta", -0.5, "-0.5 is below 0"), ("temperature", 0, "0 is not above 0")],
)
def test_an_option_out_of_range_is_refused(option: str, value: object, problem: str) -> None:
    (found,) = LOSSES.resolve({"name": "dkd", option: value})[1]
    assert found[0] == option
    assert found[1].startswith(problem)


def test_of_two_classes_a_notice_says_that_a_part_is_idle() -> None:
    def shown(classes: int) -> Probe:
        return Probe("net", nn.Identity(), Outputs(torch.empty(1, classes, device="meta")))

    DKDLoss().attach(shown(3), shown(3))
    with pytest.warns(Notice, match="of two classes, its part of the other classes is constant"):
        DKDLoss().attach(shown(2), shown(2))

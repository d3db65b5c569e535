"""Oracles: the paper's formula in numpy, closed forms, values of a reference implementation."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from golden import BATCH, check_golden_logits, golden_labels, golden_logits, softmax, terms_of
from logit_claims import CLAIMS
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.nkd import NKDLoss, nkd_loss


def usual(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return nkd_loss(student, teacher, labels, gamma=3.5, temperature=3.0)


def paper_nkd(student: Tensor, teacher: Tensor, temperature: float) -> tuple[float, float]:
    """Returns the label's part and the others', without gamma T^2, sample by sample."""
    target, others = 0.0, 0.0
    for z_s, z_t, y in zip(student.detach().numpy(), teacher.numpy(), golden_labels().numpy(), strict=True):
        target -= softmax(z_t)[y] * np.log(softmax(z_s)[y]) / BATCH
        q_s, q_t = (softmax(np.delete(z, y) / temperature) for z in (z_s, z_t))
        others -= (q_t * np.log(q_s)).sum() / BATCH
    return target, others


@pytest.mark.parametrize("temperature", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 3.5])
def test_the_loss_is_the_papers_formula(gamma: float, temperature: float) -> None:
    student, teacher = golden_logits()
    target, others = paper_nkd(student, teacher, temperature)
    found = nkd_loss(student, teacher, golden_labels(), gamma, temperature).item()
    assert found == pytest.approx(target + gamma * temperature**2 * others, rel=1e-12)


@pytest.mark.parametrize(
    ("case", "gamma", "temperature"), [("NKD_T1_gamma1.5", 1.5, 1.0), ("NKD_T3_gamma3.5", 3.5, 3.0)]
)
def test_loss_and_gradient_are_those_of_the_reference(case: str, gamma: float, temperature: float) -> None:
    labels = golden_labels()
    check_golden_logits(case, lambda student, teacher: nkd_loss(student, teacher, labels, gamma, temperature))


@pytest.mark.parametrize("claim", CLAIMS)
def test_nkd_loss_keeps_a_claim(claim: Any) -> None:
    claim(usual)


def test_a_sure_teacher_leaves_cross_entropy_of_the_label() -> None:
    student, _ = golden_logits()
    labels = golden_labels()
    sure = 1e4 * F.one_hot(labels, 10).double()
    assert nkd_loss(student, sure, labels, 0.0, 3.0).item() == pytest.approx(
        F.cross_entropy(student, labels).item(), rel=1e-12
    )


def test_the_minimum_over_the_other_classes_is_the_teachers_but_not_0() -> None:
    """Two cross-entropies: at the teacher the others' part has no gradient, and the teacher's entropy as its value."""
    _, teacher = golden_logits()
    student = teacher.clone().requires_grad_()
    labels = golden_labels()
    without, with_others = (nkd_loss(student, teacher, labels, gamma, 3.0) for gamma in (0.0, 1.0))
    others = with_others - without
    (gradient,) = torch.autograd.grad(others, student)
    assert gradient.abs().max() <= 1e-15
    q = softmax(np.stack([np.delete(z, y) for z, y in zip(teacher.numpy(), labels.numpy(), strict=True)]) / 3)
    assert others.item() == pytest.approx(-9 * (q * np.log(q)).sum(axis=1).mean(), rel=1e-12)


def test_of_two_classes_only_the_labels_part_is_left() -> None:
    student = torch.tensor([[1.0, -2.0], [0.3, 0.1]], dtype=torch.float64)
    teacher = torch.tensor([[2.0, 1.0], [-1.0, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    with_others, without = (nkd_loss(student, teacher, labels, gamma, 3.0).item() for gamma in (3.5, 0.0))
    assert with_others == without > 0


def test_it_is_one_method_without_cross_entropy() -> None:
    loss = NKDLoss()
    assert (loss.needs_teacher, loss.needs_labels, loss.usual_weight) == (True, True, 1)
    assert not loss.least_at_teacher
    assert list(terms_of(loss, *golden_logits(), golden_labels())) == ["nkd"]


def test_describe_states_the_weight_that_forward_applies() -> None:
    student, teacher = golden_logits()
    loss = NKDLoss(gamma=0.7, temperature=2.0)
    found = re.fullmatch(r"CE weighed .* x 1 \+ soft CE among the rest x (\S+) \(.*\), .*", loss.describe())
    assert found is not None
    target, others = paper_nkd(student, teacher, 2.0)
    value = terms_of(loss, student, teacher, golden_labels())["nkd"].item()
    assert target + float(found[1]) * others == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("option", "value", "problem"), [("gamma", -0.5, "-0.5 is below 0"), ("temperature", 0, "0 is not above 0")]
)
def test_an_option_out_of_range_is_refused(option: str, value: object, problem: str) -> None:
    (found,) = LOSSES.resolve({"name": "nkd", option: value})[1]
    assert found[0] == option
    assert found[1].startswith(problem)

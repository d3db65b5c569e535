from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import BATCH, CLASSES, golden_labels, golden_logits, softmax

from model.losses.kd import kd_loss
from model.losses.logits import is_label, non_target_log_probs, standardised


def test_standardised_logits_are_z_scores_with_the_unbiased_deviation() -> None:
    student, _ = golden_logits()
    values = student.detach().numpy()
    expected = (values - values.mean(axis=1, keepdims=True)) / (1e-7 + values.std(axis=1, ddof=1, keepdims=True))
    np.testing.assert_allclose(standardised(student).detach().numpy(), expected, rtol=1e-12)


def test_neither_shift_nor_positive_scale_survives_but_the_sign_does() -> None:
    student, _ = golden_logits()
    scales = torch.linspace(0.5, 20, BATCH, dtype=torch.float64)[:, None]
    given = standardised(student)
    torch.testing.assert_close(standardised(scales * student + 7), given, rtol=2e-7, atol=1e-12)
    torch.testing.assert_close(standardised(-student), -given)


def test_the_gradient_is_orthogonal_to_the_centred_logits() -> None:
    student, teacher = golden_logits()
    (gradient,) = torch.autograd.grad(kd_loss(standardised(student), standardised(teacher), 2.0), student)
    centred = student - student.mean(dim=1, keepdim=True)
    assert (gradient * centred).sum(dim=1).abs().max() <= 1e-8
    assert gradient.sum(dim=1).abs().max() <= 1e-15


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3])
def test_constant_logits_stay_finite_and_have_a_gradient_of_a_million(constant: float) -> None:
    """As the docstring says: 1 / 1e-7 times the gradient of plain distillation."""
    student = torch.full((BATCH, CLASSES), constant, dtype=torch.float64, requires_grad=True)
    _, teacher = golden_logits()
    (gradient,) = torch.autograd.grad(kd_loss(standardised(student), standardised(teacher), 2.0), student)
    assert gradient.isfinite().all()
    p_t = softmax(standardised(teacher).numpy() / 2)
    expected = 2 / BATCH * (1 / CLASSES - p_t) / 1e-7
    if constant == 0:
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-7, atol=1e-3)
    assert 1e5 < gradient.norm() < 1e7


def test_labels_are_marked() -> None:
    labels = golden_labels()
    assert torch.equal(is_label(labels, CLASSES), torch.nn.functional.one_hot(labels, CLASSES).bool())


def test_the_other_classes_are_normalised_among_themselves() -> None:
    student, _ = golden_logits()
    labels = golden_labels()
    found = non_target_log_probs(student, labels).detach().numpy()
    for row, label, log_probs in zip(student.detach().numpy(), labels, found, strict=True):
        expected = np.log(softmax(np.delete(row, label)))
        np.testing.assert_allclose(np.delete(log_probs, label), expected, rtol=1e-12)
        assert log_probs[label] == 0


def test_the_label_has_no_part_in_the_gradient_however_large_its_logit() -> None:
    logits = torch.tensor([[1e6, 1.0, 2.0], [0.0, -1e6, 1.0]], requires_grad=True)
    labels = torch.tensor([0, 1])
    found = non_target_log_probs(logits, labels)
    assert found.isfinite().all()
    (gradient,) = torch.autograd.grad(found.square().sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[0, 0] == gradient[1, 1] == 0


def test_of_two_classes_the_only_other_one_is_certain() -> None:
    logits = torch.tensor([[3.0, -2.0], [0.5, 80.0]], requires_grad=True)
    found = non_target_log_probs(logits, torch.tensor([0, 0]))
    assert torch.equal(found, torch.zeros(2, 2))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert torch.equal(gradient, torch.zeros(2, 2))

"""What the definition of a loss of logits implies, whatever its values: each claim is a function that asserts it.

A loss is here a function of the student's logits, the teacher's and the labels that returns a scalar.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from golden import BATCH, CLASSES, golden_labels, golden_logits
from torch import Tensor

LogitLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

ORDER = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])  # new place -> old class
SHIFTS = torch.linspace(-50, 50, BATCH, dtype=torch.float64)[:, None]


def value_and_gradient(loss: LogitLoss, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, labels)
    assert value.shape == ()
    (gradient,) = torch.autograd.grad(value, student)
    return value.item(), gradient


def repeated_batch_has_the_same_loss(loss: LogitLoss) -> None:
    student, teacher = golden_logits()
    labels = golden_labels()
    once = loss(student, teacher, labels).item()
    twice = loss(student.repeat(2, 1), teacher.repeat(2, 1), labels.repeat(2)).item()
    assert twice == pytest.approx(once, rel=1e-8)  # DIST has an epsilon; what is summed would be twice as much


def permuted_batch_has_the_same_loss(loss: LogitLoss) -> None:
    student, teacher = golden_logits()
    labels = golden_labels()
    order = torch.tensor([3, 1, 4, 0, 5, 7, 2, 6])
    permuted = loss(student[order], teacher[order], labels[order]).item()
    assert permuted == pytest.approx(loss(student, teacher, labels).item(), rel=1e-12)


def permuted_classes_have_the_same_loss(loss: LogitLoss) -> None:
    student, teacher = golden_logits()
    labels = golden_labels()
    given = loss(student, teacher, labels).item()
    permuted = loss(student[:, ORDER], teacher[:, ORDER], ORDER.argsort()[labels]).item()
    assert permuted == pytest.approx(given, rel=1e-12)
    assert loss(student[:, ORDER], teacher, labels).item() != pytest.approx(given, rel=1e-3)


def constants_added_to_a_sample_change_nothing(loss: LogitLoss) -> None:
    student, teacher = golden_logits()
    labels = golden_labels()
    shifted = loss(student + SHIFTS, teacher - 2 * SHIFTS, labels).item()
    assert shifted == pytest.approx(loss(student, teacher, labels).item(), rel=1e-11)
    _, gradient = value_and_gradient(loss, student, teacher, labels)
    assert gradient.sum(dim=1).abs().max() <= 1e-14 * max(1.0, gradient.norm().item())


def finite_at_extreme_logits(loss: LogitLoss, gaps: tuple[float, ...] = (1.0, 200.0, -200.0, 1e4, -1e4)) -> None:
    """One class against all others, the other way round, and constant logits; also of two classes or one sample."""
    for size, classes in ((4, CLASSES), (1, CLASSES), (4, 2), (1, 2)):
        labels = torch.arange(size) % classes
        for gap in (0.0, *gaps):
            teacher = torch.zeros(size, classes)
            teacher[:, 0] = gap
            for student in (teacher, -teacher, teacher.roll(1, dims=1), torch.zeros_like(teacher)):
                value, gradient = value_and_gradient(loss, student, teacher, labels)
                assert torch.tensor(value).isfinite()
                assert gradient.isfinite().all()


def batches_of_other_shapes_are_refused(loss: LogitLoss) -> None:
    student, teacher = golden_logits()
    for wrong in (teacher[:1], teacher[:, :1], teacher[0], teacher[:4], teacher[:, :4]):
        with pytest.raises(ValueError, match=r"student logits \(8, 10\), teacher logits"):
            loss(student, wrong, golden_labels())


def least_at_the_teacher(loss: LogitLoss, value_tolerance: float = 0.0, gradient_tolerance: float = 3e-16) -> None:
    """In float64: value and gradient are 0 where the student agrees, and not where it says the opposite."""
    student, _ = golden_logits()
    value, gradient = value_and_gradient(loss, student, student.detach(), golden_labels())
    assert abs(value) <= value_tolerance
    assert gradient.abs().max() <= gradient_tolerance
    assert loss(student, -student.detach(), golden_labels()) > 1e3 * value_tolerance


# Of all losses that depend on probabilities alone and are means over the samples.
CLAIMS = [
    repeated_batch_has_the_same_loss,
    permuted_batch_has_the_same_loss,
    permuted_classes_have_the_same_loss,
    constants_added_to_a_sample_change_nothing,
    finite_at_extreme_logits,
    batches_of_other_shapes_are_refused,
]

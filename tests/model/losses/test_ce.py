from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from model.losses import LOSSES
from model.losses.ce import CELoss
from model.losses.kd import kd_loss
from model.losses.tfkd import tfkd_loss
from model.outputs import Batch, Outputs

LABELS = torch.tensor([0, 4, 2, 2, 1])


def logits() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(5, 6, dtype=torch.float64, generator=generator)).requires_grad_()


def loss_of(student: Tensor, labels: Tensor = LABELS, **options: float) -> Tensor:
    nothing = torch.zeros(len(labels), dtype=torch.int64)
    terms = CELoss(**options)(Outputs(student), None, Batch(torch.empty(0), labels, nothing, nothing))
    assert list(terms) == ["ce"]
    return terms["ce"]


def targets(smoothing: float) -> np.ndarray:
    """Returns (1 - s) on the label, and s spread evenly over all classes, the label's too."""
    return (1 - smoothing) * np.eye(6)[LABELS.numpy()] + smoothing / 6


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_loss_is_the_cross_entropy_with_the_smoothed_labels_mean_over_the_batch(smoothing: float) -> None:
    student = logits()
    log_p = log_softmax(student.detach().numpy())
    loss = loss_of(student, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(-(targets(smoothing) * log_p).sum(axis=1).mean(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, student)
    np.testing.assert_allclose(gradient.numpy(), (np.exp(log_p) - targets(smoothing)) / 5, rtol=1e-10, atol=1e-16)


def test_nothing_is_smoothed_by_default() -> None:
    assert LOSSES.resolve({"name": "ce"}) == ({"name": "ce", "label_smoothing": 0.0, "weight": None}, [])
    assert torch.equal(loss_of(logits()), loss_of(logits(), label_smoothing=0.0))


@pytest.mark.parametrize("smoothing", [0.05, 0.1, 0.5])
def test_smoothing_is_the_divergence_from_a_virtual_teacher_plus_its_entropy(smoothing: float) -> None:
    """Yuan et al., 2020: the teacher has 1 - s + s/C for the label and s/C for each other class, whatever the image."""
    student = logits()
    teacher = targets(smoothing)
    log_p = log_softmax(student.detach().numpy())
    divergence = (teacher * (np.log(teacher) - log_p)).sum(axis=1).mean()
    sure, other = 1 - smoothing + smoothing / 6, smoothing / 6
    entropy = -(sure * np.log(sure) + 5 * other * np.log(other))
    loss = loss_of(student, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(divergence + entropy, rel=1e-12)
    # The same from our own two losses of a teacher: the one that is written down, and plain distillation at T = 1.
    virtual = tfkd_loss(student, LABELS, sure, 1.0, "paper")
    assert loss.item() == pytest.approx(virtual.item() + entropy, rel=1e-12)
    plain = kd_loss(student, torch.tensor(np.log(teacher)), 1.0)
    assert loss.item() == pytest.approx(plain.item() + entropy, rel=1e-12)
    gradients = [torch.autograd.grad(each, student)[0] for each in (loss, virtual, plain)]
    np.testing.assert_allclose(gradients[1].numpy(), gradients[0].numpy(), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(gradients[2].numpy(), gradients[0].numpy(), rtol=1e-9, atol=1e-15)


def test_known_value() -> None:
    student = torch.tensor([[2, 0, -1], [0.5, 1.5, -0.5]], dtype=torch.float64)
    assert loss_of(student, torch.tensor([0, 1])).item() == pytest.approx(0.288726, abs=6e-7)


def test_labels_are_needed_and_no_teacher_is() -> None:
    assert not CELoss().needs_teacher
    assert CELoss().needs_labels
    assert not CELoss().least_at_teacher


def test_describe_states_the_weight_and_the_smoothing() -> None:
    assert CELoss().describe() == "CE x 1, mean over the batch"
    assert CELoss(label_smoothing=0.1).describe() == "CE x 1 with label smoothing 0.1, mean over the batch"


@pytest.mark.parametrize(
    ("value", "problem"), [(1, "1 is not below 1"), (-0.1, "-0.1 is below 0"), ("0.1", "expected a number, got '0.1'")]
)
def test_smoothing_out_of_range_is_refused(value: object, problem: str) -> None:
    (found,) = LOSSES.resolve({"name": "ce", "label_smoothing": value})[1]
    assert found[0] == "label_smoothing"
    assert found[1].startswith(problem)

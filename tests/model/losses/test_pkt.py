"""Oracles: values of the reference implementation, the formula in numpy, known neighbourhoods."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import check_golden, emb_s, emb_t
from stand_ins import any_batch, created, maps_of, outputs_of, probe_of, turned

from model.losses.pkt import neighbours, pkt_loss


def formula(student: np.ndarray, teacher: np.ndarray, eps: float = 1e-7) -> float:
    def probabilities(vectors: np.ndarray) -> np.ndarray:
        number = len(vectors)
        lengths = np.sqrt((vectors**2).sum(axis=1)) + eps
        kernel = np.empty((number, number))
        for i, j in np.ndindex(number, number):
            kernel[i, j] = ((vectors[i] @ vectors[j]) / (lengths[i] * lengths[j]) + 1) / 2
        return kernel / kernel.sum(axis=1, keepdims=True)

    s, t = probabilities(student), probabilities(teacher)
    return float((t * np.log((t + eps) / (s + eps))).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_is_the_reference_implementations(dtype: torch.dtype) -> None:
    student = emb_s().detach().to(dtype).requires_grad_()
    check_golden("PKT", pkt_loss(student, emb_t().to(dtype)), student)


@pytest.mark.parametrize("eps", [1e-7, 1e-3])
def test_the_loss_is_the_formula(eps: float) -> None:
    student, teacher = maps_of(5), maps_of(9, seed=1)
    expected = formula(student.detach().numpy(), teacher.detach().numpy(), eps)
    assert pkt_loss(student, teacher, eps).item() == pytest.approx(expected, rel=1e-11)


def test_known_neighbourhoods() -> None:
    vectors = torch.tensor([[2.0, 0], [0, 3], [-1, 0]], dtype=torch.float64)
    kernel = torch.tensor([[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]], dtype=torch.float64)
    torch.testing.assert_close(neighbours(vectors), kernel / kernel.sum(1, keepdim=True), rtol=0, atol=1e-6)


def test_samples_own_scales_and_a_common_rotation_change_nothing() -> None:
    student, teacher = emb_s(), emb_t()
    expected = pkt_loss(student, teacher).item()
    factors = torch.linspace(0.5, 30, 8, dtype=torch.float64)[:, None]
    assert pkt_loss(student * factors, teacher).item() == pytest.approx(expected, rel=2e-7)
    assert pkt_loss(turned(student), teacher).item() == pytest.approx(expected, rel=1e-10)
    assert pkt_loss(student + 1, teacher).item() != pytest.approx(expected, rel=0.01)


def test_a_batch_repeated_twice_has_half_the_loss() -> None:
    for eps, tolerance in ((1e-7, 1e-5), (1e-12, 1e-9)):
        once, twice = (pkt_loss(emb_s().repeat(n, 1), emb_t().repeat(n, 1), eps).item() for n in (1, 2))
        assert twice == pytest.approx(once / 2, rel=tolerance)


def test_at_the_teacher_the_loss_is_0_and_the_gradient_that_of_its_epsilon() -> None:
    student = emb_t().requires_grad_()
    loss = pkt_loss(student, emb_t())
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert torch.autograd.grad(loss, student)[0].norm() < 1e-8
    assert pkt_loss(-emb_t().roll(1, 0), emb_t()) > 1e-3


def test_opposite_and_empty_embeddings_are_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(1, 512, generator=generator)
    signs = torch.tensor([1.0, -1, 1, -1, -1, 0])[:, None]
    teacher = torch.randn(6, 7, generator=generator)
    for scale in (1e-3, 1.0, 1e3):
        student = (scale * signs * direction).requires_grad_()
        loss = pkt_loss(student, teacher)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, student)[0].isfinite().all()
        assert pkt_loss(teacher, student).isfinite()
    assert pkt_loss(teacher[:1], direction).item() == 0  # a sample is its own only neighbour


def test_the_embeddings_are_compared() -> None:
    loss = created("pkt", eps=1e-5)
    loss.attach(probe_of("small", width=5), probe_of("large", width=9))
    student, teacher = maps_of(5), maps_of(9, seed=1)
    terms = loss(outputs_of(embedding=student), outputs_of(embedding=teacher), any_batch(6))
    assert list(terms) == ["pkt"]
    assert terms["pkt"].item() == pkt_loss(student, teacher, 1e-5).item()
    assert (created("pkt").eps, loss.usual_weight) == (1e-7, 30000)

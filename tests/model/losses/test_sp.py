"""Oracles: values of the reference implementation, the formula as loops over pairs of samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import check_golden, student_maps, teacher_maps
from stand_ins import any_batch, created, maps_of, outputs_of, probe_of, turned

from model.errors import InputError
from model.losses.sp import similarities, sp_loss


def formula(student: np.ndarray, teacher: np.ndarray) -> float:
    def rows(maps: np.ndarray) -> np.ndarray:
        gram = np.array([[(one * other).sum() for other in maps] for one in maps])
        return np.array([row / np.sqrt((row**2).sum()) for row in gram])

    return float(((rows(student) - rows(teacher)) ** 2).sum() / len(student) ** 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_is_the_reference_implementations(dtype: torch.dtype) -> None:
    student = student_maps().detach().to(dtype).requires_grad_()
    check_golden("SP", sp_loss(student, teacher_maps().to(dtype)), student)


def test_the_loss_is_the_formula_for_maps_of_any_shapes() -> None:
    student, teacher = maps_of(3, 5, 4), maps_of(7, 2, 2, seed=1)
    expected = formula(student.detach().numpy(), teacher.detach().numpy())
    assert sp_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_known_similarities() -> None:
    maps = torch.tensor([[3.0, 0], [0, 2], [4, 4]]).view(3, 2, 1, 1)
    expected = torch.tensor([[9.0, 0, 12], [0, 4, 8], [12, 8, 32]])
    torch.testing.assert_close(similarities(maps), expected / expected.square().sum(1, keepdim=True).sqrt())


def test_a_common_scale_or_rotation_of_the_features_changes_nothing_and_a_samples_own_scale_does() -> None:
    student, teacher = student_maps(), teacher_maps()
    expected = sp_loss(student, teacher).item()
    assert sp_loss(7.5 * student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert sp_loss(turned(student.flatten(1)), teacher).item() == pytest.approx(expected, rel=1e-10)
    factors = torch.linspace(0.1, 30, 8, dtype=torch.float64).view(8, 1, 1, 1)
    assert sp_loss(student * factors, teacher).item() != pytest.approx(expected, rel=0.01)


def test_a_batch_repeated_twice_has_half_the_loss() -> None:
    once, twice = (sp_loss(student_maps().repeat(n, 1, 1, 1), teacher_maps().repeat(n, 1, 1, 1)) for n in (1, 2))
    assert twice.item() == pytest.approx(once.item() / 2, rel=1e-12)


def test_at_the_teacher_value_and_gradient_are_0() -> None:
    student = teacher_maps().requires_grad_()
    loss = sp_loss(student, teacher_maps())
    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].abs().max() <= 3e-16
    assert sp_loss(student_maps(), teacher_maps()) > 0.05


def test_a_single_sample_is_like_itself() -> None:
    student = student_maps().detach()[:1].requires_grad_()
    loss = sp_loss(student, teacher_maps()[:1])
    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].abs().max() <= 3e-16


def test_a_sample_of_zeros_has_finite_gradients_no_larger_than_others() -> None:
    student = student_maps().detach().float()
    student[2] = 0
    student.requires_grad_()
    loss = sp_loss(student, teacher_maps().float())
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.abs().max() < 1
    everywhere = torch.zeros(8, 4, 6, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(sp_loss(everywhere, teacher_maps().float()), everywhere)
    assert (gradient == 0).all()


def test_the_last_maps_are_compared() -> None:
    loss = created("sp")
    loss.attach(probe_of("small", (2, 8, 8), (3, 4, 4)), probe_of("large", (5, 2, 2)))
    first, last, teacher = maps_of(2, 8, 8), maps_of(3, 4, 4, seed=1), maps_of(5, 2, 2, seed=2)
    terms = loss(outputs_of(first, last), outputs_of(teacher), any_batch(6))
    assert list(terms) == ["sp"]
    assert terms["sp"].item() == sp_loss(last, teacher).item()
    assert loss.usual_weight == 3000


def test_a_net_without_maps_is_refused() -> None:
    with pytest.raises(InputError, match="loss 'sp' reads the stages' features: student 'small' does not give them"):
        created("sp").attach(probe_of("small", width=3), probe_of("large", (5, 2, 2)))

"""Oracles: values of the reference implementation, the formula over all pairs of channels in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden import check_golden, student_maps, teacher_maps
from stand_ins import any_batch, created, largest_tensor, maps_of, outputs_of, probe_of
from torch.nn import functional as F

from model.errors import InputError
from model.losses.nst import mean_kernel, nst_loss


def kernel(own: np.ndarray, other: np.ndarray) -> float:
    """Returns `(x . y)^2` by its definition, `(N, C, P)` each."""
    products = (own[:, :, None, :] * other[:, None, :, :]).sum(axis=3)
    return float((products**2).mean())


def formula(student: np.ndarray, teacher: np.ndarray) -> float:
    def channels(maps: np.ndarray) -> np.ndarray:
        flat = maps.reshape(*maps.shape[:2], -1)
        return flat / np.sqrt((flat**2).sum(axis=2, keepdims=True))

    s, t = channels(student), channels(teacher)
    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_is_the_reference_implementations(dtype: torch.dtype) -> None:
    student = student_maps().detach().to(dtype).requires_grad_()
    check_golden("NST", nst_loss(student, teacher_maps().to(dtype)), student)


SHAPES = [((3, 5, 4), (7, 5, 4)), ((20, 2, 2), (30, 2, 2)), ((2, 3, 3), (60, 3, 3)), ((4, 1, 1), (3, 1, 1))]


@pytest.mark.parametrize(("student_shape", "teacher_shape"), SHAPES)
def test_the_loss_is_the_formula_for_many_positions_and_for_many_channels(
    student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]
) -> None:
    student, teacher = maps_of(*student_shape), maps_of(*teacher_shape, seed=1)
    expected = formula(student.detach().numpy(), teacher.detach().numpy())
    assert nst_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("own_shape", "other_shape"), SHAPES)
def test_the_mean_kernel_is_its_definition(own_shape: tuple[int, ...], other_shape: tuple[int, ...]) -> None:
    own, other = maps_of(*own_shape).flatten(2), maps_of(*other_shape, seed=1).flatten(2)
    expected = kernel(own.detach().numpy(), other.detach().numpy())
    assert mean_kernel(own, other).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(20, 2, 2), (3, 4, 4)])
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    student, teacher = maps_of(*shape, size=2), maps_of(5, *shape[1:], seed=1, size=2).detach()
    assert torch.autograd.gradcheck(lambda s: nst_loss(s, teacher), (student,))


@pytest.mark.parametrize("shape", [(16, 12, 12), (64, 3, 3), (30, 5, 6)])
def test_nothing_larger_than_the_maps_is_ever_made(shape: tuple[int, ...]) -> None:
    """The broadcast form of the definition would take as many times that as there are channels."""
    student, teacher = maps_of(*shape), maps_of(*shape, seed=1).detach()
    with largest_tensor() as made:
        nst_loss(student, teacher).backward()
    assert made.largest == student.numel()


def test_neither_size_nor_sign_of_a_channel_matters() -> None:
    student, teacher = student_maps(), teacher_maps()
    expected = nst_loss(student, teacher).item()
    factors = torch.linspace(-20, 30, 32, dtype=torch.float64).view(8, 4, 1, 1)
    assert nst_loss(student * factors, teacher).item() == pytest.approx(expected, rel=1e-11)


def test_at_the_teacher_value_and_gradient_are_0_for_the_teachers_part_is_counted() -> None:
    student = teacher_maps().requires_grad_()
    loss = nst_loss(student, teacher_maps())
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert torch.autograd.grad(loss, student)[0].abs().max() <= 3e-16


def test_a_batch_repeated_twice_has_the_same_loss() -> None:
    once, twice = (nst_loss(student_maps().repeat(n, 1, 1, 1), teacher_maps().repeat(n, 1, 1, 1)) for n in (1, 2))
    assert twice.item() == pytest.approx(once.item(), rel=1e-12)


@pytest.mark.parametrize("sizes", [(8, 4), (4, 8)])
def test_the_larger_map_is_averaged_first(sizes: tuple[int, int]) -> None:
    student, teacher = maps_of(2, sizes[0], sizes[0]), maps_of(3, sizes[1], sizes[1], seed=1)
    own, other = (F.adaptive_avg_pool2d(each, 4).detach().numpy() for each in (student, teacher))
    assert nst_loss(student, teacher).item() == pytest.approx(formula(own, other), rel=1e-12)


def test_channels_of_zeros_have_no_gradient_and_leave_those_of_others_alone() -> None:
    student = student_maps().detach().float()
    student[2, 1] = 0
    student.requires_grad_()
    loss = nst_loss(student, teacher_maps().float())
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[2, 1] == 0).all()
    assert gradient[2, 0].abs().sum() > 0
    assert nst_loss(0 * student, 0 * teacher_maps().float()).item() == 0


# --- stages -----------------------------------------------------------------------------------------------------

STUDENT, TEACHER = [(2, 8, 8), (3, 4, 4)], [(4, 8, 8), (5, 6, 6), (6, 4, 4)]


@pytest.mark.parametrize(
    ("options", "pairs"),
    [({}, [(0, 0), (1, 2)]), ({"student_stages": [2], "teacher_stages": [1]}, [(1, 0)])],
)
def test_the_stages_are_summed(options: dict[str, Any], pairs: list[tuple[int, int]]) -> None:
    loss = created("nst", **options)
    loss.attach(probe_of("small", *STUDENT), probe_of("large", *TEACHER))
    student = [maps_of(*shape) for shape in STUDENT]
    teacher = [maps_of(*shape, seed=1) for shape in TEACHER]
    expected = sum(nst_loss(student[own], teacher[other]).item() for own, other in pairs)
    terms = loss(outputs_of(*student), outputs_of(*teacher), any_batch(6))
    assert list(terms) == ["nst"]
    assert terms["nst"].item() == pytest.approx(expected, rel=1e-12)
    assert loss.usual_weight == 50


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"student_stages \[1, 2\] and teacher_stages \[1\] are not of one length"):
        created("nst", student_stages=[1, 2], teacher_stages=[1])
    with pytest.raises(InputError, match="loss 'nst' reads the stages' features: they have no height and width in"):
        created("nst").attach(probe_of("small", (2, 9, 9)), probe_of("large", *TEACHER))

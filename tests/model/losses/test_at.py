"""Oracles: values of the reference implementation, the formula in numpy, known attention maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden import check_golden, maps, student_maps, teacher_maps
from stand_ins import any_batch, created, maps_of, outputs_of, probe_of
from torch import Tensor

from model.errors import InputError
from model.losses import LOSSES
from model.losses.at import at_loss, attention


def formula(student: np.ndarray, teacher: np.ndarray, p: float) -> float:
    """Returns the mean over samples and positions, of maps of one size."""

    def attended(values: np.ndarray) -> np.ndarray:
        energy = (np.abs(values) ** p).mean(axis=1).reshape(len(values), -1)
        return energy / np.sqrt((energy**2).sum(axis=1, keepdims=True))

    return float(((attended(student) - attended(teacher)) ** 2).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_is_the_reference_implementations(dtype: torch.dtype) -> None:
    student = student_maps(4, 8).detach().to(dtype).requires_grad_()
    check_golden("AT_p2_pool8to6", at_loss(student, teacher_maps().to(dtype)), student)


@pytest.mark.parametrize("p", [1, 2, 2.5, 4])
def test_the_loss_is_the_formula(p: float) -> None:
    student, teacher = maps_of(3, 5, 4), maps_of(7, 5, 4, seed=1)
    expected = formula(student.detach().numpy(), teacher.detach().numpy(), p)
    assert at_loss(student, teacher, p).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_the_larger_maps_are_averaged_before_their_attention_is_formed(larger: str) -> None:
    large, small = maps_of(3, 8, 8), maps_of(4, 4, 4, seed=1)
    blocks = large.detach().numpy().reshape(6, 3, 4, 2, 4, 2).mean(axis=(3, 5))
    pair = (large, small) if larger == "student" else (small, large)
    expected = formula(blocks, small.detach().numpy(), 2)
    assert at_loss(*pair).item() == pytest.approx(expected, rel=1e-12)


def test_known_attention() -> None:
    values = torch.tensor([[[[1.0, -2.0]], [[1.0, 0.0]]]])  # two channels of 1x2
    energy = torch.tensor([[1.0, 2.0]])  # (1 + 1) / 2, (4 + 0) / 2
    torch.testing.assert_close(attention(values), energy / 5**0.5)
    torch.testing.assert_close(attention(values, p=1), torch.tensor([[0.5**0.5, 0.5**0.5]]))


def test_a_higher_power_makes_strong_responses_count_more() -> None:
    values = torch.tensor([[[[1.0, 2.0]]]])
    shares = [attention(values, p)[0, 1].item() for p in (1, 2, 4)]
    assert shares == pytest.approx([2**p / (1 + 4**p) ** 0.5 for p in (1, 2, 4)], rel=1e-6)
    assert shares == sorted(shares)


def test_neither_size_nor_sign_of_a_samples_responses_matters() -> None:
    student, teacher = student_maps(), teacher_maps()
    factors = torch.linspace(0.1, 30, 8, dtype=torch.float64).view(8, 1, 1, 1)
    expected = at_loss(student, teacher).item()
    assert at_loss(student * factors, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert at_loss(-student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_at_the_teacher_value_and_gradient_are_0() -> None:
    student = teacher_maps().requires_grad_()
    loss = at_loss(student, teacher_maps())
    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].abs().max() <= 3e-16


def test_a_batch_repeated_twice_has_the_same_loss() -> None:
    once, twice = (at_loss(student_maps().repeat(n, 1, 1, 1), teacher_maps().repeat(n, 1, 1, 1)) for n in (1, 2))
    assert twice.item() == pytest.approx(once.item(), rel=1e-12)


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_maps_of_zeros_have_no_gradient_and_leave_those_of_others_alone(p: float) -> None:
    student = student_maps().detach().float()
    student[2] = 0
    student.requires_grad_()
    loss = at_loss(student, teacher_maps().float(), p)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[2] == 0).all()
    assert gradient[3].abs().sum() > 0


# --- stages -----------------------------------------------------------------------------------------------------

STUDENT, TEACHER = [(2, 8, 8), (3, 4, 4)], [(4, 8, 8), (5, 6, 6), (6, 4, 4)]


def stages_of(shapes: list[Any], seed: int) -> list[Tensor]:
    return [maps_of(*shape, seed=seed + number) for number, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("teacher_shapes", "options", "pairs"),
    [
        (TEACHER, {}, [(0, 0), (1, 2)]),  # of equal size
        (TEACHER[1:], {}, [(0, 0), (1, 1)]),  # one to one
        (TEACHER, {"student_stages": [2, 1], "teacher_stages": [1, 2]}, [(1, 0), (0, 1)]),
    ],
)
def test_the_stages_are_summed(
    teacher_shapes: list[Any], options: dict[str, Any], pairs: list[tuple[int, int]]
) -> None:
    loss = created("at", p=3.0, **options)
    loss.attach(probe_of("small", *STUDENT), probe_of("large", *teacher_shapes))
    student, teacher = stages_of(STUDENT, 0), stages_of(teacher_shapes, 10)
    expected = sum(at_loss(student[own], teacher[other], 3).item() for own, other in pairs)
    terms = loss(outputs_of(*student), outputs_of(*teacher), any_batch(6))
    assert list(terms) == ["at"]
    assert terms["at"].item() == pytest.approx(expected, rel=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"student_stages \[1\] and teacher_stages null are not of one length"):
        created("at", student_stages=[1])
    with pytest.raises(InputError, match="loss 'at' reads the stages' features: teacher 'large' has no stage 4;"):
        created("at", student_stages=[1], teacher_stages=[4]).attach(
            probe_of("small", *STUDENT), probe_of("large", *TEACHER)
        )
    with pytest.raises(InputError, match="student 'small' does not give them"):
        created("at").attach(probe_of("small", width=3), probe_of("large", *TEACHER))
    assert LOSSES.resolve({"name": "at", "p": 0.5})[1] == [("p", "0.5 is below 1.0")]


def test_the_defaults_are_those_of_the_reference_implementation() -> None:
    loss = created("at")
    loss.attach(probe_of("small", *STUDENT), probe_of("large", *STUDENT))
    assert (loss.p, loss.usual_weight) == (2, 1000)
    assert loss.describe() == (
        "MSE of attention maps (mean of |f|^2 over the channels, of length 1), sum over student stages [1, 2] to"
        " teacher stages [1, 2], mean over the batch and the map"
    )


def test_the_golden_maps_are_no_minimum() -> None:
    assert at_loss(maps(4, 6, 0.5, 1), maps(4, 6, 0.8, 1.5)) > 1e-3

"""Oracles: values of the reference implementation, the formulas as loops over triplets, finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from golden import check_golden, emb_s, emb_t
from stand_ins import any_batch, created, largest_tensor, maps_of, outputs_of, probe_of, turned
from torch import Tensor

from model.errors import InputError
from model.losses import rkd
from model.losses.rkd import rkd_angle_loss, rkd_distance_loss

Relations = Callable[[Tensor, Tensor], Tensor]


def smooth_l1(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def distance_formula(student: np.ndarray, teacher: np.ndarray) -> float:
    def relative(vectors: np.ndarray) -> np.ndarray:
        number = len(vectors)
        found = np.array([[np.linalg.norm(vectors[i] - vectors[j]) for j in range(number)] for i in range(number)])
        return found / found[found > 0].mean()

    pairs = zip(relative(student).flat, relative(teacher).flat, strict=True)
    return sum(smooth_l1(own - other) for own, other in pairs) / len(student) ** 2


def angle_formula(student: np.ndarray, teacher: np.ndarray) -> float:
    def cosine(vectors: np.ndarray, k: int, i: int, j: int) -> float:
        one, other = vectors[i] - vectors[k], vectors[j] - vectors[k]
        length = np.linalg.norm(one) * np.linalg.norm(other)
        return float(one @ other / length) if length else 0.0

    number = len(student)
    triplets = np.ndindex(number, number, number)
    return sum(smooth_l1(cosine(student, *t) - cosine(teacher, *t)) for t in triplets) / number**3


def weighted(student: Tensor, teacher: Tensor) -> Tensor:
    return 25 * rkd_distance_loss(student, teacher) + 50 * rkd_angle_loss(student, teacher)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_is_the_reference_implementations(dtype: torch.dtype) -> None:
    student = emb_s().detach().to(dtype).requires_grad_()
    check_golden("RKD_d25_a50", weighted(student, emb_t().to(dtype)), student)


@pytest.mark.parametrize("scale", [1, 30])
def test_both_losses_are_the_formulas(scale: float) -> None:
    """The teacher with one far sample: then some relative distances differ by more than the threshold of 1."""
    student, teacher = maps_of(5), maps_of(9, seed=1).detach()
    teacher[2] *= scale
    arrays = student.detach().numpy(), teacher.numpy()
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(distance_formula(*arrays), rel=1e-12)
    assert rkd_angle_loss(student, teacher).item() == pytest.approx(angle_formula(*arrays), rel=1e-12)


def test_angles_of_known_triangles() -> None:
    """An equilateral triangle against three samples on a line, the second in the middle."""
    student = torch.tensor([[0.0, 0], [1, 0], [0.5, 0.75**0.5]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [1], [2]], dtype=torch.float64)
    # Cosines of the student: 1/2 at each vertex, for 2 orders; of the teacher: 1, -1 and 1; with i = j both have 1.
    assert rkd_angle_loss(student, teacher).item() == pytest.approx(2 * (1 / 8 + 1 + 1 / 8) / 27, rel=1e-12)
    # Distances in units of their mean: all 1 against 3/4, 3/4, 3/2.
    assert rkd_distance_loss(student, teacher).item() == pytest.approx(2 * (1 / 32 + 1 / 32 + 1 / 8) / 9, rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 100])
def test_taken_in_chunks_angles_have_the_same_value_and_gradient(chunk: int) -> None:
    student, teacher = emb_s(), emb_t()
    whole, parts = rkd_angle_loss(student, teacher, 8), rkd_angle_loss(student, teacher, chunk)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-14)
    (expected,), (gradient,) = (torch.autograd.grad(3 * loss, student) for loss in (whole, parts))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-16)


def test_gradients_are_those_of_finite_differences() -> None:
    student, teacher = maps_of(4, size=5), maps_of(3, seed=1, size=5)
    assert torch.autograd.gradcheck(lambda s: rkd_angle_loss(s, teacher, 2), (student,))
    assert torch.autograd.gradcheck(lambda s: rkd_distance_loss(s, teacher), (student,))


def test_no_array_of_all_triplets_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = (torch.randn(40, width, requires_grad=width == 8) for width in (8, 12))
    monkeypatch.setattr(rkd, "CHUNK", 5 * 40 * 40)
    with largest_tensor() as made:
        rkd_angle_loss(student, teacher).backward()
    assert made.largest == 5 * 40 * 40
    with largest_tensor() as made, torch.no_grad():
        rkd_angle_loss(student, teacher)
    assert made.largest == 5 * 40 * 40
    monkeypatch.setattr(rkd, "CHUNK", 1)
    assert rkd_angle_loss(student, teacher).isfinite()


def test_only_the_student_gets_a_gradient_and_none_is_formed_where_none_is_wanted() -> None:
    student, teacher = maps_of(4), maps_of(3, seed=1)
    rkd_angle_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None
    with torch.no_grad():
        assert not rkd_angle_loss(student, teacher).requires_grad
    assert not rkd_angle_loss(student.detach(), teacher.detach()).requires_grad


def test_a_common_scale_shift_or_rotation_changes_nothing() -> None:
    student, teacher = emb_s(), emb_t()
    expected = weighted(student, teacher).item()
    for changed in (0.01 * student, 100 * student, student - 5, turned(student)):
        assert weighted(changed, teacher).item() == pytest.approx(expected, rel=1e-10)
    factors = torch.linspace(0.5, 30, 8, dtype=torch.float64)[:, None]
    assert weighted(student * factors, teacher).item() != pytest.approx(expected, rel=0.01)


def test_a_batch_repeated_twice_has_another_loss_of_known_size() -> None:
    once, twice = (weighted(emb_s().repeat(n, 1), emb_t().repeat(n, 1)).item() for n in (1, 2))
    assert twice / once == pytest.approx(1.03, abs=0.005)


def test_at_the_teacher_value_and_gradient_are_0() -> None:
    student = emb_t().requires_grad_()
    for loss in (rkd_distance_loss(student, emb_t()), rkd_angle_loss(student, emb_t())):
        assert loss.item() == 0
        assert torch.autograd.grad(loss, student)[0].abs().max() <= 3e-16


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_a_single_sample_has_no_relations(loss: Relations) -> None:
    student = torch.randn(1, 4, requires_grad=True)
    value = loss(student, torch.randn(1, 3))
    assert value.item() == 0
    assert (torch.autograd.grad(value, student)[0] == 0).all()


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])
def test_samples_on_one_point_have_finite_gradients_no_larger_than_others(
    loss: Relations,
) -> None:
    student = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    student[3] = student[1]
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    for own, other in ((student, teacher), (teacher, student), (torch.zeros(6, 4), teacher), (teacher, teacher * 0)):
        leaf = own.clone().requires_grad_()
        value = loss(leaf, other)
        assert value.isfinite()
        assert torch.autograd.grad(value, leaf)[0].abs().max() < 10


# --- the module -------------------------------------------------------------------------------------------------


def test_each_weight_is_of_its_term_and_0_leaves_it_out() -> None:
    student, teacher = maps_of(5), maps_of(9, seed=1)
    distance, angle = rkd_distance_loss(student, teacher).item(), rkd_angle_loss(student, teacher).item()
    for options, expected in (
        ({}, {"rkd_distance": 25 * distance, "rkd_angle": 50 * angle}),
        ({"distance_weight": 2.0, "angle_weight": 0.5}, {"rkd_distance": 2 * distance, "rkd_angle": angle / 2}),
        ({"distance_weight": 0.0}, {"rkd_angle": 50 * angle}),
        ({"angle_weight": 0.0}, {"rkd_distance": 25 * distance}),
    ):
        loss = created("rkd", **options)
        loss.attach(probe_of("small", width=5), probe_of("large", width=9))
        terms = loss(outputs_of(embedding=student), outputs_of(embedding=teacher), any_batch(6))
        assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-12)
    assert loss.usual_weight == 1


def test_weights_that_are_both_0_are_refused() -> None:
    with pytest.raises(InputError, match="distance_weight and angle_weight are both 0: nothing is left of the loss"):
        created("rkd", distance_weight=0.0, angle_weight=0.0)

"""Oracles: the paper's formula in numpy, the gradient's closed form, values of a reference implementation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from golden import (
    BATCH,
    CLASSES,
    GOLDEN,
    batch_of,
    check_golden_logits,
    golden_labels,
    golden_logits,
    softmax,
    student_logits,
    terms_of,
)
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES, kd
from model.losses.ce import CELoss
from model.losses.kd import DIVERGENCES, Divergence, KDLoss, kd_loss
from model.losses.objective import Objective
from model.outputs import Outputs

KDFunction = Callable[[Tensor, Tensor, float], Tensor]


def small_logits() -> tuple[Tensor, Tensor, Tensor]:
    student = torch.tensor([[2, 0, -1], [0.5, 1.5, -0.5]], dtype=torch.float64)
    teacher = torch.tensor([[1, 2, -1], [0, 3, 0]], dtype=torch.float64)
    return student, teacher, torch.tensor([0, 1])


def total_of(loss: KDLoss | CELoss, student: Tensor, teacher: Tensor | None, labels: Tensor) -> float:
    return float(sum(term.item() for term in terms_of(loss, student, teacher, labels).values()))


def paper_kd(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Returns T^2 * sum_c p_t (log p_t - log p_s), averaged over the batch."""
    p_s, p_t = (softmax(z.detach().numpy() / temperature) for z in (student, teacher))
    return float(temperature**2 * (p_t * (np.log(p_t) - np.log(p_s))).sum(axis=1).mean())


# --- the formula ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1, 1.5, 4, 20])
def test_the_loss_is_the_papers_formula(temperature: float) -> None:
    student, teacher = golden_logits()
    expected = paper_kd(student, teacher, temperature)
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)
    mean = kd_loss(student, teacher, temperature, "mean").item()
    assert mean == pytest.approx(expected / CLASSES, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1, 4, 20])
def test_the_gradient_is_the_difference_of_probabilities_times_T_over_B(temperature: float) -> None:
    student, teacher = golden_logits()
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, temperature), student)
    p_s, p_t = (softmax(z.detach().numpy() / temperature) for z in (student, teacher))
    np.testing.assert_allclose(gradient.numpy(), temperature / BATCH * (p_s - p_t), rtol=1e-10, atol=1e-16)


def test_at_a_high_temperature_the_loss_is_half_the_squared_difference_of_centred_logits() -> None:
    student, teacher = golden_logits()
    gap = (student - teacher).detach().numpy()
    limit = ((gap - gap.mean(axis=1, keepdims=True)) ** 2).sum(axis=1).mean() / (2 * CLASSES)
    assert limit == pytest.approx(4.99442, abs=5e-6)
    assert kd_loss(student, teacher, 1e4).item() == pytest.approx(4.99436, abs=5e-6)
    # Not much further: T^2 makes of the rounding of log-probabilities 1e-16 * 1e10.
    assert kd_loss(student, teacher, 1e5).item() == pytest.approx(limit, rel=1e-5)


def test_batchmean_is_mean_times_the_number_of_classes() -> None:
    student, teacher = golden_logits()
    batchmean, mean = (kd_loss(student, teacher, 4.0, reduction).item() for reduction in ("batchmean", "mean"))
    assert batchmean == pytest.approx(mean * CLASSES, rel=1e-14)


@pytest.mark.parametrize(
    ("temperature", "cross_entropy", "half_mse", "batchmean", "mean"),
    [
        (1, 1.114707, 0.066031, 0.574477, 0.191492),
        (3, 1.071103, 0.008918, 0.070658, 0.023553),
        (4, 1.081414, 0.004827, 0.039024, 0.013008),
        (5, 1.087017, 0.002993, 0.024584, 0.008195),
    ],
)
def test_the_divergences_without_T_squared_have_the_values_of_other_codebases(
    temperature: float, cross_entropy: float, half_mse: float, batchmean: float, mean: float
) -> None:
    student, teacher, _ = small_logits()
    cases: list[tuple[Divergence, kd.Reduction, float]] = [
        ("cross_entropy", "batchmean", cross_entropy),
        ("mse_probabilities", "mean", half_mse),
        ("kl", "batchmean", batchmean),
        ("kl", "mean", mean),
    ]
    for divergence, reduction, expected in cases:
        value = kd_loss(student, teacher, temperature, reduction, divergence, temperature_squared=False).item()
        assert value == pytest.approx(expected, abs=6e-7)


def paper_divergence(divergence: str, student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Returns D of logits over T, summed over classes and averaged over the batch, without T^2."""
    z_s, z_t = (z.detach().numpy() / temperature for z in (student, teacher))
    p_s, p_t = softmax(z_s), softmax(z_t)
    values = {
        "kl": p_t * (np.log(p_t) - np.log(p_s)),
        "cross_entropy": -p_t * np.log(p_s),
        "mse_probabilities": (p_s - p_t) ** 2 / 2,
        "mse_logits": (z_s - z_t) ** 2,
    }[divergence]
    return float(values.sum(axis=1).mean())


@pytest.mark.parametrize("temperature", [0.5, 1, 4, 20])
@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_every_divergence_is_its_formula_in_each_reduction_with_and_without_T_squared(
    divergence: Divergence, temperature: float
) -> None:
    student, teacher = golden_logits()
    expected = paper_divergence(divergence, student, teacher, temperature)
    for reduction, divided in (("batchmean", 1), ("mean", CLASSES)):
        for squared in (True, False):
            value = kd_loss(student, teacher, temperature, reduction, divergence, squared).item()  # type: ignore[arg-type]
            assert value == pytest.approx(expected * (temperature**2 if squared else 1) / divided, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 1000.0])
def test_mse_of_logits_is_the_reference_implementations_whatever_the_temperature(temperature: float) -> None:
    def mse(student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(student, teacher, temperature, "mean", "mse_logits")

    check_golden_logits("MSE_logits", mse)
    student, teacher = golden_logits()
    assert mse(student, teacher).item() == pytest.approx(F.mse_loss(student, teacher).item(), rel=1e-12)


def test_the_soft_cross_entropy_is_the_divergence_plus_the_teachers_entropy_and_has_its_gradient() -> None:
    student, teacher = golden_logits()
    cross_entropy, divergence = (kd_loss(student, teacher, 4.0, "batchmean", of) for of in ("cross_entropy", "kl"))
    p_t = softmax(teacher.numpy() / 4)
    entropy = -(p_t * np.log(p_t)).sum(axis=1).mean()
    assert cross_entropy.item() == pytest.approx(divergence.item() + 16 * entropy, rel=1e-12)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (cross_entropy, divergence)]
    np.testing.assert_allclose(*gradients, rtol=1e-10, atol=1e-16)


# --- what must hold for the loss whatever its values; each check also has to reject a broken one --------------


def check_golden(function: KDFunction) -> None:
    for case, temperature in (("KD_T1", 1.0), ("KD_T4", 4.0)):
        check_golden_logits(case, lambda student, teacher, at=temperature: function(student, teacher, at))


def check_equal_logits_are_the_minimum(function: KDFunction) -> None:
    for dtype, tolerance in ((torch.float64, 3e-16), (torch.float32, 2e-7)):
        student = student_logits(dtype)
        loss = function(student, student.detach().clone(), 4.0)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0
        assert gradient.abs().max() <= tolerance
        assert function(student, -student.detach(), 4.0) > 0


def check_a_batch_repeated_twice_has_the_same_loss(function: KDFunction) -> None:
    student, teacher = golden_logits()
    once, twice = function(student, teacher, 4.0), function(student.repeat(2, 1), teacher.repeat(2, 1), 4.0)
    assert twice.item() == pytest.approx(once.item(), rel=1e-14)


def check_finite_at_extreme_logits(function: KDFunction) -> None:
    for gap in (0.0, 1.0, 200.0, -200.0):  # 0: constant logits
        for batch, classes in ((4, 10), (1, 10), (4, 2), (1, 2)):
            teacher = torch.zeros(batch, classes)
            teacher[:, 0] = gap
            for student in (teacher.clone(), -teacher, torch.zeros_like(teacher)):
                loss = function(student.requires_grad_(), teacher, 1.0)
                (gradient,) = torch.autograd.grad(loss, student)
                assert loss.isfinite()
                assert loss >= 0
                assert gradient.isfinite().all()


def check_no_batch_of_one_is_spread_over_the_others(function: KDFunction) -> None:
    student, teacher = golden_logits()
    for wrong in (teacher[:1], teacher[:, :1], teacher[0], teacher[:4], teacher[:, :4]):
        with pytest.raises(ValueError, match=r"student logits \(8, 10\), teacher logits"):
            function(student, wrong, 4.0)


def check_gradients_of_a_sample_sum_to_zero(function: KDFunction) -> None:
    student, teacher = golden_logits()
    (gradient,) = torch.autograd.grad(function(student, teacher, 4.0), student)
    assert gradient.sum(dim=1).abs().max() <= 1e-15


CHECKS = [
    check_golden,
    check_equal_logits_are_the_minimum,
    check_a_batch_repeated_twice_has_the_same_loss,
    check_finite_at_extreme_logits,
    check_no_batch_of_one_is_spread_over_the_others,
    check_gradients_of_a_sample_sum_to_zero,
]


@pytest.mark.parametrize("check", CHECKS)
def test_kd_loss_passes(check: Callable[[KDFunction], None]) -> None:
    check(kd_loss)


@pytest.mark.parametrize("check", CHECKS[1:])
def test_kd_loss_with_the_mean_reduction_passes(check: Callable[[KDFunction], None]) -> None:
    check(lambda student, teacher, temperature: kd_loss(student, teacher, temperature, "mean"))


# Of cross-entropies the minimum is not 0; shifted logits have other squared differences.
@pytest.mark.parametrize(
    ("divergence", "without"),
    [
        ("cross_entropy", {check_equal_logits_are_the_minimum}),
        ("mse_probabilities", set()),
        ("mse_logits", {check_gradients_of_a_sample_sum_to_zero}),
    ],
)
def test_kd_loss_with_another_divergence_passes(divergence: Divergence, without: set[Any]) -> None:
    for check in CHECKS[1:]:
        if check not in without:
            check(lambda student, teacher, temperature: kd_loss(student, teacher, temperature, "mean", divergence))


def kl_of_kinds(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns T^2 KL per sample and class, unguarded."""
    log_p_s, log_p_t = (F.log_softmax(z / temperature, dim=1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True)


def kl_default_mean(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """kl_div's default, posing as the mean over the batch: also divided by the number of classes (a trap of many)."""
    return kl_of_kinds(student, teacher, temperature).mean()


def kl_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """A sum over the batch, as `size_average=False` makes of `mean` (MMRazor's configuration)."""
    return kl_of_kinds(student, teacher, temperature).sum() / 8


def kl_without_t2(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return kd_loss(student, teacher, temperature) / temperature**2


def kl_reversed(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return kd_loss(teacher, student, temperature)


def log_of_softmax(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p_s, p_t = (F.softmax(z / temperature, dim=1) for z in (student, teacher))
    return temperature**2 * (p_t * (p_t.log() - p_s.log())).sum(1).mean()


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p_t = F.softmax(teacher / temperature, dim=1)
    return -(temperature**2) * (p_t * F.log_softmax(student / temperature, dim=1)).sum(1).mean()


def mse_of_logits(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The 'vanilla KD' of a known library, but on logits."""
    return F.mse_loss(student, teacher)


BROKEN = [
    (kl_default_mean, check_golden),
    (kl_default_mean, check_no_batch_of_one_is_spread_over_the_others),
    (kl_sum, check_a_batch_repeated_twice_has_the_same_loss),  # the golden value, with its batch of 8, is blind to it
    (kl_without_t2, check_golden),
    (kl_reversed, check_golden),
    (log_of_softmax, check_finite_at_extreme_logits),
    (soft_cross_entropy, check_equal_logits_are_the_minimum),
    (mse_of_logits, check_gradients_of_a_sample_sum_to_zero),
]


@pytest.mark.parametrize(("broken", "check"), BROKEN)
def test_the_checks_reject_a_broken_loss(broken: KDFunction, check: Callable[[KDFunction], None]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(broken)


def test_classes_permuted_together_change_nothing() -> None:
    student, teacher = golden_logits()
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    permuted = kd_loss(student[:, order], teacher[:, order], 4.0).item()
    assert permuted == pytest.approx(GOLDEN["KD_T4"]["loss"], rel=1e-12)
    assert kd_loss(student[:, order], teacher, 4.0).item() != pytest.approx(permuted, rel=1e-3)


def test_a_constant_added_to_a_samples_logits_changes_nothing() -> None:
    student, teacher = golden_logits()
    for constants in (torch.linspace(-50, 50, BATCH).double()[:, None], torch.tensor(7.0)):
        shifted = kd_loss(student + constants, teacher - 2 * constants, 4.0).item()
        assert shifted == pytest.approx(GOLDEN["KD_T4"]["loss"], rel=1e-12)


# --- the objective ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "temperature", "mean", "batchmean"),
    [
        (0.9, 20, 0.200773, 0.544574),
        (0.95, 6, 0.206618, 0.590981),
        (0.5, 1.5, 0.249206, 0.458891),
        (0.9, 4, 0.216190, 0.590825),
    ],
)
def test_totals_are_those_of_the_ancestor(alpha: float, temperature: float, mean: float, batchmean: float) -> None:
    for reduction, expected in (("mean", mean), ("batchmean", batchmean)):
        loss = KDLoss(alpha=alpha, temperature=temperature, reduction=reduction)
        assert total_of(loss, *small_logits()) == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 0.5, "temperature": 4.0, "divergence": "cross_entropy"}, 8.795675),
        ({"alpha": 0.5, "temperature": 4.0, "divergence": "mse_probabilities", "reduction": "mean"}, 0.182983),
        ({"alpha": 0.3, "temperature": 5.0, "alpha_of": "hard", "temperature_squared": False}, 0.103826),
        ({"alpha": 0.8, "temperature": 3.0, "reduction": "mean"}, 0.227324),
        ({"alpha": 0.2, "temperature": 5.0, "alpha_of": "hard"}, 0.549422),
    ],
    ids=["KD-pytorch cse", "KD-pytorch mse", "knowledgeDistillation", "KD", "Knowledge-Distillation"],
)
def test_totals_are_those_of_other_codebases(options: dict[str, Any], expected: float) -> None:
    section, problems = LOSSES.resolve({"name": "kd", **options})
    assert problems == []
    assert total_of(LOSSES.create(section), *small_logits()) == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_an_alpha_of_the_labels_is_1_minus_that_of_the_teacher(alpha: float) -> None:
    student, teacher, labels = small_logits()
    hard = KDLoss(alpha=alpha, temperature=4.0, alpha_of="hard")
    soft = KDLoss(alpha=1 - alpha, temperature=4.0)
    assert terms_of(hard, student, teacher, labels) == terms_of(soft, student, teacher, labels)
    assert hard.needs_teacher == soft.needs_teacher == (alpha < 1)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.9, 1.0])
def test_alpha_weighs_the_teacher_and_the_rest_the_labels(alpha: float) -> None:
    student, teacher = golden_logits()
    labels = golden_labels()
    log_p = np.log(softmax(student.detach().numpy()))
    weighted = {
        "ce": -(1 - alpha) * log_p[np.arange(BATCH), labels.numpy()].mean(),
        "kd": alpha * paper_kd(student, teacher, 4.0),
    }
    terms = terms_of(KDLoss(alpha=alpha, temperature=4.0), student, teacher, labels)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {name: value for name, value in weighted.items() if value}, rel=1e-12
    )


@pytest.mark.parametrize("teacher_given", [True, False])
def test_with_alpha_0_the_run_is_exactly_the_one_without_a_teacher(
    teacher_given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kd, "kd_loss", lambda *_: pytest.fail("a term of weight 0 was computed"))
    student, teacher, labels = small_logits()
    loss = KDLoss(alpha=0.0, temperature=4.0)
    assert not loss.needs_teacher
    terms = terms_of(loss, student, teacher if teacher_given else None, labels)
    assert terms == terms_of(CELoss(), student, None, labels)
    assert list(terms) == ["ce"]


def test_with_alpha_1_the_labels_are_not_looked_at() -> None:
    student, teacher = golden_logits()
    outside = torch.full((BATCH,), -1)
    terms = terms_of(KDLoss(alpha=1.0, temperature=4.0), student, teacher, outside)
    assert list(terms) == ["kd"]
    assert terms["kd"].item() == pytest.approx(GOLDEN["KD_T4"]["loss"], rel=1e-12)


def test_a_teacher_that_is_needed_and_missing_is_refused() -> None:
    student, _, labels = small_logits()
    loss = KDLoss(alpha=0.5, temperature=4.0)
    assert loss.needs_teacher
    with pytest.raises(AssertionError):
        terms_of(loss, student, None, labels)


# --- standardised logits ----------------------------------------------------------------------------------


def standardised_kd(student: Tensor, teacher: Tensor) -> Tensor:
    loss = KDLoss(alpha=1.0, temperature=2.0, standardise=True)
    return terms_of(loss, student, teacher, golden_labels())["kd"]


def test_with_standardised_logits_loss_and_gradient_are_those_of_its_reference() -> None:
    check_golden_logits("LSKD_T2", standardised_kd)


def test_with_standardised_logits_neither_networks_scale_matters() -> None:
    student, teacher = golden_logits()
    scales = torch.linspace(0.5, 20, BATCH, dtype=torch.float64)[:, None]
    given = standardised_kd(student, teacher).item()
    assert standardised_kd(scales * student - 3, 7 * teacher + scales).item() == pytest.approx(given, rel=2e-7)
    assert standardised_kd(student, 5 * student.detach()).item() == pytest.approx(0, abs=1e-12)
    assert standardised_kd(-student, teacher).item() != pytest.approx(given, rel=1e-2)
    plain = [kd_loss(scale * student, teacher, 2.0).item() for scale in (1, 3)]
    assert plain[0] != pytest.approx(plain[1], rel=1e-2)


def test_the_labels_cross_entropy_is_that_of_the_logits_as_they_are() -> None:
    student, teacher = golden_logits()
    plain, standardised = (
        terms_of(KDLoss(alpha=0.5, temperature=2.0, standardise=on), student, teacher, golden_labels())
        for on in (False, True)
    )
    assert standardised["ce"].item() == plain["ce"].item()
    assert standardised["kd"].item() != pytest.approx(plain["kd"].item(), rel=1e-2)


# --- images without labels --------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [1, 5, BATCH])
def test_samples_without_labels_count_in_the_teacher_term_alone(labelled: int) -> None:
    student, teacher = golden_logits()
    labels = golden_labels()[:labelled]
    loss = KDLoss(alpha=0.25, temperature=4.0)
    assert not loss.needs_labels
    terms = terms_of(loss, student, teacher, labels)
    assert terms["kd"].item() == pytest.approx(0.25 * GOLDEN["KD_T4"]["loss"], rel=1e-12)
    expected = F.cross_entropy(student[:labelled], labels).item()
    assert terms["ce"].item() == pytest.approx(0.75 * expected, rel=1e-12)


def test_in_an_objective_the_teacher_term_sees_all_samples_and_cross_entropy_the_labelled_ones() -> None:
    student, teacher = golden_logits()
    labels = golden_labels()[:3]
    losses = {"ce": CELoss(), "kd": KDLoss(alpha=1.0, temperature=4.0)}
    objective = Objective(losses, {"ce": 0.5, "kd": None}, num_epochs=1)
    assert not objective.needs_labels
    terms = objective(Outputs(student), Outputs(teacher), batch_of(labels, BATCH))
    assert terms["kd"].item() == pytest.approx(GOLDEN["KD_T4"]["loss"], rel=1e-12)
    assert terms["ce"].item() == pytest.approx(0.5 * F.cross_entropy(student[:3], labels).item(), rel=1e-12)


def test_without_a_teacher_term_there_is_no_use_for_images_without_labels() -> None:
    assert KDLoss(alpha=0.0, temperature=4.0).needs_labels
    assert not KDLoss(alpha=1.0, temperature=4.0).needs_labels


@pytest.mark.parametrize(
    ("divergence", "least"), [("cross_entropy", False), *((d, True) for d in DIVERGENCES if d != "cross_entropy")]
)
def test_all_divergences_but_the_cross_entropy_are_said_to_vanish_at_the_teacher(
    divergence: Divergence, least: bool
) -> None:
    loss = KDLoss(alpha=1.0, temperature=4.0, divergence=divergence)
    assert loss.least_at_teacher == least
    student, _ = golden_logits()
    assert (total_of(loss, student, student.detach(), golden_labels()) == pytest.approx(0, abs=1e-12)) == least


# --- noise on the teacher's logits ------------------------------------------------------------------------


def noise_of(loss: KDLoss, seed: int, samples: int = 4000) -> Tensor:
    """Returns the noise: the gradient of a squared difference of logits is twice what is between them."""
    torch.manual_seed(seed)
    student = torch.zeros(samples, CLASSES, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(samples, dtype=torch.int64)
    total = terms_of(loss, student, torch.zeros_like(student), labels)["kd"]
    (gradient,) = torch.autograd.grad(total, student)
    return gradient * samples / -2


def noisy_loss(std: float, probability: float = 1.0) -> KDLoss:
    return KDLoss(
        alpha=1.0,
        temperature=2.0,
        divergence="mse_logits",
        teacher_noise_std=std,
        teacher_noise_probability=probability,
    )


@pytest.mark.parametrize("probability", [1.0, 0.4])
def test_a_share_of_the_teachers_samples_gets_gaussian_noise_in_training(probability: float) -> None:
    noise = noise_of(noisy_loss(0.3, probability), seed=0)
    rows = (noise != 0).any(dim=1)
    assert rows.double().mean().item() == pytest.approx(probability, abs=0.03)
    found = noise[rows]
    assert (found != 0).all(), "a sample has noise on all of its classes or on none"
    assert found.mean().item() == pytest.approx(0, abs=0.01)
    assert found.std().item() == pytest.approx(0.3, rel=0.03)
    kurtosis = (found / found.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.2)  # of a normal distribution
    correlation = np.corrcoef(found.numpy(), rowvar=False) - np.eye(CLASSES)
    assert np.abs(correlation).max() < 0.12, "each class has its own"


def test_the_noise_is_a_function_of_the_global_seed() -> None:
    loss = noisy_loss(0.3, 0.4)
    assert torch.equal(noise_of(loss, seed=1), noise_of(loss, seed=1))
    assert not torch.equal(noise_of(loss, seed=1), noise_of(loss, seed=2))


def test_there_is_no_noise_in_validation_and_nothing_is_drawn_without_it() -> None:
    assert (noise_of(noisy_loss(0.3).eval(), seed=0) == 0).all()
    assert (noise_of(noisy_loss(0.0), seed=0) == 0).all()
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(()))


# --- what the log says ------------------------------------------------------------------------------------

NAMES = {
    "KL": "kl",
    "soft CE": "cross_entropy",
    "squared difference of probabilities / 2": "mse_probabilities",
    "squared difference of (logits / T)": "mse_logits",
}
DESCRIBED = re.compile(
    r"CE x (\S+) \+ (.+) x (\S+) x (\S+) \(alpha (\S+)( of the labels)?, (.+) at T (\S+)\), mean over the (.*)"
)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("alpha_of", ["teacher", "hard"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_describe_states_the_weights_that_forward_applies(
    divergence: Divergence, reduction: kd.Reduction, alpha_of: Any, squared: bool
) -> None:
    student, teacher = golden_logits()
    labels = golden_labels()
    ce = total_of(CELoss(), student, None, labels)
    for alpha in (0.0, 0.1, 0.37, 0.95, 1.0):
        for temperature in (0.5, 1.0, 4.0, 20.0):
            loss = KDLoss(
                alpha=alpha,
                temperature=temperature,
                reduction=reduction,
                alpha_of=alpha_of,
                divergence=divergence,
                temperature_squared=squared,
            )
            found = DESCRIBED.fullmatch(loss.describe())
            assert found is not None
            assert (float(found[5]), float(found[8])) == pytest.approx((alpha, temperature))
            assert bool(found[6]) == (alpha_of == "hard")
            assert found[7] == ("T^2" if squared else "no T^2")
            soft = paper_divergence(NAMES[found[2]], student, teacher, temperature)
            soft /= {"batch": 1, "batch, of the teacher term over the classes, too": CLASSES}[found[9]]
            described = float(found[1]) * ce + float(found[3]) * float(found[4]) * soft
            assert described == pytest.approx(total_of(loss, student, teacher, labels), rel=1e-3)


def test_describe_is_one_readable_line() -> None:
    assert KDLoss(alpha=0.9, temperature=4.0).describe() == (
        "CE x 0.1 + KL x 0.9 x 16 (alpha 0.9, T^2 at T 4), mean over the batch"
    )
    noisy = KDLoss(alpha=0.8, temperature=3.0, alpha_of="hard", teacher_noise_std=0.3, teacher_noise_probability=0.4)
    assert noisy.describe() == (
        "CE x 0.8 + KL x 0.2 x 9 (alpha 0.8 of the labels, T^2 at T 3), mean over the batch; "
        "in training N(0, 0.3^2) on the teacher's logits of 0.4 of the samples"
    )
    assert KDLoss(alpha=1.0, temperature=2.0, standardise=True).describe() == (
        "CE x 0 + KL x 1 x 4 (alpha 1, T^2 at T 2), mean over the batch; logits standardised"
    )


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("alpha", 1.4, "1.4 is above 1"),
        ("alpha", -0.1, "-0.1 is below 0"),
        ("alpha", float("nan"), "nan is not a finite number"),
        ("alpha", True, "expected a number, got True"),
        ("alpha", "0.5", "expected a number, got '0.5'"),
        ("temperature", 0, "0 is not above 0"),
        ("temperature", -4.0, "-4.0 is not above 0"),
        ("temperature", 1001, "1001 is above 1000"),
        ("temperature", float("inf"), "inf is not a finite number"),
        ("temperature", None, "expected a number, got None"),
        ("reduction", "sum", "'sum' is not one of 'batchmean' or 'mean'"),
        ("alpha_of", "student", "'student' is not one of 'teacher' or 'hard'"),
        ("divergence", "mse", "'mse' is not one of 'kl', 'cross_entropy', 'mse_probabilities' or 'mse_logits'"),
        ("temperature_squared", 1, "expected true or false, got 1"),
        ("standardise", 1, "expected true or false, got 1"),
        ("teacher_noise_std", -0.1, "-0.1 is below 0"),
        ("teacher_noise_probability", 0, "0 is not above 0"),
        ("teacher_noise_probability", 1.1, "1.1 is above 1"),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: object, problem: str) -> None:
    section = {"name": "kd", "alpha": 0.5, "temperature": 4.0, option: value}
    (found,) = LOSSES.resolve(section)[1]
    assert found[0] == option
    assert found[1].startswith(problem)


def test_options_at_their_limits_are_accepted_and_the_others_are_hintons_by_default() -> None:
    for alpha, temperature in ((0, 1e-3), (1, 1000)):
        given = {"name": "kd", "alpha": alpha, "temperature": temperature}
        resolved, problems = LOSSES.resolve(given)
        assert problems == []
        assert resolved == given | {
            "reduction": "batchmean",
            "alpha_of": "teacher",
            "divergence": "kl",
            "temperature_squared": True,
            "standardise": False,
            "teacher_noise_std": 0.0,
            "teacher_noise_probability": 1.0,
            "weight": None,
        }


def test_alpha_and_temperature_have_no_default() -> None:
    _, problems = LOSSES.resolve({"name": "kd"})
    assert problems == [(name, "is missing and has no default") for name in ("alpha", "temperature")]

"""Oracles: the paper's formula in numpy, the gradient's closed form, values of a reference implementation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES, kd
from model.losses.ce import CELoss
from model.losses.kd import KDLoss, kd_loss
from model.outputs import Batch, Outputs

# Of RepDistiller's DistillKL, on the logits of `golden_logits`.
GOLDEN = json.loads((Path(__file__).parent / "kd_golden.json").read_text())
BATCH, CLASSES = 8, 10

KDFunction = Callable[[Tensor, Tensor, float], Tensor]


def golden_logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    i, j = np.arange(BATCH)[:, None], np.arange(CLASSES)[None]
    student = 3 * np.sin(0.7 * i + 1.3 * j + 0.1 * i * j)
    teacher = 4 * np.cos(0.9 * i - 0.5 * j + 0.05 * i * j)
    return torch.tensor(student, dtype=dtype, requires_grad=True), torch.tensor(teacher, dtype=dtype)


def small_logits() -> tuple[Tensor, Tensor, Tensor]:
    student = torch.tensor([[2, 0, -1], [0.5, 1.5, -0.5]], dtype=torch.float64)
    teacher = torch.tensor([[1, 2, -1], [0, 3, 0]], dtype=torch.float64)
    return student, teacher, torch.tensor([0, 1])


def batch_of(labels: Tensor) -> Batch:
    nothing = torch.zeros(len(labels), dtype=torch.int64)
    return Batch(torch.zeros(len(labels), 3, 1, 1), labels, nothing, nothing)


def terms_of(loss: KDLoss | CELoss, student: Tensor, teacher: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    return loss(Outputs(student), None if teacher is None else Outputs(teacher), batch_of(labels))


def total_of(loss: KDLoss | CELoss, student: Tensor, teacher: Tensor | None, labels: Tensor) -> float:
    return float(sum(term.item() for term in terms_of(loss, student, teacher, labels).values()))


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


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
    assert kd_loss(student, teacher, 1e6).item() == pytest.approx(limit, rel=1e-5)


def test_batchmean_is_mean_times_the_number_of_classes() -> None:
    student, teacher = golden_logits()
    batchmean, mean = (kd_loss(student, teacher, 4.0, reduction).item() for reduction in ("batchmean", "mean"))
    assert batchmean == pytest.approx(mean * CLASSES, rel=1e-14)


@pytest.mark.parametrize(
    ("temperature", "batchmean", "mean"),
    [(1, 0.574477, 0.191492), (3, 0.070658, 0.023553), (4, 0.039024, 0.013008), (5, 0.024584, 0.008195)],
)
def test_the_divergence_without_T_squared_has_the_values_of_other_codebases(
    temperature: float, batchmean: float, mean: float
) -> None:
    student, teacher, _ = small_logits()
    for reduction, expected in (("batchmean", batchmean), ("mean", mean)):
        value = kd_loss(student, teacher, temperature, reduction).item() / temperature**2
        assert value == pytest.approx(expected, abs=6e-7)


# --- what must hold for the loss whatever its values; each check also has to reject a broken one --------------


def check_golden(function: KDFunction) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for name, temperature in (("KD_T1", 1.0), ("KD_T4", 4.0)):
            golden = GOLDEN[name]
            student, teacher = golden_logits(dtype)
            loss = function(student, teacher, temperature)
            (gradient,) = torch.autograd.grad(loss, student)
            norm = golden["grad_l2"]
            assert loss.dtype == dtype
            assert loss.item() == pytest.approx(golden["loss"], rel=tolerance)
            assert gradient.norm().item() == pytest.approx(norm, rel=tolerance)
            assert gradient.sum().item() == pytest.approx(golden["grad_sum"], abs=tolerance * norm)
            first3 = gradient.flatten()[:3].tolist()
            assert first3 == pytest.approx(golden["grad_first3"], abs=tolerance * norm)


def check_equal_logits_are_the_minimum(function: KDFunction) -> None:
    for dtype, tolerance in ((torch.float64, 3e-16), (torch.float32, 2e-7)):
        student, _ = golden_logits(dtype)
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


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.9, 1.0])
def test_alpha_weighs_the_teacher_and_the_rest_the_labels(alpha: float) -> None:
    student, teacher = golden_logits()
    labels = (3 * torch.arange(BATCH) + 1) % CLASSES
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


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.37, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_describe_states_the_weights_that_forward_applies(alpha: float, temperature: float, reduction: str) -> None:
    loss = KDLoss(alpha=alpha, temperature=temperature, reduction=reduction)  # type: ignore[arg-type]
    found = re.match(r"CE x (\S+) \+ KL x (\S+) x (\S+) .*mean over the (.*)$", loss.describe())
    assert found is not None
    ce_weight, kl_weight, t2 = (float(text) for text in found.groups()[:3])
    student, teacher = golden_logits()
    labels = (3 * torch.arange(BATCH) + 1) % CLASSES
    divergence = paper_kd(student, teacher, temperature) / temperature**2
    if found[4] == "batch and the classes":
        divergence /= CLASSES
    else:
        assert found[4] == "batch"
    ce = total_of(CELoss(), student, None, labels)
    described = ce_weight * ce + kl_weight * t2 * divergence
    assert described == pytest.approx(total_of(loss, student, teacher, labels), rel=1e-3)


def test_describe_is_one_readable_line() -> None:
    assert KDLoss(alpha=0.9, temperature=4.0).describe() == (
        "CE x 0.1 + KL x 0.9 x 16 (alpha 0.9, T^2 at T 4), mean over the batch"
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
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: object, problem: str) -> None:
    section = {"name": "kd", "alpha": 0.5, "temperature": 4.0, option: value}
    (found,) = LOSSES.resolve(section)[1]
    assert found[0] == option
    assert found[1].startswith(problem)


def test_options_at_their_limits_are_accepted_and_the_reduction_is_batchmean_by_default() -> None:
    for alpha, temperature in ((0, 1e-3), (1, 1000)):
        resolved, problems = LOSSES.resolve({"name": "kd", "alpha": alpha, "temperature": temperature})
        assert problems == []
        assert resolved == {"name": "kd", "alpha": alpha, "temperature": temperature, "reduction": "batchmean"}


def test_alpha_and_temperature_have_no_default() -> None:
    _, problems = LOSSES.resolve({"name": "kd"})
    assert problems == [(name, "is missing and has no default") for name in ("alpha", "temperature")]

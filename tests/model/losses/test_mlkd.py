"""Oracles: the formula in numpy, closed forms, values of a reference implementation."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from golden import BATCH, batch_of, check_golden_logits, golden_labels, golden_logits, softmax
from logit_claims import (
    batches_of_other_shapes_are_refused,
    constants_added_to_a_sample_change_nothing,
    finite_at_extreme_logits,
    least_at_the_teacher,
    permuted_batch_has_the_same_loss,
    permuted_classes_have_the_same_loss,
)
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.mlkd import (
    Mask,
    MLKDLoss,
    batch_correlations,
    class_correlations,
    divergences,
    masks,
    mlkd_loss,
)
from model.outputs import Outputs

TEMPERATURES = (4, 3, 5, 2, 6)


def views() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the weak view's logits of student and teacher, and others for the strong view's."""
    student, teacher = golden_logits()
    strong = (1.7 * torch.cos(student.detach() + 0.3)).requires_grad_()
    return student, teacher, strong, 3 * torch.sin(teacher + 0.2)


def same_view(student: Tensor, teacher: Tensor, labels: Tensor, mask: Mask = "code") -> Tensor:
    return mlkd_loss(student, teacher, student, teacher, mask=mask)


def terms_of(loss: MLKDLoss, student: Tensor, teacher: Tensor, *strong: Tensor) -> dict[str, Tensor]:
    outputs = Outputs(student, strong_logits=strong[0]), Outputs(teacher, strong_logits=strong[1])
    return loss(*outputs, batch_of(golden_labels()))


def kd_of(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    p_s, p_t = softmax(student / temperature), softmax(teacher / temperature)
    return temperature**2 * (p_t * np.log(p_t / p_s)).sum(axis=1)


def gram_of(student: np.ndarray, teacher: np.ndarray, temperature: float, classes: bool) -> np.ndarray:
    """Returns the squared differences of the products of all pairs of columns (or rows), summed by the first."""
    p_s, p_t = (softmax(z / temperature) for z in (student, teacher))
    p_s, p_t = (p_s.T, p_t.T) if classes else (p_s, p_t)
    pairs = list(zip(p_s, p_t, strict=True))
    return np.array([sum((a_t @ b_t - a_s @ b_s) ** 2 for b_s, b_t in pairs) for a_s, a_t in pairs])


def paper_mlkd(mask: Mask) -> float:
    """Returns the sum as methods.md has it: each term by name."""
    weak_s, weak_t, strong_s, strong_t = (logits.detach().numpy() for logits in views())
    p_t = softmax(weak_t)
    m = (p_t.max(axis=1) <= np.percentile(p_t.max(axis=1), 50)).astype(float)
    m_class = (p_t.sum(axis=0) <= np.percentile(p_t.sum(axis=0), 50)).astype(float)

    def masked(values: np.ndarray, chosen: np.ndarray) -> float:
        return float(chosen.mean() * values.mean() if mask == "code" else (chosen * values).mean())

    total = sum(masked(kd_of(weak_s, weak_t, t), m) for t in TEMPERATURES)
    total += sum(kd_of(strong_s, strong_t, t).mean() for t in (4, 3, 5))
    total += sum(kd_of(weak_s, weak_t, t).mean() for t in (2, 6))
    total += sum(masked(gram_of(weak_s, weak_t, t, classes=True), m_class) for t in TEMPERATURES)
    total += sum(masked(gram_of(weak_s, weak_t, t, classes=False), m) for t in TEMPERATURES)
    return total


@pytest.mark.parametrize("mask", ["code", "paper"])
def test_the_sum_is_the_published_one_term_by_term(mask: Mask) -> None:
    assert mlkd_loss(*views(), 4.0, mask).item() == pytest.approx(paper_mlkd(mask), rel=1e-12)


@pytest.mark.parametrize(
    ("case", "function"), [("MLKD_class_corr_T4", class_correlations), ("MLKD_batch_corr_T4", batch_correlations)]
)
def test_matrices_and_their_gradients_are_those_of_the_reference(case: str, function: Any) -> None:
    check_golden_logits(case, lambda student, teacher: function(student, teacher, 4.0).mean())


@pytest.mark.parametrize(("case", "temperature"), [("KD_T1", 1.0), ("KD_T4", 4.0)])
def test_divergences_are_those_of_plain_distillation(case: str, temperature: float) -> None:
    check_golden_logits(case, lambda student, teacher: divergences(student, teacher, temperature).mean())


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_masks_choose_what_is_not_above_the_median(size: int) -> None:
    _, teacher = golden_logits()
    p_t = softmax(teacher[:size].numpy())
    for found, values in zip(masks(teacher[:size]), (p_t.max(axis=1), p_t.sum(axis=0)), strict=True):
        assert found.tolist() == (values <= np.percentile(values, 50)).tolist()
        assert found.sum() == (len(values) + 1) // 2


def test_the_codes_mask_is_but_a_factor_and_the_papers_selects() -> None:
    """In the code's form the masked terms are half of what they are without one, whichever samples they come from."""
    student, teacher, *strong = views()
    code, paper = (mlkd_loss(student, teacher, *strong, mask=mask).item() for mask in ("code", "paper"))
    unmasked = sum(
        divergences(*pair, t).mean() for pair, ts in ((strong, (4, 3, 5)), ((student, teacher), (2, 6))) for t in ts
    )
    whole = sum(
        function(student, teacher, t).mean()
        for function in (divergences, class_correlations, batch_correlations)
        for t in TEMPERATURES
    )
    assert code == pytest.approx((unmasked + whole / 2).item(), rel=1e-12)
    assert paper != pytest.approx(code, rel=1e-3)


@pytest.mark.parametrize("mask", ["code", "paper"])
@pytest.mark.parametrize(
    "claim",
    [
        permuted_batch_has_the_same_loss,
        permuted_classes_have_the_same_loss,
        constants_added_to_a_sample_change_nothing,
        finite_at_extreme_logits,
        batches_of_other_shapes_are_refused,
        least_at_the_teacher,
    ],
)
def test_mlkd_loss_keeps_a_claim(claim: Any, mask: Mask) -> None:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return same_view(student, teacher, labels, mask)

    if claim is least_at_the_teacher:
        least_at_the_teacher(loss, gradient_tolerance=1e-14)  # rounding, of 15 terms with factors up to 6
    else:
        claim(loss)


def test_a_batch_repeated_twice_has_4_times_the_class_matrix_and_twice_the_batch_matrix() -> None:
    once = [logits.detach() for logits in golden_logits()]
    twice = [logits.repeat(2, 1) for logits in once]
    for function, factor in ((divergences, 1), (class_correlations, 4), (batch_correlations, 2)):
        expected = factor * function(*once, 4.0).mean().item()
        assert function(*twice, 4.0).mean().item() == pytest.approx(expected, rel=1e-12)
    assert MLKDLoss.batch_factor is None


def test_cross_entropy_is_that_of_both_views() -> None:
    student, teacher, strong, teacher_strong = views()
    labels = golden_labels()
    terms = terms_of(MLKDLoss(), student, teacher, strong, teacher_strong)
    assert list(terms) == ["ce", "mlkd"]
    both = F.cross_entropy(student, labels) + F.cross_entropy(strong, labels)
    assert terms["ce"].item() == pytest.approx(0.1 * both.item(), rel=1e-12)
    assert terms["mlkd"].item() == pytest.approx(0.9 * paper_mlkd("code"), rel=1e-12)
    without = terms_of(MLKDLoss(ce_weight=0.0), student, teacher, strong, teacher_strong)
    assert list(without) == ["mlkd"]
    assert without["mlkd"].item() == terms["mlkd"].item()


def test_both_views_learn() -> None:
    student, teacher, strong, teacher_strong = views()
    term = terms_of(MLKDLoss(), student, teacher, strong, teacher_strong)["mlkd"]
    gradients = torch.autograd.grad(term, (student, strong))
    assert all(gradient.norm() > 0 for gradient in gradients)
    # Of the strong view: the plain divergences alone.
    expected = sum(
        t / BATCH * (softmax(strong.detach().numpy() / t) - softmax(teacher_strong.numpy() / t)) for t in (4, 3, 5)
    )
    np.testing.assert_allclose(gradients[1].numpy(), 0.9 * expected, rtol=1e-10, atol=1e-15)


def test_options_change_what_they_say() -> None:
    given = views()

    def value(**options: Any) -> float:
        return terms_of(MLKDLoss(**options), *given)["mlkd"].item()

    assert value(alpha=1.8) == pytest.approx(2 * value(), rel=1e-12)
    own = [value(temperature=t, alpha=1.0) - mlkd_loss(*given, 4.0).item() for t in (4.0, 8.0)]
    assert own[0] == pytest.approx(0, abs=1e-12)
    weak, strong = given[:2], given[2:]
    parts = [
        divergences(*strong, t).mean()
        + sum(function(*weak, t).mean() for function in (divergences, class_correlations, batch_correlations)) / 2
        for t in (8.0, 4.0)
    ]
    assert own[1] == pytest.approx((parts[0] - parts[1]).item(), rel=1e-9)


def test_it_says_what_it_needs() -> None:
    loss = MLKDLoss()
    assert loss.needs == {"logits", "strong_logits"}
    assert (loss.needs_teacher, loss.needs_labels, loss.usual_weight) == (True, True, 1)


def test_describe_states_the_weights_and_the_temperatures() -> None:
    described = MLKDLoss(temperature=3.5, alpha=0.8, ce_weight=0.2, mask="paper").describe()
    assert re.fullmatch(
        r"\(CE .*\) x 0\.2 \+ \(.* at T 3\.5, 3, 5, 2, 6\) x 0\.8, masks as in the paper, .*", described
    )


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("alpha", 0, "0 is not above 0"),
        ("ce_weight", -0.1, "-0.1 is below 0"),
        ("temperature", 0, "0 is not above 0"),
        ("mask", "none", "'none' is not one of 'code' or 'paper'"),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: object, problem: str) -> None:
    (found,) = LOSSES.resolve({"name": "mlkd", option: value})[1]
    assert found[0] == option
    assert found[1].startswith(problem)

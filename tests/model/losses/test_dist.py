"""Oracles: numpy's correlation coefficients, closed forms, values of a reference implementation."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from golden import CLASSES, check_golden_logits, golden_labels, golden_logits, softmax, terms_of
from logit_claims import CLAIMS, least_at_the_teacher
from torch import Tensor

from model.errors import InputError
from model.losses import LOSSES
from model.losses.dist import DISTLoss, correlations, dist_loss


def usual(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    return dist_loss(student, teacher, 1.0, 1.0, temperature)


@pytest.mark.parametrize("dim", [0, 1])
def test_correlations_are_pearsons(dim: int) -> None:
    own, other = (logits.detach() for logits in golden_logits())
    rows = zip(*(np.moveaxis(matrix.numpy(), dim, -1) for matrix in (own, other)), strict=True)
    expected = [np.corrcoef(first, second)[0, 1] for first, second in rows]
    np.testing.assert_allclose(correlations(own, other, dim).numpy(), expected, rtol=1e-8)


@pytest.mark.parametrize(("beta", "gamma"), [(1, 1), (2, 0), (0, 0.5)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_the_papers_formula_times_T_squared(beta: float, gamma: float, temperature: float) -> None:
    student, teacher = golden_logits()
    own, other = (softmax(logits.detach().numpy() / temperature) for logits in (student, teacher))

    def mean_correlation(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(first, second, strict=True)]))

    expected = beta * (1 - mean_correlation(own, other)) + gamma * (1 - mean_correlation(own.T, other.T))
    found = dist_loss(student, teacher, beta, gamma, temperature).item()
    assert found == pytest.approx(temperature**2 * expected, rel=1e-6)  # the formula has an epsilon


@pytest.mark.parametrize(("case", "temperature"), [("DIST_b1_g1_tau1", 1.0), ("DIST_b1_g1_tau4", 4.0)])
def test_loss_and_gradient_are_those_of_the_reference(case: str, temperature: float) -> None:
    check_golden_logits(case, lambda student, teacher: dist_loss(student, teacher, 1.0, 1.0, temperature))


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_probabilities_that_are_the_teachers_diluted_are_as_good_as_the_teachers(share: float) -> None:
    _, teacher = golden_logits()
    diluted = (share * torch.softmax(teacher, dim=1) + (1 - share) / CLASSES).log()
    assert dist_loss(diluted, teacher, 1.0, 0.0, 1.0).item() == pytest.approx(0, abs=1e-5)
    assert dist_loss(diluted, teacher, 1.0, 1.0, 1.0).item() == pytest.approx(0, abs=1e-4)
    if share == 0.5:
        assert dist_loss(diluted, teacher, 1.0, 1.0, 1.0).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("claim", CLAIMS)
def test_dist_loss_keeps_a_claim(claim: Any) -> None:
    claim(usual)


@pytest.mark.parametrize(("temperature", "value", "gradient"), [(1.0, 2.5e-7, 4e-8), (4.0, 3e-5, 3e-6)])
def test_the_teacher_itself_is_the_minimum_up_to_the_epsilon(temperature: float, value: float, gradient: float) -> None:
    """A correlation that is added, not subtracted, as in a known codebase, has its maximum there."""
    least_at_the_teacher(lambda *inputs: usual(*inputs, temperature), value, gradient)


def test_a_batch_of_one_says_nothing_of_the_classes() -> None:
    student, teacher = (logits[:1] for logits in golden_logits())
    with_classes, without = (dist_loss(student, teacher, 1.0, gamma, 4.0) for gamma in (1.0, 0.0))
    assert with_classes.item() == without.item() > 0


def test_each_weight_scales_its_part_down_to_nothing() -> None:
    student, teacher = golden_logits()

    def value(beta: float, gamma: float) -> float:
        return terms_of(DISTLoss(beta=beta, gamma=gamma), student, teacher, golden_labels())["dist"].item()

    assert value(3, 5) == pytest.approx(3 * value(1, 0) + 5 * value(0, 1), rel=1e-12)
    with pytest.raises(InputError, match="beta and gamma are both 0"):
        value(0, 0)


def test_it_is_one_method_without_cross_entropy_of_the_published_weight() -> None:
    loss = DISTLoss()
    assert (loss.needs_teacher, loss.needs_labels, loss.usual_weight) == (True, False, 2)
    assert list(terms_of(loss, *golden_logits(), golden_labels())) == ["dist"]
    no_labels = torch.empty(0, dtype=torch.int64)
    student, teacher = golden_logits()
    assert terms_of(loss, student, teacher, no_labels) == terms_of(loss, student, teacher, golden_labels())


def test_describe_states_the_weights_that_forward_applies() -> None:
    student, teacher = golden_logits()
    loss = DISTLoss(beta=0.5, gamma=2.0, temperature=3.0)
    found = re.fullmatch(r"\(1 - correlation\) of samples x (\S+) \+ of classes x (\S+) \(.*\), .*", loss.describe())
    assert found is not None
    parts = [dist_loss(student, teacher, *weights, 3.0).item() / 9 for weights in ((1.0, 0.0), (0.0, 1.0))]
    described = sum(float(weight) * part for weight, part in zip(found.groups(), parts, strict=True))
    assert described == pytest.approx(terms_of(loss, student, teacher, golden_labels())["dist"].item(), rel=1e-3)


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [("beta", -1, "-1 is below 0"), ("gamma", -0.5, "-0.5 is below 0"), ("temperature", 0, "0 is not above 0")],
)
def test_an_option_out_of_range_is_refused(option: str, value: object, problem: str) -> None:
    (found,) = LOSSES.resolve({"name": "dist", option: value})[1]
    assert found[0] == option
    assert found[1].startswith(problem)

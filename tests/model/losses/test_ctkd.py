"""Oracles: plain distillation at the same temperature, closed forms, finite differences."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from golden import GOLDEN, central_difference, golden_labels, golden_logits, terms_of
from logit_claims import CLAIMS, least_at_the_teacher
from torch import Tensor

from model.losses import LOSSES
from model.losses.ctkd import CTKDLoss, reversal
from model.losses.kd import kd_loss

START = 15.621171572600  # 1 + 20 sigmoid(1)


def ctkd(reversal_epochs: int = 10, epoch: int = 0, theta: float = 1.0) -> CTKDLoss:
    loss = CTKDLoss(reversal_epochs=reversal_epochs).double()
    with torch.no_grad():
        loss.theta.fill_(theta)
    loss.on_epoch(epoch)
    return loss


def value_of(loss: CTKDLoss) -> Tensor:
    return terms_of(loss, *golden_logits(), golden_labels())["ctkd"]


def gradient_of_theta(loss: CTKDLoss) -> float:
    (gradient,) = torch.autograd.grad(value_of(loss), loss.theta)
    return gradient.item()


def loss_at(theta: float) -> float:
    """Returns plain distillation at the temperature of a theta."""
    return kd_loss(*golden_logits(), 1 + 20 / (1 + math.exp(-theta))).item()


def test_the_temperature_begins_at_15_62() -> None:
    assert ctkd().temperature().item() == pytest.approx(START, rel=1e-13)
    assert CTKDLoss().temperature().item() == pytest.approx(START, rel=1e-6)


@pytest.mark.parametrize("theta", [-2.0, 0.0, 1.0, 3.0])
def test_the_loss_is_plain_distillation_at_that_temperature(theta: float) -> None:
    loss = ctkd(theta=theta)
    assert value_of(loss).item() == pytest.approx(loss_at(theta), rel=1e-12)
    student, teacher = golden_logits()
    found = terms_of(loss, student, teacher, golden_labels())["ctkd"]
    plain = kd_loss(student, teacher, loss.temperature().item())
    torch.testing.assert_close(*(torch.autograd.grad(each, student)[0] for each in (found, plain)))


def test_where_the_temperature_is_4_it_has_the_reference_implementations_value() -> None:
    share = (4 - 1) / 20
    loss = ctkd(theta=math.log(share / (1 - share)))
    assert value_of(loss).item() == pytest.approx(GOLDEN["KD_T4"]["loss"], rel=1e-12)


@pytest.mark.parametrize("epoch", [0, 4, 9, 50])
@pytest.mark.parametrize("theta", [-2.0, 1.0, 3.0])
def test_thetas_gradient_is_the_slope_of_the_loss_times_the_reversal(theta: float, epoch: int) -> None:
    slope = central_difference(loss_at, theta)
    factor = (math.cos(math.pi * min(epoch + 1, 10) / 10) - 1) / 2  # of cosine from 0 to -1
    assert gradient_of_theta(ctkd(epoch=epoch, theta=theta)) == pytest.approx(factor * slope, rel=1e-6)
    sigmoid = 1 / (1 + math.exp(-theta))
    by_temperature = central_difference(lambda t: kd_loss(*golden_logits(), t).item(), 1 + 20 * sigmoid, step=1e-4)
    chained = factor * by_temperature * 20 * sigmoid * (1 - sigmoid)
    assert gradient_of_theta(ctkd(epoch=epoch, theta=theta)) == pytest.approx(chained, rel=1e-5)


def test_a_step_of_gradient_descent_raises_the_loss_by_theta_and_lowers_it_by_the_student() -> None:
    loss = ctkd(epoch=20)
    student, teacher = golden_logits()
    before = terms_of(loss, student, teacher, golden_labels())["ctkd"]
    of_theta, of_student = torch.autograd.grad(before, (loss.theta, student))
    assert kd_loss(student - 0.01 * of_student, teacher, START).item() < before.item()
    with torch.no_grad():
        loss.theta -= 0.01 * of_theta
    assert value_of(loss).item() > before.item()


@pytest.mark.parametrize("epochs", [1, 5, 10])
def test_the_reversal_falls_from_near_0_to_minus_1_and_stays_there(epochs: int) -> None:
    values = [reversal(epoch, epochs) for epoch in range(2 * epochs)]
    assert values == sorted(values, reverse=True)
    assert values[epochs - 1 :] == [-1.0] * (epochs + 1)
    if epochs == 10:
        assert values[0] == pytest.approx((math.cos(math.pi / 10) - 1) / 2, rel=1e-12)
        assert values[4] == pytest.approx(-0.5, rel=1e-12)


def test_the_reversal_follows_from_the_epoch_alone() -> None:
    resumed, straight = ctkd(), ctkd()
    for epoch in range(5):
        straight.on_epoch(epoch)
    resumed.on_epoch(4)
    assert gradient_of_theta(resumed) == gradient_of_theta(straight)
    sooner = ctkd(reversal_epochs=5, epoch=4)
    assert gradient_of_theta(sooner) == pytest.approx(2 * gradient_of_theta(straight), rel=1e-12)  # -1 against -1/2


def test_theta_is_all_that_is_learnt_and_saved() -> None:
    loss = ctkd(theta=2.5)
    assert [name for name, _ in loss.named_parameters()] == list(loss.state_dict()) == ["theta"]
    twin = CTKDLoss().double()
    twin.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert twin.temperature().item() == loss.temperature().item()


@pytest.mark.parametrize("claim", CLAIMS)
def test_ctkd_keeps_a_claim(claim: object) -> None:
    assert callable(claim)
    claim(lambda student, teacher, labels: terms_of(CTKDLoss(), student, teacher, labels)["ctkd"])


@pytest.mark.parametrize("theta", [-3.0, 1.0, 5.0])
def test_at_any_temperature_the_teacher_is_the_minimum_and_does_not_move_theta(theta: float) -> None:
    loss = ctkd(theta=theta, epoch=20)
    least_at_the_teacher(
        lambda student, teacher, labels: terms_of(loss, student, teacher, labels)["ctkd"], gradient_tolerance=1e-15
    )
    student, _ = golden_logits()
    value = terms_of(loss, student, student.detach(), golden_labels())["ctkd"]
    assert torch.autograd.grad(value, loss.theta)[0].item() == pytest.approx(0, abs=1e-14)


def test_it_is_one_method_without_cross_entropy_of_the_published_weight() -> None:
    loss = CTKDLoss()
    assert (loss.needs_teacher, loss.needs_labels, loss.usual_weight) == (True, False, 0.9)
    assert list(terms_of(loss, *golden_logits(), torch.empty(0, dtype=torch.int64))) == ["ctkd"]


def test_describe_states_the_temperature() -> None:
    assert CTKDLoss().describe() == (
        "KL x T^2, mean over the batch; T = 1 + 20 sigmoid(theta), now 15.62, learnt with a gradient that is reversed"
        " over 10 epochs"
    )


def test_an_option_out_of_range_is_refused() -> None:
    assert LOSSES.resolve({"name": "ctkd", "reversal_epochs": 0})[1] == [("reversal_epochs", "0 is below 1")]

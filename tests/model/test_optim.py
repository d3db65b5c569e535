"""Oracles: torch's own schedulers, closed forms, and the update rules in numpy."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from model.optim import OPTIMIZERS, SCHEDULES, Schedule, create_optimizer, create_schedule

EPOCHS, STEPS, BASE = 30, 7, 0.1


every_optimiser = pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])


def resolved(registry: Any, name: str, **options: Any) -> dict[str, Any]:
    section, problems = registry.resolve({"name": name, **options})
    assert problems == []
    return section


def optimizer_of(*sizes: int) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(n)) for n in sizes or [1]], BASE)


def schedule_of(name: str, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> Schedule:
    return create_schedule(resolved(SCHEDULES, name, **options), optimizer or optimizer_of(), EPOCHS, STEPS)


def rate_at(schedule: Schedule, epoch: int, step: int = 0) -> float:
    schedule.set(epoch, step)
    (rate,) = {group["lr"] for group in schedule.optimizer.param_groups}
    return rate


def rates_per_epoch(schedule: Schedule) -> list[float]:
    return [rate_at(schedule, epoch, STEPS - 1) for epoch in range(EPOCHS)]


def rates_per_step(schedule: Schedule) -> np.ndarray:
    return np.array([rate_at(schedule, epoch, step) for epoch in range(EPOCHS) for step in range(STEPS)])


# --- schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "create"),
    [
        ("constant", {}, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        ("step", {"step_size": 7, "gamma": 0.3}, lambda o: lr_scheduler.StepLR(o, 7, 0.3)),
        ("step", {"step_size": 1}, lambda o: lr_scheduler.StepLR(o, 1, 0.1)),
        ("multistep", {"milestones": [5, 12], "gamma": 0.2}, lambda o: lr_scheduler.MultiStepLR(o, [5, 12], 0.2)),
        ("multistep", {"milestones": [20, 5, 5]}, lambda o: lr_scheduler.MultiStepLR(o, [20, 5, 5], 0.1)),
        ("cosine", {}, lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS)),
        ("cosine", {"final_factor": 0.05}, lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS, eta_min=0.05 * BASE)),
    ],
)  # fmt: skip
def test_per_epoch_a_schedule_is_torchs_own(
    name: str, options: dict[str, Any], create: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
) -> None:
    optimizer = optimizer_of()
    theirs = create(optimizer)
    expected = []
    for _ in range(EPOCHS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    np.testing.assert_allclose(rates_per_epoch(schedule_of(name, **options)), expected, rtol=1e-9)


@pytest.mark.parametrize("final_factor", [0.0, 0.1])
@pytest.mark.parametrize("warmup_epochs", [0.0, 3.0, 2.5])
def test_per_iteration_the_cosine_is_its_closed_form(final_factor: float, warmup_epochs: float) -> None:
    rates = rates_per_step(
        schedule_of("cosine", per="iteration", warmup_epochs=warmup_epochs, final_factor=final_factor)
    )
    position = np.arange(EPOCHS * STEPS) / STEPS
    cosine = 0.5 * (1 + np.cos(np.pi * (position - warmup_epochs) / (EPOCHS - warmup_epochs)))
    after = position >= warmup_epochs
    expected = BASE * (final_factor + (1 - final_factor) * cosine)
    np.testing.assert_allclose(rates[after], expected[after], rtol=1e-12)


def test_the_cosine_ends_at_its_final_factor_and_stays_there() -> None:
    schedule = schedule_of("cosine", per="iteration", final_factor=0.1)
    assert rate_at(schedule, 0) == BASE
    assert rate_at(schedule, EPOCHS // 2) == pytest.approx(0.55 * BASE)
    assert rate_at(schedule, EPOCHS) == pytest.approx(0.1 * BASE)
    assert rate_at(schedule, 2 * EPOCHS) == pytest.approx(0.1 * BASE)


@pytest.mark.parametrize(("name", "options"), [("step", {"step_size": 4}), ("multistep", {"milestones": [4, 8]})])
def test_per_iteration_drops_come_with_the_first_step_of_an_epoch(name: str, options: dict[str, Any]) -> None:
    schedules = (schedule_of(name, per=per, **options) for per in ("epoch", "iteration"))
    by_epoch, by_step = (rates_per_step(schedule) for schedule in schedules)
    np.testing.assert_array_equal(by_epoch, by_step)
    assert rate_at(schedule_of(name, per="iteration", **options), 3, STEPS - 1) == BASE


def test_per_epoch_the_rate_is_the_same_at_every_step_of_an_epoch() -> None:
    rates = rates_per_step(schedule_of("cosine", warmup_epochs=3)).reshape(EPOCHS, STEPS)
    assert (rates == rates[:, :1]).all()
    assert len(set(rates[:, 0])) > 20


def test_the_warm_up_is_linear_from_one_step_of_it_to_the_base_rate() -> None:
    rates = rates_per_step(schedule_of("constant", per="iteration", warmup_epochs=2))
    ramp = np.arange(1, 2 * STEPS + 1) / (2 * STEPS)
    np.testing.assert_allclose(rates[: 2 * STEPS], BASE * ramp, rtol=1e-12)
    assert rates[0] > 0
    # Joined to what follows without a jump: the ramp's last step is at the base rate.
    assert (rates[2 * STEPS - 1 :] == BASE).all()

    rates_by_epoch = rates_per_epoch(schedule_of("constant", warmup_epochs=5))
    np.testing.assert_allclose(rates_by_epoch[:6], BASE * np.array([0.2, 0.4, 0.6, 0.8, 1, 1]), rtol=1e-12)


@pytest.mark.parametrize("per", ["epoch", "iteration"])
@pytest.mark.parametrize("warmup_epochs", [0.0, 0.4, 1.0, 2.5, 30.0])
def test_a_warm_up_of_any_length_rises_to_the_base_rate_and_never_above_it(per: str, warmup_epochs: float) -> None:
    rates = rates_per_step(schedule_of("constant", per=per, warmup_epochs=warmup_epochs))
    assert rates.min() > 0
    assert rates.max() == pytest.approx(BASE)
    assert rates[-1] == pytest.approx(BASE)
    assert (np.diff(rates) >= 0).all()


@pytest.mark.parametrize("per", ["epoch", "iteration"])
def test_a_warm_up_as_long_as_the_training_leaves_the_cosine_nothing(per: str) -> None:
    rates = rates_per_step(schedule_of("cosine", per=per, warmup_epochs=EPOCHS))
    assert np.isfinite(rates).all()
    assert rates[-1] == pytest.approx(BASE)


@pytest.mark.parametrize("per", ["epoch", "iteration"])
def test_the_cosine_begins_at_the_base_rate_where_the_warm_up_ends(per: str) -> None:
    schedule = schedule_of("cosine", per=per, warmup_epochs=3)
    assert rate_at(schedule, 3) == BASE
    assert rate_at(schedule, 3 + (EPOCHS - 3) // 2 + 1) < BASE / 2


def test_milestones_count_from_the_start_of_training_also_with_a_warm_up() -> None:
    rates = rates_per_epoch(schedule_of("multistep", milestones=[5, 12], warmup_epochs=4))
    plain = rates_per_epoch(schedule_of("multistep", milestones=[5, 12]))
    assert rates[4:] == plain[4:]
    assert rates[3] == pytest.approx(BASE)
    assert rates[5] == pytest.approx(BASE / 10)


@pytest.mark.parametrize("per", ["epoch", "iteration"])
@pytest.mark.parametrize(("name", "options"), [("cosine", {}), ("step", {"step_size": 3}), ("constant", {})])
def test_the_schedule_keeps_no_state(name: str, options: dict[str, Any], per: str) -> None:
    schedule = schedule_of(name, per=per, warmup_epochs=2, **options)
    positions = list(itertools.product(range(EPOCHS), range(STEPS)))
    in_order = {position: rate_at(schedule, *position) for position in positions}
    random.Random(0).shuffle(positions)
    assert {position: rate_at(schedule, *position) for position in positions} == in_order
    state = copy.deepcopy(schedule.optimizer.state_dict())  # saved under some other rate
    schedule.optimizer.load_state_dict(state)
    assert rate_at(schedule, 10, 3) == in_order[10, 3]


def test_every_group_of_parameters_keeps_its_own_base_rate() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.01)]
    optimizer = torch.optim.SGD(groups)
    schedule_of("step", optimizer, step_size=1, gamma=0.5).set(2, 0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.0025])


# --- optimisers -------------------------------------------------------------------------------------------

START = np.array([1.0, -2.0, 0.5, 3.0])
GRADIENTS = np.array([[0.5, -1.0, 2.0, 0.0], [-0.25, -1.0, 1.0, 4.0], [1.0, 0.5, -3.0, 0.1]])
Update = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def numpy_sgd(rate: float, momentum: float, nesterov: bool, decay: float) -> Update:
    """Sutskever et al., 2013, in the form that torch documents: the first velocity is the first gradient."""
    velocity = np.zeros(4)

    def update(weights: np.ndarray, gradient: np.ndarray, t: int) -> np.ndarray:
        nonlocal velocity
        gradient = gradient + decay * weights
        velocity = momentum * velocity + gradient
        return weights - rate * (gradient + momentum * velocity if nesterov else velocity)

    return update


def numpy_adam(rate: float, beta1: float, beta2: float, decay: float, decoupled: bool) -> Update:
    """Kingma and Ba, 2015, algorithm 1; decoupled: Loshchilov and Hutter, 2019, algorithm 2."""
    m, v = np.zeros(4), np.zeros(4)

    def update(weights: np.ndarray, gradient: np.ndarray, t: int) -> np.ndarray:
        nonlocal m, v
        if not decoupled:
            gradient = gradient + decay * weights
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        step = rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)
        return weights - step - (rate * decay * weights if decoupled else 0)

    return update


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("name", "options", "create"),
    [
        ("sgd", {}, lambda: numpy_sgd(BASE, 0.9, False, 0)),
        ("sgd", {"momentum": 0.0}, lambda: numpy_sgd(BASE, 0, False, 0)),
        ("sgd", {"momentum": 0.8, "nesterov": True}, lambda: numpy_sgd(BASE, 0.8, True, 0)),
        ("sgd", {"momentum": 0.8, "weight_decay": 0.3}, lambda: numpy_sgd(BASE, 0.8, False, 0.3)),
        ("adam", {}, lambda: numpy_adam(BASE, 0.9, 0.999, 0, False)),
        ("adam", {"beta1": 0.7, "beta2": 0.9}, lambda: numpy_adam(BASE, 0.7, 0.9, 0, False)),
        ("adam", {"weight_decay": 0.3}, lambda: numpy_adam(BASE, 0.9, 0.999, 0.3, False)),
        ("adamw", {}, lambda: numpy_adam(BASE, 0.9, 0.999, 0.01, True)),
        ("adamw", {"beta1": 0.7, "beta2": 0.9, "weight_decay": 0.3}, lambda: numpy_adam(BASE, 0.7, 0.9, 0.3, True)),
    ],
)
def test_an_optimiser_follows_its_formula(
    name: str, options: dict[str, Any], create: Callable[[], Update], steps: int
) -> None:
    weights = nn.Parameter(torch.tensor(START))
    section = resolved(OPTIMIZERS, name, learning_rate=BASE, **options)
    optimizer = create_optimizer(section, [weights])
    expected, update = START.copy(), create()
    for t, gradient in enumerate(GRADIENTS[:steps], start=1):
        weights.grad = torch.tensor(gradient)
        optimizer.step()
        expected = update(expected, gradient, t)
    np.testing.assert_allclose(weights.detach().numpy(), expected, rtol=1e-12)


@every_optimiser
def test_the_step_is_proportional_to_the_rate_that_the_schedule_sets(name: str) -> None:
    def moved(rate: float) -> np.ndarray:
        weights = nn.Parameter(torch.tensor(START))
        optimizer = create_optimizer(resolved(OPTIMIZERS, name, learning_rate=1.0), [weights])
        optimizer.param_groups[0]["lr"] = rate
        weights.grad = torch.tensor(GRADIENTS[0])
        optimizer.step()
        return weights.detach().numpy() - START

    np.testing.assert_allclose(moved(1e-3), moved(1e-2) / 10, rtol=1e-6, atol=1e-15)
    assert np.abs(moved(1e-3)).max() > 0


@every_optimiser
def test_only_parameters_that_require_a_gradient_are_optimised(name: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2).requires_grad_(False))
    optimizer = create_optimizer(resolved(OPTIMIZERS, name, learning_rate=BASE), net.parameters())
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in net[0].parameters()}


# --- options ----------------------------------------------------------------------------------------------


@every_optimiser
@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("learning_rate", 0, "0 is not above 0"),
        ("learning_rate", -0.1, "-0.1 is not above 0"),
        ("learning_rate", 1001, "1001 is above 1000"),
        ("learning_rate", "0.1", "expected a number, got '0.1'"),
        ("learning_rate", float("nan"), "nan is not a finite number"),
        ("weight_decay", -1e-4, "-0.0001 is below 0"),
        ("weight_decay", 11, "11 is above 10"),
        ("lr", 0.1, "unknown option"),
    ],
)
def test_an_optimiser_refuses_what_is_out_of_range(name: str, option: str, value: object, problem: str) -> None:
    _, problems = OPTIMIZERS.resolve({"name": name, "learning_rate": 0.1, option: value})
    ((key, text),) = problems
    assert key == option
    assert text.startswith(problem)


@pytest.mark.parametrize(
    ("registry", "section", "key", "problem"),
    [
        (OPTIMIZERS, {"name": "sgd", "learning_rate": 1, "momentum": 1.0}, "momentum", "1.0 is not below 1"),
        (OPTIMIZERS, {"name": "adam", "learning_rate": 1, "beta2": 1.0}, "beta2", "1.0 is not below 1"),
        (OPTIMIZERS, {"name": "sgd", "learning_rate": 1, "nesterov": 1}, "nesterov", "expected true or false, got 1"),
        (OPTIMIZERS, {"name": "sgd"}, "learning_rate", "is missing and has no default"),
        (OPTIMIZERS, {"name": "adma"}, "name", "unknown optimizer 'adma'; did you mean 'adam'?"),
        (SCHEDULES, {"name": "cosin"}, "name", "unknown schedule 'cosin'; did you mean 'cosine'?"),
        (SCHEDULES, {"name": "constant", "warmup_epochs": -1}, "warmup_epochs", "-1 is below 0"),
        (SCHEDULES, {"name": "constant", "per": "step"}, "per", "'step' is not one of 'epoch' or 'iteration'"),
        (SCHEDULES, {"name": "step"}, "step_size", "is missing and has no default"),
        (SCHEDULES, {"name": "step", "step_size": 0}, "step_size", "0 is below 1"),
        (SCHEDULES, {"name": "step", "step_size": 2.0}, "step_size", "expected a whole number, got 2.0"),
        (SCHEDULES, {"name": "step", "step_size": 2, "gamma": 0}, "gamma", "0 is not above 0"),
        (SCHEDULES, {"name": "step", "step_size": 2, "gamma": 1.1}, "gamma", "1.1 is above 1"),
        (SCHEDULES, {"name": "multistep", "milestones": 5}, "milestones", "expected a list, got 5"),
        (SCHEDULES, {"name": "multistep", "milestones": [5, 0]}, "milestones.1", "0 is below 1"),
        (SCHEDULES, {"name": "cosine", "final_factor": 1.5}, "final_factor", "1.5 is above 1"),
        (SCHEDULES, {"name": "cosine", "step_size": 5}, "step_size", "unknown option"),
    ],
)
def test_what_is_wrong_with_a_section_is_said(registry: Any, section: dict[str, Any], key: str, problem: str) -> None:
    _, problems = registry.resolve(section)
    ((found, text),) = problems
    assert found == key
    assert text.startswith(problem)


@pytest.mark.parametrize(("registry", "name"), [(OPTIMIZERS, "sgd"), (SCHEDULES, "cosine")])
def test_a_name_that_is_taken_cannot_be_registered_again(registry: Any, name: str) -> None:
    before = dict(registry.items())
    with pytest.raises(ValueError, match=f"'{name}' is registered twice"):
        registry.register(name)(lambda *, learning_rate: None)
    assert dict(registry.items()) == before


def test_schedules_share_their_common_options_and_their_defaults() -> None:
    for name, required in (("constant", {}), ("step", {"step_size": 1}), ("multistep", {"milestones": [1]})):
        section = resolved(SCHEDULES, name, **required)
        assert section["warmup_epochs"] == 0.0
        assert section["per"] == "epoch"

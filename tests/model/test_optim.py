"""Oracles: torch's own schedulers, closed forms, and the update rules in numpy."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._pytree import tree_map_only

from model.optim import OPTIMIZERS, SCHEDULES, Schedule, check, create_optimizer, create_schedule

EPOCHS, STEPS, BASE = 30, 7, 0.1


every_optimiser = pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])


def resolved(registry: Any, name: str, **options: Any) -> dict[str, Any]:
    section, problems = registry.resolve({"name": name, **options})
    assert problems == []
    return section


def optimizer_of(base: float = BASE) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], base)


def schedule_of(
    name: str, optimizer: torch.optim.Optimizer | None = None, *, base: float = BASE, steps: int = STEPS, **options: Any
) -> Schedule:
    optimizer = optimizer or optimizer_of(base=base)
    return create_schedule(resolved(SCHEDULES, name, **options), optimizer, EPOCHS, steps)


def record(epoch: int, loss: float = 1.0, accuracy: float = 0.5) -> dict[str, Any]:
    return {"epoch": epoch, "val": {"loss": loss, "accuracy": accuracy}}


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
        ("cosine", {}, lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS)),
        ("cosine", {"final_factor": 0.05}, lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS, eta_min=0.05 * BASE)),
        ("cosine", {"period_epochs": 4}, lambda o: lr_scheduler.CosineAnnealingLR(o, 4)),
        ("cosine", {"period_epochs": 7, "final_factor": 0.2},
         lambda o: lr_scheduler.CosineAnnealingLR(o, 7, eta_min=0.2 * BASE)),
        ("warm_restarts", {"first_cycle_epochs": 10}, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10)),
        ("warm_restarts", {"first_cycle_epochs": 2, "cycle_factor": 3, "min_learning_rate": 0.01},
         lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 3, 0.01)),
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
    np.testing.assert_allclose(rates_per_epoch(schedule_of(name, **options)), expected, rtol=1e-9, atol=1e-16)


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


@pytest.mark.parametrize("per", ["epoch", "iteration"])
def test_a_period_swings_from_the_base_rate_to_exactly_0_and_back(per: str) -> None:
    schedule = schedule_of("cosine", base=1e-3, per=per, period_epochs=10)
    expected = {0: 1e-3, 1: 9.7553e-4, 5: 5e-4, 9: 2.447e-5, 20: 1e-3, 21: 9.7553e-4}
    assert {epoch: rate_at(schedule, epoch) for epoch in expected} == pytest.approx(expected, rel=1e-4)
    assert rate_at(schedule, 10) == rate_at(schedule, 30) == 0


@pytest.mark.parametrize("tenths", [1, 3, 7, 11, 24])
def test_drops_and_restarts_of_any_length_come_at_their_very_iteration(tenths: int) -> None:
    # With ten iterations in an epoch, tenths of an epoch are iterations: the oracle counts whole numbers.
    drops = schedule_of("step", steps=10, per="iteration", step_size=tenths / 10, gamma=0.97)
    restarts = schedule_of("warm_restarts", steps=10, per="iteration", first_cycle_epochs=tenths / 10)
    delayed = schedule_of("warm_restarts", steps=10, per="iteration", first_cycle_epochs=tenths / 10, warmup_epochs=0.7)
    for iteration in range(10 * EPOCHS):
        position = divmod(iteration, 10)
        assert rate_at(drops, *position) == pytest.approx(BASE * 0.97 ** (iteration // tenths), rel=1e-12)
        for schedule, since in ((restarts, iteration), (delayed, iteration - 7)):
            cosine = (1 + np.cos(np.pi * (since % tenths) / tenths)) / 2
            assert since < 0 or rate_at(schedule, *position) == pytest.approx(BASE * cosine, rel=1e-12)


def test_per_epoch_a_drop_between_two_epochs_comes_with_the_second() -> None:
    # 0.97 every 2.4 epochs: after 2.4, 4.8, 7.2, 9.6 and 12.
    rates = rates_per_epoch(schedule_of("step", step_size=2.4, gamma=0.97))
    expected = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5]
    np.testing.assert_allclose(rates[:13], BASE * 0.97 ** np.array(expected), rtol=1e-12)


RESTARTS: dict[str, Any] = {"per": "iteration", "first_cycle_epochs": 20, "cycle_factor": 2, "min_learning_rate": 9e-6}


def test_warm_restarts_of_a_published_run() -> None:
    # 1,728 iterations in an epoch, the first cycle 34,560 of them long.
    schedule = schedule_of("warm_restarts", base=1e-4, steps=1728, **RESTARTS)

    def at(iteration: int) -> float:
        return rate_at(schedule, *divmod(iteration, 1728))

    assert at(17280) == pytest.approx(5.45e-5, rel=1e-9)
    for restart in (34560, 103680, 241920, 518400):
        assert at(restart - 1) == pytest.approx(9e-6, rel=1e-6)
        assert at(restart) == pytest.approx(1e-4, rel=1e-12)
        assert at(restart + 1) < at(restart)
    tens = schedule_of("warm_restarts", first_cycle_epochs=10)
    assert rate_at(tens, 9) == pytest.approx(0.002447, rel=1e-3)
    assert rate_at(tens, 10) == BASE


@pytest.mark.parametrize("steps", [27, pytest.param(1728, marks=pytest.mark.slow)])
def test_warm_restarts_are_torchs_own_at_every_iteration_of_300_epochs(steps: int) -> None:
    schedule, optimizer = schedule_of("warm_restarts", base=1e-4, steps=steps, **RESTARTS), optimizer_of(base=1e-4)
    theirs = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 20 * steps, 2, 9e-6)
    ours, expected = [], []
    optimizer.step()
    for position in itertools.product(range(301), range(steps)):
        ours.append(rate_at(schedule, *position))
        expected.append(optimizer.param_groups[0]["lr"])
        theirs.step()
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


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
@pytest.mark.parametrize("warmup_epochs", [0.0, 5e-324, 0.4, 1.0, 2.5, 30.0])
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
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine", {}),
        ("cosine", {"period_epochs": 27}),
        ("warm_restarts", {"first_cycle_epochs": 27}),
    ],
)
def test_a_cosine_begins_at_the_base_rate_where_the_warm_up_ends(name: str, options: dict[str, Any], per: str) -> None:
    schedule = schedule_of(name, per=per, warmup_epochs=3, **options)
    assert rate_at(schedule, 2, STEPS - 1) == pytest.approx(BASE)
    assert rate_at(schedule, 3) == BASE
    assert rate_at(schedule, 3 + 9) == pytest.approx(0.75 * BASE)  # cos(60 degrees) = 1/2
    assert rate_at(schedule, 3 + 18) == pytest.approx(0.25 * BASE)


def test_milestones_count_from_the_start_of_training_also_with_a_warm_up() -> None:
    rates = rates_per_epoch(schedule_of("multistep", milestones=[5, 12], warmup_epochs=4))
    plain = rates_per_epoch(schedule_of("multistep", milestones=[5, 12]))
    assert rates[4:] == plain[4:]
    assert rates[3] == pytest.approx(BASE)
    assert rates[5] == pytest.approx(BASE / 10)


@pytest.mark.parametrize("per", ["epoch", "iteration"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("constant", {}),
        ("step", {"step_size": 2.4, "reset_momentum": True}),
        ("multistep", {"milestones": [3, 9]}),
        ("cosine", {"period_epochs": 4}),
        ("warm_restarts", {"first_cycle_epochs": 3, "cycle_factor": 2}),
    ],
)
def test_a_function_of_the_position_keeps_no_state(name: str, options: dict[str, Any], per: str) -> None:
    schedule = schedule_of(name, per=per, warmup_epochs=2, **options)
    positions = list(itertools.product(range(EPOCHS), range(STEPS)))
    in_order = {position: rate_at(schedule, *position) for position in positions}
    schedule.observe(record(30))
    assert schedule.state_dict() == {}
    random.Random(0).shuffle(positions)
    assert {position: rate_at(schedule, *position) for position in positions} == in_order
    state = copy.deepcopy(schedule.optimizer.state_dict())  # saved under some other rate
    schedule.optimizer.load_state_dict(state)
    assert rate_at(schedule, 10, 3) == in_order[10, 3]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("step", {"step_size": 1, "gamma": 0.5}, [0.025, 0.0025]),
        ("warm_restarts", {"first_cycle_epochs": 4, "min_learning_rate": 0.004}, [0.052, 0.007]),
    ],
)
def test_every_group_of_parameters_keeps_its_own_base_rate(
    name: str, options: dict[str, Any], expected: list[float]
) -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.01)])
    schedule_of(name, optimizer, **options).set(2, 0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


# --- the schedule that observes ---------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patience": 0, "factor": 0.9},
        {"patience": 3, "factor": 0.5, "threshold": 0.0},
        {"patience": 2, "factor": 0.3, "threshold": 0.05, "min_learning_rate": 0.004},
    ],
)
def test_plateau_is_torchs_own(options: dict[str, Any], metric: str) -> None:
    theirs_of = {"min_learning_rate": "min_lr"}
    for seed in range(5):
        generator, optimizer = np.random.default_rng(seed), optimizer_of()
        schedule = schedule_of("plateau", metric=f"val.{metric}", **options)
        theirs = lr_scheduler.ReduceLROnPlateau(
            optimizer,
            "min" if metric == "loss" else "max",
            eps=0,
            **{theirs_of.get(key, key): value for key, value in options.items()},
        )
        # A noisy approach to a limit: ever rarer improvements.
        noise = 0.4 * np.exp(-np.arange(200) / 20) + 0.02 * generator.standard_normal(200)
        values = 0.5 + noise if metric == "loss" else 0.5 - noise
        ours, expected = [], []
        for epoch, value in enumerate(values):
            ours.append(rate_at(schedule, epoch))
            expected.append(optimizer.param_groups[0]["lr"])
            schedule.observe(record(epoch + 1, **{metric: value}))
            theirs.step(value)
        np.testing.assert_allclose(ours, expected, rtol=1e-12)
        assert len(set(expected)) > 2, "it dropped at least twice"


@pytest.mark.parametrize("metric", ["val.loss", "val.accuracy"])
def test_to_be_as_good_as_the_best_is_no_improvement(metric: str) -> None:
    schedule = schedule_of("plateau", patience=0, threshold=0.0, metric=metric)
    for epoch, expected in enumerate([BASE, BASE, BASE / 10]):
        assert rate_at(schedule, epoch) == pytest.approx(expected)
        schedule.observe(record(epoch + 1))


def test_a_loss_below_0_improves_downwards_too() -> None:
    schedule = schedule_of("plateau", patience=0, threshold=0.1)
    for epoch, (loss, expected) in enumerate([(-1.0, BASE), (-1.05, BASE / 10), (-1.2, BASE / 10)]):
        schedule.observe(record(epoch + 1, loss))
        assert rate_at(schedule, epoch + 1) == pytest.approx(expected)


@pytest.mark.parametrize("per", ["epoch", "iteration"])
@pytest.mark.parametrize(("warmup_epochs", "ignored"), [(0, 0), (3, 3), (2.5, 2)])
def test_the_epochs_of_a_warm_up_are_not_observed(warmup_epochs: float, ignored: int, per: str) -> None:
    schedule = schedule_of("plateau", patience=1, warmup_epochs=warmup_epochs, per=per)
    rates = []
    for epoch in range(ignored + 4):
        rates.append(rate_at(schedule, epoch, STEPS - 1))
        schedule.observe(record(epoch + 1))
    # The first one that counts sets the mark, the second is borne, the third brings the drop.
    assert rates[ignored:] == pytest.approx([BASE, BASE, BASE, BASE / 10])
    warm = schedule_of("constant", warmup_epochs=warmup_epochs, per=per)
    assert rates[:ignored] == [rate_at(warm, epoch, STEPS - 1) for epoch in range(ignored)]


# --- a new optimiser in each phase ------------------------------------------------------------------------

NEW: dict[str, Callable[[nn.Parameter, float], torch.optim.Optimizer]] = {
    "sgd": lambda weights, rate: torch.optim.SGD([weights], rate, momentum=0.9),
    "adam": lambda weights, rate: torch.optim.Adam([weights], rate),
    "adamw": lambda weights, rate: torch.optim.AdamW([weights], rate),
    "rmsprop": lambda weights, rate: torch.optim.RMSprop([weights], rate, momentum=0.9),
}
FORGETFUL: list[tuple[dict[str, Any], list[int]]] = [
    # section, iterations at which the rate drops, of the 6 epochs of 3 steps
    ({"name": "multistep", "milestones": [2, 5]}, [6, 15]),
    ({"name": "multistep", "milestones": [2, 5], "per": "iteration"}, [6, 15]),
    ({"name": "multistep", "milestones": [2, 5], "warmup_epochs": 2}, [6, 15]),
    ({"name": "step", "step_size": 1.6}, [6, 12, 15]),
    ({"name": "step", "step_size": 1.6, "per": "iteration"}, [5, 10, 15]),
]
forgetful = pytest.mark.parametrize(("section", "drops"), FORGETFUL)


def gradient_at(iteration: int, weights: torch.Tensor) -> torch.Tensor:
    target = np.random.default_rng(iteration).standard_normal(4)
    return weights.detach() - torch.tensor(target)


def saved(weights: torch.Tensor, optimizer: torch.optim.Optimizer, schedule: Schedule) -> dict[str, Any]:
    state = {"weights": weights.detach(), "optimizer": optimizer.state_dict()}
    return {**copy.deepcopy(state), "schedule": json.dumps(schedule.state_dict())}


def training(
    name: str, section: dict[str, Any], start: tuple[int, int] = (0, 0), state: dict[str, Any] | None = None
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Trains for 6 epochs of 3 steps, from `start` on, and validates after each epoch.

    Yields what is saved before each step and each validation (as step 3), and at the end in a seventh epoch.
    """
    weights = nn.Parameter(torch.tensor(START))
    options = {"momentum": 0.9} if name in ("sgd", "rmsprop") else {}
    optimizer = create_optimizer(resolved(OPTIMIZERS, name, learning_rate=BASE, **options), [weights])
    schedule = create_schedule(resolved(SCHEDULES, **section), optimizer, 6, 3)
    if state is not None:
        state = copy.deepcopy(state)
        weights.data = state["weights"]
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(json.loads(state["schedule"]))
    for epoch, step in itertools.product(range(6), range(4)):
        if (epoch, step) < start:
            continue
        yield (epoch, step), saved(weights, optimizer, schedule)
        if step < 3:
            schedule.set(epoch, step)
            weights.grad = gradient_at(3 * epoch + step, weights)
            optimizer.step()
        else:
            schedule.observe(record(epoch + 1, loss=[3.0, 2.0, 2.0, 1.0, 1.5, 1.2][epoch]))
    schedule.set(6, 1)
    yield (6, 1), saved(weights, optimizer, schedule)


def test_every_optimiser_is_compared_with_a_new_one() -> None:
    assert set(NEW) == set(OPTIMIZERS)


@every_optimiser
@forgetful
def test_with_reset_momentum_a_drop_is_a_new_optimiser(name: str, section: dict[str, Any], drops: list[int]) -> None:
    weights = nn.Parameter(torch.tensor(START))
    expected = [weights.detach().numpy().copy()]
    warmup = section.get("warmup_epochs", 0)
    for phase, (begin, end) in enumerate(itertools.pairwise([0, *drops, 18])):
        optimizer = NEW[name](weights, BASE * 0.1**phase)
        for iteration in range(begin, end):
            epoch = iteration // 3
            if epoch < warmup:
                optimizer.param_groups[0]["lr"] = BASE * (epoch + 1) / warmup
            weights.grad = gradient_at(iteration, weights)
            optimizer.step()
            expected.append(weights.detach().numpy().copy())

    def weights_of(**options: Any) -> np.ndarray:
        states = dict(training(name, {**section, **options}))
        return np.array([state["weights"].numpy() for (_, step), state in states.items() if step < 3])

    np.testing.assert_allclose(weights_of(reset_momentum=True), expected, rtol=1e-12)
    after_first_drop = drops[0] + 1
    kept = weights_of(reset_momentum=False)
    np.testing.assert_allclose(kept[:after_first_drop], expected[:after_first_drop], rtol=1e-12)
    assert np.abs(kept[after_first_drop] - expected[after_first_drop]).max() > 1e-4


def test_an_optimiser_that_begins_with_memory_keeps_it_until_the_first_drop() -> None:
    weights = nn.Parameter(torch.tensor(START))
    optimizer = create_optimizer(resolved(OPTIMIZERS, "sgd", learning_rate=BASE), [weights])
    optimizer.state[weights]["momentum_buffer"].fill_(7)
    schedule = schedule_of("step", optimizer, step_size=2, reset_momentum=True)
    for epoch, kept in ((0, True), (1, True), (2, False)):
        schedule.set(epoch, 0)
        assert bool(optimizer.state[weights]["momentum_buffer"].any()) is kept


def plain(state: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.Tensor.tolist, state)


@every_optimiser
@pytest.mark.parametrize(
    "section",
    [
        *({**section, "reset_momentum": True} for section, _ in FORGETFUL),
        {"name": "cosine", "per": "iteration", "warmup_epochs": 0.5, "period_epochs": 1.5},
        {"name": "warm_restarts", "first_cycle_epochs": 1, "cycle_factor": 2, "warmup_epochs": 1},
        {"name": "plateau", "patience": 0, "warmup_epochs": 1},
        {"name": "plateau", "patience": 1, "per": "iteration"},
    ],
    ids=lambda section: "-".join(map(str, section.values())),
)
def test_a_run_resumed_anywhere_goes_on_as_if_it_had_not_stopped(name: str, section: dict[str, Any]) -> None:
    whole = list(training(name, section))
    for number, (position, state) in enumerate(whole[:-1]):
        assert plain(list(training(name, section, position, state))) == plain(whole[number:])


@pytest.mark.parametrize(("patience", "drops"), [(0, 3), (1, 1)])
def test_that_run_sees_drops_by_what_it_observes(patience: int, drops: int) -> None:
    states = [state["schedule"] for _, state in training("sgd", {"name": "plateau", "patience": patience})]
    assert json.loads(states[0]) == {"best": None, "waited": 0, "drops": 0}
    assert json.loads(states[-1])["drops"] == drops


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


def numpy_rmsprop(rate: float, smoothing: float, momentum: float, epsilon: float, decay: float) -> Update:
    """Tieleman and Hinton, 2012, slide 29; with momentum as Graves, 2013, equations 38-45, has it, without centring.

    Deviation: epsilon is added to the root, not under it.
    """
    square, velocity = np.zeros(4), np.zeros(4)

    def update(weights: np.ndarray, gradient: np.ndarray, t: int) -> np.ndarray:
        nonlocal square, velocity
        gradient = gradient + decay * weights
        square = smoothing * square + (1 - smoothing) * gradient**2
        velocity = momentum * velocity + gradient / (np.sqrt(square) + epsilon)
        return weights - rate * velocity

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
        ("rmsprop", {}, lambda: numpy_rmsprop(BASE, 0.99, 0, 1e-8, 0)),
        ("rmsprop", {"momentum": 0.8, "weight_decay": 0.3}, lambda: numpy_rmsprop(BASE, 0.99, 0.8, 1e-8, 0.3)),
        ("rmsprop", {"smoothing": 0.9, "epsilon": 1e-3}, lambda: numpy_rmsprop(BASE, 0.9, 0, 1e-3, 0)),
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
    np.testing.assert_allclose(weights.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


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
def test_at_a_rate_of_0_the_weights_stand_still_and_stay_finite(name: str) -> None:
    weights = nn.Parameter(torch.tensor(START))
    optimizer = create_optimizer(resolved(OPTIMIZERS, name, learning_rate=BASE, weight_decay=0.1), [weights])
    schedule = schedule_of("cosine", optimizer, period_epochs=1)
    for epoch, moves in ((1, False), (2, True), (3, False)):
        before = weights.detach().clone()
        schedule.set(epoch, 0)
        weights.grad = torch.tensor(GRADIENTS[0])
        optimizer.step()
        assert (weights != before).any() == moves
        assert torch.isfinite(weights).all()


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """Memory that torch allocates without a value holds NaN, not by chance zeros."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@every_optimiser
@pytest.mark.parametrize("skipped", [0, 2], ids=["at the start", "after a reset"])
@pytest.mark.usefixtures("filled_memory")
def test_a_step_that_fp16_skips_leaves_no_trace(name: str, skipped: int) -> None:
    def trained(overflows: bool) -> list[float]:
        weights = nn.Parameter(torch.tensor(START))
        options = {"momentum": 0.9} if name in ("sgd", "rmsprop") else {}
        optimizer = create_optimizer(resolved(OPTIMIZERS, name, learning_rate=BASE, **options), [weights])
        schedule = schedule_of("step", optimizer, step_size=2, reset_momentum=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for epoch, gradient in enumerate([*GRADIENTS, GRADIENTS[0]]):
            schedule.set(epoch, 0)
            for factor in [float("inf"), 1.0] if overflows and epoch == skipped else [1.0]:
                optimizer.zero_grad()
                scaler.scale((weights * torch.tensor(gradient)).sum() * factor).backward()
                scaler.step(optimizer)
                scaler.update()
        return weights.tolist()

    assert trained(overflows=True) == pytest.approx(trained(overflows=False), rel=1e-12)
    assert np.isfinite(trained(overflows=True)).all()


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
        (OPTIMIZERS, {"name": "rmsprop", "learning_rate": 1, "smoothing": 1}, "smoothing", "1 is not below 1"),
        (OPTIMIZERS, {"name": "rmsprop", "learning_rate": 1, "epsilon": 0}, "epsilon", "0 is not above 0"),
        (OPTIMIZERS, {"name": "rmsprop", "learning_rate": 1, "alpha": 0.9}, "alpha", "unknown option"),
        (SCHEDULES, {"name": "step", "step_size": 0}, "step_size", "0 is below 1e-06"),
        (SCHEDULES, {"name": "step", "step_size": "2"}, "step_size", "expected a number, got '2'"),
        (SCHEDULES, {"name": "step", "step_size": 2, "gamma": 0}, "gamma", "0 is not above 0"),
        (SCHEDULES, {"name": "step", "step_size": 2, "gamma": 1.1}, "gamma", "1.1 is above 1"),
        (SCHEDULES, {"name": "step", "step_size": 2, "reset_momentum": 1}, "reset_momentum", "expected true or false"),
        (SCHEDULES, {"name": "multistep", "milestones": 5}, "milestones", "expected a list, got 5"),
        (SCHEDULES, {"name": "multistep", "milestones": [5, 0]}, "milestones.1", "0 is below 1"),
        *(
            (SCHEDULES, {"name": "multistep", "milestones": milestones}, "milestones",
             f"expected epochs in rising order, at least one, got {milestones}")
            for milestones in ([], [20, 5], [5, 5], [5, 20, 20])
        ),
        (SCHEDULES, {"name": "cosine", "final_factor": 1.5}, "final_factor", "1.5 is above 1"),
        (SCHEDULES, {"name": "cosine", "step_size": 5}, "step_size", "unknown option"),
        (SCHEDULES, {"name": "cosine", "period_epochs": 0}, "period_epochs", "0 is below 1e-06"),
        (SCHEDULES, {"name": "warm_restarts"}, "first_cycle_epochs", "is missing and has no default"),
        (SCHEDULES, {"name": "warm_restarts", "first_cycle_epochs": 1, "cycle_factor": 1.5}, "cycle_factor",
         "expected a whole number, got 1.5"),
        (SCHEDULES, {"name": "warm_restarts", "first_cycle_epochs": 1, "cycle_factor": 0}, "cycle_factor",
         "0 is below 1"),
        (SCHEDULES, {"name": "plateau", "factor": 1}, "factor", "1 is not below 1"),
        (SCHEDULES, {"name": "plateau", "patience": -1}, "patience", "-1 is below 0"),
        (SCHEDULES, {"name": "plateau", "metric": "val.kd"}, "metric", "'val.kd' is not one of"),
        (SCHEDULES, {"name": "plateau", "min_learning_rate": -1}, "min_learning_rate", "-1 is below 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_section_is_said(registry: Any, section: dict[str, Any], key: str, problem: str) -> None:
    _, problems = registry.resolve(section)
    ((found, text),) = problems
    assert found == key
    assert text.startswith(problem)


@pytest.mark.parametrize(
    ("optimizer", "schedule", "expected"),
    [
        (
            {"name": "sgd", "nesterov": True, "momentum": 0.0},
            {"name": "constant"},
            [("optimizer.nesterov", "needs a momentum above 0")],
        ),
        ({"name": "sgd", "nesterov": True}, {"name": "constant"}, []),
        (
            {"name": "adam"},
            {"name": "cosine", "warmup_epochs": 30.5},
            [("schedule.warmup_epochs", "30.5 is above num_epochs, 30")],
        ),
        ({"name": "adam"}, {"name": "cosine", "warmup_epochs": 30}, []),
        (
            {"name": "adam"},
            {"name": "warm_restarts", "first_cycle_epochs": 1, "min_learning_rate": 0.1},
            [("schedule.min_learning_rate", "0.1 is not below optimizer.learning_rate, 0.1")],
        ),
        (
            {"name": "adam"},
            {"name": "plateau", "min_learning_rate": 0.2},
            [("schedule.min_learning_rate", "0.2 is not below optimizer.learning_rate, 0.1")],
        ),
        ({"name": "adam"}, {"name": "plateau", "min_learning_rate": 0.099}, []),
    ],
)
def test_what_two_options_contradict_each_other_in_is_said(
    optimizer: dict[str, Any], schedule: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    sections = resolved(OPTIMIZERS, **optimizer, learning_rate=0.1), resolved(SCHEDULES, **schedule)
    assert list(check(*sections, num_epochs=EPOCHS)) == expected


def test_an_optimiser_without_a_learning_rate_contradicts_nothing() -> None:
    schedule = resolved(SCHEDULES, "plateau", min_learning_rate=1.0)
    assert list(check({"name": "mine", "sharpness": 0.5}, schedule, EPOCHS)) == []


@pytest.mark.parametrize(("registry", "name"), [(OPTIMIZERS, "sgd"), (SCHEDULES, "cosine")])
def test_a_name_that_is_taken_cannot_be_registered_again(registry: Any, name: str) -> None:
    before = dict(registry.items())
    with pytest.raises(ValueError, match=f"'{name}' is registered twice"):
        registry.register(name)(lambda *, learning_rate: None)
    assert dict(registry.items()) == before


def test_schedules_share_their_common_options_and_their_defaults() -> None:
    for name, required in (("plateau", {}), ("step", {"step_size": 1}), ("multistep", {"milestones": [1]})):
        section = resolved(SCHEDULES, name, **required)
        assert section["warmup_epochs"] == 0.0
        assert section["per"] == "epoch"

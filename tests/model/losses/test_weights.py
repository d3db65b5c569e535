"""Weights against their formulas, written again in plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest

from model.errors import InputError
from model.losses.weights import WEIGHTS, create_weight, describe_weight, resolve_weight


def values_of(weight: Any, num_epochs: int, usual: float = 7.0) -> list[float]:
    resolved, problems = resolve_weight(weight, usual)
    assert problems == []
    assert resolved is not None
    curve = create_weight(resolved, num_epochs)
    return [curve(epoch) for epoch in range(num_epochs)]


def test_a_number_is_the_same_in_every_epoch() -> None:
    assert values_of(0.25, 3) == [0.25] * 3
    assert values_of(0, 2) == [0, 0]


def test_without_a_weight_the_usual_one_counts() -> None:
    assert values_of(None, 2) == [7.0, 7.0]
    assert values_of({"name": "constant"}, 2) == [7.0, 7.0]
    assert values_of({"name": "step", "milestones": [1], "gamma": 0.5}, 2) == [7.0, 3.5]


def test_a_warm_up_is_that_of_dkd() -> None:
    """min(epoch / 20, 1), epochs counted from 1."""
    expected = [5.0 * min(epoch / 20, 1.0) for epoch in range(1, 31)]
    assert values_of({"name": "constant", "value": 5.0, "warmup_epochs": 20}, 30) == pytest.approx(expected)


def test_linear_reaches_its_end_in_the_last_of_its_epochs_and_stays_there() -> None:
    found = values_of({"name": "linear", "start": 0.0, "end": 1.0, "epochs": 4}, 6)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert values_of({"name": "linear", "start": 1.0, "end": 0.0}, 4) == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_cosine_is_half_a_cosine() -> None:
    expected = [2 + (8 - 2) * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(1, 6)]
    found = values_of({"name": "cosine", "start": 8.0, "end": 2.0}, 5)
    assert found == pytest.approx(expected)
    assert found[-1] == pytest.approx(2.0)


def test_step_changes_after_its_milestones() -> None:
    weight = {"name": "step", "value": 4.0, "milestones": [1, 3], "gamma": 0.1}
    assert values_of(weight, 5) == pytest.approx([4.0, 0.4, 0.4, 0.04, 0.04])
    assert values_of({**weight, "gamma": 0}, 3) == [4.0, 0.0, 0.0]


def test_a_warm_up_multiplies_any_curve() -> None:
    weight = {"name": "step", "value": 4.0, "milestones": [3], "gamma": 0.5, "warmup_epochs": 2}
    assert values_of(weight, 4) == pytest.approx([2.0, 4.0, 4.0, 2.0])


@pytest.mark.parametrize(
    ("weight", "key", "text"),
    [
        ({"name": "liner", "start": 0, "end": 1}, "name", "did you mean 'linear'?"),
        ({"name": "linear", "start": 0}, "end", "is missing"),
        ({"name": "linear", "start": -1, "end": 1}, "start", "-1 is below 0"),
        ({"name": "step", "milestones": [5, 2]}, "milestones", "rising order"),
        ({"name": "constant", "warmup": 3}, "warmup", "did you mean 'warmup_epochs'?"),
        ({"name": "cosine", "start": 1, "end": 0, "epochs": 0}, "epochs", "0 is below 1"),
    ],
)
def test_what_is_wrong_with_a_weight_is_said(weight: dict[str, Any], key: str, text: str) -> None:
    [(found, said)] = resolve_weight(weight)[1]
    assert found == key
    assert text in said


def test_a_resolved_weight_is_complete_and_stays_as_it_is() -> None:
    resolved, _ = resolve_weight({"name": "constant", "warmup_epochs": 3}, 7.0)
    assert resolved == {"name": "constant", "value": 7.0, "warmup_epochs": 3}
    assert resolve_weight(resolved) == (resolved, [])


def test_a_warm_up_that_is_longer_than_the_run_is_refused() -> None:
    with pytest.raises(InputError, match="warmup_epochs: 20 is above the 10 epochs in which"):
        values_of({"name": "constant", "warmup_epochs": 20}, 10)


def test_a_description_says_what_the_weight_does() -> None:
    assert describe_weight(0.5) == "0.5"
    linear, _ = resolve_weight({"name": "linear", "start": 0.5, "end": 2.0})
    constant, _ = resolve_weight({"name": "constant", "warmup_epochs": 3}, 7.0)
    assert describe_weight(linear) == "(linear: start 0.5, end 2.0)"
    assert describe_weight(constant) == "(constant: value 7.0, warmup_epochs 3)"
    off, _ = resolve_weight({"name": "step", "milestones": [2], "gamma": 0, "value": 3.0})
    assert describe_weight(off) == "(step: milestones [2], gamma 0.0, value 3.0)", "a 0 says something, too"


def test_the_names_are_those_of_the_documentation() -> None:
    assert list(WEIGHTS) == ["constant", "cosine", "linear", "step"]

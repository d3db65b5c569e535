"""Weights of an objective's parts: numbers, or functions of the epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from model.errors import InputError
from model.registry import Milestones, Problem, Registry, checked_by

Weight = Callable[[int], float]  # of an epoch, from 0
Amount = Annotated[float, Field(ge=0, le=1e9)]
NumEpochs = Annotated[int, Field(ge=1)]


def weight_options(*, warmup_epochs: Annotated[int, Field(ge=0)] = 0) -> None:
    """Options of every weight; its epochs are counted from the end of another loss's initial stage, if there is one.

    Args:
        warmup_epochs: The weight is multiplied by `epoch / warmup_epochs` in the first ones, counted from 1.
    """


WEIGHTS = Registry("weight", common=weight_options)


@WEIGHTS.register("constant")
def constant(num_epochs: int, *, value: Amount | None = None) -> Weight:
    """The same throughout, but for a warm-up.

    Args:
        value: The weight; null: the usual one of the loss.
    """
    assert value is not None, "the objective's sections are complete"
    return lambda epoch: value


@WEIGHTS.register("linear")
def linear(num_epochs: int, *, start: Amount, end: Amount, epochs: NumEpochs | None = None) -> Weight:
    """A straight line from `start`, before the first epoch, to `end`, in the last of `epochs` and from then on.

    Args:
        start: The weight before the first epoch.
        end: The last weight.
        epochs: How many it takes; null: all.
    """
    return lambda epoch: start + (end - start) * _done(epoch, epochs or num_epochs)


@WEIGHTS.register("cosine")
def cosine(num_epochs: int, *, start: Amount, end: Amount, epochs: NumEpochs | None = None) -> Weight:
    """Half a cosine from `start`, before the first epoch, to `end`, in the last of `epochs` and from then on.

    Args:
        start: The weight before the first epoch.
        end: The last weight.
        epochs: How many it takes; null: all.
    """
    return lambda epoch: end + (start - end) * (1 + math.cos(math.pi * _done(epoch, epochs or num_epochs))) / 2


@WEIGHTS.register("step")
def step(
    num_epochs: int,
    *,
    milestones: Milestones,
    gamma: Amount = 0.1,
    value: Amount | None = None,
) -> Weight:
    """A change by a factor after each of the given numbers of epochs.

    Args:
        milestones: After how many epochs the weight changes, in rising order.
        gamma: The factor; 0 switches the loss off.
        value: The first weight; null: the usual one of the loss.
    """
    assert value is not None, "the objective's sections are complete"
    return lambda epoch: value * gamma ** sum(epoch >= milestone for milestone in milestones)


def _done(epoch: int, epochs: int) -> float:
    return min((epoch + 1) / max(epochs, 1), 1.0)


def resolve_weight(
    weight: float | Mapping[str, Any] | None, usual: float | None = None
) -> tuple[float | dict[str, Any] | None, list[Problem]]:
    """Checks a weight as params.json has it and fills in defaults; `usual`, that of the loss, where none is given."""
    if not isinstance(weight, Mapping):
        return usual if weight is None else weight, []
    section, problems = WEIGHTS.resolve(weight)
    if not problems and section.get("value", ...) is None:
        section["value"] = usual
    return section, problems


Weighting = Annotated[
    Amount | dict[str, Any] | None, checked_by(resolve_weight, 'a number from 0 to 1e9, or {"name": ..., options}')
]


def create_weight(weight: float | Mapping[str, Any], num_epochs: int) -> Weight:
    """Returns the weight that a resolved option stands for.

    Args:
        weight: A number, or a complete section of `WEIGHTS`.
        num_epochs: Of the run; after another loss's stage, those that are left.

    Raises:
        InputError: The warm-up is longer than that.
    """
    if not isinstance(weight, Mapping):
        return lambda epoch: weight
    _, common = WEIGHTS.split(weight)
    curve: Weight = WEIGHTS.create(weight, num_epochs)
    warmup = common["warmup_epochs"]
    if warmup > num_epochs > 0:
        raise InputError(f"weight.warmup_epochs: {warmup} is above the {num_epochs} epochs in which it counts")
    return (lambda epoch: curve(epoch) * _done(epoch, warmup)) if warmup else curve


def describe_weight(weight: float | Mapping[str, Any]) -> str:
    """Returns a weight as the log has it: a number, or what it does."""
    if not isinstance(weight, Mapping):
        return f"{weight:.4g}"
    unsaid = {"name": weight["name"], "warmup_epochs": 0}.items()  # a 0 of any other option says something
    given = [f"{key} {value}" for key, value in weight.items() if value is not None and (key, value) not in unsaid]
    return f"({weight['name']}: {', '.join(given)})"

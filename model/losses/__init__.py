"""Losses: one method per file, a pure formula function and a small module. A new file is all a method needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model.errors import InputError
from model.losses.weights import Weighting, resolve_weight
from model.plugins import import_all
from model.registry import Problem, Registry, labels_of


def loss_options(*, weight: Weighting = None) -> None:
    """Options of every loss.

    Args:
        weight: Factor of all that the loss gives: a number, or an object that names a function of the epoch, such as
            `{"name": "linear", "start": 0, "end": 1, "epochs": 20}`; null: the usual one of the method.
    """


LOSSES = Registry("loss", common=loss_options)

import_all(__name__, __path__)

from model.losses.base import Loss
from model.losses.objective import Objective

Sections = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def resolve(value: Any) -> tuple[Any, list[Problem]]:
    """Checks a `loss` section, or a list of them, and fills in every default.

    Returns:
        The complete section or list, and every problem found, as (key below `loss`, text).
    """
    if isinstance(value, list) and len(value) == 1:
        return _resolve_one(value[0])
    if not isinstance(value, list):
        return _resolve_one(value)
    if not value:
        return value, [("", "the list is empty; name at least one loss")]
    found = [_resolve_one(section) for section in value]
    problems = [
        (f"{label}.{key}".rstrip("."), text)
        for label, (_, own) in zip(labels_of(value), found, strict=True)
        for key, text in own
    ]
    return [section for section, _ in found], problems


def _resolve_one(section: Any) -> tuple[dict[str, Any], list[Problem]]:
    values, problems = LOSSES.resolve(section)
    if not problems:
        entry: Any = LOSSES[values["name"]]
        values["weight"], _ = resolve_weight(values["weight"], entry.usual_weight)
    return values, problems


def sections_of(value: Sections) -> dict[str, Mapping[str, Any]]:
    """Returns the losses of a resolved `loss` section, or of a list of them, by their labels."""
    sections = [value] if isinstance(value, Mapping) else list(value)
    return dict(zip(labels_of(sections), sections, strict=True))


def create_objective(value: Sections, num_epochs: int) -> Objective:
    """Returns what a run minimises.

    Args:
        value: The resolved `loss` section, or the list of them.
        num_epochs: Of the run.

    Raises:
        InputError: The options of a loss contradict each other, or the losses cannot stand together.
    """
    losses: dict[str, Loss] = {}
    sections = sections_of(value)
    for label, section in sections.items():
        try:
            losses[label] = LOSSES.create(section)
        except InputError as error:
            raise InputError(f"{label}: {error}", error.reason) from None
    return Objective(losses, {label: section["weight"] for label, section in sections.items()}, num_epochs)

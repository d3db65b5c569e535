"""Datasets: one file per family. Every module of this folder is imported, so a new file is all a new dataset needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from model.data.pipeline import Data, add_unlabelled, pipeline_options, prepare, unlabelled_options
from model.errors import InputError
from model.plugins import import_all
from model.registry import Problem, Registry, check_options, options_of

DATASETS = Registry("dataset", common=pipeline_options)

import_all(__name__, __path__)


REST = "rest"  # of the dataset's own training images


def create(
    section: Mapping[str, Any], *, seed: int, device: torch.device, unlabelled: Mapping[str, Any] | None = None
) -> Data:
    """Reads the dataset that a resolved `dataset` section names and makes the loaders of a run.

    Args:
        section: The resolved `dataset` section.
        seed: The run's.
        device: Where the batches are made.
        unlabelled: The resolved `unlabelled` section, if there is one.

    Raises:
        InputError: The data cannot be read, or the options do not fit it.
    """
    _, common = DATASETS.split(section)
    splits = prepare(DATASETS.create(section), section["name"], seed, device, **common)
    if unlabelled is None:
        return splits
    own = {key: value for key, value in unlabelled.items() if key not in options_of(unlabelled_options)}
    try:
        images = None if unlabelled["name"] == REST else DATASETS.create(own)
    except InputError as error:
        line = str(error)
        raise InputError(line if line.startswith("unlabelled") else f"unlabelled: {line}", error.reason) from error
    return add_unlabelled(splits, images, unlabelled["name"], {k: v for k, v in unlabelled.items() if k not in own})


def resolve_unlabelled(section: Any) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Checks an `unlabelled` section, or the text `rest`, and fills in every default."""
    if section is None:
        return None, []
    if isinstance(section, str):
        section = {"name": section}
    if not isinstance(section, Mapping) or section.get("name") != REST:
        return DATASETS.resolve(section, unlabelled_options)
    options, problems = check_options({k: v for k, v in section.items() if k != "name"}, unlabelled_options)
    return {"name": REST, **options}, problems

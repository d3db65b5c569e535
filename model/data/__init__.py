"""Datasets: one file per family. Every module of this folder is imported, so a new file is all a new dataset needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from model.data.pipeline import Data, pipeline_options, prepare
from model.plugins import import_all
from model.registry import Registry

DATASETS = Registry("dataset", common=pipeline_options)

import_all(__name__, __path__)


def create(section: Mapping[str, Any], *, seed: int, device: torch.device) -> Data:
    """Reads the dataset that a resolved `dataset` section names and makes the loaders of a run.

    Raises:
        InputError: The data cannot be read, or the options do not fit it.
    """
    _, common = DATASETS.split(section)
    return prepare(DATASETS.create(section), section["name"], seed, device, **common)

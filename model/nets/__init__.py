"""Networks: one file per family. Every module of this folder is imported, so a new file is all a new net needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from model.errors import InputError
from model.plugins import import_all
from model.registry import Registry

NETS = Registry("net")

import_all(__name__, __path__)


def restore(state: Mapping[str, Any], where: str) -> nn.Module:
    """Returns the net that a checkpoint describes, with its weights.

    Args:
        state: A checkpoint: `net` holds the section that named it and its number of classes.
        where: The checkpoint's file, for messages.

    Raises:
        InputError: The net is unknown here, or its weights do not fit it.
    """
    section, num_classes = state["net"]["section"], state["net"]["num_classes"]
    _, problems = NETS.resolve(section)
    if problems:
        raise InputError(f"{where}: its net cannot be built: {problems[0][0]}: {problems[0][1]}", "checkpoint")
    # A checkpoint holds all weights: nothing is fetched for a net that began with pretrained ones.
    net = NETS.create({**section, "pretrained": False} if "pretrained" in section else section, num_classes)
    try:
        net.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        mismatch = " ".join(str(error).split())
        raise InputError(f"{where}: its weights do not fit net '{section['name']}': {mismatch}", "checkpoint") from None
    return net

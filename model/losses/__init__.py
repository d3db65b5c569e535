"""Losses: one method per file, a pure formula function and a small module. A new file is all a method needs."""

from __future__ import annotations

from model.plugins import import_all
from model.registry import Registry

LOSSES = Registry("loss")

import_all(__name__, __path__)

"""Networks: one file per family. Every module of this folder is imported, so a new file is all a new net needs."""

from __future__ import annotations

from model.plugins import import_all
from model.registry import Registry

NETS = Registry("net")

import_all(__name__, __path__)

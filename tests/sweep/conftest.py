from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from process import log
from sweep import study
from sweep.launchers import base, local

PARAMS = {
    "num_epochs": 3,
    "loss": {"name": "kd", "alpha": 0.9, "temperature": 4.0},
    "stub": {"do": "ok", "seconds": 0},
}


@pytest.fixture(autouse=True)
def stub_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(local, "STAGGER_SECONDS", 0)
    monkeypatch.setattr(base, "TRAIN", Path(__file__).with_name("stub_train.py"))


@pytest.fixture
def make_parent(tmp_path: Path) -> Callable[..., Path]:
    """Makes a parent directory with a space and the params above, or others."""

    def make(space: dict[str, Any] | str | None = None, **params: Any) -> Path:
        (tmp_path / "params.json").write_text(json.dumps(PARAMS | params))
        if space is not None:
            text = space if isinstance(space, str) else json.dumps(space)
            (tmp_path / "search.json").write_text(text)
        return tmp_path

    return make


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collects what is logged."""
    collected: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: collected.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "level", logging.INFO)
    monkeypatch.setattr(log, "propagate", False)
    log.manager._clear_cache()
    yield collected
    log.manager._clear_cache()

"""What all tests share: one thread, and the scripts as functions."""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # bits depend on it, and the runners are shared; also for scripts that tests start

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import TINY, Ended, Make, Script, merged

from process import run_main


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests get half an hour each: a busy machine must not fail them, and what hangs must still end."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_a_terminal() -> None:
    """Under nohup or in a script's background some signals are ignored, which a run and its children would respect."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_loggers() -> Iterator[None]:
    """No test logs into the file of the one before."""
    yield
    for name in ("kdlab", "py.warnings"):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True
    logging.captureWarnings(False)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs a script's main in this process: `script(train, "--model_dir", path)`."""

    def run(module: ModuleType, *arguments: Any) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(module.main)
        out, err = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 1, out, err)

    return run


@pytest.fixture
def make_experiment(tmp_path: Path) -> Callable[..., Path]:
    """Writes an experiment directory that trains in a second: `make_experiment("kd", teacher=..., loss=...)`."""

    def make(name: str = "run", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "params.json").write_text(json.dumps(merged(TINY, changes)))
        return folder

    return make


@pytest.fixture
def teacher(script: Script, make_experiment: Make) -> Path:
    """A trained experiment directory."""
    import train  # here: not every test needs it

    folder = make_experiment("teacher", student={"width": 8})
    assert script(train, "--model_dir", folder).status == 0
    return folder


@pytest.fixture
def make_student(make_experiment: Make, teacher: Path) -> Callable[..., Path]:
    """Writes a student of that teacher: `make_student("a", {"cache": "lazy"}, seed=2)`."""

    def make(name: str, options: dict[str, Any] | None = None, **changes: Any) -> Path:
        section = {"model_dir": str(teacher), **(options or {})}
        return make_experiment(
            name, **merged({"loss": {"name": "kd", "alpha": 0.9, "temperature": 4.0}, "teacher": section}, changes)
        )

    return make

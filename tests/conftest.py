"""What all tests share: one thread, and the scripts as functions."""

from __future__ import annotations

import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # bits depend on it, and the runners are shared; also for scripts that tests start

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from utils import run_main

ROOT = Path(__file__).parent.parent


def committed_files() -> list[str]:
    """Returns the paths of the repository's files, as git lists them."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    return [name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


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


class Ended(NamedTuple):
    """How a script ended."""

    status: int
    out: str
    err: str


Script = Callable[..., Ended]


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


TINY: dict[str, Any] = {
    "seed": 1,
    "num_epochs": 2,
    "dataset": {"name": "synthetic", "batch_size": 32, "augmentation": "crop_flip", "train_size": 160},
    "student": {"name": "tiny", "width": 4, "dropout_rate": 0.2},
    "optimizer": {"name": "adam", "learning_rate": 0.01},
    "schedule": {"name": "cosine", "per": "iteration", "warmup_epochs": 0.5},
    "precision": "fp32",
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns `base` with sections updated and None meaning: leave the key out."""
    result = json.loads(json.dumps(base))
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict) and "name" not in value:
            result[key] |= value
        else:
            result[key] = value
    return result


@pytest.fixture
def make_experiment(tmp_path: Path) -> Callable[..., Path]:
    """Writes an experiment directory that trains in a second: `make_experiment("kd", teacher=..., loss=...)`."""

    def make(name: str = "run", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "params.json").write_text(json.dumps(merged(TINY, changes)))
        return folder

    return make


def snapshot(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

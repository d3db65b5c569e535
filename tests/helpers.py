"""What tests share besides fixtures."""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent


def committed_files() -> list[str]:
    """Returns the paths of the repository's files, as git lists them."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    return [name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


class Ended(NamedTuple):
    """How a script ended."""

    status: int
    out: str
    err: str


Script = Callable[..., Ended]
Make = Callable[..., Path]

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


def snapshot(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl; a last line that is not finished yet is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


@contextlib.contextmanager
def rejected(error: type[Exception] = AssertionError) -> Iterator[None]:
    """A claim does not hold for what is broken."""
    with pytest.raises(error):
        yield


def changed(thing: Any, *changes: tuple[str, str]) -> Any:
    """Returns a function or class of ours made from its source with some text replaced."""
    source = textwrap.dedent(inspect.getsource(thing))
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} is not in {thing.__qualname__}: what the trap is about has moved"
        source = source.replace(old, new)
    namespace = dict(vars(inspect.getmodule(thing)))
    exec(compile(source, f"<{thing.__qualname__}, broken>", "exec"), namespace)
    return namespace[thing.__name__]

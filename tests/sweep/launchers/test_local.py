"""Claims about local processes: how a child is started, what it sees and how it is stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweep.launchers.local import Local


def wait(launcher: Local) -> dict[Path, int]:
    for _ in range(400):
        if ended := launcher.poll():
            return ended
        time.sleep(0.02)
    raise AssertionError("nothing has ended")


def train(parent: Path, slots: int = 1) -> dict[str, Any]:
    launcher = Local(slots, "cpu")
    launcher.submit(parent)
    assert wait(launcher) == {parent: 0}
    return json.loads((parent / "record.json").read_text())


def test_a_child_is_an_argv_list_in_its_own_session(make_parent: Callable[..., Path]) -> None:
    parent = make_parent()
    record = train(parent)
    assert record["argv"] == ["--model_dir", str(parent), "--quiet", "--device", "cpu"]
    assert record["session"]


def test_the_output_of_every_attempt_is_appended_below_its_command(make_parent: Callable[..., Path]) -> None:
    parent = make_parent()
    train(parent)
    train(parent)
    lines = (parent / "console.log").read_text().splitlines()
    assert lines[1] == lines[3] == "done"
    assert lines[0].startswith("--- 2")
    assert f"--model_dir {parent} --quiet" in lines[2]


@pytest.mark.parametrize(("cores", "slots", "threads"), [(8, 1, "8"), (8, 3, "2"), (2, 5, "1")])
def test_threads_are_divided_among_the_slots(
    make_parent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cores: int, slots: int, threads: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert train(make_parent(), slots)["threads"] == threads


def test_threads_that_the_user_has_set_are_left_alone(
    make_parent: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert train(make_parent(), 2)["threads"] == "7"


def test_a_cancelled_child_saves_and_a_stubborn_one_is_killed(make_parent: Callable[..., Path]) -> None:
    for do, force, status in (("sleep", False, 143), ("stubborn", True, -9)):
        parent = make_parent(stub={"do": do})
        launcher = Local()
        launcher.submit(parent)
        while not (parent / "pid").exists():
            time.sleep(0.02)
        launcher.cancel(parent, force)
        assert wait(launcher) == {parent: status}
        (parent / "pid").unlink()


def test_workers_of_a_killed_child_do_not_outlive_it(make_parent: Callable[..., Path]) -> None:
    parent = make_parent(stub={"do": "segfault"})
    launcher = Local()
    launcher.submit(parent)
    assert wait(launcher) == {parent: -11}
    worker = Path("/proc", (parent / "worker").read_text(), "stat")
    for _ in range(100):  # whoever adopts it may need a moment to bury it
        if not worker.exists() or worker.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the worker is still alive")

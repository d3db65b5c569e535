"""A search as its directories show it: which children there are, what each still needs, and running those.

The state is in the directories only: a search that was killed is planned again from them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

import utils
from experiment import MAY_CHANGE, read_status
from process import StopSignals, log
from sources import find_initial, find_teacher
from sweep.launchers import base
from sweep.space import Point, grid, name_points, read_space, show
from utils import RunError, read_json

CHECKED_AT_ONCE = 1_000  # directories on one command line, which has a limit
POLL_SECONDS = 0.1
MAX_CONSOLE_BYTES = 100_000_000  # a child that prints without end must not fill the disk of all the others

AsSections = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass
class Child:
    """A point of a search with its experiment directory, which may not exist yet."""

    dir: Path
    point: Point
    params: dict[str, Any]
    run_before: dict[str, Any] = field(default_factory=dict)  # run.json as an earlier attempt has left it

    def read_run(self) -> dict[str, Any]:
        """Returns run.json; nothing where there is none, or none that can be read (train.py says why)."""
        with contextlib.suppress(RunError):
            return read_json(self.dir / "run.json")
        return {}

    def is_finished(self) -> bool:
        """Tells whether all epochs are done; a completed run may have been given more of them since."""
        run = self.read_run()
        done, wanted = run.get("epoch"), self.params.get("num_epochs")
        return run.get("status") == "completed" and isinstance(done, int) and isinstance(wanted, int) and done >= wanted

    def outlook(self) -> str:
        """Returns what a search does with the child; what begins with `run` or `resume` is to be started."""
        run, status = self.read_run(), "failed"
        with contextlib.suppress(RunError):
            status = read_status(self.dir)
        if status == "running":
            return "leave: running elsewhere"
        if self.is_finished():
            return "skip: completed"
        if status == "failed":
            return f"run again: failed ({run.get('reason', 'run.json cannot be read')})"
        return "run" if status == "pending" else f"resume at epoch {run.get('epoch', 0) + 1}"

    def result(self) -> tuple[float, str]:
        """Returns the best validation accuracy, -1 where there is none, and a line about it."""
        best = self.read_run().get("best") or {}
        accuracy = best.get("accuracy", -1.0)
        return accuracy, f"{self.dir.name}: accuracy {accuracy:.4f} at epoch {best.get('epoch', 0)}"

    def has_flooded(self) -> bool:
        """Tells whether console.log is larger than any training needs."""
        path = self.dir / "console.log"
        return path.exists() and path.stat().st_size > MAX_CONSOLE_BYTES

    def last_line(self) -> str:
        """Returns the last line of console.log, fit for a terminal; that is the command if nothing was printed."""
        lines: list[str] = []
        with contextlib.suppress(OSError), (self.dir / "console.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return "".join(char if char.isprintable() else "?" for char in "".join(lines[-1:]).strip()[:200])


def plan(parent: Path, overrides: Sequence[str] = (), as_sections: AsSections = dict) -> list[Child]:
    """Returns the children of a search, in its order; only reads.

    Args:
        parent: The directory with the reference and the space.
        overrides: Texts `key=value`, for every child.
        as_sections: Turns raw params of another shape into sections, in which two of them are compared.

    Raises:
        RunError: The parent's params.json, its search.json or an override is wrong, or a child has other params.
    """
    reference, path = read_json(parent / "params.json"), parent / "search.json"
    overridden = utils.apply_overrides(reference, overrides)
    space = read_space(path, reference)
    if twice := [key for key in overridden if key in space]:
        raise RunError(f"--overrides: {twice[0]} is what {path} varies; remove it from one of the two")
    children, problems = [], []
    for name, point in name_points(grid(space)).items():
        child = Child(parent / name, point, copy.deepcopy(reference))
        for key, value in point.items():
            utils.set_option(child.params, key, value)
        children.append(child)
        existing = child.dir / "params.json"
        if not existing.exists():
            continue
        present = read_json(existing)
        found = utils.differences(as_sections(present), as_sections(child.params))
        if not found:
            child.params = present  # the same in other words may stay as it is
        if changes := {key: change for key, change in found.items() if key not in MAY_CHANGE}:
            listed = "; ".join(f"{key}: {change}" for key, change in changes.items())
            way = "remove that directory or undo the change"
            problems.append(f"{existing} is not what the search asks for ({listed}); {way}")
    if problems:
        raise RunError("\n".join(problems), "params")
    return children


def table(children: Sequence[Child]) -> str:
    """Returns what a search would do, as a Markdown table and a line of counts."""
    outlooks = [child.outlook() for child in children]
    rows = [
        [child.dir.name, *(show(value).replace("|", "\\|") for value in child.point.values()), outlook]
        for child, outlook in zip(children, outlooks, strict=True)
    ]
    headers = ["child", *children[0].point, "what happens"]
    text = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    skip, leave = (sum(outlook.startswith(word) for outlook in outlooks) for word in ("skip", "leave"))
    counts = f"{len(rows) - skip - leave} to run, {skip} completed, {leave} running elsewhere"
    return f"{text}\n\n{len(rows)} children: {counts}"


def check(children: Sequence[Child]) -> None:
    """Has train.py check children in temporary directories, before theirs are made; raises with all its lines."""
    lines = []
    with tempfile.TemporaryDirectory(prefix="kdlab-") as temporary:
        copies = [replace(child, dir=Path(temporary, child.dir.name)) for child in children]
        write(copies)
        for start in range(0, len(copies), CHECKED_AT_ONCE):
            names = [str(copied.dir) for copied in copies[start : start + CHECKED_AT_ONCE]]
            command = [sys.executable, str(base.TRAIN), "--check", "--model_dir", *names]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
            if done.returncode:
                lines += done.stderr.splitlines() or [f"train.py --check: {describe(done.returncode)}"]
    if lines:
        raise RunError("\n".join(lines).replace(temporary, str(children[0].dir.parent)), "params")


def check_sources(children: Sequence[Child], as_sections: AsSections = dict) -> None:
    """Raises if what children begin with, teacher or weights, is not there: each of them would only find it too.

    Args:
        children: Those that are to be run.
        as_sections: As for `plan`.
    """
    sections = [as_sections(child.params) for child in children]
    for teacher in {json.dumps(section.get("teacher"), sort_keys=True) for section in sections}:
        section = json.loads(teacher)
        if section is not None:
            section = {"model_dir": section} if isinstance(section, str) else section
            find_teacher(Path(section["model_dir"]), section.get("restore_file", "best"))
    students = [section["student"] for section in sections if isinstance(section.get("student"), dict)]
    for path in {str(student["init_from"]) for student in students if student.get("init_from")}:
        if not (found := find_initial(Path(path))).exists():
            raise RunError(f"student.init_from: {found} does not exist; name a directory or a .pth.tar file", "params")


def write(children: Sequence[Child]) -> None:
    """Makes the directories that do not exist yet, and tells those that do if they have more epochs to train."""
    for child in children:
        path = child.dir / "params.json"
        if not path.exists() or read_json(path) != child.params:
            try:
                child.dir.mkdir(exist_ok=True)
            except OSError as error:
                raise utils.storage_error(error, child.dir) from error
            utils.write_json(path, child.params)


class Stop(StopSignals):
    """Counts the signals to stop: at the first the children save and end, at the second they are killed."""

    count = 0

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        self.received = self.received or signal.Signals(number)


class Tally:
    """What has become of the children so far; each line goes to console and log as soon as it is known."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.lines: dict[str, list[str]] = {"done": [], "skipped": [], "failed": []}
        self.best = (-1.0, "none yet")

    def add(self, child: Child, outcome: str, line: str) -> None:
        self.lines.setdefault(outcome, []).append(line)
        if outcome in ("done", "skipped"):
            self.best = max(self.best, child.result(), key=lambda result: result[0])
        if outcome != "skipped":
            say = log.error if outcome == "failed" else log.info
            say("[%d/%d] %s", self.number(*self.lines), self.total, line)

    def number(self, *outcomes: str) -> int:
        return sum(len(self.lines[outcome]) for outcome in outcomes)

    def summarise(self) -> None:
        for line in self.lines["failed"]:
            log.error(line)
        counts = [f"{len(lines)} {outcome}" for outcome, lines in self.lines.items()]
        log.info(", ".join([*counts, f"{self.total - self.number(*self.lines)} not started"]))
        log.info("best: %s", self.best[1])


def run(children: Sequence[Child], launcher: base.Launcher) -> int:
    """Runs the children that need it, `launcher.slots` at a time, whatever becomes of each.

    Returns:
        0 if all children are completed, else 1; a signal to stop becomes a RunError once they have ended.
    """
    tally, stop, answered = Tally(len(children)), Stop(), 0
    waiting: list[Child] = []
    running: dict[Path, Child] = {}
    for child in children:
        outlook = child.outlook()
        if outlook.startswith("skip"):
            tally.add(child, "skipped", "")
        elif outlook.startswith("leave"):
            tally.add(child, "running elsewhere", f"{child.dir.name} is running elsewhere")
        else:
            waiting.append(child)
    log.info("Searching hyperparameters: %d of %d children to run", len(waiting), len(children))
    with stop, tqdm(total=len(children), initial=len(children) - len(waiting), disable=None, unit="run") as bar:
        while running or (waiting and not stop.count):
            while waiting and len(running) < launcher.slots and not stop.count:
                child = waiting.pop(0)
                child.run_before = child.read_run()
                try:
                    launcher.submit(child.dir)
                    running[child.dir] = child
                except OSError as error:
                    tally.add(child, "failed", f"{child.dir.name} failed: it could not be started: {error}")
            if answered < stop.count:
                answered = stop.count
                what = "killed" if answered > 1 else "saving and ending (a second signal kills)"
                log.warning("no new trials; %s: %s", what, ", ".join(path.name for path in running))
                for path in running:
                    launcher.cancel(path, force=answered > 1)
            for path in [path for path, child in running.items() if child.has_flooded()]:
                launcher.cancel(path, force=True)
            for path, status in launcher.poll().items():
                child = running.pop(path)
                tally.add(child, *judge(child, status, stop.count > 0))
            bar.n = tally.number(*tally.lines)
            bar.set_postfix_str(f"{len(running)} running, {tally.number('failed')} failed, best {tally.best[1]}")
            time.sleep(POLL_SECONDS)
    tally.summarise()
    completed = tally.number("done", "skipped")
    if stop.count and completed < len(children):
        raise stop.error(f"after {completed} of {len(children)} children")
    return utils.OK if completed == len(children) else utils.FAILED


def judge(child: Child, status: int, stopping: bool) -> tuple[str, str]:
    """Returns the outcome of an attempt that has ended and a line about it; the directory's word counts most."""
    name, run = child.dir.name, child.read_run()
    if child.is_finished():
        return "done", child.result()[1]
    reason = run.get("reason") if run != child.run_before else None  # else it is an earlier attempt's
    if status == utils.TEMPORARY and reason is None:
        return "running elsewhere", f"{name} is running elsewhere"
    if stopping:
        return "interrupted", f"{name} is interrupted after epoch {run.get('epoch', 0)}"
    if child.has_flooded():
        reason = f"console.log is larger than {MAX_CONSOLE_BYTES} bytes; remove it"
    what = describe(status) if status else "exit status 0, but run.json is not of a completed run"
    return "failed", f"{name} failed: {what}{f' ({reason})' if reason else ''}: {child.last_line()}"


def describe(status: int) -> str:
    """Returns how a process ended."""
    return f"killed by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"exit status {status}"

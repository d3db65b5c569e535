"""A search as its directories show it: which children there are, what each still needs, and running those.

The state is in the directories only: a search that was killed is planned again from them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

import utils
from experiment import read_status
from sweep import launchers
from sweep.space import Point, grid, name_points, read_space, show
from utils import RunError, log, read_json

CHECKED_AT_ONCE = 1_000  # directories on one command line, which has a limit
POLL_SECONDS = 0.1
MAX_CONSOLE_BYTES = 100_000_000  # a child that prints without end must not fill the disk of all the others


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
        with (self.dir / "console.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return "".join(char if char.isprintable() else "?" for char in "".join(lines[-1:]).strip()[:200])


def plan(parent: Path, overrides: Sequence[str] = ()) -> list[Child]:
    """Returns the children of a search, in its order; only reads.

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
        if existing.exists() and (changes := utils.differences(read_json(existing), child.params)):
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
    first = Counter(outlook.partition(":")[0].split()[0] for outlook in outlooks)
    started = f"{first['run'] + first['resume']} to run"
    return f"{text}\n\n{len(rows)} children: {started}, {first['skip']} completed, {first['leave']} running elsewhere"


def check(children: Sequence[Child]) -> None:
    """Has train.py check the params of children in temporary directories, before theirs are made.

    Raises:
        RunError: With a line for each problem.
    """
    lines = []
    with tempfile.TemporaryDirectory(prefix="kdlab-") as temporary:
        for start in range(0, len(children), CHECKED_AT_ONCE):
            command = [sys.executable, str(launchers.TRAIN), "--check", "--model_dir"]
            for child in children[start : start + CHECKED_AT_ONCE]:
                copied = Path(temporary, child.dir.name)
                copied.mkdir()
                (copied / "params.json").write_text(json.dumps(child.params), encoding="utf-8")
                command.append(str(copied))
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
            if done.returncode:
                lines += done.stderr.splitlines() or [f"train.py --check: {describe(done.returncode)}"]
    if lines:
        raise RunError("\n".join(lines).replace(temporary, str(children[0].dir.parent)), "params")


def write(children: Sequence[Child]) -> None:
    """Makes the directories that do not exist yet."""
    for child in children:
        if not (child.dir / "params.json").exists():
            try:
                child.dir.mkdir(exist_ok=True)
            except OSError as error:
                raise utils.storage_error(error, child.dir) from error
            utils.write_json(child.dir / "params.json", child.params)


class Stop(utils.StopSignals):
    """Counts the signals to stop: at the first the children save and end, at the second they are killed."""

    count = 0

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        self.received = self.received or signal.Signals(number)


class Tally:
    """What has become of the children so far; each line goes to console and log as soon as it is known."""

    def __init__(self, children: Sequence[Child]) -> None:
        self.counts = Counter(done=0, skipped=0, failed=0)
        self.best = (-1.0, "none yet")
        self._children = children
        self._problems: list[str] = []

    def add(self, child: Child, outcome: str, line: str) -> None:
        self.counts[outcome] += 1
        if outcome in ("done", "skipped"):
            self.best = max(self.best, child.result(), key=lambda result: result[0])
        else:
            self._problems.append(line)
        if outcome != "skipped":
            say = log.error if outcome == "failed" else log.info
            say("[%d/%d] %s", self.counts.total(), len(self._children), line)

    def summarise(self) -> int:
        """Logs how the search has ended and returns how many children are completed."""
        for line in self._problems:
            log.error(line)
        self.counts["not started"] = len(self._children) - self.counts.total()
        log.info(", ".join(f"{count} {outcome}" for outcome, count in self.counts.items()))
        if completed := self.counts["done"] + self.counts["skipped"]:
            log.info("best %s", self.best[1])
            log.info("python synthesize_results.py --parent_dir %s", shlex.quote(str(self._children[0].dir.parent)))
        return completed


def run(children: Sequence[Child], launcher: launchers.Launcher) -> int:
    """Runs the children that need it, `launcher.slots` at a time, whatever becomes of each, and sums up.

    Returns:
        0 if all children are completed, else 1.

    Raises:
        RunError: A signal stopped the search.
    """
    tally = Tally(children)
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
    stop, answered = Stop(), 0
    with stop, tqdm(total=len(children), initial=tally.counts.total(), disable=None, unit="run") as bar:
        try:
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
                bar.n = tally.counts.total()
                bar.set_postfix_str(f"{len(running)} running, {tally.counts['failed']} failed, best {tally.best[1]}")
                time.sleep(POLL_SECONDS)
        finally:
            for path in running:  # after an error in this loop itself: nothing goes on unattended
                launcher.cancel(path)
    completed = tally.summarise()
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

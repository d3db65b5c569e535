"""The children of a search: experiment directories, what each of them still needs, and making those that are missing.

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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

import utils
from experiment import REMOVED, is_locked, may_change
from sources import changed_sources, find_initial, find_teacher
from sweep.launchers import base
from sweep.space import Point, Search, child_params, child_seed, name_points, show
from utils import RunError, read_json

CHECKED_AT_ONCE = 1_000  # directories on one command line, which has a limit
RERUN = ("none", "failed", "stale", "all")
UNREADABLE = "run.json cannot be read"

AsSections = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Outlook:
    """What a search does with a child, and why."""

    action: str  # start, skip or wait; in a table also refuse
    state: str  # of the directory, as read_status has it
    text: str
    anew: bool = False  # its earlier results are given up


@dataclass
class Child:
    """A point of a search, with one seed, and its experiment directory, which may not exist yet."""

    dir: Path
    point: Point  # the seed is in it if the search varies it
    params: dict[str, Any]
    trial: int = 0  # the number of the point; children of several seeds share it
    is_written: bool = False  # its params.json says what the search asks for
    changes: str = ""  # how its params differ from those that it has been trained with
    look: Callable[[Child], str] | None = None  # finds them out again
    run_before: dict[str, Any] = field(default_factory=dict)  # run.json as an earlier attempt has left it

    def read_run(self) -> dict[str, Any]:
        """Returns run.json; nothing where there is none, or none that can be read (train.py says why)."""
        with contextlib.suppress(RunError):
            run = read_json(self.dir / "run.json")
            run = {key: value for key, value in run.items() if value is not None}
            kinds = {"status": str, "epoch": int, "attempts": list, "best": dict}
            fits = all(isinstance(run[key], kind) for key, kind in kinds.items() if key in run)
            if fits and all(isinstance(attempt, dict) for attempt in run.get("attempts", [])):
                return run
        return {}

    def is_finished(self, run: Mapping[str, Any] | None = None) -> bool:
        """Tells whether all epochs are done; a completed run may have been given more of them since.

        Args:
            run: What `read_run` has returned, if it has been asked already; so too below.
        """
        run = self.read_run() if run is None else run
        done, wanted = run.get("epoch"), self.params.get("num_epochs")
        return run.get("status") == "completed" and isinstance(done, int) and isinstance(wanted, int) and done >= wanted

    def outlook(self, rerun: str = "none") -> Outlook:
        """Returns what a search does with the child.

        Args:
            rerun: Which children are not left as they are: those that `failed` are tried again; `stale` ones, which
                were stopped or killed, begin anew instead of going on; of `all` the results are given up.
        """
        run = self.read_run()
        state = run.get("status", "failed" if (self.dir / "run.json").exists() else "pending")
        if state != "completed" and is_locked(self.dir):
            return Outlook("wait", "running", "wait: running elsewhere")
        if state == "running":
            state = "stale"
        epoch = run.get("epoch", 0)
        if self.changes and self.look is not None:  # another search may have given the results up meanwhile
            self.changes = self.look(self)
        if state == "pending" or run.get("reason") == REMOVED:
            return Outlook("start", "pending", "run")
        if self.changes:
            return Outlook("start", state, f"begin anew: {self.changes}", anew=True)
        if rerun == "all":
            return Outlook("start", state, f"begin anew: was {state}", anew=True)
        if self.is_finished(run):
            wanted = self.params["num_epochs"]
            more = f", with {epoch} epochs; {wanted} are asked for" if epoch > wanted else ""
            return Outlook("skip", state, f"skip: completed{more}")
        if state == "pruned":
            return Outlook("skip", state, f"skip: pruned at epoch {epoch}")
        if state == "failed":
            reason = f"failed ({run.get('reason', UNREADABLE)})"
            if rerun == "failed":
                return Outlook("start", state, f"run again: {reason}", anew=not run)
            return Outlook("skip", state, f"skip: {reason}; --rerun failed")
        if rerun == "stale" and state != "completed":
            return Outlook("start", state, f"begin anew: was {state} at epoch {epoch + 1}", anew=True)
        return Outlook("start", state, f"resume at epoch {epoch + 1}")

    def score(self, metric: str, run: Mapping[str, Any] | None = None) -> float | None:
        """Returns a metric, such as `val.accuracy`, of the best weights; None where there is none."""
        run = self.read_run() if run is None else run
        value = (run.get("best") or {}).get(metric.removeprefix("val."))
        return value if isinstance(value, (int, float)) else None

    def result(self, metric: str, run: Mapping[str, Any] | None = None) -> str:
        """Returns a line about the best weights."""
        run = self.read_run() if run is None else run
        score, epoch = self.score(metric, run), (run.get("best") or {}).get("epoch", 0)
        shown = "unknown" if score is None else f"{score:.4f}"
        return f"{self.dir.name}: {metric.removeprefix('val.')} {shown} at epoch {epoch}"

    def last_line(self) -> str:
        """Returns the last line of console.log, fit for a terminal; that is the command if nothing was printed."""
        lines: list[str] = []
        with contextlib.suppress(OSError), (self.dir / "console.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return "".join(char if char.isprintable() else "?" for char in "".join(lines[-1:]).strip()[:200])


class Planner:
    """Makes the children of points, in memory; only reads.

    Args:
        parent: The directory with the reference and the space.
        search: What the search varies.
        reference: The parent's params, with the overrides that hold for every child.
        as_sections: Turns raw params of another shape into sections, in which two of them are compared.
        force: Accept directories that were made with other params; their results will be given up.
    """

    def __init__(
        self,
        parent: Path,
        search: Search,
        reference: Mapping[str, Any],
        as_sections: AsSections = dict,
        force: bool = False,
    ) -> None:
        self.parent, self.search, self.reference = parent, search, reference
        self.as_sections, self._force = as_sections, force

    @classmethod
    def read(
        cls,
        parent: Path,
        overrides: Sequence[str] = (),
        as_sections: AsSections = dict,
        force: bool = False,
        **given: Any,
    ) -> Planner:
        """Reads the params.json and the search.json of a parent.

        Args:
            parent: The directory.
            overrides: Texts `key=value`, for every child.
            as_sections: As above.
            force: As above.
            given: What replaces parts of search.json, as for `search_json.read_search`.

        Raises:
            RunError: One of the files or an override is wrong.
        """
        from sweep.search_json import read_search  # it brings pydantic

        reference, path = read_json(parent / "params.json"), parent / "search.json"
        search = read_search(path, copy.deepcopy(reference), **given)
        overridden = utils.apply_overrides(reference, overrides)
        varied = [*search.space, *(["seed"] if search.seeds else [])]
        twice = [
            key
            for key in overridden
            for other in varied
            if f"{other}.".startswith(f"{key}.") or key.startswith(f"{other}.")
        ]
        if twice:
            raise RunError(f"--overrides: {twice[0]} is what {path} varies; remove it from one of the two")
        return cls(parent, search, reference, as_sections, force)

    def children(self, points: Iterable[Point], first: int = 0) -> list[Child]:
        """Returns the children of points in their order, those of one point with its seeds side by side.

        Args:
            points: The points.
            first: The number of the first one.

        Raises:
            RunError: A directory holds other params, or two children would share one.
        """
        trials: dict[int, int] = {}
        seeded: list[Point] = []
        for number, point in enumerate(points, first):
            for seed in self.search.seeds or [None]:
                seeded.append(point if seed is None else {**point, "seed": seed})
                trials[id(seeded[-1])] = number
        children, problems = [], []
        for name, point in name_points(seeded, self.search.space).items():
            child = Child(self.parent / name, point, self._params(point), trials[id(point)])
            children.append(child)
            if (child.dir / "params.json").exists():
                child.changes, child.look = self._changes(child), self._changes
            if child.changes and not self._force:
                way = "remove that directory, undo the change, or give its results up by --force"
                problems.append(f"{child.dir / 'params.json'} is not what the search asks for ({child.changes}); {way}")
        if problems:
            raise RunError("\n".join(problems), "params")
        return children

    def _params(self, point: Point) -> dict[str, Any]:
        params = child_params(self.reference, point, self.search)
        if not self.search.common_random_numbers and "seed" not in point:
            params["seed"] = child_seed(self.search, self.reference, point)
        return params

    def _changes(self, child: Child) -> str:
        """Returns how an existing directory differs from what is asked for; adopts what is the same in other words."""
        present = read_json(child.dir / "params.json")
        child.is_written = present == child.params
        if not child.is_written:
            found = utils.differences(*(self._spelled_out(params) for params in (present, child.params)))
            if changes := "; ".join(f"{key}: {change}" for key, change in found.items() if not may_change(key)):
                return changes
            if not found:
                child.params, child.is_written = present, True
        run = child.read_run()
        return changed_sources(run, self.as_sections(child.params)) if run.get("epoch") else ""

    def _spelled_out(self, params: Mapping[str, Any]) -> dict[str, Any]:
        sections = self.as_sections(params)
        utils.spell_out_teachers(sections)
        return sections


def table(children: Sequence[Child], rerun: str = "none", force: bool = False) -> str:
    """Returns what a search would do, as a Markdown table and a line of counts."""
    outlooks = [
        Outlook("refuse", "changed", f"refuse: {child.changes}; --force")
        if child.changes and not force
        else child.outlook(rerun)
        for child in children
    ]
    keys = list(dict.fromkeys(key for child in children for key in child.point))
    rows = [
        [child.dir.name, *(_cell(child.point, key) for key in keys), outlook.text.replace("|", "\\|")]
        for child, outlook in zip(children, outlooks, strict=True)
    ]
    text = tabulate(rows, ["child", *keys, "what happens"], tablefmt="github", disable_numparse=True)
    return f"{text}\n\n{len(rows)} children: {count(outlooks)}"


def _cell(point: Point, key: str) -> str:
    return show(point[key]).replace("|", "\\|") if key in point else ""


def count(outlooks: Collection[Outlook]) -> str:
    """Returns a line of how many there are of which kind."""
    found = {
        "to run": [o for o in outlooks if o.action == "start"],
        "completed": [o for o in outlooks if o.action == "skip" and o.state == "completed"],
        "pruned": [o for o in outlooks if o.action == "skip" and o.state == "pruned"],
        "failed": [o for o in outlooks if o.action == "skip" and o.state == "failed"],
        "running elsewhere": [o for o in outlooks if o.action == "wait"],
        "refused": [o for o in outlooks if o.action == "refuse"],
    }
    always = ("to run", "completed")
    return ", ".join(f"{len(those)} {name}" for name, those in found.items() if those or name in always)


def check(children: Sequence[Child]) -> None:
    """Has train.py check children in temporary directories, before theirs are made; raises with all its lines.

    A child whose directory exists, with these params, was checked before that was made.
    """
    unchecked = [child for child in children if not child.is_written]
    lines = []
    with tempfile.TemporaryDirectory(prefix="kdlab-") as temporary:
        copies = [replace(child, dir=Path(temporary, child.dir.name)) for child in unchecked]
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
        as_sections: As for `Planner`.
    """
    sections = [as_sections(child.params) for child in children]
    for teacher in {json.dumps(section.get("teacher"), sort_keys=True) for section in sections}:
        for section in utils.teachers_of(json.loads(teacher)).values():
            find_teacher(Path(section["model_dir"]), section.get("restore_file", "best"))
    students = [section["student"] for section in sections if isinstance(section.get("student"), dict)]
    for path in {str(student["init_from"]) for student in students if student.get("init_from")}:
        if not (found := find_initial(Path(path))).exists():
            raise RunError(f"student.init_from: {found} does not exist; name a directory or a .pth.tar file", "params")


def write(children: Sequence[Child]) -> None:
    """Makes the directories that do not exist yet, and tells those that do what has changed, such as more epochs.

    Git ignores what is made, as it follows from the parent. The results of a child with other params must be gone: see
    `Experiment.clear`.
    """
    for child in children:
        path = child.dir / "params.json"
        if not path.exists() or read_json(path) != child.params:
            try:
                child.dir.mkdir(exist_ok=True)
                if not path.exists():
                    (child.dir / ".gitignore").write_text("*\n")
            except OSError as error:
                raise utils.storage_error(error, child.dir) from error
            utils.write_json(path, child.params)


def describe(status: int) -> str:
    """Returns how a process ended."""
    return f"killed by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"exit status {status}"

"""Experiment directories -> rows. What is wrong with one of them is told in its row and stops nothing."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment import read_status
from utils import RunError, apply_overrides, flatten, read_json, set_option, teachers_of

STATES = ("completed", "running", "pending", "interrupted", "stale", "pruned", "failed")
SOURCES = ("val_best", "val_last", "test_best", "test_last")  # of metrics_<source>_weights.json
NUMBERS = ("accuracy", "cross_entropy", "epoch")  # a metrics file may hold text too, but not under these names
# The ancestor's params.json is flat; here are the columns that its keys share with ours.
FLAT = {
    "model_version": "student.name",
    "dropout_rate": "student.dropout_rate",
    "num_channels": "student.num_channels",
    "alpha": "loss.alpha",
    "temperature": "loss.temperature",
    "learning_rate": "optimizer.learning_rate",
    "batch_size": "dataset.batch_size",
    "subset_percent": "dataset.subset_fraction",
    "augmentation": "dataset.augmentation",
    "num_workers": "dataset.num_workers",
}
JOINT = " + "  # between what several teachers have of an option
SEARCH_LOG = "search_hyperparameters.log"
MAX_FAULT = 200  # characters: a reason may quote what it found


@dataclass
class Row:
    """What one experiment directory says."""

    path: str
    state: str  # one of STATES, or unreadable
    status: str  # the state with its reason and the epoch that was reached
    options: dict[str, Any]  # dotted key -> value, every default included once it has run; a list is its JSON text
    written: list[str]  # the keys that a person or a search chose, in params.json or by an override
    metrics: dict[str, float]  # val_best.accuracy and the like
    faults: list[str]  # what could not be read


def collect(parent_dir: Path) -> tuple[list[Row], list[str]]:
    """Reads every experiment at or below a directory; links to directories and hidden ones are not entered.

    Returns:
        The rows, by path, and a line for each directory or file that could not be read.

    Raises:
        RunError: `parent_dir` itself cannot be read.
    """
    rows: list[Row] = []
    problems: list[str] = []

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == parent_dir:
            raise RunError(f"--parent_dir: {parent_dir}: {error.strerror}; name the folder that holds the experiments")
        problems.append(f"{error.filename}: {error.strerror}")

    for root, folders, files in os.walk(parent_dir, onerror=unreadable):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        # What a search takes its children from never runs; with the default grid it has no search.json.
        is_reference = {"search.json", SEARCH_LOG} & {*files} and "run.json" not in files
        if "params.json" in files and not is_reference:
            rows.append(read_row(Path(root), files))
    rows.sort(key=lambda row: row.path)
    problems += [f"{row.path}: {fault}" for row in rows for fault in row.faults]
    return rows, problems


def read_row(folder: Path, files: list[str]) -> Row:
    """Reads one experiment directory; `files` are the names in it. A missing file is no fault."""
    faults: list[str] = []

    def read(name: str) -> dict[str, Any]:
        try:
            return read_json(folder / name) if name in files else {}
        except RunError as error:
            faults.append(str(error).replace(f"{folder / name}", name, 1).partition(";")[0])
            return {}

    raw, run = read("params.json"), read("run.json")
    state, options, written, metrics = "pending", dict[str, Any](), list[str](), dict[str, float]()
    try:
        written, options = read_options(raw, run)
        state = str(run.get("status", "pending"))
        if state == "running":  # or stale, which the lock tells
            state = read_status(folder)
        if state not in STATES:
            faults.append(f"run.json: unknown status {state!r}")
    except (AttributeError, TypeError, RecursionError):
        faults.append("run.json: not of the shape that train.py writes")
    except (RunError, OSError) as error:  # an override that never fitted; or the file has gone since
        faults.append(f"run.json: {error}")
    status = describe(state, run)
    for source in SOURCES:
        name = f"metrics_{source}_weights.json"
        content = read(name)
        for key, value in content.items():
            if is_number(value):
                metrics[f"{source}.{key}"] = value
            elif key in NUMBERS and value is not None:
                faults.append(f"{name}: {key} is not a number")
        if source == "val_best" and content.get("selected_on") == "test":
            status += "; SELECTED ON THE TEST SPLIT"
    for which in ("best", "last"):
        tested, validated = metrics.get(f"test_{which}.epoch"), metrics.get(f"val_{which}.epoch")
        if tested is not None and tested != validated:  # trained on since: these are other weights' scores
            metrics = {key: value for key, value in metrics.items() if not key.startswith(f"test_{which}.")}
            status += f"; the {which} weights are not evaluated since epoch {tested:g}"
    faults = [fault[:MAX_FAULT] for fault in faults]
    if faults:
        return Row(str(folder), "unreadable", f"unreadable: {faults[0]}", options, written, metrics, faults)
    return Row(str(folder), state, status, options, written, metrics, [])


def read_options(raw: dict[str, Any], run: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Returns the keys that were chosen, and every option as it ran or, before a run, as params.json has it."""
    apply_overrides(raw, [text for attempt in run.get("attempts", []) for text in attempt.get("overrides", [])])
    chosen, ran = flatten(_sections(_from_flat(raw))), flatten(_sections(run.get("params", {})))
    known = {key.partition(".")[0] for key in ran}
    # A key that a run lacks in a section that it has was put into params.json later: it is not what ran.
    options = {key: value for key, value in chosen.items() if key.partition(".")[0] not in known}
    # As written where that is the same number: a row that ran says 4 like its pending neighbour, not 4.0.
    options |= {key: chosen[key] if key in chosen and chosen[key] == value else value for key, value in ran.items()}
    return list(chosen), {key: _plain(value) for key, value in options.items() if value is not None}


def _from_flat(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the ancestor's params with its options in our sections, as they stand there; ours unchanged."""
    if "model_version" not in raw:
        return raw
    params = {key: value for key, value in raw.items() if key not in (*FLAT, "save_summary_steps")}
    for key, place in FLAT.items():
        if key in raw:
            set_option(params, place, raw[key])
    return params


def _sections(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns params with teachers in their long spelling; several as one whose options are joined: `a + b`."""
    teachers = [*teachers_of(params.get("teacher")).values()]
    if not teachers or not all(isinstance(teacher, dict) for teacher in teachers):
        return {**params}
    options = {key: [teacher.get(key) for teacher in teachers] for key in dict.fromkeys(itertools.chain(*teachers))}
    joined = {
        key: values[0] if all(value == values[0] for value in values) else JOINT.join(str(_plain(v)) for v in values)
        for key, values in options.items()
    }
    return {**params, "teacher": joined}


def _plain(value: Any) -> str | int | float:
    return value if isinstance(value, str) or is_number(value) else json.dumps(value)


def is_number(value: Any) -> bool:
    """Tells whether a value of JSON is a number that can be computed with."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # JSON has integers that no float holds


def describe(state: str, run: Mapping[str, Any]) -> str:
    """Returns a state with its reason and how far the run came."""
    if state in ("completed", "pending"):
        return state
    reason = f" ({run['reason']})" if state == "failed" and run.get("reason") else ""
    where = f"epoch {run.get('epoch', '?')} of {run.get('num_epochs', '?')}"
    return f"running, {where}" if state == "running" else f"{state}{reason} at {where}"


def compare_temperatures(rows: Sequence[Row]) -> list[str]:
    """Returns a line for each teacher whose runs differ in T: the best T, and the one that calibrates the teacher."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        teacher, which = row.options.get("teacher.model_dir"), row.options.get("teacher.restore_file", "best")
        is_scored = is_number(row.options.get("loss.temperature")) and "val_best.accuracy" in row.metrics
        # Before a run, a flat params.json names a teacher's net, not its directory. A pruned run's score is early.
        is_one = isinstance(teacher, str) and JOINT not in teacher  # several have no calibrated T together
        if is_scored and is_one and row.state not in ("pending", "pruned"):
            groups.setdefault((str(teacher), which), []).append(row)
    lines = []
    for (teacher, which), group in groups.items():
        scores: dict[float, list[float]] = {}
        for row in group:
            scores.setdefault(row.options["loss.temperature"], []).append(row.metrics["val_best.accuracy"])
        if len(scores) > 1:
            means = {temperature: statistics.fmean(values) for temperature, values in sorted(scores.items())}
            best = max(means.values())
            names = " and ".join(f"{temperature:g}" for temperature, mean in means.items() if mean == best)
            mean = "mean " if len(group) > len(scores) else ""  # over alphas or seeds, say
            score = f"{names} ({mean}val accuracy {best:.4f})"
            lines.append(f"best T of these runs: {score}; {_calibration(teacher, which, Path(group[0].path))}")
    return lines


def _calibration(teacher: str, which: str, student_dir: Path) -> str:
    """Returns the calibrated T of a teacher, or the command that finds it."""
    try:
        found = read_json(Path(teacher, f"calibration_val_{which}.json"))
        taught = read_json(student_dir / "run.json").get("teacher")
    except RunError:
        found = {}
    if not is_number(found.get("temperature")):
        command = f"python evaluate.py --model_dir {shlex.quote(teacher)} --split val --calibrate"
        if which != "best":
            command += f" --restore_file {which}"
        return f"the teacher {teacher} is not calibrated: `{command}`"
    others = "" if found.get("checkpoint_sha256") == taught else ", with other weights than taught these runs"
    return f"calibrated T of the teacher {teacher}: {found['temperature']:.2f} (NLL on val{others})"

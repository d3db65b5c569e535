"""How long do status, resume and synthesis of a large search take?

    python benchmarks/sweep_scale.py

The children of a grid of 1,000 points are copies of a really trained student's directory, each with its own params,
scores and journal of ten epochs; those of a random and of a TPE search are such copies with points of optuna.journal.
All commands run once per round, in fresh processes with a warm file cache. A child is handed over when its console.log
says so; its training is benchmarks/no_op.py, which does nothing, the check before it train.py's own. The table goes to
benchmarks/results/sweep_scale.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, create_parser, search_command, spread, stamp, write_result
from start import train_pair
from tabulate import tabulate

from sweep.children import Child, Planner
from sweep.space import Point, grid
from sweep.trials import open_tuner
from utils import OK, read_json, write_json

TARGET = 2.0  # seconds
EPOCHS = 10
SCORES = ("val_best", "val_last", "test_best")
EMPTY = (".lock", "console.log", "train.log", "best.pth.tar", "last.pth.tar", "prev.pth.tar")
RANGES = {"loss.alpha": {"low": 0.05, "high": 0.99}, "loss.temperature": {"low": 1.5, "high": 20.0, "log": True}}


def parse_args() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument("--children", type=int, default=1_000, help="of each search, more than 10 (default 1,000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of few children, and no result is written")
    args = parser.parse_args()
    if args.quick:
        args.children, args.rounds = 40, 1
    return args


# --- the searches -----------------------------------------------------------------------------------------


def write_parent(parent: Path, template: Path, search: dict[str, Any], children: int) -> list[Child]:
    """Writes a search all of whose children are completed, and returns them."""
    parent.mkdir()
    write_json(parent / "params.json", {**read_json(template / "params.json"), "num_epochs": EPOCHS})
    write_json(parent / "search.json", search)
    planner = Planner.read(parent)
    points = grid(planner.search) if planner.search.strategy.name == "grid" else write_journal(planner)
    found = planner.children(points)
    assert len(found) == children
    write_children(found, template)
    return found


def write_journal(planner: Planner) -> list[Point]:
    """Has the points of a search chosen, with results as those of `write_children`; returns them."""
    draw, points = random.Random(0), []
    with contextlib.closing(open_tuner(planner)) as tuner:
        while asked := tuner.ask():
            tuner.tell(asked.number, "completed", score(draw))
            points.append(asked.point)
    return points


def score(draw: random.Random) -> float:
    return round(draw.uniform(0.5, 0.9), 4)


def write_children(children: Sequence[Child], template: Path) -> None:
    """Writes directories as completed runs leave them, with the scores of `write_journal`."""
    run, draw = read_json(template / "run.json"), random.Random(0)
    metrics = {name: read_json(template / f"metrics_{name}_weights.json") for name in SCORES}
    line = json.loads((template / "metrics.jsonl").read_text().splitlines()[-1])
    for child in children:
        child.dir.mkdir()
        best = {**run["best"], "accuracy": score(draw), "epoch": EPOCHS}
        params = {**run["params"], "num_epochs": EPOCHS, "loss": run["params"]["loss"] | child.params["loss"]}
        _write(child.dir / "params.json", child.params)
        _write(child.dir / "run.json", run | {"params": params, "best": best, "epoch": EPOCHS, "num_epochs": EPOCHS})
        for name, content in metrics.items():
            scores = {"accuracy": best["accuracy"], "epoch": EPOCHS}
            _write(child.dir / f"metrics_{name}_weights.json", content | scores)
        lines = [json.dumps({**line, "epoch": epoch}) for epoch in range(1, EPOCHS + 1)]
        (child.dir / "metrics.jsonl").write_text("".join(f"{text}\n" for text in lines))
        for name in EMPTY:
            (child.dir / name).touch()


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=4))  # write_json syncs each file with the disk, which takes minutes


# --- the times --------------------------------------------------------------------------------------------


def run(command: Sequence[object]) -> float:
    """Returns the seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - began


def hand_over(parent: Path, child: Path, known: bool) -> float:
    """Returns the seconds from the start of a search until the one child that is missing is handed over.

    Args:
        parent: Of the search.
        child: Which is taken away, and put back afterwards.
        known: Its directory is there, not begun: so its params are not checked again.
    """
    aside = parent.parent / "aside"
    child.rename(aside)
    if known:
        child.mkdir()
        shutil.copyfile(aside / "params.json", child / "params.json")
    began, console = time.time(), child / "console.log"
    run(search_command("--parent_dir", parent, "--device", "cpu"))
    assert read_json(child / "run.json")["status"] == "completed"
    seconds = console.stat().st_mtime - began  # the no-op prints nothing, so nothing follows the first line
    shutil.rmtree(child)
    aside.rename(child)
    return seconds


def commands(parent: Path, last: Path, is_grid: bool) -> dict[str, Callable[[], float]]:
    """Returns what is timed of a search, by name."""
    search, synthesize = ROOT / "search_hyperparams.py", ROOT / "synthesize_results.py"
    timed: dict[str, Callable[[], float]] = {
        "`--status`": lambda: run([sys.executable, search, "--parent_dir", parent, "--status"]),
        "`--dry_run`": lambda: run([sys.executable, search, "--parent_dir", parent, "--dry_run"]),
        "resume, all completed": lambda: run([sys.executable, search, "--parent_dir", parent, "--device", "cpu"]),
        "resume, one not begun, until it is handed over": lambda: hand_over(parent, last, known=True),
        "resume, one not there, until it is handed over": lambda: hand_over(parent, last, known=False),
    }
    if is_grid:
        timed["`synthesize_results.py`"] = lambda: run([sys.executable, synthesize, "--parent_dir", parent, "--quiet"])
    return timed


def main() -> int:
    args = parse_args()
    number = args.children
    sides = {"loss.alpha": [round(0.05 + 0.09 * step, 2) for step in range(10)]}
    sides["loss.temperature"] = [1.0 + step for step in range(number // 10)]
    searches = {
        "grid": sides,
        "random": {**RANGES, "strategy": "random", "max_trials": number},
        "tpe": {**RANGES, "strategy": "tpe", "max_trials": number},
    }
    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    rows = []
    try:
        template = train_pair(folder)
        for name, search in searches.items():
            children = write_parent(folder / name, template, search, number)
            timed = commands(folder / name, children[-1].dir, name == "grid")
            times: dict[str, list[float]] = {what: [] for what in timed}
            for turn in range(args.rounds + 1):  # the first one only warms the file cache
                for what, measure in timed.items():
                    seconds = measure()
                    times[what] += [seconds] if turn else []
            for what, taken in times.items():
                held = "yes" if statistics.median(taken) < TARGET else "NO"
                rows.append([name, what, spread(taken), held])
                print(*rows[-1], sep=": ", flush=True)
            files = sum(1 for _ in children[0].dir.iterdir())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    headers = ["search", "command", "seconds", f"below {TARGET:g} s"]
    text = f"""# Searches of {number:,} children

From start to end of a process: median (smallest to largest) of n = {args.rounds} rounds.
Each child has {files} files, as training and evaluation leave them, the checkpoints empty.

{tabulate(rows, headers, tablefmt="pipe", colalign=["left", "left", "right", "right"], disable_numparse=True)}

A child whose directory is not there is checked by train.py first, which loads torch.

Command: `python benchmarks/sweep_scale.py`.
{stamp(f"load {load:.1f} before the first round")}.
"""
    if args.quick:
        print(text)
    else:
        write_result("sweep_scale", text)
    return OK


if __name__ == "__main__":
    sys.exit(main())

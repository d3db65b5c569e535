"""How long do the four scripts take to start, and synthesize_results.py to read thousands of experiments?

    python benchmarks/start.py

Each number is of fresh processes with a warm file cache, in seconds on the clock and in seconds of processor time,
which other work on the machine hardly changes. All commands run once per round, so that each is compared with the
imports of torch and torchvision in its own round. The directories to synthesise are copies of a really trained
student's with the params and scores of a search over alpha, temperature, learning rate and seed. The tables go to
benchmarks/results/start.md; `--quick` only prints small ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, create_parser, spread, stamp, write_result
from tabulate import tabulate

from utils import read_json, set_option, write_json

Commands = Mapping[str, Sequence[object]]  # name -> what follows the interpreter

TORCH, BOTH = "`import torch`", "`import torch, torchvision`"
RUN = {
    "seed": 1,
    "num_epochs": 1,
    "dataset": {"name": "synthetic", "batch_size": 32, "train_size": 160},
    "student": {"name": "tiny", "width": 4},
    "optimizer": {"name": "adam", "learning_rate": 0.01},
}
SPACE: dict[str, list[float]] = {
    "loss.alpha": [round(0.05 * step, 2) for step in range(1, 21)],
    "loss.temperature": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0],
    "optimizer.learning_rate": [0.0001, 0.0003, 0.001, 0.003, 0.01],
    "seed": list(range(10)),
}
SCORES = ("val_best", "val_last", "test_best")
TRAINED = (".lock", "console.log", "train.log", "metrics.jsonl", "best.pth.tar", "last.pth.tar", "prev.pth.tar")


def parse_args() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="fresh processes per command (default 15)")
    parser.add_argument("--quick", action="store_true", help="one round, few directories, and no result file")
    return parser.parse_args()


def train_pair(folder: Path) -> Path:
    """Trains and scores a tiny teacher and its student; returns the student's directory."""
    teacher, student = folder / "teacher", folder / "student"
    taught = {"teacher": {"model_dir": str(teacher)}, "loss": {"name": "kd", "alpha": 0.9, "temperature": 4.0}}
    for model_dir, params in ((teacher, RUN), (student, RUN | taught)):
        model_dir.mkdir()
        write_json(model_dir / "params.json", params)
        _python(ROOT / "train.py", "--model_dir", model_dir, "--quiet")
    _python(ROOT / "evaluate.py", "--model_dir", student)
    return student


def write_parent(folder: Path) -> Path:
    """Writes the parent of a search over the ancestor's grid of 40 points, which is what no search.json means."""
    folder.mkdir()
    write_json(folder / "params.json", read_json(ROOT / "experiments" / "cnn_distill_alpha_temp" / "params.json"))
    return folder


def write_experiments(folder: Path, template: Path, number: int) -> Path:
    """Writes as many finished experiment directories, which differ from `template` in params and scores."""
    params, run = read_json(template / "params.json"), read_json(template / "run.json")
    scores = {name: read_json(template / f"metrics_{name}_weights.json") for name in SCORES}
    draw = random.Random(0)
    for values in itertools.islice(itertools.product(*SPACE.values()), number):
        child = folder / "_".join(f"{key}_{value}" for key, value in zip(SPACE, values, strict=True))
        child.mkdir(parents=True)
        for key, value in zip(SPACE, values, strict=True):
            set_option(params, key, value)
            set_option(run["params"], key, value)
        for name, metrics in scores.items():
            metrics |= {"accuracy": round(draw.uniform(0.5, 0.9), 4), "cross_entropy": draw.uniform(0.5, 2)}
            _write(child / f"metrics_{name}_weights.json", metrics)
        _write(child / "params.json", params)
        _write(child / "run.json", run)
        for name in TRAINED:
            (child / name).touch()
    return folder


def _write(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=4))  # write_json syncs each file with the disk, which takes minutes


@dataclass
class Times:
    """What a command takes, round by round."""

    clock: list[float] = field(default_factory=list)  # seconds
    processor: list[float] = field(default_factory=list)  # seconds of user and system time

    def over(self, base: Times) -> str:
        """Returns how much more processor time it takes than another command: the median over the rounds."""
        return f"{statistics.median(a - b for a, b in zip(self.processor, base.processor, strict=True)):+.2f}"


def measure(commands: Commands, rounds: int) -> dict[str, Times]:
    """Runs commands in turn, round by round, after a round that only warms the file cache."""
    times = {name: Times() for name in commands}
    for turn in range(rounds + 1):
        for name, arguments in commands.items():
            start, before = time.perf_counter(), os.times()
            _python(*arguments)
            after = os.times()
            if turn:
                times[name].clock.append(time.perf_counter() - start)
                children = after.children_user + after.children_system
                times[name].processor.append(children - before.children_user - before.children_system)
    return times


def imports_torch(arguments: Sequence[object]) -> bool:
    """Tells whether a command imports torch in its own process."""
    lines = _python("-X", "importtime", *arguments).stderr.splitlines()
    return any(line.rpartition("|")[2].strip() == "torch" for line in lines)


def _python(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


def start_table(commands: Commands, rounds: int) -> str:
    """Returns the times of commands, among which are the imports that they are compared with."""
    times = measure(commands, rounds)
    rows = []
    for name, arguments in commands.items():
        is_script, own = arguments[0] != "-c", imports_torch(arguments)
        over = [times[name].over(times[base]) if is_script and own else "" for base in (TORCH, BOTH)]
        rows.append([name, spread(times[name].clock), spread(times[name].processor), "yes" if own else "no", *over])
    headers = ["command", "seconds", "processor seconds", "imports torch", f"over {TORCH}", f"over {BOTH}"]
    return tabulate(rows, headers, tablefmt="pipe", colalign=["left", *["right"] * 5], disable_numparse=True)


def synthesis_table(folders: Mapping[int, Path], rounds: int) -> str:
    """Returns the times of synthesis, and what a directory takes."""
    script = ROOT / "synthesize_results.py"
    times = measure({str(n): [script, "--parent_dir", path, "--quiet"] for n, path in folders.items()}, rounds)
    rows = []
    for n, taken in times.items():
        each = f"{1000 * statistics.median(taken.processor) / int(n):.2f}"
        rows.append([f"{int(n):,}", spread(taken.clock), spread(taken.processor), each])
    headers = ["directories", "seconds", "processor seconds", "milliseconds each"]
    return tabulate(rows, headers, tablefmt="pipe", colalign=["right"] * 4, disable_numparse=True)


def main() -> None:
    args = parse_args()
    load = os.getloadavg()[0]
    rounds, sizes = (1, (20, 200)) if args.quick else (args.rounds, (1_000, 10_000))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        student, parent = train_pair(folder), write_parent(folder / "search")
        (folder / "empty").mkdir()
        train, evaluate = ROOT / "train.py", ROOT / "evaluate.py"
        search, synthesize = ROOT / "search_hyperparams.py", ROOT / "synthesize_results.py"
        commands: Commands = {
            "`pass`": ["-c", "pass"],
            TORCH: ["-c", "import torch"],
            BOTH: ["-c", "import torch, torchvision"],
            "`search_hyperparams.py --help`": [search, "--help"],
            "`search_hyperparams.py --dry_run`, 40 children": [search, "--dry_run", "--parent_dir", parent],
            "`synthesize_results.py --help`": [synthesize, "--help"],
            "`synthesize_results.py`, no experiments": [synthesize, "--parent_dir", folder / "empty"],
            "`train.py --help`": [train, "--help"],
            "`train.py --check`": [train, "--check", "--model_dir", student],
            "`train.py`, nothing left to do": [train, "--model_dir", student],
            "`evaluate.py --help`": [evaluate, "--help"],
            "`evaluate.py`, 100 images of 16 px": [evaluate, "--model_dir", student],
        }
        starts = start_table(commands, rounds)
        folders = {size: write_experiments(folder / f"of_{size}", student, size) for size in sizes}
        synthesis = synthesis_table(folders, rounds)
    text = f"""# Start-up and synthesis

From start to end of a process, on the clock and of processor time: median (smallest to largest) of n = {rounds} rounds.
What a script takes over the imports is the median of the differences in processor time, round by round.

{starts}

`synthesize_results.py --quiet` on directories of finished runs, each with five JSON files to read:

{synthesis}

Command: `python benchmarks/start.py`.
{stamp(f"load {load:.1f} before the first round")}.
"""
    if args.quick:
        print(text)
    else:
        write_result("start", text)


if __name__ == "__main__":
    main()

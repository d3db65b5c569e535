"""Does a search that is killed end with the same table? The ancestor's grid of 40 points, undisturbed and killed.

    python benchmarks/sweep_kill.py --data_dir /path/to/cifar10-images --teacher_dir /path/to/resnet20

Runs search_hyperparams.py twice on experiments/cnn_distill_alpha_temp with its default grid: once undisturbed; once so
that, after a third of the children, SIGKILL ends the search and one of the children that run, and the same command is
given again at once, while others may still run without a search. What both have made is compared byte for byte. Table
and heat map go to benchmarks/results/sweep_kill.md and .png.

A run with the same seed goes before both, so that all children find the same stored answers of the teacher: what two
jobs add to a store at the same time is of another batch, and so of slightly other bits, from search to search.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import (
    ROOT,
    add_data_options,
    add_search_options,
    children_of,
    create_parser,
    dataset_options,
    journal_of,
    run_script,
    stamp,
    taught,
    write_result,
)
from tabulate import tabulate

from experiment import is_locked, read_status
from utils import FAILED, OK, RunError, read_json, write_json

QUICK = {"loss.alpha": [0.5, 0.9], "loss.temperature": [2.0, 4.0, 20.0]}
MAX_IMAGE = 200_000  # bytes that are committed


@dataclass(frozen=True)
class Killed:
    """What was there when a search was killed."""

    seconds: float  # since it began
    completed: int  # children
    child: str  # which was killed with it
    epoch: int  # that this child had finished
    orphans: Sequence[str]  # children that went on


def parse_args() -> argparse.Namespace:
    parser = create_parser(__doc__)
    add_data_options(parser, "sweep_kill")
    add_search_options(parser, epochs=2, subset=1.0)
    parser.add_argument("--seed", type=int, default=0, help="decides when the search is killed, and which child")
    parser.add_argument("--quick", action="store_true", help="only see that all of it runs; no result is written")
    args = parser.parse_args()
    if args.quick:
        args.subset = 0.02
    args.work_dir = args.work_dir.absolute()
    return args


def write_parent(folder: Path, args: argparse.Namespace) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "params.json", taught(args))
    if args.quick:
        write_json(folder / "search.json", QUICK)
    return folder


def begin(parent: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    script = ROOT / "search_hyperparams.py"
    return subprocess.Popen([sys.executable, str(script), "--parent_dir", str(parent), "--jobs", str(args.jobs)])


def finish(search: subprocess.Popen[bytes]) -> float:
    """Returns the seconds until a search that has just begun ends."""
    began = time.monotonic()
    if search.wait():
        raise SystemExit(f"failed: {search.args!r}")
    return time.monotonic() - began


def kill(search: subprocess.Popen[bytes], parent: Path, total: int, mean_seconds: float, seed: int) -> Killed:
    """Kills a search that has just begun, and one of its children, in mid-training.

    Args:
        search: Its process.
        parent: Its directory.
        total: The number of its children.
        mean_seconds: About what a child takes, so that any moment of one may be met.
        seed: Decides how long after a third of the children, and which child.
    """
    began, draw = time.monotonic(), random.Random(seed)
    while len(in_state(parent, "completed")) < math.ceil(total / 3):
        if search.poll() is not None:
            raise SystemExit(f"ended before it could be killed: {search.args!r}")
        time.sleep(0.05)
    time.sleep(draw.uniform(0, mean_seconds))
    while not (running := in_state(parent, "running")):
        time.sleep(0.01)
    child = draw.choice(running)
    search.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(read_json(child / "run.json")["attempts"][-1]["pid"], signal.SIGKILL)
    seconds = time.monotonic() - began
    search.wait()
    while is_locked(child):
        time.sleep(0.01)
    if read_status(child) != "stale":
        raise SystemExit(f"{child.name} ended in the moment when it was killed; take another --seed")
    epoch = read_json(child / "run.json")["epoch"]
    completed = in_state(parent, "completed")
    begun = {path.parent for path in parent.glob("*/console.log")}  # perhaps just now: then no run.json says so yet
    orphans = sorted(path.name for path in begun - {child, *completed})
    return Killed(seconds, len(completed), child.name, epoch, orphans)


def in_state(parent: Path, state: str) -> list[Path]:
    """Returns the children in a state; one that is just being made is in none."""
    found = []
    for child in children_of(parent):
        with contextlib.suppress(RunError):
            found += [child] if read_status(child) == state else []
    return found


def synthesize(parent: Path) -> bytes:
    """Writes a parent's tables and images; returns results.csv without the folder that the parent is in."""
    shown = os.path.relpath(parent)  # the heat map names it, and is to be shown to others
    run_script("synthesize_results.py", "--parent_dir", shown, "--plots", "--quiet")
    return (parent / "results.csv").read_bytes().replace(f"{shown}/".encode(), b"")


def attempts(parent: Path) -> str:
    """Returns how often children were begun."""
    numbers = Counter(len(read_json(child / "run.json")["attempts"]) for child in children_of(parent))
    return ", ".join(f"{count} x {number}" for number, count in sorted(numbers.items()))


def compare(calm: Path, killed: Path, epochs: int) -> dict[str, bool]:
    """Returns what is to hold of two searches, and whether it does."""
    one, other = children_of(calm), children_of(killed)
    journals = [(path / "metrics.jsonl").read_bytes() for path in one]
    once = list(range(1, epochs + 1))
    return {
        "the same children": [path.name for path in one] == [path.name for path in other],
        "`results.csv` equal, byte for byte but for the paths": synthesize(calm) == synthesize(killed),
        "each child's `metrics.jsonl` equal, byte for byte": journals
        == [(path / "metrics.jsonl").read_bytes() for path in other],
        f"each epoch from 1 to {epochs} once in each journal of both": all(
            journal_of(path) == once for path in [*one, *other]
        ),
    }


def table(parent: Path) -> str:
    """Returns the table of results.md, without the parent in front of its children."""
    lines = (parent / "results.md").read_text().replace(f"{os.path.relpath(parent)}/", "").splitlines()
    rows = [re.sub(r" {2,}", " ", line) for line in lines if line.startswith("|")]  # no alignment is left
    return "\n".join(re.sub(r"-{3,}", "---", row) for row in rows)


def main() -> int:
    args = parse_args()
    first, calm, killed = (write_parent(args.work_dir / name, args) for name in ("first", "calm", "killed"))
    run_script("train.py", "--model_dir", first, "--quiet")

    calm_seconds = finish(begin(calm, args))
    total = len(children_of(calm))
    search = begin(killed, args)
    found = kill(search, killed, total, args.jobs * calm_seconds / total, args.seed)
    print(found, flush=True)
    again_seconds = finish(begin(killed, args))

    held = compare(calm, killed, args.epochs)
    rows: list[list[object]] = [
        ["seconds", f"{calm_seconds:.0f}", f"{found.seconds:.0f} + {again_seconds:.0f}"],
        ["children x attempts", attempts(calm), attempts(killed)],
        ["epochs in all journals", *(sum(len(journal_of(path)) for path in children_of(p)) for p in (calm, killed))],
    ]
    run = read_json(children_of(calm)[0] / "run.json")["attempts"][-1]
    images = f"{100 * args.subset:g} % of the training images of CIFAR-10"
    images += " as JPEG" if dataset_options(args).get("name") == "image_folder" else ""
    teacher = read_json(args.teacher_dir / "params.json")["student"]["name"]
    command = "python benchmarks/sweep_kill.py --data_dir <data_dir> --teacher_dir <teacher_dir>"
    machine = run["device"], f"precision {run['precision']}", f"{run['threads']} thread(s) per run"
    text = f"""# A search that was killed

`experiments/cnn_distill_alpha_temp` without a search.json, so with the ancestor's grid of {total} points: 5-layer CNN,
{args.epochs} epochs of {images}, teacher {teacher}, {args.jobs} at a time.
A tenth of the images is kept for validation. A run with the same seed had filled the store of the teacher's answers.

With {found.completed} of {total} children completed SIGKILL ended the search and {found.child},
which had finished {found.epoch} of {args.epochs} epochs; {", ".join(found.orphans) or "no other child"}
went on without a search. The same command was given again at once.

{tabulate(rows, ["", "undisturbed", "killed and run again"], tablefmt="github")}

{tabulate([[what, "yes" if holds else "NO"] for what, holds in held.items()], ["compared", "holds"], tablefmt="github")}

![validation accuracy over alpha and temperature](sweep_kill.png)

{table(calm)}

Command: `{command} --epochs {args.epochs} --subset {args.subset:g}`.
Each search ran once (n = 1). {stamp(*machine)}.
"""
    image = calm / "heatmap.png"
    if image.stat().st_size > MAX_IMAGE:
        raise SystemExit(f"{image} is larger than {MAX_IMAGE} bytes")
    if args.quick:
        print(text)
    else:
        shutil.copyfile(image, ROOT / "benchmarks" / "results" / "sweep_kill.png")
        write_result("sweep_kill", text)
    return OK if all(held.values()) else FAILED


if __name__ == "__main__":
    sys.exit(main())

"""What does a search add to each trial, on this machine, with Ray and with Slurm? With trainings that do nothing.

    python benchmarks/sweep_engines.py

Each search is a process of its own with 20 trials, two at a time; the ways take turns. A trial is benchmarks/no_op.py,
which is done at once, or train.py with no epochs, which loads torch, data and net and saves. When a trial has ended its
run.json says. Ray is started by the search, as on a laptop; Slurm is a real one on this machine, running before. Both
come from the environments of the slow tests, which are made if they are missing: `.venv-ray`, `.venv-slurm` (pip,
apt-get). Where that is impossible the table says why. It goes to benchmarks/results/sweep_engines.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import NO_OP, ROOT, children_of, create_parser, search_command, spread, stamp, write_result
from tabulate import tabulate

from utils import OK, read_json, write_json

JOBS = 2
TRAIN = ROOT / "train.py"
PARAMS = {
    "num_epochs": 0,
    "dataset": {"name": "synthetic", "batch_size": 32, "train_size": 160},
    "student": {"name": "tiny", "width": 4},
    "optimizer": {"name": "adam", "learning_rate": 0.01},
}
# Each run loads all it needs by itself.
PLAIN = "from sweep.launchers.local import Local; setattr(Local, Local.preload.__name__, lambda self: None)"


@dataclass
class Way:
    """How the trials of a search are run, and what that has taken, round by round."""

    name: str
    train: Path
    launcher: str = "local"
    python: Path = Path(sys.executable)
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    before: str = ""
    first: list[float] = field(default_factory=list)  # seconds from the start of the process to the first result
    each: list[float] = field(default_factory=list)  # of a slot per trial, all slots being busy
    closing: list[float] = field(default_factory=list)  # from the last result to the end of the process
    whole: list[float] = field(default_factory=list)

    def measure(self, parent: Path, trials: int) -> None:
        """Runs a search once."""
        parent.mkdir()
        write_json(parent / "params.json", PARAMS)
        write_json(parent / "search.json", {"seeds": list(range(trials))})
        options = ["--parent_dir", parent, "--jobs", JOBS, "--device", "cpu", "--launcher", self.launcher]
        if self.launcher == "ray":
            options += ["--launcher_options", "address=local"]
        command = search_command(*options, train=self.train, python=self.python, before=self.before)
        began = time.time()
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True)
        ended = time.time()
        if done.returncode:
            raise SystemExit(f"{self.name} failed: {done.stdout}{done.stderr}")
        files = [child / "run.json" for child in children_of(parent)]
        assert [read_json(file)["status"] for file in files] == ["completed"] * trials
        results = sorted(file.stat().st_mtime for file in files)
        self.first.append(results[0] - began)
        self.each.append(JOBS * (results[-1] - results[JOBS - 1]) / (trials - JOBS))
        self.closing.append(ended - results[-1])
        self.whole.append(ended - began)


def parse_args() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument("--trials", type=int, default=20, help=f"of a search, more than {JOBS} (default 20)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of few trials, and no result is written")
    args = parser.parse_args()
    if args.quick:
        args.trials, args.rounds = 6, 1
    if args.trials <= JOBS:
        parser.error(f"--trials {args.trials}: must be above {JOBS}")
    return args


def find_ways(folder: Path, stack: contextlib.ExitStack) -> tuple[list[Way], dict[str, str]]:
    """Returns the ways that there are here, and why others are not; what they need runs until the stack is closed."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "sweep" / "launchers")]
    import ray_cluster
    import slurm_cluster

    kinds = {"no-op": NO_OP, "train.py, no epochs": TRAIN}
    ways = [Way(f"local, {kind}", train, before=PLAIN) for kind, train in kinds.items()]
    ways += [Way(f"local, torch loaded once, {kind}", train) for kind, train in kinds.items()]
    missing = {}
    try:
        ray_cluster.prepare()
        ways += [Way(f"ray, {kind}", train, "ray", ray_cluster.PYTHON) for kind, train in kinds.items()]
    except (ray_cluster.Impossible, OSError, subprocess.CalledProcessError) as error:
        missing["ray"] = str(error)
    try:
        slurm = stack.enter_context(slurm_cluster.cluster(folder / "slurm", JOBS))
        ways += [
            Way(f"slurm, {kind}", train, "slurm", slurm_cluster.PYTHON, slurm.environment)
            for kind, train in kinds.items()
        ]
    except (slurm_cluster.Impossible, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        missing["slurm"] = str(error)
    return ways, missing


def alone(script: Path, folder: Path, rounds: int) -> list[float]:
    """Returns the seconds that a training takes without a search."""
    seconds = []
    for number in range(rounds):
        model_dir = folder / f"{script.stem}_{number}"
        model_dir.mkdir()
        write_json(model_dir / "params.json", PARAMS)
        began = time.monotonic()
        command = [sys.executable, str(script), "--model_dir", str(model_dir), "--quiet", "--device", "cpu"]
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.monotonic() - began)
    return seconds


def table(ways: Sequence[Way], missing: Mapping[str, str]) -> str:
    baseline = statistics.median(ways[0].first)
    rows = [
        [
            way.name,
            spread(way.first),
            f"{statistics.median(way.first) - baseline:+.2f}",
            spread(way.each),
            spread(way.closing),
            spread(way.whole),
        ]
        for way in ways
    ]
    rows += [[f"{name}: not measured, {reason}"] + [""] * 5 for name, reason in missing.items()]
    headers = [
        *("way", "until the first result", "over the first line", "per trial and slot"),
        *("from the last result to the end", "whole search"),
    ]
    return tabulate(rows, headers, tablefmt="pipe", colalign=["left", *["right"] * 5], disable_numparse=True)


def main() -> int:
    args = parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="engines-"))
    try:
        with contextlib.ExitStack() as stack:
            ways, missing = find_ways(folder, stack)
            alones = {script: alone(script, folder, args.rounds) for script in (NO_OP, TRAIN)}
            for number in range(args.rounds):
                for place, way in enumerate(ways):
                    way.measure(folder / f"{place}_{number}", args.trials)
                    print(f"round {number}, {way.name}: {way.whole[-1]:.1f} s", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = f"""# What an engine adds to a trial

Searches of {args.trials} trials, {JOBS} at a time. Seconds, median (smallest to largest) of n = {args.rounds} rounds,
in which the ways take turns. Without a search the no-op takes {spread(alones[NO_OP])},
train.py with no epochs {spread(alones[TRAIN])}.

{table(ways, missing)}

Until the first result: the interpreter, the check of all children by train.py, the engine's own start (Ray's cluster of
one node; Slurm was running), and one trial. Per trial and slot: from one result to the next of the same slot, all being
busy, so the trial itself, and that its end is noticed and the next one begun.
A search on this machine loads torch once, in the background, if it has more trials than slots; in the first two lines
it is kept from that.

Command: `python benchmarks/sweep_engines.py`.
{stamp(f"load {os.getloadavg()[0]:.1f} at the end", "one thread per trial")}.
"""
    if args.quick:
        print(text)
    else:
        write_result("sweep_engines", text)
    return OK


if __name__ == "__main__":
    sys.exit(main())

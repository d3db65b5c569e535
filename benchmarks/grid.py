"""How long does a grid search take? The ancestor's 40 points of alpha and temperature, one short epoch each.

    python benchmarks/grid.py --data_dir /path/to/cifar10-images --teacher_dir /path/to/resnet18

Runs `search_hyperparams.py --jobs 2` on experiments/cnn_distill with its default grid, first with an empty store of
teacher outputs, then a second grid with the store that the first has filled. The plain way (benchmarks/plain.py) runs
two of the points side by side, as two jobs would, from the start of the processes to their end; 20 such pairs are the
grid. Wall times go to benchmarks/results/grid.md. Options are those of kd_step.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import run_script
from kd_step import (
    create_options,
    distillation,
    parse,
    plain_command,
    report,
    run_plain,
    subject,
    table_of,
    teacher_of,
    write_run,
)
from tabulate import tabulate

from process import available_cores
from sweep.search_json import DEFAULT
from sweep.space import Search, Values, grid, name_point
from utils import OK, read_json, write_json

JOBS = 2
TARGET = 15
QUICK = {"alpha": [0.99, 0.5], "temperature": [20.0, 2.0]}


def search(parent: Path, args: argparse.Namespace) -> float:
    """Returns the seconds that a search takes, from the start of its process to the end."""
    started = time.monotonic()
    run_script("search_hyperparams.py", "--parent_dir", parent, "--jobs", JOBS, "--device", args.device)
    return time.monotonic() - started


def side_by_side(folders: list[Path], args: argparse.Namespace) -> float:
    """Returns the seconds that the plain way takes for some experiments at once, the cores divided among them."""
    threads = str(max(1, available_cores() // len(folders)))
    environment: Mapping[str, str] = {"OMP_NUM_THREADS": threads, **os.environ}  # as search_hyperparams.py does it
    started = time.monotonic()
    processes = [subprocess.Popen(plain_command(folder, args), env=environment) for folder in folders]
    failed = [process.args for process in processes if process.wait()]
    if failed:
        raise SystemExit(f"failed: {failed}")
    return time.monotonic() - started


def main() -> int:
    args = parse(create_options(__doc__, "grid"))
    space: dict[str, Any] = QUICK if args.quick else DEFAULT
    points = grid(Search({key: Values(tuple(values)) for key, values in space.items()}))
    teacher_dir = teacher_of(args)
    params = distillation(1, 230, teacher_dir, "lazy", args.work_dir / "store")
    seconds: dict[str, float] = {}
    shutil.rmtree(args.work_dir / "store", ignore_errors=True)
    for name in ("cold", "warm"):
        parent = args.work_dir / name
        shutil.rmtree(parent, ignore_errors=True)
        write_run(parent, params, args)
        if args.quick:
            write_json(parent / "search.json", space)
        seconds[name] = search(parent, args)
        print(f"{name} store: {len(points)} runs in {seconds[name]:.0f} s", flush=True)

    chosen = {name_point(point): point for point in (points[0], points[-1])}
    folders = [
        write_run(args.work_dir / "plain" / name, {**params, "loss": params["loss"] | point}, args)
        for name, point in chosen.items()
    ]
    pair = side_by_side(folders, args)
    print(f"the plain way: {len(folders)} runs in {pair:.0f} s", flush=True)
    scores = [
        [
            name,
            read_json(args.work_dir / "plain" / name / "plain.json")["val_accuracy"],
            read_json(args.work_dir / "cold" / name / "metrics_val_last_weights.json")["accuracy"],
        ]
        for name in chosen
    ]
    rate = run_plain(folders[0], args, "--steps", args.plain_steps)["images_per_second"]
    plain = pair * len(points) / len(folders)
    rows = [
        [way, f"{value:,.0f}", f"{plain / value:.1f}", target]
        for way, value, target in (
            (f"the plain way, two runs at a time: {pair:.0f} s x {len(points) // 2}", plain, ""),
            (f"the plain way by its {rate:.0f} images/s", len(points) * args.train_images / rate, ""),
            ("search_hyperparams.py, cold store", seconds["cold"], f"at least {TARGET}"),
            ("search_hyperparams.py, warm store", seconds["warm"], ""),
        )
    ]
    text = f"""# A grid of {len(points)} points

{subject(args, teacher_dir)}.
{len(points)} points of alpha and temperature, {JOBS} at a time; each one epoch of {args.train_images:,} images, with
{args.val_images:,} others for validation.

{table_of(["way", "seconds", "times as fast as the first line", "target"], rows)}

The first line is measured on two of the points, from the start of the processes to their end, validation included, and
multiplied; the second counts training steps only, of one process that has the machine to itself. Each ran once (n = 1).

Validation accuracy of the two points, plain and from the store:

{tabulate(scores, ["point", "plain", "cold store"], tablefmt="github", floatfmt=".3f")}
"""
    report("grid", text, args, read_json(args.work_dir / "cold" / name_point(points[0]) / "run.json"))
    return OK


if __name__ == "__main__":
    sys.exit(main())

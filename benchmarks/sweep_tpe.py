"""Does TPE with pruning find more than random search at equal cost? On the ancestor's alpha and temperature.

    python benchmarks/sweep_tpe.py --data_dir /path/to/cifar10-images --teacher_dir /path/to/resnet20

Both search the same space, several times with other seeds of the search and of the training, the same for both ways in
each repeat. What is spent is counted in epochs in the journals: random search trains budget / epochs points to their
end, TPE with the median pruner goes on to new points until as many epochs are used up, the last one to its end. The
best point of each is then trained again with fresh seeds and scored on the test split, as the best of many scores is
an optimistic one. The tables go to benchmarks/results/sweep_tpe.md. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    add_data_options,
    add_search_options,
    children_of,
    create_parser,
    journal_of,
    run_script,
    stamp,
    taught,
    write_result,
)
from kd_cifar10 import percent
from tabulate import tabulate

from utils import OK, flatten, read_json, write_json

SPACE: dict[str, Any] = {
    "loss.alpha": {"low": 0.05, "high": 0.99},
    "loss.temperature": {"low": 1.5, "high": 20.0, "log": True},
}
LEARNING_RATE = {"optimizer.learning_rate": {"low": 0.0001, "high": 0.01, "log": True}}
WAYS = {"random": "random search, no pruning", "tpe": "TPE, median pruner"}
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # n -> 97.5 %


@dataclass(frozen=True)
class Found:
    """What a search has come to, and what that has cost."""

    point: dict[str, Any]
    best: float  # validation accuracy
    again_val: list[float]  # of the same point with fresh seeds
    again_test: list[float]
    trials: int
    pruned: int
    epochs: int
    seconds: float  # of training, summed over runs; epochs that pruning has cut off in the middle are in it


def parse_args() -> argparse.Namespace:
    parser = create_parser(__doc__)
    add_data_options(parser, "sweep_tpe")
    add_search_options(parser, epochs=5, subset=0.1)
    parser.add_argument("--repeats", type=int, default=5, choices=STUDENT_T, metavar="N", help="2 to 10 (default 5)")
    parser.add_argument("--budget", type=int, default=100, help="epochs of each search (default 100)")
    parser.add_argument("--learning_rate", action="store_true", help="vary optimizer.learning_rate, too")
    parser.add_argument("--fresh_seeds", type=int, default=2, help="to train each best point again with (default 2)")
    parser.add_argument("--quick", action="store_true", help="only see that all of it runs; no result is written")
    args = parser.parse_args()
    if args.quick:
        args.subset, args.epochs, args.budget, args.repeats, args.fresh_seeds = 0.01, 3, 30, 2, 1
    if args.budget < args.epochs:
        parser.error(f"--budget {args.budget} is not enough for one trial of {args.epochs} epochs")
    args.work_dir = args.work_dir.absolute()
    return args


def write_parent(folder: Path, seed: int, search: dict[str, Any], args: argparse.Namespace) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "params.json", {**taught(args), "seed": seed})
    write_json(folder / "search.json", search)
    return folder


def search(parent: Path, args: argparse.Namespace, *options: object) -> None:
    run_script("search_hyperparams.py", "--parent_dir", parent, "--jobs", args.jobs, *options)


def spent(parent: Path) -> int:
    """Returns the epochs that a search has trained."""
    return sum(len(journal_of(child)) for child in children_of(parent))


def find(way: str, repeat: int, args: argparse.Namespace) -> Found:
    """Searches in one way until the budget is used up, and trains what it has found again."""
    space = SPACE | (LEARNING_RATE if args.learning_rate else {})
    pruner = "median" if way == "tpe" else "none"
    how = {"strategy": {"name": way, "seed": repeat}, "pruner": pruner, "max_trials": 1}
    parent = write_parent(args.work_dir / f"{way}_{repeat}", repeat, space | how, args)
    while (left := args.budget - spent(parent)) > 0:
        trials = len(children_of(parent)) + max(1, left // args.epochs)  # as many as cannot use up more than is left
        search(parent, args, "--max_trials", trials)
    runs = {child: read_json(child / "run.json") for child in children_of(parent)}
    completed = [child for child, run in runs.items() if run["status"] == "completed"]
    best = max(completed, key=lambda child: runs[child]["best"]["accuracy"])
    params = flatten(read_json(best / "params.json"))
    point = {key: params[key] for key in space}
    again = train_again(way, repeat, point, args)
    return Found(
        point,
        runs[best]["best"]["accuracy"],
        [read_json(child / "metrics_val_best_weights.json")["accuracy"] for child in again],
        [read_json(child / "metrics_test_best_weights.json")["accuracy"] for child in again],
        len(runs),
        len(runs) - len(completed),
        spent(parent),
        sum(attempt["seconds"] for run in runs.values() for attempt in run["attempts"]),
    )


def train_again(way: str, repeat: int, point: dict[str, Any], args: argparse.Namespace) -> list[Path]:
    """Trains a point with seeds that no search has used and scores it on the test split."""
    if not args.fresh_seeds:
        return []
    seeds = [1000 + repeat * args.fresh_seeds + number for number in range(args.fresh_seeds)]
    again = {key: [value] for key, value in point.items()} | {"seeds": seeds}
    parent = write_parent(args.work_dir / f"{way}_{repeat}_again", repeat, again, args)
    search(parent, args)
    for child in children_of(parent):
        if not (child / "metrics_test_best_weights.json").exists():
            run_script("evaluate.py", "--model_dir", child)
    return children_of(parent)


def compare(what: str, random: Sequence[float], tpe: Sequence[float]) -> list[str]:
    """Returns a row about the differences, repeat by repeat, and whether they can be told from none."""
    gains = [100 * (b - a) for a, b in zip(random, tpe, strict=True)]
    mean = statistics.mean(gains)
    half = STUDENT_T[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
    verdict = "no: within noise" if abs(mean) <= half else f"yes: {'TPE' if mean > 0 else 'random search'} finds more"
    each = ", ".join(f"{gain:+.2f}" for gain in gains)
    return [what, each, f"{mean:+.2f} ± {half:.2f}", verdict]


def mean_of(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def report(found: dict[str, list[Found]], args: argparse.Namespace) -> str:
    """Returns the tables and what they say."""
    kinds: dict[str, Callable[[Found], float]] = {"best val accuracy found": lambda f: f.best}
    if args.fresh_seeds:
        kinds["that point again, val"] = lambda f: statistics.mean(f.again_val)
        kinds["that point again, test"] = lambda f: statistics.mean(f.again_test)
    values = {way: {name: [kind(f) for f in each] for name, kind in kinds.items()} for way, each in found.items()}
    summary = [
        [
            WAYS[way],
            *(percent(column) for column in values[way].values()),
            mean_of([f.trials for f in each]),
            mean_of([f.pruned for f in each]),
            mean_of([f.epochs for f in each]),
            mean_of([f.seconds for f in each]),
        ]
        for way, each in found.items()
    ]
    differences = [compare(name, values["random"][name], values["tpe"][name]) for name in kinds]
    each = []
    for repeat in range(args.repeats):
        for way, f in ((way, found[way][repeat]) for way in WAYS):
            scores = [f"{100 * kind(f):.2f}" for kind in kinds.values()]
            values_of = [f"{value:.4g}" for value in f.point.values()]
            each.append([repeat, way, *values_of, *scores, f.trials, f.pruned, f.epochs])
    options = [key.partition(".")[2] for key in found["tpe"][0].point]
    learning_rate = ", learning rate from 0.0001 to 0.01 (log)" if args.learning_rate else ""
    teacher = read_json(args.teacher_dir / "params.json")["student"]["name"]
    fresh = f"Each best point was trained again with {args.fresh_seeds} fresh seeds." if args.fresh_seeds else ""
    tables = [
        tabulate(rows, headers, tablefmt="github", disable_numparse=True)
        for rows, headers in (
            (summary, ["way", *kinds, "trials", "of them pruned", "epochs", "seconds of training"]),
            (differences, ["", "differences", "mean", "can it be told from none?"]),
            (each, ["repeat", "way", *options, *kinds, "trials", "pruned", "epochs"]),
        )
    ]
    return f"""# TPE with pruning against random search at equal cost

`experiments/cnn_distill_alpha_temp` with alpha from 0.05 to 0.99, temperature from 1.5 to 20 (log){learning_rate}:
5-layer CNN, {args.epochs} epochs of {100 * args.subset:g} % of the training images of CIFAR-10, teacher {teacher}.
A budget of {args.budget} epochs for each search, {args.jobs} trials at a time, {args.repeats} repeats with other seeds.
In each repeat both ways have the same seeds, and so the same first points (TPE begins with 10 random ones).
{fresh}

Accuracy in percent, mean ± sample standard deviation over repeats; of counts the mean (smallest to largest).

{tables[0]}

Epochs are those in the journals; the last trial of TPE may end up to {args.epochs - 1} epochs over the budget. An epoch
that pruning cuts off is in the seconds only.

TPE minus random search, in points, repeat by repeat, and their mean with its 95 % confidence interval (Student's t):

{tables[1]}

{tables[2]}
"""


def main() -> int:
    args = parse_args()
    found: dict[str, list[Found]] = {way: [] for way in WAYS}
    for repeat in range(args.repeats):
        for way, each in found.items():
            each.append(find(way, repeat, args))
            print(f"repeat {repeat}, {way}: {each[-1]}", flush=True)
    run = read_json(children_of(args.work_dir / "tpe_0")[0] / "run.json")["attempts"][-1]
    options = f"--epochs {args.epochs} --subset {args.subset:g} --budget {args.budget} --repeats {args.repeats}"
    options += " --learning_rate" if args.learning_rate else ""
    text = f"""{report(found, args)}
Command: `python benchmarks/sweep_tpe.py --data_dir <data_dir> --teacher_dir <teacher_dir> {options}`.
{stamp(run["device"], f"precision {run['precision']}", f"{run['threads']} thread(s) per run")}.
"""
    if args.quick:
        print(text)
    else:
        write_result("sweep_tpe", text)
    return OK


if __name__ == "__main__":
    sys.exit(main())

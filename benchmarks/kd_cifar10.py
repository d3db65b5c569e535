"""Does distillation help? The CNN alone against the CNN taught by a ResNet-20, several seeds each.

    python benchmarks/kd_cifar10.py --data_dir /path/to/cifar10-images --jobs 2

Trains experiments/base_resnet20, base_cnn/nodropout and cnn_distill_resnet20 once per seed with search_hyperparams.py,
scores each on the test split with evaluate.py, and writes the table to benchmarks/results/kd_cifar10.md. The teacher of
all students is the first seed's. Run again, it goes on where it stopped. `--data_dir` is a folder of images (`train/`,
`test/` with a folder per class) or one that has or gets torchvision's CIFAR-10.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from common import ROOT, add_data_options, create_parser, dataset_options, run_script, stamp, write_result
from tabulate import tabulate

from utils import read_json, write_json

GROUPS = {
    "resnet20": ("ResNet-20 (the teacher's net)", "base_resnet20"),
    "cnn": ("CNN alone", "base_cnn/nodropout"),
    "cnn_kd": ("CNN taught by ResNet-20", "cnn_distill_resnet20"),
}


def parse_args() -> argparse.Namespace:
    parser = create_parser(__doc__)
    add_data_options(parser, "kd_cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[230, 231, 232])
    parser.add_argument("--jobs", type=int, default=1)
    return parser.parse_args()


def train_group(name: str, args: argparse.Namespace) -> list[Path]:
    """Trains and scores one experiment per seed and returns their directories."""
    _, experiment = GROUPS[name]
    params = read_json(ROOT / "experiments" / experiment / "params.json")
    params["dataset"] |= dataset_options(args)
    if params.get("teacher"):
        params["teacher"]["model_dir"] = str(args.work_dir / "resnet20" / f"seed_{args.seeds[0]}")
    parent = args.work_dir / name
    parent.mkdir(parents=True, exist_ok=True)
    write_json(parent / "params.json", params)
    write_json(parent / "search.json", {"seed": args.seeds})
    run_script("search_hyperparams.py", "--parent_dir", parent, "--jobs", args.jobs)
    folders = [parent / f"seed_{seed}" for seed in args.seeds]
    for folder in folders:
        for which in ("best", "last"):
            if not (folder / f"metrics_test_{which}_weights.json").exists():
                run_script("evaluate.py", "--model_dir", folder, "--restore_file", which)
    return folders


def column(folders: list[Path], file: str, metric: str = "accuracy") -> list[float]:
    return [read_json(folder / file)[metric] for folder in folders]


def percent(values: list[float]) -> str:
    """Returns "mean ± sample standard deviation" in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"


def main() -> None:
    args = parse_args()
    groups = {name: train_group(name, args) for name in GROUPS}
    rows = [
        [
            GROUPS[name][0],
            f"`experiments/{GROUPS[name][1]}`",
            len(folders),
            percent(column(folders, "metrics_val_best_weights.json")),
            percent(column(folders, "metrics_test_best_weights.json")),
            percent(column(folders, "metrics_test_last_weights.json")),
            f"{column(folders, 'metrics_test_best_weights.json', 'ece')[0]:.3f}",
        ]
        for name, folders in groups.items()
    ]
    headers = ["net", "params.json", "n", "val, best epoch", "test, best epoch", "test, last epoch", "ECE (first seed)"]
    alone, taught = (column(groups[name], "metrics_test_best_weights.json") for name in ("cnn", "cnn_kd"))
    gains = [100 * (b - a) for a, b in zip(alone, taught, strict=True)]
    by_seed = ", ".join(f"{gain:+.2f}" for gain in gains)
    images = "JPEG" if dataset_options(args).get("name") == "image_folder" else "original"
    run = read_json(groups["cnn"][0] / "run.json")["attempts"][-1]
    images_tested = read_json(groups["cnn"][0] / "metrics_test_best_weights.json")["images"]
    epochs = read_json(groups["cnn"][0] / "params.json")["num_epochs"]
    machine = run["device"], f"precision {run['precision']},\n{run['threads']} thread(s) per run"
    text = f"""# Distillation on CIFAR-10 ({images} images)

Accuracy in percent, mean ± sample standard deviation over seeds {", ".join(map(str, args.seeds))}; {epochs} epochs.
A tenth of the training images is kept for validation and selects the epoch; {images_tested:,} test images.

{tabulate(rows, headers, tablefmt="github")}

The taught CNN against the CNN alone, test accuracy at the best epoch, seed by seed: {by_seed};
on average {statistics.mean(gains):+.2f} points.

Command: `python benchmarks/kd_cifar10.py --data_dir <folder> --jobs {args.jobs}`.
{stamp(*machine)}.
"""
    write_result("kd_cifar10", text)


if __name__ == "__main__":
    main()

"""The five seed projects' experiments, really run, scaled down to what two CPU cores do in about an hour.

    python benchmarks/seeds.py --data_dir /path/to/cifar10-images --jobs 2

`--data_dir` is CIFAR-10 as a folder of images (`train/`, `test/` with a folder per class). Each run is a committed
experiment with fewer epochs on a part of the images, and what `GROUPS` changes besides: seed 000's teacher and seed
002's students have smaller batches and another rate, seed 003's teacher is its ResNet-34. Seed 001, published on
Caltech, is run at 224 px on a small folder made of the same images: it is pre-trained on six classes, fine-tuned and
distilled on the four others. Every run is scored on the test split; the tables that synthesize_results.py makes go to
benchmarks/results/seeds.md. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, add_data_options, create_parser, run_script, stamp, write_result

from utils import OK, read_json, set_option, write_json

PRETRAIN = ("airplane", "automobile", "bird", "cat", "deer", "dog")
TARGET = ("frog", "horse", "ship", "truck")


@dataclass
class Scaled:
    """A committed experiment and what is changed of it."""

    experiment: str
    num_epochs: int
    changes: dict[str, Any] = field(default_factory=dict)  # dotted key -> value


@dataclass
class Group:
    """The runs of a seed; those of a wave need those of the waves before."""

    title: str
    dataset: dict[str, Any]
    waves: list[list[Scaled]]


THIRD = {"subset_fraction": 0.3, "val_fraction": 0.02}
TWENTIETH = {"subset_fraction": 0.05, "val_fraction": 0.02}
SMALL_BATCHES = {"dataset.batch_size": 32, "optimizer.learning_rate": 0.02}  # else 10 steps an epoch
LARGE = {"image_size": 224, "stream": True, "val_fraction": 0.2}
GROUPS = {
    "s003": Group(
        "Seed 003: ResNet-34 (its other teacher) teaches a CNN of three blocks (14,700 images)",
        THIRD,
        [
            [Scaled("s003/teacher_resnet34", 20), Scaled("s003/student_ce", 20)],
            [
                Scaled("s003/kd_T5", 20, {"teacher.model_dir": "experiments/s003/teacher_resnet34"}),
                Scaled("s003/kd_T20", 20, {"teacher.model_dir": "experiments/s003/teacher_resnet34"}),
            ],
        ],
    ),
    "s000": Group(
        "Seed 000: VGG-16 teaches a CNN of four blocks (14,700 images)",
        THIRD,
        [
            [
                Scaled(
                    "s000/teacher_vgg16",
                    10,
                    # Small batches: with 115 steps an epoch it hardly begins to learn.
                    {
                        "dataset.batch_size": 32,
                        "optimizer.learning_rate": 0.02,
                        "schedule.milestones": [6, 9],
                        "schedule.warmup_epochs": 1,
                    },
                ),
                Scaled("s000/student_scratch", 20),
            ],
            [Scaled("s000/kd_ce_T16_a0.5", 20)],
        ],
    ),
    "s004": Group(
        "Seed 004: ResNet-18 teaches the 5-layer CNN (14,700 images)",
        THIRD,
        [
            [Scaled("base_resnet18", 5, {"schedule.step_size": 4}), Scaled("base_cnn", 10)],
            [Scaled("cnn_distill", 10)],
        ],
    ),
    "s001": Group(
        "Seed 001: pre-train, fine-tune, distil at 224 px (800 images of four classes)",
        LARGE,
        [
            [Scaled("s001/teacher_c256", 6, {"schedule.first_cycle_epochs": 6}), Scaled("s001/M_ce_lr2e-4", 10)],
            [Scaled("s001/teacher_c101_ft30", 5)],
            [Scaled("s001/M_kd_lr2e-4", 10)],
        ],
    ),
    "s002": Group(
        "Seed 002: EfficientNet-B0 alone, then taught by DenseNet-40 from there on (2,450 images)",
        TWENTIETH,
        [
            [Scaled("s002/teacher_densenet40", 10), Scaled("s002/effnetb0_ce", 10, SMALL_BATCHES)],
            [
                Scaled("s002/effnetb0_ce_finetuned", 5, SMALL_BATCHES),
                Scaled("s002/effnetb0_kd_densenet40", 5, SMALL_BATCHES),
            ],
        ],
    ),
}


def parse_args() -> argparse.Namespace:
    parser = create_parser(__doc__)
    add_data_options(parser, "seeds")
    parser.add_argument("--seeds", nargs="+", choices=GROUPS, default=list(GROUPS), help="which of the seeds")
    parser.add_argument("--jobs", type=int, default=1)
    return parser.parse_args()


def copy_classes(source: Path, target: Path, classes: tuple[str, ...], train: int, test: int) -> Path:
    """Makes a folder of the first images of some classes."""
    for split, number in (("train", train), ("test", test)):
        for name in classes:
            folder = target / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for image in sorted((source / split / name).iterdir())[:number]:
                if not (folder / image.name).exists():
                    shutil.copyfile(image, folder / image.name)
    return target


def dataset_of(scaled: Scaled, group: Group, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the dataset section of an experiment, on images from `--data_dir`."""
    committed = read_json(ROOT / "experiments" / scaled.experiment / "params.json")["dataset"]
    kept = {key: value for key, value in committed.items() if key not in ("name", "data_dir", "download")}
    folder = args.data_dir
    if group is GROUPS["s001"]:
        classes = PRETRAIN if scaled.experiment.endswith("c256") else TARGET
        folder = copy_classes(args.data_dir, args.work_dir / f"images_{len(classes)}", classes, train=200, test=250)
    elif args.cache_dir:
        kept["cache_dir"] = str(args.cache_dir)
    return {"name": "image_folder", "data_dir": str(folder), **kept, **group.dataset}


def write_run(name: str, scaled: Scaled, args: argparse.Namespace) -> Path:
    """Writes the directory of a scaled-down experiment, teacher and initial weights among its fellows."""
    params = read_json(ROOT / "experiments" / scaled.experiment / "params.json")
    params["dataset"] = dataset_of(scaled, GROUPS[name], args)
    params["num_epochs"] = scaled.num_epochs
    for key, value in scaled.changes.items():
        set_option(params, key, value)
    for section, key in ((params.get("teacher") or {}, "model_dir"), (params["student"], "init_from")):
        if key in section:
            section[key] = str(args.work_dir / name / Path(section[key]).name)
    folder = args.work_dir / name / Path(scaled.experiment).name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "params.json", params)
    return folder


def train(folder: Path) -> None:
    run_script("train.py", "--model_dir", folder, "--quiet")
    if not (folder / "metrics_test_best_weights.json").exists():
        run_script("evaluate.py", "--model_dir", folder)


def table(name: str, args: argparse.Namespace) -> str:
    """Returns the table that synthesize_results.py makes of a seed's runs."""
    parent = args.work_dir / name
    run_script("synthesize_results.py", "--parent_dir", parent, "--quiet")
    lines = (parent / "results.md").read_text().replace(f"{args.work_dir}/", "").splitlines()
    rows = [
        re.sub(r" {2,}", " ", line) for line in lines if line.startswith("|")
    ]  # paths were cut: no alignment is left
    return "\n".join(rows)


def main() -> int:
    args = parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.data_dir, args.work_dir = args.data_dir.absolute(), args.work_dir.absolute()
    for name in args.seeds:
        for wave in GROUPS[name].waves:
            folders = [write_run(name, scaled, args) for scaled in wave]
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(train, folders))
    parts = [
        "# The five seeds, scaled down",
        "Fewer epochs, a part of the images (as JPEG), one seed: these runs show that each chain works. Differences\n"
        "of a point or two are noise, and none of the numbers is comparable to a published one. After so few steps\n"
        "most teachers are no better than their students: what distillation gains is measured in kd_cifar10.md.",
    ]
    for name, group in sorted(GROUPS.items()):
        if (args.work_dir / name).is_dir():
            parts += [f"## {group.title}", table(name, args)]
    parts.append(
        "Command: `python benchmarks/seeds.py --data_dir <folder>`; its top says what is changed of the committed\n"
        f"experiments. {stamp('one thread per run')}."
    )
    text = "\n\n".join(parts) + "\n"
    write_result("seeds", text)
    return OK


if __name__ == "__main__":
    sys.exit(main())

"""What the benchmarks share: their options, running the scripts, numbers with their spread, the dated result file.

A benchmark imports this first: it puts the repository on the path.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from process import PACKAGES, provenance  # noqa: E402
from utils import read_json, write_file  # noqa: E402

NO_OP = ROOT / "benchmarks" / "no_op.py"


def create_parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose help is a benchmark's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_data_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds where the images come from, and where the benchmark of that name leaves its runs."""
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path, help="for decoded images; by default inside the image folder")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "benchmarks" / "runs" / name)


def dataset_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the data options change of a committed experiment's dataset section."""
    options: dict[str, Any] = {"data_dir": str(args.data_dir)}
    if (args.data_dir / "train").is_dir():
        options["name"] = "image_folder"
        if args.cache_dir:
            options["cache_dir"] = str(args.cache_dir)
    return options


def add_search_options(parser: argparse.ArgumentParser, epochs: int, subset: float) -> None:
    """Adds what a search of the ancestor's student is made of, with the defaults of a benchmark."""
    parser.add_argument("--teacher_dir", type=Path, required=True, help="a trained teacher, such as base_resnet20")
    parser.add_argument("--epochs", type=int, default=epochs, help=f"of a full trial (default {epochs})")
    parser.add_argument("--subset", type=float, default=subset, help=f"part of the images to train on ({subset})")
    parser.add_argument("--jobs", type=int, default=2)


def taught(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the params of the ancestor's search, changed in what the options of the two kinds above say."""
    params = read_json(ROOT / "experiments" / "cnn_distill_alpha_temp" / "params.json")
    params["num_epochs"] = args.epochs
    params["dataset"] |= dataset_options(args) | {"subset_fraction": args.subset}
    params["teacher"] |= {"model_dir": str(args.teacher_dir.absolute()), "cache_dir": str(args.work_dir / "store")}
    return params


def children_of(parent: Path) -> list[Path]:
    """Returns the experiment directories of a search, by name."""
    return sorted(path.parent for path in parent.glob("*/params.json"))


def journal_of(child: Path) -> list[int]:
    """Returns the epochs that an experiment's journal has, in its order."""
    path = child / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["epoch"] for line in lines]


def search_command(
    *arguments: object, train: Path = NO_OP, python: Path | str = sys.executable, before: str = ""
) -> list[str]:
    """Returns the command of a search whose children run another script than train.py; `before` is a line of code."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from process import run_main
from search_hyperparams import main
from sweep.launchers import base
base.TRAIN = Path({str(train)!r})
{before}
run_main(main)
"""
    return [str(python), "-c", code, *map(str, arguments)]


def run_script(name: str, *arguments: object) -> None:
    """Runs one of the four scripts to its end; what it prints is shown, and its failure ends the benchmark."""
    subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], check=True)


def spread(values: Sequence[float], digits: str = ".2f") -> str:
    """Returns `median (smallest to largest)`, as of times, or of the ratios of an alternated measurement's rounds."""
    median, low, high = (format(value, digits) for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})" if len(values) > 1 else median


def stamp(*details: str) -> str:
    """Returns day, processor, `details` (device, precision, threads) and versions: the last line of a result."""
    here = provenance()
    versions = [f"{name} {here['packages'][name]}" for name in PACKAGES[:2]]
    return ", ".join([time.strftime("%Y-%m-%d"), here["processor"], *details, f"Python {here['python']}", *versions])


def write_result(name: str, text: str) -> None:
    """Prints a result and writes it to benchmarks/results/<name>.md."""
    write_file(ROOT / "benchmarks" / "results" / f"{name}.md", text.encode())
    print(text)

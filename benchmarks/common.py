"""What the benchmarks share: their options, running the scripts, numbers with their spread, the dated result file.

A benchmark imports this first: it puts the repository on the path.
"""

from __future__ import annotations

import argparse
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
from utils import write_file  # noqa: E402


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

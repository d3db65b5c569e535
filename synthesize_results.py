"""Writes one table of many experiments: `python synthesize_results.py --parent_dir experiments/cnn_distill`.

Every folder with a params.json at or below the parent directory is a row, whatever became of it. The table goes to
the terminal and to results.md, and to results.csv with full precision, both in the parent directory. Runs that differ
in nothing but the seed get a second table below it: the mean and the spread of each such group. With --plots each run
gets a curves.png (loss, accuracy and learning rate over epochs), the parent directory a comparison.png, and each
directory whose runs differ in two numbers, such as alpha and temperature, a heatmap.png.

A run that a search has pruned is a row like any other and says so, but its accuracy is of an early epoch: it is in no
mean, and never the best unless there are no others.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from itertools import chain
from pathlib import Path

from process import run_main
from report.collect import collect, compare_temperatures
from report.heatmap import draw_maps
from report.plots import draw_plots, read_journals
from report.statistics import average_seeds
from report.tables import METRICS, create_frame, one_line, sort_rows, summary, to_csv, to_markdown
from utils import OK, write_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent_dir", type=Path, default=Path("experiments"), help="default: experiments")
    parser.add_argument("--sort", choices=METRICS, default="val_accuracy", help="default: val_accuracy")
    parser.add_argument("--plots", action="store_true", help="also draw the curves of each run, and heat maps")
    parser.add_argument("--quiet", action="store_true", help="only the files, and warnings on the console")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    rows, problems = collect(args.parent_dir)
    journals, missed = read_journals(rows) if args.plots else ({}, [])
    problems += missed
    warnings = [one_line(f"warning: {problem}") for problem in problems]
    if not rows:
        way = "a folder with a params.json is one; --parent_dir names their parent"
        print(one_line(f"no experiments under {args.parent_dir}: {way}"), *warnings, sep="\n")
        return OK
    frame = create_frame(sort_rows(rows, args.sort))
    command = one_line(shlex.join(["python", "synthesize_results.py", *sys.argv[1:]]))
    notes = [one_line(line) for line in compare_temperatures(rows)]
    title = f"`{command}` found {summary(rows)}"
    text = "\n\n".join([title, to_markdown(frame), *average_seeds(rows), *notes, *warnings]) + "\n"
    try:
        for name, content in (("results.md", text), ("results.csv", to_csv(frame))):
            write_file(args.parent_dir / name, content.encode())
        for path, image in chain(draw_maps(rows if args.plots else []), draw_plots(journals, args.parent_dir)):
            write_file(path, image)
    finally:  # also where the folder is someone else's and cannot be written
        if args.quiet:
            sys.stderr.writelines(f"{warning}\n" for warning in warnings)
        else:
            print(text, end="")
    return OK


if __name__ == "__main__":
    run_main(main)

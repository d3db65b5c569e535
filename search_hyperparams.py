"""Searches hyperparameters: writes a child experiment directory for each point of a space and trains them all.

    python search_hyperparams.py --parent_dir experiments/cnn_distill_alpha_temp --jobs 2

The parent's params.json is the reference, its search.json the space: {"alpha": [0.5, 0.9], "temperature": [2, 4]}.
The same command again skips what is finished and goes on with the rest.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from process import log, run_main, set_logger
from sweep.launchers.local import Local
from sweep.study import check, check_sources, plan, run, table, write
from utils import OK


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent_dir", type=Path, required=True, help="directory that holds params.json, search.json")
    parser.add_argument("--jobs", type=int, default=1, help="how many to train at a time (default 1)")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="changes for every child")
    parser.add_argument("--device", default="auto", help="as for train.py: auto (default), cpu, cuda, ...")
    parser.add_argument("--dry_run", action="store_true", help="only show what would be done")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"argument --jobs: {args.jobs} is below 1")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    from model.legacy import as_sections, assumptions  # brings pydantic, which importing this script shall not

    children = plan(args.parent_dir, args.overrides, as_sections)
    if args.dry_run:
        print(table(children))
        return OK
    unfinished = [child for child in children if not child.is_finished()]
    check(unfinished)
    check_sources(unfinished, as_sections)
    write(unfinished)
    set_logger(args.parent_dir / "search_hyperparameters.log")
    if assumed := assumptions(children[0].params):
        log.warning("%s is one of the ancestor's: %s", args.parent_dir / "params.json", "; ".join(assumed))
    status = run(children, Local(args.jobs, args.device))
    log.info("python synthesize_results.py --parent_dir %s", shlex.quote(str(args.parent_dir)))
    return status


if __name__ == "__main__":
    run_main(main)

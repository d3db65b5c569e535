"""Searches hyperparameters: writes a child experiment directory for each point of a space and trains them all.

    python search_hyperparams.py --parent_dir experiments/cnn_distill_alpha_temp --jobs 2

The parent's params.json is the reference, its search.json the space: {"alpha": [0.5, 0.9], "temperature": [2, 4]}.
The same command again skips what is finished and goes on with the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

import utils
from process import log, provenance, run_main, set_logger
from sweep.children import RERUN, Child, Planner, check, check_sources, table, write
from sweep.launchers import LAUNCHERS, create_launcher
from sweep.launchers.base import Launcher
from sweep.space import cover, describe, grid
from sweep.study import Rules, Study, status_of
from sweep.trials import Adaptive, Fixed, Trials, most_children, open_tuner, rehearse, warn_of_objective
from sweep.view import View, text
from utils import OK, TEMPORARY, USAGE, RunError

CALLED = ("overrides", "strategy", "max_trials", "seeds")
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(given: str) -> float:
    """Returns seconds of a text such as 90, 90s, 15m, 8h or 2d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", given)
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{given!r} is not a time such as 90s, 15m, 8h or 2d")
    return float(found[1]) * SECONDS[found[2]]


def whole(minimum: int) -> Callable[[str], int]:
    """Returns a reader of whole numbers from a minimum on."""

    def read(given: str) -> int:
        if not given.isdecimal() or int(given) < minimum:
            raise argparse.ArgumentTypeError(f"{given!r} is no whole number from {minimum} on")
        return int(given)

    return read


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent_dir", type=Path, required=True, help="directory that holds params.json, search.json")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="changes for every child")
    what = parser.add_argument_group("what is tried; each replaces what search.json says")
    what.add_argument("--strategy", choices=("grid", "random", "tpe"), help="how points are chosen")
    what.add_argument("--max_trials", type=whole(1), metavar="N", help="how many points in all, earlier ones included")
    what.add_argument("--seeds", type=whole(0), nargs="+", metavar="SEED", help="train every point with each of them")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--jobs", type=whole(1), metavar="N", help="how many at a time (default: one, or one per GPU)")
    where.add_argument("--device", default="auto", help="as for train.py: auto (default), cpu, cuda, ...")
    where.add_argument("--gpus", default="auto", metavar="IDS", help="auto (default), none, or such as 0,1")
    where.add_argument("--jobs_per_gpu", type=whole(1), metavar="N", help="how many share a GPU (default 1)")
    where.add_argument("--launcher", choices=LAUNCHERS, default="local", help="default: local, this machine")
    where.add_argument("--launcher_options", nargs="+", default=[], metavar="KEY=VALUE", help="see docs/clusters.md")
    how = parser.add_argument_group("what happens when not all goes well")
    how.add_argument("--rerun", choices=RERUN, default="none", help="failed: try again what failed; stale: begin anew "
                     "what was stopped, instead of going on; all: give all results up")  # fmt: skip
    how.add_argument("--force", action="store_true", help="give up results of children that had other params")
    how.add_argument("--retry", type=whole(0), default=0, metavar="N", help="try a child that fails N times more")
    how.add_argument("--fail_fast", action="store_true", help="stop at the first failure")
    how.add_argument("--timeout", type=duration, metavar="TIME", help="save and stop after 90s, 15m, 8h, 2d")
    how.add_argument("--trial_timeout", type=duration, metavar="TIME", help="a child that takes longer has failed")
    how.add_argument("--stop_file", type=Path, metavar="FILE", help="start no more as soon as this file exists")
    show = parser.add_argument_group("what only shows something")
    show.add_argument("--dry_run", action="store_true", help="what would be done with which child, and why")
    show.add_argument("--status", action="store_true", help="how far a search is, perhaps of another terminal")
    return parser.parse_args(arguments)


def read_options(texts: Sequence[str]) -> dict[str, str]:
    """Returns `key=value` texts by their keys."""
    options: dict[str, str] = {}
    for given in texts:
        key, equals, value = given.partition("=")
        if not key or not equals or key in options:
            raise RunError(f"--launcher_options: {given!r} is not key=value, each key once")
        options[key] = value
    return options


@contextlib.contextmanager
def alone(planner: Planner) -> Iterator[None]:
    """Holds a parent whose journal has one writer; several searches may share a plain grid, each doing what is left."""
    lock = FileLock(planner.parent / ".search.lock", timeout=0)
    if planner.search.needs_tuner:
        try:
            lock.acquire()
        except Timeout:
            line = f"{planner.parent} is searched by another process; wait for it or stop it"
            raise RunError(line, "locked", TEMPORARY) from None
        except OSError as error:
            raise utils.storage_error(error, Path(lock.lock_file)) from error
    try:
        yield
    finally:
        lock.release()


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    from model.legacy import as_sections  # it brings pydantic, which importing this script shall not

    if args.status:
        recall(args)
    given = {name: getattr(args, name) for name in ("strategy", "max_trials", "seeds")}
    looks_only = args.status or args.dry_run
    planner = Planner.read(args.parent_dir, args.overrides, as_sections, args.force or looks_only, **given)
    if args.status:
        return show_status(args, planner)
    if args.dry_run:
        return show_plan(args, planner)
    with alone(planner):
        return search(args, planner)


def show_status(args: argparse.Namespace, planner: Planner) -> int:
    children, total = plan(planner, ahead=False)
    print(text(status_of(children, total, planner.search, str(args.parent_dir))))
    return OK


def show_plan(args: argparse.Namespace, planner: Planner) -> int:
    children, total = plan(planner, force=args.force)
    more = total - len(children)
    later = [f"and {more} more, chosen as results come in"] if more else []
    print("\n".join(describe(planner.search)), table(children, args.rerun, args.force), *later, sep="\n\n")
    check_all(planner, children, to_run(children, args.rerun))
    return USAGE if any(child.changes for child in children) and not args.force else OK


def search(args: argparse.Namespace, planner: Planner) -> int:
    """Checks everything, then makes the children and runs them."""
    children, total = plan(planner, force=args.force)
    unfinished = to_run(children, args.rerun)
    expected = len(unfinished) + total - len(children)
    with launched(args, expected) as launcher, contextlib.ExitStack() as held:
        check_all(planner, children, unfinished)
        set_logger(args.parent_dir / "search_hyperparameters.log")
        say_what_is_assumed(planner)
        remember(args)
        line = "Searching hyperparameters: %d of %d children to run, %d at a time on %s"
        log.info(line, expected, total, launcher.at_once, launcher.place)
        write([child for child in unfinished if not child.changes])  # at once: tables show them as pending
        trials: Trials = Fixed(children)
        if planner.search.needs_tuner:
            trials = Adaptive(held.enter_context(contextlib.closing(open_tuner(planner, args.force))), planner)
        rules = Rules(args.rerun, args.retry, args.fail_fast, args.timeout, args.trial_timeout, args.stop_file)
        status = Study(trials, launcher, rules, planner.search, str(args.parent_dir)).run(View())
    log.info("python synthesize_results.py --parent_dir %s", shlex.quote(str(args.parent_dir)))
    return status


def plan(planner: Planner, ahead: bool = True, force: bool = False) -> tuple[list[Child], int]:
    """Returns the children that are known now, and how many there will be.

    Args:
        planner: Makes them.
        ahead: Those, too, that are sure to come and have not been chosen yet.
        force: As on the command line.
    """
    of_grid = not planner.search.needs_tuner
    children = planner.children(grid(planner.search) if of_grid else rehearse(planner, ahead, force))
    return children, max(len(children), most_children(planner.search))


def to_run(children: Sequence[Child], rerun: str) -> list[Child]:
    return [child for child in children if child.outlook(rerun).action == "start"]


def check_all(planner: Planner, children: Sequence[Child], unfinished: Sequence[Child]) -> None:
    """Raises if any child could not be run: for points that are not known yet, those at the ends of the space."""
    is_open = planner.search.strategy.name == "tpe" and not children
    ends = planner.children(cover(planner.search)) if is_open else []
    check([*children, *ends])
    check_sources([*unfinished, *ends], planner.as_sections)


def remember(args: argparse.Namespace) -> None:
    """Notes how the search was called: what it searches does not stand in params.json and search.json alone."""
    called = {name: getattr(args, name) for name in CALLED}
    utils.write_json(args.parent_dir / "search_run.json", {**called, **provenance(), "launcher": args.launcher})


def recall(args: argparse.Namespace) -> None:
    """Takes over how the last search was called, where the command line does not say it."""
    if (path := args.parent_dir / "search_run.json").exists():
        called = utils.read_json(path)
        for name in CALLED:
            setattr(args, name, getattr(args, name) or called.get(name))


@contextlib.contextmanager
def launched(args: argparse.Namespace, expected: int) -> Iterator[Launcher]:
    """Holds what the children run on."""
    launcher = create_launcher(
        args.launcher,
        args.parent_dir,
        device=args.device,
        jobs=args.jobs,
        gpus=args.gpus,
        jobs_per_gpu=args.jobs_per_gpu,
        options=read_options(args.launcher_options),
        expected=expected,
    )
    with contextlib.closing(launcher):
        yield launcher


def say_what_is_assumed(planner: Planner) -> None:
    """Logs what was read into the parent's files that a user may not expect."""
    from model.legacy import assumptions

    if assumed := assumptions(planner.reference):
        log.warning("%s is one of the ancestor's: %s", planner.parent / "params.json", "; ".join(assumed))
    warn_of_objective(planner.search)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is temporary goes, too
    run_main(main)

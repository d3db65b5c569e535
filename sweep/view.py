"""What a search shows while it runs: a line for each running trial, redrawn in place on a terminal.

The same lines as plain text answer `--status`. All that is shown of a run comes from small files of its directory.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from utils import RunError, read_json

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REDRAW_SECONDS = 0.5
UNFINISHED = ("running", "waiting", "pending", "interrupted", "stale")
WIDTH = 100  # of plain text
MIN_NAME = 8
ENDLESS = 10**9  # lines


@dataclass(frozen=True)
class Running:
    """A run as its directory shows it; None is what is not known (yet)."""

    name: str
    epoch: int  # finished epochs
    num_epochs: int  # 0: not known yet
    value: float | None  # of the objective, after the newest epoch
    images_per_second: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class Snapshot:
    """A search at one moment."""

    title: str  # the parent directory
    metric: str  # such as val.accuracy
    counts: Mapping[str, int]  # children by what has become of them, or by the state of their directories
    total: int
    running: Sequence[Running]
    best: str  # a line about the best so far
    seconds_left: float | None  # of the whole search


def read_running(model_dir: Path, metric: str, run_before_attempts: int = 0, now: float | None = None) -> Running:
    """Reads what a run has reached; what is missing or broken is not known, and no error.

    Args:
        model_dir: The experiment directory.
        metric: The objective, such as `val.accuracy`.
        run_before_attempts: The number of attempts that run.json had before this one. As long as it has no more, the
            speed in it is that of an earlier one.
        now: Seconds since 1970, for tests.
    """
    run, last = _read(model_dir / "run.json"), _read(model_dir / "metrics_val_last_weights.json")
    epoch, num_epochs = int(_number(run.get("epoch")) or 0), int(_number(run.get("num_epochs")) or 0)
    attempts, progress = run.get("attempts"), run.get("progress")
    has_begun = isinstance(attempts, list) and len(attempts) > run_before_attempts
    speeds: Mapping[str, Any] = progress if has_begun and isinstance(progress, dict) else {}
    seconds_left = None
    if (epoch_seconds := _number(speeds.get("epoch_seconds"))) is not None:
        with contextlib.suppress(OSError):
            taken = (time.time() if now is None else now) - (model_dir / "metrics.jsonl").stat().st_mtime
            # An epoch that takes longer than the one before it leaves the others as they are.
            taken = min(max(taken, 0.0), epoch_seconds)
            seconds_left = max((num_epochs - epoch) * epoch_seconds - taken, 0.0)
    value = _number(last.get(metric.removeprefix("val.")))
    return Running(model_dir.name, epoch, num_epochs, value, _number(speeds.get("images_per_second")), seconds_left)


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(RunError):
        return read_json(path)
    return {}


def _number(value: Any) -> float | None:
    return value if type(value) in (int, float) and abs(value) < 1e300 else None


def estimate(seconds: Sequence[float], waiting: int, running: Sequence[Running], slots: int) -> float | None:
    """Returns the seconds until all children have ended; None as long as none of them tells how long one takes.

    Every waiting child is taken to need the mean time of the finished ones, and to start where a slot gets free first;
    a running one to need what its epochs say, or before its first one that mean.

    Args:
        seconds: What each child that has finished has taken.
        waiting: Children that have not been started.
        running: Those that run.
        slots: How many run at a time.
    """
    if not seconds:
        return None
    mean = statistics.fmean(seconds)
    free = [mean if run.seconds_left is None else run.seconds_left for run in running]
    free += [0.0] * max(slots - len(free), 0)
    heapq.heapify(free)
    for _ in range(waiting):
        heapq.heapreplace(free, free[0] + mean)
    return max(free)


def text(snapshot: Snapshot) -> str:
    """Returns a snapshot as lines of plain text, at most 100 columns wide."""
    return "\n".join([*_head(snapshot, WIDTH), *_rows(snapshot, WIDTH, ENDLESS)])


def _head(snapshot: Snapshot, width: int) -> list[str]:
    ended = sum(number for outcome, number in snapshot.counts.items() if outcome not in UNFINISHED)
    left = "" if snapshot.seconds_left is None else f", about {_clock(snapshot.seconds_left)} left"
    counts = ", ".join(f"{number} {outcome}" for outcome, number in snapshot.counts.items() if number)
    lines = [snapshot.title, f"{ended} of {snapshot.total} children have ended{left}", counts, f"best: {snapshot.best}"]
    return [_fit(line, width) for line in lines if line]


def _rows(snapshot: Snapshot, width: int, height: int) -> list[str]:
    """Returns the table of running trials; those for which there is no room are a number in its last line."""
    if not snapshot.running:
        return []
    room = max(height - 1, 1)
    shown = snapshot.running if len(snapshot.running) <= room else snapshot.running[: room - 1]
    columns = [
        ["epoch", *(f"{run.epoch}/{run.num_epochs}" if run.num_epochs else "" for run in shown)],
        [_fit(snapshot.metric, 20), *("" if run.value is None else f"{run.value:.4f}" for run in shown)],
        ["images/s", *(_rate(run.images_per_second) for run in shown)],
        ["left", *("" if run.seconds_left is None else _clock(run.seconds_left) for run in shown)],
    ]
    columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    room = max(width - sum(len(column[0]) + 2 for column in columns), MIN_NAME)
    names = [_fit(name, room) for name in ("running", *(run.name for run in shown))]
    longest = max(map(len, names))
    lines = ["  ".join([name.ljust(longest), *cells]).rstrip() for name, *cells in zip(names, *columns, strict=True)]
    if more := len(snapshot.running) - len(shown):
        lines.append(f"... and {more} more")
    return lines


def _rate(images_per_second: float | None) -> str:
    if images_per_second is None:
        return ""
    return f"{images_per_second:,.0f}" if images_per_second >= 10 else f"{images_per_second:.1f}"


def _clock(seconds: float) -> str:
    return tqdm.format_interval(seconds)


def _fit(text: str, width: int) -> str:
    """Returns text that moves no cursor and can be encoded; of what is too long the middle is left out."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    if len(text) <= width:
        return text
    start = (width - 3) // 2
    return f"{text[:start]}...{text[len(text) - (width - 3 - start) :]}"


class View:
    """Shows snapshots on a terminal, in place, below the lines that are logged meanwhile; else shows nothing.

    Args:
        enabled: None: if standard output is a terminal that can move its cursor.
    """

    def __init__(self, enabled: bool | None = None) -> None:
        if enabled is None:
            enabled = sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        self._enabled = enabled
        self._drawn = -math.inf

    def __enter__(self) -> View:
        if self._enabled:
            from rich.console import Console
            from rich.live import Live

            if isinstance(sys.stdout, TextIOWrapper):  # a name that it cannot encode would stop rich for good
                sys.stdout.reconfigure(errors="backslashreplace")
            self._streams = sys.stdout, sys.stderr
            self._console = Console(file=sys.stdout, force_terminal=True)
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="crop",
            )
            self._live.start()
            self._console.show_cursor()  # a process that is killed could not bring it back
            sys.stdout = _Above(self._console, sys.stdout)
            if sys.stderr.isatty():  # else it is someone's file
                sys.stderr = _Above(self._console, sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._enabled = False
            sys.stdout, sys.stderr = self._streams
            with contextlib.suppress(OSError):
                self._live.stop()

    def due(self) -> bool:
        """Tells whether `show` would draw now."""
        return self._enabled and time.monotonic() - self._drawn >= REDRAW_SECONDS

    def show(self, snapshot: Snapshot) -> None:
        """Draws a snapshot, at most twice a second."""
        if self.due():
            self._drawn = time.monotonic()
            try:
                self._live.update(self._render(snapshot), refresh=True)
            except OSError:  # the terminal has gone; the search goes on
                self.__exit__()

    def _render(self, snapshot: Snapshot) -> RenderableType:
        from rich.text import Text

        width, height = self._console.size
        lines = _head(snapshot, width - 1)
        lines += _rows(snapshot, width - 1, 3 * height // 4 - len(lines))  # the lines that are logged need room too
        return Text("\n".join(lines), no_wrap=True, overflow="crop")


class _Above:
    """A standard stream above the live region: its lines go there whole, and the terminal alone wraps long ones."""

    def __init__(self, console: Console, stream: TextIO) -> None:
        self._console, self._stream = console, stream
        self._begun = ""

    def write(self, text: str) -> int:
        from rich.text import Text

        lines, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            self._console.print(Text(lines), soft_wrap=True)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

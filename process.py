"""The process that a script is: how it logs, heeds signals, shows progress, says what it is, and ends.

Set once before training; the files of an experiment directory are the business of `utils` and `experiment`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import logging
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from utils import FAILED, OK, TEMPORARY, RunError, storage_error

ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")

log = logging.getLogger("kdlab")


def run_main(main: Callable[[], int]) -> None:
    """Runs a script's `main` and exits with its status; errors that carry an `exit_status` are one line."""
    status: int | None
    try:
        status = main()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # `... | head`: the reader has gone, and has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = OK
    except Exception as error:
        status = getattr(error, "exit_status", None)
        if not any(isinstance(handler, ConsoleHandler) for handler in log.handlers):  # set_logger has not run yet
            if status is None:
                raise
            print(error, file=sys.stderr)
        elif status is None:
            status = FAILED
            log.exception("a fault in the program, or in the machine:")
        else:
            log.error("%s", error)
    gc.freeze()  # else the interpreter's end looks through all that torch has made: 0.4 s
    sys.exit(status)


# --- logging ----------------------------------------------------------------------------------------------


class ConsoleHandler(logging.Handler):
    """Writes lines above a progress bar; a terminal or reader that has gone ends the lines, not the training."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(self.format(record), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout)
            sys.stdout.flush()


class FileHandler(logging.FileHandler):
    """Appends lines to a file; where that fails, as on a full disk, it says so once and lets the file be."""

    _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a fault in the line
            super().handleError(record)
            return
        self._failed = True
        with contextlib.suppress(OSError, ValueError):
            line = f"cannot write {self.baseFilename}: {error.strerror or error}; going on without it"
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is tried again
            super().close()


_with_place = warnings.formatwarning


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Returns the line of a warning to the user alone, that of a programmer's with its place in the code."""
    if getattr(category, "plain", False):
        return str(message)
    return _with_place(message, category, filename, lineno, line)


def set_logger(path: Path | None = None, quiet: bool = False, mute: bool = False) -> None:
    """Sends log lines, warnings included, to the console and appends them to a file.

    Args:
        path: The log file; None for the console alone.
        quiet: Only warnings and errors go to the console.
        mute: Only errors.
    """
    logging.captureWarnings(True)
    warnings.formatwarning = format_warning
    console = ConsoleHandler(logging.ERROR if mute else logging.WARNING if quiet else logging.INFO)
    handlers: list[logging.Handler] = [console]
    if path is not None:
        try:
            file = FileHandler(path, encoding="utf-8")
        except OSError as error:
            raise storage_error(error, path) from error
        file.setFormatter(logging.Formatter("%(asctime)s:%(levelname)s: %(message)s"))
        handlers.append(file)
    for logger in (log, logging.getLogger("py.warnings")):
        for old in logger.handlers[:]:  # a second run in one process must not log into the first one's file
            logger.removeHandler(old)
            old.close()
        logger.handlers[:] = handlers
        logger.setLevel(logging.INFO)
        logger.propagate = False


class EpochBar:
    """One line on the terminal for the epoch that runs, with images/s and time left; silent without a terminal.

    Args:
        label: Such as `epoch 3/30`.
        total: Images in the epoch.
        done: Images that an earlier attempt has done.
        quiet: Show nothing.
    """

    def __init__(self, label: str, total: int, done: int, quiet: bool) -> None:
        self._bar = tqdm(desc=label, total=total, initial=done, unit="img", disable=quiet or None, leave=False)
        self._shown = time.monotonic()

    def show(self, done: int, means: Callable[[], Mapping[str, float]]) -> None:
        """Advances to `done` images; calls `means`, which waits for the device, once a second.

        It does so without a terminal too: `means` raises when training has diverged, and that shall not wait.
        """
        self._bar.update(done - self._bar.n)
        if time.monotonic() - self._shown > 1:
            self._bar.set_postfix({name: f"{value:.3f}" for name, value in means().items()})
            self._shown = time.monotonic()

    def close(self) -> None:
        self._bar.close()


# --- signals ----------------------------------------------------------------------------------------------


class StopSignals:
    """Remembers a signal to stop, so that the loop can save at its next step; a second one kills at once.

    SIGINT and SIGTERM end with status 130 and 143; SIGHUP and SIGUSR1 (Slurm before its time limit) with 75. Slurm's
    preemption sends SIGTERM twice within milliseconds, which is one wish.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    ECHO_SECONDS = 0.1

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._first = 0.0

    def __enter__(self) -> StopSignals:
        # Who ignores a signal, as nohup does SIGHUP for its command, shall go on ignoring it.
        heeded = [s for s in self.SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._previous = {s: signal.signal(s, self._remember) for s in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._first = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._first > self.ECHO_SECONDS:
            self._insist(number)

    def _insist(self, number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def error(self, done: str, way: str = "the same command") -> RunError:
        """Returns what ends the script after saving; `done` says how far it got, `way` what goes on from there."""
        assert self.received is not None
        ended = self.received in (signal.SIGINT, signal.SIGTERM)
        status = 128 + self.received if ended else TEMPORARY
        line = f"stopped by {self.received.name} {done}; {way} goes on from there"
        return RunError(line, "signal" if ended else "preempted", status)


# --- provenance -------------------------------------------------------------------------------------------

PACKAGES = ("torch", "torchvision", "numpy", "pydantic", "tensorboardX")


def provenance() -> dict[str, Any]:
    """Returns what is known of this process: command, code, versions, machine. Works outside git too."""
    return {
        "argv": sys.argv,
        "git": git_state(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "host": platform.node(),
        "system": platform.platform(),
        "processor": processor(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_state() -> dict[str, Any] | None:
    """Returns the commit of the code and whether files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """Returns the processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {available_cores()} cores"


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

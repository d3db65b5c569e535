"""Where children run. Another place than this machine is another class with the same three verbs."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import Protocol

from process import available_cores

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


class Launcher(Protocol):
    """Runs `train.py` on directories; what it prints is appended to their console.log, below the command."""

    slots: int  # how many may run at a time

    def submit(self, model_dir: Path) -> None:
        """Starts a run and returns at once; an OSError says why it cannot start."""

    def poll(self) -> dict[Path, int]:
        """Returns the runs that have ended since the last call with their exit statuses, -n for signal n."""
        ...

    def cancel(self, model_dir: Path, force: bool = False) -> None:
        """Asks a run to save and end, or with `force` ends it at once; `poll` tells when it has."""


class Local:
    """Processes on this machine, each in its own session: Ctrl-C reaches the search, which tells its children.

    Args:
        slots: How many may run at a time; the cores are divided among them.
        device: Handed to train.py.
    """

    def __init__(self, slots: int = 1, device: str = "auto") -> None:
        self.slots = slots
        # Children that take all cores each are slower together than one after the other.
        self._environment = {"OMP_NUM_THREADS": str(max(1, available_cores() // slots)), **os.environ}
        self._device = device
        self._running: dict[Path, Popen[bytes]] = {}

    def submit(self, model_dir: Path) -> None:
        command = [sys.executable, str(TRAIN), "--model_dir", str(model_dir), "--quiet", "--device", self._device]
        with (model_dir / "console.log").open("ab") as console:
            console.write(
                f"--- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} {shlex.join(command)}\n".encode(errors="replace")
            )
            console.flush()
            self._running[model_dir] = Popen(
                command, stdin=DEVNULL, stdout=console, stderr=STDOUT, env=self._environment, start_new_session=True
            )

    def poll(self) -> dict[Path, int]:
        ended = {path: process.returncode for path, process in self._running.items() if process.poll() is not None}
        for path in ended:
            self.cancel(path, force=True)  # data workers that outlive a killed trainer
            del self._running[path]
        return ended

    def cancel(self, model_dir: Path, force: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._running[model_dir].pid, signal.SIGKILL if force else signal.SIGTERM)

"""Processes on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

from process import available_cores
from sweep.launchers import base


class Local:
    """Processes on this machine, each in its own session: Ctrl-C reaches the search, which tells its children.

    Args:
        slots: How many may run at a time; the cores are divided among them.
        device: Handed to train.py.
    """

    queues = False

    def __init__(self, slots: int = 1, device: str = "auto") -> None:
        self.slots = slots
        # Children that take all cores each are slower together than one after the other.
        self._environment = {"OMP_NUM_THREADS": str(max(1, available_cores() // slots)), **os.environ}
        self._device = device
        self._running: dict[Path, Popen[bytes]] = {}

    def submit(self, model_dir: Path, restart: bool = False) -> None:
        command = base.command(model_dir, self._device, restart)
        with (model_dir / "console.log").open("ab") as console:
            console.write(base.heading(command))
            console.flush()
            self._running[model_dir] = Popen(
                command, stdin=DEVNULL, stdout=console, stderr=STDOUT, env=self._environment, start_new_session=True
            )

    def adopt(self, model_dir: Path) -> bool:
        return False  # nothing here remembers what an earlier search has started; the locks do

    def poll(self) -> dict[Path, int]:
        ended = {path: process.returncode for path, process in self._running.items() if process.poll() is not None}
        for path in ended:
            self.cancel(path, force=True)  # data workers that outlive a killed trainer
            del self._running[path]
        return ended

    def cancel(self, model_dir: Path, force: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._running[model_dir].pid, signal.SIGKILL if force else signal.SIGTERM)

    def close(self) -> None:
        pass

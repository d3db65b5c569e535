"""What a place where children run must offer: three verbs. Another kind of place is another file beside this one."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Protocol

TRAIN = Path(__file__).resolve().parent.parent.parent / "train.py"


class Launcher(Protocol):
    """Runs `train.py` on directories; what it prints is appended to their console.log, below the command.

    Attributes:
        slots: How many may be handed over at a time, those that occupy a slot included.
        at_once: How many of them run at a time; the others wait in a queue of the place.
        queues: Whether a run that was handed over may have to wait there.
        place: What it is called in the log, such as `this machine`.
    """

    queues: bool

    @property
    def place(self) -> str: ...

    @property
    def slots(self) -> int: ...

    @property
    def at_once(self) -> int: ...

    def submit(self, model_dir: Path) -> None:
        """Hands a run over and returns at once; an OSError or a RunError says why that cannot be."""

    def adopt(self, model_dir: Path) -> bool:
        """Tells whether a run that an earlier search has handed over is still waiting or running here.

        If so `poll` and `cancel` know it from now on. What runs without this place's knowledge its lock tells.
        """
        ...

    def poll(self) -> dict[Path, int]:
        """Returns the runs that have ended since the last call with their exit statuses, -n for signal n.

        A RunError says that the place itself is gone, and with it all that can be known of them here.
        """
        ...

    def cancel(self, model_dir: Path, force: bool = False) -> None:
        """Asks a run to save and end, or with `force` ends it at once; `poll` tells when it has."""

    def occupy(self, model_dir: Path, gpu: str | None) -> bool:
        """Keeps a slot free for a run on this machine that another process has started; tells whether it took one.

        Args:
            model_dir: The directory.
            gpu: The run's CUDA_VISIBLE_DEVICES, None if that is not set.
        """
        ...

    def vacate(self, model_dir: Path) -> None:
        """Gives the slot of such a run, which has ended, to others."""

    def close(self) -> None:
        """Lets go of what the launcher holds; called once, at the end, with nothing running unless that was killed."""


def command(model_dir: Path, device: str) -> list[str]:
    """Returns the command that trains a directory, or goes on with it."""
    return [sys.executable, str(TRAIN), "--model_dir", str(model_dir), "--quiet", "--device", device]


def heading(line: list[str]) -> bytes:
    """Returns the line of console.log above what a command prints."""
    return f"--- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} {shlex.join(line)}\n".encode(errors="replace")

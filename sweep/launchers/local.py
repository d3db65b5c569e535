"""Processes on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

from process import available_cores, log
from sweep.gpus import VISIBLE, find_gpus
from sweep.launchers import base
from sweep.launchers.starter import Started, Starter, StarterError

STAGGER_SECONDS = 0.2  # between two that load torch: all at once they would read the same files and take memory


class Local:
    """Processes on this machine, each in its own session: Ctrl-C reaches the search, which tells its children.

    Args:
        slots: One for each run at a time: its GPU, the only one it sees, as CUDA_VISIBLE_DEVICES calls it, or None for
            the CPU. The cores are divided among them.
        device: Handed to train.py.
    """

    queues = False
    place = "this machine"

    def __init__(self, slots: Sequence[str | None] = (None,), device: str = "auto") -> None:
        self.slots = self.at_once = len(slots)
        self._places = Counter(slots)
        self._taken: dict[Path, str | None] = {}  # by our runs
        self._occupied: dict[Path, str | None] = {}  # by those of others
        # Children that take all cores each are slower together than one after the other.
        self._environment = {"OMP_NUM_THREADS": str(max(1, available_cores() // len(slots))), **os.environ}
        if VISIBLE not in os.environ:  # else its numbers mean what they mean to whoever has set it
            self._environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts
        self._device = device
        self._running: dict[Path, Popen[bytes] | Started] = {}
        self._last_start = -STAGGER_SECONDS
        self._starter: Starter | None = None
        self._use_starter = False

    def preload(self) -> None:
        """Begins to load, in the background, what all runs on the CPU need: they start two seconds sooner.

        It takes two seconds of a core itself, so it is for more runs than there are slots. Call it early: runs that are
        handed over before all is loaded start as ever.
        """
        on_cpu = self._device == "cpu" or (self._device == "auto" and not find_gpus("auto"))
        if on_cpu and None in self._places and Starter.works_here():
            self._starter, self._use_starter = Starter(self._environment), True

    def submit(self, model_dir: Path) -> None:
        busy = Counter([*self._taken.values(), *self._occupied.values()])
        gpu = min((self._places - busy).elements(), key=busy.__getitem__)  # the least busy
        self._running[model_dir] = self._start(base.command(model_dir, self._device), model_dir / "console.log", gpu)
        self._taken[model_dir] = gpu

    def _start(self, command: list[str], path: Path, gpu: str | None) -> Popen[bytes] | Started:
        with path.open("ab") as console:
            console.write(base.heading(command))
            console.flush()
            if self._starter is not None and self._use_starter and gpu is None:
                try:
                    if started := self._starter.start(command, path):
                        return started
                except StarterError as error:
                    self._use_starter = False
                    log.warning("from now on runs start without what was loaded for them: %s", error)
            time.sleep(max(0.0, self._last_start + STAGGER_SECONDS - time.monotonic()))
            self._last_start = time.monotonic()
            environment = self._environment if gpu is None else {**self._environment, VISIBLE: gpu}
            return Popen(command, stdin=DEVNULL, stdout=console, stderr=STDOUT, env=environment, start_new_session=True)

    def occupy(self, model_dir: Path, gpu: str | None) -> bool:
        left = self._places - Counter(self._occupied.values())
        for place in [*(gpu or "").split(","), None]:  # on the CPU the variable may have any value
            if left[place]:
                self._occupied[model_dir] = place
                return True
        return False

    def vacate(self, model_dir: Path) -> None:
        self._occupied.pop(model_dir, None)

    def adopt(self, model_dir: Path) -> bool:
        return False  # nothing here remembers what an earlier search has started; the locks do

    def poll(self) -> dict[Path, int]:
        ended = {path: status for path, process in self._running.items() if (status := process.poll()) is not None}
        for path in ended:
            self.cancel(path, force=True)  # data workers that outlive a killed trainer
            del self._running[path], self._taken[path]
        return ended

    def cancel(self, model_dir: Path, force: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._running[model_dir].pid, signal.SIGKILL if force else signal.SIGTERM)

    def close(self) -> None:
        if self._starter is not None:
            self._starter.close()

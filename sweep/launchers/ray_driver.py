"""The process that has Ray loaded, which `ray.py` starts and talks to, and the task that runs train.py on a node.

It reads requests from standard input and ends, with all that it has started, once that is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, TaskCancelledError

from experiment import is_locked
from process import available_cores
from sweep.launchers import base
from utils import FAILED

KEEPER = Path(__file__).resolve().with_name("keeper.py")
POLL_SECONDS = 0.05
LOCK_SECONDS = 0.5  # between two looks at a lock, perhaps over a network
COUNT_SECONDS = 5.0  # between two looks at which nodes there are
KILL_SECONDS = 0.5  # between the two requests that kill a run
SAVE_SECONDS = 75.0  # for runs to save when the search has gone; more than the keeper gives them
MAX_LOSSES = 3  # of a run: what takes four nodes down is at fault itself
STORE_BYTES = 80_000_000  # about the least that Ray takes; nothing of ours goes through its store


# --- on the node ------------------------------------------------------------------------------------------


def train(model_dir: str, command: Sequence[str], cwd: str, environment: Mapping[str, str], wait: float) -> int:
    """Runs a command and returns its exit status, -n for signal n.

    Ray cancels a task by a SIGINT that the worker sends to itself. At the first the command saves and ends, at the
    second it is killed. It ends as well when this worker does.

    Args:
        model_dir: Where console.log is.
        command: The command.
        cwd: Where to run it.
        environment: Is added to the node's.
        wait: For how many seconds to wait for the directory's lock to be free.

    Raises:
        FileNotFoundError: The node does not see the files.
    """
    asked = told = 0

    def on_interrupt(*_: object) -> None:
        nonlocal asked
        asked += 1

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        for path in (Path(cwd), Path(cwd, model_dir), Path(command[0]), KEEPER):
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist on node {platform.node()}")
        deadline = time.monotonic() + wait
        while is_locked(Path(cwd, model_dir)) and time.monotonic() < deadline and not asked:
            time.sleep(LOCK_SECONDS)
        if asked:
            return -signal.SIGTERM
        with Path(cwd, model_dir, "console.log").open("ab") as console:
            console.write(base.heading(list(command)))
            console.flush()
            keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(KEEPER), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=console,
                cwd=cwd,
                env={**os.environ, **environment},
            )
        with keeper:
            assert keeper.stdin is not None
            assert keeper.stdout is not None
            while not select.select([keeper.stdout], [], [], POLL_SECONDS)[0]:
                if told < asked:
                    told += 1
                    with contextlib.suppress(BrokenPipeError):
                        os.write(keeper.stdin.fileno(), b"t" if told == 1 else b"k")
            return int(keeper.stdout.read() or -signal.SIGKILL)
    finally:
        signal.signal(signal.SIGINT, previous)


# --- the driver -------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run that has been handed to Ray."""

    model_dir: str
    command: list[str]
    task: ray.ObjectRef
    losses: int = 0
    cancelled: bool = False
    killed: float | None = None  # when it was last asked to be


class Driver:
    """Hands runs to Ray and says what becomes of them.

    Args:
        settings: As `ray.py` sends them.
        output: Where to say it, in lines of JSON.
    """

    def __init__(self, settings: Mapping[str, Any], output: TextIO) -> None:
        self._output = output
        self._runs: dict[str, Run] = {}
        self._slots = -1
        self._counted = 0.0
        is_own = connect(settings["address"])
        if not is_own:
            self.say(head=ray.get_runtime_context().gcs_address)
        gpus = settings["num_gpus"]
        if gpus is None:
            gpus = float(ray.cluster_resources().get("GPU", 0) > 0)
        self._cpus, self._gpus = settings["num_cpus"], gpus
        self._environment = {"OMP_NUM_THREADS": str(max(1, int(self._cpus))), **settings["environment"]}
        if not gpus:
            self._environment["CUDA_VISIBLE_DEVICES"] = ""  # what Ray has given to nobody is not for the taking
        self._cwd = settings["cwd"]
        # A run that is lost is handed over again here, where it can be told from one that takes its nodes down.
        self._task = ray.remote(num_cpus=self._cpus, num_gpus=gpus, max_retries=0)(train)
        self.count()
        if is_own and not self._slots:
            there = ray.cluster_resources()
            has = f"{there.get('CPU', 0):g} processors and {there.get('GPU', 0):g} GPUs"
            raise RuntimeError(f"a run takes num_cpus={self._cpus:g} num_gpus={gpus:g}, this machine has {has}")

    def say(self, **message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the search has gone; so its requests end
            print(json.dumps(message), file=self._output, flush=True)

    def count(self) -> None:
        """Says how many runs the nodes that are there can run at a time."""
        self._counted = time.monotonic()
        slots = 0
        for has in (node["Resources"] for node in ray.nodes() if node["Alive"]):
            room = [has.get(name, 0) / need for name, need in (("CPU", self._cpus), ("GPU", self._gpus)) if need]
            slots += int(min(room) + 1e-6)
        if slots != self._slots:
            self._slots = slots
            self.say(slots=slots)

    def heed(self, request: Mapping[str, Any]) -> None:
        """Does what the search asks for."""
        if "train" in request:
            model_dir = request["train"]
            self._runs[model_dir] = Run(model_dir, request["command"], self._start(model_dir, request["command"]))
        elif (run := self._runs.get(request["cancel"])) and not (run.cancelled and not request["force"]):
            run.cancelled = True
            if run.killed is None:
                ray.cancel(run.task)
                run.killed = time.monotonic() if request["force"] else None

    def _start(self, model_dir: str, command: list[str], wait: float = 0.0) -> ray.ObjectRef:
        return self._task.options(name=Path(model_dir).name).remote(
            model_dir, command, self._cwd, self._environment, wait
        )

    def look(self) -> None:
        """Says which runs have ended, hands those that were lost over again, and kills those that are to be killed."""
        now = time.monotonic()
        for run in self._runs.values():
            if run.killed is not None and now - run.killed > KILL_SECONDS:
                run.killed = now
                ray.cancel(run.task)
        tasks = {run.task: run for run in self._runs.values()}
        for task in ray.wait([*tasks], num_returns=len(tasks), timeout=0)[0] if tasks else ():
            run = tasks[task]
            status = self._outcome(run)
            if status is not None:
                del self._runs[run.model_dir]
                self.say(ended=run.model_dir, status=status)
        if now - self._counted > COUNT_SECONDS:
            self.count()

    def _outcome(self, run: Run) -> int | None:
        """Returns the exit status of a run that has ended; None if it has been handed over again."""
        try:
            return int(ray.get(run.task))
        except TaskCancelledError:
            return -signal.SIGTERM
        except RayTaskError as error:
            if isinstance(error.cause, FileNotFoundError):  # no other run would fare better there
                raise
            self.say(note=f"{Path(run.model_dir).name} could not be started: {error.cause}")
            return FAILED
        except RayError as error:
            if run.cancelled:
                return -signal.SIGTERM
            why = re.split(r", node ID|\. Check|\n", str(error))[0]
            if isinstance(error, OutOfMemoryError) or run.losses == MAX_LOSSES:
                with Path(self._cwd, run.model_dir, "console.log").open("a") as console:
                    console.write(f"Ray: {why}\n")
                return -signal.SIGKILL
            run.losses += 1
            run.task = self._start(run.model_dir, run.command, SAVE_SECONDS)
            self.say(note=f"{Path(run.model_dir).name} goes elsewhere, on from its last checkpoint: {why}")
            return None

    def end(self) -> None:
        """Has all runs save and end."""
        deadline = time.monotonic() + SAVE_SECONDS
        for run in self._runs.values():
            run.losses = MAX_LOSSES
            self.heed({"cancel": run.model_dir, "force": False})
        while self._runs and time.monotonic() < deadline:
            self.look()
            time.sleep(POLL_SECONDS)
        ray.shutdown()


def connect(address: str | None) -> bool:
    """Joins a cluster; tells whether it is one of our own, which had to be started."""
    common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
    own = {"num_cpus": available_cores(), "include_dashboard": False, "object_store_memory": STORE_BYTES}
    if address in (None, "local"):
        try:
            ray.init(address, **common, **own)
            return True
        except ValueError as error:  # there is one, and it has its own number of processors
            if address is not None or "existing cluster" not in str(error):
                raise
    ray.init(address, **common)
    return False


def requests() -> Iterator[dict[str, Any] | None]:
    """Yields what the search asks for, and None when it asks for nothing; ends when it has gone."""
    unread = b""
    while True:
        if not select.select([0], [], [], POLL_SECONDS)[0]:
            yield None
        elif block := os.read(0, 65536):
            *lines, unread = (unread + block).split(b"\n")
            yield from map(json.loads, lines)
        else:
            return


def main() -> None:
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no message
    try:
        driver = Driver(json.loads(sys.argv[1]), output)
        for request in requests():
            if request is not None:
                driver.heed(request)
            driver.look()
        driver.end()
    except (RayError, OSError, RuntimeError, ValueError) as error:
        cause = getattr(error, "cause", None) or error
        print(json.dumps({"error": " ".join(str(cause).split())}), file=output, flush=True)


if __name__ == "__main__":
    main()

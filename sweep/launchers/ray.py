"""Ray Core tasks, each of which runs train.py on a node of a Ray cluster, or on this machine without one.

Ray takes over signals, writes to the terminal, and ends its process when the cluster has gone. So it is loaded in a
process of its own, `ray_driver.py`, to which the launcher talks in lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from process import log
from sweep.launchers import base
from utils import FAILED, TEMPORARY, RunError

ROOT = Path(__file__).resolve().parent.parent.parent
DRIVER = [sys.executable, "-m", "sweep.launchers.ray_driver"]
INSTALL = f"{sys.executable} -m pip install -r {ROOT / 'requirements-ray.txt'}"
OPTIONS = ("address", "num_cpus", "num_gpus")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # bits depend on them: set here, they hold on every node
CONNECT_SECONDS = 5.0
START_SECONDS = 60.0  # Ray itself would wait longer, and then end the process
CLOSE_SECONDS = 90.0  # more than ray_driver.py gives runs to save


class Ray:
    """Runs as tasks of a Ray cluster. All its nodes must see the same files under the same paths.

    Args:
        device: Handed to train.py.
        jobs: How many may wait or run there at a time; by default as many as the cluster can run.
        num_cpus: Processors that a run takes, and its threads; a fraction lets runs share one.
        num_gpus: GPUs that a run takes, perhaps a fraction; by default one if the cluster has any.
        address: `host:port` of the cluster's head, or `local` for one of our own on this machine. By default that of
            RAY_ADDRESS, or the cluster that `ray start` has started on this machine, or `local`.

    Raises:
        RunError: Ray is not installed, or the cluster does not answer or does not let us in.
    """

    queues = True

    def __init__(
        self,
        device: str = "auto",
        *,
        jobs: int | None = None,
        num_cpus: float = 1.0,
        num_gpus: float | None = None,
        address: str | None = None,
    ) -> None:
        head = address or os.environ.get("RAY_ADDRESS") or "local"
        _knock(head)
        self._cluster = "Ray on this machine" if head in ("auto", "local") else f"the Ray cluster at {head}"
        self._device, self._jobs = device, jobs
        self.slots = jobs or 1
        self._capacity: int | None = None  # until the driver knows
        self._ended: dict[Path, int] = {}
        self._unread = b""
        settings = {
            "address": address,
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "cwd": str(Path.cwd()),
            "environment": {name: os.environ[name] for name in THREADS if name in os.environ},
        }
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115
        self._driver = subprocess.Popen(
            [*DRIVER, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            cwd=ROOT,
            env=_environment(),
            start_new_session=True,  # Ctrl-C reaches the search alone
        )
        assert self._driver.stdout is not None
        os.set_blocking(self._driver.stdout.fileno(), False)
        try:
            self._wait_until_ready()
        except BaseException:
            self._driver.kill()
            self.close()
            raise

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, str],
        *,
        device: str = "auto",
        jobs: int | None = None,
        gpus: str = "auto",
        jobs_per_gpu: int | None = None,
    ) -> Ray:
        """Returns a launcher as the command line asks for it.

        Args:
            options: Of `--launcher_options`: the arguments `address`, `num_cpus` and `num_gpus` as text.
            device: As for the class.
            jobs: As for the class.
            gpus: `auto` or `none`; which GPU a run gets is for Ray to say.
            jobs_per_gpu: How many runs share a GPU; another way to give `num_gpus`.

        Raises:
            RunError: An option is unknown or wrong, or two contradict each other.
        """
        if unknown := [name for name in options if name not in OPTIONS]:
            raise RunError(f"--launcher_options: Ray has no {unknown[0]!r}; there are {', '.join(OPTIONS)}")
        num_cpus = _amount("num_cpus", options.get("num_cpus", "1"))
        if num_cpus == 0:
            raise RunError(
                "--launcher_options: num_cpus=0 would let all runs run at once; give a fraction, such as 0.5"
            )
        num_gpus = _amount("num_gpus", options["num_gpus"]) if "num_gpus" in options else None
        if gpus not in ("auto", "none"):
            way = "--launcher_options num_gpus=N says how many a run takes, and Ray chooses which"
            raise RunError(f"--gpus {gpus}: with --launcher ray there is only auto or none; {way}")
        without = gpus == "none" or device in ("cpu", "mps")
        if without and (num_gpus or jobs_per_gpu is not None):
            said = "--gpus none" if gpus == "none" else f"--device {device}"
            raise RunError(f"{said}: runs without GPUs cannot take or share any; leave num_gpus and --jobs_per_gpu out")
        if jobs_per_gpu is not None:
            if num_gpus is not None:
                raise RunError("--jobs_per_gpu and num_gpus of --launcher_options say the same; give one of them")
            num_gpus = math.floor(10_000 / jobs_per_gpu) / 10_000  # Ray counts in ten-thousandths
        return cls(
            device,
            jobs=jobs,
            num_cpus=num_cpus,
            num_gpus=0.0 if without else num_gpus,
            address=options.get("address"),
        )

    @property
    def place(self) -> str:
        return self._cluster

    @property
    def at_once(self) -> int:
        return min(self._capacity or 1, self.slots)

    def submit(self, model_dir: Path) -> None:
        self._say(train=str(model_dir), command=base.command(model_dir, self._device))

    def adopt(self, model_dir: Path) -> bool:
        return False  # Ray ends the tasks of a search that has gone, and they save

    def poll(self) -> dict[Path, int]:
        self._listen()
        ended, self._ended = self._ended, {}
        return ended

    def cancel(self, model_dir: Path, force: bool = False) -> None:
        self._say(cancel=str(model_dir), force=force)

    def occupy(self, model_dir: Path, gpu: str | None) -> bool:
        return False  # Ray knows nothing of it, and this machine may be no place where runs go

    def vacate(self, model_dir: Path) -> None:
        pass

    def close(self) -> None:
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._driver.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._driver.wait(CLOSE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._driver.pid, signal.SIGKILL)  # what it has started of Ray ends with it
        self._driver.wait()
        self._driver.stdout.close()
        self._noise.close()

    # --- the driver ---------------------------------------------------------------------------------------

    def _say(self, **message: Any) -> None:
        assert self._driver.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `poll` says so
            self._driver.stdin.write(json.dumps(message).encode() + b"\n")
            self._driver.stdin.flush()

    def _listen(self) -> None:
        """Takes in what the driver has said; raises if it has gone."""
        assert self._driver.stdout is not None
        gone = False
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._driver.stdout.fileno(), 65536):
                self._unread += block
            gone = True
        *lines, self._unread = self._unread.split(b"\n")
        for message in map(json.loads, lines):
            if "error" in message:
                raise RunError(f"--launcher ray: {message['error']}", "cluster", FAILED)
            if "note" in message:
                log.warning("%s", message["note"])
            if "head" in message:
                self._cluster = f"the Ray cluster at {message['head']}"
            if "slots" in message:
                self._capacity = message["slots"]
                self.slots = self._jobs or self._capacity or 1  # one that waits makes a cluster grow, if it can
            if "ended" in message:
                self._ended[Path(message["ended"])] = message["status"]
        if gone and self._capacity is not None and not self._ended:
            line = f"{self._cluster} has gone: {self._last_noise()}"
            way = "its runs save and end, the same command goes on from there"
            raise RunError(f"{line}; {way}", "cluster", TEMPORARY)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._capacity is None:
            gone = self._driver.poll() is not None
            noise = self._read_noise()
            if b"No module named 'ray'" in noise:
                raise RunError(f"--launcher ray: Ray is not installed here; {INSTALL}")
            if b"InvalidAuthToken" in noise:
                way = "copy the head's ~/.ray/auth_token to this machine, or set RAY_AUTH_TOKEN_PATH"
                raise RunError(f"{self._cluster} wants another token than this machine has; {way}")
            self._listen()
            if self._capacity is None and (gone or time.monotonic() > deadline):
                what = "could not be joined" if gone else "does not answer"
                raise RunError(f"{self._cluster} {what}: {self._last_noise()}")
            time.sleep(0.02)
        if not self._capacity:
            log.warning("%s has no room yet: runs wait for another node", self._cluster)

    def _read_noise(self) -> bytes:
        return os.pread(self._noise.fileno(), 1_000_000, 0)

    def _last_noise(self) -> str:
        """Returns the last thing that Ray has printed, without time and place."""
        lines = [line.strip() for line in self._read_noise().decode(errors="replace").splitlines() if line.strip()]
        return re.sub(r"^\[.*?\] \S+: ", "", lines[-1]).split(". ")[0] if lines else "it does not say why"


def _amount(name: str, text: str) -> float:
    """Reads an amount as Ray takes them: a fraction of one, or a whole number."""
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 <= value < 1 or (math.isfinite(value) and value >= 1 and value == int(value)):
            return value
    raise RunError(f"--launcher_options: {name}={text} is neither a whole number nor a part of one such as 0.5")


def _knock(address: str) -> None:
    """Raises if nobody listens at an address of the form host:port; Ray would try for more than a minute."""
    if "://" in address:
        way = "start the search on a machine of the cluster, with address=host:port of its head"
        raise RunError(f"--launcher ray: {address!r} is not an address of a cluster's head; {way}")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        way = "start its head there (ray start --head), or name the right one by --launcher_options address=host:port"
        raise RunError(f"no Ray cluster answers at {address}: {why}; {way}") from None


def _environment() -> dict[str, str]:
    """Returns the driver's environment: with a token always.

    A cluster that wants none takes any, one of our own takes a secret that no file holds, and who has none of a cluster
    that wants one is told so.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", **os.environ}
    known = environment.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if not known and not (Path.home() / ".ray" / "auth_token").exists():
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return environment

"""A real Ray on this machine: nodes on the loopback, each a `ray start` with a token, as docs/clusters.md says.

with cluster() as ray:
    ray.start_node(cpus=1)
    subprocess.run([PYTHON, "search_hyperparams.py", ..., "--launcher", "ray"], env=ray.environment)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock
from helpers import ROOT

HOME = ROOT / ".venv-ray"  # Ray, which the tests of everything else do without
PYTHON = HOME / "bin" / "python"
REQUIREMENTS = ROOT / "requirements-ray.txt"
NODE = "KDLAB_TEST_NODE"  # in the environment of all that a node has started: which one
ADDRESS = "KDLAB_TEST_RAY"  # in that of all nodes of a cluster, and of its drivers


class Impossible(Exception):
    """There can be no Ray here; the reason is its text."""


def prepare() -> None:
    """Makes `.venv-ray`, which sees this venv's packages, unless an earlier call has.

    Raises:
        Impossible: pip reaches no index.
    """
    HOME.mkdir(exist_ok=True)
    ready, wanted = HOME / ".ready", f"{REQUIREMENTS.read_text()}{sys.version}"
    with FileLock(HOME / ".lock"):  # of the workers of pytest-xdist one does it
        if ready.exists() and ready.read_text() == wanted:
            return
        _run(sys.executable, "-m", "venv", "--without-pip", str(HOME))
        site = Path(_run(str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
        try:
            _run(sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--quiet", "-r", str(REQUIREMENTS))
        except subprocess.CalledProcessError as error:
            if "Retrying" not in error.stderr:
                raise
            raise Impossible(f"pip install -r {REQUIREMENTS.name}: {error.stderr.strip()[-200:]}") from None
        ready.write_text(wanted)


def _run(*command: str, env: Mapping[str, str] | None = None) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def marked(name: str, value: str) -> dict[int, str]:
    """Returns the processes with a variable in their environment, and their commands."""
    mark, found = f"{name}={value}".encode(), {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0") and int(process.name) != os.getpid():
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


class Cluster:
    """Nodes of Ray; made by `cluster`.

    Attributes:
        environment: In which commands of Ray, and so `--launcher ray`, find the cluster and its token.
        address: Of the head, `host:port`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: list[str] = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self._port}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{HOME / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),  # for ~/.ray/auth_token
            "RAY_AUTH_MODE": "token",
            "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            ADDRESS: self.address,
        }
        _run("ray", "get-auth-token", "--generate", env=self.environment)

    def start_node(self, cpus: int, gpus: int = 0) -> None:
        """Starts a node; the first one is the head."""
        head = ["--head", f"--port={self._port}", "--include-dashboard=false"]
        where = [f"--address={self.address}"] if self._nodes else head
        size = [f"--num-cpus={cpus}", f"--num-gpus={gpus}", "--object-store-memory=80000000"]
        environment = {**self.environment, NODE: f"{self._port}.{len(self._nodes)}"}
        _run("ray", "start", *where, *size, env=environment)
        self._nodes.append(environment[NODE])

    def end_node(self, number: int, only: str = "") -> None:
        """Kills all that a node has started, as a machine that loses power does, or only certain commands."""
        for pid, command in marked(NODE, self._nodes[number]).items():
            if only in command:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Lets nodes run as long as the context lasts, and leaves no process behind.

    Raises:
        Impossible: See `prepare`.
    """
    prepare()
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: it holds sockets
    nodes = Cluster(folder)
    try:
        yield nodes
    finally:
        while left := marked(ADDRESS, nodes.address):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)

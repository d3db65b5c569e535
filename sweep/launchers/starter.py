"""A process that has loaded what train.py needs, and makes children that need not load it again.

Loading torch takes two seconds of a core, as much as a short training. The starter loads it once, alone, and forks:
a child finds all modules there and is otherwise what `python train.py ...` would be: its own session, its own output,
the interpreter's usual end. `Starter` is the starter as the search sees it; this file, run as a script, is the starter.

Only for children that compute on the CPU: what CUDA has set up does not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# train.py loads the last two only when it comes to them: the optimizer's first step, the first epoch's record.
MODULES = ("train", "torch._dynamo", "tensorboardX")
MAX_BYTES = 65_536  # of a message
REPLY_SECONDS = 10.0  # a fork takes milliseconds


class StarterError(Exception):
    """The starter makes no more children; says why."""


class Started:
    """A child that a starter has made, with as much of `Popen` as a launcher needs."""

    def __init__(self, starter: Starter, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._starter = starter
        self._handle = os.pidfd_open(pid)  # tells of the end even when the starter has gone and nobody buries the dead

    def poll(self) -> int | None:
        """Returns the exit status, -n for signal n; None as long as the child runs."""
        if self.returncode is None and _readable(self._handle):
            os.close(self._handle)
            self.returncode = self._starter.status(self.pid)
        return self.returncode


class Starter:
    """A starter, from the search's side. It loads in the background, and ends when the search does, however it ends.

    Args:
        environment: Of the starter, and so of the children.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._channel, other = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self._channel.settimeout(REPLY_SECONDS)
        self._ready = False
        with other:
            self._process = Popen(
                [sys.executable, str(Path(__file__).resolve()), str(other.fileno()), *MODULES],
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=DEVNULL,
                env=environment,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )

    @staticmethod
    def works_here() -> bool:
        """Tells whether the system has what this needs: Linux, with nothing of it forbidden."""
        with contextlib.suppress(AttributeError, OSError):
            os.close(os.pidfd_open(os.getpid()))
            return True
        return False

    def start(self, command: Sequence[str], console: Path) -> Started | None:
        """Makes a child; returns None as long as the starter is still loading.

        Args:
            command: The interpreter, which is not used, the script and its arguments.
            console: A file that exists; what the child prints is appended.

        Raises:
            StarterError: No child was made, and none will be.
        """
        if not self._ready:
            if not _readable(self._channel.fileno()):
                return None
            self._ready = bool(self._receive())
        pid = self._ask(argv=command[1:], console=str(console))["pid"]
        try:
            return Started(self, pid)
        except OSError as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            raise StarterError(str(error)) from error

    def status(self, pid: int) -> int:
        """Returns the exit status of a child that has ended; 1 if the starter, which alone could know, has gone."""
        try:
            return int(self._ask(pid=pid)["status"])
        except StarterError:
            return 1

    def close(self) -> None:
        """Ends the starter, not its children."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, **request: Any) -> dict[str, Any]:
        with contextlib.suppress(OSError):  # who has gone does not answer either
            self._channel.send(json.dumps(request).encode())
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        """Returns a reply. Where none comes no child can come either, any more: it could not tell its pid."""
        try:
            reply = json.loads(self._channel.recv(MAX_BYTES) or "{}")
        except TimeoutError:
            self.close()
            raise StarterError("the process that holds it does not answer") from None
        except OSError:
            reply = {}
        if not reply:
            self.close()
            status = self._process.returncode
            how = f"was killed by signal {-status}" if status < 0 else f"has ended with exit status {status}"
            raise StarterError(f"the process that held it {how}")
        if "error" in reply:
            raise StarterError(reply["error"])
        return reply


def _readable(handle: int) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))


# --- the starter itself -----------------------------------------------------------------------------------


def load(modules: Sequence[str]) -> None:
    """Imports modules as train.py, in its folder, would."""
    sys.path[0] = str(ROOT)
    for module in modules:
        importlib.import_module(module)


def own_files() -> list[Path]:
    """Returns the files of the modules that are loaded and are ours."""
    files = (Path(file) for module in sys.modules.values() if (file := getattr(module, "__file__", None)))
    return [file for file in files if file.is_relative_to(ROOT) and not file.is_relative_to(sys.prefix)]


def stamps(files: Sequence[Path]) -> list[int]:
    """Returns when each file was last changed, 0 for one that has gone."""
    return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]


def is_alone() -> bool:
    """Tells whether this process has no thread but this one, apart from those that a library ends at a fork."""
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return len(list(Path("/proc/self/task").iterdir())) == 1


def serve(channel: socket.socket) -> list[str]:
    """Makes children and tells how they ended, until the search has gone; returns in each child, with its argv."""
    files = own_files()
    loaded = stamps(files)
    reply: dict[str, Any] = {"ready": True} if is_alone() else {"error": "a module has started a thread"}
    channel.send(json.dumps(reply).encode())
    while message := channel.recv(MAX_BYTES):
        request = json.loads(message)
        if "pid" in request:
            reply = {"status": os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])}
        elif stamps(files) != loaded:
            reply = {"error": "the code has changed meanwhile"}
        else:
            try:
                with Path(request["console"]).open("ab", buffering=0) as console:
                    if (pid := os.fork()) == 0:
                        os.dup2(console.fileno(), 1)
                        os.dup2(console.fileno(), 2)
            except OSError as error:
                reply = {"error": str(error)}
            else:
                if pid:
                    continue  # the child replies, once it has its own session: then it can be told to stop
                os.setsid()
                channel.send(json.dumps({"pid": os.getpid()}).encode())
                channel.close()
                return list(request["argv"])
        channel.send(json.dumps(reply).encode())
    sys.exit()


if __name__ == "__main__":
    load(sys.argv[2:])
    gc.freeze()  # a child that ends would else look through all that was loaded once more: 0.4 s
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = str(Path(sys.argv[0]).parent)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # else all children would draw the same; Python's own generator sees to that itself
    runpy.run_path(sys.argv[0], run_name="__main__")

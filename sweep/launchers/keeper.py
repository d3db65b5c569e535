"""Keeps a command company on a node of a cluster: it ends when the one who wants it has gone, wherever that leaves it.

    python keeper.py <command and its arguments>

Who starts it holds the other ends of two pipes: orders come from standard input, `t` to save and end, `k` to be killed,
and the exit status goes to standard output. Once standard input is closed nobody waits for the command any more, and it
is told to save and end. What the command prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from subprocess import DEVNULL, Popen

GRACE_SECONDS = 60.0  # to save, for a command that nobody waits for
POLL_SECONDS = 0.05


def keep(command: Sequence[str]) -> int:
    """Runs a command in its own session and returns its exit status, -n for signal n."""
    process = Popen(command, stdin=DEVNULL, stdout=sys.stderr, start_new_session=True)

    def tell(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    listening, told, deadline = True, False, float("inf")
    while process.poll() is None:
        if not listening:
            time.sleep(POLL_SECONDS)
        elif select.select([0], [], [], POLL_SECONDS)[0]:
            order = os.read(0, 1)
            if order == b"k":
                tell(signal.SIGKILL)
            elif not told:  # a second signal would keep it from saving
                told = True
                tell(signal.SIGTERM)
            if not order:
                listening, deadline = False, time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            tell(signal.SIGKILL)
    tell(signal.SIGKILL)  # data workers that outlive a killed trainer
    return process.returncode


if __name__ == "__main__":
    # Whoever starts this may be made to kill its children when it ends, as Ray's workers are: so be nobody's child.
    if os.fork():
        os._exit(0)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with contextlib.suppress(BrokenPipeError):
        os.write(1, str(keep(sys.argv[1:])).encode())

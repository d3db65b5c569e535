"""Which GPUs a search may use, and how its runs are spread over them."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from utils import RunError

QUERY = ["nvidia-smi", "-L"]
QUERY_SECONDS = 10.0  # a driver in trouble may never answer
DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU
VISIBLE = "CUDA_VISIBLE_DEVICES"


def find_gpus(choice: str) -> list[str]:
    """Returns the GPUs that a search may use, each as the CUDA_VISIBLE_DEVICES of a run that shall have it.

    Where that variable is set already only those that it lets through are there, and are counted from 0.

    Args:
        choice: `auto` for all that are there, `none`, or numbers and ids with commas between.

    Raises:
        RunError: A GPU is not there, or is named twice.
    """
    if choice == "none":
        return []
    visible = os.environ.get(VISIBLE)
    on_machine = {} if choice == "auto" and visible is not None else _on_machine()
    there = list(on_machine) if visible is None else _let_through(visible)
    if choice == "auto":
        return there
    known = {str(number): gpu for number, gpu in enumerate(there)}
    known |= {name: gpu for gpu in there if not (name := on_machine.get(gpu, gpu)).isdecimal()}
    found: dict[str, str] = {}
    for word in (word.strip() for word in choice.split(",")):
        if word not in known:
            listed = f"there are {', '.join(known)}" if known else "there are none"
            because = "" if visible is None else f" ({VISIBLE} is {visible!r})"
            raise RunError(f"--gpus: there is no GPU {word!r}; {listed}{because}")
        if known[word] in found:
            raise RunError(f"--gpus: {word!r} is the same GPU as {found[known[word]]!r}; name it once")
        found[known[word]] = word
    return list(found)


def slots_of(gpus: Sequence[str], jobs: int | None = None, jobs_per_gpu: int | None = None) -> list[str | None]:
    """Returns a slot for each run that may run at a time: its GPU, or None for the CPU.

    Args:
        gpus: As `find_gpus` returns them.
        jobs: How many there may be; by default one, or as many as the GPUs take.
        jobs_per_gpu: How many may share a GPU; by default as many as `jobs` needs.

    Raises:
        RunError: GPUs are to be shared, and there are none.
    """
    if not gpus:
        if jobs_per_gpu is not None:
            raise RunError("--jobs_per_gpu: there is no GPU to share; --jobs says how many run at a time")
        return [None] * (jobs or 1)
    each = jobs_per_gpu or math.ceil((jobs or 1) / len(gpus))
    slots: list[str | None] = [gpu for _ in range(each) for gpu in gpus]
    return slots[:jobs]


def _let_through(visible: str) -> list[str]:
    """Returns the GPUs of a CUDA_VISIBLE_DEVICES; the first word that is none ends it, as CUDA has it."""
    words = (word.strip() for word in visible.split(","))
    return list(itertools.takewhile(re.compile(r"\d+$|GPU-|MIG-").match, words))


def _on_machine() -> dict[str, str]:
    """Returns the machine's GPUs in the order of the bus: what CUDA_VISIBLE_DEVICES calls them, and their unique id.

    Of a GPU that is divided (MIG) only the parts can be used.
    """
    found: dict[str, str] = {}
    whole = ""
    for line in _list_gpus().splitlines():
        match = re.match(r"(?:GPU (\d+)|\s+MIG ).*\(UUID: (\S+)\)", line)
        if match and match[1]:
            whole = match[1]
            found[whole] = match[2]
        elif match:
            found.pop(whole, None)
            found[match[2]] = match[2]
    if found:
        return found
    return {str(number): str(number) for number, _ in enumerate(DRIVER.glob("*"))}


def _list_gpus() -> str:
    """Returns what nvidia-smi lists; nothing where there is none, or none that answers."""
    with contextlib.suppress(OSError):
        process = subprocess.Popen(QUERY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            return process.communicate(timeout=QUERY_SECONDS)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)  # not for ever: what hangs in the driver does not even heed this
        finally:
            if process.stdout is not None:
                process.stdout.close()
    return ""

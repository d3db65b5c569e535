"""Where children run: one file for each kind of place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sweep.gpus import find_gpus, slots_of
from sweep.launchers.base import Launcher
from utils import RunError

LAUNCHERS = ("local", "ray", "slurm")


def create_launcher(
    name: str,
    parent: Path,
    *,
    device: str = "auto",
    jobs: int | None = None,
    gpus: str = "auto",
    jobs_per_gpu: int | None = None,
    options: Mapping[str, str] | None = None,
    expected: int = 0,
) -> Launcher:
    """Returns a launcher by its name; what it needs is imported only now.

    Args:
        name: One of `LAUNCHERS`.
        parent: The directory of the search.
        device: Handed to train.py.
        jobs: How many may run at a time; by default as many as there is room for.
        gpus: Which GPUs of this machine may be used: `auto`, `none`, or their numbers.
        jobs_per_gpu: How many may share a GPU.
        options: What else the place wants to know, see docs/clusters.md.
        expected: About how many runs there will be.

    Raises:
        RunError: What was asked for is not to be had.
    """
    options = options or {}
    if name == "local":
        from sweep.launchers.local import Local

        if options:
            raise RunError("--launcher_options: this machine has none; they go with --launcher ray or slurm")
        if device == "auto" and gpus == "none":
            device = "cpu"
        shared = find_gpus(gpus) if device in ("auto", "cuda") else []  # of cuda:1, the user sees to it
        local = Local(slots_of(shared, jobs, jobs_per_gpu), device)
        if expected > local.slots:
            local.preload()
        return local
    if name == "ray":
        from sweep.launchers.ray import Ray

        return Ray.from_options(options, device=device, jobs=jobs, gpus=gpus, jobs_per_gpu=jobs_per_gpu)
    from sweep.launchers.slurm import Slurm

    if jobs is None:
        raise RunError("--launcher slurm: --jobs says how many may run at a time; give it")
    if gpus not in ("auto", "none") or jobs_per_gpu is not None:
        raise RunError("--launcher slurm: --launcher_options gpus_per_node=1 is how a job gets GPUs there")
    return Slurm(parent, jobs, device, options)

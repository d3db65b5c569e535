"""Claims about which GPUs a search may use. nvidia-smi is a script that prints what the real one does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sweep import gpus
from sweep.gpus import find_gpus, slots_of
from utils import RunError

TWO = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-c8b57b7b-0f2f-fcd0-2f33-5a1f4a9f1c11)
"""
PARTS = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.20gb     Device  0: (UUID: MIG-c7384736-a75d-5afc-978f-d2f1294409fd)
  MIG 1g.5gb      Device  1: (UUID: MIG-a28ad590-3fda-56dd-84fc-0a0b96edc58d)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-c8b57b7b-0f2f-fcd0-2f33-5a1f4a9f1c11)
"""
FIRST, SECOND = (line.rpartition(" ")[2].rstrip(")") for line in TWO.splitlines())
MIGS = [line.rpartition(" ")[2].rstrip(")") for line in PARTS.splitlines() if "MIG" in line]

Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes up a machine: what its nvidia-smi prints (None: it has none), does and ends with, and its driver's GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "driver")

    def make(listed: str | None = None, status: int = 0, seconds: float = 0, driver: int = 0) -> None:
        if listed is not None:
            path = tmp_path / "nvidia-smi"
            code = f"import sys, time\nassert sys.argv[1:] == ['-L']\ntime.sleep({seconds})\n"
            path.write_text(f"#!{sys.executable}\n{code}print({listed!r}, end='')\nsys.exit({status})\n")
            path.chmod(0o755)
        for number in range(driver):
            (tmp_path / "driver" / f"0000:{number}a:00.0").mkdir(parents=True)

    return make


def test_a_machine_without_a_driver_has_none(machine: Machine) -> None:
    machine()
    assert find_gpus("auto") == []


def test_all_of_the_machine_are_used(machine: Machine) -> None:
    machine(TWO)
    assert find_gpus("auto") == ["0", "1"]


def test_of_a_gpu_that_is_divided_its_parts_are_used(machine: Machine) -> None:
    machine(PARTS)
    assert find_gpus("auto") == [*MIGS, "1"]
    assert find_gpus(f"2,{MIGS[1]}") == ["1", MIGS[1]]


@pytest.mark.parametrize(("listed", "status"), [(None, 0), ("NVIDIA-SMI has failed", 9), ("No devices were found", 0)])
def test_without_an_answer_of_nvidia_smi_the_driver_is_asked(machine: Machine, listed: str | None, status: int) -> None:
    machine(listed, status, driver=3)
    assert find_gpus("auto") == ["0", "1", "2"]


def test_an_nvidia_smi_that_hangs_is_not_waited_for(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "QUERY_SECONDS", 0.3)
    machine(TWO, seconds=60, driver=1)
    begun = time.monotonic()
    assert find_gpus("auto") == ["0"]
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("4,5", ["4", "5"]),
        ("5, 4", ["5", "4"]),
        ("", []),
        ("-1", []),
        ("1,-1,0", ["1"]),  # as CUDA reads it
        ("0,1x", ["0"]),
        ("NoDevFiles", []),  # Slurm's, for a job that has asked for none
        (f"{FIRST},{MIGS[0]}", [FIRST, MIGS[0]]),
    ],
)
def test_what_is_visible_already_is_what_there_is(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, visible: str, found: list[str]
) -> None:
    machine(TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpus("auto") == found
    assert find_gpus("none") == []


def test_numbers_count_among_the_visible(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"1,{SECOND},0")
    assert find_gpus("0,1") == ["1", SECOND]
    assert find_gpus(f"2,{SECOND}") == ["0", SECOND]


def test_an_id_is_found_among_numbers(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(TWO)
    assert find_gpus(f"{SECOND},0") == ["1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert find_gpus(SECOND) == ["1"]
    with pytest.raises(RunError, match=f"no GPU '{FIRST}'; there are 0, {SECOND}"):
        find_gpus(FIRST)


@pytest.mark.parametrize("choice", ["2", "0,2", "-1", "", "0,", "all", "cuda:0", "GPU-1", "00"])
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(machine: Machine, choice: str) -> None:
    machine(TWO)
    with pytest.raises(RunError) as caught:
        find_gpus(choice)
    wrong = choice.split(",")[-1]
    assert str(caught.value) == f"--gpus: there is no GPU {wrong!r}; there are 0, 1, {FIRST}, {SECOND}"
    assert caught.value.exit_status == 2


def test_the_message_says_what_hides_the_others(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    with pytest.raises(RunError, match=r"there is no GPU '0'; there are none$"):
        find_gpus("0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(RunError, match=r"no GPU '4'; there are 0, 1 \(CUDA_VISIBLE_DEVICES is '4,5'\)"):
        find_gpus("4")


@pytest.mark.parametrize(("choice", "same"), [("0,0", "0"), (f"1,{SECOND}", "1")])
def test_a_gpu_is_named_once(machine: Machine, choice: str, same: str) -> None:
    machine(TWO)
    with pytest.raises(RunError, match=f"is the same GPU as '{same}'; name it once"):
        find_gpus(choice)


# --- slots ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jobs", "jobs_per_gpu", "slots"),
    [
        (None, None, ["0", "1"]),
        (1, None, ["0"]),
        (3, None, ["0", "1", "0"]),
        (4, None, ["0", "1", "0", "1"]),
        (None, 2, ["0", "1", "0", "1"]),
        (3, 2, ["0", "1", "0"]),
        (8, 1, ["0", "1"]),
    ],
)
def test_runs_are_spread_over_the_gpus_in_turn(
    jobs: int | None, jobs_per_gpu: int | None, slots: list[str | None]
) -> None:
    assert slots_of(["0", "1"], jobs, jobs_per_gpu) == slots


def test_without_gpus_the_jobs_run_on_the_cpu() -> None:
    assert slots_of([]) == [None]
    assert slots_of([], 3) == [None] * 3
    with pytest.raises(RunError, match="--jobs_per_gpu: there is no GPU to share"):
        slots_of([], 3, 2)

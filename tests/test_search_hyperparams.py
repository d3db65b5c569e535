"""Claims about the command: its exit statuses, its files, its signals; each runs it as its own process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import read_journal

import search_hyperparams

ROOT = Path(__file__).parent.parent
# The command as it is, except for what it trains with.
WITH_STUB = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import process, search_hyperparams, sweep.launchers.base, sweep.launchers.local, sweep.launchers.starter
sweep.launchers.local.STAGGER_SECONDS = 0
sweep.launchers.starter.MODULES = ()
sweep.launchers.base.TRAIN = pathlib.Path({str(ROOT / "tests/sweep/stub_train.py")!r})
def main():
    status = search_hyperparams.main()
    if "torch" in sys.modules:
        raise AssertionError("torch was imported")
    return status
process.run_main(main)
"""
PARAMS: dict[str, Any] = {"num_epochs": 3, "loss": {"alpha": 0.9, "temperature": 4.0}, "stub": {"do": "ok"}}


def make(parent: Path, space: dict[str, Any] | None, params: dict[str, Any] = PARAMS) -> Path:
    parent.mkdir(exist_ok=True)
    (parent / "params.json").write_text(json.dumps(params))
    if space is not None:
        (parent / "search.json").write_text(json.dumps(space))
    return parent


def command(parent: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-c", WITH_STUB, "--parent_dir", str(parent), *arguments]


def search(parent: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = command(parent, *arguments)
    return subprocess.run(line, input="typed", capture_output=True, text=True, timeout=180, cwd=parent)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited for too long")


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts searches in the background and leaves nothing behind."""
    processes: list[tuple[subprocess.Popen[str], Path]] = []

    def start(parent: Path, *arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command(parent, *arguments), stdout=pipe, stderr=pipe, text=True, cwd=parent)
        processes.append((process, parent))
        return process

    yield start
    for process, parent in processes:
        process.kill()
        process.communicate()
        for path in parent.glob("*/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)


def test_a_search_trains_every_child_and_says_what_is_next(tmp_path: Path) -> None:
    parent = make(tmp_path / "a search", {"alpha": [0.5, 0.9], "temperature": [2.0, 4]})
    done = search(parent, "--jobs", "2", "--device", "cpu", "--overrides", "seed=1", "num_epochs=1")
    assert done.returncode == 0, done.stderr
    assert sorted(path.parent.name for path in parent.glob("*/run.json")) == [
        "alpha_0.5_Temp_2.0",
        "alpha_0.5_Temp_4",
        "alpha_0.9_Temp_2.0",
        "alpha_0.9_Temp_4",
    ]
    records = [json.loads(path.read_text()) for path in parent.glob("*/record.json")]
    assert {record["argv"][-1] for record in records} == {"cpu"}
    assert {record["stdin"] for record in records} == {""}
    assert json.loads((parent / "alpha_0.5_Temp_4/params.json").read_text())["seed"] == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "Searching hyperparameters: 4 of 4 children to run, 2 at a time on this machine"
    assert [line[:5] for line in lines[1:5]] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert lines[5] == "4 done, 0 skipped, 0 failed, 0 not started"
    assert "accuracy 0.9000 at epoch 2" in lines[6]
    assert lines[7] == f"python synthesize_results.py --parent_dir '{parent}'"
    assert done.stderr == ""
    logged = (parent / "search_hyperparameters.log").read_text().splitlines()
    assert [line.partition(":INFO: ")[2] for line in logged] == lines

    again = search(parent, "--overrides", "seed=1", "num_epochs=1")
    assert again.returncode == 0
    assert "0 done, 4 skipped, 0 failed, 0 not started" in again.stdout


def test_a_failure_is_told_and_the_exit_status_is_1(tmp_path: Path) -> None:
    done = search(make(tmp_path, {"stub.do": ["fail", "ok"]}))
    assert done.returncode == 1
    assert done.stderr.count("do_fail failed: exit status 2 (teacher): the teacher has") == 2
    assert "1 done, 0 skipped, 1 failed" in done.stdout


def test_problems_end_with_2_and_nothing_is_written(tmp_path: Path) -> None:
    parent = make(tmp_path, {"alpha": [0.5, 1.5]})
    done = search(parent)
    assert done.returncode == 2
    assert done.stderr == f"{parent}/alpha_1.5/params.json: loss.alpha: 1.5 is above 1\n"
    assert sorted(path.name for path in parent.iterdir()) == ["params.json", "search.json"]


def test_a_child_with_other_params_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    parent = make(tmp_path, {"alpha": [0.5, 0.6]})
    make(parent / "alpha_0.6", None)
    done = search(parent)
    assert done.returncode == 2
    assert "loss.alpha: 0.9 -> 0.6" in done.stderr
    assert not (parent / "alpha_0.5").exists()


def test_a_completed_child_is_not_checked_again(tmp_path: Path) -> None:
    parent = make(tmp_path, {"alpha": [1.5]})
    child = make(parent / "alpha_1.5", None, PARAMS | {"loss": {"alpha": 1.5, "temperature": 4.0}})
    (child / "run.json").write_text('{"status": "completed", "epoch": 3}')
    assert search(parent).returncode == 0


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--jobs", "x"], ["--nonsense"]])
def test_usage_errors_end_with_2(tmp_path: Path, arguments: list[str]) -> None:
    assert search(make(tmp_path, None), *arguments).returncode == 2


def test_a_dry_run_shows_the_ancestors_grid_and_writes_nothing(tmp_path: Path) -> None:
    parent = make(tmp_path, None)
    done = search(parent, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "| alpha_0.99_Temp_20.0 | 0.99         | 20.0               | run            |" in done.stdout
    assert done.stdout.endswith("40 children: 40 to run, 0 completed\n")
    assert [path.name for path in parent.iterdir()] == ["params.json"]


def test_nothing_of_the_search_imports_torch() -> None:
    code = "import sys, search_hyperparams; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_at_the_first_signal_the_children_save_and_no_other_is_started(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]], number: int, status: int
) -> None:
    parent = make(tmp_path, {"alpha": [0.1, 0.2, 0.3]}, PARAMS | {"stub": {"do": "sleep"}})
    process = started(parent, "--jobs", "2")
    wait_for(lambda: len(list(parent.glob("*/pid"))) == 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=180)
    assert process.returncode == status
    for name in ("alpha_0.1", "alpha_0.2"):
        assert json.loads((parent / name / "run.json").read_text())["status"] == "interrupted"
        assert f"{name} is interrupted after epoch 1" in out
    assert not (parent / "alpha_0.3/run.json").exists()
    assert "0 done, 0 skipped, 0 failed, 2 interrupted, 1 not started" in out
    assert err.splitlines()[-1].endswith("after 0 of 3 children; the same command goes on from there")


def test_at_the_second_signal_the_children_are_killed(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    parent = make(tmp_path, {"stub.do": ["stubborn"]})
    process = started(parent)
    pid = parent / "do_stubborn/pid"
    wait_for(pid.exists)
    process.send_signal(signal.SIGTERM)
    log = parent / "search_hyperparameters.log"
    wait_for(lambda: "a second signal kills" in log.read_text())
    time.sleep(0.2)  # what comes at once is an echo
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=180)
    assert process.returncode == 143
    assert not Path("/proc", pid.read_text()).exists()


def test_points_are_drawn_where_that_is_asked_for_and_the_same_ones_again(tmp_path: Path) -> None:
    space = {"alpha": {"low": 0.1, "high": 0.9}, "temperature": {"low": 1.0, "high": 20.0, "log": True}}
    names = []
    for folder in ("one", "other"):
        parent = make(tmp_path / folder, space)
        jobs = "1" if folder == "one" else "3"
        done = search(parent, "--strategy", "random", "--max_trials", "4", "--jobs", jobs)
        assert done.returncode == 0, done.stderr
        names.append(sorted(path.parent.name for path in parent.glob("*/run.json")))
    assert names[0] == names[1]
    assert len(names[0]) == 4


def test_a_dry_run_of_tpe_says_what_is_not_known_yet_and_decides_nothing(tmp_path: Path) -> None:
    space = {"alpha": {"low": 0.1, "high": 0.9}, "strategy": "tpe", "max_trials": 7, "seeds": [1, 2]}
    done = search(make(tmp_path, space), "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "loss.alpha: numbers 0.1 to 0.9" in done.stdout
    assert done.stdout.endswith("0 children: 0 to run, 0 completed\n\nand 14 more, chosen as results come in\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.json", "search.json"]


def test_the_ends_of_a_range_are_checked_before_tpe_begins(tmp_path: Path) -> None:
    parent = make(tmp_path, {"alpha": {"low": 0.1, "high": 1.5}, "strategy": "tpe", "max_trials": 7})
    done = search(parent)
    assert done.returncode == 2
    assert done.stderr == f"{parent}/alpha_1.5/params.json: loss.alpha: 1.5 is above 1\n"
    assert sorted(path.name for path in parent.iterdir() if path.name != ".search.lock") == [
        "params.json",
        "search.json",
    ]


def test_a_missing_teacher_is_found_before_tpe_begins(tmp_path: Path) -> None:
    space = {"alpha": {"low": 0.1, "high": 0.9}, "strategy": "tpe", "max_trials": 7}
    parent = make(tmp_path, space, PARAMS | {"teacher": "nowhere"})
    for arguments in ([], ["--dry_run"]):
        done = search(parent, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("teacher nowhere does not exist")
    assert not list(tmp_path.glob("*/"))


def test_the_status_is_told_from_another_terminal(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    parent = make(tmp_path, {"stub.do": ["ok", "sleep", "fail"]})
    process = started(parent)
    wait_for((parent / "do_sleep/pid").exists)
    shown = search(parent, "--status")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[1] == "1 of 3 children have ended"
    assert lines[2] == "1 completed, 1 running, 1 waiting"
    assert lines[3] == "best: do_ok: accuracy 0.9000 at epoch 2"
    assert lines[5].split()[:2] == ["do_sleep", "0/3"]
    assert process.poll() is None


def test_the_status_is_of_the_search_as_it_was_called(tmp_path: Path) -> None:
    parent = make(tmp_path, {"alpha": [0.1, 0.2]})
    assert search(parent, "--overrides", "seed=3", "temperature=2", "--max_trials", "1").returncode == 0
    shown = search(parent, "--status")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[1:3] == ["1 of 1 children have ended", "1 completed"]
    make(parent, {"alpha": [0.1, 0.2]}, PARAMS | {"num_epochs": 2, "seed": 5})
    assert search(parent, "--status").returncode == 0  # it looks, and judges nothing


def test_a_dry_run_refuses_what_the_search_would_refuse_below_its_table(tmp_path: Path) -> None:
    parent = make(tmp_path, {"alpha": [0.1, 1.5]})
    done = search(parent, "--dry_run")
    assert done.returncode == 2
    assert "| alpha_1.5 " in done.stdout
    assert done.stderr == f"{parent}/alpha_1.5/params.json: loss.alpha: 1.5 is above 1\n"
    parent = make(tmp_path, {"alpha": [0.1]})
    assert search(parent).returncode == 0
    make(tmp_path, {"alpha": [0.1]}, PARAMS | {"seed": 5})
    done = search(parent, "--dry_run")
    assert done.returncode == 2
    assert "refuse: seed: 'absent' -> 5; --force" in done.stdout


def test_what_was_given_up_is_not_given_up_again_by_the_command_that_goes_on(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    parent = make(tmp_path, {"stub.do": ["sleep"]})
    process = started(parent, "--rerun", "all")
    wait_for((parent / "do_sleep/pid").exists)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=180)[1].endswith("the same command without --rerun all goes on from there\n")


def test_two_searches_do_not_write_one_journal(tmp_path: Path, started: Callable[..., subprocess.Popen[str]]) -> None:
    space = {"alpha": {"low": 0.1, "high": 0.9}, "strategy": "random", "max_trials": 2}
    parent = make(tmp_path, space, PARAMS | {"stub": {"do": "sleep"}})
    started(parent)
    wait_for(lambda: bool(list(parent.glob("*/pid"))))
    done = search(parent)
    assert done.returncode == 75
    assert done.stderr == f"{parent} is searched by another process; wait for it or stop it\n"


def test_changed_params_are_refused_and_by_force_the_results_are_given_up(tmp_path: Path) -> None:
    parent = make(tmp_path, {"alpha": [0.5]})
    assert search(parent).returncode == 0
    (parent / "alpha_0.5/best.pth.tar").write_text("old")
    make(parent, {"alpha": [0.5]}, PARAMS | {"seed": 9})
    refused = search(parent)
    assert refused.returncode == 2
    assert "seed: 'absent' -> 9" in refused.stderr
    assert (parent / "alpha_0.5/best.pth.tar").exists()
    done = search(parent, "--force")
    assert done.returncode == 0, done.stderr
    assert json.loads((parent / "alpha_0.5/params.json").read_text())["seed"] == 9
    assert len(json.loads((parent / "alpha_0.5/run.json").read_text())["attempts"]) == 1
    assert search(parent).returncode == 0


def test_a_killed_search_leaves_children_that_the_next_one_waits_for(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    stub = {"do": "epochs"}
    parent = make(tmp_path, {"alpha": [0.1, 0.2, 0.3]}, {**PARAMS, "num_epochs": 10, "stub": stub})
    (parent / "hold").touch()  # the runs wait after their first epoch as long as this is there
    process = started(parent, "--jobs", "2")
    wait_for(lambda: len(list(parent.glob("*/metrics.jsonl"))) == 2)
    process.kill()
    process.wait()
    os.kill(int((parent / "alpha_0.2/pid").read_text()), signal.SIGKILL)
    process = started(parent, "--jobs", "2")
    wait_for(lambda: "alpha_0.1 is running elsewhere: process " in (parent / "search_hyperparameters.log").read_text())
    (parent / "hold").unlink()
    assert process.wait(timeout=180) == 0
    for name in ("alpha_0.1", "alpha_0.2", "alpha_0.3"):
        assert [record["epoch"] for record in read_journal(parent / name)] == list(range(1, 11))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeout", "soon"], "'soon' is not a time such as 90s, 15m, 8h or 2d"),
        (["--timeout", "0"], "'0' is not a time"),
        (["--retry", "-1"], "no whole number from 0 on"),
        (["--seeds", "1", "1"], "--seeds: 1 is there twice"),
        (["--launcher_options", "x"], "--launcher_options: 'x' is not key=value"),
        (["--launcher_options", "x=1"], "--launcher_options: this machine has none"),
        (["--gpus", "99"], "--gpus: there is no GPU '99'"),
        (["--strategy", "random"], "max_trials"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = search(make(tmp_path, {"alpha": [0.1]}), *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.json", "search.json"]


def test_times_have_units() -> None:
    assert [search_hyperparams.duration(given) for given in ("90", "1.5m", "8h", "2d")] == [90, 90, 28800, 172800]


def test_a_search_with_the_real_train_py_trains_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    params = {
        "num_epochs": 1,
        "dataset": {"name": "synthetic"},
        "student": {"name": "tiny"},
        "loss": {"name": "ce"},
        "optimizer": {"name": "adam", "learning_rate": 0.01},
    }
    parent = make(tmp_path, {"learning_rate": [0.01]}, params)
    line = [sys.executable, "search_hyperparams.py", "--parent_dir", str(parent), "--device", "cpu"]
    for summary in ("1 done, 0 skipped", "0 done, 1 skipped"):
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert summary in done.stdout
    assert (parent / "learning_rate_0.01" / "best.pth.tar").is_file()

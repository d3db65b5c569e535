"""The experiment directory under faults: kills, damage, other runs, full disks."""

from __future__ import annotations

import collections
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers import ROOT, Make, Script, read_journal, snapshot
from test_train import states_equal

import experiment
import train
import utils
from checkpoint import load_checkpoint
from experiment import Experiment, is_locked, may_change, read_status
from report.collect import collect
from utils import Params, RunError

STATE = {"epoch": 3, "step": 0, "net": {"section": {"name": "tiny"}}, "state_dict": {"weight": torch.arange(300.0)}}


# --- what may differ --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "may"),
    [
        ("teacher.model_dir", True),
        ("teacher.0.model_dir", True),
        ("teacher.12.cache", True),
        ("teacher.0.top_k", False),
        ("teacher.0.restore_file", False),
        ("teacher.0.weight", False),
        ("combine_teachers", False),
        ("loss.0.model_dir", False),
        ("num_epochs", True),
    ],
)
def test_where_teachers_are_may_change_and_how_they_answer_may_not(key: str, may: bool) -> None:
    assert may_change(key) == may


# --- resume under damage ----------------------------------------------------------------------------------


@pytest.fixture
def half_done(script: Script, make_experiment: Make) -> tuple[Path, Path]:
    """Returns (a directory trained for 3 of 4 epochs, the same experiment trained without interruption)."""
    whole = make_experiment("whole", num_epochs=4, schedule={"name": "constant"})
    cut = make_experiment("cut", num_epochs=4, schedule={"name": "constant"})
    script(train, "--model_dir", whole)
    script(train, "--model_dir", cut, "--overrides", "num_epochs=3")
    return cut, whole


def same_result(a: Path, b: Path) -> bool:
    names = ("metrics.jsonl", "metrics_val_best_weights.json", "metrics_val_last_weights.json")
    files = all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    weights = all(states_equal(a / f"{which}.pth.tar", b / f"{which}.pth.tar") for which in ("best", "last"))
    return files and weights


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(
    script: Script, half_done: tuple[Path, Path], damage: bytes | None
) -> None:
    cut, whole = half_done
    if damage is None:
        (cut / "last.pth.tar").unlink()
    else:
        (cut / "last.pth.tar").write_bytes(damage)
    ended = script(train, "--model_dir", cut)
    assert ended.status == 0
    assert "going on from" in ended.err
    assert "going on after epoch 2, step 0" in ended.out
    assert same_result(cut, whole)


def test_two_damaged_checkpoints_end_the_run_instead_of_starting_anew(
    script: Script, half_done: tuple[Path, Path]
) -> None:
    cut, _ = half_done
    for name in ("last", "prev"):
        (cut / f"{name}.pth.tar").write_bytes(b"garbage")
    before = snapshot(cut)
    ended = script(train, "--model_dir", cut)
    assert ended.status == 1
    assert "--restart trains from the beginning" in ended.err
    assert snapshot(cut) == before
    assert script(train, "--model_dir", cut, "--restart").status == 0


def test_params_are_compared_with_the_checkpoint_too(script: Script, half_done: tuple[Path, Path]) -> None:
    cut, whole = half_done
    (cut / "run.json").unlink()
    ended = script(train, "--model_dir", cut, "--overrides", "batch_size=16")
    assert ended.status == 2
    assert "dataset.batch_size: 32 -> 16" in ended.err
    assert script(train, "--model_dir", cut).status == 0
    assert same_result(cut, whole)


def test_a_journal_that_lost_epochs_is_not_continued(script: Script, half_done: tuple[Path, Path]) -> None:
    cut, _ = half_done
    (cut / "metrics.jsonl").write_bytes((cut / "metrics.jsonl").read_bytes()[:-5])
    ended = script(train, "--model_dir", cut)
    assert ended.status == 1
    assert "metrics.jsonl: shorter than its checkpoint says" in ended.err


def test_a_run_json_of_another_shape_is_one_line(script: Script, half_done: tuple[Path, Path]) -> None:
    cut, _ = half_done
    (cut / "run.json").write_text('{"attempts": 5}')
    ended = script(train, "--model_dir", cut)
    assert ended.status == 1
    assert "not of the shape that train.py writes" in ended.err


def test_results_without_a_checkpoint_are_not_trained_over(script: Script, half_done: tuple[Path, Path]) -> None:
    cut, _ = half_done
    for name in ("last", "prev", "best"):
        (cut / f"{name}.pth.tar").unlink()
    before = snapshot(cut)
    ended = script(train, "--model_dir", cut)
    assert ended.status == 1
    assert "3 epochs are done but their checkpoint is gone" in ended.err
    assert snapshot(cut) == before


def test_run_json_tells_of_the_last_hundred_attempts(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    script(train, "--model_dir", folder, "--overrides", "num_epochs=1")
    run = json.loads((folder / "run.json").read_text())
    run["attempts"] = [run["attempts"][0] | {"pid": number} for number in range(150)]
    (folder / "run.json").write_text(json.dumps(run))
    script(train, "--model_dir", folder)
    pids = [attempt["pid"] for attempt in json.loads((folder / "run.json").read_text())["attempts"]]
    assert pids == [*range(51, 150), os.getpid()]


def test_a_torn_line_in_the_journal_is_cut_off(script: Script, half_done: tuple[Path, Path]) -> None:
    cut, whole = half_done
    with (cut / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 4, "train": {"lo')
    assert [record["epoch"] for record in read_journal(cut)] == [1, 2, 3]  # readers do not stumble over it
    assert script(train, "--model_dir", cut).status == 0
    assert same_result(cut, whole)


def test_what_follows_from_the_checkpoint_is_restored(script: Script, half_done: tuple[Path, Path]) -> None:
    cut, whole = half_done
    (cut / "metrics_val_last_weights.json").write_text("{half")
    (cut / ".best.pth.tar.1.abc.tmp").write_bytes(b"left by a kill")
    assert script(train, "--model_dir", cut).status == 0
    assert same_result(cut, whole)
    assert not list(cut.glob(".*.tmp"))


def test_a_lost_best_checkpoint_is_said_and_the_best_of_the_rest_is_kept(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_experiment(num_epochs=4, schedule={"name": "constant"})
    accuracies = iter([0.9, 0.5, 0.6, 0.7])
    scored = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: scored(*a, **k) | {"accuracy": next(accuracies)})
    script(train, "--model_dir", folder, "--overrides", "num_epochs=2")
    assert load_checkpoint(folder / "best.pth.tar")[0]["epoch"] == 1
    (folder / "best.pth.tar").unlink()
    ended = script(train, "--model_dir", folder)
    assert ended.status == 0
    assert "the weights of epoch 1 are in no other file" in ended.err
    assert load_checkpoint(folder / "best.pth.tar")[0]["epoch"] == 4
    assert json.loads((folder / "metrics_val_best_weights.json").read_text())["accuracy"] == 0.7


def test_the_first_of_equal_epochs_stays_best_and_a_resumed_run_keeps_it(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_experiment(num_epochs=4, schedule={"name": "constant"})
    accuracies = iter([0.5, 0.8, 0.8, 0.3])
    scored = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: scored(*a, **k) | {"accuracy": next(accuracies)})
    script(train, "--model_dir", folder, "--overrides", "num_epochs=3")
    best = (folder / "best.pth.tar").read_bytes()
    script(train, "--model_dir", folder)  # in the ancestor the first resumed epoch always became best
    assert (folder / "best.pth.tar").read_bytes() == best
    assert json.loads((folder / "metrics_val_best_weights.json").read_text())["epoch"] == 2


def test_other_data_than_the_run_began_with_is_refused(
    script: Script, half_done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, _ = half_done
    create = train.data.create

    def altered(*arguments: Any, **options: Any) -> Any:
        import dataclasses

        return dataclasses.replace(create(*arguments, **options), fingerprint="0" * 64)

    monkeypatch.setattr(train.data, "create", altered)
    before = snapshot(cut)
    ended = script(train, "--model_dir", cut)
    assert ended.status == 2
    assert "the data is not what this run began with" in ended.err
    assert snapshot(cut) == before


def test_a_teacher_that_was_replaced_is_refused_on_resume(script: Script, make_experiment: Make) -> None:
    teacher = make_experiment("teacher")
    script(train, "--model_dir", teacher)
    student = make_experiment("student", teacher=str(teacher), loss={"name": "kd", "alpha": 0.5, "temperature": 2.0})
    script(train, "--model_dir", student, "--overrides", "num_epochs=1")
    script(train, "--model_dir", teacher, "--restart", "--seed", "9")
    ended = script(train, "--model_dir", student)
    assert ended.status == 2
    assert "the teacher is not what this run began with" in ended.err


# --- kills ------------------------------------------------------------------------------------------------

DURABLE = ("open", "fsync", "replace", "rename", "link", "unlink", "truncate")


def done_in_a_fork(folder: Path, kill_at: int, work: Callable[[], object]) -> bool:
    """Works on a folder in a forked process that kills itself (SIGKILL) before its n-th durable system call.

    Returns:
        Whether it came to its end instead.
    """
    pid = os.fork()
    if not pid:
        try:
            count = 0

            def counted(call: Callable[..., Any]) -> Callable[..., Any]:
                def wrapper(*arguments: Any, **options: Any) -> Any:
                    nonlocal count
                    if str(folder) in str(arguments[0]) or isinstance(arguments[0], int):
                        count += 1
                        if count == kill_at:
                            os.kill(os.getpid(), signal.SIGKILL)
                    return call(*arguments, **options)

                return wrapper

            for name in DURABLE:  # pathlib calls these through the os module
                setattr(os, name, counted(getattr(os, name)))
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), f"ended with {status}"
    return status == 0


def trained_in_a_fork(folder: Path, kill_at: int) -> bool:
    return done_in_a_fork(folder, kill_at, lambda: train_quietly(folder))


def train_quietly(folder: Path, *options: str) -> None:
    sys.argv = ["train.py", "--model_dir", str(folder), "--quiet", *options]
    assert train.main() == 0


@pytest.mark.slow
def test_a_kill_before_any_durable_call_loses_nothing(script: Script, make_experiment: Make) -> None:
    changes: dict[str, Any] = {"dataset": {"train_size": 64, "augmentation": "none"}, "checkpoint_minutes": 1e-9}
    whole = make_experiment("whole", **changes)
    script(train, "--model_dir", whole)
    kills = 0
    for kill_at in range(1, 500):
        cut = make_experiment(f"cut_{kill_at}", **changes)
        ended = trained_in_a_fork(cut, kill_at)
        if not ended:
            kills += 1
            assert trained_in_a_fork(cut, 10_000), "the next run must come to its end"
        assert same_result(cut, whole), f"after a kill before call {kill_at}"
        assert not list(cut.glob(".*.tmp"))
        if ended:
            break
    assert kills > 50  # else the calls were not intercepted


@pytest.mark.parametrize("seed", [1, 2], ids=["same params", "other params"])
@pytest.mark.parametrize("restart", [False, True], ids=["cleared", "restarted"])
def test_a_removal_that_is_killed_anywhere_is_finished_by_who_trains_next(
    script: Script, make_experiment: Make, restart: bool, seed: int
) -> None:
    changes: dict[str, Any] = {"dataset": {"train_size": 64, "augmentation": "none"}}
    used, whole = make_experiment("used", **changes), make_experiment("whole", **changes, seed=seed)
    for folder in (used, whole):
        assert script(train, "--model_dir", folder).status == 0
    scores = ("metrics_test_best_weights.json", "calibration_val_best.json")
    for name in scores:
        (used / name).write_text("{}")
    halves = 0
    for kill_at in range(1, 100):
        cut = used.with_name(f"cut_{kill_at}")
        shutil.copytree(used, cut)
        clear = Experiment(cut).clear
        ended = done_in_a_fork(cut, kill_at, partial(train_quietly, cut, "--restart") if restart else clear)
        if ended or read_status(cut) == "stale":
            break  # the removal is over
        if attempts_in(cut):
            assert snapshot(cut).items() >= snapshot(used).items(), "nothing goes before run.json says so"
            continue
        assert read_status(cut) in ("interrupted", "pending")
        halves += read_status(cut) == "interrupted"
        shutil.copyfile(whole / "params.json", cut / "params.json")
        assert script(train, "--model_dir", cut).status == 0, f"after a kill before call {kill_at}"
        assert same_result(cut, whole)
        assert attempts_in(cut) == 1
        assert len(list(cut.glob("events.out.tfevents.*"))) == 1
        assert not [name for name in scores if (cut / name).exists()]
    assert halves > 8


def attempts_in(folder: Path) -> int:
    path = folder / "run.json"
    return len(utils.read_json(path).get("attempts", [])) if path.exists() else 0


@pytest.mark.parametrize("rounds", [1, pytest.param(25, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_ends_with_the_bits_of_an_uninterrupted_run(
    script: Script, make_experiment: Make, rounds: int
) -> None:
    changes: dict[str, Any] = {"num_epochs": 16, "dataset": {"train_size": 1280}, "checkpoint_minutes": 0.002}
    whole = make_experiment("whole", **changes)
    script(train, "--model_dir", whole)
    draw, kills = random.Random(5), 0
    for number in range(rounds):
        cut = make_experiment(f"cut_{number}", **changes)
        command = [sys.executable, str(ROOT / "train.py"), "--model_dir", str(cut), "--quiet"]
        for attempt in range(1, 100):
            process = subprocess.Popen(command, start_new_session=True)
            if attempt <= 2:
                while process.poll() is None and attempts_in(cut) < attempt:
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 1))
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            if process.wait() == 0:
                break
            assert process.returncode == -signal.SIGKILL
            kills += 1
            assert read_status(cut) in ("stale", "completed")
        assert same_result(cut, whole)
    assert kills >= rounds


# --- other processes --------------------------------------------------------------------------------------


def test_two_runs_started_together_do_not_share_a_directory(make_experiment: Make) -> None:
    folder = make_experiment(num_epochs=40)
    command = [sys.executable, str(ROOT / "train.py"), "--model_dir", str(folder), "--quiet"]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    statuses = sorted(run.returncode for run in runs)
    if statuses != [0, 0]:  # one that waited for the lock may find the run finished
        assert statuses == [0, 75], errors
        assert any("is in use by process" in error for error in errors)
    assert [record["epoch"] for record in read_journal(folder)] == list(range(1, 41))


def test_a_locked_directory_is_left_alone_with_status_75(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "LOCK_SECONDS", 0.1)
    folder = make_experiment()
    script(train, "--model_dir", folder, "--overrides", "num_epochs=1")
    before = snapshot(folder)
    with FileLock(folder / ".lock"):
        assert is_locked(folder)
        ended = script(train, "--model_dir", folder)
    assert ended.status == 75
    assert "is in use by process" in ended.err
    assert snapshot(folder) == before


def test_a_run_whose_directory_was_taken_over_writes_nothing_more(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    params = Params.load(folder, train.schema.resolve)
    run = Experiment(folder)
    with pytest.raises(RunError, match="taken over") as ended, run.attempt(params, {"data": None}):  # noqa: PT012
        stolen = json.loads((folder / "run.json").read_text()) | {"run_id": "another"}
        (folder / "run.json").write_text(json.dumps(stolen))
        before = snapshot(folder)
        run.record(STATE, {"epoch": 1, "learning_rate": 0.1, "train": {}, "val": {"accuracy": 0.5}}, {})
    assert ended.value.exit_status == 75
    assert snapshot(folder) == before


def test_a_directory_that_vanishes_ends_the_run_and_is_not_made_again(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_experiment()
    scored = train.evaluate

    def vanish(*arguments: Any, **options: Any) -> dict[str, float]:
        if folder.exists():
            folder.rename(folder.with_name("moved"))
        return scored(*arguments, **options)

    monkeypatch.setattr(train, "evaluate", vanish)
    ended = script(train, "--model_dir", folder)
    assert ended.status == 1
    assert "has changed under this run" in ended.err
    assert not folder.exists()


def test_states_are_told_apart(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    assert read_status(folder) == "pending"
    script(train, "--model_dir", folder)
    assert read_status(folder) == "completed"
    run = json.loads((folder / "run.json").read_text()) | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(run))
    assert read_status(folder) == "stale"  # nobody holds the lock
    with FileLock(folder / ".lock"):
        assert read_status(folder) == "running"


def test_whether_a_run_lives_is_seen_without_permission_to_write(make_experiment: Make) -> None:
    folder = make_experiment()
    (folder / ".lock").touch(mode=0o444)
    opened = os.open(folder / ".lock", os.O_RDONLY)
    try:
        assert not is_locked(folder)
        fcntl.flock(opened, fcntl.LOCK_EX)
        assert is_locked(folder)
    finally:
        os.close(opened)


def test_readers_never_find_half_a_file(make_experiment: Make) -> None:
    folder = make_experiment(num_epochs=25)
    command = [sys.executable, str(ROOT / "train.py"), "--model_dir", str(folder), "--quiet"]
    process = subprocess.Popen(command)
    reads: collections.Counter[str] = collections.Counter()
    while process.poll() is None:
        for path in folder.glob("*.json"):
            utils.read_json(path)
            reads[path.name] += 1
        read_journal(folder)
        if (folder / "last.pth.tar").exists():
            load_checkpoint(folder / "last.pth.tar")
            reads["last.pth.tar"] += 1
    assert process.returncode == 0
    assert min(reads[name] for name in ("run.json", "metrics_val_last_weights.json", "last.pth.tar")) > 20


# --- storage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_disk_keeps_the_previous_checkpoint_and_the_run_goes_on_later(
    script: Script, half_done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    cut, whole = half_done
    good = load_checkpoint(cut / "last.pth.tar")[1]
    sync = os.fsync

    def failing(handle: int) -> None:
        if "last.pth.tar" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(number, os.strerror(number))
        sync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        ended = script(train, "--model_dir", cut)
    assert ended.status == 1
    assert "cannot write" in ended.err
    assert "last.pth.tar" in ended.err
    assert "Traceback" not in ended.err
    if number == errno.ENOSPC:
        assert "need " in ended.err
        assert "free some space" in ended.err
    assert json.loads((cut / "run.json").read_text())["reason"] == "storage"
    assert load_checkpoint(cut / "last.pth.tar")[1] == good
    assert not list(cut.glob(".*.tmp"))
    assert script(train, "--model_dir", cut).status == 0
    assert same_result(cut, whole)


def test_a_directory_that_cannot_be_written_is_found_before_the_first_epoch(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_experiment()
    (folder / "run.json").mkdir()  # as root, permissions stop nobody; this does
    ended = script(train, "--model_dir", folder)
    assert ended.status == 2
    assert "run.json" in ended.err
    assert not (folder / "metrics.jsonl").exists()


def test_links_are_replaced_and_never_written_through(script: Script, make_experiment: Make, tmp_path: Path) -> None:
    folder, other = make_experiment(), tmp_path / "precious"
    other.write_text("precious")
    for name in ("run.json", "metrics_val_last_weights.json"):
        (folder / name).symlink_to(other)
    (folder / "run.json").unlink()
    assert script(train, "--model_dir", folder).status == 0
    assert other.read_text() == "precious"
    assert not (folder / "metrics_val_last_weights.json").is_symlink()


def test_without_hard_links_files_are_copied(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder = make_experiment()
    assert script(train, "--model_dir", folder).status == 0
    epoch = json.loads((folder / "metrics_val_best_weights.json").read_text())["epoch"]
    assert load_checkpoint(folder / "best.pth.tar")[0]["epoch"] == epoch
    assert load_checkpoint(folder / "prev.pth.tar")[0]["epoch"] == 1


# --- a search gives results up, or says why it has ended a run -----------------------------------------------


def test_a_cleared_directory_trains_as_a_new_one(script: Script, half_done: tuple[Path, Path]) -> None:
    cut, whole = half_done
    Experiment(cut).clear()
    assert sorted(path.name for path in cut.iterdir()) == [".lock", "params.json", "train.log"]
    assert script(train, "--model_dir", cut).status == 0
    assert same_result(cut, whole)


def test_clearing_keeps_checkpoints_that_no_run_has_written(make_experiment: Make) -> None:
    folder = make_experiment()
    torch.save({"state_dict": {}}, folder / "best.pth.tar")
    Experiment(folder).clear()
    assert (folder / "kept_best.pth.tar").is_file()


def test_a_clearing_that_is_killed_never_leaves_a_completed_run(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_experiment()
    script(train, "--model_dir", folder)
    unlink, seen = Path.unlink, []

    def look(path: Path, missing_ok: bool = False) -> None:
        if (folder / "run.json").exists():
            seen.append(read_status(folder))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", look)
    Experiment(folder).clear()
    assert set(seen) == {"interrupted"}
    assert len(seen) > 6


@pytest.fixture
def half_cleared(script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a trained directory whose removal was cut off when the journal had gone."""
    folder, unlink = make_experiment("half_cleared"), Path.unlink
    script(train, "--model_dir", folder)

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.name == "last.pth.tar":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", fail)
        with pytest.raises(KeyboardInterrupt):
            Experiment(folder).clear()
    assert (folder / "last.pth.tar").exists()
    return folder


def test_a_removal_that_was_cut_off_may_be_begun_again(half_cleared: Path) -> None:
    Experiment(half_cleared).clear()
    assert sorted(path.name for path in half_cleared.iterdir()) == [".lock", "params.json", "train.log"]


def test_weights_that_are_being_removed_are_not_gone_on_from(script: Script, half_cleared: Path) -> None:
    ended = script(train, "--model_dir", half_cleared, "--restore_file", "last")
    assert ended.status == 2
    assert "it is being removed" in ended.err


def test_a_checkpoint_put_into_a_directory_that_is_being_removed_is_not_trained_over(
    script: Script, half_cleared: Path
) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, half_cleared / "best.pth.tar")
    ended = script(train, "--model_dir", half_cleared)
    assert ended.status == 2
    assert "no run of this directory has written it" in ended.err
    Experiment(half_cleared).mark("failed", "timeout")
    assert (half_cleared / "kept_best.pth.tar").is_file()


def test_a_run_that_ended_before_it_began_is_marked_too(
    script: Script, half_done: tuple[Path, Path], half_cleared: Path, make_experiment: Make
) -> None:
    fresh, odd, (without_record, whole) = make_experiment("fresh"), make_experiment("odd"), half_done
    (odd / "run.json").write_text('{"status": "running"}')
    (without_record / "run.json").unlink()
    for folder in (fresh, odd, half_cleared, without_record):
        Experiment(folder).mark("failed", "timeout")
        run = json.loads((folder / "run.json").read_text())
        assert (read_status(folder), run["reason"], run["attempts"]) == ("failed", "timeout", [])
        [row], problems = collect(folder)
        assert (row.state, row.status, problems) == ("failed", "failed (timeout) at epoch 0 of ?", [])
        ended = script(train, "--model_dir", folder)
        assert ended.status == 0, ended
        assert read_status(folder) == "completed"
        assert attempts_in(folder) == 1
    assert same_result(odd, fresh)
    assert same_result(half_cleared, fresh)
    assert same_result(without_record, whole)


def test_a_mark_makes_no_checkpoint_a_runs_own(script: Script, make_experiment: Make) -> None:
    folder, other = make_experiment("folder"), make_experiment("other")
    script(train, "--model_dir", other)
    shutil.copyfile(other / "best.pth.tar", folder / "best.pth.tar")
    Experiment(folder).mark("failed", "timeout")
    ended = script(train, "--model_dir", folder)
    assert ended.status == 2
    assert "no run of this directory has written it" in ended.err


@pytest.mark.parametrize("content", ['{"attempts": 5}', "{", None])
def test_what_cannot_be_marked_is_left_alone(make_experiment: Make, content: str | None) -> None:
    folder = make_experiment()
    if content is None:
        shutil.rmtree(folder)
    else:
        (folder / "run.json").write_text(content)
    Experiment(folder).mark("failed", "timeout")
    assert not folder.exists() if content is None else (folder / "run.json").read_text() == content


def test_who_has_ended_a_run_may_say_why(script: Script, half_done: tuple[Path, Path]) -> None:
    cut, whole = half_done
    Experiment(cut).mark("pruned")
    assert read_status(cut) == "pruned"
    assert json.loads((cut / "run.json").read_text())["attempts"][-1]["status"] == "pruned"
    assert script(train, "--model_dir", cut).status == 0  # and it may go on all the same
    assert same_result(cut, whole)


def test_a_run_that_goes_on_elsewhere_is_not_marked(make_experiment: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "LOCK_SECONDS", 0.1)
    folder = make_experiment()
    (folder / "run.json").write_text('{"status": "running"}')
    with FileLock(folder / ".lock"):
        Experiment(folder).mark("pruned")
        assert read_status(folder) == "running"

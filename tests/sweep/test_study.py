"""Claims about running a search: one child never stops the others, and what each of them needs decides what is done."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sweep import study
from sweep.children import Child, Planner, write
from sweep.launchers.local import Local
from sweep.space import Objective, Search, grid
from sweep.study import Handed, Rules, Study, Tally, status_of
from sweep.trials import Fixed
from sweep.view import View
from utils import RunError

MakeParent = Callable[..., Path]


def plan(parent: Path) -> list[Child]:
    planner = Planner.read(parent)
    return planner.children(grid(planner.search))


def run(children: list[Child], slots: int = 1, rules: Rules | None = None, search: Search | None = None) -> int:
    launcher = Local([None] * slots)
    return Study(Fixed(children), launcher, rules or Rules(), search or Search({}), "parent").run(View())


def search(parent: Path, slots: int = 1, **rules: Any) -> int:
    """Plans and runs a grid, as the command does."""
    planner = Planner.read(parent)
    children = planner.children(grid(planner.search))
    write(children)
    return run(children, slots, Rules(**rules), planner.search)


def put_run(child: Child, **run: Any) -> None:
    (child.dir / "run.json").write_text(json.dumps(run))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def num_attempts(child_dir: Path) -> int:
    return len(read(child_dir / "run.json")["attempts"])


def snapshot(parent: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}


def test_finished_children_are_not_started_again(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"alpha": [0.1, 0.2]})
    assert search(parent) == 0
    before = snapshot(parent)
    assert search(parent) == 0
    assert snapshot(parent) == before
    assert "0 done, 2 skipped, 0 failed, 0 not started" in lines
    assert "best: alpha_0.2: accuracy 0.2000 at epoch 2" in lines


def test_interrupted_children_and_those_of_a_killed_search_go_on(make_parent: MakeParent, lines: list[str]) -> None:
    children = plan(make_parent({"alpha": [0.1, 0.2]}))
    write(children)
    put_run(children[0], status="interrupted", epoch=1)
    put_run(children[1], status="running", epoch=1)
    assert run(children) == 0
    assert all(child.is_finished() for child in children)


def test_failed_children_are_left_alone_until_it_is_asked_for(make_parent: MakeParent, lines: list[str]) -> None:
    children = plan(make_parent({"alpha": [0.1, 0.2]}))
    write(children)
    put_run(children[0], status="failed", reason="storage", epoch=1)
    assert run(children) == 1
    assert not (children[0].dir / "console.log").exists()
    told = "alpha_0.1 failed in an earlier search (storage); --rerun failed tries it again"
    assert [line for line in lines if told in line][-1] == told
    assert run(children, rules=Rules(rerun="failed")) == 0


@pytest.mark.parametrize(("rerun", "left"), [("none", ["mine"]), ("stale", []), ("all", [])])
def test_what_is_run_anew_has_lost_its_earlier_results(
    make_parent: MakeParent, lines: list[str], rerun: str, left: list[str]
) -> None:
    children = plan(make_parent({"alpha": [0.1]}))
    write(children)
    put_run(children[0], status="interrupted", epoch=1)
    (children[0].dir / "metrics_val_last_weights.json").write_text('"mine"')
    assert run(children, rules=Rules(rerun=rerun)) == 0
    assert [read(path) for path in children[0].dir.glob("metrics_*")] == left
    assert num_attempts(children[0].dir) == 1


def test_all_are_run_anew_where_that_is_asked_for_but_each_only_once(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"alpha": [0.1], "stub.do": ["ok", "fail_once"]})
    search(parent)
    assert search(parent, rerun="all", retry=1) == 0
    assert [num_attempts(parent / f"alpha_0.1_do_{do}") for do in ("ok", "fail_once")] == [1, 2]


def test_a_failure_is_tried_again_as_often_as_allowed(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"stub.do": ["segfault", "fail_once", "diverge", "fail"]})
    assert search(parent, retry=2) == 1
    assert [num_attempts(parent / f"do_{do}") for do in ("segfault", "fail_once", "diverge", "fail")] == [3, 2, 1, 1]
    assert sum("tried again (1 of 2)" in line for line in lines) == 2
    assert sum("tried again (2 of 2)" in line for line in lines) == 1


def test_the_last_child_is_tried_again_like_the_others(make_parent: MakeParent, lines: list[str]) -> None:
    assert search(make_parent({"stub.do": ["fail_once"]}), retry=1) == 0


def test_a_child_that_others_run_is_waited_for_and_counts_as_done(make_parent: MakeParent, lines: list[str]) -> None:
    children = plan(make_parent({"alpha": [0.1, 0.2]}))
    write(children)
    put_run(children[0], status="running", epoch=1, attempts=[{"pid": 7, "host": "far away"}])
    lock = FileLock(children[0].dir / ".lock", thread_local=False)
    lock.acquire()

    def finish() -> None:
        while not children[1].is_finished():
            time.sleep(0.02)
        put_run(children[0], status="completed", epoch=3, best={"accuracy": 0.7, "epoch": 3})
        lock.release()

    other = threading.Thread(target=finish)
    other.start()
    assert run(children) == 0
    other.join()
    assert not (children[0].dir / "console.log").exists()
    assert "alpha_0.1 is running elsewhere: process 7 on far away" in lines
    assert "1 done, 1 skipped, 0 failed, 0 not started" in lines
    assert lines[-1] == "best: alpha_0.1: accuracy 0.7000 at epoch 3"


def test_a_child_that_others_have_killed_is_taken_over(make_parent: MakeParent, lines: list[str]) -> None:
    children = plan(make_parent({"alpha": [0.1]}))
    write(children)
    put_run(children[0], status="running", epoch=1)
    lock = FileLock(children[0].dir / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(0.5, lock.release).start()
    assert run(children) == 0
    assert children[0].is_finished()


def test_no_failure_stops_the_others_and_each_is_told_twice(
    make_parent: MakeParent, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "MAX_CONSOLE_BYTES", 100_000)
    parent = make_parent({"stub.do": ["fail", "segfault", "flood", "nothing", "locked", "ok"]})
    assert search(parent, 2) == 1
    failures = {
        "do_fail": "exit status 2 (teacher): the teacher has 100 classes?[31m but the student has 10",
        "do_segfault": "killed by signal 11 (Segmentation fault): --- 2",
        "do_flood": "killed by signal 9 (Killed) (console.log is larger than 100000 bytes; remove it): xxx",
        "do_nothing": "exit status 0, but run.json is not of a completed run: --- 2",
    }
    for name, words in failures.items():
        told = [line for line in lines if f"{name} failed: {words}" in line]
        assert [line.startswith("[") for line in told] == [True, False]
    assert any(line.startswith("do_locked is running elsewhere") for line in lines)
    assert any(line.endswith("/6] do_locked: accuracy 0.9000 at epoch 2") for line in lines)
    assert any(line.endswith("/6] do_ok: accuracy 0.9000 at epoch 2") for line in lines)
    assert "2 done, 0 skipped, 4 failed, 0 not started" in lines


def test_at_the_first_failure_all_stop_where_that_is_asked_for(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"stub.do": ["sleep", "fail", "ok"]}, stub={"after": "do_sleep"})
    assert search(parent, 2, fail_fast=True) == 1
    assert read(parent / "do_sleep/run.json")["status"] == "interrupted"
    assert not (parent / "do_ok/run.json").exists()
    assert "0 done, 0 skipped, 1 failed, 1 interrupted, 1 not started" in lines


def test_after_its_time_a_search_saves_and_can_go_on(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"stub.do": ["sleep", "ok"]})
    with pytest.raises(
        RunError, match=r"after 0 of 2 children: the time of --timeout is over; the same command"
    ) as ended:
        search(parent, timeout=3.0)  # by then it has begun, on a busy machine too
    assert ended.value.exit_status == 75
    assert read(parent / "do_sleep/run.json")["status"] == "interrupted"


def test_a_child_that_takes_too_long_has_failed_and_the_others_go_on(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"stub.do": ["sleep", "ok"]})
    assert search(parent, trial_timeout=4.0) == 1
    assert read(parent / "do_sleep/run.json")["reason"] == "timeout"
    assert "do_sleep failed: longer than --trial_timeout, after epoch 1" in lines
    assert read(parent / "do_ok/run.json")["status"] == "completed"


def test_a_child_that_does_not_end_when_told_to_is_killed(
    make_parent: MakeParent, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "GRACE_SECONDS", 0.2)
    assert search(make_parent({"stub.do": ["stubborn"]}), trial_timeout=0.5) == 1


def test_with_the_stop_file_no_more_are_started_and_those_that_run_end_normally(
    make_parent: MakeParent, lines: list[str], tmp_path: Path
) -> None:
    parent = make_parent({"alpha": [0.1, 0.2]}, stub={"do": "ok", "seconds": 0.5})
    stop_file = tmp_path / "stop"
    threading.Timer(0.2, stop_file.touch).start()
    with pytest.raises(RunError, match=r"after 1 of 2 children: .*stop is there \(remove it to go on\)") as ended:
        search(parent, stop_file=stop_file)
    assert ended.value.exit_status == 75
    assert read(parent / "alpha_0.1/run.json")["status"] == "completed"
    assert not (parent / "alpha_0.2/run.json").exists()


def test_an_earlier_attempts_reason_is_not_given_for_this_one(make_parent: MakeParent, lines: list[str]) -> None:
    children = plan(make_parent({"stub.do": ["locked"]}))
    write(children)
    child = children[0]
    put_run(child, status="failed", reason="diverged", epoch=1)
    child.run_before = child.read_run()
    (child.dir / "console.log").write_text("bad\n")
    judge = Study(Fixed(children), Local([None]), Rules(), Search({}), "parent")._judge
    assert judge(Handed(child, 0.0, begun=True), 75)[0] == "elsewhere"
    assert "diverged" not in judge(Handed(child, 0.0, begun=True), 2)[1]


def test_a_child_that_cannot_be_started_is_a_failure_like_another(make_parent: MakeParent, lines: list[str]) -> None:
    children = plan(make_parent({"alpha": [0.1, 0.2]}))
    write(children)
    (children[0].dir / "console.log").mkdir()
    assert run(children) == 1
    assert any("alpha_0.1 failed: it could not be started: " in line for line in lines)
    assert children[1].is_finished()


def test_no_more_than_the_slots_run_at_a_time(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"alpha": [0.1, 0.2, 0.3, 0.4, 0.5]}, stub={"do": "ok", "seconds": 0.3})
    assert search(parent, 2) == 0
    records = [read(path) for path in sorted(parent.glob("*/record.json"))]
    overlaps = [sum(other["started"] <= record["started"] < other["ended"] for other in records) for record in records]
    assert len(records) == 5
    assert max(overlaps) == 2


def test_the_parent_itself_is_never_trained(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"alpha": [0.1]})
    search(parent)
    assert not (parent / "run.json").exists()


def test_with_several_seeds_the_best_point_is_the_one_with_the_best_mean(
    make_parent: MakeParent, lines: list[str]
) -> None:
    children = plan(make_parent({"alpha": [0.1, 0.2], "seeds": [0, 1]}))
    write(children)
    for child, accuracy in zip(children, (0.9, 0.1, 0.6, 0.7), strict=True):
        put_run(child, status="completed", epoch=3, best={"accuracy": accuracy, "epoch": 1})
    assert run(children, search=Search({}, seeds=(0, 1))) == 0
    assert lines[-1] == "best: alpha_0.2: val.accuracy 0.6500 ± 0.0707 over 2 seeds"


def test_of_equal_points_the_first_is_the_best_whichever_ends_first(make_parent: MakeParent, lines: list[str]) -> None:
    children = plan(make_parent({"temperature": [1, 2]}))
    write(children)
    for child in children:
        put_run(child, status="completed", epoch=3, best={"accuracy": 0.9, "epoch": 1})
    tally = Tally(Fixed(children), Search({}))
    for child in reversed(children):
        tally.add(child, "skipped", "")
    assert tally.best == "Temp_1: accuracy 0.9000 at epoch 1"


def test_the_status_is_that_of_the_directories(make_parent: MakeParent) -> None:
    children = plan(make_parent({"alpha": [0.1, 0.2, 0.3, 0.4]}))
    write(children)
    put_run(children[0], status="completed", epoch=3, best={"accuracy": 0.5, "epoch": 1})
    put_run(children[1], status="running", epoch=1, num_epochs=3)
    put_run(children[2], status="running", epoch=2, num_epochs=3)
    with FileLock(children[1].dir / ".lock"):
        found = status_of(children, 4, Search({}), "parent")
    assert found.counts == {"completed": 1, "pruned": 0, "failed": 0, "running": 1, "waiting": 2}
    assert [(running.name, running.epoch, running.num_epochs) for running in found.running] == [("alpha_0.2", 1, 3)]
    assert found.best == "alpha_0.1: accuracy 0.5000 at epoch 1"


# --- what goes wrong ------------------------------------------------------------------------------------------


class Fake:
    """A place with a queue of its own, in which nothing ends before the test says so."""

    queues, place, slots, at_once = True, "nowhere", 100, 2

    def __init__(self, queued: Sequence[Path] = ()) -> None:
        self.submitted: list[Path] = []
        self.cancelled: list[tuple[Path, bool]] = []
        self.ends: dict[Path, int] = {}
        self._queued = [*queued]

    def submit(self, model_dir: Path) -> None:
        self.submitted.append(model_dir)

    def adopt(self, model_dir: Path) -> bool:
        return model_dir in self._queued

    def poll(self) -> dict[Path, int]:
        ended, self.ends = self.ends, {}
        return ended

    def cancel(self, model_dir: Path, force: bool = False) -> None:
        self.cancelled.append((model_dir, force))

    def occupy(self, model_dir: Path, gpu: str | None) -> bool:
        return False

    def vacate(self, model_dir: Path) -> None: ...

    def close(self) -> None: ...


def study_of(children: list[Child], launcher: Fake, learns: bool = False, **rules: Any) -> Study:
    write(children)
    trials = Fixed(children)
    trials.learns = learns
    return Study(trials, launcher, Rules(**rules), Search({}), "parent")


@pytest.mark.parametrize(("learns", "number"), [(False, 4), (True, 2)])
def test_a_queue_gets_all_at_once_unless_results_decide_what_is_next(
    make_parent: MakeParent, lines: list[str], learns: bool, number: int
) -> None:
    launcher = Fake()
    study_of(plan(make_parent({"alpha": [0.1, 0.2, 0.3, 0.4]})), launcher, learns)._step()
    assert len(launcher.submitted) == number


def test_what_an_earlier_search_has_queued_is_not_submitted_again(make_parent: MakeParent, lines: list[str]) -> None:
    children = plan(make_parent({"alpha": [0.1, 0.2]}))
    launcher = Fake(queued=[children[0].dir])
    search = study_of(children, launcher)
    assert search._step()
    assert launcher.submitted == [children[1].dir]
    assert children[0].dir in search._running
    launcher.ends = {children[0].dir: 1}
    search._step()
    assert launcher.submitted == [children[1].dir]  # it has failed, and no --retry was asked for
    assert search.tally.number("failed") == 1


def test_what_waits_in_a_queue_is_seldom_looked_at_and_its_time_has_not_begun(
    make_parent: MakeParent, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [child] = plan(make_parent({"alpha": [0.1]}))
    launcher = Fake()
    search = study_of([child], launcher)
    search._step()
    looks: list[Path] = []
    read_run = Child.read_run
    monkeypatch.setattr(Child, "read_run", lambda child: looks.append(child.dir) or read_run(child))
    search._rules = Rules(trial_timeout=1e-9)
    for _ in range(5):
        search._step()
    assert looks == []
    assert launcher.cancelled == []
    assert search._snapshot().counts["waiting"] == 1
    put_run(child, status="running", epoch=0, attempts=[{"pid": 1}])
    monkeypatch.setattr(study, "QUEUE_SECONDS", 0.0)
    for _ in range(3):
        search._step()
    assert launcher.cancelled == [(child.dir, False)]


def test_a_child_is_told_to_end_only_once_as_train_py_dies_at_the_second_time(
    make_parent: MakeParent, lines: list[str]
) -> None:
    [child] = plan(make_parent({"alpha": [0.1]}))
    launcher = Fake()
    search = study_of([child], launcher)
    search._step()
    search._running[child.dir].begun = True
    search._rules = Rules(timeout=1e-9, trial_timeout=1e-9)
    search._step()
    search._stop.received = signal.SIGINT
    search._step()
    assert launcher.cancelled == [(child.dir, False)]
    search._stop.insisted = 1
    search._step()
    search._step()
    assert launcher.cancelled == [(child.dir, False), (child.dir, True)]
    search._stop.insisted = 2
    with pytest.raises(RunError, match=r"without waiting for alpha_0.1, which may still run"):
        search._step()


def test_an_error_of_ours_leaves_nothing_running(
    make_parent: MakeParent, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [child] = plan(make_parent({"alpha": [0.1]}))
    launcher = Fake()
    search = study_of([child], launcher)
    monkeypatch.setattr(study, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(search, "_snapshot", lambda: 1 / 0)
    view = View(enabled=False)
    monkeypatch.setattr(view, "due", lambda: True)
    with pytest.raises(ZeroDivisionError):
        search.run(view)
    assert launcher.cancelled == [(child.dir, False)]


def test_what_has_finished_in_spite_of_a_verdict_is_done(make_parent: MakeParent, lines: list[str]) -> None:
    [child] = plan(make_parent({"alpha": [0.1]}))
    search = study_of([child], Fake())
    put_run(child, status="completed", epoch=3, best={"accuracy": 0.5, "epoch": 1})
    assert search._judge(Handed(child, 0.0, begun=True, verdict="pruned", told=0.0), 143)[0] == "done"


def test_a_child_that_somebody_else_has_stopped_is_interrupted_and_not_failed(
    make_parent: MakeParent, lines: list[str]
) -> None:
    [child] = plan(make_parent({"alpha": [0.1]}))
    launcher = Fake()
    search = study_of([child], launcher)
    ended: list[str] = []
    search._trials.ended = lambda child, outcome: ended.append(outcome)  # type: ignore[method-assign]
    search._step()
    put_run(child, status="interrupted", reason="signal", epoch=1)
    launcher.ends = {child.dir: 143}
    search._step()
    assert search.tally.lines["interrupted"] == ["alpha_0.1 is interrupted after epoch 1"]
    assert ended == []


def test_a_child_that_is_ended_before_it_has_begun_stops_no_other(
    make_parent: MakeParent, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    children = plan(make_parent({"alpha": [0.1, 0.2]}))
    launcher = Fake()
    search = study_of(children, launcher)
    search._step()
    search._condemn(search._running[children[0].dir], "timeout")
    launcher.ends = {children[0].dir: -15}
    assert search._step()
    assert search.tally.lines["failed"] == ["alpha_0.1 failed: longer than --trial_timeout, after epoch 0"]


@pytest.mark.parametrize("rerun", ["all", "none"])
def test_a_directory_that_cannot_be_prepared_is_a_failure_and_nothing_is_tried_again(
    make_parent: MakeParent, lines: list[str], monkeypatch: pytest.MonkeyPatch, rerun: str
) -> None:
    def fail(*_: object) -> None:
        raise RunError("cannot write: No space left on device", "storage", 1)

    children = plan(make_parent({"alpha": [0.1]}))
    write(children)
    put_run(children[0], status="completed" if rerun == "all" else "interrupted", epoch=3)
    monkeypatch.setattr(study.Experiment, "clear", fail)
    if rerun == "none":
        monkeypatch.setattr(study, "write", fail)
    assert run(children, rules=Rules(rerun=rerun, retry=3)) == 1
    assert "0 done, 0 skipped, 1 failed, 0 not started" in lines


def test_results_that_are_given_up_by_force_are_given_up_once(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"stub.do": ["fail_once"]})
    search(parent, retry=1)
    make_parent({"stub.do": ["fail_once"]}, seed=9)
    planner = Planner.read(parent, force=True)
    children = planner.children(grid(planner.search))
    assert children[0].changes
    assert run(children, rules=Rules(retry=1)) == 0
    assert num_attempts(children[0].dir) == 2


def test_a_force_that_somebody_else_has_applied_is_not_applied_again(make_parent: MakeParent) -> None:
    parent = make_parent({"alpha": [0.1]})
    write(plan(parent))
    make_parent({"alpha": [0.1]}, seed=9)
    planner = Planner.read(parent, force=True)
    [child] = planner.children(grid(planner.search))
    put_run(child, status="interrupted", epoch=1)
    assert child.outlook().anew
    (child.dir / "params.json").write_text(json.dumps(child.params))
    assert child.outlook().text == "resume at epoch 2"
    assert child.changes == ""


def test_what_does_not_end_when_the_time_is_over_is_killed(
    make_parent: MakeParent, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "GRACE_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(RunError, match="--timeout"):
        search(make_parent({"stub.do": ["stubborn"]}), timeout=0.5)
    assert time.monotonic() - began < 30


def test_a_stop_file_does_not_switch_the_time_limit_off(
    make_parent: MakeParent, lines: list[str], tmp_path: Path
) -> None:
    parent = make_parent({"stub.do": ["sleep"]})
    threading.Timer(0.3, (tmp_path / "stop").touch).start()
    with pytest.raises(RunError, match="the time of --timeout is over"):
        search(parent, timeout=1.0, stop_file=tmp_path / "stop")


def test_a_child_that_has_failed_elsewhere_is_left_as_it_is(make_parent: MakeParent, lines: list[str]) -> None:
    children = plan(make_parent({"alpha": [0.1]}))
    write(children)
    put_run(children[0], status="running", epoch=1)
    lock = FileLock(children[0].dir / ".lock", thread_local=False)
    lock.acquire()

    def fail() -> None:
        put_run(children[0], status="failed", reason="diverged", epoch=1)
        lock.release()

    threading.Timer(0.3, fail).start()
    assert run(children) == 1
    assert any("alpha_0.1 failed elsewhere (diverged)" in line for line in lines)
    assert not (children[0].dir / "console.log").exists()


def test_a_child_that_is_just_being_begun_elsewhere_is_waited_for(make_parent: MakeParent) -> None:
    [child] = plan(make_parent({"alpha": [0.1]}))
    write([child])
    with FileLock(child.dir / ".lock"):  # it has no run.json yet
        assert child.outlook().action == "wait"


@pytest.mark.parametrize(
    "run_json",
    [
        {"status": "interrupted", "epoch": None},
        {"status": "interrupted", "epoch": "x"},
        {"status": "completed", "epoch": 3, "best": [1]},
        {"status": "running", "attempts": [5]},
        {"status": ["x"]},
        [],
    ],
)
def test_an_odd_run_json_is_no_traceback(make_parent: MakeParent, lines: list[str], run_json: Any) -> None:
    children = plan(make_parent({"alpha": [0.1]}))
    write(children)
    (children[0].dir / "run.json").write_text(json.dumps(run_json))
    assert status_of(children, 1, Search({}), "parent").total == 1
    assert children[0].outlook("failed").action == "start"
    assert run(children, rules=Rules(rerun="failed")) == 0


def test_a_metric_that_there_is_not_ends_the_search_after_one_epoch(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"alpha": [0.5]}, num_epochs=1000, stub={"do": "epochs", "seconds": 0.05})
    search = Search({}, objective=Objective("val.f1"))
    children = plan(parent)
    with pytest.raises(RunError, match=r"has no val.f1; it has val.accuracy"):
        run(children, search=search)
    assert read(children[0].dir / "run.json")["status"] == "interrupted"

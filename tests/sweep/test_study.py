"""Claims about running a search: one child never stops the others, and what each of them needs decides what is done."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sweep import study
from sweep.children import Child, Planner, write
from sweep.launchers.local import Local
from sweep.space import Search, grid
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
    parent = make_parent({"stub.do": ["sleep", "fail", "ok"]})
    assert search(parent, 2, fail_fast=True) == 1
    assert read(parent / "do_sleep/run.json")["status"] == "interrupted"
    assert not (parent / "do_ok/run.json").exists()
    assert "0 done, 0 skipped, 1 failed, 1 interrupted, 1 not started" in lines


def test_after_its_time_a_search_saves_and_can_go_on(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"stub.do": ["sleep", "ok"]})
    with pytest.raises(
        RunError, match=r"after 0 of 2 children: the time of --timeout is over; the same command"
    ) as ended:
        search(parent, timeout=0.5)
    assert ended.value.exit_status == 75
    assert read(parent / "do_sleep/run.json")["status"] == "interrupted"


def test_a_child_that_takes_too_long_has_failed_and_the_others_go_on(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({"stub.do": ["sleep", "ok"]})
    assert search(parent, trial_timeout=2.0) == 1
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

"""Claims about local processes: how a child is started, what it sees and how it is stopped."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sweep.launchers import local, starter
from sweep.launchers.local import Local

MakeParent = Callable[..., Path]
MakeLauncher = Callable[..., Local]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "STAGGER_SECONDS", 0.0)
    monkeypatch.setattr(starter, "MODULES", ())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)


@pytest.fixture
def make_launcher() -> Iterator[MakeLauncher]:
    """Makes a launcher, which is closed after the test; `preload` waits until all is loaded."""
    made: list[Local] = []

    def make(slots: Any = (None,), preload: bool = False) -> Local:
        made.append(Local(slots, "cpu"))
        if preload:
            made[-1].preload()
            channel = made[-1]._starter._channel  # type: ignore[union-attr]
            wait_for(lambda: starter._readable(channel.fileno()))
        return made[-1]

    yield make
    for launcher in made:
        for path in launcher._running:
            launcher.cancel(path, force=True)
        while launcher._running:
            launcher.poll()
        launcher.close()


plainly_and_preloaded = pytest.mark.parametrize("preload", [False, True], ids=["plain", "preloaded"])


def wait_for(condition: Callable[[], Any]) -> Any:
    for _ in range(3000):
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("waited for too long")


def train(launcher: Local, parent: Path) -> dict[str, Any]:
    launcher.submit(parent)
    assert wait_for(launcher.poll) == {parent: 0}
    return json.loads((parent / "record.json").read_text())


def children(parent: Path, number: int) -> list[Path]:
    """Makes directories whose runs last."""
    made = [parent / str(place) for place in range(number)]
    for path in made:
        path.mkdir()
        (path / "params.json").write_text(json.dumps({"num_epochs": 1, "stub": {"do": "sleep"}}))
    return made


def seen(path: Path, name: str) -> str | None:
    """Returns a variable of the environment that a run was given."""
    pid = wait_for(lambda: (path / "pid").exists() and (path / "pid").read_text())
    words = dict(word.split("=", 1) for word in Path(f"/proc/{pid}/environ").read_text().split("\0") if word)
    return words.get(name)


@plainly_and_preloaded
def test_a_child_is_an_argv_list_in_its_own_session(
    make_parent: MakeParent, make_launcher: MakeLauncher, preload: bool
) -> None:
    parent = make_parent()
    record = train(make_launcher(preload=preload), parent)
    assert record["argv"] == ["--model_dir", str(parent), "--quiet", "--device", "cpu"]
    assert record["session"]
    assert record["stdin"] == ""


@plainly_and_preloaded
def test_the_output_of_every_attempt_is_appended_below_its_command(
    make_parent: MakeParent, make_launcher: MakeLauncher, preload: bool
) -> None:
    parent = make_parent()
    launcher = make_launcher(preload=preload)
    train(launcher, parent)
    train(launcher, parent)
    lines = (parent / "console.log").read_text().splitlines()
    assert lines[1] == lines[3] == "done"
    assert lines[0].startswith("--- 2")
    assert f"--model_dir {parent} --quiet" in lines[2]


@plainly_and_preloaded
@pytest.mark.parametrize(("cores", "slots", "threads"), [(8, 1, "8"), (8, 3, "2"), (2, 5, "1")])
def test_threads_are_divided_among_the_slots(
    make_parent: MakeParent,
    make_launcher: MakeLauncher,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    slots: int,
    threads: str,
    preload: bool,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert train(make_launcher([None] * slots, preload), make_parent())["threads"] == threads


@plainly_and_preloaded
def test_threads_that_the_user_has_set_are_left_alone(
    make_parent: MakeParent, make_launcher: MakeLauncher, monkeypatch: pytest.MonkeyPatch, preload: bool
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert train(make_launcher([None] * 2, preload), make_parent())["threads"] == "7"


@plainly_and_preloaded
def test_a_cancelled_child_saves_and_a_stubborn_one_is_killed(
    make_parent: MakeParent, make_launcher: MakeLauncher, preload: bool
) -> None:
    launcher = make_launcher(preload=preload)
    for do, force, status in (("sleep", False, 143), ("stubborn", True, -9)):
        parent = make_parent(stub={"do": do})
        launcher.submit(parent)
        wait_for((parent / "pid").exists)
        launcher.cancel(parent, force)
        assert wait_for(launcher.poll) == {parent: status}
        (parent / "pid").unlink()


@plainly_and_preloaded
def test_workers_of_a_killed_child_do_not_outlive_it(
    make_parent: MakeParent, make_launcher: MakeLauncher, preload: bool
) -> None:
    parent = make_parent(stub={"do": "segfault"})
    launcher = make_launcher(preload=preload)
    launcher.submit(parent)
    assert wait_for(launcher.poll) == {parent: -11}
    worker = Path("/proc", (parent / "worker").read_text(), "stat")
    # whoever adopts it may need a moment to bury it
    wait_for(lambda: not worker.exists() or worker.read_text().split()[2] == "Z")


# --- slots --------------------------------------------------------------------------------------------------


def test_each_child_sees_the_gpu_of_its_slot_only(
    make_parent: MakeParent, make_launcher: MakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = make_launcher(["4", "GPU-1f", "4"])
    paths = children(make_parent(), 3)
    for path in paths:
        launcher.submit(path)
    assert [seen(path, "CUDA_VISIBLE_DEVICES") for path in paths] == ["4", "GPU-1f", "4"]
    assert seen(paths[0], "CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    assert launcher.slots == 3


def test_numbers_that_the_user_has_set_keep_their_meaning(
    make_parent: MakeParent, make_launcher: MakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = children(make_parent(), 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")  # in the order that CUDA has by itself
    make_launcher(["4", "5"]).submit(paths[0])
    assert seen(paths[0], "CUDA_DEVICE_ORDER") is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    make_launcher(["4", "5"]).submit(paths[1])
    assert seen(paths[1], "CUDA_DEVICE_ORDER") == "FASTEST_FIRST"


def test_a_slot_on_the_cpu_leaves_the_variable_alone(
    make_parent: MakeParent, make_launcher: MakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, value in zip(children(make_parent(), 2), (None, "3"), strict=True):
        if value:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        make_launcher().submit(path)
        assert seen(path, "CUDA_VISIBLE_DEVICES") == value


def test_a_slot_is_used_again_however_its_run_ended(make_parent: MakeParent, make_launcher: MakeLauncher) -> None:
    launcher = make_launcher(["0", "1"])
    first, second, third, fourth = children(make_parent(), 4)
    launcher.submit(first)
    launcher.submit(second)
    launcher.cancel(second, force=True)
    assert wait_for(launcher.poll) == {second: -9}
    launcher.submit(third)
    assert seen(third, "CUDA_VISIBLE_DEVICES") == "1"
    launcher.cancel(first)
    wait_for(launcher.poll)
    launcher.submit(fourth)
    assert seen(fourth, "CUDA_VISIBLE_DEVICES") == "0"


@pytest.mark.parametrize("wrong", ["console", "interpreter"])
def test_a_run_that_could_not_be_started_leaves_its_slot_free(
    make_parent: MakeParent, make_launcher: MakeLauncher, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    launcher = make_launcher(["0", "1"])
    bad, good, other = children(make_parent(), 3)
    with monkeypatch.context() as patch:
        if wrong == "console":
            (bad / "console.log").mkdir()
        else:
            patch.setattr("sys.executable", str(bad / "nowhere"))
        with pytest.raises(OSError, match=r"console\.log|nowhere"):
            launcher.submit(bad)
    launcher.submit(good)
    launcher.submit(other)
    assert [seen(path, "CUDA_VISIBLE_DEVICES") for path in (good, other)] == ["0", "1"]
    launcher.cancel(good)
    launcher.cancel(other)
    wait_for(launcher.poll)


def test_the_least_busy_gpu_is_taken(make_parent: MakeParent, make_launcher: MakeLauncher) -> None:
    launcher = make_launcher(["0", "1", "0", "1"])
    *four, fifth, sixth = children(make_parent(), 6)
    for path in four:
        launcher.submit(path)
    for path in (four[3], four[0], four[2]):  # one run on GPU 1 is left
        launcher.cancel(path, force=True)
        wait_for(launcher.poll)
    launcher.submit(fifth)
    launcher.submit(sixth)
    assert [seen(path, "CUDA_VISIBLE_DEVICES") for path in (fifth, sixth)] == ["0", "0"]


def test_no_gpu_takes_more_runs_than_it_has_slots(make_parent: MakeParent, make_launcher: MakeLauncher) -> None:
    launcher = make_launcher(["1", "0", "0"])
    paths = children(make_parent(), 3)
    for path in paths:
        launcher.submit(path)
    assert [seen(path, "CUDA_VISIBLE_DEVICES") for path in paths] == ["1", "0", "0"]


def test_starts_are_apart_and_the_first_waits_for_none(
    make_parent: MakeParent, make_launcher: MakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "STAGGER_SECONDS", 100.0)
    slept: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", slept.append)
        launcher = make_launcher([None] * 2)
        for path in children(make_parent(), 2):
            launcher.submit(path)
    assert slept[0] == 0
    assert 50 < slept[1] <= 100


# --- runs that others have started ------------------------------------------------------------------------------


def test_no_child_gets_the_gpu_of_a_run_that_another_search_has_left(
    make_parent: MakeParent, make_launcher: MakeLauncher
) -> None:
    launcher = make_launcher(["0", "1"])
    orphan, first, second = children(make_parent(), 3)
    assert launcher.occupy(orphan, "0")
    launcher.submit(first)
    assert seen(first, "CUDA_VISIBLE_DEVICES") == "1"
    launcher.vacate(orphan)
    launcher.submit(second)
    assert seen(second, "CUDA_VISIBLE_DEVICES") == "0"


@pytest.mark.parametrize(
    ("slots", "gpu", "takes"),
    [
        (["0", "1"], "1", True),
        (["0", "1"], "7,1", True),
        (["0", "1"], "7", False),
        (["0", "1"], None, False),
        (["0", "1"], "", False),
        ([None], None, True),
        ([None], "3", True),  # it was there before; a run on the CPU leaves it as it is
    ],
)
def test_a_run_of_others_takes_a_slot_where_it_uses_what_the_slot_stands_for(
    make_launcher: MakeLauncher, tmp_path: Path, slots: list[str | None], gpu: str | None, takes: bool
) -> None:
    assert make_launcher(slots).occupy(tmp_path, gpu) is takes


def test_more_runs_of_others_than_slots_take_no_more_than_there_are(
    make_launcher: MakeLauncher, tmp_path: Path
) -> None:
    launcher = make_launcher(["0", "1", "0"])
    assert [launcher.occupy(tmp_path / str(number), "0") for number in range(3)] == [True, True, False]
    launcher.vacate(tmp_path / "2")  # which took none
    launcher.vacate(tmp_path / "0")
    assert launcher.occupy(tmp_path / "3", "0")


def test_a_run_of_others_on_a_gpu_that_is_in_use_keeps_later_ones_away_from_it(
    make_parent: MakeParent, make_launcher: MakeLauncher
) -> None:
    launcher = make_launcher(["0", "1"])
    ours, orphan, later = children(make_parent(), 3)
    launcher.submit(ours)
    assert seen(ours, "CUDA_VISIBLE_DEVICES") == "0"
    assert launcher.occupy(orphan, "0")
    launcher.cancel(ours)
    wait_for(launcher.poll)
    launcher.submit(later)
    assert seen(later, "CUDA_VISIBLE_DEVICES") == "1"


# --- children that need not load torch --------------------------------------------------------------------------


def parent_of(path: Path) -> int:
    pid = wait_for(lambda: (path / "pid").exists() and (path / "pid").read_text())
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_runs_start_as_ever_until_all_is_loaded(
    make_parent: MakeParent, make_launcher: MakeLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = make_parent()
    (parent / "slow_to_load.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(parent))
    monkeypatch.setattr(starter, "MODULES", ("slow_to_load",))
    [path] = children(parent, 1)
    launcher = make_launcher()
    launcher.preload()
    launcher.submit(path)
    assert parent_of(path) == os.getpid()


def test_a_child_of_what_has_loaded_is_no_child_of_the_search(
    make_parent: MakeParent, make_launcher: MakeLauncher
) -> None:
    [path] = children(make_parent(), 1)
    launcher = make_launcher(preload=True)
    launcher.submit(path)
    assert parent_of(path) == launcher._starter._process.pid  # type: ignore[union-attr]


def test_a_run_on_a_gpu_is_never_one_of_them(make_parent: MakeParent, make_launcher: MakeLauncher) -> None:
    paths = children(make_parent(), 2)
    launcher = make_launcher(["0", None], preload=True)
    for path in paths:
        launcher.submit(path)
    assert seen(paths[0], "CUDA_VISIBLE_DEVICES") == "0"
    assert [parent_of(path) == os.getpid() for path in paths] == [True, False]


def test_without_what_has_loaded_runs_start_as_ever_and_that_is_said_once(
    make_parent: MakeParent, make_launcher: MakeLauncher, lines: list[str]
) -> None:
    before, *after = children(make_parent(), 3)
    launcher = make_launcher([None] * 3, preload=True)
    launcher.submit(before)
    wait_for((before / "pid").exists)
    os.kill(parent_of(before), signal.SIGKILL)
    for path in after:
        launcher.submit(path)
        assert parent_of(path) == os.getpid()
    what = "from now on runs start without what was loaded for them: the process that held it was killed by signal 9"
    assert lines == [what]
    launcher.cancel(before)
    assert wait_for(launcher.poll) == {before: 1}
    assert json.loads((before / "run.json").read_text())["status"] == "interrupted"
    assert wait_for((before / "console.log").exists)


@pytest.mark.parametrize(("slots", "device"), [(["0"], "auto"), (["0"], "cpu"), ([None], "cuda"), ([None], "mps")])
def test_nothing_is_loaded_for_runs_that_may_use_a_gpu(slots: list[str | None], device: str) -> None:
    launcher = Local(slots, device)
    launcher.preload()
    assert launcher._starter is None
    launcher.close()


@pytest.mark.parametrize(("visible", "loads"), [("0", False), ("", True)])
def test_where_the_device_is_free_to_choose_a_gpu_that_is_there_counts(
    monkeypatch: pytest.MonkeyPatch, visible: str, loads: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    launcher = Local([None], "auto")
    launcher.preload()
    assert (launcher._starter is not None) is loads
    launcher.close()

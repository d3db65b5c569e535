"""Claims about Ray: what the launcher takes and says without Ray, and what becomes of runs on its real nodes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import pytest
from helpers import ROOT, TINY, Script, merged, read_journal
from ray_cluster import PYTHON, Cluster, Impossible, cluster, marked, prepare

import search_hyperparams
from sweep.launchers import base, ray
from sweep.launchers.local import Local
from sweep.launchers.ray import Ray
from utils import RunError

EPOCHS = 200  # the runs must last longer than it takes Ray to see that a node is gone


# --- without Ray ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "others", "line"),
    [
        ({"cpus": "1"}, {}, "Ray has no 'cpus'; there are address, num_cpus, num_gpus"),
        ({"num_cpus": "two"}, {}, "num_cpus=two is neither a whole number nor a part of one"),
        ({"num_cpus": "1.5"}, {}, "num_cpus=1.5 is neither"),
        ({"num_cpus": "-1"}, {}, "num_cpus=-1 is neither"),
        ({"num_cpus": "0"}, {}, "num_cpus=0 would let all runs run at once"),
        ({"num_gpus": "inf"}, {}, "num_gpus=inf is neither"),
        ({"num_gpus": "nan"}, {}, "num_gpus=nan is neither"),
        ({}, {"gpus": "0,1"}, "--gpus 0,1: with --launcher ray there is only auto or none; .*num_gpus=N"),
        ({"num_gpus": "1"}, {"gpus": "none"}, "--gpus none: runs without GPUs cannot take or share any"),
        ({}, {"device": "cpu", "jobs_per_gpu": 2}, "--device cpu: runs without GPUs cannot take or share any"),
        ({"num_gpus": "1"}, {"jobs_per_gpu": 2}, "--jobs_per_gpu and num_gpus .* say the same"),
        ({"address": "ray://head:10001"}, {}, "not an address of a cluster's head; start the search on a machine of"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, str], others: dict[str, Any], line: str) -> None:
    with pytest.raises(RunError, match=line):
        Ray.from_options(options, **others)


@pytest.mark.parametrize(
    ("options", "others", "settings"),
    [
        ({}, {}, {"num_cpus": 1.0, "num_gpus": None, "address": None}),
        ({"num_cpus": "2", "num_gpus": "0.5"}, {}, {"num_cpus": 2.0, "num_gpus": 0.5}),
        ({}, {"jobs_per_gpu": 3}, {"num_gpus": 0.3333}),  # three of them are no more than one
        ({}, {"gpus": "none"}, {"num_gpus": 0.0}),
        ({}, {"device": "cpu"}, {"num_gpus": 0.0}),
    ],
)
def test_options_become_what_a_run_takes(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: dict[str, str],
    others: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    told = tmp_path / "told"
    use_driver(monkeypatch, f"open({str(told)!r}, 'w').write(sys.argv[1]); say(slots=3); sys.stdin.read()")
    with contextlib.closing(Ray.from_options(options, **others)) as launcher:
        assert launcher.slots == 3
    assert settings.items() <= json.loads(told.read_text()).items()


def use_driver(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Lets a few lines of code stand in for the process that has Ray loaded."""
    begin = "import json, sys, time\ndef say(**message): print(json.dumps(message), flush=True)\n"
    monkeypatch.setattr(ray, "DRIVER", [sys.executable, "-c", begin + code])


def test_without_ray_the_line_says_how_to_install_it() -> None:
    if (Path(ray.__file__).parent / "ray").exists() or subprocess.run(
        [sys.executable, "-c", "import ray"]
    ).returncode == 0:
        pytest.skip("Ray is installed here")
    with pytest.raises(RunError, match=r"not installed here; .*pip install -r .*requirements-ray.txt"):
        Ray()


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    begun = time.monotonic()
    with pytest.raises(RunError, match=rf"no Ray cluster answers at {address}: Connection refused; start its head"):
        Ray(address=address)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("say(error='Version mismatch: this is 2.60, the cluster 2.59')", "--launcher ray: Version mismatch: this"),
        ("sys.exit('[2026-11-21 E 1 2] rpc_client.h:204: No GCS. See the log')", "could not be joined: No GCS$"),
        ("print('W: InvalidAuthToken: missing', file=sys.stderr); time.sleep(60)", "another token .*auth_token"),
        ("time.sleep(60)", "does not answer: it does not say why"),
    ],
)
def test_why_a_cluster_cannot_be_joined_is_one_line(monkeypatch: pytest.MonkeyPatch, code: str, line: str) -> None:
    use_driver(monkeypatch, code)
    monkeypatch.setattr(ray, "START_SECONDS", 0.5)
    monkeypatch.setattr(ray, "CLOSE_SECONDS", 10)
    begun = time.monotonic()
    with pytest.raises(RunError, match=line):
        Ray()
    assert time.monotonic() - begun < 5


def test_what_has_ended_is_told_before_the_cluster_has_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_driver(monkeypatch, f"say(slots=1); sys.stdin.readline(); say(ended={str(tmp_path)!r}, status=7)")
    with contextlib.closing(Ray()) as launcher:
        launcher.submit(tmp_path)
        assert wait(launcher) == {tmp_path: 7}
        launcher._driver.wait()
        with pytest.raises(RunError, match=r"has gone: .*; its runs save and end, the same command goes on") as gone:
            launcher.poll()
        assert gone.value.exit_status == 75
        launcher.submit(tmp_path)  # no error of its own


def test_the_number_of_slots_follows_the_nodes_unless_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    use_driver(monkeypatch, "say(slots=0); sys.stdin.readline(); say(slots=5); sys.stdin.read()")
    for jobs, before, after in ((None, 1, 5), (3, 3, 3)):  # one that waits may make a cluster grow
        with contextlib.closing(Ray(jobs=jobs)) as launcher:
            assert launcher.slots == before
            launcher.cancel(Path("any"))
            until(lambda launcher=launcher: launcher.poll() or launcher._capacity == 5)
            assert launcher.slots == after


@pytest.mark.parametrize(
    ("do", "orders", "status"),
    [("ok", b"", 0), ("fail", b"", 2), ("sleep", b"t", 143), ("sleep", b"", 143), ("stubborn", b"tk", -9)],
)
@pytest.mark.parametrize("leave", [False, True], ids=["stays", "leaves"])
def test_a_keeper_obeys_and_lets_its_command_save_when_its_owner_leaves(
    make_child: Callable[..., Path], do: str, orders: bytes, status: int, leave: bool
) -> None:
    child = make_child("child", do)
    command = [sys.executable, str(Path(ray.__file__).with_name("keeper.py")), *base.command(child, "cpu")]
    with Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        until(began(child))
        if do != "ok":
            os.write(keeper.stdin.fileno(), orders)
        if leave or (do == "sleep" and not orders):
            time.sleep(0.1)
            keeper.stdin.close()  # a second SIGTERM would end it before it has saved, with status 99
        assert int(keeper.stdout.read()) == status


def until(happens: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def wait(launcher: base.Launcher, number: int = 1, seconds: float = 60) -> dict[Path, int]:
    """Returns the next so many runs that end."""
    ended: dict[Path, int] = {}

    def enough() -> bool:
        ended.update(launcher.poll())
        return len(ended) >= number

    until(enough, seconds)
    return ended


# --- with Ray ---------------------------------------------------------------------------------------------


@pytest.fixture
def with_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Has the launcher use `.venv-ray`, where there is one, far from any Ray that runs here; yields its RAY_TMPDIR."""
    try:
        prepare()
    except Impossible as why:
        pytest.skip(str(why))
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.setattr(ray, "DRIVER", [str(PYTHON), *ray.DRIVER[1:]])
    yield str(folder)
    until(lambda: not marked("RAY_TMPDIR", str(folder)))
    shutil.rmtree(folder)


@pytest.fixture
def nodes(with_ray: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with cluster() as started:
        for name in ("HOME", "RAY_TMPDIR", "RAY_AUTH_MODE"):
            monkeypatch.setenv(name, started.environment[name])
        yield started


@pytest.fixture
def make_child(tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory for the stub."""

    def make(name: str, do: str = "ok") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "params.json").write_text(json.dumps({"num_epochs": 3, "stub": {"do": do}}))
        return folder

    return make


def began(*children: Path) -> Callable[[], bool]:
    return lambda: all((child / "pid").exists() for child in children)


@pytest.mark.slow
def test_on_this_machine_alone_runs_start_wait_save_and_are_killed(
    with_ray: str, make_child: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.delenv("OMP_NUM_THREADS")
    processors = len(os.sched_getaffinity(0))
    with contextlib.closing(Ray("cpu", num_cpus=processors)) as launcher:
        assert launcher.slots >= 1
        assert launcher.queues
        ok = make_child("ok")
        for _ in range(2):
            launcher.submit(ok)
            assert wait(launcher) == {ok: 0}
        record = json.loads((ok / "record.json").read_text())
        assert record["argv"] == ["--model_dir", str(ok), "--quiet", "--device", "cpu"]
        assert (record["threads"], record["stdin"], record["session"]) == (str(processors), "", True)
        lines = (ok / "console.log").read_text().splitlines()
        assert lines[1] == lines[3] == "done"
        assert f"--model_dir {ok} --quiet" in lines[2]

        for do, status in (("fail", 2), ("segfault", -signal.SIGSEGV)):
            launcher.submit(child := make_child(do, do))
            assert wait(launcher) == {child: status}
        until(lambda: _is_dead((child / "worker").read_text()), 10)

        running = [make_child(f"sleep{number}", "sleep") for number in range(launcher.slots)]
        for child in running:
            launcher.submit(child)
        until(began(*running))
        launcher.submit(waiting := make_child("waiting"))
        launcher.cancel(waiting)
        assert wait(launcher) == {waiting: -signal.SIGTERM}
        assert not (waiting / "pid").exists()
        for child in running:
            launcher.cancel(child)
        assert wait(launcher, len(running)) == dict.fromkeys(running, 128 + signal.SIGTERM)

        for asked_before in (True, False):
            launcher.submit(stubborn := make_child(f"stubborn{asked_before}", "stubborn"))
            until(began(stubborn))
            for _ in range(2 * asked_before):  # asking twice is no order to kill
                launcher.cancel(stubborn)
                time.sleep(1)
                assert launcher.poll() == {}
            launcher.cancel(stubborn, force=True)
            assert wait(launcher) == {stubborn: -signal.SIGKILL}
    assert {number: signal.getsignal(number) for number in before} == before
    assert not (Path(os.environ["HOME"]) / ".ray").exists()  # the token of a cluster of our own is in no file


def _is_dead(pid: str) -> bool:
    stat = Path("/proc", pid, "stat")
    return not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.mark.slow
def test_a_search_is_sent_to_ray_from_the_command_line(
    with_ray: str, make_parent: Callable[..., Path], script: Script, lines: list[str]
) -> None:
    parent = make_parent({"loss.alpha": [0.1, 0.2, 0.3]})
    arguments = ("--parent_dir", parent, "--device", "cpu", "--launcher", "ray", "--launcher_options", "num_cpus=1")
    assert script(search_hyperparams, *arguments).status == 0
    assert [json.loads(path.read_text())["status"] for path in parent.glob("*/run.json")] == ["completed"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("who", ["search", "driver"])
def test_when_search_or_driver_is_killed_its_runs_save_and_nothing_is_left(
    with_ray: str, make_child: Callable[..., Path], who: str
) -> None:
    child, queued = make_child("child", "sleep"), make_child("queued", "sleep")
    code = f"""
import contextlib, time
from pathlib import Path
from sweep.launchers import base, ray
ray.DRIVER, base.TRAIN = {ray.DRIVER!r}, Path({str(base.TRAIN)!r})
with contextlib.closing(ray.Ray("cpu", num_cpus={len(os.sched_getaffinity(0))})) as launcher:
    launcher.submit(Path({str(child)!r})), launcher.submit(Path({str(queued)!r}))
    print(launcher._driver.pid, flush=True)
    while not launcher.poll():
        time.sleep(0.1)
"""
    with Popen([sys.executable, "-c", code], cwd=ROOT, stdout=PIPE, stderr=DEVNULL, text=True) as search:
        assert search.stdout is not None
        driver = int(search.stdout.readline())
        until(began(child))
        os.kill(search.pid if who == "search" else driver, signal.SIGKILL)
        until(lambda: json.loads((child / "run.json").read_text())["status"] == "interrupted", 20)
    until(lambda: not marked("RAY_TMPDIR", with_ray), 20)
    assert not (queued / "pid").exists()


@pytest.mark.slow
def test_a_run_whose_worker_dies_goes_elsewhere_but_not_for_ever(
    with_ray: str, make_child: Callable[..., Path], lines: list[str]
) -> None:
    with contextlib.closing(Ray("cpu")) as launcher:
        launcher.submit(child := make_child("child", "sleep"))
        for _ in range(4):
            until(began(child))
            (child / "pid").unlink()
            kill_worker(with_ray, "child")
        assert wait(launcher) == {child: -signal.SIGKILL}
    assert len([line for line in lines if line.startswith("child goes elsewhere, on from its last checkpoint")]) == 3
    assert (child / "console.log").read_text().splitlines()[-1].startswith("Ray: The worker died unexpectedly")
    assert len(json.loads((child / "run.json").read_text())["attempts"]) == 4


def kill_worker(folder: str, task: str) -> None:
    workers = [pid for pid, command in marked("RAY_TMPDIR", folder).items() if command.startswith(f"ray::{task}")]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)


@pytest.mark.slow
def test_a_node_that_does_not_see_the_files_is_named(with_ray: str, tmp_path: Path) -> None:
    with contextlib.closing(Ray("cpu")) as launcher:
        launcher.submit(tmp_path / "nowhere")
        with pytest.raises(RunError, match=rf"{tmp_path}/nowhere does not exist on node {socket.gethostname()}"):
            wait(launcher)


@pytest.mark.slow
def test_a_run_that_cannot_be_started_fails_alone(
    with_ray: str, make_child: Callable[..., Path], lines: list[str]
) -> None:
    with contextlib.closing(Ray("cpu")) as launcher:
        (bad := make_child("bad")).joinpath("console.log").mkdir()
        for child in (bad, good := make_child("good")):
            launcher.submit(child)
        assert wait(launcher, 2) == {bad: 1, good: 0}
    assert any("bad could not be started" in line and "Is a directory" in line for line in lines)


def write_runs(folder: Path, number: int) -> list[Path]:
    """Writes directories for train.py."""
    runs = [folder / f"seed_{seed}" for seed in range(number)]
    for seed, run in enumerate(runs):
        run.mkdir(parents=True)
        (run / "params.json").write_text(json.dumps(merged(TINY, {"seed": seed, "num_epochs": EPOCHS})))
    return runs


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lost", ["", "raylet"], ids=["machine", "raylet"])
def test_the_runs_of_a_lost_node_go_elsewhere_and_none_is_trained_twice(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], lost: str
) -> None:
    monkeypatch.setattr(base, "TRAIN", ROOT / "train.py")
    nodes.start_node(cpus=1)
    nodes.start_node(cpus=1)
    runs = write_runs(tmp_path / "ray", 3)
    with contextlib.closing(Ray("cpu", address=nodes.address)) as launcher:
        until(lambda: launcher.poll() or launcher.slots == 2)
        for run in runs:
            launcher.submit(run)
        until(lambda: all(2 <= len(read_journal(run)) < EPOCHS for run in runs[:2]))
        nodes.end_node(1, only=lost)
        assert wait(launcher, len(runs), seconds=300) == dict.fromkeys(runs, 0)

    moved = [line for line in lines if "goes elsewhere" in line]
    assert len(moved) == 1
    attempts = {run: json.loads((run / "run.json").read_text())["attempts"] for run in runs}
    assert sorted(len(each) for each in attempts.values()) == [1, 1, 2]
    for run, each in attempts.items():
        assert [record["epoch"] for record in read_journal(run)] == list(range(1, EPOCHS + 1))
        if len(each) == 2:
            assert run.name in moved[0]
            assert each[0].get("status") == ("interrupted" if lost else None)  # without its machine it could not say
            assert each[1]["from_epoch"] >= 1  # not from the beginning

    local = Local(device="cpu")
    same = write_runs(tmp_path / "local", len(runs))
    for run in same:
        local.submit(run)
        assert wait(local) == {run: 0}
    for run, other in zip(runs, same, strict=True):
        assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_runs_share_the_gpus_of_a_cluster_as_ray_divides_them(
    nodes: Cluster, make_child: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell = tmp_path / "tell.py"
    tell.write_text(
        "import os, sys, time, pathlib\n"
        "pathlib.Path(sys.argv[2], 'seen').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "time.sleep(2)\n"
    )
    monkeypatch.setattr(base, "TRAIN", tell)
    nodes.start_node(cpus=8, gpus=2)
    for number, (options, slots, seen) in enumerate(
        [({}, 2, ["0", "1"]), ({"num_gpus": "0.5"}, 4, ["0", "0", "1", "1"]), ({"num_gpus": "0"}, 8, [""])]
    ):
        with contextlib.closing(Ray.from_options({"address": nodes.address, **options})) as launcher:
            assert launcher.slots == slots
            children = [make_child(f"{number}_{each}") for each in range(len(seen))]
            for child in children:
                launcher.submit(child)
            assert wait(launcher, len(children)) == dict.fromkeys(children, 0)
            assert sorted((child / "seen").read_text() for child in children) == seen


@pytest.mark.slow
def test_the_cluster_is_found_its_token_is_wanted_and_its_end_is_told(
    nodes: Cluster, make_child: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.start_node(cpus=3)
    monkeypatch.delenv("RAY_AUTH_MODE")  # the token's file is enough
    with monkeypatch.context() as other:
        other.setenv("RAY_AUTH_TOKEN", "another")
        with pytest.raises(RunError, match=r"wants another token than this machine has; copy the head's"):
            Ray("cpu")
    monkeypatch.delenv("OMP_NUM_THREADS")  # which its nodes have
    with contextlib.closing(Ray("cpu", num_cpus=3)) as launcher:
        launcher.submit(child := make_child("threads"))
        assert wait(launcher) == {child: 0}
        assert json.loads((child / "record.json").read_text())["threads"] == "3"
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    with contextlib.closing(Ray("cpu")) as launcher:
        assert launcher.slots == 3
        launcher.submit(child := make_child("child", "sleep"))
        until(began(child))
        nodes.end_node(0, only="/core/src/ray/")  # raylet and gcs_server
        with pytest.raises(RunError, match=r"has gone: .*; its runs save and end, the same command goes on"):
            wait(launcher, 2)
    until(lambda: json.loads((child / "run.json").read_text())["status"] == "interrupted")

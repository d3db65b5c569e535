"""Claims about jobs of Slurm: what is asked for, and, with a real Slurm on this machine, what becomes of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from helpers import ROOT, TINY, merged, read_journal
from slurm_cluster import HOME, PYTHON, Cluster, Impossible, cluster

from sweep.launchers import base, slurm
from sweep.launchers.local import Local
from sweep.launchers.slurm import NoAnswer, Slurm, inheritable, job_name, parameters, read_options
from utils import RunError

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes a directory for the stub, or with `epochs` one that train.py trains for so long."""

    def make(name: str = "run", epochs: int | None = None, seed: int = 1, **stub: Any) -> Path:
        stubbed = {"num_epochs": 1, "stub": {"do": "ok", **stub}}
        params = stubbed if epochs is None else merged(TINY, {"num_epochs": epochs, "seed": seed})
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "params.json").write_text(json.dumps(params))
        return folder

    return make


# --- what is told on the command line ---------------------------------------------------------------------


def test_options_have_their_types_and_defaults() -> None:
    given = {"partition": "gpu", "timeout_min": "240", "gpus_per_node": "0", "mem_gb": "1.5", "setup": "module load x"}
    assert read_options(given) == {
        "partition": "gpu",
        "timeout_min": 240,
        "gpus_per_node": 0,
        "mem_gb": 1.5,
        "setup": "module load x",
        "signal_delay_s": 120,
    }
    assert read_options({}) == {"timeout_min": 60, "signal_delay_s": 120}


def test_all_wrong_options_are_reported_at_once() -> None:
    given = {"gpus": "1", "cpus_per_task": "0", "timeout_min": "1.5", "mem_gb": "nan", "account": " ", "qos": "a\nb"}
    with pytest.raises(RunError) as refused:
        read_options(given)
    assert refused.value.exit_status == 2
    unknown, *rest = str(refused.value).splitlines()
    assert unknown == (
        "--launcher_options: gpus: unknown; known are account, constraint, cpus_per_task, exclude, gpus_per_node, "
        "gres, mem_gb, nodelist, partition, qos, reservation, setup, signal_delay_s, timeout_min"
    )
    assert rest == [
        "--launcher_options: cpus_per_task: 0 is not from 1 to 1e9",
        "--launcher_options: timeout_min: '1.5' is not a whole number",
        "--launcher_options: mem_gb: nan is not from 0.001 to 1e9",
        "--launcher_options: account: ' ' is empty or has characters that cannot be printed",
        "--launcher_options: qos: 'a\\nb' is empty or has characters that cannot be printed",
    ]


def test_a_job_is_not_told_to_end_as_it_begins() -> None:
    with pytest.raises(RunError, match="give it more timeout_min"):
        read_options({"timeout_min": "2"})
    assert read_options({"timeout_min": "2", "signal_delay_s": "30"})["signal_delay_s"] == 30


def test_the_step_gets_the_cores_of_its_job() -> None:
    """Since 22.05 srun takes one core if it is not told again."""
    asked = parameters(read_options({"cpus_per_task": "4", "mem_gb": "0.5", "reservation": "r"}), "name")
    assert asked["cpus_per_task"] == 4
    assert asked["srun_args"] == ["--cpus-per-task=4"]
    assert asked["mem"] == "512M"
    assert asked["additional_parameters"] == {"signal": "USR2@120", "requeue": True, "reservation": "r"}


@pytest.mark.parametrize("name", ["alpha=0.5", 'it\'s a "sweep"', "ü/x", "a" * 300])
def test_names_of_jobs_are_plain(name: str) -> None:
    assert set(job_name(Path(name))) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert len(job_name(Path(name))) < 64


def test_jobs_do_not_inherit_the_job_that_the_search_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    inherited = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "1", "SBATCH_TIMELIMIT": "1", "SRUN_CPUS_PER_TASK": "9"}
    kept = {"SLURM_CONF": "/etc/x", "SBATCH_ACCOUNT": "mine", "OTHER": "1"}
    for name, value in {**inherited, **kept, "SBATCH_PARTITION": "p"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with inheritable({"partition": "gpu"}):
        assert not {*inherited, "SBATCH_PARTITION"} & os.environ.keys()
        assert kept.items() <= os.environ.items()
        signal.raise_signal(signal.SIGUSR2) if signal.SIGINT not in signal.pthread_sigmask(
            signal.SIG_BLOCK, ()
        ) else None
    assert os.environ == before


# --- what runs in the job ---------------------------------------------------------------------------------

IN_A_JOB = """
import sys, types
from pathlib import Path
from types import SimpleNamespace as Has
submitit = sys.modules["submitit"] = types.ModuleType("submitit")
submitit.JobEnvironment = lambda: Has(job_id="12_3", paths=Has(result_pickle=Path("result.pkl")))
from sweep.launchers.slurm import Run
print("result", Run([sys.executable, "-c", sys.argv[1]], Path.cwd(), Path.cwd())())
"""
SAVES = """
import signal, sys, time
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
print("begun", flush=True)
while not told:
    time.sleep(0.01)
time.sleep(0.3)
print("told", len(told), flush=True)
sys.exit(75)
"""
UNPREPARED = "import time; print('begun', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("code", "signals", "queues", "printed"),
    [
        (SAVES, ("SIGTERM", "SIGCONT", "SIGTERM"), True, "result 75\n"),
        (SAVES, ("SIGUSR2", "SIGTERM", "SIGCONT", "SIGTERM"), True, ""),
        (SAVES, ("SIGUSR2",), False, "result 75\n"),
        (UNPREPARED, ("SIGTERM", "SIGTERM"), True, "result -15\n"),
        (UNPREPARED, ("SIGUSR2",), True, "result -12\n"),
    ],
    ids=["preempted", "time limit", "not queued again", "before it can save", "a limit that is too short"],
)
def test_of_the_signals_to_all_of_a_job_training_gets_one(
    tmp_path: Path, code: str, signals: tuple[str, ...], queues: bool, printed: str
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* > asked\necho no >&2\nexit {0 if queues else 1}\n")
    scontrol.chmod(0o755)
    (tmp_path / "result.pkl").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(
        [sys.executable, "-c", IN_A_JOB, code],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    console = tmp_path / "console.log"
    while not console.exists() or "begun" not in console.read_text().splitlines():
        time.sleep(0.02)
    for name in signals:
        os.killpg(job.pid, signal.Signals[name])
        time.sleep(0.02)
    assert job.communicate(timeout=180)[0] == printed
    lines = console.read_text().splitlines()
    assert ("told 1" in lines) == (code == SAVES)
    requeued = "SIGUSR2" in signals and code == SAVES
    assert (job.returncode == 75) == (requeued and queues)  # then without a result
    assert (tmp_path / "asked").exists() == requeued
    assert not requeued or (tmp_path / "asked").read_text() == "requeue 12_3\n"
    assert (lines[-1] == "Slurm does not queue job 12_3 again: no") == (not queues)
    assert not (tmp_path / "result.pkl").exists()  # of an earlier attempt


# --- without Slurm ----------------------------------------------------------------------------------------


def test_without_slurm_or_submitit_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=r"^--launcher slurm: no sbatch, srun, squeue, scancel, scontrol here; .*submit"):
        Slurm(tmp_path, 1)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(RunError, match=r"^--launcher slurm needs submitit: pip install -r requirements-slurm.txt$"):
        Slurm(tmp_path, 1)
    with pytest.raises(RunError, match="50%: Slurm reads % in a path as a pattern"):
        Slurm(tmp_path / "50%", 1)


class FakeJob:
    def __init__(self, folder: Path, job_id: str) -> None:
        self.job_id = job_id
        names = {"result_pickle": "result.pkl", "submitted_pickle": "submitted.pkl", "stdout": "out", "stderr": "err"}
        self.paths = SimpleNamespace(**{key: folder / f"{job_id}_{name}" for key, name in names.items()})

    def result(self) -> int:
        return int(self.paths.result_pickle.read_text())


class Fake:
    """Stands in for submitit and for Slurm: what was submitted, and the queue as a test wants it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.arrays, self.queue = folder, list[tuple[int, list[str]]](), dict[str, str]()
        self.asked, self.refusal, self.error = list[tuple[str, ...]](), "", type("Failed", (Exception,), {})
        self.parallelism = 0

    def module(self) -> ModuleType:
        utils = SimpleNamespace(FailedJobError=self.error, FailedSubmissionError=self.error)
        made = ModuleType("submitit")
        made.core = SimpleNamespace(utils=utils)  # type: ignore[attr-defined]
        made.SlurmExecutor = lambda folder: self  # type: ignore[attr-defined]
        return made

    job_class = FakeJob

    def update_parameters(self, array_parallelism: int = 0, **_: Any) -> None:
        self.parallelism = array_parallelism

    def submit_array(self, runs: list[slurm.Run]) -> list[FakeJob]:
        if self.refusal:
            raise self.error(self.refusal)
        self.folder.mkdir(exist_ok=True)
        self.arrays.append((self.parallelism, [run.model_dir.name for run in runs]))
        ids = [f"{len(self.arrays)}_{index}" for index in range(len(runs))]
        ids = [f"{len(self.arrays)}"] if len(runs) == 1 else ids
        self.queue |= dict.fromkeys(ids, "PENDING|0:00|Priority")
        return [FakeJob(self.folder, job) for job in ids]

    def ask(self, *command: str) -> str:
        self.asked.append(command)
        if self.refusal:
            raise NoAnswer(self.refusal)
        if command[0] == "scontrol":
            return "MaxArraySize            = 4\n"
        return "".join(f"{job}|{line}\n" for job, line in self.queue.items())

    def end(self, job: str, status: int | None, line: str | None = None) -> None:
        if status is not None:
            (self.folder / f"{job}_result.pkl").write_text(str(status))
        if line is None:
            del self.queue[job]
        else:
            self.queue[job] = line


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(tmp_path / "slurm")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setitem(sys.modules, "submitit", made.module())
    monkeypatch.setattr(slurm, "ask_slurm", made.ask)
    for name in ("RESULT_SECONDS", "QUEUE_SECONDS", "AWAY_SECONDS"):
        monkeypatch.setattr(slurm, name, 0)
    return made


def test_what_is_submitted_between_two_polls_is_one_array(fake: Fake, tmp_path: Path, make_run: MakeRun) -> None:
    launcher = Slurm(tmp_path, 2)
    for name in "abc":
        launcher.submit(make_run(name))
    assert fake.arrays == []
    assert launcher.poll() == {}
    assert fake.arrays == [(2, ["a", "b", "c"])]
    assert json.loads((tmp_path / "slurm" / "1.json").read_text()) == {"at_once": 2, "children": ["a", "b", "c"]}


def test_several_arrays_together_keep_to_the_limit(fake: Fake, tmp_path: Path, make_run: MakeRun) -> None:
    launcher = Slurm(tmp_path, 3)
    for name in "abcdefg":  # more than the 4 of MaxArraySize
        launcher.submit(make_run(name))
    launcher.poll()
    assert fake.arrays == [(3, ["a", "b", "c", "d"])]
    fake.end("1_0", 0)
    assert launcher.poll() == {tmp_path / "a": 0}
    launcher.poll()
    assert len(fake.arrays) == 1  # b, c and d may all run
    fake.end("1_2", 0)
    assert launcher.poll() == {tmp_path / "c": 0}
    launcher.poll()
    assert fake.arrays[1:] == [(1, ["e"])]
    for job in ("1_1", "1_3", "2"):
        fake.end(job, 0)
    assert launcher.poll().keys() == {tmp_path / "b", tmp_path / "d", tmp_path / "e"}
    launcher.poll()
    assert fake.arrays[2:] == [(3, ["f", "g"])]


def test_a_result_that_is_no_end_waits_for_the_queue(fake: Fake, tmp_path: Path, make_run: MakeRun) -> None:
    """Slurm starts a preempted job again: its first result is not its last."""
    launcher, run = Slurm(tmp_path, 1), make_run()
    launcher.submit(run)
    launcher.poll()
    fake.end("1", 75, "PENDING|0:00|BeginTime")
    assert launcher.poll() == {}
    fake.end("1", 75, "CANCELLED|0:07|None")
    assert launcher.poll() == {run: 75}


def test_a_job_without_a_result_is_given_up_after_a_while(
    fake: Fake, tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, run = Slurm(tmp_path, 1), make_run()
    launcher.submit(run)
    launcher.poll()
    fake.end("1", None, "OUT_OF_MEMORY|0:07|None")
    assert launcher.poll() == {}
    monkeypatch.setattr(slurm, "GRACE_SECONDS", 0)
    assert launcher.poll() == {run: -9}
    assert (run / "console.log").read_text().startswith("Slurm: job 1 ended without a result, as OUT_OF_MEMORY: see ")


def test_a_job_that_leaves_the_queue_for_a_moment_is_not_given_up(
    fake: Fake, tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, run = Slurm(tmp_path, 1), make_run()
    launcher.submit(run)
    launcher.poll()
    fake.end("1", None)
    assert launcher.poll() == {}
    fake.queue["1"] = "RUNNING|0:01|None"
    launcher.poll()
    monkeypatch.setattr(slurm, "GRACE_SECONDS", 0)
    assert launcher.poll() == {}


def test_a_controller_that_is_away_is_waited_for(
    fake: Fake, tmp_path: Path, make_run: MakeRun, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "GRACE_SECONDS", 0)
    launcher, run, other = Slurm(tmp_path, 1), make_run(), make_run("other")
    launcher.submit(run)
    launcher.poll()
    fake.refusal = "Unable to contact slurm controller (connect failure)"
    launcher.submit(other)
    launcher.cancel(run)
    for _ in range(3):
        assert launcher.poll() == {}
    fake.refusal = ""
    launcher.poll()
    launcher.poll()
    assert fake.asked.count(("scancel", "1")) == 2  # in vain, and again
    assert lines[1:] == [
        "Slurm does not answer, waiting for it: Unable to contact slurm controller (connect failure)",
        "Slurm answers again",
    ]
    fake.end("1", 0)
    assert launcher.poll() == {run: 0}
    launcher.poll()
    assert fake.arrays[1:] == [(1, ["other"])]


def test_a_refused_submission_ends_the_search_with_slurms_reason(fake: Fake, tmp_path: Path, make_run: MakeRun) -> None:
    launcher = Slurm(tmp_path, 1)
    launcher.submit(make_run())
    fake.refusal = "sbatch: error: x\nsbatch: error: Batch job submission failed: Invalid account"
    with pytest.raises(RunError, match=r"^Slurm refuses the jobs: Batch job submission failed: Invalid account; see -"):
        launcher.poll()


def test_what_waits_for_nothing_is_told_once(fake: Fake, tmp_path: Path, make_run: MakeRun, lines: list[str]) -> None:
    launcher = Slurm(tmp_path, 1)
    launcher.submit(make_run())
    launcher.poll()
    fake.queue["1"] = "PENDING|0:00|PartitionTimeLimit"
    for _ in range(3):
        launcher.poll()
    assert lines[1:] == ["run waits in vain: job 1 has the reason PartitionTimeLimit"]


def test_a_run_is_cancelled_once_however_often_that_is_asked(fake: Fake, tmp_path: Path, make_run: MakeRun) -> None:
    launcher, run, other = Slurm(tmp_path, 1), make_run(), make_run("other")
    launcher.submit(run)
    launcher.poll()
    launcher.submit(other)
    launcher.cancel(other)  # not handed over yet
    for force in (False, False, True, True):
        launcher.cancel(run, force)
        launcher.poll()
    assert [line for line in fake.asked if line[0] == "scancel"] == [
        ("scancel", "1"),
        ("scancel", "--signal=KILL", "1.0"),
        ("scancel", "1"),
    ]
    assert len(fake.arrays) == 1


def test_a_run_that_never_began_vanishes_at_once(fake: Fake, tmp_path: Path, make_run: MakeRun) -> None:
    launcher, run, other = Slurm(tmp_path, 1), make_run(), make_run("other")
    launcher.submit(run)
    launcher.poll()
    launcher.submit(other)
    launcher.cancel(other)
    assert launcher.poll() == {other: -15}
    fake.end("1", None, "CANCELLED|0:00|None")
    assert launcher.poll() == {run: -15}
    launcher.submit(run)
    launcher.poll()
    launcher.cancel(run)
    fake.end("2", None)  # one of an array vanishes from the list
    assert launcher.poll() == {run: -15}


def test_jobs_of_an_earlier_search_are_adopted_while_they_are_in_the_queue(
    fake: Fake, tmp_path: Path, make_run: MakeRun
) -> None:
    runs = [make_run(name) for name in "abc"]
    first = Slurm(tmp_path, 1)
    for run in runs:
        first.submit(run)
    first.poll()
    fake.end("1_1", None, "COMPLETED|0:01|None")
    second = Slurm(tmp_path, 1)
    assert [second.adopt(run) for run in runs] == [True, False, True]
    second.submit(make_run("d"))
    fake.end("1_2", 0)
    assert second.poll() == {runs[2]: 0}
    assert len(fake.arrays) == 1  # the earlier search's array may still use the one place
    fake.queue.clear()
    assert not Slurm(tmp_path, 1).adopt(runs[0])
    assert not (tmp_path / "slurm" / "1.json").exists()


# --- with a real Slurm ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        with cluster(tmp_path_factory.mktemp("slurm")) as made:
            yield made
    except Impossible as reason:
        pytest.skip(str(reason))


@pytest.fixture
def at_slurm(real_slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """This process as one on a machine of the cluster, in a venv with submitit."""
    for name in ("PATH", "LD_LIBRARY_PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, real_slurm.environment[name])
    monkeypatch.setattr(sys, "executable", str(PYTHON))
    monkeypatch.setattr(sys, "path", [*sys.path, *map(str, HOME.glob("lib/*/site-packages"))])
    monkeypatch.setattr(slurm, "QUEUE_SECONDS", 1)
    return real_slurm


@pytest.fixture
def train_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "TRAIN", ROOT / "train.py")


def wait(launcher: Slurm | Local, number: int = 1, each: Callable[[], object] = lambda: None) -> dict[Path, int]:
    """Polls until so many have ended."""
    ended: dict[Path, int] = {}
    for _ in range(4000):
        each()
        ended |= launcher.poll()
        if len(ended) == number:
            return ended
        time.sleep(0.05)
    raise AssertionError(f"only {ended} have ended")


def wait_until(launcher: Slurm, condition: Callable[[], object]) -> None:
    for _ in range(2400):
        assert launcher.poll() == {}
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it does not happen")


def job_of(at: Cluster, state: str = "RUNNING") -> str:
    """Returns the id of the one job in that state."""
    [job] = at.call("squeue", "--noheader", "--array", f"--states={state}", "--format=%i").split()
    return job


def read_run(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def trained_here(run: Path) -> bytes:
    """Returns the metrics of a process on this machine that trains a copy of a directory without being disturbed."""
    copy = run.with_name(f"{run.name}-here")
    copy.mkdir()
    shutil.copy(run / "params.json", copy)
    local = Local([None], "cpu")
    local.submit(copy)
    assert wait(local) == {copy: 0}
    local.close()
    return (copy / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_search_keeps_to_its_limit_and_trains_the_same_as_local_processes(
    at_slurm: Cluster, train_py: None, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "999999")  # as if the search were a job, and one with other limits
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "no time")
    parent = tmp_path / 'it\'s a "parent" of $HOME'
    runs = [make_run(f"{parent.name}/seed={seed}", epochs=5, seed=seed) for seed in range(4)]
    launcher = Slurm(parent, 2, "cpu", {"cpus_per_task": "1", "mem_gb": "1", "setup": "export BY_SETUP='a b'"})
    for run in runs:
        launcher.submit(run)
    running: list[int] = []

    def count() -> None:
        running.append(at_slurm.call("squeue", "--noheader", "--array", "--format=%T").split().count("RUNNING"))

    assert wait(launcher, 4, count) == dict.fromkeys(runs, 0)
    assert max(running) == 2
    for run in runs:
        assert (run / "metrics.jsonl").read_bytes() == trained_here(run)
        assert len(read_run(run)["attempts"]) == 1
        assert f"--model_dir {str(run)[:10]}" in (run / "console.log").read_text().replace("'", "")
    assert {path.suffix for path in (parent / "slurm").iterdir()} == {".json", ".sh"}  # nothing to look into


@pytest.mark.slow
@pytest.mark.parametrize("way", ["before the time limit", "preempted"])
def test_an_interrupted_run_is_queued_again_and_ends_with_the_same_bytes(
    at_slurm: Cluster, train_py: None, make_run: MakeRun, tmp_path: Path, way: str
) -> None:
    run = make_run(epochs=200)
    launcher = Slurm(tmp_path, 1, "cpu")
    launcher.submit(run)
    wait_until(launcher, lambda: len(read_journal(run)) >= 2)
    if way == "preempted":  # every process of it gets SIGTERM twice
        urgent = at_slurm.call(
            "sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
        )
        assert urgent.isdigit()
    else:
        at_slurm.call("scancel", "--signal=USR2", job_of(at_slurm))
    assert wait(launcher) == {run: 0}
    first, second = read_run(run)["attempts"]
    assert (first["status"], first["reason"]) == ("interrupted", "preempted")
    assert 2 <= first["to_epoch"] == second["from_epoch"] < 200
    assert second["environment"]["SLURM_RESTART_COUNT"] == "1"
    assert (run / "metrics.jsonl").read_bytes() == trained_here(run)


@pytest.mark.slow
def test_the_time_limit_of_slurm_itself_makes_a_run_save_and_go_on(
    at_slurm: Cluster, train_py: None, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(epochs=10_000)
    launcher = Slurm(tmp_path, 1, "cpu", {"timeout_min": "1", "signal_delay_s": "50"})
    launcher.submit(run)
    wait_until(launcher, lambda: len(read_run(run)["attempts"]) == 2 if (run / "run.json").exists() else False)
    first, second = read_run(run)["attempts"]
    assert (first["status"], first["reason"]) == ("interrupted", "preempted")
    assert 0 < first["to_epoch"] == second["from_epoch"]
    launcher.cancel(run, force=True)
    assert wait(launcher) == {run: -9}


@pytest.mark.slow
def test_a_cancelled_run_saves_and_those_that_wait_vanish(
    at_slurm: Cluster, train_py: None, make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run(name, epochs=10_000) for name in "abc"]
    launcher = Slurm(tmp_path, 1, "cpu")
    for run in runs:
        launcher.submit(run)
    wait_until(launcher, lambda: len(read_journal(runs[0])) >= 2)
    for run in runs:
        launcher.cancel(run)
    assert wait(launcher, 3) == {runs[0]: 75, runs[1]: -15, runs[2]: -15}
    assert read_run(runs[0])["status"] == "interrupted"
    assert (runs[0] / "last.pth.tar").exists()
    assert not (runs[1] / "console.log").exists()


@pytest.mark.slow
def test_a_user_may_cancel_behind_the_back_of_the_search(
    at_slurm: Cluster, train_py: None, make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run(name, epochs=10_000) for name in "ab"]
    launcher = Slurm(tmp_path, 1, "cpu")
    for run in runs:
        launcher.submit(run)
    wait_until(launcher, lambda: len(read_journal(runs[0])) >= 2)
    at_slurm.call("scancel", job_of(at_slurm).partition("_")[0])
    assert wait(launcher, 2) == {runs[0]: 75, runs[1]: -15}
    assert read_run(runs[0])["status"] == "interrupted"


@pytest.mark.slow
def test_jobs_of_a_killed_search_go_on_and_are_adopted(at_slurm: Cluster, make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(name, seconds=1) for name in "abc"]
    code = f"""
import sys, time
from pathlib import Path
from sweep.launchers import base, slurm
base.TRAIN = Path({str(base.TRAIN)!r})
launcher = slurm.Slurm(Path({str(tmp_path)!r}), 1, "cpu")
for run in {[str(run) for run in runs]!r}:
    launcher.submit(Path(run))
while True:
    launcher.poll()
    print("handed over", flush=True)
    time.sleep(0.1)
"""
    with subprocess.Popen([str(PYTHON), "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as search:
        assert search.stdout is not None
        assert search.stdout.readline() == b"handed over\n"
        search.kill()
    launcher = Slurm(tmp_path, 2, "cpu")
    assert all(launcher.adopt(run) for run in runs)
    assert wait(launcher, 3) == dict.fromkeys(runs, 0)
    for run in runs:
        assert (run / "console.log").read_text().count("--- 2") == 1
    assert not Slurm(tmp_path, 1, "cpu").adopt(runs[0])


@pytest.mark.slow
def test_a_directory_that_another_run_holds_is_left_alone(
    at_slurm: Cluster, train_py: None, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(epochs=2)
    launcher = Slurm(tmp_path, 1, "cpu")
    with FileLock(run / ".lock"):
        launcher.submit(run)
        assert wait(launcher) == {run: 75}
    assert not (run / "run.json").exists()


@pytest.mark.slow
def test_failures_come_with_their_status_and_those_of_the_job_with_a_line(
    at_slurm: Cluster,
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(slurm, "GRACE_SECONDS", 1)
    failing, dying = make_run("failing", do="fail"), make_run("dying", do="segfault")
    launcher = Slurm(tmp_path, 2, "cpu")
    launcher.submit(failing)
    launcher.submit(dying)
    assert wait(launcher, 2) == {failing: 2, dying: -11}
    broken = make_run("broken")
    launcher = Slurm(tmp_path, 1, "cpu", {"setup": "exit 3"})
    launcher.submit(broken)
    assert wait(launcher) == {broken: -9}
    assert "ended without a result, as FAILED: see" in (broken / "console.log").read_text()
    launcher = Slurm(tmp_path, 1, "cpu", {"partition": "gpu"})
    launcher.submit(make_run("refused"))
    with pytest.raises(RunError, match=r"^Slurm refuses the jobs: .*[Ii]nvalid partition name specified; see --laun"):
        launcher.poll()
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_the_controller_may_go_away_and_come_back(
    at_slurm: Cluster, make_run: MakeRun, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "AWAY_SECONDS", 1)
    monkeypatch.setattr(slurm, "GRACE_SECONDS", 1)
    runs = [make_run(name, seconds=3) for name in "ab"]
    launcher = Slurm(tmp_path, 1, "cpu")
    for run in runs:
        launcher.submit(run)
    wait_until(launcher, lambda: (runs[0] / "pid").exists())
    with at_slurm.without_controller():
        while "Slurm does not answer" not in lines[-1]:
            assert launcher.poll() == {}
            time.sleep(0.05)
    assert wait(launcher, 2) == dict.fromkeys(runs, 0)
    assert lines[2:] == ["Slurm answers again"]


@pytest.mark.slow
def test_a_run_has_as_many_threads_as_cores(
    at_slurm: Cluster, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, threads in ((None, "3"), ("7", "7")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        run = make_run(f"threads-{threads}")
        launcher = Slurm(tmp_path, 1, "cpu", {"cpus_per_task": "3"})
        launcher.submit(run)
        assert wait(launcher) == {run: 0}
        assert json.loads((run / "record.json").read_text())["threads"] == threads

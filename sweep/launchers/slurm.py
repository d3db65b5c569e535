"""Jobs of a Slurm cluster, through submitit; what to install and to say is in docs/clusters.md.

A run is a job that starts `train.py` and whose result is its exit status. Slurm's queue is the only truth of what waits
and runs; nothing here needs its accounting (sacct), which many clusters do not have.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from process import log
from sweep.launchers import base
from utils import FAILED, OK, TEMPORARY, RunError, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]

RESULT_SECONDS = 0.5  # between two looks for results,
QUEUE_SECONDS = 5.0  # at the queue, for all jobs at once,
AWAY_SECONDS = 30.0  # and at a queue that has not answered
COMMAND_SECONDS = 60.0  # an unreachable slurmctld is given up by Slurm's commands after some 10
GRACE_SECONDS = 30.0  # on a network disk a result may be seen so much later than the end of its job
MAX_ARRAY = 1_001  # where Slurm does not say its MaxArraySize
IDS_AT_ONCE = 500  # on a command line

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
READ_BY_SLURM = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "PMI_", "PMIX_")
QUEUE_FORMAT = "--format=%i|%T|%M|%r"  # id, state, time it has run, reason to wait
SIGNAL = "USR2"  # from Slurm before the time limit of a job
AWAY = ("Unable to contact", "timed out", "Connection refused", "Zero Bytes")  # in what its commands say then
ENDED = (  # states in which a job will not run again
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
STUCK = (  # reasons for which a job waits until a person does something
    *("BadConstraints", "DependencyNeverSatisfied", "JobHeldAdmin", "JobHeldUser", "PartitionInactive"),
    *("PartitionNodeLimit", "PartitionTimeLimit", "launch_failed_requeued_held"),
)
TEXTS = ("account", "constraint", "exclude", "gres", "nodelist", "partition", "qos", "reservation", "setup")
NUMBERS: dict[str, tuple[type[int] | type[float], float]] = {  # with the least that each may be
    "cpus_per_task": (int, 1),
    "gpus_per_node": (int, 0),
    "mem_gb": (float, 0.001),
    "signal_delay_s": (int, 1),
    "timeout_min": (int, 1),
}
DEFAULTS = {"timeout_min": 60, "signal_delay_s": 120}
OWN_WISHES = ("account", "constraint", "partition", "qos", "reservation")  # SBATCH_ACCOUNT=... may say them, too


# --- what is told on the command line ---------------------------------------------------------------------


def read_options(given: Mapping[str, str]) -> dict[str, Any]:
    """Returns checked options of `--launcher_options`, with defaults; what is left out is the cluster's affair.

    Raises:
        RunError: With a line for each problem.
    """
    options: dict[str, Any] = dict(DEFAULTS)
    problems = []
    for name, text in given.items():
        if name in TEXTS:
            options[name] = text
            if not text.strip() or not text.isprintable():
                problems.append(f"{name}: {text!r} is empty or has characters that cannot be printed")
        elif name in NUMBERS:
            kind, least = NUMBERS[name]
            try:
                options[name] = kind(text)
                if not least <= options[name] < 1e9:
                    problems.append(f"{name}: {text} is not from {least} to 1e9")
            except ValueError:
                problems.append(f"{name}: {text!r} is not {'a whole number' if kind is int else 'a number'}")
        else:
            problems.append(f"{name}: unknown; known are {', '.join(sorted([*TEXTS, *NUMBERS]))}")
    if not problems and options["signal_delay_s"] >= 60 * options["timeout_min"]:
        problems.append("signal_delay_s: a job would be told to end as it begins; give it more timeout_min")
    if problems:
        raise RunError("\n".join(f"--launcher_options: {problem}" for problem in problems))
    return options


def parameters(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns options in the words of submitit's SlurmExecutor."""
    same = {"cpus_per_task", "gpus_per_node", *TEXTS} - {"reservation", "setup"}
    plain = {key: value for key, value in options.items() if key in same}
    more = {"signal": f"{SIGNAL}@{options['signal_delay_s']}", "requeue": True}
    if "reservation" in options:
        more["reservation"] = options["reservation"]
    if "mem_gb" in options:
        plain["mem"] = f"{round(1024 * options['mem_gb'])}M"
    if "cpus_per_task" in options:
        plain["srun_args"] = [f"--cpus-per-task={options['cpus_per_task']}"]  # srun does not take it over since 22.05
    # A job finds this file from wherever it was submitted, and whatever `module load` has made of the path.
    path = f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    plain["setup"] = [*([options["setup"]] if "setup" in options else []), path]
    return {**plain, "time": options["timeout_min"], "job_name": name, "wckey": None, "additional_parameters": more}


def job_name(parent: Path) -> str:
    """Returns a name that every Slurm and every tool beside it takes."""
    return "kdlab-" + re.sub(r"[^A-Za-z0-9._-]", "-", parent.absolute().name)[:50]


# --- what runs in the job ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a job does: runs `command`, which trains `model_dir`, in the folder that the search was started in."""

    command: Sequence[str]
    model_dir: Path
    folder: Path

    def __call__(self) -> int:
        """Returns the exit status of the command, unless the job is queued again to go on.

        Slurm sends its signals to every process of a job, and SIGTERM twice within milliseconds where it preempts one;
        train.py would end at the second without saving. So it gets none of them, and one SIGUSR1 from here.
        """
        job = importlib.import_module("submitit").JobEnvironment()
        job.paths.result_pickle.unlink(missing_ok=True)  # of an attempt that Slurm has preempted
        threads = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
        environment = {**({"OMP_NUM_THREADS": threads} if threads else {}), **os.environ}
        told: list[int] = []

        def relay(number: int, _: FrameType | None) -> None:
            told.append(number)
            if len(told) == 1:
                process.send_signal(signal.SIGUSR1)

        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):  # from a person's `scancel --signal`, to both
            signal.signal(number, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # which a new process inherits
        with (self.model_dir / "console.log").open("ab") as console:
            console.write(base.heading(list(self.command)))
            console.flush()
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment,
            )
            for number in (signal.SIGTERM, signal.SIGUSR2):
                signal.signal(number, relay)
            status = process.wait()
            if told and status == -signal.SIGUSR1:  # it came before train.py could save anything
                return -told[0]
            if status == TEMPORARY and told and told[0] == signal.SIGUSR2:
                again = subprocess.run(["scontrol", "requeue", job.job_id], capture_output=True, text=True)
                if again.returncode == 0:
                    raise SystemExit(status)  # without a result, for this is not the end of the job
                console.write(f"Slurm does not queue job {job.job_id} again: {again.stderr.strip()}\n".encode())
        return status


# --- what the search sees ---------------------------------------------------------------------------------


class NoAnswer(Exception):
    """A command of Slurm has failed."""

    @property
    def away(self) -> bool:
        """Whether slurmctld cannot be reached, which may pass."""
        return any(words in str(self) for words in AWAY)


@dataclass
class Job:
    """A run that was handed over."""

    id: str  # 12, or 12_3 in an array
    handle: Any  # submitit's
    began: bool = False
    state: str = "PENDING"  # as the queue had it last
    gone: float | None = None  # since when it will not run again, by the queue
    told: int = 0  # 1: to save and end; 2: it is killed


class Slurm:
    """A queue of Slurm, to which runs are handed over as job arrays.

    Args:
        parent: The directory of the search; `slurm` in it keeps what submitit writes, and which job is whose.
        jobs: How many may run at a time.
        device: Handed to train.py.
        options: See `read_options`.

    Raises:
        RunError: There is no submitit, no Slurm or no answer from it, or an option is wrong.
    """

    queues = True
    place = "Slurm"
    slots = 100_000

    def __init__(self, parent: Path, jobs: int, device: str = "auto", options: Mapping[str, str] | None = None) -> None:
        self.at_once, self._device, self._options = jobs, device, read_options(options or {})
        self._parent = parent.absolute()
        self._folder = self._parent / "slurm"
        if "%" in str(self._folder):
            raise RunError(f"--launcher slurm: {self._parent}: Slurm reads % in a path as a pattern; rename the folder")
        if missing := [name for name in COMMANDS if shutil.which(name) is None]:
            where = "start the search on a machine that can submit jobs"
            raise RunError(f"--launcher slurm: no {', '.join(missing)} here; {where}")
        try:
            submitit = importlib.import_module("submitit")
        except ModuleNotFoundError:
            raise RunError("--launcher slurm needs submitit: pip install -r requirements-slurm.txt") from None
        self._failures = (OSError, submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError)
        self._executor = submitit.SlurmExecutor(self._folder)
        self._executor.update_parameters(**parameters(self._options, job_name(self._parent)))
        self._collected: dict[Path, Run] = {}
        self._jobs: dict[Path, Job] = {}
        self._throttles: dict[str, int] = {}  # of an array: how many of it may run at a time
        self._cancels: dict[str, bool] = {}  # id -> whether it is killed, until Slurm is told
        self._dropped: dict[Path, int] = {}
        self._stuck: set[str] = set()
        self._away = False
        self._looked = self._asked = float("-inf")
        try:
            config = ask_slurm("scontrol", "show", "config")
            queue = self._ask()
        except NoAnswer as error:
            raise RunError(f"Slurm does not answer: {error}", "usage", TEMPORARY) from None
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
        self._max_array = int(found.group(1)) if found else MAX_ARRAY
        self._earlier = self._read_earlier(queue)

    # --- the contract ---

    def submit(self, model_dir: Path) -> None:
        """Collects; the next `poll` hands all over together, as an array is one job to Slurm until it runs."""
        command = base.command(model_dir.absolute(), self._device)
        self._collected[model_dir] = Run(command, model_dir.absolute(), Path.cwd())

    def adopt(self, model_dir: Path) -> bool:
        if (job := self._earlier.pop(model_dir.resolve(), None)) is None:
            return False
        self._jobs[model_dir] = job
        return True

    def poll(self) -> dict[Path, int]:
        if not self._away:
            self._tell()
        if not self._away:
            self._hand_over()
        ended, self._dropped = self._dropped, {}
        now = time.monotonic()
        if self._jobs and now - self._looked >= RESULT_SECONDS:
            self._looked = now
            results = {path.name for path in self._folder.glob("*_result.pkl")}
            open_question = any(job.handle.paths.result_pickle.name in results for job in self._jobs.values())
            pause = AWAY_SECONDS if self._away else QUEUE_SECONDS / 5 if open_question else QUEUE_SECONDS
            if now - self._asked >= pause:
                with contextlib.suppress(NoAnswer):
                    self._ask()
            for path, job in list(self._jobs.items()):
                status = self._status(path, job, job.handle.paths.result_pickle.name in results)
                if status is not None:
                    del self._jobs[path]
                    ended[path] = status
        return ended

    def cancel(self, model_dir: Path, force: bool = False) -> None:
        """Has it told at the next `poll`; what has not ended after Slurm's KillWait (30 s unless set) is killed."""
        if self._collected.pop(model_dir, None) is not None:
            self._dropped[model_dir] = -signal.SIGTERM
        elif (job := self._jobs.get(model_dir)) is not None and job.told <= force:
            job.told = 1 + force
            self._cancels[job.id] = force

    def occupy(self, model_dir: Path, gpu: str | None) -> bool:
        return False  # what runs on this machine takes nothing from the cluster

    def vacate(self, model_dir: Path) -> None:
        pass

    def close(self) -> None:
        self._tell()
        if self._cancels:
            log.warning("Slurm could not be told to end %s; the next search finds them", ", ".join(self._cancels))

    # --- handing over ---

    def _hand_over(self) -> None:
        """Submits what is collected, if more may run: as one array, or several where Slurm allows no larger ones."""
        while self._collected and (room := self._room()) > 0:
            # An array has its own limit, so that another one beside it may only be as large as what is left.
            number = self._max_array if room == self.at_once else room
            paths = list(self._collected)[:number]
            self._executor.update_parameters(array_parallelism=room)
            try:
                # What sbatch complains of is in the error, too.
                with inheritable(self._options), contextlib.redirect_stderr(io.StringIO()):
                    handles = self._executor.submit_array([self._collected[path] for path in paths])
            except self._failures as error:
                refusal = NoAnswer(last_line(str(error)))
                if not refusal.away:
                    raise RunError(f"Slurm refuses the jobs: {refusal}; see --launcher_options") from None
                self._note_away(refusal)
                return
            array = handles[0].job_id.partition("_")[0]
            names = [os.path.relpath(path.absolute(), self._parent) for path in paths]
            write_json(self._folder / f"{array}.json", {"at_once": room, "children": names})
            self._throttles[array] = room
            for path, handle in zip(paths, handles, strict=True):
                del self._collected[path]
                self._jobs[path] = Job(handle.job_id, handle)
            log.info("Slurm has %d runs as job %s, at most %d at a time", len(paths), array, room)

    def _room(self) -> int:
        """Returns how many may run besides those that the limits of the arrays let run."""
        unfinished = Counter(job.id.partition("_")[0] for job in self._jobs.values())
        return self.at_once - sum(min(self._throttles[array], n) for array, n in unfinished.items())

    def _read_earlier(self, queue: Mapping[str, Seen]) -> dict[Path, Job]:
        """Returns the jobs of an earlier search that are still in the queue, by directory; forgets the others."""
        found: dict[Path, Job] = {}
        alive = {job: seen for job, seen in queue.items() if seen.state not in ENDED}
        arrays = {job.partition("_")[0] for job in alive}
        for file in self._folder.glob("*.json"):
            array = file.stem
            if array not in arrays:
                if file.stat().st_uid == os.getuid():  # of another's jobs this queue says nothing
                    for path in (file, *self._folder.glob(f"{array}_*.pkl")):
                        path.unlink(missing_ok=True)
                continue
            handed = read_json(file)
            self._throttles[array] = handed["at_once"]
            for index, name in enumerate(handed["children"]):
                job = array if len(handed["children"]) == 1 else f"{array}_{index}"
                if job in alive:
                    found[(self._parent / name).resolve()] = Job(job, self._handle(job), alive[job].began)
        return found

    # --- watching ---

    def _handle(self, job: str) -> Any:
        return self._executor.job_class(self._folder, job)

    def _ask(self) -> dict[str, Seen]:
        """Looks at the queue, and at what has left it in the last minutes."""
        try:
            listed = ask_slurm("squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", QUEUE_FORMAT)
        except NoAnswer as error:
            self._note_away(error)
            raise
        finally:
            self._asked = time.monotonic()
        if self._away:
            log.info("Slurm answers again")
            self._away = False
        queue = dict(map(Seen.read, listed.splitlines()))
        for path, job in self._jobs.items():
            seen = queue.get(job.id)
            if seen is not None:
                job.state, job.began = seen.state, job.began or seen.began
                if seen.reason in STUCK and job.id not in self._stuck:
                    self._stuck.add(job.id)
                    log.warning("%s waits in vain: job %s has the reason %s", path.name, job.id, seen.reason)
            if seen is not None and seen.state not in ENDED:
                job.gone = None
            elif job.gone is None:
                job.gone = time.monotonic()
        return queue

    def _note_away(self, error: NoAnswer) -> None:
        if not self._away:
            log.warning("Slurm does not answer, waiting for it: %s", error)
        self._away = True

    def _status(self, path: Path, job: Job, has_result: bool) -> int | None:
        """Returns the exit status of a run, None as long as it may go on.

        One that was told to save and end may only have been preempted: as long as its job is in the queue, Slurm will
        start it again, and the result so far is none.
        """
        if has_result:
            try:
                status = int(job.handle.result())
            except self._failures:
                status = FAILED  # in what surrounds train.py
                if job.gone is not None:
                    self._say(path, f"job {job.id} failed: see {job.handle.paths.stderr}")
            if status != OK and job.gone is None:
                return None
            self._tidy(job, everything=status == OK)
            return status
        if job.gone is None:
            return None
        waited_only = not job.began and job.state in ("PENDING", "CANCELLED")
        at_once = job.told > 1 or (waited_only and (job.told or job.state == "CANCELLED"))
        if not at_once and time.monotonic() - job.gone < GRACE_SECONDS:
            return None
        if waited_only:
            return -signal.SIGTERM
        self._say(path, f"job {job.id} ended without a result, as {job.state}: see {job.handle.paths.stderr}")
        return -signal.SIGKILL

    def _say(self, path: Path, line: str) -> None:
        """Adds a line to console.log, where a person looks why a run has ended."""
        with contextlib.suppress(OSError), (path / "console.log").open("a") as console:
            console.write(f"Slurm: {line}\n")

    def _tidy(self, job: Job, everything: bool) -> None:
        """Removes what submitit has written about a job; its logs only if all is well."""
        paths = job.handle.paths
        logs = [paths.stdout, paths.stderr] if everything else []
        for file in (paths.submitted_pickle, paths.result_pickle, *logs):
            file.unlink(missing_ok=True)

    # --- ending ---

    def _tell(self) -> None:
        """Passes on what `cancel` has collected."""
        ids = list(self._cancels)
        for some in (ids[i : i + IDS_AT_ONCE] for i in range(0, len(ids), IDS_AT_ONCE)):
            # Only a step is killed at once, and ours is the first; for a job, --signal=KILL begins with SIGTERM, too.
            killed = [f"{job}.0" for job in some if self._cancels[job]]
            try:
                for line in ([["--signal=KILL", *killed]] if killed else []) + [some]:
                    try:
                        ask_slurm("scancel", *line)
                    except NoAnswer as error:  # one that has just ended is unknown to Slurm: no matter
                        if error.away:
                            raise
            except NoAnswer as error:
                self._note_away(error)
                return
            for job in some:
                del self._cancels[job]


# --- Slurm's commands -------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What the queue says of a job."""

    state: str
    began: bool
    reason: str

    @classmethod
    def read(cls, line: str) -> tuple[str, Seen]:
        """Returns the job's id and what a line of QUEUE_FORMAT says of it."""
        job, state, seconds, reason = line.split("|", 3)
        return job, cls(state, state == "RUNNING" or seconds != "0:00", reason.replace(" ", "_"))


def ask_slurm(*command: str) -> str:
    """Returns what a command of Slurm prints; Ctrl-C at the terminal does not reach it.

    Raises:
        NoAnswer: It has failed.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            env=without_slurm(os.environ),
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} timed out") from None
    if done.returncode:
        raise NoAnswer(last_line(done.stderr) or f"{command[0]} has failed with {done.returncode}")
    return done.stdout


def without_slurm(environment: Mapping[str, str], keep: Collection[str] = ()) -> dict[str, str]:
    """Returns an environment without what Slurm's commands read in it.

    They obey it more than their files. A search that is a job itself would hand its own limits to the jobs.
    """
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(READ_BY_SLURM) or name == "SLURM_CONF" or name in keep
    }


@contextlib.contextmanager
def inheritable(options: Mapping[str, Any]) -> Iterator[None]:
    """Makes this process's environment what a job shall inherit, and holds Ctrl-C back from sbatch."""
    before = dict(os.environ)
    keep = {f"SBATCH_{name.upper()}" for name in OWN_WISHES if name not in options}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for name in before.keys() - without_slurm(before, keep).keys():
            del os.environ[name]
        yield
    finally:
        os.environ |= before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def last_line(text: str) -> str:
    """Returns the last line, without the name of the command in front of it."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    return re.sub(r"^\w+: error: ", "", lines[-1]) if lines else ""

"""A real Slurm on this machine: slurmctld and slurmd on the loopback, from Debian's packages, which are not installed.

    with cluster(folder) as slurm:
        subprocess.run([PYTHON, "search_hyperparams.py", ..., "--launcher", "slurm"], env=slurm.environment)

Needs no root, but for what apt-get may want. Job accounting, cgroups and munge are left out: one machine, one user.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from helpers import ROOT

HOME = ROOT / ".venv-slurm"  # submitit, which the tests of everything else do without, and the unpacked packages
PYTHON = HOME / "bin" / "python"
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libhwloc15")
CONF = """
ClusterName=kdlab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
PluginDir={plugins}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
# how long a job that was queued again must wait: 120 s unless said otherwise
AuthInfo=cred_expire=5
KillWait=15
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=64000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=600 PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


class Impossible(Exception):
    """There can be no Slurm here; the reason is its text."""


def prepare() -> Path:
    """Makes `.venv-slurm`, unless an earlier call has: a venv that sees this one's packages, and Slurm's programs.

    Returns:
        The folder with Slurm's `usr`.

    Raises:
        Impossible: There is no apt-get here, or it does not get the packages.
    """
    HOME.mkdir(exist_ok=True)
    ready, wanted = (
        HOME / ".ready",
        f"{(ROOT / 'requirements-slurm.txt').read_text()}{PACKAGES}{sys.version}{sysconfig.get_path('purelib')}",
    )
    with FileLock(HOME / ".lock"):  # of the workers of pytest-xdist one does it
        if not ready.exists() or ready.read_text() != wanted:
            _unpack(HOME / "slurm")
            _run(sys.executable, "-m", "venv", "--without-pip", str(HOME))
            site = Path(_run(str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
            (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
            requirements = str(ROOT / "requirements-slurm.txt")
            _run(sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--quiet", "-r", requirements)
            ready.write_text(wanted)
    return HOME / "slurm"


def _unpack(target: Path) -> None:
    if shutil.which("apt-get") is None:
        raise Impossible("Slurm comes from Debian's packages, and there is no apt-get here")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    try:
        try:
            _run("apt-get", "download", "-qq", *PACKAGES, folder=target)
        except subprocess.CalledProcessError:  # the lists of packages may be missing, or old
            _run("apt-get", "update", "-qq")
            _run("apt-get", "download", "-qq", *PACKAGES, folder=target)
        for package in target.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(target))
    except subprocess.CalledProcessError as error:
        raise Impossible(f"{' '.join(error.cmd[:3])}: {error.stderr.strip()[-200:]}") from None


def _run(*command: str, folder: Path | None = None) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


class Cluster:
    """A Slurm of one node; made by `cluster`.

    Attributes:
        environment: In which its commands, and so `--launcher slurm`, find it.
    """

    def __init__(self, folder: Path, environment: dict[str, str], usr: Path) -> None:
        self.environment, self._folder = environment, folder
        self._programs, self._daemons = usr / "sbin", dict[str, subprocess.Popen[bytes]]()

    def call(self, *command: str) -> str:
        """Returns what a command of Slurm prints, whether it succeeds or not."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout.strip()

    def begin(self) -> None:
        self._start("slurmctld-wlm", "-D")
        self._start("slurmd-wlm", "-D", "-N", "localhost", "-d", str(self._programs / "slurmstepd-wlm"))
        for _ in range(100):
            if (states := self.call("sinfo", "--noheader", "--format=%T").split()) and set(states) == {"idle"}:
                return
            time.sleep(0.2)
        raise RuntimeError(f"Slurm does not begin: {(self._folder / 'log').read_text()[-2000:]}")

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Takes slurmctld away for as long as the context lasts; what runs goes on."""
        self._stop("slurmctld-wlm")
        try:
            yield
        finally:
            self._start("slurmctld-wlm", "-D")

    def end(self) -> None:
        if jobs := self.call("squeue", "--noheader", "--array", "--format=%i").split():
            self.call("scancel", "--signal=KILL", *(f"{job}.0" for job in jobs))
            self.call("scancel", *jobs)
        for _ in range(50):
            if not self.call("squeue", "--noheader"):
                break
            time.sleep(0.2)
        for name in list(self._daemons):
            self._stop(name)

    def _start(self, name: str, *arguments: str) -> None:
        with (self._folder / "log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [str(self._programs / name), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(10)
        daemon.kill()
        daemon.wait()


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 4) -> Iterator[Cluster]:
    """Runs a Slurm as long as the context lasts, and leaves no process behind.

    Args:
        folder: Where all its state goes.
        cpus: That its node believes to have.

    Raises:
        Impossible: See `prepare`.
    """
    usr = prepare() / "usr"
    plugins = next(usr.glob("lib/*/slurm-wlm"), None)
    if plugins is None:
        raise Impossible(f"no plugins of Slurm in {usr}")
    with contextlib.ExitStack() as sockets:
        free = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [port.getsockname()[1] for port in free]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    conf, user = folder / "slurm.conf", pwd.getpwuid(os.getuid()).pw_name
    conf.write_text(CONF.format(ports=ports, user=user, plugins=plugins, folder=folder, cpus=cpus))
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    paths = {"PATH": f"{usr / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": f"{plugins}:{plugins.parent}"}
    slurm = Cluster(folder, {**outside, **paths, "SLURM_CONF": str(conf)}, usr)
    try:
        slurm.begin()
        yield slurm
    finally:
        slurm.end()
        _bury(conf)


def _bury(conf: Path) -> None:
    """Kills what is left of the jobs of this Slurm, by the configuration that they were started with."""
    mark = f"SLURM_CONF={conf}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0") and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)

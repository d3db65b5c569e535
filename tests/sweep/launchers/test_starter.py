"""Claims about children that a starter has made: they are those of `python train.py`, but for the time they take."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Make, read_journal

from checkpoint import load_checkpoint
from sweep.launchers import base, starter
from sweep.launchers.starter import Started, Starter, StarterError

TRAIN = Path(starter.__file__).parents[2] / "train.py"
# What a script sees of itself; whatever differs from one process to the next by its nature is left out.
TELL = """
import json, os, pathlib, random, signal, sys, threading
print(json.dumps({
    "argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path, "directory": os.getcwd(),
    "environment": dict(os.environ), "typed": sys.stdin.read(), "open": sorted(os.listdir("/proc/self/fd"), key=int),
    "head": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()], "threads": threading.active_count(),
    "handlers": {number.name: str(signal.getsignal(number)) for number in signal.Signals},
    "terminal": [sys.stdin.isatty(), sys.stdout.isatty(), sys.stderr.isatty()], "nice": os.nice(0),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "one file": os.path.sameopenfile(1, 2),
    "buffered": not sys.stdout.line_buffering, "main": sys.modules["__main__"].__dict__ is globals(),
}))
"""


@pytest.fixture(autouse=True)
def load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "MODULES", ())


@pytest.fixture
def starters() -> Iterator[list[Starter]]:
    """Those that a test has made, to be ended after it."""
    made: list[Starter] = []
    yield made
    for one in made:
        one.close()


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., ModuleType]:
    """Puts the starter into a repository of its own, with a module `own` that it loads."""

    def copy(own: str) -> ModuleType:
        path = tmp_path / "repository" / "sweep" / "launchers" / "starter.py"
        path.parent.mkdir(parents=True)
        path.write_text(Path(starter.__file__).read_text())
        (tmp_path / "repository" / "own.py").write_text(own)
        spec = importlib.util.spec_from_file_location("copied_starter", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.MODULES = ("own",)  # type: ignore[attr-defined]
        return module

    return copy


def wait_for(condition: Callable[[], Any]) -> Any:
    for _ in range(1000):
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("waited for too long")


def start(one: Starter, console: Path, *arguments: str) -> Started:
    console.touch()
    return wait_for(lambda: one.start([sys.executable, *arguments], console))


def end(started: Started) -> int:
    wait_for(lambda: started.poll() is not None)
    assert started.returncode is not None
    return started.returncode


def script(folder: Path, text: str) -> str:
    path = folder / "some_script.py"
    path.write_text(text)
    return str(path)


def is_there(pid: int) -> bool:
    """Tells whether a process exists, a dead one that nobody has buried included."""
    return Path(f"/proc/{pid}").exists()


def is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_child_finds_itself_as_python_would_have_made_it(tmp_path: Path, starters: list[Starter]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    told = [script(tmp_path, TELL), "--model_dir", "a b", "ü"]
    with (tmp_path / "plain").open("ab") as file, (tmp_path / "left_open").open("ab"):
        line, null = [sys.executable, *told], subprocess.DEVNULL
        subprocess.run(line, stdin=null, stdout=file, stderr=file, env=environment, start_new_session=True, check=True)
        starters.append(Starter(environment))
        assert end(start(starters[0], tmp_path / "forked", *told)) == 0
    plain, forked = (json.loads((tmp_path / name).read_text()) for name in ("plain", "forked"))
    assert forked == plain
    assert forked["head"] == [True, True]
    assert forked["argv"] == told


@pytest.mark.parametrize(
    "text",
    [
        "import sys; sys.exit(7)",
        "import sys; sys.exit('a word')",
        "raise SystemExit",
        "raise ValueError('a fault')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "import signal; signal.raise_signal(signal.SIGINT)",
        "import atexit, os; atexit.register(print, 'at the end'); print('printed')",
        "import threading, time; threading.Thread(target=lambda: [time.sleep(0.1), print('waited for')]).start()",
        "import os; os._exit(99)",
    ],
)
def test_a_child_ends_as_python_would_have_ended(tmp_path: Path, starters: list[Starter], text: str) -> None:
    told = script(tmp_path, text)
    plain = subprocess.run([sys.executable, told], capture_output=True, text=True)
    starters.append(Starter(os.environ))
    started = start(starters[0], tmp_path / "console", told)
    assert end(started) == plain.returncode
    said = (tmp_path / "console").read_text()
    assert said.startswith(plain.stdout)
    assert said.splitlines()[-1:] == (plain.stdout + plain.stderr).splitlines()[-1:]  # of a traceback
    assert not is_there(started.pid)


def test_what_is_sent_to_the_searchs_group_does_not_reach_it(starters: list[Starter]) -> None:
    starters.append(Starter(os.environ))
    assert os.getsid(starters[0]._process.pid) == starters[0]._process.pid


def test_what_a_child_says_is_appended(tmp_path: Path, starters: list[Starter]) -> None:
    (tmp_path / "console").write_text("first\n")
    starters.append(Starter(os.environ))
    end(
        start(
            starters[0], tmp_path / "console", script(tmp_path, "import sys; print('a'); print('b', file=sys.stderr)")
        )
    )
    assert sorted((tmp_path / "console").read_text().splitlines()) == ["a", "b", "first"]


def test_no_two_children_draw_the_same(
    tmp_path: Path, starters: list[Starter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter, "MODULES", ("random", "numpy.random", "tempfile", "uuid"))
    text = "import numpy, random, tempfile, uuid\n"
    text += "print(random.random(), numpy.random.rand(), tempfile.mktemp(), uuid.uuid4(), sep='\\n')"
    starters.append(Starter(os.environ))
    for name in ("a", "b"):
        end(start(starters[0], tmp_path / name, script(tmp_path, text)))
    drawn = [(tmp_path / name).read_text().splitlines() for name in ("a", "b")]
    assert len(drawn[0]) == 4
    assert not set(drawn[0]) & set(drawn[1])


def test_the_whole_group_of_a_child_can_be_told_to_end_as_soon_as_it_is_known(
    tmp_path: Path, starters: list[Starter]
) -> None:
    starters.append(Starter(os.environ))
    for _ in range(10):
        started = start(starters[0], tmp_path / "console", script(tmp_path, "import time; time.sleep(60)"))
        os.killpg(started.pid, signal.SIGTERM)
        assert end(started) == -signal.SIGTERM


def test_children_run_side_by_side_and_end_in_any_order(tmp_path: Path, starters: list[Starter]) -> None:
    told = script(tmp_path, "import sys, time; time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))")
    starters.append(Starter(os.environ))
    slow, fast = (start(starters[0], tmp_path / "console", told, *words) for words in (("1", "1"), ("0", "2")))
    assert end(fast) == 2
    assert slow.poll() is None
    assert end(slow) == 1
    assert slow.poll() == 1


def test_nothing_is_waited_for_while_modules_load(copied: Callable[..., ModuleType], tmp_path: Path) -> None:
    one = copied("import time; time.sleep(60)").Starter(os.environ)
    begun = time.monotonic()
    assert one.start([sys.executable, "x"], tmp_path / "console") is None
    one.close()
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("own", "why"),
    [
        ("raise SystemExit(3)", "the process that held it has ended with exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "the process that held it was killed by signal 9"),
        ("import nowhere", "the process that held it has ended with exit status 1"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()",
         "a module has started a thread"),
    ],
)  # fmt: skip
def test_a_starter_that_is_of_no_use_says_why(
    copied: Callable[..., ModuleType], tmp_path: Path, own: str, why: str
) -> None:
    module = copied(own)
    one = module.Starter(os.environ)
    with pytest.raises(module.StarterError, match=why):
        start(one, tmp_path / "console", "x")
    one.close()


def test_threads_that_a_library_ends_at_a_fork_are_no_hindrance(
    tmp_path: Path, starters: list[Starter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter, "MODULES", ("numpy",))
    starters.append(Starter({**os.environ, "OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"}))
    assert end(start(starters[0], tmp_path / "console", script(tmp_path, "import numpy"))) == 0


def test_no_child_runs_code_of_two_ages_and_those_that_run_are_still_told_of(
    copied: Callable[..., ModuleType], tmp_path: Path
) -> None:
    module = copied("value = 1")
    one = module.Starter(os.environ)
    told = script(tmp_path, "import own, sys, time; time.sleep(0.3); sys.exit(own.value)")
    started = start(one, tmp_path / "console", told)
    own = tmp_path / "repository" / "own.py"
    own.write_text("value = 2")
    os.utime(own, ns=(1, 1))  # by its time alone: also an older one, as of a file that was put back
    with pytest.raises(module.StarterError, match="the code has changed meanwhile"):
        one.start([sys.executable, told], tmp_path / "console")
    assert end(started) == 1
    one.close()


def test_children_outlive_a_starter_that_was_killed_and_their_end_is_seen(
    tmp_path: Path, starters: list[Starter]
) -> None:
    starters.append(Starter(os.environ))
    told = script(tmp_path, "import pathlib, sys, time; time.sleep(0.5); pathlib.Path(sys.argv[1]).touch()")
    started = start(starters[0], tmp_path / "console", told, str(tmp_path / "done"))
    starters[0]._process.kill()
    with pytest.raises(StarterError, match="the process that held it was killed by signal 9"):
        starters[0].start([sys.executable, told], tmp_path / "console")
    assert started.poll() is None
    assert end(started) == 1
    assert (tmp_path / "done").exists()


def test_a_starter_that_hangs_is_given_up_and_no_child_comes_of_it_later(
    tmp_path: Path, starters: list[Starter]
) -> None:
    starters.append(Starter(os.environ))
    told = script(tmp_path, "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()")
    end(start(starters[0], tmp_path / "console", told, str(tmp_path / "first")))
    starters[0]._channel.settimeout(0.2)
    starters[0]._process.send_signal(signal.SIGSTOP)
    with pytest.raises(StarterError, match="the process that holds it does not answer"):
        starters[0].start([sys.executable, told, str(tmp_path / "second")], tmp_path / "console")
    starters[0]._process.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    assert (tmp_path / "first").exists()
    assert not (tmp_path / "second").exists()


def test_a_child_that_cannot_be_watched_does_not_go_on(
    tmp_path: Path, starters: list[Starter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> int:
        raise OSError("Too many open files")

    told = script(tmp_path, "import pathlib, sys, time; time.sleep(0.3); pathlib.Path(sys.argv[1]).touch()")
    starters.append(Starter(os.environ))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", refuse)
        assert not Starter.works_here()
        with pytest.raises(StarterError, match="Too many open files"):
            start(starters[0], tmp_path / "console", told, str(tmp_path / "done"))
    time.sleep(0.6)
    assert not (tmp_path / "done").exists()


def test_a_killed_search_takes_the_starter_with_it_but_not_the_children(tmp_path: Path) -> None:
    told = script(tmp_path, "import time; time.sleep(60)")
    search = f"""
import os, pathlib, sys, time
sys.path.insert(0, {str(TRAIN.parent)!r})
from sweep.launchers import starter
starter.MODULES = ()
one = starter.Starter(os.environ)
while (started := one.start(["", {told!r}], pathlib.Path({str(tmp_path / "console")!r}))) is None:
    time.sleep(0.01)
print(one._process.pid, started.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", search], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        of_starter, of_child = map(int, process.stdout.readline().split())
        process.kill()
    wait_for(lambda: is_dead(of_starter))
    assert not is_dead(of_child)
    os.killpg(of_child, signal.SIGKILL)


def test_training_is_bitwise_that_of_the_plain_command(
    make_experiment: Make, tmp_path: Path, starters: list[Starter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real train.py and all that it loads
    folders = {name: make_experiment(name) for name in ("plain", "forked", "again")}
    starters.append(Starter(os.environ))
    commands = {name: base.command(folder, "cpu") for name, folder in folders.items()}
    subprocess.run(commands["plain"], check=True)
    for name in ("forked", "again"):
        assert end(start(starters[0], folders[name] / "console.log", *commands[name][1:])) == 0
    states = {name: load_checkpoint(folder / "last.pth.tar")[0] for name, folder in folders.items()}
    for name in ("forked", "again"):
        assert (folders[name] / "console.log").read_text() == ""
        assert len(read_journal(folders[name])) == 2
        assert (folders[name] / "metrics.jsonl").read_bytes() == (folders["plain"] / "metrics.jsonl").read_bytes()
        for key, weights in states["plain"]["state_dict"].items():
            assert torch.equal(states[name]["state_dict"][key], weights)
    runs = {name: json.loads((folder / "run.json").read_text())["attempts"][0] for name, folder in folders.items()}
    of_its_own = ("argv", "pid", "started", "seconds", "overrides")
    plain, forked = ({k: v for k, v in runs[name].items() if k not in of_its_own} for name in ("plain", "forked"))
    assert forked == plain
    assert runs["forked"]["argv"] == commands["forked"][1:]

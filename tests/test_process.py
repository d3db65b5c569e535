"""How a script logs, heeds signals and ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from helpers import ROOT

import process
from process import EpochBar, StopSignals, log, provenance, run_main, set_logger
from utils import RunError

# --- logging and progress ---------------------------------------------------------------------------------


def test_a_second_run_in_one_process_logs_into_its_own_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        set_logger(tmp_path / name)
        log.info("about %s", name)
        log.info("again")
    assert "second" not in (tmp_path / "first").read_text()
    lines = (tmp_path / "second").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith(":INFO: about second")
    assert capsys.readouterr().out == "about first\nagain\nabout second\nagain\n"


def test_warnings_of_libraries_reach_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_logger(tmp_path / "log", quiet=True)
    log.info("quiet")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("look here", stacklevel=1)
    assert "look here" in (tmp_path / "log").read_text()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "look here" in captured.err


def test_a_full_disk_costs_the_log_file_and_one_line(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    code = (
        "import resource, process\n"
        "from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        f"process.set_logger(Path({str(path)!r}))\n"
        "for number in range(50): process.log.info('line %d', number)\n"
        "process.set_logger()\n"
        "process.log.info('the end')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [*(f"line {number}" for number in range(50)), "the end"]
    assert done.stderr == f"cannot write {path}: File too large; going on without it\n"
    assert path.stat().st_size == 300


def test_a_line_that_cannot_be_formed_is_a_fault_of_the_program_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_logger(tmp_path / "log", quiet=True)
    log.info("%d", "no number")
    log.info("next")
    assert "TypeError" in capsys.readouterr().err
    assert (tmp_path / "log").read_text().endswith("next\n")


def test_without_a_terminal_the_bar_is_silent_and_reads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = EpochBar("epoch 1/1", 3, 0, quiet=False)
    for done in range(3):
        bar.show(done, lambda: pytest.fail("means() waits for the device"))
    bar.close()
    assert capsys.readouterr().err == ""


# --- how a script ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (RunError("one line", "params"), 2, "one line\n"),
        (RunError("later", "storage", 1), 1, "later\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_for_people_are_one_line_with_their_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, told: str
) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == status
    assert capsys.readouterr().err == told


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import process; process.run_main(lambda: [print('x' * 100) for _ in range(10000)] and 0)"
    command = f'{sys.executable} -c "{code}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"


def test_a_signal_is_remembered_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        error = stop.error("after epoch 3")
    assert signal.getsignal(signal.SIGTERM) == before
    assert (error.exit_status, error.reason) == (143, "signal")
    assert str(error) == "stopped by SIGTERM after epoch 3; the same command goes on from there"


def test_a_signal_that_comes_twice_at_once_is_one_wish() -> None:
    """Slurm's preemption sends SIGTERM twice within milliseconds."""
    with StopSignals() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM


def test_a_second_signal_kills() -> None:
    code = (
        "import os, signal, time, process\n"
        "with process.StopSignals():\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2); os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert "still here" not in done.stdout


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_provenance_names_code_packages_and_machine_but_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    facts = provenance()
    assert facts["packages"].keys() == set(process.PACKAGES)
    assert facts["environment"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert "secret" not in json.dumps(facts)
    json.dumps(facts, allow_nan=False)


def test_outside_a_repository_there_is_no_commit_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "__file__", str(tmp_path / "process.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert process.git_state() is None
    monkeypatch.setenv("PATH", "")
    assert process.git_state() is None

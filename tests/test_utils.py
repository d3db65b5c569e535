"""The process and its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import ROOT

import utils
from utils import (
    EpochBar,
    Params,
    RunError,
    StopSignals,
    apply_overrides,
    differences,
    flatten,
    follow,
    link_file,
    log,
    provenance,
    read_json,
    run_main,
    set_logger,
    write_file,
    write_json,
)

# --- files ------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_json_is_written_whole_and_read_back(tmp_path: Path) -> None:
    path, value = tmp_path / "a.json", {"accuracy": 0.5, "name": "größe", "list": [1, None, True]}
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_text().endswith("}\n")


def test_json_that_is_no_json_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_file_keeps_the_permissions_that_the_user_gives_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640  # not the 0600 of a temporary file


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*a: No space left on device \(need 0.0 MB, have") as ended:
        write_file(path, b"new")
    assert (ended.value.reason, ended.value.exit_status) == ("storage", 1)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_name_may_hold_anything_a_file_system_takes(tmp_path: Path) -> None:
    folder = tmp_path / "a b'\"$(x)\n-rf ü"
    folder.mkdir()
    write_json(folder / "a.json", {"a": 1})
    link_file(folder / "a.json", folder / "b.json")
    assert read_json(folder / "b.json") == {"a": 1}


def test_a_link_replaces_its_target_and_is_no_copy(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    link_file(tmp_path / "a", tmp_path / "b")
    link_file(tmp_path / "a", tmp_path / "b")  # once more: a rename between two links to one file does nothing
    assert (tmp_path / "b").samefile(tmp_path / "a")
    assert names(tmp_path) == ["a", "b"]


def test_a_journals_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(follow(path)) == []
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert list(follow(path)) == [{"epoch": 1}, {"epoch": 2}]


# --- params -----------------------------------------------------------------------------------------------

RAW = {"seed": 1, "student": {"name": "cnn", "width": 4}, "loss": {"name": "kd", "alpha": 0.9}, "teacher": "a/b"}


def raw() -> dict[str, object]:
    return json.loads(json.dumps(RAW))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("loss.alpha=0.5", "loss.alpha", 0.5),
        ("alpha=0.5", "loss.alpha", 0.5),
        ("seed=3", "seed", 3),
        ("loss.temperature=4", "loss.temperature", 4),
        ("learning_rate=1e-3", "learning_rate", 0.001),
        ("dataset.data_dir=/a=b/c d", "dataset.data_dir", "/a=b/c d"),
        ("student.name=resnet18", "student.name", "resnet18"),
        ("teacher=x/y", "teacher", "x/y"),
        ("teacher=null", "teacher", None),
        ("x.flag=true", "x.flag", True),
        ('x.text="5"', "x.text", "5"),
        ("x.list=[1, 2]", "x.list", [1, 2]),
        ("x.empty=", "x.empty", ""),
    ],
)
def test_an_override_sets_one_option(override: str, key: str, value: object) -> None:
    values = raw()
    assert apply_overrides(values, [override]) == [key]
    assert flatten(values)[key] == value
    assert set(differences(RAW, values)) == ({key} if flatten(RAW).get(key, "absent") != value else set())


def test_differences_name_each_option_with_both_values() -> None:
    other = raw() | {"loss": {"name": "kd", "temperature": 2}}
    assert differences(RAW, other) == {"loss.alpha": "0.9 -> 'absent'", "loss.temperature": "'absent' -> 2"}
    assert differences(RAW, raw()) == {}


def test_params_are_read_by_name() -> None:
    params = Params({"seed": 3, "loss": {"name": "ce"}})
    assert params.seed == 3
    assert params.loss["name"] == "ce"
    with pytest.raises(AttributeError, match="no key 'alpha'"):
        _ = params.alpha


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
    code = "import utils; utils.run_main(lambda: [print('x' * 100) for _ in range(10000)] and 0)"
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


def test_a_second_signal_kills() -> None:
    code = (
        "import os, signal, utils\n"
        "with utils.StopSignals():\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\n"
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
    assert facts["packages"].keys() == set(utils.PACKAGES)
    assert facts["environment"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert "secret" not in json.dumps(facts)
    json.dumps(facts, allow_nan=False)


def test_outside_a_repository_there_is_no_commit_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert utils.git_state() is None
    monkeypatch.setenv("PATH", "")
    assert utils.git_state() is None

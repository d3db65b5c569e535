"""Files of an experiment directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from utils import (
    Params,
    RunError,
    apply_overrides,
    differences,
    flatten,
    link_file,
    read_json,
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

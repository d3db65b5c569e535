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
    teachers_of,
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


LIST = [{"name": "ce"}, {"name": "kd", "alpha": 0.9}, {"name": "kd", "alpha": 0.1}]


@pytest.mark.parametrize(
    ("override", "key", "place", "option", "value"),
    [
        ("loss.ce.weight=2", "loss.ce.weight", 0, "weight", 2),
        ("weight=2", "loss.ce.weight", 0, "weight", 2),
        ("loss.kd.alpha=0.5", "loss.kd.alpha", 1, "alpha", 0.5),
        ("loss.kd_2.alpha=0.5", "loss.kd_2.alpha", 2, "alpha", 0.5),
        ("loss.2.alpha=0.5", "loss.kd_2.alpha", 2, "alpha", 0.5),
        ("loss.kd.weight.start=0", "loss.kd.weight.start", 1, "weight", {"start": 0}),
    ],
)
def test_an_override_names_a_section_of_a_list_by_label_or_place(
    override: str, key: str, place: int, option: str, value: object
) -> None:
    values = raw() | {"loss": json.loads(json.dumps(LIST))}
    values["loss"][0]["weight"] = 1
    assert apply_overrides(values, [override]) == [key]
    assert values["loss"][place][option] == value


def test_lists_of_sections_are_flat_under_the_same_names() -> None:
    flat = flatten({"loss": LIST, "teacher": [{"model_dir": "a"}, {"model_dir": "b"}], "milestones": [1, 2]})
    assert flat == {
        "loss.ce.name": "ce",
        "loss.kd.name": "kd",
        "loss.kd.alpha": 0.9,
        "loss.kd_2.name": "kd",
        "loss.kd_2.alpha": 0.1,
        "teacher.0.model_dir": "a",
        "teacher.1.model_dir": "b",
        "milestones": [1, 2],
    }


def test_lists_of_the_same_sections_in_another_order_differ() -> None:
    turned = [LIST[1], LIST[0], LIST[2]]
    assert differences({"loss": LIST}, {"loss": turned}) == {"loss": "['ce', 'kd', 'kd_2'] -> ['kd', 'ce', 'kd_2']"}
    assert differences({"loss": LIST}, {"loss": json.loads(json.dumps(LIST))}) == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alpha=0.5", "write loss.kd.alpha or loss.kd_2.alpha"),
        ("loss.crd.weight=1", "loss.crd.weight: the list has no 'crd'; it has ce, kd, kd_2"),
        ("loss.3.weight=1", "the list has no '3'"),
        ("loss.weight=1", "loss.weight: a list; name one of ce, kd, kd_2, as in loss.ce.weight"),
    ],
)
def test_a_path_that_names_no_section_of_a_list_is_refused(override: str, message: str) -> None:
    with pytest.raises(RunError) as ended:
        apply_overrides(raw() | {"loss": json.loads(json.dumps(LIST))}, [override])
    assert message in str(ended.value)


@pytest.mark.parametrize(
    ("teacher", "sections"),
    [
        (None, {}),
        ("a", {"teacher": {"model_dir": "a"}}),
        ({"model_dir": "a", "cache": "lazy"}, {"teacher": {"model_dir": "a", "cache": "lazy"}}),
        (["a"], {"teacher": {"model_dir": "a"}}),
        (["a", {"model_dir": "b"}], {"teacher.0": {"model_dir": "a"}, "teacher.1": {"model_dir": "b"}}),
        ([], {}),
    ],
)
def test_the_sections_of_teachers_have_the_paths_that_overrides_name(teacher: object, sections: object) -> None:
    assert teachers_of(teacher) == sections


@pytest.mark.parametrize(
    ("teacher", "override", "expected"),
    [
        ("a", "teacher.cache=lazy", {"model_dir": "a", "cache": "lazy"}),
        (["a", "b"], "teacher.1.cache=lazy", [{"model_dir": "a"}, {"model_dir": "b", "cache": "lazy"}]),
        (["a", {"model_dir": "b"}], "teacher.0.model_dir=c", [{"model_dir": "c"}, {"model_dir": "b"}]),
        (["a", "b"], 'teacher=["c"]', ["c"]),
    ],
)
def test_options_of_teachers_that_are_given_as_text_can_be_set(
    teacher: object, override: str, expected: object
) -> None:
    values = raw() | {"teacher": teacher}
    apply_overrides(values, [override])
    assert values["teacher"] == expected


def test_an_option_of_several_teachers_has_to_name_one() -> None:
    with pytest.raises(RunError, match=r"teacher.cache: a list; name one of 0, 1, as in teacher.0.cache"):
        apply_overrides(raw() | {"teacher": ["a", "b"]}, ["teacher.cache=lazy"])


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

"""Claims about the space: what search.json may hold, the order of its points and their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sweep.space import DEFAULT, MAX_NAME, grid, name_point, name_points, read_space
from utils import RunError

PARAMS = {
    "num_epochs": 3,
    "dataset": {"name": "cifar10", "batch_size": 128},
    "student": {"name": "cnn"},
    "loss": {"name": "kd", "alpha": 0.9, "temperature": 4.0},
    "optimizer": {"name": "adam", "learning_rate": 0.001},
}


def read(path: Path, space: Any, params: dict[str, Any] = PARAMS) -> dict[str, list[Any]]:
    path = path / "search.json"
    path.write_text(space if isinstance(space, str) else json.dumps(space))
    return read_space(path, params)


def test_the_default_is_the_ancestors_grid_in_its_order(tmp_path: Path) -> None:
    names = list(name_points(grid(read_space(tmp_path / "search.json", PARAMS))))
    assert len(names) == 40
    assert names[:3] == ["alpha_0.99_Temp_20.0", "alpha_0.99_Temp_10.0", "alpha_0.99_Temp_8.0"]
    assert names[8] == "alpha_0.95_Temp_20.0"
    assert names[-1] == "alpha_0.05_Temp_1.5"


def test_the_default_grid_fits_the_ancestors_flat_params(tmp_path: Path) -> None:
    assert read_space(tmp_path / "search.json", {"alpha": 0.9, "temperature": 20}) == DEFAULT


def test_flat_params_have_their_bare_keys_varied_and_options_of_ours_by_their_path(tmp_path: Path) -> None:
    flat = {"model_version": "cnn", "alpha": 0.9, "learning_rate": 0.001}
    space = read(tmp_path, {"learning_rate": [0.1], "optimizer.weight_decay": [0], "model_version": ["cnn"]}, flat)
    assert list(space) == ["learning_rate", "optimizer.weight_decay", "model_version"]
    with pytest.raises(RunError, match=r"dropout_rate: no section of params.json has it"):
        read(tmp_path, {"dropout_rate": [0.1]}, flat)


def test_the_default_grid_needs_options_that_it_can_vary(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"search.json \(absent: the default grid\): alpha: no section"):
        read_space(tmp_path / "search.json", {"loss": {"name": "ce"}})


def test_the_first_key_is_the_outermost_loop_and_bare_keys_find_their_section(tmp_path: Path) -> None:
    space = read(tmp_path, {"temperature": [2, 4], "optimizer.learning_rate": [0.1], "num_epochs": [1, 2]})
    assert list(space) == ["loss.temperature", "optimizer.learning_rate", "num_epochs"]
    assert PARAMS["num_epochs"] == 3  # reading a space leaves the reference as it is
    assert PARAMS["loss"] == {"name": "kd", "alpha": 0.9, "temperature": 4.0}
    assert [tuple(point.values()) for point in grid(space)] == [(2, 0.1, 1), (2, 0.1, 2), (4, 0.1, 1), (4, 0.1, 2)]


def test_values_may_be_any_scalar_and_true_is_not_1(tmp_path: Path) -> None:
    values = [1, True, 0.5, "text", None, False, 0]
    assert read(tmp_path, {"alpha": values})["loss.alpha"] == values


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "no points"),
        ({"alpha": []}, "alpha: expected a list of at least one value, got []"),
        ({"alpha": 0.5}, "alpha: expected a list of at least one value, got 0.5"),
        ({"alpha": [[0.5]]}, "alpha: [0.5] is not a number"),
        ({"alpha": [{"low": 0}]}, 'alpha: {"low": 0} is not a number'),
        ({"alpha": [2, 0.5, 2.0]}, "alpha: 2.0 is there twice"),
        ({"alpha": [0.0, -0.0]}, "alpha: -0.0 is there twice"),
        ({"alpha": [0.5], "loss.alpha": [0.9]}, "loss.alpha: loss.alpha names the same option"),
        ({"loss": ["kd"], "loss.alpha": [0.9]}, "loss.alpha: loss names the same option or a part of it"),
        ({"alpah": [0.5]}, "alpah: no section of params.json has it; write it dotted, such as loss.alpah"),
        ({"name": ["a"]}, "'name' is an option of several sections; write dataset.name or student.name"),
        ({"num_epochs.x": [1]}, "'num_epochs' is 3, not a section"),
        ({"loss..alpha": [1]}, "'loss..alpha' is no path"),
        ({".": [1]}, "'.' is no path"),
        ({"alpha": list(range(101)), "temperature": list(range(100))}, "10100 points; name keys and values"),
        ('{"alpha": [1], "alpha": [2]}', "the key 'alpha' stands there twice"),
        ('{"alpha": [NaN]}', "NaN is not a finite number"),
        ("[1, 2]", "expected an object"),
        ("{", "not JSON"),
    ],
)
def test_a_space_that_cannot_be_meant_is_one_line_with_the_file(tmp_path: Path, space: Any, words: str) -> None:
    with pytest.raises(RunError) as caught:
        read(tmp_path, space)
    assert caught.value.exit_status == 2
    assert f"{tmp_path / 'search.json'}: " in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_of_a_list_of_losses_is_refused_instead_of_guessed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a section"):
        read(tmp_path, {"loss.alpha": [1]}, {"loss": [{"name": "ce"}, {"name": "kd"}]})


@pytest.mark.parametrize(
    ("point", "name"),
    [
        ({"loss.alpha": 0.99, "loss.temperature": 20.0}, "alpha_0.99_Temp_20.0"),
        ({"alpha": 0.95, "temperature": 2}, "alpha_0.95_Temp_2"),
        ({"loss.temperature": 4.5, "loss.alpha": 0}, "Temp_4.5_alpha_0"),
        ({"optimizer.learning_rate": 1e-05}, "learning_rate_1e-05"),
        ({"loss.a": 1e20, "loss.b": 1e-20}, "a_1e20_b_1e-20"),
        ({"student.name": "cnn", "loss.name": "kd"}, "student-name_cnn_loss-name_kd"),
        ({"a.temperature": 1, "b.temperature": 2}, "a-temperature_1_b-temperature_2"),
        ({"student.pretrained": True, "teacher": None}, "pretrained_true_teacher_null"),
        ({"teacher": "experiments/base_cnn"}, "teacher_experiments-base_cnn"),
    ],
)
def test_children_have_the_ancestors_names(point: dict[str, Any], name: str) -> None:
    assert name_point(point) == name


@pytest.mark.parametrize("value", ["; rm -rf /", "$(x)", "../x", "a\nb", "/etc/passwd", "--help", "é", "", "..", "\0"])
def test_whatever_the_value_a_name_is_a_direct_child_of_harmless_characters(tmp_path: Path, value: str) -> None:
    name = name_point({"student.name": value})
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert name.startswith("name_")


def test_long_names_are_cut_and_stay_different() -> None:
    one, other = (name_point({"teacher": "x" * 300 + end}) for end in "ab")
    assert len(one) == len(other) == MAX_NAME
    assert one != other
    assert one[:-8] == other[:-8]


@pytest.mark.parametrize("values", [("a/b", "a-b"), ("CNN", "cnn"), ("2", 2), ("true", True)])
def test_two_children_with_one_name_are_refused(values: tuple[Any, Any]) -> None:
    with pytest.raises(RunError, match="share the directory name") as caught:
        name_points([{"student.name": value} for value in values])
    assert caught.value.exit_status == 2

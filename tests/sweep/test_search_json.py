"""Claims about search.json: what it may hold, what it means, and that all that is wrong with it is told at once."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, committed_files

from sweep.search_json import DEFAULT, Reserved, read_search
from sweep.space import Objective, Pruner, Range, Search, Strategy, Values, child_params, cover, grid, name_points
from utils import RunError, flatten, full_key, read_json

PARAMS = {
    "num_epochs": 3,
    "dataset": {"name": "cifar10", "batch_size": 128},
    "student": {"name": "cnn"},
    "teacher": "experiments/base_cnn",
    "loss": {"name": "kd", "alpha": 0.9, "temperature": 4.0},
    "optimizer": {"name": "adam", "learning_rate": 0.001},
}
OPTIMIZERS = [{"name": "sgd", "learning_rate": 0.1}, {"name": "adam", "learning_rate": 0.001}]
ALPHA = {"loss.alpha": [0.5, 0.9]}
TEMPERATURE = {"low": 1.5, "high": 20.0, "log": True}


def read(folder: Path, given: Any, params: dict[str, Any] = PARAMS, **command: Any) -> Search:
    path = folder / "search.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return read_search(path, params, **command)


def problems(folder: Path, given: Any, params: dict[str, Any] = PARAMS, **command: Any) -> list[str]:
    """The lines of what is wrong, without the file that they must begin with unless they are about the command line."""
    with pytest.raises(RunError) as caught:
        read(folder, given, params, **command)
    assert (caught.value.exit_status, caught.value.reason) == (2, "params")
    lines = str(caught.value).splitlines()
    prefix = f"{folder / 'search.json'}: "
    assert all(line.startswith((prefix, "--")) for line in lines)
    return [line.removeprefix(prefix) for line in lines]


# --- what was possible before stays as it was -------------------------------------------------------------


def test_the_default_is_the_ancestors_grid_in_its_order(tmp_path: Path) -> None:
    names = list(name_points(grid(read_search(tmp_path / "search.json", PARAMS))))
    assert len(names) == 40
    assert names[:3] == ["alpha_0.99_Temp_20.0", "alpha_0.99_Temp_10.0", "alpha_0.99_Temp_8.0"]
    assert names[8] == "alpha_0.95_Temp_20.0"
    assert names[-1] == "alpha_0.05_Temp_1.5"


def test_the_default_grid_fits_the_ancestors_flat_params(tmp_path: Path) -> None:
    space = read_search(tmp_path / "search.json", {"alpha": 0.9, "temperature": 20}).space
    assert space == {key: Values(tuple(values)) for key, values in DEFAULT.items()}


def test_the_default_grid_needs_options_that_it_can_vary(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"search.json \(absent: the default grid\): alpha: no section"):
        read_search(tmp_path / "search.json", {"loss": {"name": "ce"}})


def is_of_lists(given: dict[str, Any]) -> bool:
    return not given.keys() & Reserved.model_fields and all(isinstance(values, list) for values in given.values())


SEARCHES = [name for name in committed_files() if Path(name).name == "search.json"]
LISTS = [name for name in SEARCHES if is_of_lists(read_json(ROOT / name))]


def test_the_committed_searches_are_read() -> None:
    assert len(LISTS) >= 21
    for name in SEARCHES:
        read_search(ROOT / name, read_json((ROOT / name).with_name("params.json")))


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_numbers_and_texts_keep_their_childrens_names(name: str) -> None:
    given, params = read_json(ROOT / name), read_json((ROOT / name).with_name("params.json"))
    labels = ["Temp" if key == "temperature" else key.rpartition(".")[2] for key in given]
    combinations = list(itertools.product(*given.values()))
    expected = ["_".join(f"{label}_{v}" for label, v in zip(labels, values, strict=True)) for values in combinations]
    search = read_search(ROOT / name, params)
    named = name_points(grid(search), search.space)
    assert list(named) == expected
    for point, values in zip(named.values(), combinations, strict=True):
        child = child_params(params, point, search)
        for key, value in zip(given, values, strict=True):
            assert flatten(child)[full_key(params, key)] == value


def test_flat_params_have_their_bare_keys_varied_and_options_of_ours_by_their_path(tmp_path: Path) -> None:
    flat = {"model_version": "cnn", "alpha": 0.9, "learning_rate": 0.001}
    space = read(tmp_path, {"learning_rate": [0.1], "optimizer.weight_decay": [0], "model_version": ["cnn"]}, flat)
    assert list(space.space) == ["learning_rate", "optimizer.weight_decay", "model_version"]
    assert problems(tmp_path, {"dropout_rate": [0.1]}, flat)[0].startswith("dropout_rate: no section of params.json")


def test_bare_keys_find_their_section_and_the_reference_stays_as_it_is(tmp_path: Path) -> None:
    before = json.dumps(PARAMS)
    given = {"temperature": [2, 4], "optimizer.learning_rate": [0.1], "num_epochs": [1, 2], "teacher.cache": ["lazy"]}
    search = read(tmp_path, {**given, "include": [{"alpha": 0.1}], "exclude": [{"temperature": 2}]})
    assert list(search.space) == ["loss.temperature", "optimizer.learning_rate", "num_epochs", "teacher.cache"]
    assert json.dumps(PARAMS) == before


def test_a_list_may_hold_anything_and_true_is_not_1(tmp_path: Path) -> None:
    values = [1, True, 0.5, "text", None, False, 0, ["crop", {"name": "cutout"}], [], {"name": "kd"}]
    for given in (values, {"choice": values}):
        assert read(tmp_path, {"loss.alpha": given}).space == {"loss.alpha": Values(tuple(values))}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "no points"),
        ({"alpha": []}, "alpha: expected a list of at least one value, got []"),
        ({"alpha": {"choice": []}}, "alpha: expected a list of at least one value, got []"),
        ({"alpha": 0.5}, "alpha: expected a list of at least one value, got 0.5"),
        ({"alpha": None}, "alpha: expected a list of at least one value, got null"),
        ({"alpha": [2, 0.5, 2.0]}, "alpha: 2.0 is there twice"),
        ({"alpha": [0.0, -0.0]}, "alpha: -0.0 is there twice"),
        ({"alpha": [{"a": 1, "b": 2}, {"b": 2.0, "a": 1}]}, 'alpha: {"b": 2.0, "a": 1} is there twice'),
        ({"alpha": [0.5], "loss.alpha": [0.9]}, "loss.alpha: loss.alpha names the same option"),
        ({"loss": ["kd"], "loss.alpha": [0.9]}, "loss.alpha: loss names the same option or a part of it"),
        ({"loss.x": [{"a": 1}], "loss": [{"name": "kd"}]}, "loss: loss.x names the same option or a part of it"),
        ({"loss.alpha": [0.9], "loss": [{"name": "kd"}]}, "loss: loss.alpha names the same option or a part of it"),
        ({"alpah": [0.5]}, "alpah: no section of params.json has it; write it dotted, such as loss.alpah"),
        ({"name": ["a"]}, "'name' is an option of several sections; write dataset.name or student.name"),
        ({"num_epochs.x": [1]}, "'num_epochs' is 3, not a section"),
        ({"loss..alpha": [1]}, "'loss..alpha' is no path"),
        ({".": [1]}, "'.' is no path"),
        ({"": [1]}, "'': no section"),
        ({"a\nb": [1]}, r"a\nb: no section"),
        ({"alpha": list(range(101)), "temperature": list(range(100))}, "10100 points; name keys and values"),
        ('{"alpha": [1], "alpha": [2]}', "the key 'alpha' stands there twice"),
        ('{"alpha": [NaN]}', "NaN is not a finite number"),
        ("[1, 2]", "expected an object"),
        ("{", "not JSON"),
    ],
)
def test_a_space_that_cannot_be_meant_is_one_line_with_the_file(tmp_path: Path, given: Any, words: str) -> None:
    (line,) = problems(tmp_path, given)
    assert words in line


def test_an_option_of_a_list_of_losses_is_refused_instead_of_guessed(tmp_path: Path) -> None:
    params = {"loss": [{"name": "ce"}, {"name": "kd"}]}
    assert "name one of ce, kd, as in loss.ce.alpha" in problems(tmp_path, {"loss.alpha": [1]}, params)[0]
    assert list(read(tmp_path, {"loss.kd.alpha": [1]}, params).space) == ["loss.kd.alpha"]


# --- ranges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected", "is_whole"),
    [
        ({"low": 1, "high": 8}, Range(1, 8), True),
        ({"low": 1, "high": 8, "log": True}, Range(1, 8, log=True), True),
        ({"low": 0, "high": 8, "step": 2}, Range(0, 8, step=2), True),
        ({"low": 0, "high": 8, "step": None}, Range(0, 8), True),
        ({"low": 1.0, "high": 8}, Range(1.0, 8.0), False),
        ({"low": 1, "high": 8, "step": 2.0}, Range(1.0, 8.0, step=2.0), False),
        ({"low": 1e0, "high": 8e0}, Range(1.0, 8.0), False),
        ({"low": 0.4, "high": 0.7, "step": 0.3}, Range(0.4, 0.7, step=0.3), False),
        ({"low": -(2**53), "high": 2**53}, Range(-(2**53), 2**53), True),
    ],
)
def test_a_range_is_whole_if_it_is_written_in_whole_numbers(
    tmp_path: Path, given: dict[str, Any], expected: Range, is_whole: bool
) -> None:
    found = read(tmp_path, {"alpha": given}, strategy="random", max_trials=9).space["loss.alpha"]
    assert isinstance(found, Range)
    assert found == expected
    assert found.is_whole is is_whole
    assert isinstance(found.low, int) is isinstance(found.high, int) is is_whole


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"low": 0, "high": 1, "log": True}, "alpha: log needs low above 0, got 0"),
        (
            {"low": 1, "high": 9, "log": True, "step": 2},
            "alpha: log and step exclude one another; remove one of the two",
        ),
        ({"low": 1, "high": 1}, "alpha: low 1 is not below high 1"),
        ({"low": 2.5, "high": 1}, "alpha: low 2.5 is not below high 1.0"),
        ({"low": 1, "high": 2, "step": 2}, "alpha: step 2 is larger than from low 1 to high 2"),
        ({"low": 1, "high": 2, "step": 0}, "alpha.step: 0 is not above 0"),
        ({"low": 1, "high": 2, "step": -0.5}, "alpha.step: -0.5 is not above 0"),
        ({"low": 1}, "alpha.high: is missing"),
        ({"low": "1", "high": 2}, 'alpha.low: expected a number, got "1"'),
        ({"low": True, "high": 2}, "alpha.low: expected a number, got true"),
        ({"low": 1, "high": 2, "log": 1}, "alpha.log: expected true or false, got 1"),
        ({"low": 1, "high": 2, "stpe": 1}, "alpha.stpe: unknown key; did you mean step?"),
        ({"low": 1, "high": 2**54}, f"alpha: whole numbers are from -2^53 to 2^53, got 1 to {2**54}"),
        ({"low": 1, "high": 2, "choice": [1]}, "alpha.low: unknown key; known: choice, when"),
        ({"chioce": [1]}, "alpha.chioce: unknown key; did you mean choice?"),
        ({"choice": 1}, "alpha.choice: expected a list, got 1"),
        ({"choice": [1], "when": "kd"}, 'alpha.when: expected a section {...}, got "kd"'),
    ],
)
def test_a_range_or_a_choice_that_cannot_be_meant_is_refused(tmp_path: Path, given: Any, line: str) -> None:
    assert line in problems(tmp_path, {"alpha": given}, strategy="random", max_trials=9)


def test_a_grid_has_lists_or_steps(tmp_path: Path) -> None:
    given = {**ALPHA, "temperature": TEMPERATURE}
    assert problems(tmp_path, given) == ["loss.temperature: a grid needs a list or a step; random and tpe do not"]
    steps = read(tmp_path, {**ALPHA, "temperature": {"low": 2, "high": 6, "step": 2}})
    assert list(name_points(grid(steps)))[:3] == ["alpha_0.5_Temp_2", "alpha_0.5_Temp_4", "alpha_0.5_Temp_6"]


@pytest.mark.parametrize("when", [{}, {"when": {"alpha": [0, 1]}}])
def test_more_points_than_anybody_means_are_refused_at_once(tmp_path: Path, when: dict[str, Any]) -> None:
    given = {"alpha": {"low": 0, "high": 10**15, "step": 1}, "temperature": {"choice": [1, 2], **when}}
    (line,) = problems(tmp_path, given)
    assert line.startswith("more than 10000 points" if when else f"{2 * (10**15 + 1)} points")
    assert read(tmp_path, given, strategy="random", max_trials=2).max_trials == 2  # only a grid tries them all


# --- conditions -------------------------------------------------------------------------------------------


def test_conditions_are_read_with_full_keys_and_a_single_value_may_stand_for_a_list(tmp_path: Path) -> None:
    given = {
        "loss.name": ["kd", "ce", None],
        "temperature": {"low": 1, "high": 4, "when": {"loss.name": "kd"}},
        "loss.beta": {"choice": [1, 2], "when": {"temperature": [2, 3.0], "loss.name": ["kd", None]}},
        "optimizer": OPTIMIZERS,
        "loss.gamma": {"choice": [1], "when": {"optimizer.name": "sgd", "loss.name": None}},
    }
    space = read(tmp_path, given, strategy="random", max_trials=1).space
    assert [dict(dimension.when) for dimension in space.values()] == [
        {},
        {"loss.name": ["kd"]},
        {"loss.temperature": [2, 3.0], "loss.name": ["kd", None]},
        {},
        {"optimizer.name": ["sgd"], "loss.name": [None]},
    ]


@pytest.mark.parametrize(
    ("when", "line"),
    [
        ({"num_epochs": 3}, "num_epochs is no option that is varied above it (those: loss.alpha, optimizer)"),
        ({"learning_rate": 3}, "optimizer.learning_rate is never 3; optimizer has it as 0.1, 0.001"),
        ({"loss.beta": 1}, "loss.beta is no option that is varied above it (those: loss.alpha, optimizer)"),
        ({"loss": 1}, "loss is no option that is varied above it (those: loss.alpha, optimizer)"),
        ({"student.name": "cnn"}, "student.name is no option that is varied above it (those: loss.alpha, optimizer)"),
        ({"alpha": 0.7}, "loss.alpha is never 0.7; it is one of 0.5, 0.9"),
        ({"alpha": [0.5, "0.9"]}, 'loss.alpha is never "0.9"; it is one of 0.5, 0.9'),
        ({"alpha": []}, "alpha: expected a value or a list of at least one, got []"),
        ({"alpha": 0.5, "loss.alpha": 0.5}, "loss.alpha is there twice; keep one"),
        ({"optimizer.name": "lamb"}, 'optimizer.name is never "lamb"; optimizer has it as "sgd", "adam"'),
        ({"optimizer.nesterov": 1}, "optimizer.nesterov is never 1; optimizer has it as true"),
        ({"optimizer.momentum": 0.9}, "optimizer.momentum is never 0.9; optimizer has it as nothing"),
        ({"name": "kd"}, None),
    ],
)
def test_a_condition_names_what_stands_above_and_values_that_occur_there(
    tmp_path: Path, when: dict[str, Any], line: str | None
) -> None:
    optimizers = [{**OPTIMIZERS[0], "nesterov": True}, OPTIMIZERS[1]]
    given = {**ALPHA, "optimizer": optimizers, "loss.beta": {"choice": [1], "when": when}}
    (found,) = problems(tmp_path, given)
    assert found == f"loss.beta: when: {line}" if line else "several sections" in found


def test_a_condition_on_a_number_names_one_of_its_range(tmp_path: Path) -> None:
    given = {"temperature": {"low": 1, "high": 4}, "loss.beta": {"choice": [1], "when": {"temperature": [2, 2.5]}}}
    (line,) = problems(tmp_path, given, strategy="random", max_trials=1)
    assert line == "loss.beta: when: loss.temperature is never 2.5; it is a whole number from 1 to 4"


def test_conditions_that_never_hold_together_are_refused(tmp_path: Path) -> None:
    once = {"choice": [1], "when": {"alpha": 0.5}}
    given = {**ALPHA, "loss.beta": once, "loss.gamma": {"choice": [1], "when": {"loss.beta": 1, "alpha": 0.9}}}
    assert problems(tmp_path, given) == ["loss.gamma: when: these conditions never hold together; change one of them"]


def test_a_part_of_a_section_may_be_varied_below_it_where_it_is_a_section_without_that_part(tmp_path: Path) -> None:
    decay = {"choice": [0, 1], "when": {"optimizer.name": "sgd"}}
    search = read(tmp_path, {"optimizer": OPTIMIZERS, "optimizer.weight_decay": decay})
    children = [child_params(PARAMS, point, search)["optimizer"] for point in grid(search)]
    assert children == [{**OPTIMIZERS[0], "weight_decay": 0}, {**OPTIMIZERS[0], "weight_decay": 1}, OPTIMIZERS[1]]
    teachers = [None, {"model_dir": "a"}]
    cache = {"choice": ["off", "lazy"], "when": {"teacher.model_dir": "a"}}
    gigabytes = {"choice": [1], "when": {"teacher.cache": "lazy"}}
    given = {"teacher": teachers, "teacher.cache": cache, "teacher.max_gb": gigabytes}
    assert problems(tmp_path, given)[0].startswith("teacher.max_gb: teacher names the same option")
    gigabytes["when"]["teacher.model_dir"] = "a"  # type: ignore[index]
    search = read(tmp_path, given, {**PARAMS, "teacher": None})
    assert [child_params(PARAMS, point, search)["teacher"] for point in grid(search)] == [
        None,
        {"model_dir": "a", "cache": "off"},
        {"model_dir": "a", "cache": "lazy", "max_gb": 1},
    ]
    (line,) = problems(tmp_path, {"teacher": teachers, "teacher.cache": ["off"]})
    assert line.startswith("teacher.cache: teacher names the same option or a part of it")
    below = {"choice": [{"name": "ce"}], "when": {"alpha": 0.5}}
    (line,) = problems(tmp_path, {**ALPHA, "loss": below})
    assert line.startswith("loss: loss.alpha names the same option or a part of it")
    (line,) = problems(tmp_path, {"optimizer": OPTIMIZERS, "learning_rate": [1]})
    assert line == "learning_rate: a section of optimizer has it, too; keep it in one of the two places"


def test_a_part_exists_only_where_its_section_does(tmp_path: Path) -> None:
    given = {
        "alpha": [0.1, 0.5, 0.9],
        "optimizer": {"choice": OPTIMIZERS, "when": {"alpha": [0.1, 0.5]}},
        "optimizer.eps": [1],
        "optimizer.clip": {"choice": [1], "when": {"alpha": [0.5, 0.9], "optimizer.name": "sgd"}},
    }
    search = read(tmp_path, given)
    assert search.space["optimizer.eps"].when == {"loss.alpha": [0.1, 0.5]}
    assert search.space["optimizer.clip"].when == {"loss.alpha": [0.5], "optimizer.name": ["sgd"]}
    for point in grid(search):
        child = child_params(PARAMS, point, search)
        assert ("optimizer" in child) == ("optimizer.eps" in point) == (point["loss.alpha"] != 0.9)
    given["optimizer.clip"]["when"]["alpha"] = 0.9  # type: ignore[index]
    assert "never hold together" in problems(tmp_path, given)[0]


# --- points -----------------------------------------------------------------------------------------------


def test_an_included_point_is_written_as_the_space_writes_it_and_takes_the_rest_from_the_reference(
    tmp_path: Path,
) -> None:
    given = {
        "alpha": [0.5, 2],
        "loss.name": ["kd", "ce"],
        "temperature": {"choice": [1.0, 4.0], "when": {"loss.name": "kd"}},
        "loss.beta": [1],
        "include": [
            {"temperature": 1, "alpha": 2.0},
            {"num_epochs": 9, "temperature": 7, "alpha": 0.5},
            {"loss.name": "ce"},
            {},
        ],
    }
    search = read(tmp_path, given)
    assert [list(point.items()) for point in search.include] == [
        [("loss.alpha", 2), ("loss.name", "kd"), ("loss.temperature", 1.0)],
        [("loss.alpha", 0.5), ("loss.name", "kd"), ("loss.temperature", 7), ("num_epochs", 9)],
        [("loss.alpha", 0.9), ("loss.name", "ce")],
        [("loss.alpha", 0.9), ("loss.name", "kd"), ("loss.temperature", 4.0)],
    ]
    assert next(iter(name_points(grid(search)))) == "alpha_2_name_kd_Temp_1.0"
    assert child_params(PARAMS, search.include[3], search) == PARAMS


def test_an_included_point_of_the_grid_is_in_it_once(tmp_path: Path) -> None:
    given = {"alpha": [0.5, 0.9], "temperature": {"low": 2, "high": 4, "step": 2}}
    plain = grid(read(tmp_path, given))
    points = grid(read(tmp_path, {**given, "include": [{"alpha": 0.9, "temperature": 2.0}, {"alpha": 0.5}]}))
    assert points[0] == {"loss.alpha": 0.9, "loss.temperature": 2}
    assert sorted(map(str, points)) == sorted(map(str, plain))
    assert json.dumps(points[1]) == json.dumps({"loss.alpha": 0.5, "loss.temperature": 4})  # not the reference's 4.0


def test_a_section_in_an_included_point_is_taken_apart_as_the_space_has_it(tmp_path: Path) -> None:
    decay = {"low": 0.0, "high": 1.0, "step": 0.5, "when": {"optimizer.name": "sgd"}}
    given = {"optimizer": OPTIMIZERS, "optimizer.weight_decay": decay}
    for point in (
        {"optimizer": {**OPTIMIZERS[0], "weight_decay": 1}},
        {"optimizer.weight_decay": 1, "optimizer": OPTIMIZERS[0]},
    ):
        search = read(tmp_path, {**given, "include": [point, {"alpha": 1}]})
        assert list(search.include[0].items()) == [("optimizer", OPTIMIZERS[0]), ("optimizer.weight_decay", 1.0)]
    assert search.include == (
        {"optimizer": OPTIMIZERS[0], "optimizer.weight_decay": 1.0},
        {"optimizer": OPTIMIZERS[1], "loss.alpha": 1},
    )
    assert len(grid(search)) == 1 + 2 + 1 + 1


@pytest.mark.parametrize(
    ("point", "line"),
    [
        (3, "include[0]: expected a section {...}, got 3"),
        ({"alpah": 1}, "include[0]: no section of params.json has it; write it dotted, such as loss.alpah"),
        ({"alpha": 1, "loss.alpha": 2}, "include[0]: loss.alpha: loss.alpha names the same option"),
        ({"loss": {}, "student": {}, "loss.alpha": 2}, "include[0]: loss.alpha: loss names the same option"),
        ({"seed": 1}, "include[0]: seed: every point is trained with each of seeds"),
        ({"loss.name": "ce", "temperature": 1}, 'include[0]: loss.temperature: exists only with loss.name in ["kd"]'),
        ({"alpha": 0.5, "loss.name": "ce"}, "include: {"),
    ],
)
def test_an_included_point_that_cannot_be_meant_is_refused(tmp_path: Path, point: Any, line: str) -> None:
    temperature = {"choice": [1, 2], "when": {"loss.name": "kd"}}
    given = {**ALPHA, "loss.name": ["kd", "ce"], "temperature": temperature, "seeds": [0, 1], "include": [point]}
    given["exclude"] = [{"loss.name": "ce", "alpha": 0.5}]
    (found,) = problems(tmp_path, given, {**PARAMS, "seed": 0})
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("points", "line"),
    [
        (
            [{"num_epochs": 3}],
            "exclude[0]: num_epochs: is not varied; name options of the space (loss.alpha, loss.name",
        ),
        ([{"alpha": 0.7}], "exclude[0]: loss.alpha is never 0.7; it is one of 0.5, 0.9"),
        ([{"alpha": 0.5, "loss.alpha": 0.5}], "exclude[0]: loss.alpha: loss.alpha is there twice; keep one"),
        ([{}], "exclude[0]: {} agrees with every point; name an option of the space"),
        ([{"loss.name": "ce", "temperature": 1}], "exclude[0]: {"),
        ([{"alpha": 0.5}, {"alpha": 0.9}], "exclude: leaves no point; exclude fewer"),
        ([{"alpha": 0.5}, {"loss.alpha": 0.5}], 'exclude: {"loss.alpha": 0.5} is there twice; keep one'),
    ],
)
def test_an_excluded_point_that_excludes_nothing_or_everything_is_refused(
    tmp_path: Path, points: list[Any], line: str
) -> None:
    temperature = {"choice": [1, 2], "when": {"loss.name": "kd"}}
    given = {**ALPHA, "loss.name": ["kd", "ce"], "temperature": temperature, "exclude": points}
    (found,) = problems(tmp_path, given)
    assert found.startswith(line)


def test_what_is_left_after_exclusions_may_be_included_points_or_the_inside_of_a_range(tmp_path: Path) -> None:
    both = [{"alpha": 0.5}, {"alpha": 0.9}]
    given = {**ALPHA, "exclude": both, "include": [{"alpha": 0.1}], "max_trials": 1}
    assert grid(read(tmp_path, given)) == [{"loss.alpha": 0.1}]
    ends = {"alpha": {"low": 0.5, "high": 0.9}, "exclude": both}
    assert len(read(tmp_path, ends, strategy="random", max_trials=3).exclude) == 2


def test_excluded_points_may_name_a_part_of_a_section(tmp_path: Path) -> None:
    search = read(tmp_path, {**ALPHA, "optimizer": OPTIMIZERS, "exclude": [{"optimizer.name": "sgd", "alpha": 0.5}]})
    assert [point["optimizer"]["name"] for point in grid(search)] == ["adam", "sgd", "adam"]


# --- the reserved keys ------------------------------------------------------------------------------------


def test_what_is_not_said_is_as_the_dataclasses_have_it(tmp_path: Path) -> None:
    assert read(tmp_path, ALPHA) == Search({"loss.alpha": Values((0.5, 0.9))})


def test_all_reserved_keys_arrive(tmp_path: Path) -> None:
    given = {
        **ALPHA,
        "seeds": [3, 0, 2**63 - 1],
        "include": [{"loss.alpha": 0.1}],
        "exclude": [{"loss.alpha": 0.9}],
        "objective": {"metric": "val.accuracy_top5", "mode": "min"},
        "strategy": {"name": "tpe", "seed": 5, "startup_trials": 20},
        "max_trials": 40,
        "pruner": {"name": "hyperband", "min_epochs": 2, "reduction_factor": 4},
        "common_random_numbers": True,
    }
    assert {*given} - {*ALPHA} == Reserved.model_fields.keys()
    assert read(tmp_path, given) == Search(
        {"loss.alpha": Values((0.5, 0.9))},
        include=({"loss.alpha": 0.1},),
        exclude=({"loss.alpha": 0.9},),
        seeds=(3, 0, 2**63 - 1),
        objective=Objective("val.accuracy_top5", "min"),
        strategy=Strategy("tpe", 5, 20),
        max_trials=40,
        pruner=Pruner("hyperband", min_epochs=2, reduction_factor=4),
    )


def test_a_name_stands_for_a_section_of_it(tmp_path: Path) -> None:
    for strategy in ("random", "tpe"):
        assert read(tmp_path, {**ALPHA, "strategy": strategy, "max_trials": 2}).strategy == Strategy(strategy)
    for pruner in ("none", "median", "hyperband"):
        assert read(tmp_path, {**ALPHA, "pruner": pruner}).pruner == Pruner(pruner)
    median = {"name": "median", "startup_trials": 0, "warmup_epochs": 3}
    assert read(tmp_path, {**ALPHA, "pruner": median}).pruner == Pruner("median", 0, 3)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("accuracy", "max"), ("accuracy_top5", "max"), ("loss", "min"), ("cross_entropy", "min"), ("teacher_kl", "min")],
)
def test_what_is_better_follows_from_the_metric_unless_it_is_said(tmp_path: Path, metric: str, mode: str) -> None:
    objective = {"metric": f"val.{metric}"}
    assert read(tmp_path, {**ALPHA, "objective": objective}).objective.mode == mode
    assert read(tmp_path, {**ALPHA, "objective": {**objective, "mode": "max"}}).objective.mode == "max"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"seeds": []}, "seeds: expected a list of at least one value, got []"),
        ({"seeds": 3}, "seeds: expected a list, got 3"),
        ({"seeds": [1, True]}, "seeds[1]: expected a whole number, got true"),
        ({"seeds": [1.0]}, "seeds[0]: expected a whole number, got 1.0"),
        ({"seeds": [-1]}, "seeds[0]: -1 is below 0"),
        ({"seeds": [2**63]}, f"seeds[0]: {2**63} is not below {2**63}"),
        ({"seeds": [1, 2, 1]}, "seeds: 1 is there twice; keep one"),
        ({"include": {}}, "include: expected a list, got {}"),
        ({"exclude": [[]]}, "exclude[0]: expected a section {...}, got []"),
        ({"objective": "val.loss"}, 'objective: expected a section {...}, got "val.loss"'),
        ({"objective": {"mode": "up"}}, "objective.mode: \"up\" is not one of 'max' or 'min'"),
        ({"objective": {"metrics": "val.loss"}}, "objective.metrics: unknown key; did you mean metric?"),
        ({"strategy": "gird"}, "strategy: 'gird' is not one of 'grid', 'random', 'tpe'"),
        ({"strategy": 3}, "strategy: expected a name or a section {...}, got 3"),
        ({"strategy": {}}, 'strategy: expected a name or a section {"name": ...}, got {}'),
        ({"strategy": {"name": "grid", "seed": 1}}, "strategy.seed: unknown key; known: name"),
        ({"strategy": {"name": "tpe", "grid": 1}}, "strategy.grid: unknown key; known: name, seed, startup_trials"),
        ({"strategy": {"name": "tpe", "startup_trials": 0}}, "strategy.startup_trials: 0 is below 1"),
        ({"max_trials": 0}, "max_trials: 0 is below 1"),
        ({"max_trials": 2.0}, "max_trials: expected a whole number, got 2.0"),
        ({"max_trials": "9"}, 'max_trials: expected a whole number, got "9"'),
        (
            {"pruner": {"name": "median", "min_epochs": 1}},
            "pruner.min_epochs: unknown key; did you mean warmup_epochs?",
        ),
        ({"pruner": {"name": "hyperband", "reduction_factor": 1}}, "pruner.reduction_factor: 1 is below 2"),
        ({"common_random_numbers": 1}, "common_random_numbers: expected true or false, got 1"),
    ],
)
def test_a_reserved_key_is_checked_strictly(tmp_path: Path, given: dict[str, Any], line: str) -> None:
    assert problems(tmp_path, {**ALPHA, **given}) == [line]


@pytest.mark.parametrize("metric", ["test.accuracy", "accuracy", "val.", "train.loss", "val.a b", "xval.accuracy"])
def test_only_a_validation_metric_is_sought(tmp_path: Path, metric: str) -> None:
    (line,) = problems(tmp_path, {**ALPHA, "objective": {"metric": metric}})
    assert line.startswith(f'objective.metric: "{metric}" is no metric of the validation split')
    assert "the test split is for evaluate.py" in line


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("max_trails", "max_trials"),
        ("seed", "seeds"),
        ("prunner", "pruner"),
        ("includes", "include"),
        ("common_random_number", "common_random_numbers"),
    ],
)
def test_a_mistyped_reserved_key_is_recognised(tmp_path: Path, typo: str, meant: str) -> None:
    (line,) = problems(tmp_path, {**ALPHA, typo: [1]})
    assert line.startswith(f"{typo}: no section of params.json has it; did you mean {meant}?")


def test_an_option_of_the_reference_is_no_typo(tmp_path: Path) -> None:
    assert list(read(tmp_path, {"seed": [1, 2]}, {**PARAMS, "seed": 0}).space) == ["seed"]
    assert list(read(tmp_path, {"loss.strategy": [1, 2]}).space) == ["loss.strategy"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({**ALPHA, "strategy": "tpe"}, "max_trials: is missing; tpe needs it (or --max_trials)"),
        ({"seeds": [1], "strategy": "random", "max_trials": 3}, "strategy: random needs options to vary"),
        ({**ALPHA, "seed": [1], "seeds": [1]}, "seeds: seed is an option of the space; remove one of the two"),
        (
            {**ALPHA, "seeds": [1], "common_random_numbers": False},
            "seeds: with common_random_numbers false every point",
        ),
        ({"seed": [1], "common_random_numbers": False}, "seed: with common_random_numbers false every point"),
        (
            {**ALPHA, "include": [{"alpha": 1}, {"alpha": 2}], "max_trials": 1},
            "max_trials: 1 is below 2, the number of",
        ),
        ({"include": [{}]}, "include[0]: {} is the reference itself; name an option, or train"),
        ({**ALPHA, "include": [{}, {"alpha": 0.9}]}, 'include: {"loss.alpha": 0.9} is there twice'),
    ],
)
def test_keys_that_contradict_one_another_are_refused(tmp_path: Path, given: dict[str, Any], line: str) -> None:
    assert problems(tmp_path, given, {**PARAMS, "seed": 0})[0].startswith(line)


def test_an_included_part_of_a_section_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    given = {**ALPHA, "optimizer": {"choice": OPTIMIZERS, "when": {"alpha": 0.5}}, "include": [{"optimizer.eps": 1}]}
    (line,) = problems(tmp_path, given)
    assert line == "include[0]: optimizer.eps: exists only with loss.alpha in [0.5]; remove it"
    given["include"] = [{"loss": {"name": "kd", "alpha": 0.5}, "optimizer.eps": 1}]
    assert read(tmp_path, given).include == ({"loss": {"name": "kd", "alpha": 0.5}, "optimizer.eps": 1},)


def test_seeds_or_included_points_are_enough_without_options(tmp_path: Path) -> None:
    assert grid(read(tmp_path, {"seeds": [0, 1]})) == [{}]
    assert grid(read(tmp_path, {"include": [{"alpha": 0.1}, {"loss": {"name": "ce"}}]})) == [
        {"loss.alpha": 0.1},
        {"loss": {"name": "ce"}},
    ]
    assert grid(read(tmp_path, {"include": [{}], "seeds": [0]})) == [{}]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    given = {
        "alpha": {"low": 3, "high": 2},
        "temperature": {"low": "1", "high": 20.0, "stpe": 3},
        "loss.beta": {"choice": [1], "when": {"alpha": 9, "temperature": 0}},  # those are faulty already
        "max_trails": 3,
        "seeds": [1, 1],
        "strategy": {"name": "tpe", "sed": 3},
        "pruner": 5,
        "objective": {"metric": "test.loss", "mode": "up"},
    }
    lines = problems(tmp_path, given, max_trials=0)
    assert sorted(line.split(":")[0] for line in lines) == [
        "--max_trials",
        "alpha",
        "max_trails",
        "objective.metric",
        "objective.mode",
        "pruner",
        "seeds",
        "strategy.sed",
        "temperature.low",
        "temperature.stpe",
    ]


# --- the command line -------------------------------------------------------------------------------------


def test_the_command_line_replaces_what_the_file_says(tmp_path: Path) -> None:
    given = {**ALPHA, "strategy": {"name": "tpe", "seed": 5, "startup_trials": 20}, "max_trials": 9, "seeds": [0]}
    search = read(tmp_path, given, max_trials=3, seeds=[7, 8])
    assert (search.strategy, search.max_trials, search.seeds) == (Strategy("tpe", 5, 20), 3, (7, 8))
    assert read(tmp_path, given, strategy="tpe").strategy == Strategy("tpe", 5, 20)
    assert read(tmp_path, given, strategy="random").strategy == Strategy("random", 5)
    assert read(tmp_path, given, strategy="grid").strategy == Strategy("grid")


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ({"strategy": "gird"}, "--strategy: 'gird' is not one of 'grid', 'random', 'tpe'"),
        ({"max_trials": 0}, "--max_trials: 0 is below 1"),
        ({"seeds": []}, "--seeds: expected a list of at least one value, got []"),
        ({"seeds": [3, 3]}, "--seeds: 3 is there twice; keep one"),
        ({"seeds": [0]}, "--seeds: with common_random_numbers false every point has a seed of its own; remove one"),
        ({"strategy": "tpe"}, "max_trials: is missing; tpe needs it (or --max_trials)"),
    ],
)
def test_a_problem_of_the_command_line_names_it(tmp_path: Path, command: dict[str, Any], line: str) -> None:
    (found,) = problems(tmp_path, {**ALPHA, "common_random_numbers": False}, **command)
    assert found.startswith(line)


def test_the_default_grid_takes_the_command_line_too(tmp_path: Path) -> None:
    search = read_search(tmp_path / "search.json", PARAMS, strategy="random", max_trials=5, seeds=[0, 1])
    assert (len(search.space), search.strategy, search.max_trials, search.seeds) == (2, Strategy("random"), 5, (0, 1))


# --- in general -------------------------------------------------------------------------------------------


def test_whatever_a_file_holds_it_is_read_or_refused_in_lines_that_name_it(tmp_path: Path) -> None:
    draw = random.Random(0)
    options = ["alpha", "loss.name", "loss", "optimizer", "optimizer.name", "teacher.cache", "num_epochs"]
    keys = [
        *options,
        *Reserved.model_fields,
        "choice",
        "when",
        "name",
        "high",
        "step",
        "log",
        "metric",
        "x",
        "a.\n",
        "",
    ]
    ranges = [{"low": 0, "high": 2, "step": 1}, {"low": 0.5, "high": 1, "step": 0.5}, {"low": 1, "high": 3}]

    def value(depth: int) -> Any:
        kinds = [0, 1, -1, 2**70, 0.5, 1e308, True, None, "kd", "tpe", "val.loss", "", "\n", [], draw.choice(ranges)]
        if depth:
            kinds += 3 * [[value(depth - 1) for _ in range(draw.randint(1, 3))]]
            kinds += 3 * [{draw.choice(keys): value(depth - 1) for _ in range(draw.randint(0, 3))}]
        return draw.choice(kinds)

    accepted = 0
    path = tmp_path / "search.json"
    for _ in range(1500):
        given = {key: [value(2), value(1)] for key in draw.sample(options, draw.randint(0, 2))}
        given |= {draw.choice(keys): value(3) for _ in range(draw.randint(0, 2))}
        path.write_text(json.dumps(given))
        refused = ""
        try:
            search = read_search(path, PARAMS)
        except RunError as error:
            refused = str(error)
        else:
            accepted += 1
            points = grid(search)
            assert points
            for point in (*points, *cover(search)):
                child_params(PARAMS, point, search)
        assert all(line.startswith(f"{path}: ") for line in refused.splitlines()), given
    assert 200 < accepted < 1300


def test_what_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    for depth in (400, 900, 100_000):
        for text in ('{"alpha": [%s]}', '{"alpha": [1], "include": [{"alpha": %s}]}'):
            try:
                grid(read(tmp_path, text % ("[" * depth + "]" * depth)))
            except RunError as error:
                assert str(tmp_path) in str(error)  # noqa: PT017, as either is fine


def test_the_space_is_known_without_pydantic() -> None:
    code = "import sys, sweep.space; print([m for m in ('pydantic', 'torch', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

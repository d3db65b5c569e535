"""Claims about the space: its points and their order, conditions, the children's params and names."""

from __future__ import annotations

import copy
import itertools
import json
import random
import string
from collections.abc import Iterator
from typing import Any

import pytest

from sweep.space import (
    MAX_NAME,
    Point,
    Range,
    Search,
    Values,
    active,
    canonical,
    child_params,
    child_seed,
    cover,
    describe,
    find,
    grid,
    is_excluded,
    is_reachable,
    name_point,
    name_points,
    same,
    takes,
)
from utils import RunError

REFERENCE = {
    "seed": 3,
    "num_epochs": 3,
    "teacher": "experiments/base_cnn",
    "loss": {"name": "kd", "alpha": 0.9, "temperature": 4.0},
    "optimizer": {"name": "adam", "learning_rate": 0.001},
}
SGD = {"name": "sgd", "learning_rate": 0.1}
ADAM = {"name": "adam"}
CONDITIONAL = Search(
    {
        "loss.name": Values(("kd", "ce", "dkd")),
        "loss.temperature": Values((2, 4), {"loss.name": ["kd", "dkd"]}),
        "loss.beta": Values((8.0,), {"loss.name": ["dkd"], "loss.temperature": [4.0]}),
        "optimizer": Values((SGD, ADAM)),
        "optimizer.momentum": Values((0.5, 0.9), {"optimizer.name": ["sgd"]}),
    }
)


def listed(*values: Any) -> Values:
    return Values(values)


def random_search(draw: random.Random) -> Search:
    """A space of listed values, with conditions on what stands above and with excluded points."""
    space: dict[str, Values] = {}
    for key in "abcde"[: draw.randint(1, 5)]:
        above = draw.sample(list(space), draw.randint(0, len(space)))
        when = {other: draw.sample(space[other].values, draw.randint(1, len(space[other].values))) for other in above}
        space[key] = Values(tuple(range(draw.randint(1, 3))), when if draw.random() < 0.6 else {})
    named = [draw.sample(list(space), draw.randint(1, len(space))) for _ in range(draw.randint(0, 2))]
    return Search(space, exclude=tuple({key: draw.choice(space[key].values) for key in keys} for keys in named))


def by_hand(search: Search) -> Iterator[Point]:
    """The full product, each point without the options whose conditions fail, each once: another way to the grid."""
    seen = []
    for values in itertools.product(*(dimension.values for dimension in search.space.values())):
        full, point = dict(zip(search.space, values, strict=True)), {}
        for key in search.space:
            if all(other in point and point[other] in allowed for other, allowed in search.space[key].when.items()):
                point[key] = full[key]
        if point not in seen:
            seen.append(point)
            yield point


def excluded_by_hand(search: Search, point: Point) -> bool:
    return any(other.items() <= point.items() for other in search.exclude)


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        (2, 2.0, True),
        (0.0, -0.0, True),
        (1, True, False),
        (0, False, False),
        ("1", 1, False),
        (None, 0, False),
        (None, None, True),
        ([1, 2], [1.0, 2], True),
        ([1, 2], [2, 1], False),
        ({"a": 1, "b": [True]}, {"b": [True], "a": 1.0}, True),
        ({"a": 1}, {"a": True}, False),
        ([], {}, False),
        ("text", "text", True),
    ],
)
def test_values_are_the_same_as_json_means_them(one: Any, other: Any, are_same: bool) -> None:
    assert same(one, other) is same(other, one) is are_same
    assert (canonical(one) == canonical(other)) is are_same


@pytest.mark.parametrize(
    ("dimension", "inside", "outside"),
    [
        (listed(1, "kd", None, SGD), [1.0, "kd", None, {**SGD}], [True, "1", {}, ADAM]),
        (Range(1, 8), [1, 8, 3, 4.0], [0, 9, 3.5, True, "3", None]),
        (Range(1.0, 8), [1, 8, 3.5], [0.99, 8.01, True]),
        (Range(1, 8.5), [1, 8.5, 3.5], [9]),
        (Range(0.1, 0.7, step=0.2), [0.1, 0.3, 0.5, 0.7], [0.2, 0.30001, 0.9]),
        (Range(1, 8, step=3), [1, 4, 7.0], [8, 2]),
    ],
)
def test_an_option_takes_what_is_listed_or_in_its_range_and_on_its_steps(
    dimension: Values | Range, inside: list[Any], outside: list[Any]
) -> None:
    assert [value for value in inside + outside if takes(dimension, value)] == inside


def test_a_dotted_key_is_found_in_points_in_params_and_in_sections_of_points() -> None:
    assert find(REFERENCE, "loss.alpha") == (0.9,)
    assert find({"loss.alpha": None}, "loss.alpha") == (None,)
    assert find({"optimizer": SGD, "optimizer.momentum": 0.9}, "optimizer.name") == ("sgd",)
    assert find({"optimizer": SGD, "optimizer.momentum": 0.9}, "optimizer.momentum") == (0.9,)
    assert find({"a.b": {"c": {"d": 1}}}, "a.b.c.d") == (1,)
    assert find({"dataset": {"name": "digits"}, "dataset.views": {"name": "crop"}}, "dataset.views.name") == ("crop",)
    assert find({"teacher": "a.cache"}, "teacher.cache") == ()
    assert find(REFERENCE, "teacher.cache") == find(REFERENCE, "loss.beta") == find({}, "loss") == ()


# --- points -----------------------------------------------------------------------------------------------


def test_the_first_key_is_the_outermost_loop() -> None:
    points = grid(Search({"b": listed(2, 4), "a": listed("x"), "c": listed(1, None)}))
    assert [tuple(point.values()) for point in points] == [(2, "x", 1), (2, "x", None), (4, "x", 1), (4, "x", None)]
    assert all(list(point) == ["b", "a", "c"] for point in points)


def test_a_grid_is_the_product_without_what_conditions_and_exclusions_take_away() -> None:
    for seed in range(300):
        search = random_search(random.Random(seed))
        expected = [point for point in by_hand(search) if not excluded_by_hand(search, point)]
        assert [list(point.items()) for point in grid(search)] == [list(point.items()) for point in expected], search


def test_an_option_is_there_only_if_its_conditions_hold_also_those_that_look_into_a_section() -> None:
    points = grid(CONDITIONAL)
    assert len(points) == (2 + 1 + 2) * (2 + 1)
    for point in points:
        assert ("loss.temperature" in point) == (point["loss.name"] != "ce")
        assert ("loss.beta" in point) == (point["loss.name"] == "dkd" and point["loss.temperature"] == 4)
        assert ("optimizer.momentum" in point) == (point["optimizer"] is SGD)
    assert active(CONDITIONAL, "optimizer.momentum", {"optimizer": SGD})
    assert not active(CONDITIONAL, "optimizer.momentum", {"optimizer": ADAM})
    assert not active(CONDITIONAL, "loss.beta", {"loss.name": "dkd"})


@pytest.mark.parametrize(
    ("dimension", "values"),
    [
        (Range(0.1, 0.5, step=0.1), [0.1, 0.2, 0.3, 0.4, 0.5]),
        (Range(0.0, 1.0, step=0.3), [0.0, 0.3, 0.6, 0.9]),
        (Range(1, 10, step=3), [1, 4, 7, 10]),
        (Range(1, 2, step=0.5), [1.0, 1.5, 2.0]),
        (Range(-1e-05, 1e-05, step=1e-05), [-1e-05, 0.0, 1e-05]),
    ],
)
def test_steps_are_decimal_numbers_without_dust(dimension: Range, values: list[float]) -> None:
    points = grid(Search({"a": dimension}))
    assert [json.dumps(point["a"]) for point in points] == [json.dumps(value) for value in values]
    assert dimension.number_of_steps() == len(values)


def test_a_range_without_a_step_has_no_grid() -> None:
    with pytest.raises(RunError, match=r"loss\.alpha: a grid needs a list of values, or a step"):
        grid(Search({"loss.alpha": Range(0, 1)}))


def test_included_points_come_first_and_none_twice() -> None:
    search = Search({"a": listed(1, 2, 3)}, include=({"a": 9}, {"a": 2}, {"a": 1, "b": 0}), exclude=({"a": 3},))
    assert grid(search) == [{"a": 9}, {"a": 2}, {"a": 1, "b": 0}, {"a": 1}]


def test_max_trials_cuts_a_grid_after_what_is_excluded() -> None:
    search = Search({"a": listed(1, 2, 3, 4)}, include=({"a": 9},), exclude=({"a": 1},), max_trials=3)
    assert grid(search) == [{"a": 9}, {"a": 2}, {"a": 3}]


def test_without_options_there_is_the_reference_or_what_is_included() -> None:
    assert grid(Search({}, seeds=(0, 1))) == [{}]
    assert grid(Search({}, include=({"a": 1},))) == [{"a": 1}]


def test_a_point_is_excluded_if_it_agrees_in_all_that_is_named() -> None:
    search = Search({}, exclude=({"a": 1, "optimizer.name": "sgd"}, {"c": None}))
    assert is_excluded(search, {"a": 1.0, "optimizer": SGD, "b": 2})
    assert is_excluded(search, {"c": None})
    assert not is_excluded(search, {"a": 1})
    assert not is_excluded(search, {"a": 1, "optimizer": ADAM})
    assert not is_excluded(search, {"a": True, "optimizer": SGD})


def test_a_cover_takes_every_value_that_any_allowed_point_has() -> None:
    for seed in range(300):
        search = random_search(random.Random(seed))
        allowed = [point for point in by_hand(search) if not excluded_by_hand(search, point)]
        points = cover(search)
        assert all(point in allowed for point in points)
        taken = [{item for point in found for item in point.items()} for found in (points, allowed)]
        assert taken[0] == taken[1], search
        assert len(points) <= len(taken[1])


def test_a_cover_is_small_and_takes_both_ends_of_a_range() -> None:
    space = {f"a{i}": Range(0.5, i + 1.0) for i in range(20)} | {"b": listed(1, 2, 3)}
    points = cover(Search(space))
    assert len(points) == 3
    assert {point["a7"] for point in points} == {0.5, 8.0}


def test_a_cover_satisfies_a_condition_on_a_number_inside_a_range() -> None:
    space = {"a": Range(1, 9), "b": Values((1, 2), {"a": [5]}), "c": Values((3,), {"b": [2]})}
    assert {"a": 5, "b": 2, "c": 3} in cover(Search(space))


def test_conditions_that_exclude_one_another_are_noticed() -> None:
    space = {"a": listed(1, 2), "b": Values((1,), {"a": [1]}), "c": Values((1,), {"b": [1], "a": [2]})}
    assert [is_reachable(Search(space), key) for key in space] == [True, True, False]
    for seed in range(300):
        search = Search(random_search(random.Random(seed)).space)
        for key in search.space:
            assert is_reachable(search, key) == any(key in point for point in by_hand(search)), (search, key)


# --- children ---------------------------------------------------------------------------------------------


def test_a_child_is_the_reference_with_the_points_options_and_the_reference_stays_as_it_is() -> None:
    before = copy.deepcopy(REFERENCE)
    search = Search({"loss.alpha": listed(0.5), "optimizer": listed(SGD)})
    child = child_params(REFERENCE, {"loss.alpha": 0.5, "optimizer": SGD, "schedule.name": "cosine"}, search)
    assert child == {
        **REFERENCE,
        "loss": {"name": "kd", "alpha": 0.5, "temperature": 4.0},
        "optimizer": SGD,
        "schedule": {"name": "cosine"},
    }
    child["optimizer"]["learning_rate"] = child["loss"]["name"] = "changed"
    assert before == REFERENCE
    assert SGD == {"name": "sgd", "learning_rate": 0.1}


def test_no_child_of_any_point_changes_the_reference_or_another_child() -> None:
    before = copy.deepcopy(REFERENCE)
    children = [child_params(REFERENCE, point, CONDITIONAL) for point in grid(CONDITIONAL)]
    texts = [json.dumps(child) for child in children]
    assert len(set(texts)) == len(texts)
    for child in children:
        child["loss"]["name"] = child["optimizer"]["name"] = "changed"
    assert [json.dumps(child_params(REFERENCE, point, CONDITIONAL)) for point in grid(CONDITIONAL)] == texts
    assert before == REFERENCE


def test_an_option_whose_condition_does_not_hold_is_left_out_even_if_the_reference_has_it() -> None:
    for point in grid(CONDITIONAL):
        child = child_params(REFERENCE, point, CONDITIONAL)
        assert ("temperature" in child["loss"]) == (child["loss"]["name"] != "ce")
        assert ("beta" in child["loss"]) == ("loss.beta" in point)
        assert child["loss"]["alpha"] == 0.9
    assert child_params(REFERENCE, {"loss.name": "ce"}, CONDITIONAL)["loss"] == {"name": "ce", "alpha": 0.9}
    # what the point leaves open, the reference says
    assert child_params(REFERENCE, {}, CONDITIONAL)["loss"] == REFERENCE["loss"]


def test_a_part_is_set_in_the_points_own_section() -> None:
    children = [child_params(REFERENCE, point, CONDITIONAL)["optimizer"] for point in grid(CONDITIONAL)]
    assert children[:3] == [{**SGD, "momentum": 0.5}, {**SGD, "momentum": 0.9}, ADAM]


def test_a_condition_on_a_whole_section_holds_whatever_parts_of_it_are_varied() -> None:
    space = {
        "optimizer": listed(SGD, ADAM),
        "optimizer.eps": listed(1),
        "loss.beta": Values((2,), {"optimizer": [SGD]}),
    }
    children = [child_params(REFERENCE, point, Search(space)) for point in grid(Search(space))]
    assert ["beta" in child["loss"] for child in children] == [True, False]


def test_a_teacher_that_is_a_text_becomes_a_section_when_an_option_of_it_is_varied() -> None:
    child = child_params(REFERENCE, {"teacher.cache": "lazy"}, Search({"teacher.cache": listed("lazy")}))
    assert child["teacher"] == {"model_dir": "experiments/base_cnn", "cache": "lazy"}
    assert REFERENCE["teacher"] == "experiments/base_cnn"


def test_random_numbers_are_common_unless_each_point_has_a_seed_that_follows_from_it() -> None:
    common, own = Search({}), Search({}, common_random_numbers=False)
    points = [{"a": a, "b": b} for a in (1, 2, "1", True) for b in (0.5, None)]
    assert {child_seed(common, REFERENCE, point) for point in points} == {3}
    assert child_seed(common, {}, {"a": 1}) is None
    seeds = [child_seed(own, REFERENCE, point) for point in points]
    assert len(set(seeds)) == len(points)
    assert all(seed is not None and 0 <= seed < 2**32 for seed in seeds)
    assert seeds[0] == child_seed(own, REFERENCE, {"b": 0.5, "a": 1.0})  # the point decides, not how it is written
    assert seeds[0] != child_seed(own, {**REFERENCE, "seed": 4}, points[0])
    assert child_seed(own, REFERENCE, {"a": 1, "seed": 7}) == 7


def test_each_option_is_described_in_a_line() -> None:
    space = {
        "loss.name": listed("kd", None, 0.5),
        "loss.temperature": Range(1, 20, log=True, when={"loss.name": ["kd", None]}),
        "loss.alpha": Range(0.1, 0.5, step=0.2),
        "optimizer": listed(ADAM),
    }
    assert describe(Search(space)) == [
        "loss.name: kd, null, 0.5",
        "loss.temperature: whole numbers 1 to 20, log; only if loss.name is kd or null",
        "loss.alpha: numbers 0.1 to 0.5 in steps of 0.2",
        'optimizer: {"name": "adam"}',
    ]


# --- names ------------------------------------------------------------------------------------------------


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
        ({"dataset.augmentation": ["crop", "cutout"], "seed": 1}, "augmentation_crop-cutout_seed_1"),
        ({"dataset.mean": [0.5, -1]}, "mean_0.5--1"),
        ({"optimizer": {"name": "adam"}}, "optimizer_adam"),
    ],
)
def test_children_have_the_ancestors_names(point: dict[str, Any], name: str) -> None:
    assert name_point(point) == name


def test_a_section_goes_by_its_name_where_that_tells_it_apart_and_keeps_it_when_others_are_added() -> None:
    other, unlisted = {"name": "sgd", "learning_rate": 0.2}, {"name": "sgd"}
    for sections in ([SGD, ADAM], [SGD, ADAM, other]):
        space = {"optimizer": listed(*sections)}
        names = [name_point({"optimizer": section}, space) for section in sections]
        assert names[:2] == ["optimizer_sgd", "optimizer_adam"]
    names += [name_point({"optimizer": unlisted}, space), name_point({"optimizer": {"lr": 1}}, space)]
    assert len(set(names)) == 5
    assert names[2].startswith("optimizer_sgd-")
    # however it is written
    assert name_point({"optimizer": {"learning_rate": 0.20, "name": "sgd"}}, space) == names[2]
    assert name_point({"teacher": {"model_dir": "a/b"}}, {"teacher": listed({"model_dir": "a/b"})}) == "teacher_a-b"


def test_a_label_does_not_depend_on_which_options_a_point_has() -> None:
    space = {"loss.name": listed("kd"), "student.name": Values(("cnn",), {"loss.name": ["kd"]})}
    assert name_point({"loss.name": "ce"}, space) == "loss-name_ce"


@pytest.mark.parametrize("value", ["; rm -rf /", "$(x)", "../x", "a\nb", "/etc/passwd", "--help", "é", "", "..", "\0"])
def test_whatever_the_value_a_name_is_a_direct_child_of_harmless_characters(value: str) -> None:
    for given in (value, [value], {"name": value}, {value: value}, [[value]]):
        name = name_point({"student.name": given})
        assert set(name) <= set(string.ascii_letters + string.digits + "._-")
        assert name.startswith("name_")


def test_names_of_random_points_are_harmless_and_differ_or_are_refused() -> None:
    draw = random.Random(0)
    texts = ["", "a", "A", "a/b", "a-b", "é", "x" * 90, "x" * 90 + "y", "2", "true", ".", "a b"]

    def value(depth: int = 2) -> Any:
        kinds = [1, 1.0, 2, True, None, 1e-20, 1e20, draw.choice(texts), -draw.random()]
        if depth:
            kinds += [[value(depth - 1) for _ in range(draw.randint(0, 2))], {draw.choice(texts): value(depth - 1)}]
            kinds += [{"name": draw.choice(texts), "x": value(depth - 1)}]
        return draw.choice(kinds)

    refused = 0
    for _ in range(2000):
        second = value()
        points = [{"a.x": value(), "b.x": second} for _ in range(2)]
        try:
            named = name_points(points)
        except RunError:
            refused += 1
            assert name_point(points[0]).casefold() == name_point(points[1]).casefold()
            continue
        assert list(named.values()) == points
        assert len({name.casefold() for name in named}) == 2
        assert all(len(name) <= MAX_NAME and name.startswith("a-x_") for name in named)
        assert all(set(name) <= set(string.ascii_letters + string.digits + "._-") for name in named)
    assert 0 < refused < 500


def test_long_names_are_cut_and_stay_different() -> None:
    one, other = (name_point({"teacher": "x" * 300 + end}) for end in "ab")
    assert len(one) == len(other) == MAX_NAME
    assert one != other
    assert one[:-8] == other[:-8]


@pytest.mark.parametrize(
    "values", [("a/b", "a-b"), ("CNN", "cnn"), ("2", 2), ("true", True), ("sgd", {"name": "sgd"}), (["a"], "a")]
)
def test_two_children_with_one_name_are_refused(values: tuple[Any, Any]) -> None:
    with pytest.raises(RunError, match="share the directory name") as caught:
        name_points([{"student.name": value} for value in values])
    assert caught.value.exit_status == 2

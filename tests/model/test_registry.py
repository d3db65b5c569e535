from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from model.registry import Registry, check_options, options_of, suggest

Row = tuple[Any, ...]


def common(*, repeats: Annotated[int, Field(ge=1)] = 1, order: Literal["up", "down"] = "up") -> None: ...


@pytest.fixture
def toys() -> Registry:
    """A registry with a function, a class and a family, and options that all of them share."""
    registry = Registry("toy", common=common)

    @registry.register("ball")
    def ball(
        room: str,
        *,
        radius: Annotated[float, Field(gt=0, le=10)],
        bounces: int = 3,
        round: bool = True,
        colours: list[str] | None = None,
        weights: list[Annotated[int, Field(ge=1)]] = [1],  # noqa: B006
    ) -> Row:
        return ("ball", room, radius, bounces, round, colours, weights)

    @registry.register("block")
    class Block:
        def __init__(self, room: str, *, side: float = 1.0) -> None:
            self.row = ("block", room, side)

    @registry.register("car/", members=lambda: ["beetle", "bus"])
    def car(make: str, room: str, *, speed: Annotated[int, Field(ge=0)] = 7) -> Row:
        return ("car", make, room, speed)

    return registry


# --- registering ----------------------------------------------------------------------------------------------


def test_a_name_is_registered_once(toys: Registry) -> None:
    with pytest.raises(ValueError, match=r"toy 'ball' is registered twice: .*ball.*other"):

        @toys.register("ball")
        def other() -> None: ...

    assert toys.create({"name": "ball", "radius": 1.0}, "attic")[0] == "ball"


def test_an_entry_that_would_swallow_typos_is_refused(toys: Registry) -> None:
    def greedy(*, size: int = 1, **rest: Any) -> None: ...

    class Greedy:
        def __init__(self, **rest: Any) -> None: ...

    for entry in (greedy, Greedy):
        with pytest.raises(ValueError, match=r"toy 'greedy' takes \*\*kwargs"):
            toys.register("greedy")(entry)
    assert "greedy" not in list(toys)


def test_register_returns_the_callable_itself(toys: Registry) -> None:
    def kite() -> None: ...

    assert toys.register("kite")(kite) is kite
    assert toys["kite"] is kite


def test_names_come_in_order(toys: Registry) -> None:
    assert list(toys) == ["ball", "block", "car/"]
    assert [name for name, _ in toys.items()] == ["ball", "block", "car/"]


# --- picking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bal", "unknown toy 'bal'; did you mean 'ball'?"),
        ("zeppelin", "unknown toy 'zeppelin'; known: ball, block, car/"),
        ("", "unknown toy ''; known: ball, block, car/"),
        ("car/", "unknown toy 'car/'; known: beetle, bus"),
        ("car/beetel", "unknown toy 'car/beetel'; did you mean 'car/beetle'?"),
        ("car/xyz", "unknown toy 'car/xyz'; known: beetle, bus"),
        ("car", "unknown toy 'car'; did you mean 'car/'?"),
        ("ball/red", "unknown toy 'ball/red'; did you mean 'ball'?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_ones(toys: Registry, name: str, message: str) -> None:
    with pytest.raises(KeyError) as caught:
        toys[name]
    assert caught.value.args == (message,)
    assert toys.resolve({"name": name}) == ({}, [("name", message)])


def test_create_calls_the_entry_with_the_context_and_its_own_options(toys: Registry) -> None:
    section = {"name": "ball", "radius": 2.0, "bounces": 5, "repeats": 4, "order": "down"}
    assert toys.create(section, "attic") == ("ball", "attic", 2.0, 5, True, None, [1])
    assert toys.create({"name": "block", "side": 3.0, "repeats": 2}, "attic").row == ("block", "attic", 3.0)
    assert toys.create({"name": "car/bus", "speed": 9, "repeats": 2}, "attic") == ("car", "bus", "attic", 9)


def test_split_tells_own_options_from_common_ones(toys: Registry) -> None:
    section = {"name": "ball", "radius": 2.0, "repeats": 4, "order": "down"}
    assert toys.split(section) == ({"radius": 2.0}, {"repeats": 4, "order": "down"})
    assert Registry("bare").split({"name": "x", "repeats": 4}) == ({"repeats": 4}, {})


def test_the_options_of_a_family_are_those_of_its_callable(toys: Registry) -> None:
    for entry in (toys["car/bus"], dict(toys.items())["car/"]):
        assert list(options_of(entry)) == ["speed"]
    assert isinstance(toys["car/bus"], functools.partial)
    assert toys.resolve({"name": "car/bus"}) == (
        {"name": "car/bus", "speed": 7, "repeats": 1, "order": "up"},
        [],
    )
    assert toys.resolve({"name": "car/bus", "speed": -1})[1] == [("speed", "-1 is below 0")]


# --- checking -------------------------------------------------------------------------------------------------


def test_every_option_is_in_the_resolved_section(toys: Registry) -> None:
    assert toys.resolve({"name": "ball", "radius": 2}) == (
        {
            "name": "ball",
            "radius": 2.0,
            "bounces": 3,
            "round": True,
            "colours": None,
            "weights": [1],
            "repeats": 1,
            "order": "up",
        },
        [],
    )


def test_a_resolved_section_resolves_to_itself(toys: Registry) -> None:
    for section in ({"name": "ball", "radius": 2}, {"name": "block"}, {"name": "car/bus", "order": "down"}):
        resolved, _ = toys.resolve(section)
        assert toys.resolve(resolved) == (resolved, [])


def test_defaults_are_not_shared_between_sections(toys: Registry) -> None:
    one, _ = toys.resolve({"name": "ball", "radius": 1})
    one["weights"].append(9)
    assert toys.resolve({"name": "ball", "radius": 1})[0]["weights"] == [1]


def test_all_problems_are_found_at_once(toys: Registry) -> None:
    section = {"name": "ball", "bounces": 1.0, "round": 0, "colour": "red", "repeats": 0, "weights": [1, 0, "2"]}
    _, problems = toys.resolve(section)
    assert dict(problems) == {
        "radius": "is missing and has no default",
        "bounces": "expected a whole number, got 1.0",
        "round": "expected true or false, got 0",
        "colour": "unknown option; did you mean 'colours'?",
        "repeats": "0 is below 1",
        "weights.1": "0 is below 1",
        "weights.2": "expected a whole number, got '2'",
    }
    assert len(problems) == 7


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("radius", "0.1", "expected a number, got '0.1'"),
        ("radius", True, "expected a number, got True"),
        ("radius", None, "expected a number, got None"),
        ("radius", [1.0], "expected a number, got [1.0]"),
        ("radius", float("nan"), "nan is not a finite number"),
        ("radius", float("inf"), "inf is not a finite number"),
        ("radius", float("-inf"), "-inf is not a finite number"),
        ("radius", 0, "0 is not above 0.0"),
        ("radius", 10.5, "10.5 is above 10.0"),
        ("bounces", True, "expected a whole number, got True"),
        ("bounces", 1.0, "expected a whole number, got 1.0"),
        ("bounces", "1", "expected a whole number, got '1'"),
        ("round", "true", "expected true or false, got 'true'"),
        ("round", 1, "expected true or false, got 1"),
        ("colours", "red", "expected a list, got 'red'"),
        ("order", "sideways", "'sideways' is not one of 'up' or 'down'"),
        ("order", 1, "1 is not one of 'up' or 'down'"),
    ],
)
def test_types_and_ranges_are_strict(toys: Registry, option: str, value: object, message: str) -> None:
    assert toys.resolve({"name": "ball", "radius": 1.0, option: value})[1] == [(option, message)]


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("ball", ("", "expected {\"name\": ..., options}, got 'ball'")),
        (["ball"], ("", "expected {\"name\": ..., options}, got ['ball']")),
        (None, ("", 'expected {"name": ..., options}, got None')),
        ({}, ("name", "is missing; known: ball, block, car/")),
        ({"name": None}, ("name", "is missing; known: ball, block, car/")),
        ({"name": 3}, ("name", "3 is not a name; known: ball, block, car/")),
        ({"name": ["ball"]}, ("name", "['ball'] is not a name; known: ball, block, car/")),
    ],
)
def test_what_is_no_section_is_refused(toys: Registry, section: object, problem: tuple[str, str]) -> None:
    assert toys.resolve(section) == ({}, [problem])


def test_a_rule_without_a_sentence_of_ours_has_pydantics(toys: Registry) -> None:
    @toys.register("dice")
    def dice(
        *,
        sides: Annotated[int, Field(multiple_of=2)] = 6,
        name_on_it: Annotated[str, Field(pattern="^a{2}$")] = "aa",
    ) -> None: ...

    _, problems = toys.resolve({"name": "dice", "sides": 5, "name_on_it": "b"})
    assert dict(problems) == {
        "sides": "Input should be a multiple of 2",
        "name_on_it": "String should match pattern '^a{2}$'",  # braces are not places to fill in
    }


# --- signatures -----------------------------------------------------------------------------------------------


def test_only_keyword_only_parameters_are_options() -> None:
    def function(given: int, also: int = 1, *, own: float, other: bool = False) -> None: ...

    class Entry:
        def __init__(self, given: int, *, own: float) -> None: ...

    assert options_of(function) == {"own": (float, ...), "other": (bool, False)}
    assert options_of(Entry) == {"own": (float, ...)}
    # What the program gives cannot be given by a file.
    assert check_options({"own": 1.0, "given": 3}, Entry)[1] == [("given", "unknown option; known: own")]


def test_options_of_several_callables_are_checked_together(toys: Registry) -> None:
    def more(*, extra: int) -> None: ...

    assert check_options({"extra": 1, "repeats": 2}, more, common) == ({"extra": 1, "repeats": 2, "order": "up"}, [])
    _, problems = check_options({"repeats": 0}, more, common)
    assert sorted(key for key, _ in problems) == ["extra", "repeats"]


def test_suggest_names_a_near_miss_or_everything() -> None:
    assert suggest("temprature", ["temperature", "alpha"]) == "did you mean 'temperature'?"
    assert suggest("x", ["temperature", "alpha"]) == "known: alpha, temperature"

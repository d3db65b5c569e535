"""The space of a search: which options it varies, its points, and the name of the directory that each of them gets.

Plain data and functions of it; `search_json` reads it from the file.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import NoneType
from typing import Any

from utils import RunError, is_list_of_sections, place_of, set_option, spell_out_teachers

Point = dict[str, Any]  # full dotted key -> value; an option whose condition does not hold is not in it
When = Mapping[str, Sequence[Any]]  # full dotted key -> the values of it with which an option exists


@dataclass(frozen=True)
class Values:
    """An option with listed values: numbers, texts, true, false, null, lists or whole sections."""

    values: tuple[Any, ...]
    when: When = field(default_factory=dict)


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included; whole if both are (and `step` is)."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    when: When = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, (int, NoneType))

    def number_of_steps(self) -> int:
        """Returns how many values a grid has, 0 without a step; the last one may be below `high`."""
        return int((_exact(self.high) - _exact(self.low)) // _exact(self.step)) + 1 if self.step else 0


Dimension = Values | Range


@dataclass(frozen=True)
class Objective:
    """What is sought: a validation metric of the weights that are kept (best.pth.tar), such as `val.accuracy`."""

    metric: str = "val.accuracy"
    mode: str = "max"  # or min


@dataclass(frozen=True)
class Strategy:
    """How points are chosen: `grid`, `random` or `tpe`; `seed` decides what is drawn."""

    name: str = "grid"
    seed: int = 0
    startup_trials: int = 10  # of tpe: as many are random before it looks at results


@dataclass(frozen=True)
class Pruner:
    """Which runs are ended early: `none`, `median` or `hyperband`."""

    name: str = "none"
    startup_trials: int = 5  # of median: as many are never pruned
    warmup_epochs: int = 0  # of median: of a run, so many are not judged
    min_epochs: int = 1  # of hyperband: the first comparison
    reduction_factor: int = 3  # of hyperband: one of so many goes on


@dataclass(frozen=True)
class Search:
    """All that search.json and the command line say."""

    space: Mapping[str, Dimension]  # by full dotted key, in the file's order; a condition names keys above it
    include: tuple[Point, ...] = ()  # tried first; may have other values than the space, and other options
    exclude: tuple[Point, ...] = ()  # a point that agrees with one of these in all that it names is not tried
    seeds: tuple[int, ...] = ()  # every point is trained with each; none: with the reference's
    objective: Objective = field(default_factory=Objective)
    strategy: Strategy = field(default_factory=Strategy)
    max_trials: int | None = None  # points, included ones among them; None: all (grid)
    pruner: Pruner = field(default_factory=Pruner)
    common_random_numbers: bool = True  # False: every point has its own seed, which follows from it

    @property
    def num_seeds(self) -> int:
        """Children per point."""
        return max(1, len(self.seeds))

    @property
    def learns(self) -> bool:
        """Whether results decide what is trained."""
        return self.strategy.name == "tpe" or self.pruner.name != "none"

    @property
    def needs_tuner(self) -> bool:
        """Whether points are drawn, or runs ended early; a plain grid needs nothing but its directories."""
        return self.strategy.name != "grid" or self.learns


JOURNAL = "optuna.journal"  # in the parent: which points were chosen, where results decide that
LABELS = {"temperature": "Temp"}  # the ancestor's children are alpha_0.9_Temp_4.0
MAX_POINTS = 10_000
MAX_NAME = 100
TRIES = 1_000  # to find a point that is not excluded


# --- values and conditions --------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    """Tells whether two values mean the same: 2 and 2.0 do, true and 1 do not."""
    if isinstance(one, (Mapping, list, tuple)) or isinstance(other, (Mapping, list, tuple)):
        return canonical(one) == canonical(other)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def canonical(value: Any) -> str:
    """Returns a text that two values share if, and only if, they are the same."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return json.dumps(plain(value), sort_keys=True)


def takes(dimension: Dimension, value: Any) -> bool:
    """Tells whether an option can have a value."""
    if isinstance(dimension, Values):
        return any(same(value, listed) for listed in dimension.values)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not dimension.low <= value <= dimension.high:
        return False
    if dimension.step is not None:
        return (_exact(value) - _exact(dimension.low)) % _exact(dimension.step) == 0
    return not dimension.is_whole or value == int(value)


def find(values: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    """Returns (the value,) of a dotted key in a point or in params, () where it is absent; sections are looked into."""
    if key in values:
        return (values[key],)
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        section = values.get(".".join(parts[:length]))
        if isinstance(section, Mapping):
            return find(section, ".".join(parts[length:]))
    return ()


def holds(when: When, values: Mapping[str, Any]) -> bool:
    """Tells whether conditions are met by a point, or by params."""
    return all(
        any(same(value, allowed) for value in find(values, key) for allowed in listed) for key, listed in when.items()
    )


def active(search: Search, key: str, point: Point) -> bool:
    """Tells whether an option exists beside the values that a point has for the keys above it."""
    return holds(search.space[key].when, point)


def is_excluded(search: Search, point: Point) -> bool:
    """Tells whether a point agrees with one of the excluded in all that this names."""
    return any(agrees(point, other) for other in search.exclude)


def agrees(point: Point, other: Point) -> bool:
    """Tells whether a point has all values that another one names."""
    return all((found := find(point, key)) and same(found[0], value) for key, value in other.items())


# --- points -----------------------------------------------------------------------------------------------


def grid(search: Search) -> list[Point]:
    """Returns the points of a grid in a fixed order: included ones, then all others, the first key outermost.

    Raises:
        RunError: A range without a step has no grid.
    """
    for key, dimension in search.space.items():
        if isinstance(dimension, Range) and dimension.step is None:
            raise RunError(f"{key}: a grid needs a list of values, or a step", "params")
    known = {canonical(point) for point in search.include}
    others = (point for point in enumerate_points(search) if canonical(point) not in known)
    points = itertools.chain(search.include, others)
    return list(itertools.islice((p for p in points if not is_excluded(search, p)), search.max_trials))


def enumerate_points(search: Search) -> Iterator[Point]:
    """Yields the points of listed values and steps, excluded ones among them; where nothing is varied, the reference.

    Included points stand for themselves: with nothing else they are all there is.
    """
    if search.space or not search.include:
        yield from _combine(search, lambda key: _steps(search.space[key]))


def _combine(search: Search, values: Callable[[str], Iterable[Any]]) -> Iterator[Point]:
    """Yields all combinations of the options' values, without those options whose conditions do not hold."""
    keys = list(search.space)

    def extend(point: Point, index: int) -> Iterator[Point]:
        if index == len(keys):
            yield point
        elif not active(search, keys[index], point):
            yield from extend(point, index + 1)
        else:
            for value in values(keys[index]):
                yield from extend({**point, keys[index]: value}, index + 1)

    return extend({}, 0)


def _steps(dimension: Dimension) -> Iterator[Any]:
    if isinstance(dimension, Values):
        yield from dimension.values
    else:
        low, step = _exact(dimension.low), _exact(dimension.step or 0)
        for number in range(dimension.number_of_steps()):
            yield (int if dimension.is_whole else float)(low + number * step)


def _exact(number: float) -> Fraction:
    """Returns what a number says in decimals, so that 0.1 + 0.2 is 0.3."""
    return Fraction(str(number))


def cover(search: Search) -> list[Point]:
    """Returns a few points that between them take each listed value and both ends of each range.

    A value of which no point is found that is not excluded is left out.
    """
    points: list[Point] = []
    taken: set[tuple[str, str]] = set()

    def is_taken(key: str, value: Any) -> bool:
        return (key, canonical(value)) in taken

    def complete(fixed: Point) -> Iterator[Point]:
        # Values that no point has yet come first, so that few points are enough.
        return _combine(
            search,
            lambda key: [fixed[key]] if key in fixed else sorted(_ends(search, key), key=lambda v: is_taken(key, v)),
        )

    for key in search.space:
        for value in _ends(search, key):
            if is_taken(key, value):
                continue
            candidates = itertools.chain.from_iterable(complete(way) for way in _ways(search, key, value))
            allowed = (point for point in itertools.islice(candidates, TRIES) if not is_excluded(search, point))
            if (point := next(allowed, None)) is not None:
                points.append(point)
                taken |= {(key, canonical(value)) for key, value in point.items()}
    return points


def _ends(search: Search, key: str) -> Sequence[Any]:
    dimension = search.space[key]
    return dimension.values if isinstance(dimension, Values) else (dimension.low, dimension.high)


def is_reachable(search: Search, key: str) -> bool:
    """Tells whether all conditions of an option, and of those options that they name, can hold together."""
    return next(_ways(search, key, None), None) is not None


def _ways(search: Search, key: str, value: Any) -> Iterator[Point]:
    """Yields the ways in which an option can have a value: points with the values that its conditions ask for."""

    def meet(conditions: Sequence[tuple[str, Sequence[Any]]], way: Point) -> Iterator[Point]:
        if not conditions:
            yield way
            return
        (condition, allowed), *others = conditions
        owner = owner_of(search.space, condition)
        dimension = search.space[owner]
        candidates = dimension.values if isinstance(dimension, Values) else allowed
        for candidate in candidates:
            if holds({condition: allowed}, {owner: candidate}):
                for above in _ways(search, owner, candidate):
                    if all(same(above[key], way[key]) for key in above.keys() & way.keys()):
                        yield from meet(others, {**above, **way})

    return meet(list(search.space[key].when.items()), {key: value})


def owner_of(space: Mapping[str, Any], key: str) -> str:
    """Returns the option that a dotted key is, or that has it in its sections; "" if there is none."""
    parts = key.split(".")
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in space), "")


# --- children ---------------------------------------------------------------------------------------------


def child_params(reference: Mapping[str, Any], point: Point, search: Search) -> dict[str, Any]:
    """Returns the reference with a point's options, and without those whose conditions do not hold."""
    params = copy.deepcopy(dict(reference))
    for key, value in point.items():
        set_value(params, key, copy.deepcopy(value))
    for key, dimension in search.space.items():
        if not holds(dimension.when, ChainMap(point, params)):  # a section is compared without parts that are varied
            remove(params, key)
    return params


def set_value(params: dict[str, Any], key: str, value: Any) -> None:
    """Sets an option; of a teacher that is given by its directory alone, too."""
    if key.startswith("teacher."):
        spell_out_teachers(params)
    set_option(params, key, value)


def remove(params: dict[str, Any], key: str) -> None:
    """Leaves out an option, if it is there."""
    *path, last = key.split(".")
    section: Any = params
    for part in path:
        if is_list_of_sections(section):
            place = place_of(section, part)
            section = None if place is None else section[place]
        else:
            section = section.get(part) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(last, None)


def child_seed(search: Search, reference: Mapping[str, Any], point: Point) -> int | None:
    """Returns the seed of a point's training; None: the one that train.py takes where none is given.

    It is the reference's, so that all points meet the same random numbers, unless those are not common: then it
    follows from the point and the reference's seed.
    """
    if search.common_random_numbers or "seed" in point:
        return point.get("seed", reference.get("seed"))
    text = canonical([reference.get("seed"), point])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def describe(search: Search) -> list[str]:
    """Returns a line for each option: what it may be, and when it exists."""
    lines = []
    for key, dimension in search.space.items():
        if isinstance(dimension, Values):
            text = ", ".join(show(value) for value in dimension.values)
        else:
            text = f"{'whole numbers' if dimension.is_whole else 'numbers'} {dimension.low} to {dimension.high}"
            text += ", log" if dimension.log else ""
            text += f" in steps of {dimension.step}" if dimension.step else ""
        for condition, allowed in dimension.when.items():
            text += f"; only if {condition} is {' or '.join(show(value) for value in allowed)}"
        lines.append(f"{key}: {text}")
    return lines


# --- names ------------------------------------------------------------------------------------------------


def name_points(points: Iterable[Point], space: Mapping[str, Dimension] | None = None) -> dict[str, Point]:
    """Returns points by their directories' names, which must differ even where `A` and `a` are one file.

    Args:
        points: The points.
        space: As for `name_point`.

    Raises:
        RunError: Two points have one name.
    """
    named: dict[str, tuple[str, Point]] = {}
    for point in points:
        name = name_point(point, space)
        other = named.setdefault(name.casefold(), (name, point))[1]
        if other is not point:
            both = f"{json.dumps(other)} and {json.dumps(point)}"
            raise RunError(f"search.json: {both} share the directory name {name}; give one its own parent", "params")
    return dict(named.values())


def name_point(point: Point, space: Mapping[str, Dimension] | None = None) -> str:
    """Returns a name such as `alpha_0.9_Temp_4.0`: of [A-Za-z0-9._-] only, so it is always a direct child.

    Args:
        point: The point.
        space: What other points have. A section goes by its name if it is the first one listed of that name.
    """
    space = space or {}
    lasts = Counter(key.rpartition(".")[2] for key in {**space, **point})
    parts = []
    for key, value in point.items():
        last = key.rpartition(".")[2]
        label = LABELS.get(last, last) if lasts[last] == 1 else key.replace(".", "-")
        parts.append(f"{label}_{_word(value, space.get(key))}")
    name = re.sub(r"[^A-Za-z0-9._-]", "-", "_".join(parts))
    if len(name) > MAX_NAME:
        digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{name[: MAX_NAME - 9]}-{digest}"
    return name


def _word(value: Any, dimension: Dimension | None = None) -> str:
    """Returns a value as a part of a name."""
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        return "-".join(show(item) for item in value)
    if not isinstance(value, (list, dict)):
        return show(value)
    digest = hashlib.sha256(canonical(value).encode()).hexdigest()[:8]
    if not (title := _title(value)):
        return digest
    listed = dimension.values if isinstance(dimension, Values) else ()
    namesakes = [other for other in listed if _title(other) == title]
    tells_apart = same(namesakes[0], value) if namesakes else len(value) == 1
    return title if tells_apart else f"{title}-{digest}"


def _title(value: Any) -> str:
    """Returns what a section is called: its name, or the directory of a teacher; "" if it has neither."""
    title = (value.get("name") or value.get("model_dir")) if isinstance(value, dict) else None
    return title if isinstance(title, str) else ""


def show(value: Any) -> str:
    """Returns a value as names and tables show it: text as it is, all else as JSON (1e20, as 1e+20 would be 1e-20)."""
    return value if isinstance(value, str) else json.dumps(value).replace("e+", "e")

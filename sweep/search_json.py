"""Reads search.json: what it may hold, checked as strictly as params.json, with all problems at once.

A key is an option of the reference, unless it is one of those that `Reserved` lists.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from sweep.space import (
    MAX_POINTS,
    Dimension,
    Objective,
    Point,
    Pruner,
    Range,
    Search,
    Strategy,
    Values,
    When,
    agrees,
    canonical,
    child_params,
    enumerate_points,
    find,
    holds,
    is_excluded,
    is_reachable,
    owner_of,
    remove,
    same,
    set_value,
    takes,
)
from utils import RunError, full_key, read_json

# The grid that the ancestor's search_hyperparams.py has in its code, in its order.
DEFAULT: dict[str, Any] = {
    "alpha": [0.99, 0.95, 0.5, 0.1, 0.05],
    "temperature": [20.0, 10.0, 8.0, 6.0, 4.5, 3.0, 2.0, 1.5],
}
LOWER_IS_BETTER = ("loss", "cross_entropy", "error", "nll", "kl", "mse")  # in the name of a metric
MAX_WHOLE = 2**53  # every whole number up to it is a float, too

Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Whole = Annotated[int, Field(ge=0, le=1_000_000)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ChoiceSection(Strict):
    choice: list[Any]
    when: dict[str, Any] = {}


class RangeSection(Strict):
    low: float
    high: float
    log: bool = Range.log
    step: Annotated[float, Field(gt=0)] | None = Range.step
    when: dict[str, Any] = {}


class GridSection(Strict):
    name: Literal["grid"]


class RandomSection(Strict):
    name: Literal["random"]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Strategy.seed


class TpeSection(Strict):
    name: Literal["tpe"]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Strategy.seed
    startup_trials: Positive = Strategy.startup_trials


class NoPrunerSection(Strict):
    name: Literal["none"]


class MedianSection(Strict):
    name: Literal["median"]
    startup_trials: Whole = Pruner.startup_trials
    warmup_epochs: Whole = Pruner.warmup_epochs


class HyperbandSection(Strict):
    name: Literal["hyperband"]
    min_epochs: Positive = Pruner.min_epochs
    reduction_factor: Annotated[int, Field(ge=2, le=1_000)] = Pruner.reduction_factor


class ObjectiveSection(Strict):
    metric: Annotated[str, Field(pattern=r"^val\.\w+$")] = Objective.metric
    mode: Literal["max", "min"] | None = None


def _name_alone(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Reserved(Strict):
    """The keys that are no options. Their sections have defaults where the dataclasses of `sweep.space` have them."""

    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)] = []
    include: list[dict[str, Any]] = []
    exclude: list[dict[str, Any]] = []
    objective: ObjectiveSection = ObjectiveSection()
    strategy: Annotated[
        GridSection | RandomSection | TpeSection, Field(discriminator="name"), BeforeValidator(_name_alone)
    ] = GridSection(name="grid")
    max_trials: Positive | None = None
    pruner: Annotated[
        NoPrunerSection | MedianSection | HyperbandSection, Field(discriminator="name"), BeforeValidator(_name_alone)
    ] = NoPrunerSection(name="none")
    common_random_numbers: bool = True


SECTIONS: dict[str, type[Strict]] = {  # of strategy and pruner, by name
    "grid": GridSection,
    "random": RandomSection,
    "tpe": TpeSection,
    "none": NoPrunerSection,
    "median": MedianSection,
    "hyperband": HyperbandSection,
}


def read_search(
    path: Path,
    params: Mapping[str, Any],
    *,
    strategy: str | None = None,
    max_trials: int | None = None,
    seeds: Sequence[int] | None = None,
) -> Search:
    """Reads what a search varies, and how.

    Args:
        path: A search.json, such as `{"alpha": [0.5, 0.9]}`. Without it the space is the ancestor's grid.
        params: The parent's params; a bare key means the option of the one section in them that has it.
        strategy: Takes the place of the file's; a seed that the file gives stays.
        max_trials: Takes the place of the file's.
        seeds: Takes the place of the file's.

    Raises:
        RunError: A line for each problem, with file and key.
    """
    given, origin = (read_json(path), f"{path}") if path.exists() else (DEFAULT, f"{path} (absent: the default grid)")
    command = {"strategy": strategy, "max_trials": max_trials, "seeds": None if seeds is None else list(seeds)}
    command = {key: value for key, value in command.items() if value is not None}

    reserved, wrong = _check_reserved({key: value for key, value in given.items() if key in Reserved.model_fields})
    replacing, wrong_there = _check_reserved(command)
    reader = _Reader(params)
    reader.read_space({key: value for key, value in given.items() if key not in Reserved.model_fields})
    _stop_at([*(f"{origin}: {line}" for line in wrong + reader.problems), *(f"--{line}" for line in wrong_there)])

    search = _search(reader.space, reserved, replacing)
    search = reader.read_points(search, reserved)
    reader.check_whole(search)
    _stop_at([f"--{line}" if line.split(":")[0] in command else f"{origin}: {line}" for line in reader.problems])
    return search


def _stop_at(lines: Sequence[str]) -> None:
    """Raises if something is wrong; a line stays one whatever is quoted in it."""
    if lines:
        escaped = ("".join(char if char.isprintable() else repr(char)[1:-1] for char in line) for line in lines)
        raise RunError("\n".join(escaped), "params")


def _search(space: Mapping[str, Dimension], reserved: Reserved, replacing: Reserved) -> Search:
    """Returns what the file says, where the command line does not replace it; included and excluded points are left."""
    strategy = reserved.strategy.model_dump(exclude_unset=True)
    if "strategy" in replacing.model_fields_set:
        name = replacing.strategy.name
        kept = SECTIONS[name].model_fields
        strategy = {**{key: value for key, value in strategy.items() if key in kept}, "name": name}
    metric, mode = reserved.objective.metric, reserved.objective.mode
    falls = any(word in metric.lower() for word in LOWER_IS_BETTER)
    return Search(
        space=space,
        seeds=tuple(replacing.seeds or reserved.seeds),
        objective=Objective(metric, mode or ("min" if falls else "max")),
        strategy=Strategy(**strategy),
        max_trials=replacing.max_trials or reserved.max_trials,
        pruner=Pruner(**reserved.pruner.model_dump(exclude_unset=True)),
        common_random_numbers=reserved.common_random_numbers,
    )


# --- sections ---------------------------------------------------------------------------------------------


def _check_reserved(given: Mapping[str, Any]) -> tuple[Reserved, list[str]]:
    """Returns the reserved keys, those that are wrong at their defaults, and what is wrong with them."""
    try:
        reserved, problems = Reserved.model_validate(given), []
    except ValidationError as error:
        wrong = {detail["loc"][0] for detail in error.errors()}
        reserved = Reserved.model_validate({key: value for key, value in given.items() if key not in wrong})
        problems = _lines(error, Reserved)
    if twice := _repeated(reserved.seeds):
        problems.append(f"seeds: {twice[0]} is there twice; keep one")
    return reserved, problems


_SENTENCES = {
    "missing": "is missing",
    "greater_than": "{input} is not above {gt:g}",
    "greater_than_equal": "{input} is below {ge}",
    "less_than": "{input} is not below {lt}",
    "less_than_equal": "{input} is above {le}",
    "float_type": "expected a number, got {input}",
    "int_type": "expected a whole number, got {input}",
    "int_from_float": "expected a whole number, got {input}",
    "bool_type": "expected true or false, got {input}",
    "string_type": "expected text, got {input}",
    "list_type": "expected a list, got {input}",
    "dict_type": "expected a section {{...}}, got {input}",
    "model_type": "expected a section {{...}}, got {input}",
    "model_attributes_type": "expected a name or a section {{...}}, got {input}",
    "too_short": "expected a list of at least one value, got {input}",
    "string_pattern_mismatch": "{input} is no metric of the validation split (the test split is for evaluate.py); "
    "name one such as val.accuracy",
    "literal_error": "{input} is not one of {expected}",
    "union_tag_invalid": "'{tag}' is not one of {expected_tags}",
    "union_tag_not_found": 'expected a name or a section {{"name": ...}}, got {input}',
}


def _lines(error: ValidationError, model: type[Strict], key: str = "") -> list[str]:
    """Returns problems in our words.

    Args:
        error: The problems.
        model: What was checked.
        key: Where it stands.
    """
    return [_line(detail, model, key) for detail in error.errors()]


def _line(detail: ErrorDetails, model: type[Strict], key: str) -> str:
    kind, where = detail["type"], list(detail["loc"])
    if where[0] in ("strategy", "pruner") and len(where) > 1:
        model = SECTIONS[str(where.pop(1))]
    elif where[0] == "objective":
        model = ObjectiveSection
    if kind == "extra_forbidden":
        text = f"unknown key; {_suggest(str(where[-1]), list(model.model_fields))}"
    elif kind in _SENTENCES:
        text = _SENTENCES[kind].format(input=json.dumps(detail["input"]), **detail.get("ctx", {}))
    else:
        text = detail["msg"]
    path = key + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return f"{path.removeprefix('.')}: {text}"


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _repeated(values: Iterable[Any]) -> list[Any]:
    """Returns those values that are the same as an earlier one."""
    seen: set[str] = set()
    repeated = []
    for value in values:
        if canonical(value) in seen:
            repeated.append(value)
        seen.add(canonical(value))
    return repeated


# --- options and points -----------------------------------------------------------------------------------


class _Reader:
    """Turns options and points into those of a `Search`, and collects what is wrong with them.

    Args:
        params: The parent's params.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
        self.space: dict[str, Dimension] = {}
        self.problems: list[str] = []
        self._faulty: set[str] = set()  # options that are named but unusable: what refers to them is no second problem

    def read_space(self, given: Mapping[str, Any]) -> None:
        """Reads all keys that are not reserved."""
        for name, spec in given.items():
            key = name
            try:
                key = self._resolve(name)
                self.space[key] = self._as_part(key, self._dimension(spec))
            except ValidationError as error:
                self.problems += _lines(error, RangeSection if _is_range(spec) else ChoiceSection, name)
                self._faulty.add(key)
            except (RunError, RecursionError) as error:
                self.problems.append(f"{name or repr(name)}: {error}")
                self._faulty.add(key)
        for key in self.space:
            if not self._faulty and not is_reachable(Search(self.space), key):
                self.problems.append(f"{key}: when: these conditions never hold together; change one of them")

    def _resolve(self, name: str) -> str:
        """Returns the dotted path of the option that a key names."""
        key = full_key(self.params, name)
        if "." not in key and key not in self.params:
            near = difflib.get_close_matches(name, Reserved.model_fields, n=1, cutoff=0.7)
            way = f"write it dotted, such as loss.{name}, or put a top-level option into params.json first"
            meant = f"did you mean {near[0]}? Else " if near else ""
            raise RunError(f"no section of params.json has it; {meant}{way}")
        if not all(key.split(".")):
            raise RunError(f"{name!r} is no path of an option, such as loss.alpha")
        if not owner_of(self.space, key):
            set_value(copy.deepcopy(dict(self.params)), key, None)  # refuses a path through what is no section
        return key

    def _as_part(self, key: str, dimension: Dimension) -> Dimension:
        """Returns an option with the conditions of the section that it is a part of, if that is varied too.

        Raises:
            RunError: It does not stand above, is no section wherever the option exists, or has the option itself.
        """
        for other in [other for other in self.space if _overlap(key, [other])]:
            above = self.space[other]
            values = above.values if isinstance(above, Values) and key.startswith(f"{other}.") else ()
            when = {name: listed for name, listed in dimension.when.items() if owner_of(self.space, name) == other}
            where = [value for value in values if holds(when, {other: value})]
            if not where or not all(isinstance(value, dict) for value in where):
                raise RunError(f"{other} names the same option or a part of it; keep one of them")
            if any(find({other: value}, key) for value in values):
                raise RunError(f"a section of {other} has it, too; keep it in one of the two places")
            both = {
                name: [value for value in listed if any(same(value, v) for v in dimension.when.get(name, listed))]
                for name, listed in above.when.items()
            }
            dimension = replace(dimension, when={**dimension.when, **both})
        return dimension

    def _dimension(self, spec: Any) -> Dimension:
        if _is_range(spec):
            return _range(RangeSection.model_validate(spec), spec, self._when(spec))
        values = spec
        if isinstance(spec, dict):
            values = ChoiceSection.model_validate(spec).choice
        if not isinstance(values, list) or not values:
            ways = "" if isinstance(spec, dict) else ', or {"low": ..., "high": ...}'
            raise RunError(f"expected a list of at least one value, got {json.dumps(values)}{ways}")
        if twice := _repeated(values):
            raise RunError(f"{json.dumps(twice[0])} is there twice (2 and 2.0 are equal); keep one")
        return Values(tuple(values), self._when(spec))

    def _when(self, spec: Any) -> dict[str, list[Any]]:
        """Returns the conditions of an option by full key; they may name what stands above it."""
        when: dict[str, list[Any]] = {}
        given = spec.get("when", {}) if isinstance(spec, dict) else {}
        for name, allowed in given.items():
            key = full_key(self.params, name)
            owner = owner_of(dict.fromkeys([*self.space, *self._faulty]), key)
            allowed = allowed if isinstance(allowed, list) else [allowed]
            if not owner:
                above = ", ".join(self.space) or "none"
                raise RunError(f"when: {name} is no option that is varied above it (those: {above})")
            if key in when:
                raise RunError(f"when: {name} is there twice; keep one")
            if not allowed:
                raise RunError(f"when: {name}: expected a value or a list of at least one, got []")
            if owner in self.space:
                for value in allowed:
                    self._refuse_unless_taken(owner, key, value, "when: ")
            when[key] = allowed
        return when

    def _refuse_unless_taken(self, owner: str, key: str, value: Any, where: str) -> None:
        """Raises for a value that an option, or one in its sections, never has."""
        dimension = self.space[owner]
        if key == owner:
            if not takes(dimension, value):
                raise RunError(f"{where}{key} is never {json.dumps(value)}; it is {_possible(dimension)}")
            return
        inside = [find({owner: v}, key) for v in dimension.values] if isinstance(dimension, Values) else []
        if not any(same(value, other) for found in inside for other in found):
            known = ", ".join(dict.fromkeys(json.dumps(other) for found in inside for other in found))
            raise RunError(f"{where}{key} is never {json.dumps(value)}; {owner} has it as {known or 'nothing'}")

    def read_points(self, search: Search, reserved: Reserved) -> Search:
        """Returns the search with its included and excluded points."""
        include = self._points("include", reserved.include, lambda named: self._include(named, search))
        exclude = self._points("exclude", reserved.exclude, lambda named: self._exclude(named, search))
        return replace(search, include=include, exclude=exclude)

    def _points(self, kind: str, given: Iterable[Point], read: Callable[[Point], Point]) -> tuple[Point, ...]:
        """Returns the points of `include` or `exclude` that can be read."""
        points = []
        for index, named in enumerate(given):
            try:
                points.append(read(named))
            except (RunError, RecursionError) as error:
                self.problems.append(f"{kind}[{index}]: {error}")
        if twice := _repeated(points):
            self.problems.append(f"{kind}: {json.dumps(twice[0])} is there twice; keep one")
        return tuple(points)

    def _include(self, given: Point, search: Search) -> Point:
        """Returns a point in the order of the space, with the reference's values for the options that it leaves out."""
        named: Point = {}
        for name, value in given.items():
            key = self._resolve(name)
            other = _overlap(key, [other for other in named if key == other or not {key, other} <= search.space.keys()])
            if other:
                raise RunError(f"{name}: {other} names the same option or a part of it; keep one of them")
            if key == "seed" and search.seeds:
                raise RunError("seed: every point is trained with each of seeds; remove one of the two")
            named[key] = value
        foreign = {key: value for key, value in named.items() if key not in search.space}
        ordered = {key: named[key] for key in search.space if key in named} | foreign
        params = child_params(self.params, ordered, search)
        for key in [*search.space, *foreign]:
            if find(named, key) and not find(params, key):
                when = search.space[owner_of(search.space, key)].when
                conditions = " and ".join(f"{name} in {json.dumps(listed)}" for name, listed in when.items())
                raise RunError(f"{key}: exists only with {conditions}; remove it")
        point: Point = {}
        for key in reversed(list(search.space)):  # parts of a section before the section, which is without them
            dimension, found = search.space[key], find(params, key)
            if found and not _overlap(key, foreign):
                point[key] = _as_listed(dimension, found[0])
                remove(params, key)
        point = dict(reversed(point.items())) | foreign
        if not point and not search.seeds:
            raise RunError("{} is the reference itself; name an option, or train the reference with several seeds")
        return point

    def _exclude(self, given: Point, search: Search) -> Point:
        """Returns a point by full keys."""
        point: Point = {}
        for name, value in given.items():
            key = full_key(self.params, name)
            if key in point:
                raise RunError(f"{name}: {key} is there twice; keep one")
            if not (owner := owner_of(search.space, key)):
                known = ", ".join(search.space) or "none"
                raise RunError(f"{name}: is not varied; name options of the space ({known})")
            self._refuse_unless_taken(owner, key, value, "")
            point[key] = value
        if not point:
            raise RunError("{} agrees with every point; name an option of the space")
        return point

    def check_whole(self, search: Search) -> None:
        """Adds what no key shows alone."""
        space, strategy = search.space, search.strategy.name
        way = "remove one of the two"
        if search.seeds and "seed" in space:
            self.problems.append(f"seeds: seed is an option of the space; {way}")
        if not search.common_random_numbers and (search.seeds or "seed" in space):
            key = "seeds" if search.seeds else "seed"
            self.problems.append(f"{key}: with common_random_numbers false every point has a seed of its own; {way}")
        if search.max_trials is not None and search.max_trials < len(search.include):
            number = len(search.include)
            self.problems.append(f"max_trials: {search.max_trials} is below {number}, the number of points to include")
        if not (space or search.include or search.seeds):
            self.problems.append("no points; name options with their values, points to include, or seeds")
        self.problems += [
            f"include: {json.dumps(point)} is excluded; {way}" for point in search.include if is_excluded(search, point)
        ]
        if strategy == "grid":
            endless = [key for key, dimension in space.items() if isinstance(dimension, Range) and not dimension.step]
            self.problems += [f"{key}: a grid needs a list or a step; random and tpe do not" for key in endless]
        else:
            if not space:
                self.problems.append(f"strategy: {strategy} needs options to vary, with their values or ranges")
            if search.max_trials is None:
                self.problems.append(f"max_trials: is missing; {strategy} needs it (or --max_trials)")
        if not self.problems:
            self._check_points(search)

    def _check_points(self, search: Search) -> None:
        """Adds what is wrong with the number of points, where they can be counted."""
        sizes = [len(d.values) if isinstance(d, Values) else d.number_of_steps() for d in search.space.values()]
        if not all(sizes):
            return
        points = list(itertools.islice(enumerate_points(search), MAX_POINTS + 1))
        if len(points) > MAX_POINTS:
            if search.strategy.name == "grid":
                number = f"more than {MAX_POINTS}" if any(d.when for d in search.space.values()) else math.prod(sizes)
                self.problems.append(f"{number} points; name keys and values that make 1 to {MAX_POINTS}")
            return
        if points and not search.include and all(is_excluded(search, point) for point in points):
            self.problems.append("exclude: leaves no point; exclude fewer")
        for index, excluded in enumerate(search.exclude):
            if not any(agrees(point, excluded) for point in points):
                self.problems.append(f"exclude[{index}]: {json.dumps(excluded)} is no point; correct or remove it")


def _is_range(spec: Any) -> bool:
    return isinstance(spec, dict) and "choice" not in spec and bool(spec.keys() & {"low", "high", "log", "step"})


def _range(section: RangeSection, spec: Mapping[str, Any], when: When) -> Range:
    """Returns a checked range; whether it is whole shows in the spec: 1 is, 1.0 is not."""
    bounds = [spec["low"], spec["high"], *([] if section.step is None else [spec["step"]])]
    kind = int if all(isinstance(bound, int) for bound in bounds) else float
    low, high, *steps = (kind(bound) for bound in bounds)
    if kind is int and max(abs(low), abs(high)) > MAX_WHOLE:
        raise RunError(f"whole numbers are from -2^53 to 2^53, got {low} to {high}")
    if not low < high:
        raise RunError(f"low {low} is not below high {high}")
    if section.log and low <= 0:
        raise RunError(f"log needs low above 0, got {low}")
    if section.log and steps:
        raise RunError("log and step exclude one another; remove one of the two")
    dimension = Range(low, high, section.log, steps[0] if steps else None, when)
    if steps and dimension.number_of_steps() < 2:
        raise RunError(f"step {steps[0]} is larger than from low {low} to high {high}")
    return dimension


def _possible(dimension: Dimension) -> str:
    if isinstance(dimension, Values):
        return f"one of {', '.join(json.dumps(value) for value in dimension.values)}"
    step = f" in steps of {dimension.step}" if dimension.step else ""
    return f"{'a whole number' if dimension.is_whole else 'a number'} from {dimension.low} to {dimension.high}{step}"


def _as_listed(dimension: Dimension, value: Any) -> Any:
    """Returns a value as the space writes it, so that a point has one name: 2 for 2.0 where 2 is listed."""
    if isinstance(dimension, Values):
        return next((listed for listed in dimension.values if same(listed, value)), value)
    return (int if dimension.is_whole else float)(value) if takes(dimension, value) else value


def _overlap(key: str, others: Iterable[str]) -> str:
    """Returns the first of other options that is this one, a part of it, or has it as a part; "" if none does."""
    return next((o for o in others if f"{o}.".startswith(f"{key}.") or f"{key}.".startswith(f"{o}.")), "")

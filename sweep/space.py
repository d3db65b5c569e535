"""The search space: search.json -> points, and the name of the directory that each of them gets."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils import RunError, full_key, read_json, set_option

# The grid that the ancestor's search_hyperparams.py has in its code, in its order.
DEFAULT: dict[str, Any] = {
    "alpha": [0.99, 0.95, 0.5, 0.1, 0.05],
    "temperature": [20.0, 10.0, 8.0, 6.0, 4.5, 3.0, 2.0, 1.5],
}
LABELS = {"temperature": "Temp"}  # the ancestor's children are alpha_0.9_Temp_4.0
MAX_POINTS = 10_000
MAX_NAME = 100

Space = dict[str, list[Any]]
Point = dict[str, Any]


def read_space(path: Path, params: Mapping[str, Any]) -> Space:
    """Reads what a search varies: dotted keys, each with its values, in the file's order.

    Args:
        path: A search.json, such as `{"alpha": [0.5, 0.9]}`. Without it the space is the ancestor's grid.
        params: The parent's params; a bare key means the option of the one section in them that has it.

    Raises:
        RunError: With file and key, for a space that cannot be meant.
    """
    given, origin = (read_json(path), f"{path}") if path.exists() else (DEFAULT, f"{path} (absent: the default grid)")
    space: Space = {}
    try:
        for name, values in given.items():
            key = _resolve(name, params)
            for other in space:
                if f"{other}.".startswith(f"{key}.") or f"{key}.".startswith(f"{other}."):
                    raise RunError(f"{name}: {other} names the same option or a part of it; keep one of them")
            space[key] = _check_values(name, values)
        number = math.prod(len(values) for values in space.values())
        if not space or number > MAX_POINTS:
            raise RunError(f"{number if space else 'no'} points; name keys and values that make 1 to {MAX_POINTS}")
    except RunError as error:
        raise RunError(f"{origin}: {error}", "params") from None
    return space


def _resolve(name: str, params: Mapping[str, Any]) -> str:
    """Returns the dotted path of the option that a key of search.json names."""
    key = full_key(params, name)
    if "." not in key and key not in params:
        way = f"write it dotted, such as loss.{name}, or put a top-level option into params.json first"
        raise RunError(f"{name}: no section of params.json has it; {way}")
    if not all(key.split(".")):
        raise RunError(f"{name!r} is no path of an option, such as loss.alpha")
    set_option(copy.deepcopy(dict(params)), key, None)  # refuses a path through something that is no section
    return key


def _check_values(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise RunError(f"{name}: expected a list of at least one value, got {json.dumps(values)}")
    seen = set()
    for value in values:
        if isinstance(value, (list, dict)):
            raise RunError(f"{name}: {json.dumps(value)} is not a number, text, true, false or null")
        same = (isinstance(value, bool), value)  # in Python 1 == 1.0 == True, but true is no number here
        if same in seen:
            raise RunError(f"{name}: {json.dumps(value)} is there twice (2 and 2.0 are equal); keep one")
        seen.add(same)
    return values


def grid(space: Space) -> list[Point]:
    """Returns every combination in a fixed order: the first key is the outermost loop."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def name_points(points: Iterable[Point]) -> dict[str, Point]:
    """Returns points by their directories' names, which must differ even where `A` and `a` are one file."""
    named: dict[str, tuple[str, Point]] = {}
    for point in points:
        name = name_point(point)
        other = named.setdefault(name.casefold(), (name, point))[1]
        if other is not point:
            both = f"{json.dumps(other)} and {json.dumps(point)}"
            raise RunError(f"search.json: {both} share the directory name {name}; give one its own parent", "params")
    return dict(named.values())


def name_point(point: Point) -> str:
    """Returns a name such as `alpha_0.9_Temp_4.0`: of [A-Za-z0-9._-] only, so it is always a direct child."""
    lasts = Counter(key.rpartition(".")[2] for key in point)
    parts = []
    for key, value in point.items():
        last = key.rpartition(".")[2]
        label = LABELS.get(last, last) if lasts[last] == 1 else key.replace(".", "-")
        parts.append(f"{label}_{show(value)}")
    name = re.sub(r"[^A-Za-z0-9._-]", "-", "_".join(parts))
    if len(name) > MAX_NAME:
        digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{name[: MAX_NAME - 9]}-{digest}"
    return name


def show(value: Any) -> str:
    """Returns a value as names and tables show it: text as it is, all else as JSON (1e20, as 1e+20 would be 1e-20)."""
    return value if isinstance(value, str) else json.dumps(value).replace("e+", "e")

"""Rows -> heatmap.png: the val accuracy of a directory's runs over the two options in which they differ.

Values that form a grid are cells of equal size; where most combinations are missing, as in a random search, the runs
are points.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report.collect import Row, is_number
from report.plots import MAX_LABEL, MAX_TITLE, fit, to_png
from report.tables import METRICS, differing_options

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Point = tuple[float, float]  # the values of the two options

VAL = METRICS["val_accuracy"].key
MIN_POINTS = 3
MAX_VALUE = 1e100  # matplotlib's axes overflow long before its numbers do
COLORS = "viridis"  # also in grey print, and for the colour-blind, brighter is better
HATCHED: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.75", "hatch": "////", "linewidth": 0}
MARKERS = "x+1234|_"  # of the runs without an accuracy, by state
CELL = 0.8, 0.5  # inches, as long as the image is not larger than
MAX_SIZE = 16.0, 12.0
LINE = 12.0  # points from one label of an axis to the next
MIN_FONT = 5.0  # points: smaller numbers are not written


@dataclass
class Cell:
    """The runs with the same two values."""

    accuracies: dict[Any, float] = field(default_factory=dict)  # of completed runs, by seed; of repeats the first
    states: list[str] = field(default_factory=list)  # of the others

    @property
    def mean(self) -> float:
        """The mean over seeds, in percent; NaN without a completed run."""
        return 100 * statistics.fmean(self.accuracies.values()) if self.accuracies else math.nan


@dataclass(frozen=True)
class Map:
    """The runs of one directory, by the values of the two options in which they differ."""

    parent: Path
    headers: tuple[str, str]
    cells: dict[Point, Cell]

    @cached_property
    def sides(self) -> tuple[list[float], list[float]]:
        """The values of each option, ascending."""
        xs, ys = (sorted(set(values)) for values in zip(*self.cells, strict=True))
        return xs, ys

    @property
    def is_grid(self) -> bool:
        """Whether most combinations of the values have been tried."""
        return 2 * len(self.cells) > math.prod(map(len, self.sides))

    @cached_property
    def seeds(self) -> list[int]:
        """How many seeds the means are over, ascending."""
        return sorted({len(cell.accuracies) for cell in self.cells.values()} - {0})

    @cached_property
    def best(self) -> list[Point]:
        """The points with the best mean: of those with all seeds, as fewer may have been lucky."""
        whole = {point: cell.mean for point, cell in self.cells.items() if len(cell.accuracies) == self.seeds[-1]}
        return [point for point, mean in whole.items() if mean == max(whole.values())]

    @property
    def title(self) -> str:
        low, high = self.seeds[0], self.seeds[-1]
        seeds = f"{low} to {high} seeds" if low < high else f"{high} seeds" if high > 1 else "1 seed"
        return f"{fit(str(self.parent), MAX_TITLE)}\nval accuracy (best) in %, n = {seeds}"


def find_maps(rows: Sequence[Row]) -> list[Map]:
    """Returns a map for each directory right below which the runs differ in two numbers, and perhaps the seed.

    Of runs that are not completed only the state is in it: the accuracy of one that was pruned is of an early epoch.
    """
    siblings: dict[Path, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.path):
        if row.options:  # else its params.json cannot be read
            siblings[Path(row.path).parent].append(row)
    maps = []
    for parent, group in siblings.items():
        options = {key: header for key, header in differing_options(group).items() if key != "seed"}
        values = {key: {row.options.get(key) for row in group} for key in options}
        if len(options) != 2 or not all(map(_can_be_drawn, set().union(*values.values()))):
            continue
        x, y = sorted(options, key=lambda key: -len(values[key]))  # an image is wider than high
        cells: dict[Point, Cell] = defaultdict(Cell)
        for row in group:
            cell, accuracy = cells[row.options[x], row.options[y]], row.metrics.get(VAL, -1)
            if row.state == "completed" and 0 <= accuracy <= 1:
                cell.accuracies.setdefault(row.options.get("seed"), accuracy)
            else:
                cell.states.append("no accuracy" if row.state == "completed" else row.state)
        found = Map(parent, (options[x], options[y]), dict(cells))
        if len(cells) >= MIN_POINTS and found.seeds:
            maps.append(found)
    return maps


def _can_be_drawn(value: Any) -> bool:
    return is_number(value) and abs(value) < MAX_VALUE


def draw_maps(rows: Sequence[Row]) -> Iterator[tuple[Path, bytes]]:
    """Yields the file and the content of the image of each map."""
    for found in find_maps(rows):
        yield found.parent / "heatmap.png", to_png(draw_grid(found) if found.is_grid else draw_points(found))


def draw_grid(found: Map) -> Figure:
    """Returns cells with their accuracies, the best framed; those without one are hatched and say why."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    xs, ys = found.sides
    width, height = (min(side, most / len(values)) for side, most, values in zip(CELL, MAX_SIZE, (xs, ys), strict=True))
    figure = Figure((max(width * len(xs) + 2, 6), height * len(ys) + 1.5), layout="constrained")
    axes = figure.subplots()
    means = [[found.cells.get((x, y), Cell()).mean for x in xs] for y in ys]
    norm, colors = _norm(found), colormaps[COLORS]
    figure.colorbar(axes.imshow(means, cmap=colors, norm=norm, origin="lower", aspect="auto"), ax=axes)
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            cell = found.cells.get((x, y), Cell(states=["missing"]))
            corner = column - 0.5, row - 0.5
            if not cell.accuracies:
                axes.add_patch(Rectangle(corner, 1, 1, **HATCHED))
                text, color = "\n".join(dict.fromkeys(cell.states)), "black"
            else:
                fewer = len(cell.accuracies) < found.seeds[-1]
                text = f"{cell.mean:.2f}" + (f"\nn = {len(cell.accuracies)}" if fewer else "")
                color = _readable_on(colors(float(norm(cell.mean))))
            if (x, y) in found.best:
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=3, zorder=3))
            _write(axes, (column, row), text, color, (72 * width, 72 * height))
    for axis, values, size in ((axes.xaxis, xs, width), (axes.yaxis, ys, height)):
        step = math.ceil(LINE / (72 * size))
        axis.set_ticks(range(0, len(values), step), [_label(value) for value in values[::step]])
    if max(len(_label(x)) for x in xs) * 7 > 72 * width:
        axes.tick_params(axis="x", labelrotation=90)
    _name(axes, found, "; framed: the best")
    return figure


def draw_points(found: Map) -> Figure:
    """Returns points in the colour of their accuracies, the best encircled; those without one are crosses."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure((8, 5), layout="constrained")
    axes = figure.subplots()
    scored = {point: cell.mean for point, cell in found.cells.items() if cell.accuracies}
    others: dict[str, list[Point]] = defaultdict(list)
    for point, cell in found.cells.items():
        if not cell.accuracies:
            others[cell.states[0]].append(point)
    colors = {"c": list(scored.values()), "cmap": COLORS, "norm": _norm(found)}
    figure.colorbar(_scatter(axes, [*scored], s=50, edgecolors="grey", linewidths=0.5, **colors), ax=axes)
    label = f"best: {scored[found.best[0]]:.2f} %"
    _scatter(axes, found.best, s=200, facecolors="none", edgecolors="red", linewidths=2, label=label)
    for marker, (state, points) in zip(MARKERS, others.items(), strict=False):
        _scatter(axes, points, c="grey", marker=marker, label=state)
    figure.legend(loc="outside right upper", fontsize="small")
    for name, axis, values in zip("xy", (axes.xaxis, axes.yaxis), found.sides, strict=True):
        if values[0] > 0 and values[-1] > 10 * values[0]:
            axes.set(**{f"{name}scale": "log"})
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if values[-1] < 1000 * values[0] else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    _name(axes, found)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def _scatter(axes: Axes, points: Sequence[Point], **style: Any) -> PathCollection:
    return axes.scatter([x for x, _ in points], [y for _, y in points], **style)


def _norm(found: Map) -> Normalize:
    from matplotlib.colors import Normalize

    means = [cell.mean for cell in found.cells.values() if cell.accuracies]
    return Normalize(min(means), max(means))


def _name(axes: Axes, found: Map, more: str = "") -> None:
    axes.set_title(found.title + more, loc="left", fontsize="medium", parse_math=False)  # a "$" is a dollar
    for axis, header in zip((axes.xaxis, axes.yaxis), found.headers, strict=True):
        axis.set_label_text(fit(header, MAX_LABEL), parse_math=False)


def _write(axes: Axes, where: tuple[int, int], text: str, color: str, size: tuple[float, float]) -> None:
    """Writes into a cell of a size in points, as large as it fits."""
    lines = text.split("\n")
    font = min(9.0, size[0] / (0.65 * max(map(len, lines))), size[1] / (1.3 * len(lines)))
    if font >= MIN_FONT:
        axes.text(*where, text, ha="center", va="center", fontsize=font, color=color)


def _readable_on(color: Sequence[float]) -> str:
    """Returns black or white, whichever has more contrast to a colour (the luminance of WCAG 2, section 1.4.3)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color[:3]]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if luminance > 0.179 else "white"


def _label(value: float) -> str:
    written = json.dumps(value)
    return written if len(written) <= 8 else f"{value:.4g}"

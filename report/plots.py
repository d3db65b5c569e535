"""metrics.jsonl -> images: the curves of each run, and the runs beside each other.

Matplotlib is imported where a figure is made: it takes longer than the table. Only its objects are used, not pyplot,
so no display is needed and no global state is left behind.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report.collect import Row, is_number
from report.tables import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]  # of one epoch: epoch, learning_rate, and the metrics under train and val
Points = list[tuple[float, float]]  # (epoch, value)

MAX_LABELS = 12  # runs of a comparison that are told apart; more colours than that are not
COLORS = [f"C{number}" for number in range(10) if number != 7]  # without the grey
MAX_TITLE, MAX_LABEL = 70, 45  # characters that fit


def read_journals(rows: Sequence[Row]) -> tuple[dict[str, list[Record]], list[str]]:
    """Reads the metrics.jsonl of every row.

    Returns:
        The records of each run that has some, by its path, and a line for each journal that is broken or missed.
    """
    journals: dict[str, list[Record]] = {}
    problems = []
    for row in rows:
        path = Path(row.path, "metrics.jsonl")
        try:
            if path.is_file():
                journals[row.path] = read_journal(path)
            elif row.metrics:  # it has trained
                problems.append(f"{path}: is not there, so there are no curves")
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}; there are no curves")
    return {path: records for path, records in journals.items() if records}, problems


def read_journal(path: Path) -> list[Record]:
    """Reads one record per epoch; a last line that is still being written is left out.

    Raises:
        OSError: The file cannot be read.
        ValueError: Another line is no record.
    """
    records: list[Record] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if records and not line.endswith(b"\n"):
                break
            raise ValueError(f"line {number} is not JSON") from None
        if not isinstance(record, dict) or not is_number(record.get("epoch")):
            raise ValueError(f"line {number} has no epoch")
        records.append(record)
    return records


def draw_plots(journals: Mapping[str, Sequence[Record]], parent_dir: Path) -> Iterator[tuple[Path, bytes]]:
    """Yields the file and the content of each image: curves.png per run, comparison.png of several."""
    for path, records in journals.items():
        yield Path(path, "curves.png"), to_png(draw_curves(path, records))
    runs = {
        str(Path(path).relative_to(parent_dir)): points(records, "val", "accuracy")
        for path, records in journals.items()
    }
    runs = {path: accuracies for path, accuracies in runs.items() if accuracies}
    if len(runs) > 1:
        yield parent_dir / "comparison.png", to_png(draw_comparison(str(parent_dir), runs))


def points(records: Sequence[Record], *keys: str) -> Points:
    """Returns (epoch, value) where the value that stands under `keys` is a number."""
    found = []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if is_number(value):
            found.append((record["epoch"], value))
    return found


def best_of(accuracies: Points) -> tuple[float, float]:
    """Returns (epoch, accuracy) of the best epoch: the first of equals, as a run keeps its best weights."""
    return max(accuracies, key=lambda point: point[1])


def draw_curves(title: str, records: Sequence[Record]) -> Figure:
    """Returns loss, accuracy and learning rate of a run over its epochs, with its best epoch marked."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.6), layout="constrained")
    figure.suptitle(fit(title, MAX_TITLE), parse_math=False)  # a "$" is a dollar
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, label in ((loss, "loss"), (accuracy, "accuracy (%)"), (rate, "learning rate, end of epoch")):
        _name_axes(axes, label)
    for split, color in (("train", "C0"), ("val", "C1")):
        _plot(loss, points(records, split, "loss"), label=split, color=color)
        for metric, suffix, style in (("accuracy", "", "-"), ("accuracy_top5", " top-5", "--")):
            line = points(records, split, metric)
            _plot(accuracy, _percent(line), label=f"{split}{suffix}", color=color, linestyle=style)
    _plot(rate, points(records, "learning_rate"), color="C2")
    rate.set_ylim(bottom=0)
    if accuracies := points(records, "val", "accuracy"):
        epoch, value = best_of(accuracies)
        for axes in (loss, accuracy, rate):
            axes.axvline(epoch, color="grey", linestyle=":")
        label = f"best val: {100 * value:.2f} % at epoch {epoch:g}"
        accuracy.plot([epoch], [100 * value], "k*", label=label)
    for axes in (loss, accuracy):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize="small")
    return figure


def draw_comparison(title: str, runs: Mapping[str, Points]) -> Figure:
    """Returns the validation accuracy of all runs over epochs; the best ones are named, best first."""
    from matplotlib.figure import Figure

    figure = Figure((11, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(fit(title, MAX_TITLE), loc="left", parse_math=False)
    _name_axes(axes, "val accuracy (%)")
    ranked = sorted(runs.items(), key=lambda run: (-best_of(run[1])[1], run[0]))
    for rank, (path, accuracies) in enumerate(ranked):
        dashes, color = divmod(rank, len(COLORS))
        style = {"color": COLORS[color], "linestyle": "--" if dashes else "-", "zorder": 3 - rank / MAX_LABELS}
        # The number comes first: matplotlib hides a label that begins with "_".
        label = f"{100 * best_of(accuracies)[1]:.2f} %  {fit(path, MAX_LABEL)}"
        if rank >= MAX_LABELS:
            style = {"color": "lightgrey", "linewidth": 0.8, "zorder": 1}
            label = f"{len(ranked) - MAX_LABELS} more" if rank == MAX_LABELS else ""
        _plot(axes, _percent(accuracies), label=label, **style)
    legend = figure.legend(loc="outside right upper", fontsize="small", title="best epoch, run")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def to_png(figure: Figure) -> bytes:
    """Returns the same bytes for the same figure: no date, no version. A palette halves the size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font lacks is shown as boxes
        canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    png = io.BytesIO()
    image.convert("RGB").quantize(256).save(png, "png")
    return png.getvalue()


def fit(text: str, length: int) -> str:
    """Returns printable text; of what is too long, the end, where directories differ."""
    text = one_line(text)
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _name_axes(axes: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _plot(axes: Axes, line: Points, **style: Any) -> None:
    if line:  # what a run does not have is not in the legend either
        axes.plot(*zip(*line, strict=True), marker="." if len(line) <= 30 else "", **style)


def _percent(line: Points) -> Points:
    return [(epoch, 100 * value) for epoch, value in line]

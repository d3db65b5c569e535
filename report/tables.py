"""Rows -> a data frame of plain values -> Markdown for people, CSV for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from report.collect import STATES, Row

if TYPE_CHECKING:
    import pandas as pd  # at run time only where a table is made: it takes as long to import as 1,000 rows to read

# Options of how a run is computed, not of what: no columns.
HOW = {"compile", "teacher.cache", "teacher.cache_dir", "teacher.max_gb"}
MAX_CELL = 100  # characters: one long list would pad every line of the table


@dataclass(frozen=True)
class Metric:
    """A column of numbers: its header and the key in `Row.metrics`."""

    header: str
    key: str
    sign: int = -1  # sorts the largest first; 1 the smallest
    digits: int = 4
    always: bool = True  # the column stands there even when no row has the number


METRICS = {
    "val_accuracy": Metric("val accuracy (best)", "val_best.accuracy"),
    # Not the loss that was minimised: that is another function in every other row.
    "val_loss": Metric("val loss (best)", "val_best.cross_entropy", sign=1),
    "epoch": Metric("epoch (best)", "val_best.epoch", sign=1, digits=0),
    "val_accuracy_last": Metric("val accuracy (last)", "val_last.accuracy"),
    "test_accuracy": Metric("test accuracy", "test_best.accuracy", always=False),
    "test_top5": Metric("test top-5 accuracy", "test_best.accuracy_top5", always=False),
    "test_accuracy_last": Metric("test accuracy (last)", "test_last.accuracy", always=False),
}
DIGITS = {metric.header: metric.digits for metric in METRICS.values()}


def sort_rows(rows: Sequence[Row], by: str = "val_accuracy") -> list[Row]:
    """Returns the rows best first by a name in `METRICS`; those without the number come last, ties by path.

    Pruned runs stand below all others that have the number: theirs is of an early epoch.
    """
    key, sign = METRICS[by].key, METRICS[by].sign

    def rank(row: Row) -> tuple[bool, bool, float, str]:
        return key not in row.metrics, row.state == "pruned", sign * row.metrics.get(key, 0), row.path

    return sorted(rows, key=rank)


def differing_options(rows: Sequence[Row]) -> dict[str, str]:
    """Returns the chosen options that are not the same in all rows: dotted key -> header, as short as is unique."""
    known = [row.options for row in rows if row.options]  # a params.json that cannot be read differs in nothing
    chosen = {key for row in rows for key in row.written} - HOW
    keys = [key for key in sorted(chosen) if len({options.get(key) for options in known}) > 1]
    uses = Counter(map(_short, keys)) + Counter([*DIGITS, "experiment", "status"])
    return {key: short if uses[short := _short(key)] == 1 else key for key in keys}


def _short(key: str) -> str:
    """Returns the option's own name; what identifies a section goes by the section's."""
    section, _, option = key.rpartition(".")
    return section if option in ("name", "model_dir") and section else option


def create_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line per row, in their order: numbers as they are, None where there is none."""
    import pandas as pd

    options = differing_options(rows)
    metrics = [m for m in METRICS.values() if m.always or any(m.key in row.metrics for row in rows)]
    lines = [
        [row.path, *map(row.options.get, options), *(row.metrics.get(m.key) for m in metrics), row.status]
        for row in rows
    ]
    headers = ["experiment", *options.values(), *(m.header for m in metrics), "status"]
    return pd.DataFrame(lines, columns=headers, dtype=object)  # object: whole numbers stay whole beside a None


def to_markdown(frame: pd.DataFrame) -> str:
    """Returns a Markdown table; the best validation accuracy is bold, in every row that has it.

    A pruned run, which its status tells, is best only where all that have an accuracy are pruned.
    """
    from tabulate import tabulate

    columns, align = [], []
    pruned = [str(status).startswith("pruned") for status in frame.get("status", [""] * len(frame))]
    for header, values in frame.items():
        texts = [_cell(value, str(header)) for value in values]
        if header == METRICS["val_accuracy"].header:
            scored = [pair for pair in zip(values, pruned, strict=True) if isinstance(pair[0], int | float)]
            best = min(scored, key=lambda pair: (pair[1], -pair[0]), default=None)
            marks = [pair == best for pair in zip(values, pruned, strict=True)]
            texts = [f"**{text}**" if mark else text for text, mark in zip(texts, marks, strict=True)]
        columns.append(texts)
        align.append("left" if any(isinstance(value, str) for value in values) else "right")
    headers = [_cell(header, "") for header in frame.columns]
    return tabulate(list(zip(*columns, strict=True)), headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def _cell(value: Any, header: str) -> str:
    if header in DIGITS and isinstance(value, int | float):
        value = f"{value:.{DIGITS[header]}f}"
    text = "" if value is None else one_line(str(value))
    if len(text) > MAX_CELL and header != "experiment":
        text = text[: MAX_CELL - 1] + "…"
    return text.replace("\\", "\\\\").replace("|", "\\|")


def one_line(text: str) -> str:
    """Returns text that moves no cursor, ends no line and can be encoded: a directory's name may hold anything."""
    return text if text.isprintable() else "".join(char if char.isprintable() else " " for char in text)


def to_csv(frame: pd.DataFrame) -> str:
    """Returns CSV with full precision; text that a spreadsheet would take for a formula begins with an apostrophe."""
    import pandas as pd

    def inert(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        text = one_line(value)
        return f"'{text}" if text.lstrip().startswith(tuple("=+-@")) else text

    # Not frame.map: it would make 28 beside a None a 28.0.
    lines = [[inert(value) for value in line] for line in frame.itertuples(index=False, name=None)]
    safe = pd.DataFrame(lines, columns=[*map(inert, frame.columns)], dtype=object)
    return safe.to_csv(index=False, lineterminator="\n")


def summary(rows: Sequence[Row]) -> str:
    """Returns how many experiments there are, and of which state: `3 experiments: 2 completed, 1 failed`."""
    count = Counter(row.state for row in rows)
    states = ", ".join(f"{count[state]} {state}" for state in (*STATES, "unreadable") if count[state])
    return f"{len(rows)} experiment{'s' if len(rows) > 1 else ''}: {states}"

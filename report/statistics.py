"""Rows that differ in nothing but the seed -> a table of means over seeds, each with its spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from report.collect import Row
from report.tables import METRICS, Metric, differing_options, to_markdown

VAL, TEST, VAL_LAST = METRICS["val_accuracy"], METRICS["test_accuracy"], METRICS["val_accuracy_last"]


@dataclass(frozen=True)
class Group:
    """At least two completed runs with a val accuracy, each of another seed, all other options the same."""

    rows: list[Row]  # by seed
    planned: int  # seeds, those included whose runs are not completed or have no val accuracy

    @cached_property
    def mean(self) -> float:
        return statistics.mean(_accuracies(self.rows, VAL))

    @cached_property
    def deviation(self) -> float:
        return statistics.stdev(_accuracies(self.rows, VAL))


def find_groups(rows: Sequence[Row]) -> list[Group]:
    """Returns the groups, that of the best mean val accuracy first, ties by path.

    Of completed runs with the same seed only the first by path counts: a repeat is no sample of the spread over seeds.
    """
    scored: dict[frozenset[Any], dict[Any, Row]] = {}  # options -> seed -> row
    others: dict[frozenset[Any], set[Any]] = {}  # chosen options -> seeds
    for row in sorted(rows, key=lambda row: row.path):
        if "seed" not in row.options:  # which it was is not known
            continue
        if row.state == "completed" and _accuracies([row], VAL):
            scored.setdefault(_but_seed(row.options), {}).setdefault(row.options["seed"], row)
        else:  # before a run the defaults are not known: such rows belong together by what was chosen
            others.setdefault(_but_seed(_chosen(row)), set()).add(row.options["seed"])
    groups = []
    for by_seed in scored.values():
        if len(by_seed) > 1:
            seeds = sorted(by_seed, key=lambda seed: (isinstance(seed, str), seed))
            chosen = {_but_seed(_chosen(row)) for row in by_seed.values()}
            planned = set(by_seed).union(*(others.get(options, set()) for options in chosen))
            groups.append(Group([by_seed[seed] for seed in seeds], len(planned)))
    return sorted(groups, key=lambda group: -group.mean)


def _chosen(row: Row) -> dict[str, Any]:
    return {key: row.options[key] for key in row.written if key in row.options}


def _but_seed(options: Mapping[str, Any]) -> frozenset[Any]:
    return frozenset(options.items() - {("seed", options.get("seed"))})


def _accuracies(rows: Sequence[Row], metric: Metric) -> list[float]:
    """Returns the accuracies of the rows that have one; a number outside [0, 1] is none."""
    return [value for row in rows if 0 <= (value := row.metrics.get(metric.key, -1)) <= 1]


def average_seeds(rows: Sequence[Row]) -> list[str]:
    """Returns the paragraphs about the means over seeds, a Markdown table among them; none if there is no group."""
    import pandas as pd

    groups = find_groups(rows)
    if not groups:
        return []
    members = [row for group in groups for row in group.rows]
    options = {key: header for key, header in differing_options(members).items() if key != "seed"}
    metrics = [metric for metric in (VAL, TEST, VAL_LAST) if metric.always or _accuracies(members, metric)]
    lines = []
    for group in groups:
        chosen = map(group.rows[0].options.get, options)
        count = len(group.rows)
        n = count if count == group.planned else f"{count} of {group.planned}"
        seeds = ", ".join(str(row.options["seed"]) for row in group.rows)
        best, *rest = (_mean(group.rows, metric) for metric in metrics)
        lines.append([*chosen, n, seeds, f"**{best}**" if group.mean == groups[0].mean else best, *rest])
    headers = [*options.values(), "n", "seeds", *(metric.header for metric in metrics)]
    paragraphs = [
        "means ± sample standard deviations over seeds, of completed runs that differ in nothing else, each seed once:",
        to_markdown(pd.DataFrame(lines, columns=headers, dtype=object)),
    ]
    planned = sum(group.planned for group in groups)
    if missing := planned - len(members):
        paragraphs.append(f"not completed yet or without val accuracy, so not in n: {missing} of these {planned} runs")
    if len(groups) > 1:
        gap, spread = groups[0].mean - groups[1].mean, max(group.deviation for group in groups[:2])
        if gap < spread:
            figures = f"{gap:.4f} against a standard deviation of {spread:.4f}"
            paragraphs.append(f"the two best differ by less than the spread over seeds: {figures}")
    return paragraphs


def _mean(rows: Sequence[Row], metric: Metric) -> str:
    """Returns `mean ± sample standard deviation`, with n if that is not the number of rows."""
    values = _accuracies(rows, metric)
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}" + ("" if len(values) == len(rows) else f" (n = {len(values)})")

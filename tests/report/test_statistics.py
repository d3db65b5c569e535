from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from report.collect import STATES, Row
from report.statistics import average_seeds, find_groups

KEYS = {"val": "val_best.accuracy", "test": "test_best.accuracy", "last": "val_last.accuracy"}


def row(path: str, seed: Any, val: float | None = None, state: str = "completed", **others: Any) -> Row:
    """Returns a row; `test` and `last` are accuracies, the keyword loss__alpha stands for the option loss.alpha."""
    numbers = {"val": val, "test": others.pop("test", None), "last": others.pop("last", None)}
    metrics = {KEYS[name]: value for name, value in numbers.items() if value is not None}
    options = {"seed": seed} | {key.replace("__", "."): value for key, value in others.items()}
    return Row(path, state, state, options, list(options), metrics, [])


def cells(rows: list[Row]) -> list[list[str]]:
    """Returns the cells of the Markdown table, its header first."""
    _, table, *_ = average_seeds(rows)
    lines = table.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


def notes(rows: list[Row]) -> list[str]:
    """Returns the lines below the table."""
    return average_seeds(rows)[2:]


# Means 0.82 and 0.72; the squared deviations sum to 0.0008 of three and 0.0008 of two: sqrt(0.0004), sqrt(0.0008).
GOOD = [row(f"a{seed}", seed, val, loss__alpha=0.5) for seed, val in ((0, 0.80), (1, 0.82), (2, 0.84))]
POOR = [row(f"b{seed}", seed, val, loss__alpha=0.9) for seed, val in ((0, 0.70), (7, 0.74))]


def test_a_group_is_a_row_with_mean_and_sample_standard_deviation_best_first() -> None:
    assert cells([*POOR, *GOOD]) == [
        ["alpha", "n", "seeds", "val accuracy (best)", "val accuracy (last)"],
        ["0.5", "3", "0, 1, 2", "**0.8200 ± 0.0200**", ""],
        ["0.9", "2", "0, 7", "0.7200 ± 0.0283", ""],
    ]


def test_a_title_says_what_the_numbers_are_and_no_more_is_said_of_clear_results() -> None:
    title, _, *rest = average_seeds([*POOR, *GOOD])
    assert title.startswith("means ± sample standard deviations over seeds")
    assert rest == []


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = [*GOOD, *POOR]
    assert {"\n".join(average_seeds(list(order))) for order in permutations(rows)} == {"\n".join(average_seeds(rows))}


def test_seeds_are_sorted_as_numbers() -> None:
    assert cells([row("a", 10, 0.5), row("b", 9, 0.5), row("c", 100, 0.5)])[1][:2] == ["3", "9, 10, 100"]


def test_the_last_accuracy_has_its_own_mean() -> None:
    rows = [row("a", 0, 0.8, last=0.5), row("b", 1, 0.9, last=0.52)]
    assert cells(rows)[1][-2:] == ["**0.8500 ± 0.0707**", "0.5100 ± 0.0141"]


def test_the_test_accuracy_stands_there_if_a_run_has_it_with_its_own_n_if_not_all_have() -> None:
    none = [row("a", 0, 0.8), row("b", 1, 0.8), row("c", 2, 0.8)]
    assert cells(none)[0] == ["n", "seeds", "val accuracy (best)", "val accuracy (last)"]
    one = [*none[:2], row("c", 2, 0.8, test=0.76)]
    assert [line[3] for line in cells(one)] == ["test accuracy", "0.7600 (n = 1)"]
    two = [row("a", 0, 0.8, test=0.72), *one[1:]]
    assert cells(two)[1][3] == "0.7400 ± 0.0283 (n = 2)"
    three = [two[0], row("b", 1, 0.8, test=0.74), two[2]]
    assert cells(three)[1][3] == "0.7400 ± 0.0200"


def test_every_group_with_the_best_mean_is_bold_and_ties_go_by_path() -> None:
    rows = [row("z", 0, 0.5, x=1), row("y", 1, 0.75, x=1), row("a", 0, 0.75, x=2), row("b", 1, 0.5, x=2)]
    rows += [row("c", 0, 0.5, x=3), row("d", 1, 0.5, x=3)]
    assert [line[:1] + line[3:4] for line in cells(rows)[1:]] == [
        ["2", "**0.6250 ± 0.1768**"],
        ["1", "**0.6250 ± 0.1768**"],
        ["3", "0.5000 ± 0.0000"],
    ]


# what belongs together


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("a", 0, 0.8)],
        [row("a", 0, 0.8, x=1), row("b", 1, 0.8, x=2)],
        [row("a", 0, 0.8, x=1), row("b", 1, 0.8)],
        [row("a", 0, 0.8, teacher__model_dir="t/seed_0"), row("b", 1, 0.8, teacher__model_dir="t/seed_1")],
        [row("a", 0, 0.8), row("b", 0, 0.9)],
        [row("a", 0, 0.8), row("b", 1)],
        [row("a", 0, test=0.8, last=0.8), row("b", 1, test=0.8, last=0.8)],
    ],
    ids=["none", "one", "option", "absent option", "teacher", "same seed", "one without accuracy", "no val accuracy"],
)
def test_without_two_seeds_of_the_same_options_there_is_nothing(rows: list[Row]) -> None:
    assert average_seeds(rows) == []


def test_a_default_that_nobody_wrote_separates_but_is_no_column() -> None:
    rows = [row(f"{decay}{seed}", seed, 0.5, decay=decay) for decay in (0, 1) for seed in (0, 1)]
    for each in rows:
        each.written = ["seed"]
    assert [line[:2] for line in cells(rows)] == [["n", "seeds"], ["2", "0, 1"], ["2", "0, 1"]]


def test_what_one_wrote_and_another_left_at_its_default_is_the_same() -> None:
    rows = [row("a", 0, 0.5, decay=0), row("b", 1, 0.5, decay=0)]
    rows[1].written = ["seed"]
    assert len(find_groups(rows)) == 1


def test_options_that_differ_only_from_rows_of_no_group_are_no_columns() -> None:
    assert cells([*GOOD, *POOR, row("c", 0, 0.9, net="big")])[0][:2] == ["alpha", "n"]


def test_of_runs_with_the_same_seed_the_first_by_path_counts() -> None:
    rows = [row("b", 0, 0.9), row("c", 1, 0.8), row("a", 0, 0.7), row("0", 0, None), row("1", 0, 0.1, "failed")]
    assert cells(rows)[1] == ["2", "0, 1", "**0.7500 ± 0.0707**", ""]
    assert notes(rows) == []


# what does not count


@pytest.mark.parametrize("state", [*(state for state in STATES if state != "completed"), "unreadable"])
def test_only_completed_runs_count_and_the_others_are_numbered(state: str) -> None:
    rows = [*GOOD, *POOR, *(row(f"c{seed}", seed, 0.1, state, loss__alpha=0.5) for seed in (3, 4))]
    assert [line[1:4] for line in cells(rows)[1:]] == [
        ["3 of 5", "0, 1, 2", "**0.8200 ± 0.0200**"],
        ["2", "0, 7", "0.7200 ± 0.0283"],
    ]
    assert notes(rows) == ["not completed yet or without val accuracy, so not in n: 2 of these 7 runs"]


def test_a_pruned_run_is_in_no_mean() -> None:
    pruned = row("c", 3, 0.99, "pruned", loss__alpha=0.5)
    assert cells([*GOOD, pruned])[1] == ["3 of 4", "0, 1, 2", "**0.8200 ± 0.0200**", ""]
    assert average_seeds([GOOD[0], pruned]) == []


def test_a_completed_run_without_val_accuracy_is_numbered_too() -> None:
    assert cells([*GOOD, row("c", 3, None, loss__alpha=0.5)])[1][0] == "3 of 4"


def test_a_run_that_has_not_completed_belongs_to_the_group_with_the_same_choices() -> None:
    rows = [row(f"a{seed}", seed, 0.5, alpha=0.5, default=1) for seed in (0, 1)]
    running = row("b", 2, None, "running", alpha=0.5, default=1)
    for each in [*rows, running]:
        each.written = ["seed", "alpha"]
    assert cells([*rows, running])[1][0] == "2 of 3"
    assert cells([*rows, row("c", 2, None, "pending", alpha=0.5)])[1][0] == "2 of 3"
    for other in (row("c", 2, None, "pending"), row("c", 2, None, "pending", alpha=0.5, default=2)):
        assert cells([*rows, other])[1][0] == "2"


# how far apart the best two are


def pair(path: str, low: float, high: float) -> list[Row]:
    return [row(f"{path}{seed}", seed, val, x=path) for seed, val in ((0, low), (1, high))]


def test_the_two_best_are_said_to_be_within_the_spread_by_the_larger_deviation() -> None:
    # Means 0.80 and 0.79; deviations 0.02 / sqrt(2) and 0: more and less than the 0.01 between them.
    line = "the two best differ by less than the spread over seeds: 0.0100 against a standard deviation of 0.0141"
    wide, narrow = pair("a", 0.79, 0.81), pair("b", 0.79, 0.79)
    assert notes([*wide, *narrow]) == [line]
    assert notes([*pair("a", 0.80, 0.80), *pair("b", 0.78, 0.80)]) == [line]
    assert notes([*pair("a", 0.80, 0.80), *narrow]) == []
    assert notes(wide) == []


def test_the_spread_of_a_third_group_does_not_matter() -> None:
    assert notes([*pair("a", 0.80, 0.80), *pair("b", 0.79, 0.79), *pair("c", 0.1, 0.9)]) == []


# what is wrong with it


@pytest.mark.parametrize("number", [-0.1, 1.1, 1.7e308, -1.7e308, 10**300])
def test_a_number_that_is_no_accuracy_is_none(number: float) -> None:
    rows = [row("a", 0, 0, test=number, last=0.5), row("b", 1, 1, test=0.5, last=number), row("c", 2, number)]
    assert cells(rows)[1] == ["2 of 3", "0, 1", "**0.5000 ± 0.7071**", "0.5000 (n = 1)", "0.5000 (n = 1)"]


def test_a_run_whose_seed_is_not_known_is_in_no_group() -> None:
    rows = [row("a", 0, 0.5), row("b", 1, 0.5), row("c", 2, 0.5), row("d", 3, None, "pending")]
    for each in rows[2:]:
        each.options = {}
    assert cells(rows)[1][:2] == ["2", "0, 1"]


def test_seeds_and_options_of_any_kind_stay_in_their_cells() -> None:
    rows = [row(f"{seed}{x}", seed, 0.5, x=x) for seed in ("a|b\n", 2, 1.5) for x in ("p|q", "[1]")]
    _, table, *_ = average_seeds(rows)
    assert len(table.splitlines()) == 4
    assert r"1.5, 2, a\|b" in table
    assert r"p\|q" in table

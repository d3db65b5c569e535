from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from report.collect import Row
from report.tables import METRICS, create_frame, differing_options, sort_rows, summary, to_csv, to_markdown


def row(path: str, accuracy: float | None = None, status: str = "completed", **options: Any) -> Row:
    """Returns a row; the keyword loss__alpha stands for the option loss.alpha."""
    dotted = {key.replace("__", "."): value for key, value in options.items()}
    metrics = {} if accuracy is None else {"val_best.accuracy": accuracy, "val_best.epoch": 28}
    return Row(path, status.partition(" ")[0].strip(":"), status, dotted, list(dotted), metrics, [])


def cells(rows: list[Row]) -> list[list[str]]:
    """Returns the cells of the Markdown table, its header first."""
    lines = to_markdown(create_frame(rows)).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


def read_csv(rows: list[Row]) -> list[list[str]]:
    return list(csv.reader(io.StringIO(to_csv(create_frame(rows)))))


def test_a_table_has_path_options_metrics_and_status() -> None:
    header, first, second = cells([row("e/a", 0.84488, seed=1), row("e/b", None, "pending", seed=2)])
    metrics = ["val accuracy (best)", "val loss (best)", "epoch (best)", "val accuracy (last)"]
    assert header == ["experiment", "seed", *metrics, "status"]
    assert first == ["e/a", "1", "**0.8449**", "", "28", "", "completed"]
    assert second == ["e/b", "2", "", "", "", "", "pending"]


def test_the_test_columns_stand_there_only_when_a_row_has_them() -> None:
    tested = row("b", 0.8)
    tested.metrics["test_best.accuracy"] = 0.79
    assert "test accuracy" not in cells([row("a", 0.8)])[0]
    header, first, second = cells([row("a", 0.8), tested])
    assert (header[5], first[5], second[5]) == ("test accuracy", "", "0.7900")
    assert "test accuracy (last)" not in header


def test_every_best_value_is_bold_and_no_other() -> None:
    assert [line[1] for line in cells([row("a", 0.9), row("b", 0.8), row("c", 0.9)])[1:]] == [
        "**0.9000**",
        "0.8000",
        "**0.9000**",
    ]


def test_a_pruned_run_is_shown_with_its_accuracy_and_is_not_the_best() -> None:
    rows = [row("a", 0.9, "pruned at epoch 1 of 30"), row("b", 0.8), row("c", 0.7)]
    assert [line[1] for line in cells(rows)[1:]] == ["0.9000", "**0.8000**", "0.7000"]
    assert cells(rows)[1][-1] == "pruned at epoch 1 of 30"
    assert [r.path for r in sort_rows([*rows, row("d")])] == ["b", "c", "a", "d"]


def test_of_pruned_runs_alone_one_is_the_best() -> None:
    rows = [row("a", 0.7, "pruned at epoch 1 of 30"), row("b", 0.8, "pruned at epoch 1 of 30"), row("c")]
    assert [line[1] for line in cells(rows)[1:]] == ["0.7000", "**0.8000**", ""]


def test_without_any_accuracy_nothing_is_bold() -> None:
    assert "**" not in to_markdown(create_frame([row("a"), row("b")]))


def test_rows_are_sorted_by_accuracy_then_path_and_those_without_come_last() -> None:
    rows = [row("z"), row("y"), row("c", 0.8), row("b", 0.9), row("a", 0.8), row("0", 0.0)]
    assert [r.path for r in sort_rows(rows)] == ["b", "a", "c", "0", "y", "z"]


def test_a_loss_is_sorted_smallest_first() -> None:
    rows = [row("a"), row("b"), row("c")]
    rows[0].metrics["val_best.cross_entropy"], rows[1].metrics["val_best.cross_entropy"] = 0.7, 0.5
    assert [r.path for r in sort_rows(rows, "val_loss")] == ["b", "a", "c"]


@pytest.mark.parametrize("name", METRICS)
def test_rows_can_be_sorted_by_every_metric(name: str) -> None:
    assert [r.path for r in sort_rows([row("b"), row("a", 0.5)], name)] in (["a", "b"], ["b", "a"])


# options


def test_an_option_is_shown_if_it_differs_or_is_absent_somewhere() -> None:
    rows = [row("a", seed=1, loss__alpha=0.5, loss__name="kd"), row("b", seed=1, loss__alpha=0.9, loss__name="kd")]
    assert differing_options(rows) == {"loss.alpha": "alpha"}
    rows.append(row("c", seed=1, loss__name="ce"))
    assert differing_options(rows) == {"loss.alpha": "alpha", "loss.name": "loss"}
    assert [line[1] for line in cells(rows)[1:]] == ["0.5", "0.9", ""]


def test_a_default_that_nobody_wrote_is_not_shown_and_one_that_somebody_wrote_is_shown_everywhere() -> None:
    rows = [row("a", decay=0.1), row("b", decay=0.0)]
    rows[0].written = rows[1].written = []
    assert differing_options(rows) == {}
    rows[0].written = ["decay"]
    assert [line[1] for line in cells(rows)] == ["decay", "0.1", "0.0"]


def test_headers_are_short_where_that_is_unique() -> None:
    rows = [row("a", loss__weight=2, student__weight=1, loss__alpha=1), row("b")]
    assert [*differing_options([*rows, row("c", seed=1)]).values()] == [
        "alpha",
        "loss.weight",
        "seed",
        "student.weight",
    ]


def test_what_identifies_a_section_goes_by_the_sections_name() -> None:
    rows = [row("a", loss__name="kd", student__name="cnn", teacher__model_dir="t"), row("b", seed=1)]
    assert [*differing_options(rows).values()] == ["loss", "seed", "student", "teacher"]


def test_an_option_called_status_keeps_its_dotted_key() -> None:
    rows = [row("a", loss__status=1, **{"val accuracy (best)": "text"}), row("b", 0.5, loss__status=2)]
    assert cells(rows)[0][1:3] == ["loss.status", "val accuracy (best)"]
    assert read_csv(rows)[1][2] == "text"


def test_an_option_called_like_a_metric_is_no_metric() -> None:
    rows = [row("a", 0.5, **{"val accuracy (best)": "text"}), row("b", 0.6, **{"val accuracy (best)": 1})]
    assert [line[2] for line in cells(rows)[1:]] == ["0.5000", "**0.6000**"]
    assert cells(rows)[1][1] == "text"


def test_a_row_whose_params_cannot_be_read_makes_nothing_differ() -> None:
    assert differing_options([row("a", seed=1), row("b", None, "unreadable: x")]) == {}


def test_one_experiment_has_no_differing_options() -> None:
    assert differing_options([row("a", seed=1)]) == {}


# text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("a\\|b", r"a\\\|b"),
        ("two\nlines\r\nmore", "two lines  more"),
        ("\x1b[31mred", " [31mred"),
        ("not\udcffutf8", "not utf8"),
        ("long" * 100, "long" * 24 + "lon…"),
        ("\N{GREEK SMALL LETTER ALPHA}", "\N{GREEK SMALL LETTER ALPHA}"),
    ],
)
def test_text_stays_in_its_markdown_cell(text: str, shown: str) -> None:
    lines = to_markdown(create_frame([row("a", None, "pending", x=text), row("b", None, "pending", x=1)])).splitlines()
    assert len(lines) == 4
    assert f"| {shown.strip()} " in lines[2]


def test_a_long_path_is_not_cut_and_a_header_is_escaped() -> None:
    table = to_markdown(create_frame([row("x" * 300, **{"a|b\n": 1}), row("b", seed=1)]))
    assert "x" * 300 in table
    assert r"a\|b" in table.splitlines()[0]


@pytest.mark.parametrize("text", ["=cmd()", "+1", "-1", "@SUM(A1)", "\t=1", "  =1"])
def test_text_that_looks_like_a_formula_is_inert_in_csv(text: str) -> None:
    header, first, _ = read_csv([row(text, None, text, **{text: text}), row("b", **{text: 1})])
    assert header[1] == first[0] == first[1] == first[-1] == f"'{text.replace(chr(9), chr(32))}"


def test_numbers_in_csv_are_exact_unmarked_and_no_formulas() -> None:
    _, first, second = read_csv([row("a", 1 / 3, x=-1e-5), row("b", x=2)])
    assert first == ["a", "-1e-05", "0.3333333333333333", "", "28", "", "completed"]
    assert second == ["b", "2", "", "", "", "", "completed"]


def test_text_with_commas_and_quotes_survives_csv_and_newlines_end_no_line() -> None:
    assert read_csv([row('a,"b"\r\nc'), row("b")])[1][0] == 'a,"b"  c'


def test_a_summary_counts_every_state() -> None:
    rows = [row("a"), row("b"), row("c", None, "failed at epoch 3"), row("d", None, "unreadable: x")]
    assert summary(rows) == "4 experiments: 2 completed, 1 failed, 1 unreadable"
    assert summary(rows[:1]) == "1 experiment: 1 completed"


def test_how_a_run_is_computed_is_no_column() -> None:
    rows = [row("a", teacher__cache="lazy", teacher__top_k=3), row("b", teacher__cache="off", compile="on")]
    assert list(differing_options(rows)) == ["teacher.top_k"]

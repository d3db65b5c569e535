from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from PIL import Image

from report.collect import Row
from report.plots import Points, best_of, draw_comparison, draw_curves, draw_plots, points, read_journals, to_png

# Three epochs as train.py writes them; the second and third are equally good on val.
RECORDS: list[dict[str, Any]] = [
    {
        "epoch": epoch,
        "learning_rate": rate,
        "train": {"accuracy": train, "loss": 3 - epoch / 2},
        "val": {"accuracy": val, "accuracy_top5": 0.9 + epoch / 100, "loss": 4 - epoch / 2},
    }
    for epoch, rate, train, val in [(1, 0.1, 0.25, 0.5), (2, 0.05, 0.5, 0.625), (3, 0.01, 0.75, 0.625)]
]


def row(path: Path, trained: bool = True) -> Row:
    return Row(str(path), "completed", "completed", {}, [], {"val_best.accuracy": 0.5} if trained else {}, [])


def write(folder: Path, content: bytes) -> Row:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(content)
    return row(folder)


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def curve(axes: Any, label: str) -> Points:
    """Returns the points of a line by its label."""
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return list(zip(*line.get_data(), strict=True))


def entries(legend: Any) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


# metrics.jsonl


def test_every_run_with_a_journal_is_read(tmp_path: Path) -> None:
    rows = [write(tmp_path / "a", lines(*RECORDS)), write(tmp_path / "b", lines(*RECORDS[:1]))]
    assert read_journals(rows) == ({rows[0].path: RECORDS, rows[1].path: RECORDS[:1]}, [])


def test_a_last_line_that_is_being_written_is_left_out_wherever_it_breaks_off(tmp_path: Path) -> None:
    whole, last = lines(*RECORDS[:2]), lines(RECORDS[2])
    for length in range(len(last) - 1):  # without the line's end it is whole, too
        journals, problems = read_journals([write(tmp_path, whole + last[:length])])
        assert (journals[str(tmp_path)], problems) == (RECORDS[:2], [])
    assert read_journals([write(tmp_path, whole + last[:-1])]) == ({str(tmp_path): RECORDS}, [])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{\n" + lines(*RECORDS), "line 1 is not JSON"),
        (lines(RECORDS[0]) + b"\x00\xff\n", "line 2 is not JSON"),
        (b'{"epoch": 1', "line 1 is not JSON"),
        (b"[" * 100_000 + b"\n", "line 1 is not JSON"),
        (lines(RECORDS[0], [2]), "line 2 has no epoch"),
        (lines(RECORDS[0], {"val": {}}), "line 2 has no epoch"),
        (lines({"epoch": "1"}), "line 1 has no epoch"),
    ],
)
def test_a_broken_journal_is_told_and_stops_no_other(tmp_path: Path, content: bytes, fault: str) -> None:
    bad, good = write(tmp_path / "bad", content), write(tmp_path / "good", lines(*RECORDS))
    journals, problems = read_journals([bad, good])
    assert list(journals) == [good.path]
    assert problems == [f"{bad.path}/metrics.jsonl: {fault}; there are no curves"]


def test_a_missing_journal_is_told_of_a_run_that_has_trained_and_of_no_other(tmp_path: Path) -> None:
    assert read_journals([row(tmp_path, trained=False)]) == ({}, [])
    journals, (problem,) = read_journals([row(tmp_path)])
    assert journals == {}
    assert problem.startswith(f"{tmp_path}/metrics.jsonl: is not there")


def test_before_the_first_epoch_there_is_nothing_to_draw_and_nothing_wrong(tmp_path: Path) -> None:
    assert read_journals([write(tmp_path, b"")]) == ({}, [])


def test_what_is_no_number_is_no_point() -> None:
    values: list[Any] = [{"loss": 1.5}, {"loss": None}, {"loss": "2"}, {}, None, 3, {"loss": float("inf")}, {"loss": 2}]
    records = [{"epoch": number, "val": value} for number, value in enumerate(values)]
    assert points(records, "val", "loss") == [(0, 1.5), (7, 2)]


# curves


def test_the_axes_say_what_they_show() -> None:
    figure = draw_curves("experiments/a", RECORDS)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy (%)", "learning rate, end of epoch"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    assert figure.get_suptitle() == "experiments/a"


def test_the_curves_are_those_of_the_journal_accuracies_in_percent() -> None:
    loss, accuracy, rate = draw_curves("a", RECORDS).axes
    assert curve(loss, "train") == [(1, 2.5), (2, 2), (3, 1.5)]
    assert curve(loss, "val") == [(1, 3.5), (2, 3), (3, 2.5)]
    assert curve(accuracy, "train") == [(1, 25), (2, 50), (3, 75)]
    assert curve(accuracy, "val") == [(1, 50), (2, 62.5), (3, 62.5)]
    assert curve(accuracy, "val top-5") == [(1, pytest.approx(91)), (2, pytest.approx(92)), (3, pytest.approx(93))]
    assert list(zip(*rate.get_lines()[0].get_data(), strict=True)) == [(1, 0.1), (2, 0.05), (3, 0.01)]
    assert rate.get_ylim()[0] == 0


def test_the_best_epoch_is_marked_in_every_panel() -> None:
    loss, accuracy, rate = draw_curves("a", RECORDS).axes
    assert curve(accuracy, "best val: 62.50 % at epoch 2") == [(2, 62.5)]
    for axes in (loss, accuracy, rate):
        assert [2, 2] in [list(line.get_xdata()) for line in axes.get_lines() if line.get_linestyle() == ":"]


def test_of_equally_good_epochs_the_first_is_the_best_as_for_the_weights_that_are_kept() -> None:
    assert best_of([(1, 0.5), (2, 0.75), (3, 0.75), (4, 0.6)]) == (2, 0.75)


def test_the_legend_has_only_what_the_run_has() -> None:
    records = [{"epoch": 1, "val": {"accuracy": 0.5}}, {"epoch": 2, "val": {"accuracy": 0.25}}]
    loss, accuracy, _ = draw_curves("a", records).axes
    assert loss.get_legend() is None
    assert entries(accuracy.get_legend()) == ["val", "best val: 50.00 % at epoch 1"]
    full = draw_curves("a", RECORDS).axes
    assert entries(full[0].get_legend()) == ["train", "val"]
    assert entries(full[1].get_legend()) == ["train", "val", "val top-5", "best val: 62.50 % at epoch 2"]


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1], [{"epoch": 1}]], ids=["three", "one", "empty"])
def test_epochs_are_whole_numbers_on_the_axis(records: list[dict[str, Any]]) -> None:
    figure = draw_curves("a", records)
    to_png(figure)
    for axes in figure.axes:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


# the comparison


def runs(number: int) -> dict[str, Points]:
    """Returns runs of which r0 is the worst; the best epoch of each is its second."""
    return {f"r{index}": [(1, 0.1), (2, 0.5 + index / 100), (3, 0.2)] for index in range(number)}


def test_the_comparison_has_every_run_best_first() -> None:
    figure = draw_comparison("experiments", runs(3) | {"q": [(1, 0.52)]})
    (axes,) = figure.axes
    labels = ["52.00 %  q", "52.00 %  r2", "51.00 %  r1", "50.00 %  r0"]
    assert entries(figure.legends[0]) == labels
    assert curve(axes, labels[3]) == [(1, 10), (2, 50), (3, 20)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "val accuracy (%)")
    assert axes.get_title(loc="left") == "experiments"


def test_of_many_runs_twelve_are_named_each_in_its_own_style_and_all_are_shown() -> None:
    figure = draw_comparison("experiments", runs(40))
    (axes,) = figure.axes
    labels = entries(figure.legends[0])
    assert labels == [*(f"{89 - rank}.00 %  r{39 - rank}" for rank in range(12)), "28 more"]
    assert len(axes.get_lines()) == 40
    named = [line for line in axes.get_lines() if line.get_label() in labels[:12]]
    assert len({(line.get_color(), line.get_linestyle()) for line in named}) == 12
    assert {line.get_color() for line in axes.get_lines() if line not in named} == {"lightgrey"}


# files


def journals(*paths: str) -> dict[str, Any]:
    return dict.fromkeys(paths, RECORDS)


def test_each_run_has_its_image_and_several_have_one_together() -> None:
    parent = Path("experiments")
    files = dict(draw_plots(journals("experiments", "experiments/a/b"), parent))
    assert [str(path) for path in files] == [
        "experiments/curves.png",
        "experiments/a/b/curves.png",
        "experiments/comparison.png",
    ]
    assert [str(path) for path, _ in draw_plots(journals("experiments/a"), parent)] == ["experiments/a/curves.png"]
    assert list(draw_plots({}, parent)) == []


def test_runs_without_an_accuracy_are_not_compared() -> None:
    records = {**journals("a"), "b": [{"epoch": 1, "train": {"loss": 1}}]}
    assert [str(path) for path, _ in draw_plots(records, Path())] == ["a/curves.png", "b/curves.png"]


def test_the_same_journal_gives_the_same_bytes_and_no_more_than_pixels() -> None:
    first, again = (dict(draw_plots(journals("a", "b"), Path())) for _ in range(2))
    assert first == again
    for content in first.values():
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.info) == ("PNG", {})
            assert image.width >= 1000
            colors = [color for _, color in image.convert("RGB").getcolors(256) or []]
            assert any(blue - red > 100 for red, _, blue in colors)
            assert any(red - blue > 100 for red, _, blue in colors)


def test_long_and_many_runs_are_small_files() -> None:
    noise = random.Random(0)

    def learning(final: float) -> list[float]:
        return [final * epoch / (epoch + 5) + noise.gauss(0, 0.01) for epoch in range(1, 201)]

    records = [
        {
            "epoch": epoch,
            "learning_rate": 0.1 / epoch,
            "train": {"accuracy": train, "loss": 1 - train},
            "val": {"accuracy": val, "loss": 1 - val},
        }
        for epoch, (train, val) in enumerate(zip(learning(0.9), learning(0.8), strict=True), 1)
    ]
    assert len(to_png(draw_curves("a", records))) < 100_000
    many = {f"r{index}": [*enumerate(learning(0.7 + index / 200), 1)] for index in range(40)}
    assert len(to_png(draw_comparison("a", many))) < 100_000


@pytest.mark.parametrize("name", [r"$\frac{1$", "_hidden", "日本\U0001f600", "new\nline\udcff", "x" * 300, "a^b_c"])
def test_every_name_of_a_directory_can_be_drawn(name: str) -> None:
    assert to_png(draw_curves(name, RECORDS))
    figure = draw_comparison(name, {name: [(1, 0.5)], "other": [(1, 0.25)]})
    assert to_png(figure)
    assert len(entries(figure.legends[0])) == 2


def test_a_long_name_keeps_its_end_where_directories_differ() -> None:
    title = draw_curves("experiments/" + 20 * "group/" + "alpha_0.9", RECORDS).get_suptitle()
    assert title.startswith("…")
    assert title.endswith("/alpha_0.9")
    assert len(title) <= 80


def test_matplotlib_is_loaded_to_draw_only_and_pyplot_never() -> None:
    code = (
        "import sys, report.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.to_png(plots.draw_curves('a', [{'epoch': 1}]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

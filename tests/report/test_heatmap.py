from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from PIL import Image

from report.collect import STATES, Row
from report.heatmap import _readable_on, draw_grid, draw_maps, draw_points, find_maps
from report.plots import to_png

ALPHAS, TEMPERATURES = [0.5, 0.9], [1.0, 4.0, 20.0]


def row(name: str, accuracy: float | None, state: str = "completed", seed: Any = 1, **options: Any) -> Row:
    """Returns a row of `e/name`; the keyword loss__alpha stands for the option loss.alpha."""
    dotted = {"seed": seed} | {key.replace("__", "."): value for key, value in options.items()}
    metrics = {} if accuracy is None else {"val_best.accuracy": accuracy}
    return Row(f"e/{name}", state, state, dotted, list(dotted), metrics, [])


def run(alpha: float, temperature: float, accuracy: float | None, state: str = "completed", seed: Any = 1) -> Row:
    name = f"alpha_{alpha}_Temp_{temperature}_seed_{seed}"
    return row(name, accuracy, state, seed, loss__alpha=alpha, loss__temperature=temperature)


def grid(seed: int = 1, more: float = 0.0) -> list[Row]:
    """Returns 2 x 3 runs with accuracies 0.50, 0.51, ..., of which the last, alpha 0.9 and T 20, is the best."""
    points = itertools.product(ALPHAS, TEMPERATURES)
    return [run(*point, 0.5 + number / 100 + more, seed=seed) for number, point in enumerate(points)]


def replaced(rows: list[Row], *others: Row) -> list[Row]:
    paths = {other.path for other in others}
    return [*(row for row in rows if row.path not in paths), *others]


def texts(axes: Any) -> dict[tuple[float, float], str]:
    """Returns what is written, by column and row from the lower left."""
    return {text.get_position(): text.get_text() for text in axes.texts}


def boxes(axes: Any, hatched: bool) -> list[tuple[float, float]]:
    """Returns the cells that are hatched, or framed."""
    patches = [patch for patch in axes.patches if bool(patch.get_hatch()) == hatched]
    assert all((patch.get_width(), patch.get_height()) == (1, 1) for patch in patches)
    return sorted((patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in patches)


def axes_of(rows: list[Row]) -> Any:
    (found,) = find_maps(rows)
    assert found.is_grid
    return draw_grid(found).axes[0]


# which directories have a map


def test_runs_that_differ_in_two_numbers_are_a_map_whatever_their_seeds() -> None:
    (found,) = find_maps([*grid(1), *grid(2)])
    assert (found.parent, found.headers) == (Path("e"), ("temperature", "alpha"))
    assert found.sides == (TEMPERATURES, ALPHAS)
    assert set(found.cells) == set(itertools.product(TEMPERATURES, ALPHAS))


@pytest.mark.parametrize(
    "odd",
    [
        row("x", 0.5, loss__alpha=0.5, loss__temperature=1.0, optimizer__learning_rate=0.1),
        row("x", 0.5, loss__alpha=0.5),
        row("x", 0.5, loss__alpha="high", loss__temperature=1.0),
        row("x", 0.5, loss__alpha="true", loss__temperature=1.0),
    ],
    ids=["a third option", "one is missing", "text", "true"],
)
def test_runs_that_differ_in_anything_else_are_none(odd: Row) -> None:
    assert len(find_maps(grid())) == 1
    assert find_maps([*grid(), odd]) == []


def test_runs_that_differ_in_three_numbers_are_none() -> None:
    rows = grid()
    for number, one in enumerate(rows):
        one.options["num_epochs"] = number
        one.written.append("num_epochs")
    assert find_maps(rows) == []


def test_one_option_two_points_or_no_completed_run_are_none() -> None:
    assert find_maps([run(0.5, temperature, 0.5) for temperature in TEMPERATURES]) == []
    assert find_maps([run(0.5, 1.0, 0.5), run(0.9, 4.0, 0.5)]) == []
    assert find_maps([run(*point, 0.5, "running") for point in itertools.product(ALPHAS, TEMPERATURES)]) == []
    assert find_maps([]) == []


def test_every_directory_has_its_own() -> None:
    others = grid()
    for other in others:
        other.path = other.path.replace("e/", "e/deeper/")
    stray = row("stray", 0.5, optimizer__name="sgd")
    stray.path = "stray"
    assert [found.parent for found in find_maps([*grid(), stray, *others])] == [Path("e"), Path("e/deeper")]


def test_a_row_whose_params_cannot_be_read_is_in_no_cell() -> None:
    lost = Row("e/lost", "unreadable", "unreadable: params.json", {}, [], {"val_best.accuracy": 1.0}, [])
    assert list(texts(axes_of([*grid(), lost])).values()) == texts_of_grid()


def texts_of_grid() -> list[str]:
    return ["50.00", "51.00", "52.00", "53.00", "54.00", "55.00"]


# the cells


def test_values_ascend_and_each_cell_has_its_accuracy_in_percent() -> None:
    axes = axes_of(grid()[::-1])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1.0", "4.0", "20.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.5", "0.9"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("temperature", "alpha")
    places = [(column, line) for line in range(2) for column in range(3)]
    assert texts(axes) == dict(zip(places, texts_of_grid(), strict=True))
    assert axes.get_ylim() == (-0.5, 1.5)  # upwards
    (image,) = axes.images
    assert image.get_array().ravel().tolist() == pytest.approx([50, 51, 52, 53, 54, 55])
    assert image.get_clim() == pytest.approx((50, 55))


def test_a_cell_is_the_mean_over_seeds_each_once() -> None:
    rows = [*grid(1), *grid(2, more=0.02), *grid(3, more=0.1)]
    repeat = run(0.5, 1.0, 0.9, seed=3)
    repeat.path = "e/z"
    axes = axes_of([*rows, repeat])
    assert texts(axes)[0, 0] == "54.00"  # 50, 52, 60
    assert axes.get_title(loc="left") == "e\nval accuracy (best) in %, n = 3 seeds; framed: the best"


def test_of_runs_that_are_not_completed_only_the_state_is_shown() -> None:
    states = [state for state in STATES if state != "completed"]
    assert len(states) == 6
    points = list(itertools.product([2.0, 3.0], [5.0, 6.0, 7.0]))
    rows = [run(*point, 0.99, state) for point, state in zip(points, states, strict=True)]
    axes = axes_of([*grid(), *rows, run(2.0, 1.0, None), run(3.0, 1.0, 1.5)])
    written = texts(axes)
    assert sorted(written.values())[: len(texts_of_grid())] == texts_of_grid()
    assert {*states, "missing", "no accuracy"} == {*written.values()} - {*texts_of_grid()}
    empty = [place for place, text in written.items() if text not in texts_of_grid()]
    assert boxes(axes, hatched=True) == sorted(empty)
    assert len(written) == 4 * 6
    assert boxes(axes, hatched=False) == [(2 + 3, 1)]  # of alpha 0.9 the largest T
    assert axes.images[0].get_clim() == pytest.approx((50, 55))


def test_a_pruned_seed_does_not_hide_the_others_and_is_not_in_their_mean() -> None:
    rows = replaced([*grid(1), *grid(2)], run(0.5, 1.0, 0.99, "pruned", seed=2))
    axes = axes_of(rows)
    assert texts(axes)[0, 0] == "50.00\nn = 1"
    assert "n = 1 to 2 seeds" in axes.get_title(loc="left")
    assert boxes(axes, hatched=True) == []


def test_two_states_of_one_cell_are_both_said() -> None:
    rows = replaced([*grid(1), *grid(2)], *(run(0.5, 1.0, None, s, n) for n, s in ((1, "failed"), (2, "stale"))))
    assert texts(axes_of([*rows, run(0.5, 1.0, None, "failed", 3)]))[0, 0] == "failed\nstale"


def test_the_best_is_framed_among_those_with_all_seeds_and_equals_all_are() -> None:
    assert boxes(axes_of(grid()), hatched=False) == [(2, 1)]
    first = run(0.5, 1.0, 0.99)
    assert boxes(axes_of(replaced(grid(), first)), hatched=False) == [(0, 0)]
    others = [row for row in grid(2) if row.path != run(0.5, 1.0, None, seed=2).path]
    assert boxes(axes_of([*replaced(grid(), first), *others]), hatched=False) == [(2, 1)]
    equal = [run(*point, 0.5) for point in itertools.product(ALPHAS, TEMPERATURES)]
    assert len(boxes(axes_of(equal), hatched=False)) == 6


def test_labels_are_as_written_and_log_spaced_values_have_equal_cells() -> None:
    rates = [1e-05, 0.001, 0.1, 1]
    rows = [
        row(f"{size}_{rate}", 0.5, dataset__batch_size=size, optimizer__learning_rate=rate)
        for size in (64, 128)
        for rate in rates
    ]
    axes = axes_of(rows)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-05", "0.001", "0.1", "1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["64", "128"]
    assert list(axes.get_xticks()) == [0, 1, 2, 3]


def test_a_number_can_be_read_on_every_color() -> None:
    def luminance(parts: tuple[float, ...]) -> float:  # WCAG 2.2, "relative luminance"
        linear = [part / 12.92 if part <= 0.04045 else math.pow((part + 0.055) / 1.055, 2.4) for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for color in itertools.product([step / 7 for step in range(8)], repeat=3):
        ink = {"black": 0.0, "white": 1.0}[_readable_on((*color, 1.0))]
        low, high = sorted((ink, luminance(color)))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # level AA


# points


def random_search() -> list[Row]:
    """Returns 12 runs, no two with an option in common: T over more than a decade, alpha over less."""
    rows = [run(0.2 + number / 20, 1.5**number, 0.5 + number / 100) for number in range(12)]
    rows[3].state, rows[4].state = "pruned", "failed"
    del rows[4].metrics["val_best.accuracy"]
    return rows


def test_where_most_combinations_are_missing_runs_are_points() -> None:
    (found,) = find_maps(random_search())
    assert not found.is_grid
    axes = draw_points(found).axes[0]
    scored, best, *others = axes.collections
    (x, y) = found.headers
    assert (axes.get_xlabel(), axes.get_ylabel()) == (x, y)
    assert {x, y} == {"alpha", "temperature"}
    assert (axes.get_xscale(), axes.get_yscale()) == (("linear", "log") if x == "alpha" else ("log", "linear"))
    values = {"alpha": [0.2 + number / 20 for number in range(12)], "temperature": [1.5**n for n in range(12)]}
    points = list(zip(values[x], values[y], strict=True))
    colors = dict(zip(map(tuple, scored.get_offsets().tolist()), scored.get_array().tolist(), strict=True))
    done = [number for number in range(12) if number not in (3, 4)]
    assert colors == pytest.approx({points[number]: 50 + number for number in done})
    assert best.get_offsets().tolist() == [list(points[11])]
    assert best.get_label() == "best: 61.00 %"
    assert {other.get_label(): tuple(*other.get_offsets().tolist()) for other in others} == {
        "pruned": points[3],
        "failed": points[4],
    }
    assert axes.get_title(loc="left") == "e\nval accuracy (best) in %, n = 1 seed"


def test_a_range_that_reaches_zero_has_no_logarithm() -> None:
    rows = [run(number / 12, number - 1.0, 0.5 + number / 100) for number in range(12)]
    (found,) = find_maps(rows)
    axes = draw_points(found).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")


def test_more_than_half_of_the_combinations_are_a_grid() -> None:
    points = [(0.5, 1.0), (0.5, 2.0), (0.9, 2.0), (0.9, 3.0)]
    assert find_maps([run(*point, 0.5) for point in points])[0].is_grid
    assert not find_maps([run(*point, 0.5) for point in points if point != (0.9, 2.0)])[0].is_grid


# files


def test_the_image_stands_beside_the_runs() -> None:
    assert [str(path) for path, _ in draw_maps([*grid(), *grid(2)])] == ["e/heatmap.png"]
    assert list(draw_maps(grid()[:2])) == []


@pytest.mark.parametrize("rows", [grid(), random_search()], ids=["grid", "points"])
def test_the_same_runs_give_the_same_bytes_in_any_order(rows: list[Row]) -> None:
    ((_, first),) = draw_maps(rows)
    ((_, again),) = draw_maps(rows[::-1])
    assert first == again
    with Image.open(io.BytesIO(first)) as image:
        assert (image.format, image.info) == ("PNG", {})
        assert 500 <= image.width <= 2000


@pytest.mark.parametrize("name", [r"$\frac{1$", "_hidden", "日本\U0001f600", "new\nline\udcff", "x" * 300, "a^b_c"])
def test_every_name_can_be_drawn(name: str) -> None:
    for rows in (grid(), random_search()):
        for one in rows:
            one.path = f"{name}/{one.path}"
            one.options = {key.replace("alpha", name): value for key, value in one.options.items()}
            one.written = list(one.options)
        ((_, content),) = draw_maps(rows)
        assert content.startswith(b"\x89PNG")


@pytest.mark.parametrize("extreme", [5e-324, -1e99, 10**300])
def test_every_number_can_be_drawn(extreme: float) -> None:
    for rows in (grid(), random_search()):
        for key in ("loss.alpha", "loss.temperature"):
            rows[0].options[key] = extreme
        for found in find_maps(rows):
            assert to_png(draw_grid(found))
            assert to_png(draw_points(found))


def test_many_values_are_a_small_image_without_numbers_too_small_to_read() -> None:
    rows = [run(x / 100, y / 3, (x + y) / 200) for x in range(100) for y in range(60)]
    (found,) = find_maps(rows)
    figure = draw_grid(found)
    assert texts(figure.axes[0]) == {}
    width, height = figure.get_size_inches()
    assert (width <= 18.5, height <= 14) == (True, True)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert 40 <= len(labels) <= 100


def test_matplotlib_is_loaded_to_draw_only_and_pyplot_never() -> None:
    code = (
        "import sys, report.heatmap as heatmap\n"
        "assert not list(heatmap.draw_maps([]))\n"
        "assert 'matplotlib' not in sys.modules and 'numpy' not in sys.modules\n"
        "cell = heatmap.Cell({1: 0.5})\n"
        "found = heatmap.Map(heatmap.Path('e'), ('x', 'y'), {(1, 1): cell, (2, 2): cell, (1, 2): cell})\n"
        "heatmap.to_png(heatmap.draw_grid(found))\n"
        "heatmap.to_png(heatmap.draw_points(found))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

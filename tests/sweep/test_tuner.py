"""Claims about the tuner: which points it chooses, which runs it ends, and what its journal survives."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import resource
import statistics
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from sweep.space import Objective, Point, Pruner, Range, Search, Strategy, Values, grid
from sweep.tuner import Asked, Tuner
from utils import RunError

SPACE = {
    "loss.name": Values(("kd", "ce", "dkd")),
    "loss.alpha": Range(0.0, 1.0, when={"loss.name": ["kd", "dkd"]}),
    "loss.temperature": Range(1, 20, log=True, when={"loss.name": ["kd"]}),
    "optimizer.learning_rate": Range(1e-4, 0.1, log=True),
    "optimizer.momentum": Range(0.5, 0.95, step=0.1),
}
LINE = Search({"x": Range(0.0, 1.0)}, max_trials=20)  # the simplest space
TPE = Strategy("tpe", startup_trials=4)
RANDOM = Strategy("random")
MEDIAN = Pruner("median", startup_trials=2)


def make(strategy: Strategy = RANDOM, **changes: Any) -> Search:
    return replace(Search(SPACE, strategy=strategy, max_trials=12), **changes)


@contextmanager
def tuner_of(parent: Path, search: Search, num_epochs: int = 4, force: bool = False) -> Iterator[Tuner]:
    parent.mkdir(exist_ok=True)
    with closing(Tuner(parent, search, num_epochs, force=force)) as tuner:
        yield tuner


def score(point: Point) -> float:
    """A result that follows from the point, with an optimum that random search finds slowly."""
    away = abs(math.log10(point.get("optimizer.learning_rate", 0.01) / 0.01)) + abs(point.get("x", 0.7) - 0.7)
    return point.get("loss.alpha", 0.0) - away


def curve(point: Point, epoch: int) -> float:
    return score(point) * epoch / 4 - 0.1 * math.sin(epoch + 50 * score(point))


def train(tuner: Tuner, asked: Asked, pruner: str = "none") -> None:
    """Does what a coordinator does with a run: reports its whole journal if that may end it, and tells its end."""
    for epoch in range(1, 5 if pruner != "none" else 0):
        if tuner.report(asked.number, epoch, curve(asked.point, epoch)):
            return tuner.tell(asked.number, "pruned")
    return tuner.tell(asked.number, "completed", score(asked.point))


def finish(parent: Path, search: Search) -> list[Asked]:
    """Runs a search to its end, one run at a time; goes on where an earlier call was killed."""
    with tuner_of(parent, search) as tuner:
        for asked in tuner.asked:
            if asked.state == "open":
                train(tuner, asked, search.pruner.name)
        while (new := tuner.ask()) is not None:
            train(tuner, new, search.pruner.name)
        return tuner.asked


def points(asked: list[Asked]) -> list[Point]:
    assert [one.number for one in asked] == list(range(len(asked)))
    return [one.point for one in asked]


def read(parent: Path) -> optuna.Study:
    """Returns what Optuna itself reads in the journal: its newest study."""
    backend = optuna.storages.journal.JournalFileBackend(str(parent / "optuna.journal"))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name=optuna.get_all_study_names(storage)[-1], storage=storage)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, so nothing has to reach the disk."""
    monkeypatch.setattr("os.fsync", lambda _: None)


# --- the sequence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 3, 12])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_gives_the_same_points_whatever_the_jobs_the_results_and_their_order(
    tmp_path: Path, jobs: int, seed: int
) -> None:
    expected = points(finish(tmp_path / "a", make()))
    draw = random.Random(seed)
    with tuner_of(tmp_path / "b", make()) as tuner:
        running: list[int] = []
        while (new := tuner.ask()) is not None or running:
            running += [] if new is None else [new.number]
            if len(running) == jobs or new is None:
                number = running.pop(draw.randrange(len(running)))
                tuner.tell(number, *draw.choice([("completed", draw.random()), ("failed", None)]))
        assert points(tuner.asked) == expected


def test_random_gives_the_same_points_if_it_is_killed_after_every_one(tmp_path: Path) -> None:
    expected = points(finish(tmp_path / "a", make()))
    for _ in expected:
        with tuner_of(tmp_path / "b", make()) as tuner:
            tuner.ask()
    with tuner_of(tmp_path / "b", make()) as tuner:
        assert points(tuner.asked) == expected
        assert tuner.ask() is None


def test_the_first_points_do_not_depend_on_how_many_are_wanted(tmp_path: Path) -> None:
    few = points(finish(tmp_path, make(max_trials=5)))
    more = points(finish(tmp_path, make(max_trials=9)))
    assert len(few) == 5
    assert more == points(finish(tmp_path / "b", make(max_trials=9)))
    assert more[:5] == few


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_another_seed_gives_other_points(tmp_path: Path, name: str) -> None:
    one, other = (points(finish(tmp_path / str(seed), make(Strategy(name, seed)))) for seed in (1, 2))
    assert not [point for point in one if point in other]


def test_tpe_gives_the_same_points_if_it_is_killed_after_every_ask_and_every_tell(tmp_path: Path) -> None:
    expected = finish(tmp_path / "a", make(TPE))
    for _ in expected:
        with tuner_of(tmp_path / "b", make(TPE)) as tuner:
            tuner.ask()
        with tuner_of(tmp_path / "b", make(TPE)) as tuner:
            train(tuner, tuner.asked[-1])
    assert finish(tmp_path / "b", make(TPE)) == expected


@pytest.mark.parametrize("pruner", [MEDIAN, Pruner("hyperband")])
def test_tpe_with_a_pruner_goes_on_alike_whatever_line_of_its_journal_was_the_last(
    tmp_path: Path, pruner: Pruner
) -> None:
    search = make(TPE, pruner=pruner, max_trials=8)
    expected = finish(tmp_path / "a", search)
    lines = (tmp_path / "a/optuna.journal").read_bytes().splitlines(keepends=True)
    assert any(asked.state == "pruned" for asked in expected)
    for number in range(len(lines)):
        if b"completed_rung" in lines[number - 1] and b"pruned_at" in lines[number]:
            continue  # here Hyperband has compared, and its answer is not written yet: the run has another chance
        parent = tmp_path / str(number)
        parent.mkdir()
        (parent / "optuna.journal").write_bytes(b"".join(lines[:number]))
        assert finish(parent, search) == expected, f"after line {number}: {lines[number - 1]!r}"


def test_tpe_heeds_which_results_are_known_and_not_the_order_in_which_they_came(tmp_path: Path) -> None:
    following = set()
    for order in (range(8), reversed(range(8)), (3, 7, 0, 5, 1, 6, 2, 4)):
        with tuner_of(tmp_path / str(len(list(tmp_path.iterdir()))), make(TPE)) as tuner:
            asked = [tuner.ask() for _ in range(8)]
            for number in order:
                train(tuner, asked[number])
            following.add(json.dumps([tuner.ask().point for _ in range(4)]))
    assert len(following) == 1


def test_tpe_learns(tmp_path: Path) -> None:
    found = {}
    for name in ("random", "tpe"):
        last = [finish(tmp_path / f"{name}{seed}", make(Strategy(name, seed), max_trials=40))[20:] for seed in range(3)]
        found[name] = statistics.fmean(score(asked.point) for trials in last for asked in trials)
    assert found["tpe"] > found["random"] + 0.5


# --- the points -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_points_have_the_options_whose_conditions_hold_in_the_order_of_the_space(tmp_path: Path, name: str) -> None:
    shapes = {
        "kd": ["loss.name", "loss.alpha", "loss.temperature", "optimizer.learning_rate", "optimizer.momentum"],
        "dkd": ["loss.name", "loss.alpha", "optimizer.learning_rate", "optimizer.momentum"],
        "ce": ["loss.name", "optimizer.learning_rate", "optimizer.momentum"],
    }
    found = points(finish(tmp_path, make(Strategy(name, startup_trials=4), max_trials=30)))
    assert {point["loss.name"] for point in found} == set(shapes)
    for point in found:
        assert list(point) == shapes[point["loss.name"]]
        assert 0 <= point.get("loss.alpha", 0) <= 1
        assert type(point.get("loss.temperature", 1)) is int
        assert 1 <= point.get("loss.temperature", 1) <= 20
        assert 1e-4 <= point["optimizer.learning_rate"] <= 0.1
        assert point["optimizer.momentum"] in (0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_steps_are_those_of_the_grid_without_the_dust_of_sums(tmp_path: Path, name: str) -> None:
    space = {"a": Range(0.1, 0.75, step=0.1), "n": Range(2, 12, step=3)}
    found = points(finish(tmp_path, Search(space, strategy=Strategy(name, startup_trials=3), max_trials=28)))
    assert {point["a"] for point in found} == {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7}  # 0.1 + 2 * 0.1 is not 0.3
    assert {repr(point["n"]) for point in found} == {"2", "5", "8", "11"}


def test_random_draws_a_log_range_evenly_in_its_logarithm(tmp_path: Path) -> None:
    search = Search({"x": Range(1e-4, 1.0, log=True)}, strategy=RANDOM, max_trials=200)
    logs = [math.log10(point["x"]) for point in points(finish(tmp_path, search))]
    for low in range(-4, 0):
        assert 30 <= sum(low <= log < low + 1 for log in logs) <= 70  # 50 expected, standard deviation 6


def test_drawn_numbers_have_six_digits_stay_in_their_range_and_are_what_optuna_learns(tmp_path: Path) -> None:
    search = Search({"x": Range(0.12345612, 0.1234579)}, strategy=TPE, max_trials=4)
    with tuner_of(tmp_path, search) as tuner:
        found = [tuner.ask().point["x"] for _ in range(3)]
        assert sorted(found) == [0.12345612, 0.123457, 0.1234579]
        assert tuner.ask() is None  # there is no other number of six digits, and the ends themselves
    assert [trial.params["x"] for trial in read(tmp_path).trials] == found


def test_listed_values_come_back_as_they_are_though_optuna_confuses_some(tmp_path: Path) -> None:
    mixed = (1, True, None, "1", 0.5, [1, 2], {"name": "cnn", "depth": 2}, {"name": "cnn"})
    for name, listed in itertools.product(("random", "tpe"), (mixed, (0, False, 1, True))):
        search = Search({"student": Values(listed)}, strategy=Strategy(name, startup_trials=2), max_trials=20)
        parent = tmp_path / f"{name}{len(listed)}"
        found = [point["student"] for point in points(finish(parent, search))]
        assert sorted(map(repr, found)) == sorted(map(repr, listed))
        assert len({trial.params["student"] for trial in read(parent).trials}) == len(listed)
    plain = Search({"x": Values((1, 2.5, "a", None))}, strategy=RANDOM, max_trials=4)
    with tuner_of(tmp_path / "plain", plain) as tuner:
        assert len([tuner.ask() for _ in range(4)]) == 4
    assert {trial.params["x"] for trial in read(tmp_path / "plain").trials} == {1, 2.5, "a", None}


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_a_space_that_can_be_counted_is_asked_whole_each_point_once_and_without_those_excluded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweep.tuner.MAX_DRAWS", 1_000_000)  # it ends as soon as all points are asked
    space = {
        "a": Values((0.1, 0.5, 0.9)),
        "n": Range(1, 4),
        "m": Range(0.1, 0.3, step=0.1, when={"a": [0.5]}),
    }
    exclude = ({"a": 0.1, "n": 2}, {"m": 0.2})
    search = Search(space, exclude=exclude, strategy=Strategy(name, startup_trials=3), max_trials=100)
    stepped = replace(search, space={**space, "n": Range(1, 4, step=1)})
    found = points(finish(tmp_path, search))
    assert len(found) == 3 + 4 + 4 * 2
    assert sorted(found, key=json.dumps) == sorted(grid(stepped), key=json.dumps)


def test_a_rare_point_of_a_space_that_can_be_counted_is_found(tmp_path: Path) -> None:
    space = {"a": Range(1, 10), "b": Range(1, 10), "c": Range(1, 20)}
    rare = [{"a": a, "b": b} for a in range(1, 11) for b in range(1, 11) if (a, b) != (7, 7)]
    search = Search(space, exclude=tuple(rare), strategy=RANDOM, max_trials=100)
    found = points(finish(tmp_path, search))
    assert sorted(point["c"] for point in found) == list(range(1, 21))


def test_a_space_without_end_of_which_all_is_excluded_ends_the_search(tmp_path: Path) -> None:
    search = replace(make(), space={"a": Values((1, 2)), "x": Range(0.0, 1.0)}, exclude=({"a": 1}, {"a": 2}))
    assert finish(tmp_path, search) == []


def test_included_points_come_first_and_count(tmp_path: Path) -> None:
    include = ({"x": 0.25}, {"x": 3.0, "seed": 1}, {})
    for name in ("random", "tpe"):
        found = points(finish(tmp_path / name, replace(LINE, include=include, strategy=Strategy(name), max_trials=5)))
        assert found[:3] == list(include)
        assert len(found) == 5


def test_tpe_learns_from_included_points_in_the_space_and_overlooks_others(tmp_path: Path) -> None:
    """Told that the high ones are good, or the low ones, TPE goes there; told so of points elsewhere it does not."""
    near = tuple({"x": x / 8} for x in range(9))
    elsewhere = (*({**point, "seed": 1} for point in near[:6]), {"x": -1.0}, {"x": 2}, {})
    means = {}
    for kind, include in (("near", near), ("elsewhere", elsewhere)):
        for sign in (1, -1):
            search = replace(LINE, include=include, strategy=replace(TPE, startup_trials=5), max_trials=17)
            with tuner_of(tmp_path / f"{kind}{sign}", search) as tuner:
                for _ in include:
                    new = tuner.ask()
                    tuner.tell(new.number, "completed", sign * new.point.get("x", 0))
                means[kind, sign] = statistics.fmean(tuner.ask().point["x"] for _ in range(8))
    assert means["near", 1] > means["near", -1] + 0.2
    assert means["elsewhere", 1] == means["elsewhere", -1]


def test_a_point_elsewhere_does_not_end_joint_sampling(tmp_path: Path) -> None:
    """Good points lie on a diagonal, which only sampling of both options together can see."""
    space = {"x": Range(0.0, 1.0), "y": Range(0.0, 1.0)}
    diagonal = [{"x": x / 8, "y": x / 8} for x in range(9)]
    off = [{"x": x / 8, "y": y / 8} for x in range(9) for y in range(9) if x != y]
    search = Search(space, include=(*diagonal, *off, {"seed": 1}), strategy=TPE, max_trials=200)
    with tuner_of(tmp_path, search) as tuner:
        for _ in search.include:
            new = tuner.ask()
            tuner.tell(new.number, "completed", -abs(new.point.get("x", 0) - new.point.get("y", 0)))
        found = [tuner.ask().point for _ in range(20)]
    assert statistics.fmean(abs(point["x"] - point["y"]) for point in found) < 0.2  # of independent ones it is 0.33


def test_a_run_that_has_not_ended_counts_as_tried(tmp_path: Path) -> None:
    following = set()
    for x in (0.2, 0.7):
        include = (*({"x": x / 8} for x in range(9)), {"x": x})
        with tuner_of(tmp_path / str(x), replace(LINE, include=include, strategy=TPE)) as tuner:
            for _ in range(9):
                train(tuner, tuner.ask())
            tuner.ask()
            following.add(tuner.ask().point["x"])
    assert len(following) == 2


def test_a_grid_with_a_pruner_keeps_its_order_over_kills(tmp_path: Path) -> None:
    space = {"a": Values((0.1, 0.5)), "m": Range(0.1, 0.3, step=0.1)}
    search = Search(space, include=({"a": 0.5, "m": 0.2},), exclude=({"m": 0.3},), pruner=MEDIAN)
    for _ in range(4):
        with tuner_of(tmp_path, search) as tuner:
            train(tuner, tuner.ask(), "median")
    assert points(finish(tmp_path, search)) == grid(search)


# --- ending runs early ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["max", "min"])
def test_median_ends_a_run_whose_best_so_far_is_worse_than_the_median_of_the_completed(
    tmp_path: Path, mode: str
) -> None:
    pruner = Pruner("median", startup_trials=3, warmup_epochs=2)
    search = make(pruner=pruner, objective=Objective("val.loss", mode), max_trials=30)
    draw, sign = random.Random(0), 1 if mode == "max" else -1
    completed: list[list[float]] = []
    ended: list[int] = []
    with tuner_of(tmp_path, search, num_epochs=6) as tuner:
        while (new := tuner.ask()) is not None:
            values: list[float] = []
            for epoch in range(1, 7):
                values.append(sign * draw.gauss(0, 1))
                best = max(sign * value for value in values)
                others = [sign * other[epoch - 1] for other in completed]
                hopeless = len(others) >= 3 and 2 < epoch < 6 and best < statistics.median(others)
                assert tuner.report(new.number, epoch, values[-1]) == hopeless
                if hopeless:
                    tuner.tell(new.number, "pruned")
                    ended.append(epoch)
                    break
            else:
                completed.append(values)
                tuner.tell(new.number, "completed", values[-1])
    assert len(completed) > 5
    assert {3, 4} <= set(ended) <= {3, 4, 5}


def test_hyperband_lets_one_in_so_many_go_on_from_the_epoch_of_the_first_comparison(tmp_path: Path) -> None:
    """With 3 to 8 epochs and a factor of 3 there is one bracket, and the only comparison is after epoch 3."""
    search = make(pruner=Pruner("hyperband", min_epochs=3, reduction_factor=3), max_trials=20)
    draw = random.Random(0)
    at_three: list[float] = []
    with tuner_of(tmp_path, search, num_epochs=8) as tuner:
        for _ in range(20):
            new = tuner.ask()
            at_three.append(draw.random())
            good = sorted(at_three)[-max(1, len(at_three) // 3)]
            answers = [tuner.report(new.number, epoch, at_three[-1]) for epoch in range(1, 9)]
            assert answers == [False] * 2 + [at_three[-1] < good] * 6
            tuner.tell(new.number, "pruned" if answers[-1] else "completed", None if answers[-1] else 1.0)


def test_no_run_is_ended_in_its_last_epoch(tmp_path: Path) -> None:
    for pruner in (Pruner("median", startup_trials=0), Pruner("hyperband", reduction_factor=2)):
        with tuner_of(tmp_path / pruner.name, make(pruner=pruner), num_epochs=1) as tuner:
            for value in (5.0, 4.0, 3.0):
                assert not tuner.report(tuner.ask().number, 1, value)


def test_a_decision_stays_whoever_reads_the_run_again(tmp_path: Path) -> None:
    search = make(pruner=Pruner("median", startup_trials=1))
    with tuner_of(tmp_path, search) as tuner:
        good, bad = tuner.ask().number, tuner.ask().number
        assert not any(tuner.report(good, epoch, 1.0) for epoch in range(1, 5))
        assert not tuner.report(bad, 1, 0.0)  # nothing to compare with
        tuner.tell(good, "completed", 1.0)
        assert not tuner.report(bad, 1, 0.0)
        assert tuner.report(bad, 2, 0.5)
        assert tuner.report(bad, 3, 2.0)  # it ran on until it heard of it
    before = (tmp_path / "optuna.journal").read_bytes()
    with tuner_of(tmp_path, search) as tuner:
        values = (0.0, 0.5, 2.0, 2.0)
        assert [tuner.report(bad, *seen) for seen in enumerate(values, 1)] == [False, True, True, True]
        assert (tmp_path / "optuna.journal").read_bytes() == before
        tuner.tell(bad, "pruned")
        before = (tmp_path / "optuna.journal").read_bytes()
        assert [tuner.report(bad, *seen) for seen in enumerate(values, 1)] == [False, True, True, True]
        assert not any(tuner.report(good, epoch, 1) for epoch in range(1, 5))
        assert (tmp_path / "optuna.journal").read_bytes() == before
    trial = read(tmp_path).trials[bad]
    assert (trial.state.name, trial.intermediate_values) == ("PRUNED", {1: 0.0, 2: 0.5})


def test_a_decision_stays_when_the_result_is_another(tmp_path: Path) -> None:
    """A run that is to be ended fails, is run again, and hears of it late. The one comparison is after epoch 2."""
    with tuner_of(tmp_path, make(pruner=Pruner("hyperband", min_epochs=2))) as tuner:
        good, bad = tuner.ask().number, tuner.ask().number
        assert not any(tuner.report(good, epoch, 1.0) for epoch in range(1, 5))
        for state in ("failed", "pruned"):
            assert [tuner.report(bad, epoch, 0.0) for epoch in range(1, 5)] == [False, True, True, True]
            tuner.tell(bad, state)
            assert [tuner.report(bad, epoch, 0.0) for epoch in range(1, 5)] == [False, True, True, True]
            assert tuner.asked[bad].state == state
    assert [trial.system_attrs for trial in read(tmp_path).trials[bad:]] == [{"completed_rung_0": 0.0}] * 2


def test_fewer_epochs_than_the_first_comparison_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"pruner.min_epochs: 5 is above num_epochs, 4"):
        Tuner(tmp_path, make(pruner=Pruner("hyperband", min_epochs=5)), 4)


# --- results ----------------------------------------------------------------------------------------------


def test_results_are_in_the_journal_as_optuna_names_them_and_telling_again_changes_nothing(tmp_path: Path) -> None:
    told = [("completed", 0.5), ("pruned", None), ("failed", None)]
    with tuner_of(tmp_path, make()) as tuner:
        for state, value in told:
            tuner.tell(tuner.ask().number, state, value)
        tuner.ask()
    before = (tmp_path / "optuna.journal").read_bytes()
    with tuner_of(tmp_path, make()) as tuner:
        for number, (state, value) in enumerate(told):
            tuner.tell(number, state, value)
        assert [asked.state for asked in tuner.asked] == ["completed", "pruned", "failed", "open"]
    assert (tmp_path / "optuna.journal").read_bytes() == before
    trials = read(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert trials[0].value == 0.5


@pytest.mark.parametrize("first", [("failed", None), ("pruned", None), ("completed", 0.0)])
def test_a_run_that_is_run_again_counts_as_what_it_is_told_to_be_last(
    tmp_path: Path, first: tuple[str, float | None]
) -> None:
    """The sequence goes on as if the last result had been the only one, and the earlier ones never there."""
    search = make(TPE)
    for kind in ("once", "again"):
        with tuner_of(tmp_path / kind, search) as tuner:
            asked = [tuner.ask() for _ in range(7)]
            for one in asked:
                if kind == "again":
                    tuner.tell(one.number, *first)
                tuner.tell(one.number, "completed", score(one.point))
    with tuner_of(tmp_path / "again", search) as tuner:
        assert {asked.state for asked in tuner.asked} == {"completed"}
    assert finish(tmp_path / "again", search) == finish(tmp_path / "once", search)


def test_a_failed_run_that_is_run_again_goes_on_with_what_was_reported(tmp_path: Path) -> None:
    search = make(pruner=Pruner("median", startup_trials=1))
    with tuner_of(tmp_path, search) as tuner:
        good, failing = tuner.ask().number, tuner.ask().number
        assert not any(tuner.report(good, epoch, 1.0) for epoch in range(1, 5))
        assert not tuner.report(failing, 1, 0.0)
        tuner.tell(failing, "failed")
        tuner.tell(good, "completed", 1.0)
    with tuner_of(tmp_path, search) as tuner:
        assert not tuner.report(failing, 1, 0.0)
        assert tuner.asked[failing].state == "failed"
        assert tuner.report(failing, 2, 0.0)
        assert tuner.asked[failing].state == "open"
        tuner.tell(failing, "pruned")
        assert [asked.state for asked in tuner.asked] == ["completed", "pruned"]
    assert read(tmp_path).trials[-1].intermediate_values == {1: 0.0, 2: 0.0}


@pytest.mark.parametrize("end", [("completed", 1.0), ("failed", None), ("pruned", None)])
def test_a_run_that_begins_anew_with_other_values_is_another_run(tmp_path: Path, end: tuple[str, float | None]) -> None:
    search = make(pruner=Pruner("median", startup_trials=1))
    with tuner_of(tmp_path, search) as tuner:
        good, again, last = (tuner.ask().number for _ in range(3))
        assert not any(tuner.report(good, epoch, 1.0) for epoch in range(1, 5))
        tuner.tell(good, "completed", 1.0)
        earlier = [2.0, 1.5, 0.0, 0.0] if end[0] != "pruned" else [0.0]
        assert [tuner.report(again, *seen) for seen in enumerate(earlier, 1)][-1] == (end[0] == "pruned")
        tuner.tell(again, *end)
    with tuner_of(tmp_path, search) as tuner:
        assert not tuner.report(again, 1, 4.0)
        assert [asked.state for asked in tuner.asked] == ["completed", "open", "open"]
        assert not any(tuner.report(again, epoch, 4.0) for epoch in range(2, 5))
        tuner.tell(again, "completed", 4.0)
    with tuner_of(tmp_path, search) as tuner:
        assert tuner.report(last, 1, 2.4)  # the median of 1 and 4: the earlier run is not compared with
    assert read(tmp_path).trials[-1].intermediate_values == dict.fromkeys(range(1, 5), 4.0)


def test_a_run_that_was_set_back_keeps_the_epochs_before(tmp_path: Path) -> None:
    search = make(pruner=MEDIAN)
    with tuner_of(tmp_path, search) as tuner:
        number = tuner.ask().number
        for seen in ((1, math.nan), (2, 0.2), (3, 0.3), (1, math.nan)):
            assert not tuner.report(number, *seen)
        assert len(read(tmp_path).trials) == 1
        for seen in ((2, 0.2), (3, 0.25)):
            assert not tuner.report(number, *seen)
    assert len(read(tmp_path).trials) == 2
    assert repr(read(tmp_path).trials[-1].intermediate_values) == "{1: nan, 2: 0.2, 3: 0.25}"


@pytest.mark.parametrize("pruner", [MEDIAN, Pruner("hyperband")])
def test_more_epochs_go_on_with_the_search_and_with_its_runs(tmp_path: Path, pruner: Pruner) -> None:
    search = make(pruner=pruner)
    before = finish(tmp_path, search)
    assert {asked.state for asked in before} == {"completed", "pruned"}
    with tuner_of(tmp_path, search, num_epochs=9) as tuner:
        assert tuner.asked == before
        for asked in before:
            answers = [tuner.report(asked.number, epoch, curve(asked.point, epoch)) for epoch in range(1, 5)]
            assert any(answers) == (asked.state == "pruned")  # what was decided stays
        assert tuner.asked == before
        best = max(before, key=lambda asked: (asked.state == "completed", curve(asked.point, 5)))
        assert not tuner.report(best.number, 5, 1e9)
        assert tuner.asked[best.number].state == "open"
        tuner.tell(best.number, "completed", 1e9)
    newest = read(tmp_path).trials[-1]
    assert list(newest.intermediate_values) == [1, 2, 3, 4, 5]
    assert newest.value == 1e9


def test_more_epochs_let_median_end_runs_in_what_was_the_last(tmp_path: Path) -> None:
    search = make(pruner=Pruner("median", startup_trials=1, warmup_epochs=3))
    for num_epochs in (4, 5):
        with tuner_of(tmp_path, search, num_epochs) as tuner:
            for value in (1.0, 0.0):
                number = tuner.ask().number
                answers = [tuner.report(number, epoch, value) for epoch in range(1, 5)]
                assert answers == [False, False, False, num_epochs == 5 and value == 0.0]
                tuner.tell(number, "completed", value)


def test_hyperband_keeps_its_brackets_and_compares_on_after_more_epochs(tmp_path: Path) -> None:
    """From 4 to 11 epochs with a factor of 3 there is one bracket: it compares after 4, then after 12, 36, ..."""
    search = make(pruner=Pruner("hyperband", min_epochs=4), max_trials=40)
    with tuner_of(tmp_path, search, num_epochs=11) as tuner:
        number = tuner.ask().number
        assert not any(tuner.report(number, epoch, 1.0) for epoch in range(1, 12))
        tuner.tell(number, "completed", 1.0)
    with tuner_of(tmp_path, search, num_epochs=36) as tuner:  # anew, there would be three brackets
        assert not any(tuner.report(number, epoch, 1.0) for epoch in range(12, 37))
        for value in range(0, -20, -1):
            worse = tuner.ask().number
            assert [tuner.report(worse, epoch, value) for epoch in range(1, 5)] == [False, False, False, True]
            tuner.tell(worse, "pruned")
        late = tuner.ask().number
        assert not any(tuner.report(late, epoch, 2.0) for epoch in range(1, 12))
        assert tuner.report(late, 12, 0.5)


def test_hyperband_compares_a_run_that_goes_on_with_what_it_had_at_each_epoch(tmp_path: Path) -> None:
    """One bracket, and comparisons after epochs 2 and 4."""
    search = make(pruner=Pruner("hyperband", min_epochs=2, reduction_factor=2))
    with tuner_of(tmp_path, search, num_epochs=3) as tuner:
        number = tuner.ask().number
        assert not any(tuner.report(number, epoch, float(epoch)) for epoch in range(1, 4))
        tuner.tell(number, "failed")
    with tuner_of(tmp_path, search, num_epochs=6) as tuner:
        assert not tuner.report(number, 4, 4.0)
    attributes = read(tmp_path).trials[-1].system_attrs
    assert attributes == {"completed_rung_0": 2.0, "completed_rung_1": 4.0}


# --- the journal ------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Search], Search]] = {
    'space.x: {"low": 0.0, .*"when": {}} -> {"low": 0.0, "high": 2.0': lambda s: replace(
        s, space={"x": Range(0.0, 2.0)}
    ),
    r'space: \["x"\] -> \["x", "y"\]; space.y: absent -> ': lambda s: replace(s, space={**s.space, "y": Values((1,))}),
    r'include: \[\] -> \[{"x": 0.5}\]': lambda s: replace(s, include=({"x": 0.5},)),
    r'exclude: \[\] -> \[{"x": 0.5}\]': lambda s: replace(s, exclude=({"x": 0.5},)),
    'objective: .*"max"} -> .*"min"}': lambda s: replace(s, objective=Objective(mode="min")),
    'strategy: "tpe" -> "random"': lambda s: replace(s, strategy=RANDOM),
    "strategy.seed: 0 -> 7": lambda s: replace(s, strategy=replace(TPE, seed=7)),
    "strategy.startup_trials: 4 -> 5": lambda s: replace(s, strategy=replace(TPE, startup_trials=5)),
    r"seeds: \[\] -> \[1, 2\]": lambda s: replace(s, seeds=(1, 2)),
    r'pruner: absent -> .*"median".*}\);': lambda s: replace(s, pruner=MEDIAN),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_journal_is_refused_to_another_search_with_what_differs_unless_forced(tmp_path: Path, message: str) -> None:
    search = replace(LINE, strategy=TPE, max_trials=2)
    finish(tmp_path, search)
    before = (tmp_path / "optuna.journal").read_bytes()
    with pytest.raises(RunError, match=message) as caught:
        Tuner(tmp_path, CHANGES[message](search), 4)
    assert str(caught.value).startswith(f"{tmp_path / 'optuna.journal'} is of another search (")
    assert "--force begins a new sequence (directories stay)" in str(caught.value)
    assert caught.value.exit_status == 2
    assert (tmp_path / "optuna.journal").read_bytes() == before
    with tuner_of(tmp_path, CHANGES[message](search), force=True) as tuner:
        assert tuner.asked == []
        assert tuner.ask() is not None
    with tuner_of(tmp_path, CHANGES[message](search)) as tuner:
        assert len(tuner.asked) == 1
    assert (tmp_path / "optuna.journal").read_bytes().startswith(before)


def test_the_order_of_the_options_and_whether_numbers_are_whole_belong_to_the_search(tmp_path: Path) -> None:
    finish(tmp_path, make(max_trials=1))
    for space in (dict(reversed(SPACE.items())), {**SPACE, "loss.temperature": Range(1.0, 20.0, log=True)}):
        with pytest.raises(RunError, match="is of another search"):
            Tuner(tmp_path, make(space=space, max_trials=1), 4)


def test_hyperband_takes_the_epochs_there_are_when_the_first_point_is_asked(tmp_path: Path) -> None:
    """With 4 epochs comparisons begin after 1 or 3, with 100 in some brackets later."""
    search = make(pruner=Pruner("hyperband"), max_trials=40)
    for num_epochs in (4, 100):
        with tuner_of(tmp_path, search, num_epochs) as tuner:
            if num_epochs == 100:
                first: set[int | None] = set()
                while (new := tuner.ask()) is not None:
                    value = -float(new.number)
                    answers = [tuner.report(new.number, epoch, value) for epoch in range(1, 100)]
                    first.add(answers.index(True) + 1 if True in answers else None)
    assert {1, 3, 9, 27} <= first


def test_what_decides_no_point_may_change(tmp_path: Path) -> None:
    finish(tmp_path, make(max_trials=3))
    with tuner_of(tmp_path, make(max_trials=5, seeds=(1, 2)), num_epochs=9) as tuner:
        assert len(tuner.asked) == 3
    with tuner_of(tmp_path, make(max_trials=2)) as tuner:
        assert len(tuner.asked) == 3  # they have directories
        assert tuner.ask() is None


def test_force_goes_on_with_the_same_search(tmp_path: Path) -> None:
    expected = finish(tmp_path, make(TPE))
    before = (tmp_path / "optuna.journal").read_bytes()
    for _ in range(2):
        with tuner_of(tmp_path, make(TPE), force=True) as tuner:
            assert tuner.asked == expected
            assert tuner.ask() is None
    assert (tmp_path / "optuna.journal").read_bytes() == before


def test_force_goes_on_with_the_sequence_that_it_began(tmp_path: Path) -> None:
    expected = finish(tmp_path / "alone", make(TPE))
    finish(tmp_path, make(TPE, exclude=({"loss.name": "ce"},)))
    for number in range(1, 4):
        with tuner_of(tmp_path, make(TPE), force=True) as tuner:
            train(tuner, tuner.ask())
            assert tuner.asked == expected[:number]
    assert finish(tmp_path, make(TPE)) == expected  # nothing of the earlier study is left in the new one


def test_messages_name_the_journal_that_is_shown(tmp_path: Path) -> None:
    copied, journal = tmp_path / "copy", tmp_path / "own.journal"
    finish(copied, make(max_trials=2))
    with pytest.raises(RunError, match="is of another search") as caught:
        Tuner(copied, make(TPE), 4, shown=journal)
    assert str(caught.value).startswith(f"{journal} ")
    (copied / "optuna.journal").write_bytes(b"rubbish\n")
    with pytest.raises(RunError, match="is damaged") as caught:
        Tuner(copied, make(TPE), 4, shown=journal)
    assert str(caught.value).startswith(f"{journal} ")
    assert str(copied) not in str(caught.value)


@pytest.mark.parametrize("durable", [True, False])
def test_every_line_is_brought_to_the_disk_if_it_is_to_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda _: synced.append((tmp_path / "optuna.journal").stat().st_size))
    with closing(Tuner(tmp_path, make(), 4, durable=durable)) as tuner:
        asked = tuner.ask()
        tuner.tell(asked.number, "completed", 0.5)
    lines = (tmp_path / "optuna.journal").read_bytes().splitlines(keepends=True)
    assert synced == (list(itertools.accumulate(map(len, lines))) if durable else [])


def test_a_copy_made_while_a_line_is_written_is_read_up_to_that_line(tmp_path: Path) -> None:
    copied = tmp_path / "copy/optuna.journal"
    copied.parent.mkdir()
    with tuner_of(tmp_path, make()) as writer:
        tried = [writer.ask() for _ in range(3)]
        content = (tmp_path / "optuna.journal").read_bytes()
        for cut in range(1, len(content.splitlines(keepends=True)[-1])):
            copied.write_bytes(content[:-cut])
            with closing(Tuner(copied.parent, make(), 4, durable=False)) as reader:
                assert reader.asked == tried[:2]
                assert reader.ask() == tried[2]
        assert writer.asked == tried
    assert (tmp_path / "optuna.journal").read_bytes() == content


def test_a_search_of_which_nothing_was_asked_yet_owns_no_journal(tmp_path: Path) -> None:
    with tuner_of(tmp_path, make()):
        pass
    with tuner_of(tmp_path, make(TPE, objective=Objective("val.loss", "min"))) as tuner:
        assert tuner.ask() is not None
    assert read(tmp_path).direction.name == "MINIMIZE"


def test_a_journal_that_ends_anywhere_loses_only_what_was_written_last(tmp_path: Path) -> None:
    search = replace(LINE, strategy=RANDOM, max_trials=4)
    expected = finish(tmp_path / "whole", search)
    content = (tmp_path / "whole/optuna.journal").read_bytes()
    last_two = content.rstrip(b"\n").rfind(b"\n", 0, content.rstrip(b"\n").rfind(b"\n"))
    journal = tmp_path / "optuna.journal"
    for end in [*range(0, last_two, 97), *range(last_two, len(content))]:
        for rubbish in (b"", b"\0" * 7):
            journal.write_bytes(content[:end] + rubbish)
            with tuner_of(tmp_path, search) as tuner:
                created = [line for line in content[:end].split(b"\n")[:-1] if b'"op_code":4' in line]
                assert points(tuner.asked) == points(expected)[: len(created)]
    for end in (0, 100, len(content) // 2, last_two + 5, len(content) - 1):
        journal.write_bytes(content[:end])
        assert finish(tmp_path, search) == expected
        assert [trial.state.name for trial in read(tmp_path).trials] == ["COMPLETE"] * 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:3], b"{rubbish", *lines[4:]], "line 4 is not what was written"),
        (lambda lines: [*lines[:3], lines[3] + lines[4], *lines[5:]], "line 4 is not what was written"),
        (lambda lines: [*lines[:3], b"", *lines[3:]], "line 4 is not what was written"),
        (lambda lines: [*lines[:3], b"\xff\xfe", *lines[3:]], "line 4 is not what was written"),
        (lambda lines: [*lines[:3], b"[" * 100_000, *lines[3:]], "line 4 is not what was written"),
        (lambda lines: [*lines[:3], b"[]", *lines[3:]], "line 4 is not what was written"),
        (lambda lines: [*lines, b"{rubbish"], "line 13 is not what was written"),
        (lambda lines: [*lines, b'{"op_code": 99}'], "AssertionError"),
        (lambda lines: [*lines, b'{"op_code": 6}'], "KeyError"),
        (lambda lines: lines[:2] + lines[4:], "some of its points are missing"),
    ],
)
def test_a_damaged_journal_is_named_with_what_to_do(
    tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    finish(tmp_path, make(max_trials=5))
    journal = tmp_path / "optuna.journal"
    lines = journal.read_bytes().splitlines()
    assert len(lines) == 12
    journal.write_bytes(b"\n".join(damage(lines)) + b"\n")
    content = journal.read_bytes()
    with pytest.raises(RunError, match=message) as caught:
        Tuner(tmp_path, make(max_trials=5), 4)
    assert str(caught.value).startswith(f"{journal} is damaged: ")
    assert "restore it, or move it away: the search then begins a new sequence" in str(caught.value)
    assert caught.value.reason == "storage"
    assert journal.read_bytes() == content


def test_a_full_disk_is_one_line_and_the_journal_goes_on_when_there_is_room(tmp_path: Path) -> None:
    search = make(TPE)
    expected = finish(tmp_path / "a", search)
    size = (tmp_path / "a/optuna.journal").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for part in range(1, 12):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * part // 12, hard))
        try:
            with pytest.raises(RunError, match=r"optuna.journal: File too large") as caught:
                finish(tmp_path / "b", search)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.reason == "storage"
        assert (tmp_path / "b/optuna.journal").read_bytes()[-1:] in (b"", b"\n")
    assert finish(tmp_path / "b", search) == expected


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "optuna.journal").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*optuna.journal: Is a directory") as caught:
        Tuner(tmp_path, make(), 4)
    assert caught.value.reason == "storage"


def test_optuna_says_nothing_and_leaves_nothing_else_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("optuna"), "handlers", [handler])
    finish(tmp_path, make(TPE, pruner=MEDIAN, include=({"seed": 1}, {"loss.name": "ce"})))
    assert said == []
    assert [path.name for path in tmp_path.iterdir()] == ["optuna.journal"]

"""Claims about what is handed out: points of a tuner, their seeds, what is pruned, and what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sweep.children import Child, Planner, write
from sweep.launchers.local import Local
from sweep.space import Search, Values, grid
from sweep.study import Rules, Study
from sweep.trials import Adaptive, Fixed, open_tuner, rehearse, warn_of_objective
from sweep.view import View
from utils import RunError

MakeParent = Callable[..., Path]
RANDOM = {"loss.alpha": {"low": 0.1, "high": 0.9}, "strategy": "random", "max_trials": 4}
EPOCHS = {"do": "epochs", "seconds": 0.01}


def run(parent: Path, slots: int = 1, **rules: Any) -> int:
    """Runs what search.json says, as the command does."""
    planner = Planner.read(parent)
    tuner = open_tuner(planner)
    try:
        return Study(Adaptive(tuner, planner), Local([None] * slots), Rules(**rules), planner.search, "parent").run(
            View()
        )
    finally:
        tuner.close()


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def statuses(parent: Path) -> dict[str, str]:
    return {path.parent.name: read(path)["status"] for path in sorted(parent.glob("*/run.json"))}


def told(parent: Path) -> list[str]:
    planner = Planner.read(parent)
    tuner = open_tuner(planner)
    states = [asked.state for asked in tuner.asked]
    tuner.close()
    return states


def finish(child: Child, accuracy: float) -> None:
    write([child])
    run = {"status": "completed", "epoch": 3, "best": {"accuracy": accuracy, "epoch": 1}}
    (child.dir / "run.json").write_text(json.dumps(run))


def test_fixed_children_are_handed_out_in_their_order(make_parent: MakeParent) -> None:
    planner = Planner.read(make_parent({"alpha": [0.1, 0.2]}))
    children = planner.children([{"loss.alpha": 0.1}, {"loss.alpha": 0.2}])
    trials = Fixed(children)
    assert [trials.next(), trials.next(), trials.next()] == [*children, None]


def test_as_many_points_are_trained_as_were_asked_for_and_not_so_many_more(
    make_parent: MakeParent, lines: list[str]
) -> None:
    parent = make_parent(RANDOM)
    assert run(parent, 2) == 0
    names = list(statuses(parent))
    assert len(names) == 4
    assert told(parent) == ["completed"] * 4
    assert run(parent) == 0
    assert "0 done, 4 skipped, 0 failed, 0 not started" in lines
    assert run(make_parent({**RANDOM, "max_trials": 6})) == 0
    assert len(statuses(parent)) == 6
    assert statuses(parent).keys() >= set(names)


def test_random_points_are_the_same_whatever_runs_beside_them(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent(RANDOM)
    expected = rehearse(Planner.read(parent), ahead=True)
    assert sorted(path.name for path in parent.iterdir()) == ["params.json", "search.json"]
    run(parent, 3)
    assert rehearse(Planner.read(parent), ahead=False) == expected
    assert [read(parent / f"alpha_{point['loss.alpha']}/params.json")["loss"]["alpha"] for point in expected] == [
        point["loss.alpha"] for point in expected
    ]


def test_what_others_train_comes_first_so_that_its_gpu_is_known(make_parent: MakeParent) -> None:
    planner = Planner.read(make_parent({"alpha": [0.1, 0.2, 0.3]}))
    children = planner.children(grid(planner.search))
    write(children)
    with FileLock(children[2].dir / ".lock"):
        trials = Fixed(children)
    assert [trials.next(), trials.next(), trials.next()] == [children[2], children[0], children[1]]


def test_a_journal_that_begins_anew_is_read_anew(make_parent: MakeParent) -> None:
    planner = Planner.read(make_parent(PRUNED))
    tuner = open_tuner(planner)
    trials = Adaptive(tuner, planner)
    child = trials.next()
    assert child is not None
    write([child])
    seen = []
    tuner.report = lambda number, epoch, value: seen.append(epoch)  # type: ignore[assignment, method-assign, func-returns-value]
    for epochs in ([1, 2], [1], [1, 2, 3]):
        lines = [json.dumps({"epoch": epoch, "val": {"accuracy": 0.5}}) + "\n" for epoch in epochs]
        (child.dir / "metrics.jsonl").write_text("".join(lines))
        trials.watch([child])
        trials.watch([child])
    assert seen == [1, 2, 1, 2, 3]
    tuner.close()


def test_what_is_wrong_with_a_journal_is_told_of_the_journal_that_the_user_has(
    make_parent: MakeParent, lines: list[str]
) -> None:
    run(make_parent(RANDOM))
    parent = make_parent({**RANDOM, "loss.alpha": {"low": 0.2, "high": 0.9}})
    with pytest.raises(RunError) as caught:
        rehearse(Planner.read(parent), ahead=True)
    assert str(caught.value).startswith(f"{parent / 'optuna.journal'} is of another search")


def test_a_rehearsal_of_tpe_shows_only_what_was_chosen(make_parent: MakeParent) -> None:
    assert rehearse(Planner.read(make_parent({**RANDOM, "strategy": "tpe"})), ahead=True) == []


def test_tpe_learns_from_the_mean_over_the_seeds(make_parent: MakeParent) -> None:
    planner = Planner.read(make_parent({**RANDOM, "strategy": "tpe", "seeds": [1, 2]}))
    tuner = open_tuner(planner)
    trials = Adaptive(tuner, planner)
    first, second = trials.next(), trials.next()
    assert first is not None
    assert second is not None
    assert [first.params["seed"], second.params["seed"]] == [1, 2]
    for child, accuracy in ((first, 0.5), (second, 0.7)):
        finish(child, accuracy)
        assert [asked.state for asked in tuner.asked] == ["open"]
        trials.ended(child, "done")
    assert [asked.state for asked in tuner.asked] == ["completed"]
    assert tuner._study.trials[0].value == pytest.approx(0.6)
    tuner.close()


def test_a_failed_seed_fails_the_point_and_the_other_seeds_go_on(make_parent: MakeParent) -> None:
    planner = Planner.read(make_parent({**RANDOM, "strategy": "tpe", "seeds": [1, 2]}))
    tuner = open_tuner(planner)
    trials = Adaptive(tuner, planner)
    first, second = trials.next(), trials.next()
    assert first is not None
    assert second is not None
    trials.ended(first, "failed")
    finish(second, 0.5)
    trials.ended(second, "done")
    assert [asked.state for asked in tuner.asked] == ["failed"]
    tuner.close()


def test_a_metric_that_the_runs_do_not_have_ends_the_search_with_those_that_they_have(
    make_parent: MakeParent, lines: list[str]
) -> None:
    parent = make_parent({**RANDOM, "objective": {"metric": "val.acuracy"}})
    with pytest.raises(RunError, match=r"alpha_\S+ has no val.acuracy; it has val.accuracy"):
        run(parent)


# --- pruning --------------------------------------------------------------------------------------------------

PRUNED = {
    "loss.alpha": [0.9, 0.8, 0.7, 0.1, 0.2, 0.95],
    "pruner": {"name": "median", "startup_trials": 2, "warmup_epochs": 1},
}


def test_runs_that_fall_behind_are_ended_early_and_count_as_done(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent(PRUNED, num_epochs=30, stub={"do": "epochs", "seconds": 0.03})
    assert run(parent) == 0
    found = statuses(parent)
    assert found["alpha_0.9"] == found["alpha_0.95"] == "completed"
    assert found["alpha_0.1"] == found["alpha_0.2"] == "pruned"
    assert 2 <= read(parent / "alpha_0.1/run.json")["epoch"] < 30
    assert [line for line in lines if "alpha_0.1 is pruned at epoch" in line]
    assert lines[-1] == "best: alpha_0.95: accuracy 0.9500 at epoch 30"
    before = {path: path.read_bytes() for path in parent.glob("*/*")}
    assert run(parent) == 0
    assert {path: path.read_bytes() for path in parent.glob("*/*")} == before


def test_what_was_to_be_pruned_when_the_search_was_killed_is_pruned_by_the_next(
    make_parent: MakeParent, lines: list[str]
) -> None:
    parent = make_parent(PRUNED, num_epochs=30, stub={"do": "epochs", "seconds": 0.03})
    assert run(parent) == 0
    path = parent / "alpha_0.1/run.json"
    path.write_text(json.dumps({**read(path), "status": "interrupted"}))  # as if nobody had come to say why
    epoch = read(path)["epoch"]
    assert run(parent) == 0
    assert read(path)["status"] == "pruned"
    assert read(path)["epoch"] < epoch + 15


def test_with_seeds_the_first_is_judged_and_a_pruned_point_has_no_others(
    make_parent: MakeParent, lines: list[str]
) -> None:
    space = {**PRUNED, "loss.alpha": [0.9, 0.8, 0.1], "seeds": [0, 1]}
    parent = make_parent(space, num_epochs=30, stub={"do": "epochs", "seconds": 0.02})
    assert run(parent, 2) == 0
    found = statuses(parent)
    assert found.pop("alpha_0.1_seed_0") == "pruned"
    assert found == dict.fromkeys([f"alpha_{a}_seed_{s}" for a in (0.8, 0.9) for s in (0, 1)], "completed")
    assert "4 done, 0 skipped, 0 failed, 1 pruned, 0 not started" in lines


def test_a_search_is_complete_though_some_points_have_been_pruned_with_their_seeds(
    make_parent: MakeParent, lines: list[str]
) -> None:
    pruner = {"name": "median", "startup_trials": 1}
    space = {"loss.alpha": [0.9, 0.1, 0.95], "seeds": [0, 1], "pruner": pruner}
    parent = make_parent(space, num_epochs=30, stub={"do": "epochs", "seconds": 0.02})
    assert run(parent) == 0
    assert "4 done, 0 skipped, 0 failed, 1 pruned, 0 not started" in lines
    assert run(parent) == 0


def test_a_journal_of_a_run_that_cannot_be_read_is_no_business_of_the_search(make_parent: MakeParent) -> None:
    planner = Planner.read(make_parent(PRUNED))
    tuner = open_tuner(planner)
    trials = Adaptive(tuner, planner)
    child = trials.next()
    assert child is not None
    write([child])
    for line in ("garbage", '{"epoch": 1}', '{"epoch": "x", "val": {}}', '{"epoch": 2, "val": {"accuracy": "high"}}'):
        with (child.dir / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
        assert trials.watch([child]) == []
    tuner.close()


def test_fewer_points_than_were_chosen_already_are_no_fewer_points(make_parent: MakeParent, lines: list[str]) -> None:
    run(make_parent({**RANDOM, "max_trials": 3}))
    assert run(make_parent({**RANDOM, "max_trials": 2})) == 0
    assert "0 done, 3 skipped, 0 failed, 0 not started" in lines


def test_the_other_seeds_of_the_last_point_are_trained_too(make_parent: MakeParent, lines: list[str]) -> None:
    parent = make_parent({**PRUNED, "loss.alpha": [0.9], "seeds": [0, 1]}, stub={"do": "epochs"})
    assert run(parent, 3) == 0
    assert statuses(parent) == {"alpha_0.9_seed_0": "completed", "alpha_0.9_seed_1": "completed"}


def test_a_loss_that_differs_from_child_to_child_is_no_silent_objective(lines: list[str]) -> None:
    from sweep.space import Objective

    space = {"loss.alpha": Values((0.1, 0.2))}
    warn_of_objective(Search(space, objective=Objective("val.cross_entropy", "min")))
    assert lines == []
    warn_of_objective(Search(space, objective=Objective("val.loss", "min")))
    assert lines == ["val.loss is another function wherever loss.alpha differs; val.cross_entropy is the same in all"]

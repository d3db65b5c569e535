"""Mistakes of other frameworks into which scripts fall and no loss: the claim that rules each out, and a broken twin.

The numbers are those of the list of traps in the notes on methods; the others are in tests/model/losses/test_traps.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Make, Script, changed, read_journal, rejected

import synthesize_results
import train
from benchmarks.cifar100_recipes import recipes
from model.data.loader import Loader
from model.losses.at import ATLoss
from model.outputs import Batch, Outputs
from model.teacher import FrozenTeacher
from report import tables


def trained(script: Script, folder: Path, *arguments: object) -> Path:
    assert script(train, "--model_dir", folder, *arguments).status == 0
    return folder


# --- 18: hyper-parameters that are in no file, found on the test set ------------------------------------------


def test_trap_18_a_weight_that_is_in_no_file(
    script: Script, make_student: Make, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(script, make_student("run", loss=[{"name": "ce"}, {"name": "at"}]))

    def check_it_can_be_repeated_from_its_record(name: str, params: dict[str, Any]) -> None:
        """Whatever the defaults are by then."""
        again = make_experiment(name)
        (again / "params.json").write_text(json.dumps(params))
        monkeypatch.setattr(ATLoss, "usual_weight", 7.0)
        assert read_journal(trained(script, again)) == read_journal(run)

    recorded = json.loads((run / "run.json").read_text())["params"]
    check_it_can_be_repeated_from_its_record("again", recorded)
    hidden = [{key: value for key, value in loss.items() if key != "weight"} for loss in recorded["loss"]]
    with rejected():
        check_it_can_be_repeated_from_its_record("hidden", {**recorded, "loss": hidden})


def test_trap_18_and_22_epochs_that_are_selected_on_test_images(script: Script, make_experiment: Make) -> None:
    def check_training_does_not_see_the_test_images(validate_on: str) -> None:
        """Not a bit of what a run leaves, but the file of its test scores, depends on them."""
        one, other = (
            trained(
                script,
                make_experiment(f"{validate_on}_{size}", dataset={"test_size": size, "validate_on": validate_on}),
            )
            for size in (40, 60)
        )
        assert read_journal(one) == read_journal(other)
        scores = [json.loads((folder / "metrics_val_best_weights.json").read_text()) for folder in (one, other)]
        assert scores[0] == scores[1]

    check_training_does_not_see_the_test_images("val")
    with rejected():
        check_training_does_not_see_the_test_images("test")


# --- 19: meters that lie ----------------------------------------------------------------------------------------

ROUNDED = ('"learning_rate": rate,', '"learning_rate": float(f"{rate:.2f}"),')


def test_trap_19_a_learning_rate_of_two_digits(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_the_rate_is_told_in_full(name: str) -> None:
        schedule = {"name": "multistep", "milestones": [1, 2], "gamma": 0.1, "per": "epoch"}
        sgd = {"name": "sgd", "learning_rate": 0.05}
        folder = trained(script, make_experiment(name, num_epochs=3, optimizer=sgd, schedule=schedule))
        rates = [record["learning_rate"] for record in read_journal(folder)]
        assert rates == pytest.approx([0.05, 0.005, 0.0005], rel=1e-12)

    check_the_rate_is_told_in_full("right")
    monkeypatch.setattr(train, "Run", changed(train.Run, ROUNDED))
    with rejected():
        check_the_rate_is_told_in_full("broken")


def test_trap_19_a_speed_without_the_wait_for_images(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    images_of, waited = Loader.epoch, [0.0]

    def slow_images(self: Loader, *arguments: int) -> Iterator[Batch]:
        for batch in images_of(self, *arguments):
            time.sleep(0.2)
            waited[0] += 0.2
            yield batch

    monkeypatch.setattr(Loader, "epoch", slow_images)

    def check_the_speed_is_that_of_the_epoch(name: str) -> None:
        waited[0] = 0
        folder = trained(script, make_experiment(name, num_epochs=1))
        run = json.loads((folder / "run.json").read_text())
        assert run["progress"]["images_per_second"] <= 32 / 0.2  # a batch every fifth of a second at best

    check_the_speed_is_that_of_the_epoch("right")
    monkeypatch.setattr(train, "waited", waited, raising=False)
    after_the_fetch = ("(time.monotonic() - started)", "(time.monotonic() - started - waited[0])")
    monkeypatch.setattr(train, "Run", changed(train.Run, after_the_fetch))
    with rejected():
        check_the_speed_is_that_of_the_epoch("broken")


def check_its_folder_names_its_nets(name: str, params: dict[str, Any]) -> None:
    teacher, student = name.partition("/")[0].split("_to_")
    assert params["student"]["name"] == student
    assert Path(params["teacher"]["model_dir"]).name == teacher


def test_trap_19_a_column_that_names_another_net() -> None:
    files = {name: params for name, params in recipes().items() if "/" in name}
    for name, params in files.items():
        check_its_folder_names_its_nets(name, params)
    with rejected():
        check_its_folder_names_its_nets("vgg13_to_mobilenetv2_half/kd", files["resnet32x4_to_shufflenetv2/kd"])


# --- 22: tables and searches --------------------------------------------------------------------------------------


def test_trap_22_a_table_that_fails_where_no_metrics_are(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = make_experiment("pending").parent
    trained(script, make_experiment("done"))

    def check_what_has_not_run_is_a_row() -> None:
        ended = script(synthesize_results, "--parent_dir", parent)
        assert (ended.status, "pending" in ended.out) == (0, True)

    check_what_has_not_run_is_a_row()
    takes_for_granted = ("sign * row.metrics.get(key, 0)", "sign * row.metrics[key]")
    monkeypatch.setattr(synthesize_results, "sort_rows", changed(tables.sort_rows, takes_for_granted))
    with rejected():
        check_what_has_not_run_is_a_row()


def test_trap_22_a_grid_that_asks_the_teacher_anew_for_every_point(
    script: Script, make_student: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    compute = FrozenTeacher.compute

    def counted(self: FrozenTeacher, needs: frozenset[str], batch: Batch) -> Outputs:
        asked.append(len(batch.labels))
        return compute(self, needs, batch)

    monkeypatch.setattr(FrozenTeacher, "compute", counted)

    def check_points_after_the_first_ask_nothing(cache: str) -> None:
        for alpha, temperature in ((0.5, 2.0), (0.9, 2.0), (0.9, 8.0)):
            changes = {"loss": {"alpha": alpha, "temperature": temperature}}
            trained(script, make_student(f"{cache}_{alpha}_{temperature}", {"cache": cache}, **changes))
            assert bool(asked) == ((alpha, temperature) == (0.5, 2.0))
            asked.clear()

    check_points_after_the_first_ask_nothing("lazy")
    with rejected():
        check_points_after_the_first_ask_nothing("off")

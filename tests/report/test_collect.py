from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from model import legacy
from report.collect import FLAT, Row, collect, compare_temperatures
from utils import RunError, read_json

PARAMS = {"num_epochs": 30, "student": {"name": "cnn"}, "loss": {"name": "kd", "alpha": 0.9}}
VAL = {"accuracy": 0.84, "accuracy_top5": 0.99, "cross_entropy": 0.5, "loss": 0.4, "epoch": 28}
RUN_JSON, VAL_BEST, VAL_LAST = "run.json", "metrics_val_best_weights.json", "metrics_val_last_weights.json"
FLAT_PARAMS = {
    "model_version": "cnn_distill",
    "subset_percent": 1.0,
    "augmentation": "yes",
    "teacher": "resnet18",
    "alpha": 0.9,
    "temperature": 20,
    "learning_rate": 0.001,
    "batch_size": 128,
    "num_epochs": 30,
    "dropout_rate": 0.5,
    "num_channels": 32,
    "save_summary_steps": 100,
    "num_workers": 4,
}
FILES = ("params.json", RUN_JSON, VAL_BEST, VAL_LAST, "metrics_test_best_weights.json")


def write(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    (folder / name).write_bytes(content)


def write_run(folder: Path, status: str = "completed", params: Any = PARAMS, **rest: Any) -> None:
    """Writes the directory of a run that wrote its metrics."""
    run = {"status": status, "reason": None, "epoch": 30, "num_epochs": 30, "params": params, "attempts": []}
    write(folder, "params.json", PARAMS)
    write(folder, RUN_JSON, run | rest)
    write(folder, VAL_BEST, VAL)
    write(folder, VAL_LAST, VAL | {"accuracy": 0.83, "epoch": 30})


def only_row(folder: Path) -> Row:
    rows, _ = collect(folder)
    assert len(rows) == 1
    return rows[0]


def test_scores_of_older_weights_are_left_out_and_said(tmp_path: Path) -> None:
    write_run(tmp_path)
    write(tmp_path, "metrics_test_best_weights.json", {"accuracy": 0.45, "epoch": 1})
    row = only_row(tmp_path)
    assert not [key for key in row.metrics if key.startswith("test_best")]
    assert row.status == "completed; the best weights are not evaluated since epoch 1"
    write(tmp_path, "metrics_test_best_weights.json", {"accuracy": 0.82, "epoch": VAL["epoch"]})
    assert (only_row(tmp_path).metrics["test_best.accuracy"], only_row(tmp_path).status) == (0.82, "completed")


def test_weights_that_were_selected_on_the_test_split_are_marked(tmp_path: Path) -> None:
    write_run(tmp_path)
    write(tmp_path, "metrics_test_best_weights.json", VAL | {"selected_on": "val"})
    assert only_row(tmp_path).status == "completed"
    write(tmp_path, VAL_BEST, VAL | {"selected_on": "test"})
    assert only_row(tmp_path).status == "completed; SELECTED ON THE TEST SPLIT"


# what is an experiment


def test_every_folder_with_a_params_json_is_a_row_the_parent_included(tmp_path: Path) -> None:
    for name in (".", "b/deep/er", "a"):
        write(tmp_path / name, "params.json", PARAMS)
    (tmp_path / "nothing").mkdir()
    rows, problems = collect(tmp_path)
    assert [row.path for row in rows] == [str(tmp_path / name) for name in ("", "a", "b/deep/er")]
    assert problems == []


def test_the_path_is_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "experiments" / "a", "params.json", PARAMS)
    monkeypatch.chdir(tmp_path)
    assert only_row(Path("experiments")).path == "experiments/a"


@pytest.mark.parametrize("beside", ["search.json", "search_hyperparameters.log"])  # with the default grid only the log
def test_the_reference_of_a_search_is_no_row_until_it_has_run(tmp_path: Path, beside: str) -> None:
    write(tmp_path, "params.json", PARAMS)
    write(tmp_path, beside, {})
    assert collect(tmp_path) == ([], [])
    write_run(tmp_path)
    assert only_row(tmp_path).state == "completed"


def test_hidden_folders_are_not_entered(tmp_path: Path) -> None:
    write(tmp_path / ".ipynb_checkpoints" / "a", "params.json", PARAMS)
    assert collect(tmp_path) == ([], [])


def test_links_to_directories_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "outside", "params.json", PARAMS)
    write(tmp_path / "tree" / "a", "params.json", PARAMS)
    (tmp_path / "tree" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "tree" / "a" / "loop").symlink_to(tmp_path / "tree")
    assert only_row(tmp_path / "tree").path == str(tmp_path / "tree" / "a")


def test_a_link_may_be_named_as_the_parent(tmp_path: Path) -> None:
    write(tmp_path / "a", "params.json", PARAMS)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert only_row(tmp_path / "link").path == str(tmp_path / "link")


@pytest.mark.parametrize("name", ["missing", "a_file"])
def test_a_parent_that_is_no_directory_is_a_usage_error(tmp_path: Path, name: str) -> None:
    write(tmp_path, "a_file", {})
    with pytest.raises(RunError, match=f"--parent_dir: .*{name}: .*name the folder") as error:
        collect(tmp_path / name)
    assert error.value.exit_status == 2


def test_an_unreadable_directory_is_a_problem_and_the_others_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "locked", "z"):
        write(tmp_path / name, "params.json", PARAMS)
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # chmod would not keep root out
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    rows, problems = collect(tmp_path)
    assert [Path(row.path).name for row in rows] == ["a", "z"]
    assert problems == [f"{tmp_path / 'locked'}: Permission denied"]


# what a row says


def test_a_completed_run_has_best_last_and_test_metrics(tmp_path: Path) -> None:
    write_run(tmp_path)
    write(tmp_path, "metrics_test_best_weights.json", {"accuracy": 0.82, "ece": 0.1, "split": "test", "parameters": 9})
    row = only_row(tmp_path)
    assert (row.state, row.status, row.faults) == ("completed", "completed", [])
    expected = {"val_best.accuracy": 0.84, "val_best.cross_entropy": 0.5, "val_best.epoch": 28}
    expected |= {"val_last.accuracy": 0.83, "test_best.accuracy": 0.82, "test_best.ece": 0.1}
    assert row.metrics.items() >= expected.items()
    assert "test_best.split" not in row.metrics


@pytest.mark.parametrize(
    ("status", "rest", "text"),
    [
        ("failed", {"epoch": 3, "reason": "diverged"}, "failed (diverged) at epoch 3 of 30"),
        ("failed", {"epoch": 0}, "failed at epoch 0 of 30"),
        ("interrupted", {"epoch": 3, "reason": "signal"}, "interrupted at epoch 3 of 30"),
        ("pruned", {"epoch": 3}, "pruned at epoch 3 of 30"),
        ("running", {"epoch": 3}, "stale at epoch 3 of 30"),
    ],
)
def test_an_unfinished_run_says_how_far_it_came(tmp_path: Path, status: str, rest: dict[str, Any], text: str) -> None:
    write_run(tmp_path, status, **rest)
    assert only_row(tmp_path).status == text


def test_a_run_whose_lock_is_held_is_running(tmp_path: Path) -> None:
    write_run(tmp_path, "running", epoch=3)
    with FileLock(tmp_path / ".lock"):
        assert only_row(tmp_path).status == "running, epoch 3 of 30"


def test_what_has_not_run_is_pending(tmp_path: Path) -> None:
    write(tmp_path, "params.json", PARAMS)
    row = only_row(tmp_path)
    assert (row.status, row.metrics) == ("pending", {})
    assert row.options == {"num_epochs": 30, "student.name": "cnn", "loss.name": "kd", "loss.alpha": 0.9}


def test_an_option_goes_by_the_whole_path_to_it(tmp_path: Path) -> None:
    write(tmp_path, "params.json", {"seed": 1, "loss": {"schedule": {"alpha": {"first": 0.5}}}})
    assert only_row(tmp_path).options == {"seed": 1, "loss.schedule.alpha.first": 0.5}


def test_options_are_those_that_ran_and_chosen_are_those_in_params_json_or_overridden(tmp_path: Path) -> None:
    ran = {**PARAMS, "seed": 7, "precision": "auto", "loss": {"name": "kd", "alpha": 0.5, "temperature": 4.0}}
    write_run(tmp_path, params=ran, attempts=[{"overrides": ["alpha=0.5", "seed=7"]}, {"argv": ["train.py"]}])
    row = only_row(tmp_path)
    assert (row.options["loss.alpha"], row.options["loss.temperature"], row.options["precision"]) == (0.5, 4.0, "auto")
    assert set(row.written) == {"num_epochs", "student.name", "loss.name", "loss.alpha", "seed"}


def test_params_that_were_edited_after_the_run_do_not_pass_for_what_ran(tmp_path: Path) -> None:
    write_run(tmp_path)
    edited = {**PARAMS, "loss": {"name": "at", "beta": 1000}, "extra": 1}
    write(tmp_path, "params.json", edited)
    options = only_row(tmp_path).options
    assert options["loss.name"] == "kd"
    assert "loss.beta" not in options
    assert options["extra"] == 1


def test_a_number_reads_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "pending", "params.json", {"loss": {"temperature": 4}})
    write_run(tmp_path / "ran", params={"loss": {"temperature": 4.0}})
    write(tmp_path / "ran", "params.json", {"loss": {"temperature": 4}})
    assert [repr(row.options["loss.temperature"]) for row in collect(tmp_path)[0]] == ["4", "4"]


def test_both_spellings_of_a_teacher_are_one(tmp_path: Path) -> None:
    write(tmp_path / "long", "params.json", {"teacher": {"model_dir": "experiments/t"}})
    write(tmp_path / "text", "params.json", {"teacher": "experiments/t"})
    long, text = collect(tmp_path)[0]
    assert long.options == text.options == {"teacher.model_dir": "experiments/t"}


def test_several_teachers_are_one_cell_and_what_they_share_stands_there_once(tmp_path: Path) -> None:
    write(tmp_path / "text", "params.json", {"teacher": ["t", "u/v"]})
    write(tmp_path / "one", "params.json", {"teacher": ["t"]})
    sections = [{"model_dir": "t", "cache": "lazy", "top_k": None}, {"model_dir": "u", "cache": "lazy", "top_k": 3}]
    write(tmp_path / "sections", "params.json", {"teacher": sections})
    one, several, text = collect(tmp_path)[0]
    assert text.options == {"teacher.model_dir": "t + u/v"}
    assert one.options == {"teacher.model_dir": "t"}
    assert several.options == {
        "teacher.model_dir": "t + u",
        "teacher.cache": "lazy",
        "teacher.top_k": "null + 3",
    }


def test_a_teacher_that_is_no_teacher_is_shown_as_it_stands_there(tmp_path: Path) -> None:
    write(tmp_path, "params.json", {"teacher": ["t", 3]})
    assert only_row(tmp_path).options == {"teacher": '["t", 3]'}


def test_null_is_empty_and_lists_and_booleans_are_json(tmp_path: Path) -> None:
    write(tmp_path, "params.json", {"teacher": None, "loss": [{"name": "ce"}, {"name": "kd"}], "flag": True})
    assert only_row(tmp_path).options == {"loss.ce.name": "ce", "loss.kd.name": "kd", "flag": "true"}


def test_a_list_that_is_not_one_of_sections_is_json(tmp_path: Path) -> None:
    write(tmp_path, "params.json", {"schedule": {"milestones": [1, 2]}})
    assert only_row(tmp_path).options == {"schedule.milestones": "[1, 2]"}


def test_a_flat_params_json_that_has_not_run_fills_the_columns_of_ours(tmp_path: Path) -> None:
    write(tmp_path, "params.json", FLAT_PARAMS)
    row = only_row(tmp_path)
    assert (row.status, row.faults) == ("pending", [])
    assert row.options == {
        "student.name": "cnn_distill",
        "student.dropout_rate": 0.5,
        "student.num_channels": 32,
        "dataset.subset_fraction": 1.0,
        "dataset.augmentation": "yes",
        "dataset.batch_size": 128,
        "dataset.num_workers": 4,
        "teacher.model_dir": "resnet18",
        "loss.alpha": 0.9,
        "loss.temperature": 20,
        "optimizer.learning_rate": 0.001,
        "num_epochs": 30,
    }
    assert set(row.written) == set(row.options)


def test_flat_keys_are_shown_where_they_go_when_it_runs() -> None:
    assert {key: place for place, key in legacy.PLACES.items()} == FLAT


def test_a_flat_params_json_that_has_run_shows_what_ran(tmp_path: Path) -> None:
    ran, _, problems = legacy.translate(FLAT_PARAMS)
    assert problems == []
    ran["dataset"]["subset_fraction"] = 1.0  # a default: train.py fills it in
    write_run(tmp_path, params=ran)
    write(tmp_path, "params.json", FLAT_PARAMS)
    row = only_row(tmp_path)
    assert row.options["student.name"] == "cnn"
    assert row.options["teacher.model_dir"] == "experiments/base_resnet18"
    assert repr(row.options["loss.temperature"]) == "20"
    # Every option that was written is one that ran: no column for the same thing in two spellings.
    assert set(row.written) <= set(row.options)
    assert not set(row.options) & (set(FLAT_PARAMS) - {"num_epochs"})


def test_overrides_and_sections_beside_flat_keys_are_shown(tmp_path: Path) -> None:
    attempts = [{"overrides": ["alpha=0.5", "dropout_rate=0.0", "dataset.data_dir=/d"]}]
    flat = {**FLAT_PARAMS, "dataset": {"name": "cifar100"}}
    write(tmp_path, "params.json", {key: value for key, value in flat.items() if key != "dropout_rate"})
    write(tmp_path, RUN_JSON, {"status": "pending", "attempts": attempts})
    options = only_row(tmp_path).options
    assert (options["loss.alpha"], options["student.dropout_rate"]) == (0.5, 0.0)
    assert (options["dataset.name"], options["dataset.data_dir"], options["dataset.batch_size"]) == (
        "cifar100",
        "/d",
        128,
    )


def test_a_flat_params_json_with_a_section_that_is_none_is_unreadable(tmp_path: Path) -> None:
    write(tmp_path, "params.json", {**FLAT_PARAMS, "loss": 3})
    row = only_row(tmp_path)
    assert row.state == "unreadable"
    assert "'loss' is 3, not a section" in row.status


# the best temperature and the calibrated one


def write_student(folder: Path, temperature: float, accuracy: float, teacher: Any = "t", **loss: Any) -> None:
    params = {"teacher": teacher, "loss": {"name": "kd", "alpha": 0.9, "temperature": temperature, **loss}}
    write_run(folder, params=params, teacher="sha of the teacher")
    write(folder, "params.json", params)
    write(folder, VAL_BEST, VAL | {"accuracy": accuracy})


def temperature_lines(folder: Path) -> list[str]:
    return compare_temperatures(collect(folder)[0])


def test_the_best_temperature_stands_beside_the_calibrated_one(tmp_path: Path) -> None:
    teacher = tmp_path / "teachers" / "t"
    for temperature, accuracy in ((1, 0.83), (4, 0.8337), (20, 0.82)):
        write_student(tmp_path / "runs" / str(temperature), temperature, accuracy, str(teacher))
    calibration = {"temperature": 1.4321, "split": "val", "checkpoint_sha256": "sha of the teacher"}
    write(teacher, "calibration_val_best.json", calibration)
    line = f"best T of these runs: 4 (val accuracy 0.8337); calibrated T of the teacher {teacher}: 1.43 (NLL on val)"
    assert temperature_lines(tmp_path / "runs") == [line]
    write(teacher, "calibration_val_best.json", calibration | {"checkpoint_sha256": "another"})
    assert temperature_lines(tmp_path / "runs") == [
        line.replace("on val)", "on val, with other weights than taught these runs)")
    ]


@pytest.mark.parametrize("calibration", [None, b"{", {}, {"temperature": "hot"}, {"temperature": None}])
def test_without_a_calibration_the_line_names_the_command(tmp_path: Path, calibration: Any) -> None:
    teacher = tmp_path / "my teacher"
    write_student(tmp_path / "runs" / "a", 2.5, 0.83, str(teacher))
    write_student(tmp_path / "runs" / "b", 4.0, 0.82, str(teacher))
    if calibration is not None:
        write(teacher, "calibration_val_best.json", calibration)
    assert temperature_lines(tmp_path / "runs") == [
        f"best T of these runs: 2.5 (val accuracy 0.8300); the teacher {teacher} is not calibrated: "
        f"`python evaluate.py --model_dir '{teacher}' --split val --calibrate`"
    ]


def test_each_teacher_whose_runs_differ_in_temperature_has_a_line(tmp_path: Path) -> None:
    write_student(tmp_path / "a1", 1, 0.7, "a")
    write_student(tmp_path / "a2", 2, 0.8, "a")
    write_student(tmp_path / "b1", 1, 0.9, "b")
    write_student(tmp_path / "b2", 2, 0.6, "b")
    write_student(tmp_path / "c1", 4, 0.95, "c")
    last = {"model_dir": "a", "restore_file": "last"}
    write_student(tmp_path / "d1", 1, 0.5, last)
    write_student(tmp_path / "d2", 8, 0.55, last)
    assert [line.partition(" is")[0] for line in temperature_lines(tmp_path)] == [
        "best T of these runs: 2 (val accuracy 0.8000); the teacher a",
        "best T of these runs: 1 (val accuracy 0.9000); the teacher b",
        "best T of these runs: 8 (val accuracy 0.5500); the teacher a",
    ]
    assert temperature_lines(tmp_path)[2].endswith("--calibrate --restore_file last`")


def test_without_two_temperatures_that_were_scored_there_is_no_line(tmp_path: Path) -> None:
    write_student(tmp_path / "a", 4, 0.8)
    write_student(tmp_path / "b", 4.0, 0.7)
    write_student(tmp_path / "unscored", 8, 0.7)
    (tmp_path / "unscored" / VAL_BEST).unlink()
    write_student(tmp_path / "no_number", True, 0.7)
    write_student(tmp_path / "no_teacher", 1, 0.7, None)
    for temperature in (1, 2):
        write_student(tmp_path / f"number{temperature}", temperature, 0.7, {"model_dir": 3})
        write_student(tmp_path / f"ensemble{temperature}", temperature, 0.7, ["t", "u"])
    write_student(tmp_path / "pruned", 2, 0.9)
    write(tmp_path / "pruned", RUN_JSON, read_json(tmp_path / "pruned" / RUN_JSON) | {"status": "pruned"})
    write(tmp_path / "flat", "params.json", FLAT_PARAMS)  # resnet18 is no directory
    write(tmp_path / "flat", VAL_BEST, VAL)
    write(tmp_path / "flat2", "params.json", FLAT_PARAMS | {"temperature": 2})
    write(tmp_path / "flat2", VAL_BEST, VAL)
    assert temperature_lines(tmp_path) == []


# what is wrong with it


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON: Expecting value at line 1 column 1"),
        (b'{"accuracy": 0.8', "not JSON"),
        (b"\x93NUMPY\x00", "not UTF-8 text"),
        (b'{"accuracy": NaN}', "NaN is not a finite number"),
        (b'{"accuracy": 1e999}', "1e999 is not a finite number"),
        (b'{"epoch": 1, "epoch": 2}', "the key 'epoch' stands there twice"),
        (b"[0.84]", "expected an object"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
        (b'{"a": "' + b"x" * 1_000_000 + b'"}', "is larger than 1000000 bytes"),
    ],
)
def test_a_damaged_file_makes_its_row_unreadable_and_no_other(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    write_run(tmp_path / "bad")
    write_run(tmp_path / "good")
    write(tmp_path / "bad", name, content)
    (bad, good), problems = collect(tmp_path)
    assert bad.state == "unreadable"
    assert bad.status.startswith(f"unreadable: {name}: {reason}")
    assert ";" not in bad.status
    assert problems == [f"{tmp_path / 'bad'}: {fault}" for fault in bad.faults]
    assert good.status == "completed"


def test_what_is_not_a_file_is_not_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / VAL_LAST).unlink()
    os.mkfifo(tmp_path / VAL_LAST)
    assert only_row(tmp_path).status == f"unreadable: {VAL_LAST}: is not a file"


def test_a_broken_link_is_told(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "metrics_test_last_weights.json").symlink_to("gone")
    assert only_row(tmp_path).status == "unreadable: metrics_test_last_weights.json: does not exist"


@pytest.mark.parametrize("value", ["0.84", True, [0.84], {"mean": 0.84}, 10**400])
def test_an_accuracy_that_is_no_number_makes_the_row_unreadable_but_not_its_other_numbers(
    tmp_path: Path, value: Any
) -> None:
    write_run(tmp_path)
    write(tmp_path, VAL_BEST, VAL | {"accuracy": value})
    row = only_row(tmp_path)
    assert row.status == f"unreadable: {VAL_BEST}: accuracy is not a number"
    assert "val_best.accuracy" not in row.metrics
    assert (row.metrics["val_best.epoch"], row.metrics["val_last.accuracy"]) == (28, 0.83)


@pytest.mark.parametrize("metrics", [{}, {"accuracy": None}, {"top1": "high", "notes": ["extra"]}])
def test_missing_null_and_extra_metrics_are_no_fault(tmp_path: Path, metrics: dict[str, Any]) -> None:
    write_run(tmp_path)
    write(tmp_path, VAL_BEST, metrics)
    row = only_row(tmp_path)
    assert row.status == "completed"
    assert "val_best.accuracy" not in row.metrics


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("params", [1]),
        ("params", None),
        ("attempts", 3),
        ("attempts", ["train"]),
        ("attempts", [{"overrides": [1]}]),
        ("attempts", [{"overrides": ["no equals"]}]),
        ("status", "exploded"),
        ("status", ["completed"]),
    ],
)
def test_a_foreign_run_json_makes_the_row_unreadable(tmp_path: Path, key: str, value: Any) -> None:
    write_run(tmp_path, **{key: value})
    row = only_row(tmp_path)
    assert row.status.startswith("unreadable: run.json: ")
    assert row.metrics["val_best.accuracy"] == 0.84


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    write_run(tmp_path, status="x" * 100_000)
    assert len(only_row(tmp_path).status) < 300


def test_a_file_that_goes_away_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: Path) -> str:
        raise RunError("run.json does not exist")

    write_run(tmp_path, "running")
    monkeypatch.setattr("report.collect.read_status", gone)
    assert only_row(tmp_path).state == "unreadable"


def test_each_file_is_read_once_and_what_is_wrong_with_it_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    write(tmp_path, VAL_BEST, b"{")
    paths: list[Path] = []
    monkeypatch.setattr("report.collect.read_json", lambda path: [paths.append(path), read_json(path)][1])
    _, problems = collect(tmp_path)
    assert sorted(path.name for path in paths) == sorted(["params.json", RUN_JSON, VAL_BEST, VAL_LAST])
    assert len(problems) == 1


def test_no_content_whatsoever_raises(tmp_path: Path) -> None:
    seed = random.Random(0)
    leaves = [None, True, 0, -1, 0.5, 10**400, "", "=1", "a.b", "x|y", [], {}, [1], {"a": {"b": [{}]}}, "running"]
    keys = [
        "model_version",
        "temperature",
        "status",
        "params",
        "attempts",
        "overrides",
        "teacher",
        "epoch",
        "reason",
        "accuracy",
        "a.b",
        "",
        "loss",
    ]

    def value(depth: int) -> Any:
        kind = seed.randrange(4) if depth else 0
        if kind == 1:
            return {seed.choice(keys): value(depth - 1) for _ in range(3)}
        return [value(depth - 1) for _ in range(2)] if kind == 2 else seed.choice(leaves)

    for _ in range(50):
        for name in FILES:
            write(tmp_path, name, {key: value(3) for key in seed.sample(keys, 6)})
        only_row(tmp_path)

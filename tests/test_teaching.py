"""A run and its teacher's stored answers, end to end; every claim is about files, log lines or bits."""

from __future__ import annotations

import json
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Ended, Make, Script, merged, read_journal, snapshot
from torch import Tensor

import evaluate
import experiment
import process
import teaching
import train
from checkpoint import load_checkpoint
from model.outputs import Batch, Outputs
from model.teacher import FrozenTeacher
from model.teacher_store import Column, TeacherStore, stores_in

KD = {"name": "kd", "alpha": 0.9, "temperature": 4.0}
CROPS = ["random_resized_crop", "horizontal_flip"]


@pytest.fixture
def teacher(script: Script, make_experiment: Make) -> Path:
    folder = make_experiment("teacher", student={"width": 8})
    assert script(train, "--model_dir", folder).status == 0
    return folder


@pytest.fixture
def make_student(make_experiment: Make, teacher: Path) -> Callable[..., Path]:
    """Writes a student of that teacher: `make_student("a", {"cache": "lazy"}, seed=2)`."""

    def make(name: str, options: dict[str, Any] | None = None, **changes: Any) -> Path:
        section = {"model_dir": str(teacher), **(options or {})}
        return make_experiment(name, **merged({"loss": KD, "teacher": section}, changes))

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that a teacher's net had to run on."""
    sizes: list[int] = []
    original = FrozenTeacher.compute

    def compute(self: FrozenTeacher, needs: frozenset[str], batch: Batch) -> Outputs:
        sizes.append(len(batch.labels))
        return original(self, needs, batch)

    monkeypatch.setattr(FrozenTeacher, "compute", compute)
    return sizes


def command(script: Script, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Ended:
    """Runs `python -m model.teacher_store`."""
    return script(teaching, *arguments)


def weights(folder: Path) -> list[Tensor]:
    return list(load_checkpoint(folder / "last.pth.tar")[0]["state_dict"].values())


def same(one: Path, other: Path) -> bool:
    equal = (torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
    return all(equal) and read_journal(one) == read_journal(other)


# --- what a run gets from a store -----------------------------------------------------------------------------


def test_a_second_run_asks_the_teacher_nothing_and_ends_with_the_same_bits(
    script: Script, make_student: Make, asked: list[int]
) -> None:
    first, second = (make_student(name, {"cache": "lazy"}) for name in ("first", "second"))
    assert script(train, "--model_dir", first).status == 0
    assert sum(asked) > 144  # an epoch of training images; of the second, what is shown anew
    asked.clear()
    ended = script(train, "--model_dir", second)
    assert ended.status == 0
    assert asked == []
    assert same(first, second)


def test_alpha_temperature_and_student_may_differ_between_runs_of_one_store(
    script: Script, make_student: Make, asked: list[int]
) -> None:
    script(train, "--model_dir", make_student("first", {"cache": "lazy"}))
    asked.clear()
    other = make_student("second", {"cache": "lazy"}, loss={"alpha": 0.5, "temperature": 9.0}, student={"width": 6})
    assert script(train, "--model_dir", other).status == 0
    assert asked == []


@pytest.mark.parametrize("augmentation", ["crop_flip", CROPS], ids=["numbered", "drawn"])
def test_with_fp32_and_the_same_batches_a_stored_run_is_bitwise_one_without(
    augmentation: Any, script: Script, make_student: Make
) -> None:
    changes: dict[str, Any] = {"dataset": {"augmentation": augmentation}}
    plain = make_student("plain", **changes)
    script(train, "--model_dir", plain)
    for name in ("cold", "warm"):
        stored = make_student(name, {"cache": "lazy", "cache_dtype": "fp32"}, **changes)
        assert script(train, "--model_dir", stored).status == 0
        assert same(plain, stored), name


def test_with_fp16_losses_and_gradients_are_those_without_within_its_rounding(
    script: Script, make_student: Make
) -> None:
    # fp16 keeps 11 bits: an answer is off by 2^-11 of itself, and so about is what follows from it.
    plain, stored = make_student("plain"), make_student("stored", {"cache": "lazy"})
    for folder in (plain, stored):
        script(train, "--model_dir", folder)
    for a, b in zip(read_journal(plain), read_journal(stored), strict=True):
        assert b["train"]["loss"] == pytest.approx(a["train"]["loss"], rel=2e-3)
        assert b["val"]["loss"] == pytest.approx(a["val"]["loss"], rel=2e-3)
    assert read_journal(plain) != read_journal(stored)


def test_views_without_a_number_are_kept_by_seed_epoch_and_sample(
    script: Script, make_student: Make, asked: list[int]
) -> None:
    changes: dict[str, Any] = {"dataset": {"augmentation": CROPS}}
    first, again, other = (make_student(name, {"cache": "lazy"}, **changes) for name in ("first", "again", "other"))
    script(train, "--model_dir", first)
    asked.clear()
    script(train, "--model_dir", again)
    assert asked == []
    assert same(first, again)
    script(train, "--model_dir", other, "--seed", 2)
    assert sum(asked) == 2 * 144  # validation images are the same


def test_a_full_store_is_filled_before_training_and_serves_every_seed(
    script: Script, make_student: Make, teacher: Path, asked: list[int]
) -> None:
    script(train, "--model_dir", make_student("first", {"cache": "full"}))
    assert sum(asked) == 144 * 162 + 16
    asked.clear()
    assert script(train, "--model_dir", make_student("second", {"cache": "lazy"}), "--seed", 7).status == 0
    assert asked == []


def test_filling_that_was_stopped_goes_on_where_it_was(
    script: Script, make_student: Make, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student("student", {"cache": "full"}, dataset={"augmentation": "flip"})
    original = experiment.Experiment.stop_if_asked

    def stop(self: experiment.Experiment, where: str, **options: Any) -> None:
        if len(asked) == 4:
            signal.raise_signal(signal.SIGTERM)
        original(self, where, **options)

    monkeypatch.setattr(experiment.Experiment, "stop_if_asked", stop)
    ended = script(train, "--model_dir", student)
    assert ended.status == 143
    assert "while the teacher's answers were computed" in ended.err
    done = sum(asked)
    asked.clear()
    monkeypatch.setattr(experiment.Experiment, "stop_if_asked", original)
    assert script(train, "--model_dir", student).status == 0
    assert done > 0
    assert sum(asked) == 144 * 2 + 16 - done


def test_a_run_resumed_with_a_store_is_bitwise_the_uninterrupted_one(
    script: Script, make_student: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = make_student("whole", {"cache": "lazy"}), make_student("cut", {"cache": "lazy"})
    script(train, "--model_dir", whole)
    original, steps = experiment.Experiment.pause, []

    def pause(self: experiment.Experiment, *arguments: Any) -> None:
        steps.append(None)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        original(self, *arguments)

    monkeypatch.setattr(experiment.Experiment, "pause", pause)
    assert script(train, "--model_dir", cut).status == 143
    assert script(train, "--model_dir", cut).status == 0
    assert same(whole, cut)


def test_a_run_may_go_on_with_another_way_to_keep_answers(script: Script, make_student: Make) -> None:
    student = make_student("student", {"cache": "lazy"}, num_epochs=1)
    script(train, "--model_dir", student)
    overrides = ["--overrides", "num_epochs=2", "teacher.cache=off", "teacher.max_gb=1"]
    assert script(train, "--model_dir", student, *overrides).status == 0
    assert len(read_journal(student)) == 2


# --- what must not be used ------------------------------------------------------------------------------------


def test_answers_of_other_weights_are_never_used_and_the_log_says_why(
    script: Script, make_student: Make, teacher: Path, asked: list[int]
) -> None:
    script(train, "--model_dir", make_student("first", {"cache": "lazy"}))
    script(train, "--model_dir", teacher, "--restart", "--seed", 5)
    asked.clear()
    ended = script(train, "--model_dir", make_student("second", {"cache": "lazy"}))
    assert "no store of this teacher has answers for this run: " in ended.out
    assert "teacher.weights is" in ended.out
    assert sum(asked) > 144


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dataset": {"train_size": 170}}, "dataset is"),
        ({"dataset": {"augmentation": "flip"}}, "preprocessing.views.pad is 4, not 0"),
        ({"dataset": {"augmentation": CROPS}}, "preprocessing.views.transforms is absent"),
        ({"dataset": {"mean": [0.4, 0.4, 0.4]}}, "preprocessing.mean is"),
        ({"precision": "bf16"}, 'precision is "fp32", not "bf16"'),
    ],
    ids=["data", "views", "transforms", "normalisation", "precision"],
)
def test_answers_to_other_images_are_never_used_and_the_log_says_why(
    changes: dict[str, Any], why: str, script: Script, make_student: Make, asked: list[int]
) -> None:
    script(train, "--model_dir", make_student("first", {"cache": "lazy"}, num_epochs=1))
    asked.clear()
    ended = script(train, "--model_dir", make_student("second", {"cache": "lazy"}, num_epochs=1, **changes))
    assert ended.status == 0
    assert sum(asked) >= 144
    [line] = [line for line in ended.out.splitlines() if line.startswith("no store of this teacher has answers")]
    assert why in line


def test_a_part_of_the_data_shares_the_store_of_all_of_it(script: Script, make_student: Make, asked: list[int]) -> None:
    script(train, "--model_dir", make_student("first", {"cache": "full"}, dataset={"augmentation": "flip"}))
    asked.clear()
    changes = {"dataset": {"augmentation": "flip", "subset_fraction": 0.5, "val_fraction": 0.1}}
    assert script(train, "--model_dir", make_student("second", {"cache": "lazy"}, **changes)).status == 0
    assert asked == []


def test_answers_of_another_length_live_beside_each_other(
    script: Script, make_student: Make, teacher: Path, asked: list[int]
) -> None:
    for name, options in (("all", {}), ("some", {"top_k": 2}), ("exact", {"cache_dtype": "fp32"})):
        asked.clear()
        assert script(train, "--model_dir", make_student(name, {"cache": "lazy", **options})).status == 0
        assert sum(asked) > 0
    [(folder, _)] = stores_in(teacher / "store")
    assert len(list(folder.glob("*.rows"))) == 3


def test_a_loss_that_needs_feature_maps_has_no_store(script: Script, make_student: Make) -> None:
    ended = script(train, "--check", "--model_dir", make_student("hints", {"cache": "lazy"}, loss={"name": "fitnets"}))
    assert ended.status == 2
    assert "teacher.cache: loss 'fitnets' needs more of the teacher than can be kept" in ended.err


# --- room -----------------------------------------------------------------------------------------------------


def test_a_lazy_store_that_does_not_fit_is_done_without(script: Script, make_student: Make) -> None:
    plain, lazy = make_student("plain"), make_student("lazy", {"cache": "lazy", "max_gb": 1e-5})
    script(train, "--model_dir", plain)
    ended = script(train, "--model_dir", lazy)
    assert ended.status == 0
    assert "raise teacher.max_gb" in ended.err
    assert "the teacher is asked in every step" in ended.err
    assert same(plain, lazy)


def test_a_full_store_that_does_not_fit_ends_the_run_in_one_line(script: Script, make_student: Make) -> None:
    ended = script(train, "--model_dir", make_student("full", {"cache": "full", "max_gb": 1e-5}))
    assert ended.status == 2
    assert "raise teacher.max_gb" in ended.err.splitlines()[-1]


@pytest.mark.filterwarnings("default")
def test_on_a_full_disk_training_goes_on_without_keeping_answers(
    script: Script, make_student: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    plain, lazy = make_student("plain"), make_student("lazy", {"cache": "lazy", "cache_dtype": "fp32"})
    script(train, "--model_dir", plain)
    ended = script(train, "--model_dir", lazy)
    assert ended.status == 0
    assert "No space left on device" in ended.err
    assert same(plain, lazy)


# --- the fast teacher -----------------------------------------------------------------------------------------


def test_a_fast_teacher_is_scored_against_its_original_once_per_store(
    script: Script, make_student: Make, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[bool] = []
    original = teaching.evaluate
    monkeypatch.setattr(
        teaching, "evaluate", lambda *args, **options: scored.append(True) or original(*args, **options)
    )
    ended = script(train, "--model_dir", make_student("first", {"cache": "lazy"}))
    assert "teacher in fp32, 2 batch norms folded: val accuracy" in ended.out
    assert len(scored) == 2
    script(train, "--model_dir", make_student("second", {"cache": "lazy"}))
    assert len(scored) == 2
    [remembered] = (teacher / "store").glob("accuracy_*.json")
    accuracy = load_checkpoint(teacher / "best.pth.tar")[0]["metrics"]["accuracy"]
    assert json.loads(remembered.read_text())["original"] == pytest.approx(accuracy)
    script(train, "--model_dir", teacher, "--restart", "--seed", 5)
    script(train, "--model_dir", make_student("third", {"cache": "lazy"}))
    assert len(scored) == 4


def test_a_fast_teacher_that_scores_otherwise_is_not_used(
    script: Script, make_student: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(self: FrozenTeacher, *arguments: Any) -> FrozenTeacher:
        copy = original(self, *arguments)
        copy.net.linear.bias.data.copy_(torch.arange(copy.net.linear.bias.numel()) * 1e3)
        return copy

    plain, other = make_student("plain"), make_student("other")
    script(train, "--model_dir", plain)
    original = FrozenTeacher.fast
    monkeypatch.setattr(FrozenTeacher, "fast", spoilt)
    ended = script(train, "--model_dir", other)
    assert ended.status == 0
    assert "it computes in fp32, as it was trained" in ended.err
    for a, b in zip(read_journal(plain), read_journal(other), strict=True):
        assert b["train"]["loss"] == pytest.approx(a["train"]["loss"], rel=1e-4)


def test_evaluate_finds_what_a_run_with_a_store_found(script: Script, make_student: Make) -> None:
    student = make_student("student", {"cache": "lazy", "cache_dtype": "fp32"})
    script(train, "--model_dir", student)
    assert script(evaluate, "--model_dir", student, "--split", "val").status == 0
    found = json.loads((student / "metrics_val_best_weights.json").read_text())
    best = max(read_journal(student), key=lambda record: record["val"]["accuracy"])["val"]
    assert {key: found[key] for key in best} == best


# --- the commands ---------------------------------------------------------------------------------------------


def test_fill_status_and_verify_of_a_students_or_the_teachers_directory(
    script: Script, make_student: Make, teacher: Path
) -> None:
    student = make_student("student", {"cache": "lazy"}, dataset={"augmentation": "flip"})
    assert "has no stored answers" in script(teaching, "status", student).out
    ended = script(teaching, "fill", student)
    assert (ended.status, ended.out.splitlines()[-1]) == (0, f"{144 * 2 + 16} answers computed")
    assert script(teaching, "fill", student).out.splitlines()[-1] == "0 answers computed"
    ended = script(teaching, "fill", teacher, "--overrides", "dataset.augmentation=flip")  # the same images, as it is
    assert ended.out.splitlines()[-1] == "0 answers computed"
    for folder in (student, teacher):
        ended = script(teaching, "status", folder)
        assert "| logits-4-fp16 | fp32        | 304 of 320 |" in ended.out
        assert ended.out.splitlines()[-1].endswith("| yes      |")
    ended = script(teaching, "verify", student, "--fraction", 1)
    assert ended.status == 0
    assert "304 answers computed again" in ended.out
    assert ", 0 wrong, 0 damaged" in ended.out


@pytest.mark.parametrize("augmentation", ["flip", CROPS], ids=["numbered", "drawn"])
def test_verify_finds_answers_that_are_not_the_teachers(
    augmentation: Any, script: Script, make_student: Make, teacher: Path
) -> None:
    student = make_student("student", {"cache": "lazy"}, dataset={"augmentation": augmentation}, num_epochs=1)
    script(train, "--model_dir", student)
    assert script(teaching, "verify", student, "--fraction", 1).status == 0
    [(folder, _)] = stores_in(teacher / "store")
    store = TeacherStore.existing(folder, [Column("logits", 4, "fp16")])
    samples, views = torch.arange(5), torch.full((5,), 0 if augmentation == "flip" else -1)
    store.write({"logits": torch.rand(5, 4)}, samples, views, seed=1, epoch=0)
    ended = script(teaching, "verify", student, "--fraction", 1)
    assert ended.status == 1
    assert "5 stored answers are wrong" in ended.err.splitlines()[-1]


def test_verify_says_what_is_lost_where_only_the_largest_logits_are_kept(
    script: Script, make_student: Make, teacher: Path
) -> None:
    student = make_student("student", {"cache": "lazy", "top_k": 2}, num_epochs=1)
    script(train, "--model_dir", student)
    ended = script(teaching, "verify", student, "--fraction", 1)
    assert ended.status == 0
    assert ", 0 wrong, 0 damaged" in ended.out
    lines = [line for line in ended.out.splitlines() if line.startswith("keeping the largest logits only")]
    means = [float(line.split("mean ")[1].split(",")[0]) for line in lines]
    assert [line.split(" at T ")[1][0] for line in lines] == ["1", "4"]
    assert all(0 < mean < 0.5 for mean in means)


def test_gc_removes_what_no_weights_here_have_answered(script: Script, make_student: Make, teacher: Path) -> None:
    script(train, "--model_dir", make_student("first", {"cache": "lazy"}))
    assert "0.000 GB freed" in script(teaching, "gc", teacher).out
    assert len(stores_in(teacher / "store")) == 1
    script(train, "--model_dir", teacher, "--restart", "--seed", 5)
    assert "no: other weights" in script(teaching, "status", teacher).out
    script(train, "--model_dir", make_student("second", {"cache": "lazy"}))
    assert len(stores_in(teacher / "store")) == 2
    assert script(teaching, "gc", teacher).status == 0
    assert len(stores_in(teacher / "store")) == 1
    assert len(list((teacher / "store").glob("accuracy_*.json"))) == 1
    assert script(teaching, "gc", teacher, "--all").status == 0
    assert snapshot(teacher / "store") == {}


def test_gc_keeps_everything_where_nothing_says_what_is_of_use(
    script: Script, make_student: Make, teacher: Path
) -> None:
    script(train, "--model_dir", make_student("first", {"cache": "lazy"}, num_epochs=1))
    for path in teacher.glob("*.pth.tar"):
        path.unlink()
    ended = script(teaching, "gc", teacher)
    assert ended.status == 2
    assert "--all removes every one" in ended.err
    assert len(stores_in(teacher / "store")) == 1


def test_the_commands_are_started_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["teacher_store", "status", "missing"])
    monkeypatch.delitem(sys.modules, "model.teacher_store")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("model.teacher_store", run_name="__main__")
    assert ended.value.code == 2
    assert "missing/params.json" in capsys.readouterr().err
    assert process.log.name == "kdlab"

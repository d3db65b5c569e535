"""A run and its teacher's stored answers, end to end; every claim is about files, log lines or bits."""

from __future__ import annotations

import json
import signal
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Make, Script, read_journal, snapshot
from PIL import Image
from torch import Tensor

import evaluate
import experiment
import teaching
import train
from checkpoint import load_checkpoint, save_checkpoint
from model.outputs import Batch, Outputs
from model.teacher import FrozenTeacher
from model.teacher_store import stores_in

KD = {"name": "kd", "alpha": 0.9, "temperature": 4.0}
CROPS = ["random_resized_crop", "horizontal_flip"]


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
    loss = [{"name": "ce"}, {"name": "fitnets"}]
    ended = script(train, "--check", "--model_dir", make_student("hints", {"cache": "lazy"}, loss=loss))
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
    assert "so it computes in fp32, as it was trained" in ended.err
    for a, b in zip(read_journal(plain), read_journal(other), strict=True):
        assert b["train"]["loss"] == pytest.approx(a["train"]["loss"], rel=1e-4)


# --- what a teacher does here and in its own run --------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "own", "num_samples", "level"),
    [
        (0.4012, 0.8634, 5000, WARNING),
        (0.8634, 0.4012, 5000, WARNING),
        (0.86, 0.86, 5000, INFO),
        (0.85, 0.8634, 5000, INFO),  # 1.9 standard errors
        (0.84, 0.8634, 5000, WARNING),  # 3.3 of them, 2.3 points
        (0.9850, 0.9999, 100_000, INFO),  # no chance, but less than 2 points
        (0.60, 0.86, 16, INFO),  # 1.7 standard errors of 16 images
        (0.20, 0.86, 16, WARNING),
        (1.0, 1.0, 16, INFO),
        (0.0, 1.0, 16, WARNING),
    ],
)
def test_a_teacher_that_cannot_by_chance_do_otherwise_than_in_its_own_run_is_warned_of(
    here: float, own: float, num_samples: int, level: int
) -> None:
    teacher = FrozenTeacher(torch.nn.Identity(), name="cnn", accuracy=own)
    found, line = teaching.compared(teacher, "experiments/x", here, num_samples)
    assert found == level
    assert line.startswith(f"teacher experiments/x: cnn, val accuracy {here:.4f} here, {own:.4f} in its own run")
    assert ("too different to be chance; " in line) == (level == WARNING)
    assert ("is it the right dataset, normalisation and class order?" in line) == (level == WARNING and here < own)
    assert ("has it been trained on images that this run validates on" in line) == (level == WARNING and here > own)
    # The other way round: a difference of two proportions of so many samples each, in standard errors.
    p, q = here * num_samples, own * num_samples
    pooled = (p + q) / (2 * num_samples)
    error = (pooled * (1 - pooled) * (1 / num_samples + 1 / num_samples)) ** 0.5
    assert (level == WARNING) == (abs(here - own) > 3 * error and abs(here - own) > 0.02)


def test_of_a_teacher_from_elsewhere_only_what_it_does_here_is_known() -> None:
    found = teaching.compared(FrozenTeacher(torch.nn.Identity(), name="cnn"), "experiments/x", 0.5, 16)
    assert found == (INFO, "teacher experiments/x: cnn, val accuracy 0.5000 here")


def test_a_run_with_a_teacher_of_another_normalisation_says_so_at_its_start(
    script: Script, make_experiment: Make
) -> None:
    images = {"train_size": 240, "val_fraction": 0.25}
    good = make_experiment("good", num_epochs=4, student={"width": 8}, dataset=images)
    assert script(train, "--model_dir", good).status == 0
    own = load_checkpoint(good / "best.pth.tar")[0]["metrics"]["accuracy"]
    assert own > 0.6
    wrong = {"mean": [9.0, -9.0, 5.0]}
    ways: list[tuple[str, dict[str, Any], bool]] = [
        ("fits", {}, False),
        ("wrong", wrong, True),
        ("again", {"cache": "lazy"} | wrong, True),
    ]
    for name, options, warned in (*ways, ("remembered", {"cache": "lazy"} | wrong, True)):
        section = {"model_dir": str(good), **options}
        student = make_experiment(name, num_epochs=0, teacher=section, dataset=images, loss=KD)
        ended = script(train, "--model_dir", student)
        assert ended.status == 0
        [line] = [line for line in (ended.out + ended.err).splitlines() if f"{own:.4f} in its own run" in line]
        assert ("too different to be chance" in line) == warned
        assert (line in ended.err) == warned


def test_evaluate_finds_what_a_run_with_a_store_found(script: Script, make_student: Make) -> None:
    student = make_student("student", {"cache": "lazy", "cache_dtype": "fp32"})
    script(train, "--model_dir", student)
    assert script(evaluate, "--model_dir", student, "--split", "val").status == 0
    found = json.loads((student / "metrics_val_best_weights.json").read_text())
    best = max(read_journal(student), key=lambda record: record["val"]["accuracy"])["val"]
    assert {key: found[key] for key in best} == best


# --- found by reading: what a run must not lose, and what it must not take for the same ------------------------


def test_a_store_without_room_is_found_before_restart_removes_anything(script: Script, make_student: Make) -> None:
    student = make_student("student", {"cache": "lazy"})
    script(train, "--model_dir", student)
    before = snapshot(student)
    overrides = ["--overrides", "teacher.cache=full", "teacher.max_gb=1e-6", "teacher.top_k=2"]
    ended = script(train, "--model_dir", student, "--restart", *overrides)
    assert ended.status == 2
    assert snapshot(student) == before


def test_with_top_k_a_store_without_room_ends_a_lazy_run_too(script: Script, make_student: Make) -> None:
    # Without the rows the student would learn from whole logits: another loss, depending on a disk.
    ended = script(train, "--model_dir", make_student("lazy", {"cache": "lazy", "top_k": 2, "max_gb": 1e-6}))
    assert ended.status == 2
    assert "raise teacher.max_gb" in ended.err


def test_a_run_does_not_go_on_with_other_parts_of_the_answers(script: Script, make_student: Make) -> None:
    student = make_student("student", {"cache": "off", "top_k": 2}, num_epochs=1)
    script(train, "--model_dir", student)
    ended = script(train, "--model_dir", student, "--overrides", "num_epochs=2", "teacher.cache=lazy")
    assert ended.status == 2
    assert "the part of the teacher's answers that is kept (teacher.top_k, with teacher.cache) is not what" in ended.err


def test_a_run_that_goes_on_with_rounded_answers_says_so(script: Script, make_student: Make) -> None:
    student = make_student("student", num_epochs=1)
    script(train, "--model_dir", student)
    ended = script(train, "--model_dir", student, "--overrides", "num_epochs=2", "teacher.cache=lazy")
    assert ended.status == 0
    assert "the last bits will differ from those of an uninterrupted run: answers as computed -> fp16" in ended.err


def test_a_teacher_that_overflows_in_fp16_computes_in_fp32(script: Script, make_student: Make, teacher: Path) -> None:
    state, _ = load_checkpoint(teacher / "best.pth.tar")
    state["state_dict"]["linear.weight"] *= 1e6
    save_checkpoint(teacher / "best.pth.tar", state)
    ended = script(train, "--model_dir", make_student("student", precision="fp16", num_epochs=1))
    assert "so it computes in fp32, as it was trained" in ended.err
    assert "training diverged" not in ended.err


def test_teachers_that_share_a_folder_for_stores_do_not_share_stores(
    script: Script, make_student: Make, make_experiment: Make, teacher: Path, tmp_path: Path, asked: list[int]
) -> None:
    options = {"cache": "lazy", "cache_dir": str(tmp_path / "shared")}
    script(train, "--model_dir", make_student("first", options, num_epochs=1))
    other = make_experiment("other_teacher", student={"width": 8}, seed=9)
    script(train, "--model_dir", other)
    second = make_student("second", {**options, "model_dir": str(other)}, num_epochs=1)
    assert script(train, "--model_dir", second).status == 0
    folders = sorted(path.name for path in (tmp_path / "shared").iterdir())
    assert [name.rpartition("-")[0] for name in folders] == ["other_teacher", "teacher"]
    assert not (teacher / "store").exists()


def test_where_nothing_may_be_written_a_lazy_run_does_without(
    script: Script, make_student: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    plain = make_student("plain")
    lazy = make_student("lazy", {"cache": "lazy", "cache_dir": str(tmp_path / "file")})
    script(train, "--model_dir", plain)
    ended = script(train, "--model_dir", lazy)
    assert ended.status == 0
    assert "the teacher is asked in every step" in ended.err
    assert same(plain, lazy)


@pytest.mark.parametrize("validate_on", ["val", "test"])
def test_validation_images_of_another_list_have_a_store_of_their_own(
    validate_on: str, script: Script, make_student: Make, teacher: Path, asked: list[int]
) -> None:
    changes: dict[str, Any] = {"dataset": {"validate_on": validate_on}, "num_epochs": 1}
    for name in ("first", "second"):
        asked.clear()
        assert script(train, "--model_dir", make_student(name, {"cache": "lazy"}, **changes)).status == 0
    assert asked == []
    assert len(stores_in(teacher / "store")) == (1 if validate_on == "val" else 2)


def test_the_last_weights_of_a_teacher_have_a_store_of_their_own(
    script: Script, make_student: Make, teacher: Path, asked: list[int]
) -> None:
    script(train, "--model_dir", make_student("best", {"cache": "lazy"}, num_epochs=1))
    best, last = (load_checkpoint(teacher / f"{name}.pth.tar")[0]["epoch"] for name in ("best", "last"))
    asked.clear()
    script(train, "--model_dir", make_student("last", {"cache": "lazy", "restore_file": "last"}, num_epochs=1))
    assert bool(asked) == (best != last)


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "in files"])
def test_images_that_were_changed_in_place_are_other_images(
    stream: bool, script: Script, make_experiment: Make, tmp_path: Path, asked: list[int]
) -> None:
    for split in ("train", "test"):
        for number, name in enumerate(("ant", "bee")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for position in range(10):
                pixels = np.full((16, 16, 3), 40 * number + position, np.uint8)
                Image.fromarray(pixels).save(folder / f"{position}.bmp")
    dataset = {"name": "image_folder", "data_dir": str(tmp_path / "images"), "image_size": 16, "batch_size": 8}
    dataset |= {"stream": stream, "augmentation": "flip", "num_workers": 0}
    script(train, "--model_dir", teacher := make_experiment("t", dataset=dataset, num_epochs=1))
    section = {"model_dir": str(teacher), "cache": "lazy"}
    for name in ("first", "second", "third"):
        asked.clear()
        student = make_experiment(name, dataset=dataset, num_epochs=1, loss=KD, teacher=section)
        assert script(train, "--model_dir", student).status == 0
        assert bool(asked) == (name != "second")
        changed = tmp_path / "images" / "train" / "ant" / "3.bmp"  # of the same size
        if name == "second":
            Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(changed)


# --- several teachers -----------------------------------------------------------------------------------------


@pytest.fixture
def teachers(script: Script, make_experiment: Make) -> list[Path]:
    """Two kept nets of other widths and weights."""
    folders = [
        make_experiment(f"teacher{width}", num_epochs=0, seed=width, student={"width": width}) for width in (8, 6)
    ]
    for folder in folders:
        assert script(train, "--model_dir", folder).status == 0
    return folders


@pytest.fixture
def make_pupil(make_experiment: Make, teachers: list[Path]) -> Make:
    """Writes a student of both: `make_pupil("a", {"cache": "lazy"}, {}, seed=2)` has options for each of them."""

    def make(name: str, first: dict[str, Any], second: dict[str, Any], **changes: Any) -> Path:
        pairs = zip(teachers, (first, second), strict=True)
        sections = [{"model_dir": str(folder), **options} for folder, options in pairs]
        return make_experiment(name, teacher=sections, loss=KD, **changes)

    return make


EXACT = {"cache": "lazy", "cache_dtype": "fp32"}


def test_what_is_kept_of_each_of_two_teachers_is_bitwise_asking_both(
    script: Script, make_pupil: Make, teachers: list[Path], asked: list[int]
) -> None:
    plain = make_pupil("plain", {}, {})
    assert script(train, "--model_dir", plain).status == 0
    for name, options, kept in (("cold", (EXACT, EXACT), 2), ("warm", (EXACT, EXACT), 2), ("one", (EXACT, {}), 1)):
        asked.clear()
        stored = make_pupil(name, *options)
        ended = script(train, "--model_dir", stored)
        assert ended.status == 0, ended
        assert same(plain, stored), name
        assert json.loads((stored / "run.json").read_text())["attempts"][-1]["answers"] == (
            "fp32+fp32" if kept == 2 else "fp32+as computed"
        )
        if name == "warm":
            assert asked == []
            assert "the teacher was asked for 0 answers; the others had been kept" in ended.out
        if name == "one":  # the other's: 2 epochs, validated before and after
            assert sum(asked) == 2 * 144 + 3 * 16
    for folder in teachers:
        assert len(stores_in(folder / "store")) == 1
        assert len(list((folder / "store").glob("accuracy_*.json"))) == 1


def test_only_the_stores_that_are_to_be_full_are_filled_before_training(
    script: Script, make_pupil: Make, asked: list[int]
) -> None:
    flips = {"dataset": {"augmentation": "flip"}, "num_epochs": 1}
    assert script(train, "--model_dir", make_pupil("first", {"cache": "full"}, {"cache": "lazy"}, **flips)).status == 0
    assert sum(asked) == (144 * 2 + 16) + (144 + 16)


def test_what_is_kept_of_one_teacher_in_part_decides_what_a_run_is(script: Script, make_pupil: Make) -> None:
    student = make_pupil("student", {"cache": "lazy"}, {"cache": "lazy", "top_k": 2}, num_epochs=1)
    assert script(train, "--model_dir", student).status == 0
    assert json.loads((student / "run.json").read_text())["answers"] == "all+top 2"
    ended = script(train, "--model_dir", student, "--overrides", "teacher.1.cache=off", "num_epochs=2")
    assert ended.status == 2
    assert "the part of the teacher's answers that is kept" in ended.err
    overrides = ["--overrides", "teacher.0.cache=off", "num_epochs=2"]  # all of its answers count, kept or not
    assert script(train, "--model_dir", student, *overrides).status == 0

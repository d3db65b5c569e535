"""train.py, end to end, on data that is learnt in a second."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, Make, Script, read_journal, snapshot
from PIL import Image

import evaluate
import experiment
import train
from checkpoint import load_checkpoint, save_checkpoint
from experiment import read_status
from model.teacher import FrozenTeacher

KD = {"name": "kd", "alpha": 0.9, "temperature": 4.0}


def states_equal(a: Path, b: Path) -> bool:
    """Tells whether two checkpoints hold the same bits of student, loss and optimizer."""
    first, second = load_checkpoint(a)[0], load_checkpoint(b)[0]
    return all(repr_bits(first[key]) == repr_bits(second[key]) for key in ("state_dict", "loss_dict", "optim_dict"))


def repr_bits(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.shape, value.contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: repr_bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [repr_bits(item) for item in value]
    return value


def test_a_run_leaves_checkpoints_metrics_and_logs_beside_its_params(script: Script, make_experiment: Make) -> None:
    folder = make_experiment(num_epochs=3)
    before = (folder / "params.json").read_bytes()
    ended = script(train, "--model_dir", folder)
    assert ended.status == 0, ended
    assert (folder / "params.json").read_bytes() == before
    names = {path.name for path in folder.iterdir()}
    assert {"best.pth.tar", "last.pth.tar", "prev.pth.tar", "metrics.jsonl", "run.json", "train.log"} <= names
    assert {"metrics_val_best_weights.json", "metrics_val_last_weights.json"} <= names
    assert any(name.startswith("events.out.tfevents.") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    journal = read_journal(folder)
    assert [record["epoch"] for record in journal] == [1, 2, 3]
    best = max(journal, key=lambda r: r["val"]["accuracy"])  # the first of equals
    written = {
        which: json.loads((folder / f"metrics_val_{which}_weights.json").read_text()) for which in ("best", "last")
    }
    assert written["best"] == best["val"] | {"epoch": best["epoch"], "selected_on": "val"}
    assert written["last"] == journal[-1]["val"] | {"epoch": 3, "selected_on": "nothing"}
    assert load_checkpoint(folder / "best.pth.tar")[0]["epoch"] == best["epoch"]
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "completed"
    assert run["params"]["dataset"]["val_fraction"] == 0.1  # what was resolved, defaults too
    assert len(run["data"]) == 64
    [attempt] = run["attempts"]
    assert attempt["packages"]["torch"] == torch.__version__.partition("+")[0] or attempt["packages"]["torch"]
    assert {"argv", "git", "host", "processor", "device", "precision", "threads", "seconds"} <= attempt.keys()
    log = (folder / "train.log").read_text()
    assert "loss: CE x 1, mean over the batch" in log
    assert log.count("INFO: Epoch ") == 3


def test_the_net_learns(script: Script, make_experiment: Make) -> None:
    folder = make_experiment(num_epochs=8, dataset={"train_size": 400}, student={"width": 8, "dropout_rate": 0.0})
    script(train, "--model_dir", folder)
    journal = read_journal(folder)
    assert journal[-1]["val"]["accuracy"] > 0.9
    assert journal[-1]["train"]["loss"] < 0.5 * journal[0]["train"]["loss"]


def test_a_student_is_distilled_from_another_directory(script: Script, make_experiment: Make) -> None:
    teacher = make_experiment("teacher")
    student = make_experiment("student", teacher=str(teacher), loss=KD)
    script(train, "--model_dir", teacher)
    frozen = snapshot(teacher)
    ended = script(train, "--model_dir", student)
    assert ended.status == 0, ended
    assert snapshot(teacher) == frozen
    assert "loss: CE x 0.1 + KL x 0.9 x 16" in ended.out
    own = load_checkpoint(teacher / "best.pth.tar")[0]["metrics"]["accuracy"]
    assert f"teacher {teacher}: tiny, val accuracy {own:.4f} here, {own:.4f} in its own run" in ended.out
    assert f"val accuracy {own:.4f} here, {own:.4f} as it was trained" in ended.out  # on the same validation images
    for record in read_journal(student):
        for split in ("train", "val"):
            assert record[split]["loss"] == pytest.approx(record[split]["ce"] + record[split]["kd"])
    sha = load_checkpoint(teacher / "best.pth.tar")[1]
    assert json.loads((student / "run.json").read_text())["teacher"] == sha
    assert not any("teacher" in key for key in load_checkpoint(student / "last.pth.tar")[0]["state_dict"])


def test_a_teacher_that_the_loss_does_not_use_is_not_needed(script: Script, make_experiment: Make) -> None:
    loss = {"name": "kd", "alpha": 0.0, "temperature": 4.0}
    folder = make_experiment(teacher="never/trained", loss=loss)
    plain = make_experiment("plain")
    assert script(train, "--model_dir", folder).status == 0
    assert script(train, "--model_dir", plain).status == 0
    assert repr_bits(load_checkpoint(folder / "last.pth.tar")[0]["state_dict"]) == repr_bits(
        load_checkpoint(plain / "last.pth.tar")[0]["state_dict"]
    )


def test_the_same_seed_gives_the_same_files_and_another_seed_does_not(script: Script, make_experiment: Make) -> None:
    a, b, c = make_experiment("a"), make_experiment("b"), make_experiment("c", seed=2)
    for folder in (a, b, c):
        assert script(train, "--model_dir", folder).status == 0
    assert states_equal(a / "last.pth.tar", b / "last.pth.tar")
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert not states_equal(a / "last.pth.tar", c / "last.pth.tar")


def test_a_finished_run_run_again_does_nothing_and_says_so(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    script(train, "--model_dir", folder)
    before = snapshot(folder)
    ended = script(train, "--model_dir", folder)
    assert ended.status == 0
    assert "is finished: 2 epochs. Nothing to do" in ended.out
    assert snapshot(folder) == before


def test_more_epochs_continue_a_finished_run_exactly(script: Script, make_experiment: Make) -> None:
    constant = {"name": "constant"}
    once = make_experiment("once", num_epochs=4, schedule=constant)
    twice = make_experiment("twice", num_epochs=2, schedule=constant)
    script(train, "--model_dir", once)
    script(train, "--model_dir", twice)
    assert script(train, "--model_dir", twice, "--overrides", "num_epochs=4").status == 0
    assert states_equal(once / "last.pth.tar", twice / "last.pth.tar")
    assert (once / "metrics.jsonl").read_bytes() == (twice / "metrics.jsonl").read_bytes()


def test_restart_begins_anew_and_keeps_the_log(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    script(train, "--model_dir", folder)
    ended = script(train, "--model_dir", folder, "--restart", "--overrides", "num_epochs=1")
    assert ended.status == 0
    assert [record["epoch"] for record in read_journal(folder)] == [1]
    assert not (folder / "prev.pth.tar").exists()
    assert (folder / "train.log").read_text().count("Epoch 1/") == 2


def test_other_params_in_a_used_directory_are_refused_with_a_diff(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    script(train, "--model_dir", folder)
    before = snapshot(folder)
    ended = script(train, "--model_dir", folder, "--overrides", "learning_rate=0.02", "num_epochs=5")
    assert ended.status == 2
    assert "optimizer.learning_rate: 0.01 -> 0.02" in ended.err
    assert "num_epochs" not in ended.err  # more epochs are no other experiment
    assert "--restart" in ended.err
    assert ended.err.count("\n") == 1
    assert snapshot(folder) == before


def test_overrides_and_seed_reach_the_run_but_not_the_file(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    before = (folder / "params.json").read_bytes()
    script(train, "--model_dir", folder, "--seed", 7, "--overrides", "optimizer.learning_rate=1e-3", "width=2")
    run = json.loads((folder / "run.json").read_text())
    assert (run["params"]["seed"], run["params"]["optimizer"]["learning_rate"]) == (7, 0.001)
    assert run["params"]["student"]["width"] == 2
    assert run["attempts"][0]["overrides"] == ["optimizer.learning_rate=1e-3", "width=2", "seed=7"]
    assert (folder / "params.json").read_bytes() == before


def test_a_run_that_failed_before_its_first_checkpoint_may_be_corrected(script: Script, make_experiment: Make) -> None:
    folder = make_experiment(optimizer={"name": "sgd", "learning_rate": 1000, "weight_decay": 10})
    assert script(train, "--model_dir", folder).status == 1
    assert script(train, "--model_dir", folder, "--overrides", "learning_rate=0.01", "weight_decay=0").status == 0


def test_an_override_may_name_an_option_of_a_section_left_out(script: Script, make_experiment: Make) -> None:
    folder = make_experiment(schedule=None)
    ended = script(
        *(train, "--model_dir", folder),
        *("--overrides", "loss.label_smoothing=0.1", "schedule.warmup_epochs=1"),
    )
    assert ended.status == 0
    params = json.loads((folder / "run.json").read_text())["params"]
    assert params["loss"] == {"name": "ce", "label_smoothing": 0.1, "weight": 1.0}
    assert (params["schedule"]["name"], params["schedule"]["warmup_epochs"]) == ("constant", 1)


def test_a_teacher_given_as_text_can_be_overridden_by_its_path(script: Script, make_experiment: Make) -> None:
    teacher = make_experiment("teacher")
    script(train, "--model_dir", teacher)
    student = make_experiment("student", teacher="elsewhere", loss=KD)
    assert script(train, "--model_dir", student, "--overrides", f"teacher.model_dir={teacher}").status == 0


def test_check_touches_nothing_and_reports_every_directory(script: Script, make_experiment: Make) -> None:
    good, bad = make_experiment("good"), make_experiment("bad", num_epochs=-1)
    before = snapshot(good.parent)
    assert script(train, "--check", "--model_dir", good).status == 0
    ended = script(train, "--check", "--model_dir", good, bad)
    assert ended.status == 2
    assert "1 of 2 params.json pass" in ended.out
    assert ended.err == f"{bad}/params.json: num_epochs: -1 is below 0\n"
    assert snapshot(good.parent) == before


def test_a_missing_teacher_is_one_line_with_the_command(script: Script, make_experiment: Make) -> None:
    teacher = make_experiment("teacher")
    student = make_experiment("student", teacher=str(teacher), loss=KD)
    ended = script(train, "--model_dir", student)
    assert ended.status == 2
    assert (
        f"train it with: python train.py --model_dir {teacher} (or let train.py do it first: --train_teacher)"
        in ended.err
    )
    assert ended.err.count("\n") == 1


def test_train_teacher_trains_it_first_on_the_students_dataset(script: Script, make_experiment: Make) -> None:
    teacher = make_experiment("teacher", num_epochs=1)
    student = make_experiment("student", num_epochs=1, teacher=str(teacher), loss=KD)
    overrides = ("train_size=200", "dataset.batch_size=16", "dataset.subset_fraction=0.5", "width=2")
    ended = script(train, "--model_dir", student, "--train_teacher", "--overrides", *overrides)
    assert ended.status == 0, ended
    assert read_status(teacher) == "completed"
    params = json.loads((teacher / "run.json").read_text())["params"]
    assert params["dataset"]["train_size"] == 200  # which images there are is the same for both
    assert (params["dataset"]["batch_size"], params["dataset"]["subset_fraction"]) == (32, 1.0)
    assert params["student"]["width"] == 4


def test_train_teacher_refuses_a_teacher_on_another_dataset_before_training_it(
    script: Script, make_experiment: Make
) -> None:
    teacher = make_experiment("teacher", dataset={"name": "digits"})
    student = make_experiment("student", teacher=str(teacher), loss=KD)
    ended = script(train, "--model_dir", student, "--train_teacher")
    assert ended.status == 2
    assert "is on dataset 'digits', its student" in ended.err
    assert read_status(teacher) == "pending"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": [{"name": "ce"}, {"name": "at", "student_stages": [1], "teacher_stages": [9]}]}, "has no stage 9"),
        (
            {"loss": KD, "student": {"name": "cnn", "init_from": "no/such.pth.tar"}},
            "student.init_from: no/such.pth.tar",
        ),
        (
            {"loss": [{"name": "ce"}, {"name": "crd"}], "student": {"name": "torchvision/alexnet"}},
            "torchvision/alexnet",
        ),
    ],
    ids=["a stage", "initial weights", "a net"],
)
def test_what_cannot_work_is_refused_before_the_teacher_is_trained(
    script: Script, make_experiment: Make, changes: dict[str, Any], said: str
) -> None:
    teacher = make_experiment("teacher")
    ended = script(train, "--model_dir", make_experiment("student", teacher=str(teacher), **changes), "--train_teacher")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert said in ended.err
    assert read_status(teacher) == "pending"


def test_a_teacher_trained_on_the_way_is_the_one_that_is_trained_alone(script: Script, make_experiment: Make) -> None:
    alone, teacher = make_experiment("alone"), make_experiment("teacher")
    student = make_experiment("student", teacher=str(teacher), loss=KD)
    again = make_experiment("again", teacher=str(alone), loss=KD)
    script(train, "--model_dir", alone)
    script(train, "--model_dir", again)
    assert script(train, "--model_dir", student, "--train_teacher").status == 0
    assert states_equal(alone / "last.pth.tar", teacher / "last.pth.tar")
    assert states_equal(again / "last.pth.tar", student / "last.pth.tar")
    assert "val accuracy" not in (teacher / "train.log").read_text()  # that line is the student's


def test_a_chain_of_teachers_is_trained_from_its_end_and_a_circle_is_refused(
    script: Script, make_experiment: Make, tmp_path: Path
) -> None:
    last = make_experiment("c")
    middle = make_experiment("b", teacher=str(last), loss=KD)
    first = make_experiment("a", teacher=str(middle), loss=KD)
    assert script(train, "--model_dir", first, "--train_teacher").status == 0
    assert [read_status(folder) for folder in (first, middle, last)] == ["completed"] * 3
    make_experiment("d", teacher=str(tmp_path / "e"), loss=KD)
    ended = script(train, "--model_dir", make_experiment("e", teacher=str(tmp_path / "d"), loss=KD), "--train_teacher")
    assert ended.status == 2
    assert "break the circle" in ended.err


def test_three_generations_are_trained_from_nothing_each_from_the_one_before(
    script: Script, make_experiment: Make
) -> None:
    first = make_experiment("gen0", num_epochs=1)
    second = make_experiment("gen1", num_epochs=1, seed=2, teacher=str(first), loss=KD)
    third = make_experiment("gen2", num_epochs=1, seed=3, teacher=str(second), loss=KD)
    last = make_experiment("ensemble", num_epochs=1, teacher=[str(second), str(third)], loss=KD)
    ended = script(train, "--model_dir", last, "--train_teacher")
    assert ended.status == 0, ended
    order = [line for line in ended.out.splitlines() if line.startswith("first the teacher, ")]
    assert order == [f"first the teacher, {folder}" for folder in (second, first, third)]
    for student, teachers in ((second, [first]), (third, [second]), (last, [second, third])):
        run = json.loads((student / "run.json").read_text())
        assert run["status"] == "completed"
        assert run["teacher"] == "+".join(load_checkpoint(teacher / "best.pth.tar")[1] for teacher in teachers)
    before = {folder: (folder / "last.pth.tar").read_bytes() for folder in (first, second, third)}
    assert script(train, "--model_dir", last, "--restart", "--train_teacher").status == 0
    assert {folder: (folder / "last.pth.tar").read_bytes() for folder in before} == before


def test_of_a_chain_the_link_that_is_missing_is_named(script: Script, make_experiment: Make, tmp_path: Path) -> None:
    teacher = make_experiment("teacher", num_epochs=0)
    assistant = make_experiment("assistant", num_epochs=0, teacher=str(teacher), loss=KD)
    student = make_experiment("student", num_epochs=0, teacher=str(assistant), loss=KD)
    assert script(train, "--model_dir", teacher).status == 0
    ended = script(train, "--model_dir", student)
    assert ended.status == 2
    assert ended.err.startswith(f"teacher {assistant} has no best.pth.tar; train it with: ")
    assert "--train_teacher" in ended.err
    assert ended.err.count("\n") == 1
    orphan = make_experiment("orphan", num_epochs=0, teacher=str(tmp_path / "nowhere"), loss=KD)
    last = make_experiment("last", num_epochs=0, teacher=[str(teacher), str(orphan)], loss=KD)
    ended = script(train, "--model_dir", last, "--train_teacher")
    assert ended.status == 2
    assert ended.err == (
        f"teacher {tmp_path / 'nowhere'} does not exist or has no params.json; name an experiment directory\n"
    )
    assert [read_status(folder) for folder in (orphan, last)] == ["pending"] * 2


def test_a_circle_over_three_directories_is_refused_and_none_of_them_is_trained(
    script: Script, make_experiment: Make, tmp_path: Path
) -> None:
    other = str(make_experiment("other", num_epochs=0))
    a, b, c = (str(tmp_path / name) for name in "abc")
    for name, teacher in (("a", [other, b]), ("b", c), ("c", [a, other])):
        make_experiment(name, num_epochs=0, teacher=teacher, loss=KD)
    for folder in (a, b, c):
        ended = script(train, "--model_dir", folder, "--train_teacher")
        assert ended.status == 2
        assert ended.err == f"teacher {folder} is taught by its own student; break the circle\n"
    assert [read_status(Path(folder)) for folder in (a, b, c)] == ["pending"] * 3


def test_a_teachers_own_failure_ends_its_students_command(script: Script, make_experiment: Make) -> None:
    teacher = make_experiment("teacher", optimizer={"name": "adam", "learning_rate": -1})
    student = make_experiment("student", teacher=str(teacher), loss=KD)
    ended = script(train, "--model_dir", student, "--train_teacher")
    assert ended.status == 2
    assert ended.err == f"{teacher}/params.json: optimizer.learning_rate: -1 is not above 0.0\n"
    assert not (student / "run.json").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_in_mid_epoch_saves_and_the_same_command_ends_with_the_same_bits(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, precision: str
) -> None:
    whole = make_experiment("whole", precision=precision)
    script(train, "--model_dir", whole)
    cut = make_experiment("cut", precision=precision)
    steps = 0
    step = torch.optim.Adam.step

    def signalling(self: torch.optim.Adam, *args: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 7:  # 5 steps an epoch: the second step of the second epoch
            signal.raise_signal(number)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", signalling)
    ended = script(train, "--model_dir", cut)
    assert ended.status == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, 75)
    assert f"stopped by {number.name} in epoch 2/2 after step 2" in ended.err
    assert read_status(cut) == "interrupted"
    state = load_checkpoint(cut / "last.pth.tar")[0]
    assert (state["epoch"], state["step"]) == (1, 2)
    ended = script(train, "--model_dir", cut)
    assert ended.status == 0
    assert "going on after epoch 1, step 2" in ended.out
    assert states_equal(whole / "last.pth.tar", cut / "last.pth.tar")
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()
    for which in ("best", "last"):
        name = f"metrics_val_{which}_weights.json"
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert len(json.loads((cut / "run.json").read_text())["attempts"]) == 2


ELABORATE = {
    "overhaul, freeze, momentum reset": {
        "student": {"freeze": ["conv1"], "freeze_bn": True, "init_from": "TEACHER"},
        "loss": [{"name": "ce"}, {"name": "overhaul", "weight": 1e-4}],
        "optimizer": {"name": "sgd", "learning_rate": 0.01},
        "schedule": {"name": "multistep", "milestones": [1, 3], "reset_momentum": True},
    },
    "fitnets, plateau, rmsprop": {
        "loss": [{"name": "ce"}, {"name": "fitnets", "weight": 1.0}],
        "optimizer": {"name": "rmsprop", "learning_rate": 0.01},
        "schedule": {"name": "plateau", "patience": 0, "metric": "val.accuracy"},
    },
    "memories, a weight that rises": {
        "loss": [
            {"name": "ce"},
            {"name": "crd", "negatives": 32, "weight": {"name": "linear", "start": 0.0, "end": 0.8}},
            {"name": "ctkd", "reversal_epochs": 2},
        ],
    },
    "peers": {
        "loss": [{"name": "ce"}, {"name": "dml", "peers": [{"name": "tiny", "dropout_rate": 0.3}, {"name": "tiny"}]}]
    },
    "two views": {
        "dataset": {"second_augmentation": ["crop", "rand_augment"], "num_workers": 0},
        "loss": {"name": "mlkd", "mask": "paper"},
    },
    "unlabelled images": {
        "dataset": {"subset_fraction": 0.5},
        "unlabelled": {"name": "rest", "batch_size": 7},
        "loss": [{"name": "ce"}, {"name": "kd", "alpha": 1.0, "temperature": 4.0}],
        "log_gradient_norms": True,
    },
    "a stage of its own": {"loss": [{"name": "ce"}, {"name": "ft", "initial_epochs": 1}]},
    "the teacher's classifier": {
        "loss": [{"name": "simkd"}, {"name": "ce", "weight": 0.5}],
        "student": {"freeze_bn": True},
    },
    "noise, warm restarts, transforms": {
        "dataset": {"augmentation": ["crop", {"name": "rotation", "degrees": 5}, "random_erasing"], "num_workers": 0},
        "loss": {**KD, "teacher_noise_std": 0.5, "teacher_noise_probability": 0.5},
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
        "schedule": {"name": "warm_restarts", "first_cycle_epochs": 1.5, "per": "iteration"},
    },
}


@pytest.mark.parametrize("changes", ELABORATE.values(), ids=ELABORATE)
def test_whatever_a_run_trains_with_it_resumes_exactly(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    teacher = make_experiment("teacher", num_epochs=1)
    assert script(train, "--model_dir", teacher).status == 0
    changes = json.loads(json.dumps(changes).replace("TEACHER", str(teacher)))
    whole, cut = (make_experiment(name, num_epochs=4, teacher=str(teacher), **changes) for name in ("whole", "cut"))
    assert script(train, "--model_dir", whole).status == 0
    for stop in (3, 9):  # mid-epoch, twice
        steps = 0
        show = train.EpochBar.show

        def signalling(self: train.EpochBar, *arguments: Any, show: Any = show, stop: int = stop) -> None:
            nonlocal steps
            steps += 1
            if steps == stop:
                signal.raise_signal(signal.SIGTERM)
            show(self, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(train.EpochBar, "show", signalling)
            assert script(train, "--model_dir", cut).status == 143
        assert load_checkpoint(cut / "last.pth.tar")[0]["step"] > 0
    assert script(train, "--model_dir", cut).status == 0
    assert states_equal(whole / "last.pth.tar", cut / "last.pth.tar")
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()
    schedules = [load_checkpoint(folder / "last.pth.tar")[0]["schedule"] for folder in (whole, cut)]
    assert schedules[0] == schedules[1]


def test_a_frozen_student_may_learn_by_a_projector(script: Script, make_student: Make) -> None:
    frozen = {"width": 4, "freeze": ["conv1", "bn1", "conv2", "bn2"]}
    folder = make_student("run", loss={"name": "simkd"}, student=frozen)
    assert script(train, "--model_dir", folder).status == 0
    first, last = (record["train"]["simkd"] for record in read_journal(folder))
    assert last < first


def test_no_epoch_of_a_losss_own_stage_is_the_best_or_counts_for_plateau(script: Script, make_student: Make) -> None:
    schedule = {"name": "plateau", "patience": 0, "factor": 0.5, "metric": "val.accuracy", "threshold": 0.99}
    loss = [{"name": "ce"}, {"name": "ft", "initial_epochs": 3}]
    good = make_student("good", num_epochs=12)
    script(train, "--model_dir", good)
    changes = {"loss": loss, "schedule": schedule, "optimizer": {"name": "sgd", "learning_rate": 1.0, "momentum": 0.0}}
    folder = make_student("run", num_epochs=4, student={"init_from": str(good)}, **changes)
    assert script(train, "--model_dir", folder).status == 0
    journal = read_journal(folder)
    assert journal[0]["val"]["accuracy"] >= journal[3]["val"]["accuracy"], "or the claim would say nothing"
    best = json.loads((folder / "metrics_val_best_weights.json").read_text())
    assert (best["epoch"], best["accuracy"]) == (4, journal[3]["val"]["accuracy"])
    assert [record["learning_rate"] for record in journal] == [1.0] * 4


def test_a_run_that_is_stopped_in_a_losss_own_stage_goes_on_without_a_best(
    script: Script, make_student: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = [{"name": "ce"}, {"name": "ft", "initial_epochs": 2}]
    whole, cut = (make_student(name, num_epochs=3, loss=loss) for name in ("whole", "cut"))
    script(train, "--model_dir", whole)
    original = experiment.Experiment.stop_if_asked

    def stop(self: experiment.Experiment, where: str, **options: Any) -> None:
        if where == "after epoch 1/3":
            signal.raise_signal(signal.SIGTERM)
        original(self, where, **options)

    monkeypatch.setattr(experiment.Experiment, "stop_if_asked", stop)
    assert script(train, "--model_dir", cut).status == 143
    assert not (cut / "best.pth.tar").exists()
    assert not (cut / "metrics_val_best_weights.json").exists()
    monkeypatch.setattr(experiment.Experiment, "stop_if_asked", original)
    assert script(train, "--model_dir", cut).status == 0
    assert read_journal(cut) == read_journal(whole)
    assert states_equal(cut / "best.pth.tar", whole / "best.pth.tar")


def test_a_student_that_a_stage_cannot_reach_is_one_line(script: Script, make_student: Make) -> None:
    frozen = {"width": 8, "freeze": ["conv1", "bn1", "conv2", "bn2"]}
    folder = make_student("run", loss=[{"name": "ce"}, {"name": "fsp", "initial_epochs": 1}], student=frozen)
    ended = script(train, "--model_dir", folder)
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith("in epoch 1 nothing that learns is reached by the loss; freeze less")


def test_plateau_lowers_the_rate_when_validation_stops_improving(script: Script, make_experiment: Make) -> None:
    schedule = {"name": "plateau", "patience": 0, "factor": 0.5, "metric": "val.loss", "threshold": 0.99}
    folder = make_experiment(num_epochs=4, schedule=schedule)  # no epoch is that much better than the first
    assert script(train, "--model_dir", folder).status == 0
    assert [record["learning_rate"] for record in read_journal(folder)] == [0.01, 0.01, 0.005, 0.0025]


def test_a_losss_own_weights_begin_as_the_seed_says(script: Script, make_experiment: Make) -> None:
    teacher = make_experiment("teacher", num_epochs=1)
    assert script(train, "--model_dir", teacher).status == 0
    loss = [{"name": "ce"}, {"name": "fitnets"}]
    runs = [make_experiment(name, num_epochs=0, teacher=str(teacher), loss=loss) for name in ("one", "other")]
    third = make_experiment("third", num_epochs=0, teacher=str(teacher), loss=loss, seed=2)
    for folder in (*runs, third):
        torch.seed()
        assert script(train, "--model_dir", folder).status == 0
    one, other, third_dict = (repr_bits(load_checkpoint(f / "last.pth.tar")[0]["loss_dict"]) for f in (*runs, third))
    assert one == other != third_dict


def test_where_the_starting_weights_lie_may_change(script: Script, make_experiment: Make) -> None:
    first = make_experiment("first", num_epochs=1)
    folder = make_experiment("folder", num_epochs=1, student={"init_from": str(first)})
    for path in (first, folder):
        assert script(train, "--model_dir", path).status == 0
    moved = first.rename(first.with_name("moved"))
    ended = script(train, "--model_dir", folder, "--overrides", "num_epochs=2", f"student.init_from={moved}")
    assert ended.status == 0, ended


def test_a_signal_during_validation_saves_and_resumes_exactly(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eval_batch_size": 4}
    whole, cut = make_experiment("whole", dataset=options), make_experiment("cut", dataset=options)
    script(train, "--model_dir", whole)
    original = train.evaluate

    def signalling(net: torch.nn.Module, loader: object, **options: object) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return original(net, loader, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate", signalling)
        assert script(train, "--model_dir", cut).status == 143
    assert load_checkpoint(cut / "last.pth.tar")[0]["step"] == 5  # all of the epoch, not yet validated
    assert script(train, "--model_dir", cut).status == 0
    assert states_equal(whole / "last.pth.tar", cut / "last.pth.tar")
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()


def test_periodic_saves_in_mid_epoch_do_not_change_the_result(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, often = make_experiment("whole"), make_experiment("often", checkpoint_minutes=1e-9)
    script(train, "--model_dir", whole)
    saved = []
    save = experiment.Experiment.save
    monkeypatch.setattr(
        experiment.Experiment, "save", lambda self, state: (saved.append(state["step"]), save(self, state))
    )
    script(train, "--model_dir", often)
    assert saved.count(0) == 2
    assert {1, 2, 3, 4, 5} <= set(saved)
    assert states_equal(whole / "last.pth.tar", often / "last.pth.tar")


def test_divergence_stops_the_run_and_never_becomes_best(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_experiment(num_epochs=5)
    script(train, "--model_dir", folder, "--overrides", "num_epochs=1")
    kept = {name: (folder / name).read_bytes() for name in ("best.pth.tar", "last.pth.tar", "metrics.jsonl")}
    step = torch.optim.Adam.step

    def poisoned(self: torch.optim.Adam, *args: object) -> object:
        result = step(self, *args)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))
        return result

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", poisoned)
        ended = script(train, "--model_dir", folder)
    assert ended.status == 1
    assert "not finite" in ended.err
    assert "lower the learning rate" in ended.err
    assert "Traceback" not in ended.err
    run = json.loads((folder / "run.json").read_text())
    assert (run["status"], run["reason"]) == ("failed", "diverged")
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert "not finite" in (folder / "train.log").read_text()


def test_a_fault_in_the_program_is_recorded_with_its_traceback(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_experiment()
    monkeypatch.setattr(train, "train_epoch", lambda *_, **__: 1 / 0)
    ended = script(train, "--model_dir", folder)
    assert ended.status == 1
    assert "ZeroDivisionError" in ended.err
    assert "ZeroDivisionError" in (folder / "train.log").read_text()
    assert json.loads((folder / "run.json").read_text())["reason"] == "ZeroDivisionError"


def test_tensorboard_shows_rate_terms_accuracies_and_speed_once_per_epoch(
    script: Script, make_experiment: Make
) -> None:
    from tensorboardX.proto.event_pb2 import Event

    folder = make_experiment()
    script(train, "--model_dir", folder, "--overrides", "num_epochs=1")
    script(train, "--model_dir", folder)
    seen: dict[str, list[int]] = {}
    files = sorted(folder.glob("events.out.tfevents.*"))
    assert len(files) == 2  # one per attempt, never one file for two writers
    for file in files:
        data, at = file.read_bytes(), 0
        while at < len(data):  # record: length (8 bytes), its crc (4), content, its crc (4)
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                seen.setdefault(value.tag, []).append(event.step)
    tags = {"learning_rate", "train/ce", "train/accuracy", "val/accuracy", "val/loss", "images_per_second"}
    assert tags <= seen.keys()
    assert all(sorted(steps) == [1, 2] for steps in seen.values())


def test_quiet_prints_nothing_and_several_directories_are_refused(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    ended = script(train, "--model_dir", folder, "--quiet")
    assert (ended.status, ended.out, ended.err) == (0, "", "")
    ended = script(train, "--model_dir", folder, folder)
    assert ended.status == 2
    assert "--check" in ended.err


def test_the_teachers_best_weights_are_used_and_last_on_request(script: Script, make_experiment: Make) -> None:
    teacher = make_experiment("teacher", num_epochs=3)
    script(train, "--model_dir", teacher)
    for which in ("best", "last"):
        student = make_experiment(
            f"student_{which}", teacher={"model_dir": str(teacher), "restore_file": which}, loss=KD
        )
        assert script(train, "--model_dir", student).status == 0
        run = json.loads((student / "run.json").read_text())
        assert run["teacher"] == load_checkpoint(teacher / f"{which}.pth.tar")[1]


def test_val_metrics_of_the_run_are_what_evaluate_finds(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    script(train, "--model_dir", folder)
    assert script(evaluate, "--model_dir", folder, "--split", "val").status == 0
    recorded = json.loads((folder / "metrics_val_best_weights.json").read_text())
    assert {"accuracy", "cross_entropy", "epoch"} <= recorded.keys()


# --- what a student begins with, and which of it learns ---


def test_pretrain_fine_tune_distil_runs_as_three_directories_each_naming_the_one_before(
    script: Script, make_experiment: Make
) -> None:
    """Seed 001's chain: the classifier is new for another number of classes, the frozen rest stays bit by bit."""
    eight = {"num_classes": 8}
    first = make_experiment("pretrained", num_epochs=1, student={"width": 8}, dataset=eight)
    tuned = make_experiment(
        "tuned", student={"width": 8, "init_from": str(first), "freeze": ["conv1", "conv2"], "freeze_bn": True}
    )
    student = make_experiment("student", teacher=str(tuned), loss=KD)
    for folder in (first, tuned, student):
        assert script(train, "--model_dir", folder).status == 0
    before, after = (load_checkpoint(folder / "last.pth.tar")[0]["state_dict"] for folder in (first, tuned))
    for name in before:
        if name.startswith(("conv", "bn")) and name not in ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"):
            assert torch.equal(before[name], after[name]), name
    assert before["linear.weight"].shape[0] == 8
    assert after["linear.weight"].shape[0] == 4
    log = (tuned / "train.log").read_text()
    assert f"begins with the weights of {first} but for the classifier, which is new" in log
    run = json.loads((tuned / "run.json").read_text())
    assert run["init"] == load_checkpoint(first / "best.pth.tar")[1]


def test_without_freeze_bn_the_statistics_of_a_frozen_backbone_move(script: Script, make_experiment: Make) -> None:
    first = make_experiment("first", num_epochs=1)
    tuned = make_experiment("tuned", student={"init_from": str(first), "freeze": ["conv1", "bn1"]})
    for folder in (first, tuned):
        assert script(train, "--model_dir", folder).status == 0
    before, after = (load_checkpoint(folder / "last.pth.tar")[0]["state_dict"] for folder in (first, tuned))
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert torch.equal(before["bn1.weight"], after["bn1.weight"])
    assert not torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])


def test_training_begins_with_the_very_weights_of_a_file(script: Script, make_experiment: Make) -> None:
    first, kept = make_experiment("first"), make_experiment("kept", num_epochs=0)
    assert script(train, "--model_dir", first).status == 0
    override = f"student.init_from={first / 'last.pth.tar'}"
    assert script(train, "--model_dir", kept, "--overrides", override).status == 0
    assert states_equal_weights(first / "last.pth.tar", kept / "best.pth.tar")


def states_equal_weights(a: Path, b: Path) -> bool:
    return repr_bits(load_checkpoint(a)[0]["state_dict"]) == repr_bits(load_checkpoint(b)[0]["state_dict"])


@pytest.mark.parametrize(
    ("init_from", "message"),
    [
        ("nowhere", "student.init_from: nowhere does not exist or has no params.json"),
        ("nowhere.pth.tar", "student.init_from: nowhere.pth.tar: does not exist"),
    ],
)
def test_weights_that_are_not_there_are_one_line_before_any_work(
    script: Script, make_experiment: Make, init_from: str, message: str
) -> None:
    folder = make_experiment(student={"init_from": init_from})
    before = snapshot(folder)
    ended = script(train, "--model_dir", folder)
    assert ended.status == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert snapshot(folder) == before


def test_weights_of_another_net_are_one_line(script: Script, make_experiment: Make) -> None:
    other = make_experiment("other", student={"width": 8}, num_epochs=1)
    folder = make_experiment("folder", student={"init_from": str(other)})
    assert script(train, "--model_dir", other).status == 0
    ended = script(train, "--model_dir", folder)
    assert ended.status == 2
    assert "its weights do not fit the student: " in ended.err
    assert str(folder / "params.json") in ended.err


def test_a_run_goes_on_only_with_the_weights_that_it_began_with(script: Script, make_experiment: Make) -> None:
    first = make_experiment("first", num_epochs=1)
    folder = make_experiment("folder", student={"init_from": str(first)})
    assert script(train, "--model_dir", first).status == 0
    assert script(train, "--model_dir", folder).status == 0
    assert script(train, "--model_dir", first, "--overrides", "num_epochs=2").status == 0
    ended = script(train, "--model_dir", folder, "--overrides", "num_epochs=3")
    assert ended.status == 2
    assert "the checkpoint of student.init_from or --restore_file is not what this run began with" in ended.err


def test_with_no_epochs_the_net_is_scored_and_kept_as_it_begins(script: Script, make_experiment: Make) -> None:
    kept = make_experiment("kept", num_epochs=0)
    student = make_experiment("student", teacher=str(kept), loss=KD)
    assert script(train, "--model_dir", kept).status == 0
    assert read_status(kept) == "completed"
    state, _ = load_checkpoint(kept / "best.pth.tar")
    assert state["epoch"] == 0
    assert [record["epoch"] for record in read_journal(kept)] == [0]
    assert script(evaluate, "--model_dir", kept).status == 0
    assert script(train, "--model_dir", student).status == 0
    again = script(train, "--model_dir", kept)
    assert again.status == 0
    assert "Nothing to do" in again.out
    assert script(train, "--model_dir", kept, "--overrides", "num_epochs=1").status == 0
    assert [record["epoch"] for record in read_journal(kept)] == [0, 1]


def test_a_net_that_was_kept_is_not_kept_again(script: Script, make_experiment: Make) -> None:
    kept = make_experiment("kept", num_epochs=0)
    assert script(train, "--model_dir", kept).status == 0
    run = json.loads((kept / "run.json").read_text())
    (kept / "run.json").write_text(json.dumps(run | {"status": "running"}))  # killed just before its end
    assert script(train, "--model_dir", kept).status == 0
    assert [record["epoch"] for record in read_journal(kept)] == [0]


# --- checkpoints of the ancestor ---


def write_ancestors(path: Path, weights: dict[str, torch.Tensor], prefix: str = "", **extra: object) -> None:
    named = {prefix + name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    torch.save({"epoch": 5, "state_dict": named, **extra}, path)


@pytest.mark.parametrize(("prefix", "key"), [("", "optim_dict"), ("module.", "optimizer")])
def test_a_checkpoint_of_the_ancestor_teaches_like_ours(
    script: Script, make_experiment: Make, prefix: str, key: str
) -> None:
    teacher = make_experiment("teacher", num_epochs=1)
    assert script(train, "--model_dir", teacher).status == 0
    foreign = make_experiment("foreign")
    state = load_checkpoint(teacher / "best.pth.tar")[0]
    write_ancestors(foreign / "best.pth.tar", state["state_dict"], prefix, **{key: state["optim_dict"]})
    students = [make_experiment(f"of_{folder.name}", teacher=str(folder), loss=KD) for folder in (teacher, foreign)]
    for student in students:
        ended = script(train, "--model_dir", student)
        assert ended.status == 0, ended
    assert read_journal(students[0]) == read_journal(students[1])
    assert states_equal(students[0] / "last.pth.tar", students[1] / "last.pth.tar")


def test_a_teachers_own_normalisation_can_be_given(script: Script, make_experiment: Make) -> None:
    """A teacher of weights w on x / std equals one of std 2 with first weights 2 w."""
    teacher = make_experiment("teacher", num_epochs=1, dataset={"mean": [0.5] * 3, "std": [0.25] * 3})
    assert script(train, "--model_dir", teacher).status == 0
    weights = dict(load_checkpoint(teacher / "best.pth.tar")[0]["state_dict"])
    weights["conv1.weight"] = 2 * weights["conv1.weight"]
    foreign = make_experiment("foreign")
    write_ancestors(foreign / "best.pth.tar", weights)
    section = {"model_dir": str(foreign), "mean": [0.5] * 3, "std": [0.5] * 3}
    plain = make_experiment("plain", teacher=str(teacher), loss=KD)
    own = make_experiment("own", teacher=section, loss=KD)
    for folder in (plain, own):
        assert script(train, "--model_dir", folder).status == 0
    one, other = read_journal(plain)[-1]["train"], read_journal(own)[-1]["train"]
    assert one == pytest.approx(other, rel=1e-4)
    section["std"] = [1.0] * 3
    wrong = make_experiment("wrong", teacher=section, loss=KD)
    assert script(train, "--model_dir", wrong).status == 0
    assert read_journal(wrong)[-1]["train"] != pytest.approx(one, rel=1e-3)


def test_restore_file_begins_with_the_ancestors_weights_and_keeps_its_files(
    script: Script, make_experiment: Make
) -> None:
    donor, folder = make_experiment("donor"), make_experiment("folder", num_epochs=1)
    assert script(train, "--model_dir", donor).status == 0
    weights = load_checkpoint(donor / "best.pth.tar")[0]["state_dict"]
    for name in ("last", "best"):
        write_ancestors(folder / f"{name}.pth.tar", weights)
    files = {name: (folder / f"{name}.pth.tar").read_bytes() for name in ("last", "best")}
    refused = script(train, "--model_dir", folder)
    assert refused.status == 2
    assert "--restore_file last" in refused.err
    assert {name: (folder / f"{name}.pth.tar").read_bytes() for name in files} == files
    ended = script(train, "--model_dir", folder, "--restore_file", "last")
    assert ended.status == 0, ended
    assert {name: (folder / f"kept_{name}.pth.tar").read_bytes() for name in files} == files
    twin = make_experiment("twin", num_epochs=1, student={"init_from": str(donor)})
    assert script(train, "--model_dir", twin).status == 0
    assert read_journal(folder) == read_journal(twin)
    more = script(train, "--model_dir", folder, "--restore_file", "last", "--overrides", "num_epochs=2")
    assert more.status == 0, more
    assert len(read_journal(folder)) == 2
    assert script(train, "--model_dir", folder, "--restore_file", "last", "--restart").status == 0
    assert (folder / "kept_last.pth.tar").read_bytes() == files["last"]


def test_restore_file_last_of_our_own_is_the_resume_that_happens_anyway(script: Script, make_experiment: Make) -> None:
    folder, twin = make_experiment("folder"), make_experiment("twin")
    for path in (folder, twin):
        assert script(train, "--model_dir", path).status == 0
    three = ["--overrides", "num_epochs=3"]
    assert script(train, "--model_dir", folder, "--restore_file", "last", *three).status == 0
    assert script(train, "--model_dir", twin, *three).status == 0
    assert read_journal(folder) == read_journal(twin)
    refused = script(train, "--model_dir", folder, "--restore_file", "best", "--overrides", "num_epochs=4")
    assert refused.status == 2
    assert "a run goes on from its last epoch" in refused.err
    for name in ("last", "best"):
        refused = script(train, "--model_dir", folder, "--restore_file", name, "--restart")
        assert refused.status == 2
        assert "--restart removes it" in refused.err
    assert len(read_journal(folder)) == 3


@pytest.mark.parametrize(
    ("kind", "name"),  # a last.pth.tar of ours is a run, to go on with
    [("ours", "best"), *((kind, name) for kind in ("ancestor's", "objects", "damaged") for name in ("last", "best"))],
)
def test_a_checkpoint_that_was_put_there_is_never_written_over(
    script: Script, make_experiment: Make, kind: str, name: str
) -> None:
    donor, folder = make_experiment("donor", num_epochs=1), make_experiment("folder", num_epochs=1)
    assert script(train, "--model_dir", donor).status == 0
    path = folder / f"{name}.pth.tar"
    weights = load_checkpoint(donor / "best.pth.tar")[0]["state_dict"]
    if kind == "ancestor's":
        write_ancestors(path, weights)
    elif kind == "objects":  # as many scripts save; nothing but tensors and plain types is read
        torch.save({"state_dict": weights, "args": Path("x")}, path)
    else:
        path.write_bytes((donor / "best.pth.tar").read_bytes()[: None if kind == "ours" else -200])
    content = path.read_bytes()
    refused = script(train, "--model_dir", folder)
    assert refused.status == 2
    assert f"{path}: no run of this directory has written it" in refused.err
    bad = script(train, "--model_dir", folder, "--restore_file", name, "--overrides", "student.width=5")
    assert bad.status == 2
    assert path.read_bytes() == content
    assert script(train, "--model_dir", folder, "--restart").status == 0
    assert (folder / f"kept_{name}.pth.tar").read_bytes() == content
    assert script(train, "--model_dir", folder, "--restart").status == 0
    assert (folder / f"kept_{name}.pth.tar").read_bytes() == content


def test_a_finished_run_is_not_taken_for_one_with_another_teacher(script: Script, make_experiment: Make) -> None:
    teachers = [make_experiment(f"teacher{seed}", num_epochs=1, seed=seed) for seed in (1, 2)]
    for folder in teachers:
        assert script(train, "--model_dir", folder).status == 0
    copied = shutil.copytree(teachers[0], teachers[0].with_name("copied"))
    student = make_experiment("student", num_epochs=1, teacher=str(teachers[0]), loss=KD)
    assert script(train, "--model_dir", student).status == 0
    other = script(train, "--model_dir", student, "--overrides", f"teacher.model_dir={teachers[1]}")
    assert other.status == 2
    assert "the teacher is not what this run began with" in other.err
    assert script(train, "--model_dir", student, "--overrides", f"teacher.model_dir={copied}").status == 0
    assert len(read_journal(student)) == 1


def test_a_directory_cannot_begin_with_itself(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    ended = script(train, "--model_dir", folder, "--overrides", f"student.init_from={folder}")
    assert ended.status == 2
    assert "student.init_from: the directory itself" in ended.err


def test_restore_file_names_what_is_not_there(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    for name, told in (("best", f"{folder}/best.pth.tar: does not exist"), ("a/b.pth.tar", "a/b.pth.tar: does not")):
        ended = script(train, "--model_dir", folder, "--restore_file", name)
        assert ended.status == 2
        assert told in ended.err
    assert sorted(path.name for path in folder.iterdir()) == ["params.json"]


def test_a_run_of_an_older_version_goes_on_when_an_option_has_come_since(script: Script, make_experiment: Make) -> None:
    folder, twin = make_experiment("folder"), make_experiment("twin")
    for path in (folder, twin):
        assert script(train, "--model_dir", path).status == 0
    run = json.loads((folder / "run.json").read_text())
    del run["params"]["student"]["freeze_bn"], run["params"]["dataset"]["validate_on"]
    (folder / "run.json").write_text(json.dumps(run))
    state, _ = load_checkpoint(folder / "last.pth.tar")
    del state["params"]["student"]["freeze_bn"], state["params"]["dataset"]["validate_on"]
    save_checkpoint(folder / "last.pth.tar", state)
    for path in (folder, twin):
        assert script(train, "--model_dir", path, "--overrides", "num_epochs=3").status == 0
    assert read_journal(folder) == read_journal(twin)
    assert script(train, "--model_dir", folder, "--overrides", "num_epochs=4", "student.freeze_bn=true").status == 2


# --- the ancestor's own params.json ---

UPSTREAM = json.loads((ROOT / "tests" / "model" / "upstream_params.json").read_text())


def test_all_129_flat_files_of_the_ancestor_pass_the_check(script: Script, tmp_path: Path) -> None:
    for path, raw in UPSTREAM.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(raw, indent=4))
    folders = [tmp_path / Path(path).parent for path in UPSTREAM]
    before = snapshot(tmp_path)
    ended = script(train, "--check", "--model_dir", *folders)
    assert ended.status == 0, ended.err
    assert "129 of 129 params.json pass the check" in ended.out
    assert ended.out.count("SELECTED ON THE TEST SET") == 129
    assert snapshot(tmp_path) == before


def write_images(folder: Path) -> Path:
    """Writes ten classes of ten training and two test images, each class of a colour of its own."""
    for label in range(10):
        for split, number in (("train", 10), ("test", 2)):
            target = folder / split / f"class{label}"
            target.mkdir(parents=True)
            for position in range(number):
                Image.new("RGB", (32, 32), (25 * label, 20 * position, 255 - 25 * label)).save(
                    target / f"{position}.png"
                )
    return folder


def test_a_flat_teacher_and_its_flat_student_train_as_the_ancestor_did(script: Script, tmp_path: Path) -> None:
    flat = UPSTREAM["experiments/cnn_distill/params.json"] | {"num_epochs": 1, "batch_size": 20, "num_channels": 4}
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    for folder, raw in ((teacher, flat | {"model_version": "cnn"}), (student, flat)):
        folder.mkdir()
        (folder / "params.json").write_text(json.dumps(raw))
    images = write_images(tmp_path / "images")
    options = ["dataset.name=image_folder", f"dataset.data_dir={images}"]
    assert script(train, "--model_dir", teacher, "--overrides", *options).status == 0
    ended = script(train, "--model_dir", student, "--overrides", *options, f"teacher.model_dir={teacher}")
    assert ended.status == 0, ended
    log = (student / "train.log").read_text()
    assert "SELECTED ON THE TEST SET" in log
    assert "val IS THE TEST SPLIT" in log
    run = json.loads((student / "run.json").read_text())
    assert run["params"]["loss"] == run["params"]["loss"] | {"name": "kd", "temperature": 20.0, "reduction": "mean"}
    assert run["params"]["optimizer"]["name"] == "adam"
    assert json.loads((student / "metrics_val_best_weights.json").read_text())["selected_on"] == "test"
    assert read_journal(student)[0]["train"]["kd"] > 0
    assert script(evaluate, "--model_dir", student).status == 0


@pytest.mark.filterwarnings("default")
def test_where_nothing_can_be_compiled_training_goes_on_and_the_log_says_so(
    script: Script, make_experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object) -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no C++ compiler"), None)

    plain, other = make_experiment("plain"), make_experiment("other", compile="on")
    script(train, "--model_dir", plain)
    monkeypatch.setattr(torch, "compile", lambda _: no_compiler)
    assert script(train, "--model_dir", other).status == 0
    assert states_equal(plain / "last.pth.tar", other / "last.pth.tar")
    log = (other / "train.log").read_text()
    assert "compile on" in log
    assert "torch.compile gave up: " in log
    assert "no C++ compiler" in log


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


def shas(folders: list[Path]) -> str:
    return "+".join(load_checkpoint(folder / "best.pth.tar")[1] for folder in folders)


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_two_teachers_teach_together_and_twice_gives_the_same_files(
    script: Script, make_experiment: Make, teachers: list[Path], combine: str
) -> None:
    frozen = [snapshot(folder) for folder in teachers]
    options: dict[str, Any] = {"teacher": [str(teachers[0]), {"model_dir": str(teachers[1]), "weight": 3}], "loss": KD}
    one, two = (make_experiment(name, **options, combine_teachers=combine) for name in ("one", "two"))
    ended = script(train, "--model_dir", one)
    assert ended.status == 0, ended
    assert script(train, "--model_dir", two).status == 0
    for folder in teachers:
        own = load_checkpoint(folder / "best.pth.tar")[0]["metrics"]["accuracy"]
        assert f"teacher {folder}: tiny, val accuracy {own:.4f} here, {own:.4f} in its own run" in ended.out
    of = {"probabilities": "probabilities at T 4", "logits": "logits"}[combine]
    assert f"2 teachers together, mean of {of} (shares 0.25, 0.75): val accuracy " in ended.out
    assert [snapshot(folder) for folder in teachers] == frozen
    assert json.loads((one / "run.json").read_text())["teacher"] == shas(teachers)
    assert states_equal(one / "last.pth.tar", two / "last.pth.tar")
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()


def test_the_ways_to_combine_and_the_weights_change_what_is_learnt(
    script: Script, make_experiment: Make, teachers: list[Path]
) -> None:
    names, journals = [str(folder) for folder in teachers], set()
    ways: list[dict[str, Any]] = [
        {"teacher": names},
        {"teacher": names, "combine_teachers": "logits"},
        {"teacher": [names[0], {"model_dir": names[1], "weight": 2}]},
        {"teacher": names[0]},
    ]
    for number, options in enumerate(ways):
        folder = make_experiment(f"student{number}", num_epochs=1, loss=KD, **options)
        assert script(train, "--model_dir", folder).status == 0
        journals.add((folder / "metrics.jsonl").read_bytes())
    assert len(journals) == 4


def test_a_list_of_one_teacher_is_that_teacher(script: Script, make_experiment: Make, teachers: list[Path]) -> None:
    plain = make_experiment("plain", num_epochs=1, teacher=str(teachers[0]), loss=KD)
    listed = make_experiment("listed", num_epochs=1, teacher=[{"model_dir": str(teachers[0])}], loss=KD)
    for folder in (plain, listed):
        assert script(train, "--model_dir", folder).status == 0
    assert states_equal(plain / "last.pth.tar", listed / "last.pth.tar")
    runs = [json.loads((folder / "run.json").read_text()) for folder in (plain, listed)]
    assert (runs[0]["params"], runs[0]["teacher"]) == (runs[1]["params"], runs[1]["teacher"])


def test_a_run_under_two_teachers_resumes_exactly(
    script: Script, make_experiment: Make, teachers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = [{"model_dir": str(teachers[0]), "cache": "lazy"}, str(teachers[1])]
    whole, cut = (make_experiment(name, teacher=sections, loss=KD) for name in ("whole", "cut"))
    assert script(train, "--model_dir", whole).status == 0
    steps, show = 0, train.EpochBar.show

    def signalling(self: train.EpochBar, *arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 7:
            signal.raise_signal(signal.SIGTERM)
        show(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train.EpochBar, "show", signalling)
        assert script(train, "--model_dir", cut).status == 143
    assert load_checkpoint(cut / "last.pth.tar")[0]["step"] > 0
    assert script(train, "--model_dir", cut).status == 0
    assert states_equal(whole / "last.pth.tar", cut / "last.pth.tar")
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()


def test_of_several_teachers_one_with_other_weights_is_noticed_and_one_that_was_moved_is_not(
    script: Script, make_experiment: Make, teachers: list[Path]
) -> None:
    student = make_experiment("student", num_epochs=1, teacher=[str(folder) for folder in teachers], loss=KD)
    assert script(train, "--model_dir", student).status == 0
    moved = teachers[1].rename(teachers[1].with_name("moved"))
    for override in (f"teacher.1.model_dir={moved}", "num_epochs=2"):
        overrides = (f"teacher.1.model_dir={moved}", override)
        assert script(train, "--model_dir", student, "--overrides", *overrides).status == 0
    assert len(read_journal(student)) == 2
    assert script(train, "--model_dir", moved, "--restart", "--seed", 9).status == 0
    ended = script(train, "--model_dir", student, "--overrides", f"teacher.1.model_dir={moved}", "num_epochs=3")
    assert ended.status == 2
    assert "the teacher is not what this run began with" in ended.err
    third = make_experiment("third", num_epochs=0)
    names = [str(teachers[0]), str(moved), str(third)]
    ended = script(train, "--model_dir", student, "--overrides", f"teacher={json.dumps(names)}", "num_epochs=3")
    assert ended.status == 2
    assert "holds a run with other params (teacher: " in ended.err


def test_of_several_teachers_the_one_that_is_missing_or_does_not_fit_is_named(
    script: Script, make_experiment: Make, teachers: list[Path], tmp_path: Path
) -> None:
    missing = make_experiment("missing")
    other = make_experiment("other", num_epochs=0, dataset={"num_classes": 3})
    assert script(train, "--model_dir", other).status == 0
    student = make_experiment("student", teacher=[str(teachers[0]), str(missing)], loss=KD)
    ended = script(train, "--model_dir", student)
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert f"teacher {missing} has no best.pth.tar; train it with: " in ended.err
    ended = script(train, "--model_dir", student, "--overrides", f"teacher.1.model_dir={other}")
    assert ended.status == 2
    assert f"teacher {other}: the teacher has 3 classes but the student has 4" in ended.err
    ended = script(train, "--model_dir", student, "--overrides", f"teacher.1.model_dir={student}")
    assert ended.status == 2
    assert "teacher.1.model_dir: the directory itself; name another" in ended.err
    assert not (student / "run.json").exists()
    ended = script(train, "--model_dir", student, "--train_teacher", "--overrides", "num_epochs=1")
    assert ended.status == 0, ended
    assert json.loads((student / "run.json").read_text())["teacher"] == shas([teachers[0], missing])


# --- objectives of several parts ------------------------------------------------------------------------------

WHOLE = {"name": "kd", "alpha": 1.0, "temperature": 4.0}


def test_a_weighted_sum_of_losses_ends_as_the_blend_that_it_equals(
    script: Script, make_experiment: Make, teacher: Path
) -> None:
    parts = [{"name": "ce", "weight": 0.1}, {**WHOLE, "weight": 0.9}]
    blend, summed = (
        make_experiment(name, teacher=str(teacher), loss=loss) for name, loss in (("blend", KD), ("sum", parts))
    )
    for folder in (blend, summed):
        assert script(train, "--model_dir", folder).status == 0
    for one, other in zip(read_journal(blend), read_journal(summed), strict=True):
        assert one["train"] == pytest.approx(other["train"], rel=1e-4)


def test_a_loss_of_weight_0_needs_no_teacher_and_changes_no_bit(
    script: Script, make_experiment: Make, tmp_path: Path
) -> None:
    alone = make_experiment("alone")
    silent = make_experiment(
        "silent", teacher=str(tmp_path / "nobody"), loss=[{"name": "ce"}, {**WHOLE, "weight": 0.0}]
    )
    for folder in (alone, silent):
        assert script(train, "--model_dir", folder).status == 0
    assert states_equal(alone / "last.pth.tar", silent / "last.pth.tar")
    assert (alone / "metrics.jsonl").read_bytes() == (silent / "metrics.jsonl").read_bytes()


def test_options_of_a_list_are_overridden_by_label_and_shown_resolved(
    script: Script, make_experiment: Make, teacher: Path
) -> None:
    folder = make_experiment("student", teacher=str(teacher), loss=[{"name": "ce"}, WHOLE, {"name": "at"}])
    ended = script(train, "--model_dir", folder, "--overrides", "loss.kd.weight=2", "loss.at.weight=0.5")
    assert ended.status == 0, ended
    run = json.loads((folder / "run.json").read_text())
    assert [(loss["name"], loss["weight"]) for loss in run["params"]["loss"]] == [("ce", 1.0), ("kd", 2.0), ("at", 0.5)]
    assert "loss: CE x 1" in ended.out
    assert " + 2 x [" in ended.out
    ended = script(train, "--model_dir", folder, "--overrides", "loss.kd.weight=3", "loss.at.weight=0.5")
    assert ended.status == 2
    assert "loss.kd.weight: 2.0 -> 3.0" in ended.err


def test_every_term_and_its_pull_are_in_the_journal_and_add_up(
    script: Script, make_experiment: Make, teacher: Path
) -> None:
    folder = make_experiment(
        "student", teacher=str(teacher), loss=[{"name": "ce"}, WHOLE, {"name": "sp"}], log_gradient_norms=True
    )
    assert script(train, "--model_dir", folder).status == 0
    for record in read_journal(folder):
        for split in ("train", "val"):
            assert record[split]["loss"] == pytest.approx(sum(record[split][name] for name in ("ce", "kd", "sp")))
        pulls = {name: record["train"][f"{name}_gradient"] for name in ("ce", "kd", "sp")}
        assert pulls["ce"] > 0
        assert pulls["kd"] > 0
        assert pulls["sp"] == 0, "maps do not reach the logits"


def test_peers_are_scored_kept_beside_the_student_and_found_again_by_evaluate(
    script: Script, make_experiment: Make
) -> None:
    folder = make_experiment("cohort", loss=[{"name": "ce"}, {"name": "dml"}])
    assert script(train, "--model_dir", folder).status == 0
    state = load_checkpoint(folder / "best.pth.tar")[0]
    own = {name: value.shape for name, value in state["state_dict"].items()}
    peers = {name: value.shape for name, value in state["loss_dict"].items()}
    assert {name.partition("peers.0.")[2]: shape for name, shape in peers.items()} == own
    first = state["loss_dict"]["losses.dml.peers.0.conv1.weight"]
    assert not torch.equal(first, state["state_dict"]["conv1.weight"])
    assert script(evaluate, "--model_dir", folder, "--split", "val").status == 0
    scores = json.loads((folder / "metrics_val_best_weights.json").read_text())
    best = max(read_journal(folder), key=lambda record: record["val"]["accuracy"])["val"]
    for name in ("accuracy", "peer1_accuracy", "loss", "dml", "peers"):
        assert scores[name] == pytest.approx(best[name])


def test_a_student_with_the_teachers_classifier_is_restored_with_all_its_parts(
    script: Script, make_experiment: Make, teacher: Path
) -> None:
    folder = make_experiment("student", teacher=str(teacher), loss={"name": "simkd"})
    assert script(train, "--model_dir", folder).status == 0
    assert script(evaluate, "--model_dir", folder, "--split", "val").status == 0
    scores = json.loads((folder / "metrics_val_best_weights.json").read_text())
    best = max(read_journal(folder), key=lambda record: record["val"]["accuracy"])["val"]
    for name in ("accuracy", "loss", "simkd"):
        assert scores[name] == pytest.approx(best[name])
    state = load_checkpoint(folder / "best.pth.tar")[0]
    theirs = load_checkpoint(teacher / "best.pth.tar")[0]["state_dict"]
    assert torch.equal(state["state_dict"]["classifier.weight"], theirs["linear.weight"])
    # The projector counts: 4-8 channels here, 8-16 there, so projector 8 -> 8 -> 8 -> 16 with batch norms.
    projector = 8 * 8 + 8 * 8 * 9 + 8 * 16 + 2 * (8 + 8 + 16)
    convolutions = 4 * 3 * 9 + 2 * 4 + 8 * 4 * 9 + 2 * 8
    assert scores["parameters"] == convolutions + projector + 16 * 4 + 4
    # It can teach, like any other.
    pupil = make_experiment("pupil", teacher=str(folder), loss=KD)
    ended = script(train, "--model_dir", pupil)
    assert ended.status == 0, ended


def test_unlabelled_images_come_to_every_step_and_count_as_data(
    script: Script, make_experiment: Make, teacher: Path
) -> None:
    loss = [{"name": "ce"}, WHOLE]
    options = {"teacher": str(teacher), "loss": loss, "dataset": {"subset_fraction": 0.25}}
    without = make_experiment("without", **options)
    folder = make_experiment("with", **options, unlabelled="rest")
    for each in (without, folder):
        ended = script(train, "--model_dir", each)
        assert ended.status == 0, ended
    assert "108 unlabelled images of rest, 108 to a step" in ended.out
    assert not states_equal(without / "last.pth.tar", folder / "last.pth.tar")
    data = [json.loads((each / "run.json").read_text())["data"] for each in (without, folder)]
    assert data[0] != data[1]
    ended = script(train, "--model_dir", without, "--overrides", "unlabelled=rest")
    assert ended.status == 2
    assert script(evaluate, "--model_dir", folder).status == 0


def test_the_teacher_is_not_asked_in_epochs_in_which_no_loss_reads_it(
    script: Script, make_experiment: Make, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    compute = FrozenTeacher.compute

    def counting(self: Any, needs: frozenset[str], batch: Any) -> Any:
        asked.append(len(batch.labels))
        return compute(self, needs, batch)

    monkeypatch.setattr(FrozenTeacher, "compute", counting)
    weight = {"name": "step", "value": 1.0, "milestones": [1], "gamma": 0.0}
    folder = make_experiment(
        "student", num_epochs=3, teacher=str(teacher), loss=[{"name": "ce"}, {**WHOLE, "weight": weight}]
    )
    assert script(train, "--model_dir", folder).status == 0
    assert sum(asked) == 144 + 16, "the images of one epoch and of its validation"
    assert ["kd" in record["train"] for record in read_journal(folder)] == [True, False, False]

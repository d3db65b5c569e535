"""What a user can get wrong: one line that names file, key and remedy, status 2, and nothing on disk changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, Make, Script, merged, snapshot
from PIL import Image

import evaluate
import search_hyperparams
import train

KD = {"name": "kd", "alpha": 0.5, "temperature": 2.0}


def refused(script: Script, folder: Path, *arguments: Any, tree: Path | None = None) -> list[str]:
    """Returns the lines with which training is refused; nothing may have changed below `tree`."""
    tree = tree or folder
    before = snapshot(tree)
    ended = script(train, "--model_dir", folder, *arguments)
    assert ended.status == 2, ended
    assert snapshot(tree) == before
    assert "Traceback" not in ended.err
    return ended.err.splitlines()


@pytest.mark.parametrize(
    ("changes", "key", "told"),
    [
        ({"dataste": {"name": "digits"}}, "dataste", "unknown key; did you mean 'dataset'?"),
        ({"alpha": 0.5}, "alpha", "it is an option of a section: write loss.alpha"),
        ({"loss": KD | {"temprature": 4}, "teacher": "t"}, "loss.temprature", "did you mean 'temperature'?"),
        ({"student": {"widht": 4}}, "student.widht", "did you mean 'width'?"),
        ({"num_epochs": "2"}, "num_epochs", "expected a whole number, got '2'"),
        ({"num_epochs": True}, "num_epochs", "expected a whole number, got True"),
        ({"num_epochs": 2.5}, "num_epochs", "expected a whole number, got 2.5"),
        ({"num_epochs": -1}, "num_epochs", "-1 is below 0"),
        ({"num_epochs": None}, "num_epochs", "is missing"),
        ({"seed": -1}, "seed", "-1 is below 0"),
        ({"seed": 2**64}, "seed", "is not below"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate", "0 is not above 0"),
        ({"optimizer": {"learning_rate": "0.1"}}, "optimizer.learning_rate", "expected a number, got '0.1'"),
        ({"optimizer": {"learning_rate": None}}, "optimizer.learning_rate", "expected a number, got None"),
        ({"loss": KD | {"alpha": 1.4}, "teacher": "t"}, "loss.alpha", "1.4 is above 1"),
        ({"loss": KD | {"temperature": 0}, "teacher": "t"}, "loss.temperature", "0 is not above 0"),
        ({"student": {"dropout_rate": 1}}, "student.dropout_rate", "is not below 1"),
        ({"dataset": {"batch_size": 1}}, "dataset.batch_size", "1 is below 2"),
        ({"dataset": {"subset_fraction": 0}}, "dataset.subset_fraction", "0 is not above 0"),
        ({"dataset": {"augmentation": "mixup"}}, "dataset.augmentation", "'mixup'"),
        (
            {"dataset": {"augmentation": ["crop", {"name": "rotation", "degres": 9}]}},
            "dataset.augmentation.1.degres",
            "d",
        ),
        ({"dataset": {"augmentation": ["crip"]}}, "dataset.augmentation.0.name", "did you mean 'crop'?"),
        ({"dataset": {"validate_on": "train"}}, "dataset.validate_on", "'train' is not one of"),
        ({"student": {"init": "glorot"}}, "student.init", "'glorot' is not one of"),
        ({"student": {"init_from": ""}}, "student.init_from", "the text is empty"),
        ({"student": {"freeze": "conv1"}}, "student.freeze", "expected a list, got 'conv1'"),
        ({"loss": KD | {"divergence": "js"}, "teacher": "t"}, "loss.divergence", "'js' is not one of"),
        ({"loss": KD | {"teacher_noise_probability": 0}, "teacher": "t"}, "loss.teacher_noise_probability", "above 0"),
        ({"loss": {"name": "overhaul", "teacher_stages": [1]}, "teacher": "t"}, "loss", "are not of one length"),
        ({"loss": [{"name": "fitnets", "student_stage": 0}]}, "loss.student_stage", "0 is below 1"),
        ({"teacher": {"model_dir": "t", "std": [0.1, 0, 0.1]}}, "teacher.std.1", "0 is not above 0"),
        ({"schedule": {"name": "multistep", "milestones": []}}, "schedule.milestones", "[]"),
        ({"schedule": {"name": "step", "step_size": 1e-320}}, "schedule.step_size", "is below 1e-06"),
        ({"schedule": {"name": "plateau", "metric": "val.f1"}}, "schedule.metric", "'val.f1' is not one of"),
        ({"precision": "fp8"}, "precision", "'fp8' is not one of"),
        ({"student": {"name": "cnm"}}, "student.name", "unknown net 'cnm'; did you mean 'cnn'?"),
        ({"student": {"name": "torchvision/resnt50"}}, "student.name", "did you mean 'torchvision/resnet50'?"),
        ({"student": {"name": "os.system"}}, "student.name", "unknown net"),
        ({"loss": {"name": "xyz"}}, "loss.name", "unknown loss 'xyz'; known: ab, "),
        ({"dataset": {"name": "cifar1O"}}, "dataset.name", "did you mean 'cifar10'?"),
        ({"optimizer": {"name": "adm"}}, "optimizer.name", "did you mean 'adam'?"),
        ({"schedule": {"name": "cosin"}}, "schedule.name", "did you mean 'cosine'?"),
        ({"student": None}, "student", 'is missing; add "student": {"name": ...}'),
        ({"student": "cnn"}, "student", 'expected {"name": ..., options}'),
        ({"student": {"name": 3}}, "student.name", "3 is not a name"),
        ({"loss": KD}, "teacher", "loss 'kd' needs a teacher"),
        ({"loss": KD, "teacher": ["a", 3]}, "teacher.1", "expected an experiment directory"),
        ({"loss": KD, "teacher": {"model_dir": 3}}, "teacher.model_dir", "expected text"),
        ({"schedule": {"warmup_epochs": 9}}, "schedule.warmup_epochs", "9 is above num_epochs, 2"),
        ({"__class__": 1, "save": 2}, "__class__", "unknown key"),
    ],
)
def test_a_wrong_option_is_one_line_with_file_key_and_remedy(
    script: Script, make_experiment: Make, changes: dict[str, Any], key: str, told: str
) -> None:
    folder = make_experiment(**changes)
    lines = refused(script, folder)
    assert len(lines) == (2 if "save" in changes else 1), lines
    assert lines[0].startswith(f"{folder}/params.json: {key}: ")
    assert told in lines[0]


def test_all_problems_are_reported_at_once(script: Script, make_experiment: Make) -> None:
    folder = make_experiment(num_epochs=-1, student={"width": "4"}, optimizer={"lr": 1}, seed=1.5)
    lines = refused(script, folder)
    keys = [line.split(": ")[1] for line in lines]
    assert sorted(keys) == ["num_epochs", "optimizer.lr", "seed", "student.width"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not JSON"),
        (b"{", "line 1 column 2"),
        (b'{"seed": 1,}', "not JSON"),
        (b'{"seed": 1 // comment\n}', "not JSON"),
        (b'\xef\xbb\xbf{"seed": 1}', "BOM"),
        ('{"seed": "ü"}'.encode("latin-1"), "not UTF-8"),
        ('{"seed": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"seed": "\\ud800"}', "not UTF-8"),
        (b'{"seed": NaN}', "NaN is not a finite number"),
        (b'{"seed": Infinity}', "Infinity is not a finite number"),
        (b'{"seed": 1e999}', "1e999 is not a finite number"),
        (b'{"seed": 1, "seed": 2}', "the key 'seed' stands there twice"),
        (b'{"loss": {"alpha": 1, "alpha": 1}}', "the key 'alpha' stands there twice"),
        (b"[1]", "expected an object {...}, got list"),
        (b"null", "expected an object"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "params.json: "),
        (b'{"a": "' + b" " * 1_100_000 + b'"}', "larger than 1000000 bytes"),
        (b'{"seed"\x00: 1}', "not JSON"),
    ],
)
def test_a_broken_file_is_one_line(script: Script, make_experiment: Make, content: bytes, told: str) -> None:
    folder = make_experiment()
    (folder / "params.json").write_bytes(content)
    [line] = refused(script, folder)
    assert line.startswith(f"{folder}/params.json: ")
    assert told in line


def test_a_missing_file_or_directory_is_one_line(script: Script, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        [line] = refused(script, folder, tree=tmp_path)
        assert line == f"{folder}/params.json: does not exist; an experiment directory needs it"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.learning_rate=-1", "--overrides: optimizer.learning_rate: -1 is not above 0"),
        ("learning_rate=NaN", "--overrides: optimizer.learning_rate: NaN is not a finite number"),
        ("seed=1e999", "--overrides: seed: 1e999 is not a finite number"),
        ("seed", "'seed' is not key=value"),
        ("name=digits", "write dataset.name or student.name or optimizer.name or schedule.name"),
        ("widht=3", "--overrides: widht: unknown key"),
        ("dropout=3", "--overrides: dropout: unknown key"),
        ("seed.x=3", "'seed' is 1, not a section"),
    ],
)
def test_a_wrong_override_is_one_line(script: Script, make_experiment: Make, override: str, told: str) -> None:
    [line] = refused(script, make_experiment(), "--overrides", override)
    assert told in line


def test_a_wrong_device_is_one_line(script: Script, make_experiment: Make) -> None:
    for device in ("gpu", "cuda:99"):
        [line] = refused(script, make_experiment(device.replace(":", "")), "--device", device)
        assert line.startswith(f"--device {device}: cannot be used: ")


# --- data -------------------------------------------------------------------------------------------------


def image_tree(root: Path, classes: tuple[str, ...] = ("cat", "dog"), images: int = 12) -> Path:
    for number, name in enumerate(classes):
        (root / "train" / name).mkdir(parents=True)
        for index in range(images):
            Image.new("RGB", (32, 32), (80 * number, 9 * index, 0)).save(root / "train" / name / f"{index}.png")
    return root


def folder_dataset(root: Path) -> dict[str, Any]:
    return {"name": "image_folder", "data_dir": str(root), "batch_size": 4}


def test_missing_and_empty_image_folders_are_one_line(script: Script, make_experiment: Make, tmp_path: Path) -> None:
    missing = make_experiment("missing", dataset=folder_dataset(tmp_path / "nowhere"))
    [line] = refused(script, missing)
    assert str(tmp_path / "nowhere") in line
    root = image_tree(tmp_path / "images")
    (root / "train" / "bird").mkdir()
    [line] = refused(script, make_experiment("empty", dataset=folder_dataset(root)))
    assert "bird" in line


def test_an_unreadable_image_is_named(script: Script, make_experiment: Make, tmp_path: Path) -> None:
    root = image_tree(tmp_path / "images")
    (root / "train" / "cat" / "3.png").write_bytes(b"no image")
    [line] = refused(script, make_experiment(dataset=folder_dataset(root)))
    assert str(root / "train" / "cat" / "3.png") in line


def test_a_corrupt_archive_names_folder_and_file(script: Script, make_experiment: Make, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    dataset = {"name": "cifar10", "data_dir": str(root), "download": False}
    [line] = refused(script, make_experiment(dataset=dataset, student={"name": "cnn"}))
    assert str(root) in line
    assert "cifar-10-python.tar.gz" in line


def test_images_of_the_wrong_size_for_the_net_are_one_line(script: Script, make_experiment: Make) -> None:
    folder = make_experiment(student={"name": "cnn"})  # synthetic images are 16x16
    [line] = refused(script, folder)
    assert "32" in line
    assert "16" in line


# --- teachers ---------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(script: Script, make_experiment: Make) -> Path:
    folder = make_experiment("teacher")
    assert script(train, "--model_dir", folder).status == 0
    return folder


def test_a_teacher_of_other_classes_is_one_line(script: Script, make_experiment: Make, teacher: Path) -> None:
    student = make_experiment("student", teacher=str(teacher), loss=KD, dataset={"num_classes": 5})
    [line] = refused(script, student)
    assert "the teacher has 4 classes but the student has 5" in line
    assert "train the teacher on the student's dataset" in line


def test_a_teacher_of_other_images_is_one_line(script: Script, make_experiment: Make, teacher: Path) -> None:
    student = make_experiment("student", teacher=str(teacher), loss=KD, dataset={"image_size": 20})
    [line] = refused(script, student)
    assert "[3, 16, 16]" in line
    assert "[3, 20, 20]" in line


def test_a_teacher_that_does_not_exist_is_one_line(script: Script, make_experiment: Make, tmp_path: Path) -> None:
    student = make_experiment("student", teacher=str(tmp_path / "nobody"), loss=KD)
    [line] = refused(script, student)
    assert f"teacher {tmp_path / 'nobody'} does not exist" in line


def test_a_damaged_teacher_is_one_line(script: Script, make_experiment: Make, teacher: Path) -> None:
    content = bytearray((teacher / "best.pth.tar").read_bytes())
    content[len(content) // 2] ^= 1
    (teacher / "best.pth.tar").unlink()  # it is the same file as last.pth.tar
    (teacher / "best.pth.tar").write_bytes(content)
    student = make_experiment("student", teacher=str(teacher), loss=KD)
    [line] = refused(script, student)
    assert "is damaged" in line
    assert f"python train.py --model_dir {teacher} --restart" in line


def test_a_teacher_that_is_not_trained_to_its_end_is_one_line(
    script: Script, make_experiment: Make, teacher: Path
) -> None:
    run = json.loads((teacher / "run.json").read_text())
    student = make_experiment("student", teacher=str(teacher), loss=KD)
    for status in ("interrupted", "failed", "running"):
        (teacher / "run.json").write_text(json.dumps(run | {"status": status}))
        [line] = refused(script, student, tree=student.parent)
        assert "not completed" in line
        assert f"python train.py --model_dir {teacher}" in line


def test_a_directory_that_is_its_own_teacher_is_one_line(script: Script, make_experiment: Make) -> None:
    folder = make_experiment("narcissus", loss=KD, teacher="placeholder")
    params = merged(TINY, {"loss": KD, "teacher": str(folder)})
    (folder / "params.json").write_text(json.dumps(params))
    [line] = refused(script, folder)
    assert "the directory itself" in line


# --- losses -------------------------------------------------------------------------------------------------

ALL = {"name": "kd", "alpha": 1.0, "temperature": 4.0}
KEPT = {"model_dir": "t", "cache": "lazy"}
DML = {"name": "dml", "peers": [{"name": "tiny", "freeze": ["conv1"]}]}
LONG = {"name": "constant", "warmup_epochs": 9}
RISING = {"name": "linear", "start": 0, "end": 1}


@pytest.mark.parametrize(
    ("changes", "key", "told"),
    [
        ({"loss": [{"name": "ce"}, ALL | {"weight": -1}]}, "loss.kd.weight", "expected a number from 0 to 1e9, or"),
        ({"loss": [{"name": "ce"}, ALL | {"temperature": 0}]}, "loss.kd.temperature", "0 is not above 0"),
        ({"loss": [{"name": "ce"}, ALL | {"weight": {"name": "linear", "start": 0}}]}, "loss.kd.weight.end", "missing"),
        ({"loss": [{"name": "ce", "weight": 0}, ALL | {"weight": 0}]}, "loss", "every weight is 0 (ce, kd)"),
        ({"loss": []}, "loss", "the list is empty"),
        ({"loss": {"name": "at"}}, "loss", 'nothing here trains the classifier; add the labels'),
        ({"loss": [{"name": "ce"}, {"name": "at"}], "teacher": None}, "teacher", "needs a teacher"),
        ({"loss": [{"name": "ce"}, {"name": "ft"}]}, "loss", "initial_epochs 30 is not below num_epochs, 2"),
        ({"loss": [{"name": "ce"}, {"name": "at"}], "teacher": KEPT}, "teacher.cache", "needs more of the teacher"),
        ({"loss": {"name": "mlkd"}}, "dataset.second_augmentation", "compares two views"),
        ({"dataset": {"second_augmentation": "crop"}}, "dataset.second_augmentation", "looks at one view only"),
        ({"loss": {"name": "ce"}, "unlabelled": "rest"}, "unlabelled", "has no use for images without labels"),
        (
            {"loss": [{"name": "ce"}, {**KD, "weight": 0}], "teacher": "t", "unlabelled": "rest"},
            "unlabelled",
            "loss 'ce' and 'kd' (weight 0) has no use for images without labels; give one that has a weight",
        ),
        ({"loss": [{"name": "ce"}, {"name": "dml", "weight": 1e39}]}, "loss.dml.weight", "from 0 to 1e9"),
        ({"loss": {"name": "dml"}}, "loss", "nothing here trains the classifier"),
        (
            {"loss": [{"name": "ce"}, {"name": "reviewkd", "student_stages": [2, 1], "teacher_stages": [1, 2]}]},
            "loss",
            "do not rise; name the stages from the first to the last",
        ),
        (
            {"loss": [{"name": "ce"}, {"name": "at", "student_stages": [2, 2], "teacher_stages": [1, 1]}]},
            "loss",
            "have a pair twice; name each once",
        ),
        ({"loss": ALL, "unlabelled": {"name": "synthetik"}}, "unlabelled.name", "did you mean 'synthetic'?"),
        ({"loss": [{"name": "ce"}, {"name": "dml", "peers": [{"name": "tinny"}]}]}, "loss.dml.peers.0.name", "'tiny'"),
        ({"loss": [{"name": "ce"}, DML]}, "loss.dml.peers.0.freeze", "unknown option"),
        ({"loss": [{"name": "ce"}, {"name": "dml", "peers": ["x"]}]}, "loss.dml.peers.0", 'expected {"name": ..., opt'),
        ({"loss": [{"name": "ce"}, ALL | {"weight": LONG}]}, "loss", "warmup_epochs: 9 is above the 2 epochs"),
        ({"loss": ALL | {"weight": RISING}, "schedule": {"name": "plateau"}}, "schedule.metric", "take val.accuracy"),
        ({"log_gradient_norms": 1}, "log_gradient_norms", "expected true or false"),
    ],
)  # fmt: skip
def test_an_objective_that_cannot_be_is_one_line_before_any_work(
    script: Script, make_experiment: Make, changes: dict[str, Any], key: str, told: str
) -> None:
    folder = make_experiment(**({"teacher": "t"} | changes))
    [line] = refused(script, folder)
    assert line.startswith(f"{folder}/params.json: {key}: ")
    assert told in line


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ({"name": "fitnets", "student_stage": 7}, "student 'tiny' has no stage 7"),
        ({"name": "at", "student_stages": [1], "teacher_stages": [9]}, "teacher 'tiny' has no stage 9"),
        ({"name": "fsp", "initial_epochs": 1}, "must be as many"),
    ],
)
def test_nets_that_do_not_give_what_a_method_needs_are_one_line_with_both_shapes(
    script: Script, make_experiment: Make, teacher: Path, loss: dict[str, Any], told: str
) -> None:
    folder = make_experiment("student", teacher=str(teacher), loss=[{"name": "ce"}, loss], student={"width": 2})
    [line] = refused(script, folder)
    assert line.startswith(f"{folder}/params.json: ")
    assert told in line
    assert "student 'tiny' has 2x8x8, 4x4x4" in line
    assert "teacher 'tiny' has 4x8x8, 8x4x4" in line


def test_a_net_without_maps_before_the_activation_is_one_line(
    script: Script, make_experiment: Make, teacher: Path
) -> None:
    loss = [{"name": "ce"}, {"name": "overhaul"}]
    student = {"name": "torchvision/resnet18"}
    folder = make_experiment("student", teacher=str(teacher), loss=loss, student=student)
    [line] = refused(script, folder)
    assert "student 'torchvision/resnet18' does not give them" in line


# --- the other scripts ------------------------------------------------------------------------------------


def test_evaluating_what_is_not_trained_is_one_line(script: Script, make_experiment: Make, teacher: Path) -> None:
    folder = make_experiment()
    ended = script(evaluate, "--model_dir", folder)
    assert ended.status == 2
    assert f"best.pth.tar does not exist; train it with: python train.py --model_dir {folder}" in ended.err
    before = snapshot(teacher)
    ended = script(evaluate, "--model_dir", teacher, "--overrides", "dataset.num_classes=6")
    assert ended.status == 2
    assert "other classes" in ended.err
    assert snapshot(teacher) == before


def test_a_search_over_a_wrong_option_writes_nothing(script: Script, make_experiment: Make) -> None:
    parent = make_experiment("parent")
    (parent / "search.json").write_text('{"optimizer.learning_rate": [0.1, -0.1]}')
    before = snapshot(parent)
    ended = script(search_hyperparams, "--parent_dir", parent)
    assert ended.status == 2
    assert ended.err == f"{parent}/learning_rate_-0.1/params.json: optimizer.learning_rate: -0.1 is not above 0.0\n"
    assert snapshot(parent) == before

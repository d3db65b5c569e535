"""evaluate.py, on real checkpoints."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Make, Script, snapshot

import evaluate
import train
from checkpoint import load_checkpoint
from model import data

KD = {"name": "kd", "alpha": 0.9, "temperature": 4.0}


@pytest.fixture
def pair(script: Script, make_experiment: Make) -> tuple[Path, Path]:
    """Returns (a trained teacher, a student distilled from it), on eight classes."""
    dataset = {"num_classes": 8, "test_size": 80}
    teacher = make_experiment("teacher", num_epochs=4, student={"width": 8}, dataset=dataset)
    student = make_experiment("student", num_epochs=3, dataset=dataset, teacher=str(teacher), loss=KD)
    for folder in (teacher, student):
        assert script(train, "--model_dir", folder).status == 0
    return teacher, student


def read_csv(path: Path) -> list[list[str]]:
    with path.open() as file:
        return list(csv.reader(file))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_the_scores_are_those_of_the_saved_predictions(script: Script, pair: tuple[Path, Path]) -> None:
    _, student = pair
    assert script(evaluate, "--model_dir", student, "--save_predictions").status == 0
    scores = json.loads((student / "metrics_test_best_weights.json").read_text())
    table = read_npz(student / "predictions_test_best_weights.npz")
    logits, labels, teacher = (table[name].astype(np.float64) for name in ("logits", "labels", "teacher_logits"))
    labels = labels.astype(int)
    assert (table["indices"] == np.arange(80)).all()  # the dataset's own order: rows of two nets can be compared
    order = np.argsort(-logits, axis=1)
    assert scores["accuracy"] == pytest.approx((order[:, 0] == labels).mean())
    assert scores["accuracy_top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert scores["cross_entropy"] == pytest.approx(-log_probs[np.arange(80), labels].mean(), rel=1e-5)
    teacher_log_probs = teacher - np.log(np.exp(teacher).sum(1, keepdims=True))
    kl = (np.exp(teacher_log_probs) * (teacher_log_probs - log_probs)).sum(1).mean()
    assert scores["teacher_kl"] == pytest.approx(kl, rel=1e-5)
    assert scores["teacher_agreement"] == pytest.approx((logits.argmax(1) == teacher.argmax(1)).mean())
    assert 0 <= scores["ece"] <= 1
    assert scores["images"] == 80


def test_the_metrics_file_says_which_split_and_checkpoint_and_how_it_was_selected(
    script: Script, pair: tuple[Path, Path]
) -> None:
    _, student = pair
    for which, selected in (("best", "val"), ("last", "nothing")):
        assert script(evaluate, "--model_dir", student, "--restore_file", which).status == 0
        scores = json.loads((student / f"metrics_test_{which}_weights.json").read_text())
        state, sha = load_checkpoint(student / f"{which}.pth.tar")
        assert (scores["split"], scores["selected_on"], scores["epoch"]) == ("test", selected, state["epoch"])
        assert scores["checkpoint_sha256"] == sha


def test_the_confusion_matrix_and_the_classes_add_up(script: Script, pair: tuple[Path, Path]) -> None:
    _, student = pair
    script(evaluate, "--model_dir", student)
    header, *rows = read_csv(student / "confusion_test_best_weights.csv")
    counts = np.array([[int(cell) for cell in row[1:]] for row in rows])
    assert header == ["true", *(row[0] for row in rows)]
    assert counts.sum() == 80
    _, *classes = read_csv(student / "per_class_test_best_weights.csv")
    for row, (_, images, _) in zip(counts, classes, strict=True):
        assert row.sum() == int(images) == 10
    assert [float(c[2]) for c in classes] == pytest.approx((counts.diagonal() / counts.sum(1)).tolist())
    accuracy = json.loads((student / "metrics_test_best_weights.json").read_text())["accuracy"]
    assert counts.trace() / 80 == pytest.approx(accuracy)


def test_sizes_are_compared_with_the_teachers(script: Script, pair: tuple[Path, Path]) -> None:
    teacher, student = pair
    sizes = {}
    for folder in pair:
        script(evaluate, "--model_dir", folder)
        sizes[folder] = json.loads((folder / "metrics_test_best_weights.json").read_text())
    small, large = sizes[student], sizes[teacher]
    assert small["compression_parameters"] == pytest.approx(large["parameters"] / small["parameters"])
    assert small["compression_macs"] == pytest.approx(large["macs"] / small["macs"])
    assert small["weight_bytes"] >= 4 * small["parameters"]
    assert "compression_parameters" not in large  # it has no teacher


def test_the_loss_is_the_runs_objective_with_its_terms(script: Script, pair: tuple[Path, Path]) -> None:
    _, student = pair
    script(evaluate, "--model_dir", student, "--split", "val")
    scores = json.loads((student / "metrics_val_best_weights.json").read_text())
    recorded = load_checkpoint(student / "best.pth.tar")[0]["metrics"]
    assert {name: scores[name] for name in recorded} == pytest.approx(recorded, rel=1e-6)
    assert scores["loss"] == pytest.approx(scores["ce"] + scores["kd"])
    assert scores["ce"] == pytest.approx(0.1 * scores["cross_entropy"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_val_scores_are_those_that_training_recorded(script: Script, make_experiment: Make, precision: str) -> None:
    folder = make_experiment(precision=precision)
    script(train, "--model_dir", folder)
    script(evaluate, "--model_dir", folder, "--split", "val")
    # evaluate.py writes them under the same name, with more beside them
    scores = json.loads((folder / "metrics_val_best_weights.json").read_text())
    assert scores["epoch"] == load_checkpoint(folder / "best.pth.tar")[0]["epoch"]
    recorded = load_checkpoint(folder / "best.pth.tar")[0]["metrics"]
    assert scores["accuracy"] == recorded["accuracy"]
    assert {name: scores[name] for name in recorded} == pytest.approx(recorded, rel=1e-6)


def test_the_training_split_is_scored_without_augmentation_and_in_order(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    script(train, "--model_dir", folder)
    script(evaluate, "--model_dir", folder, "--split", "train", "--save_predictions")
    indices = read_npz(folder / "predictions_train_best_weights.npz")["indices"]
    assert (np.diff(indices) > 0).all()
    before = (folder / "metrics_train_best_weights.json").read_bytes()
    script(evaluate, "--model_dir", folder, "--split", "train")
    assert (folder / "metrics_train_best_weights.json").read_bytes() == before


def test_a_teacher_that_is_gone_does_not_hinder_the_scores(script: Script, pair: tuple[Path, Path]) -> None:
    teacher, student = pair
    teacher.rename(teacher.with_name("moved"))
    ended = script(evaluate, "--model_dir", student)
    assert ended.status == 0
    assert "no comparison with the teacher" in ended.err
    assert "teacher_kl" not in json.loads((student / "metrics_test_best_weights.json").read_text())


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_several_teachers_are_compared_with_together(
    script: Script, make_experiment: Make, pair: tuple[Path, Path], combine: str
) -> None:
    first, second = pair
    section = {"model_dir": str(second), "weight": 3}
    dataset = {"num_classes": 8, "test_size": 80}
    student = make_experiment(
        "pupil", num_epochs=1, dataset=dataset, teacher=[str(first), section], loss=KD, combine_teachers=combine
    )
    assert script(train, "--model_dir", student).status == 0
    sizes, answers = {}, {}
    for folder in (first, second, student):
        assert script(evaluate, "--model_dir", folder, "--save_predictions").status == 0
        sizes[folder] = json.loads((folder / "metrics_test_best_weights.json").read_text())
        answers[folder] = read_npz(folder / "predictions_test_best_weights.npz")
    own, logits = sizes[student], {folder: table["logits"].astype(np.float64) for folder, table in answers.items()}
    for size, name in (("parameters", "parameters"), ("macs", "macs")):
        total = sizes[first][size] + sizes[second][size]
        assert own[f"compression_{name}"] == pytest.approx(total / own[size])
    expected = 0.25 * logits[first] + 0.75 * logits[second]
    if combine == "probabilities":
        raised = {folder: np.exp(values / 4) for folder, values in logits.items()}
        shares = {folder: values / values.sum(1, keepdims=True) for folder, values in raised.items()}
        expected = 4 * np.log(0.25 * shares[first] + 0.75 * shares[second])
    np.testing.assert_allclose(answers[student]["teacher_logits"], expected, rtol=1e-3, atol=1e-3)
    agreement = (logits[student].argmax(1) == expected.argmax(1)).mean()
    assert own["teacher_agreement"] == pytest.approx(agreement)
    script(evaluate, "--model_dir", student, "--split", "val")
    scores = json.loads((student / "metrics_val_best_weights.json").read_text())
    recorded = load_checkpoint(student / "best.pth.tar")[0]["metrics"]
    assert {name: scores[name] for name in recorded} == pytest.approx(recorded, rel=1e-6)
    assert script(train, "--model_dir", first, "--restart", "--seed", 9).status == 0
    ended = script(evaluate, "--model_dir", student)
    assert ended.status == 0
    assert f"no comparison with the teacher: {first} has other weights than those that taught this run" in ended.err


def test_an_evaluation_changes_nothing_but_its_own_files(script: Script, pair: tuple[Path, Path]) -> None:
    _, student = pair
    before = snapshot(student.parent)
    script(evaluate, "--model_dir", student)
    after = snapshot(student.parent)
    assert {name: after[name] for name in before} == before
    assert {Path(name).name for name in after.keys() - before.keys()} == {
        "metrics_test_best_weights.json",
        "confusion_test_best_weights.csv",
        "per_class_test_best_weights.csv",
    }


def test_images_are_normalised_as_the_net_was_trained(script: Script, make_experiment: Make) -> None:
    """On other images than the run's, the net's own mean and std count, not those of the other training set."""
    folder = make_experiment(num_epochs=4)
    script(train, "--model_dir", folder)
    here = data.create
    seen = []

    def create(section: dict[str, Any], **options: Any) -> data.Data:
        made = here(section, **options)
        seen.append((list(made.mean), list(made.std)))
        return made

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "create", create)
        ended = script(evaluate, "--model_dir", folder, "--overrides", "dataset.noise=0.9", "dataset.data_seed=5")
    assert ended.status == 0
    net = load_checkpoint(folder / "best.pth.tar")[0]["net"]
    assert seen == [(net["mean"], net["std"])]
    scores = json.loads((folder / "metrics_test_best_weights.json").read_text())
    assert scores["overrides"] == ["dataset.noise=0.9", "dataset.data_seed=5"]


def test_another_mean_is_used_however_short_its_key(script: Script, make_experiment: Make) -> None:
    folder = make_experiment(num_epochs=4)
    script(train, "--model_dir", folder)
    found = []
    for override in ("mean=[0.1,0.9,0.1]", "dataset.mean=[0.1,0.9,0.1]", "seed=1"):
        assert script(evaluate, "--model_dir", folder, "--overrides", override).status == 0
        found.append(json.loads((folder / "metrics_test_best_weights.json").read_text())["cross_entropy"])
    assert found[0] == found[1] != found[2]


def test_another_validation_split_than_the_runs_is_refused(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    script(train, "--model_dir", folder)
    before = snapshot(folder)
    ended = script(evaluate, "--model_dir", folder, "--split", "val", "--overrides", "dataset.val_fraction=0.5")
    assert ended.status == 2
    assert "these are not the val images that the run had" in ended.err
    for name in ("../run/best", "best.pth.tar"):
        assert "name a checkpoint" in script(evaluate, "--model_dir", folder, "--restore_file", name).err
    assert snapshot(folder) == before


def test_overrides_that_made_the_run_are_remembered(script: Script, make_experiment: Make) -> None:
    folder = make_experiment()
    script(train, "--model_dir", folder, "--overrides", "student.width=6", "dataset.num_classes=3")
    assert script(evaluate, "--model_dir", folder).status == 0
    header, *_ = read_csv(folder / "confusion_test_best_weights.csv")
    assert len(header) == 4


def test_scores_at_a_temperature_are_written_like_the_ancestors_analysis(
    script: Script, pair: tuple[Path, Path]
) -> None:
    _, student = pair
    assert script(evaluate, "--model_dir", student, "--temperature", "4", "--save_predictions").status == 0
    table = read_npz(student / "predictions_test_best_weights.npz")
    logits, labels = table["logits"].astype(np.float64) / 4, table["labels"]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores, hits, confusion = (
        np.loadtxt(student / f"test_temp4.0_{name}.txt")
        for name in ("softmax_scores", "predict_correct", "confusion_matrix")
    )
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    np.testing.assert_array_equal(hits, logits.argmax(1) == labels)
    for true, predicted in np.ndindex(confusion.shape):
        assert confusion[true, predicted] == ((labels == true) & (logits.argmax(1) == predicted)).sum()


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_split_is_analysed_in_an_order_that_two_nets_share(
    script: Script, pair: tuple[Path, Path], split: str
) -> None:
    tables = []
    for folder in pair:
        assert script(evaluate, "--model_dir", folder, "--split", split, "--save_predictions").status == 0
        tables.append(read_npz(folder / f"predictions_{split}_best_weights.npz"))
    assert np.array_equal(tables[0]["indices"], tables[1]["indices"])
    assert np.array_equal(tables[0]["labels"], tables[1]["labels"])
    assert (np.diff(tables[0]["indices"]) > 0).all()
    assert np.allclose(tables[0]["logits"], tables[1]["teacher_logits"], atol=1e-5)


@pytest.mark.parametrize("temperature", ["0", "-1", "inf", "nan", "warm"])
def test_a_temperature_that_is_none_is_refused(script: Script, pair: tuple[Path, Path], temperature: str) -> None:
    ended = script(evaluate, "--model_dir", pair[0], "--temperature", temperature)
    assert ended.status == 2
    assert "--temperature" in ended.err


def test_calibration_finds_the_temperature_of_the_least_loss(script: Script, pair: tuple[Path, Path]) -> None:
    teacher, _ = pair
    assert script(evaluate, "--model_dir", teacher, "--split", "val", "--calibrate", "--save_predictions").status == 0
    found = json.loads((teacher / "calibration_val_best.json").read_text())
    table = read_npz(teacher / "predictions_val_best_weights.npz")
    logits, labels = table["logits"].astype(np.float64), table["labels"]

    def loss(temperature: float) -> float:
        scaled = logits / temperature
        return float((np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(labels)), labels]).mean())

    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 400))
    assert loss(found["temperature"]) <= min(loss(t) for t in grid) + 1e-9
    assert found["nll_before"] == pytest.approx(loss(1.0))
    assert found["nll_after"] == pytest.approx(loss(found["temperature"]))
    assert found["split"] == "val"
    assert found["checkpoint_sha256"] == load_checkpoint(teacher / "best.pth.tar")[1]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_the_ancestor_is_scored_like_ours(script: Script, make_experiment: Make, prefix: str) -> None:
    ours, foreign = make_experiment("ours"), make_experiment("foreign")
    assert script(train, "--model_dir", ours).status == 0
    state = load_checkpoint(ours / "best.pth.tar")[0]
    weights = {prefix + k: v for k, v in state["state_dict"].items() if not k.endswith("num_batches_tracked")}
    torch.save({"epoch": 3, "state_dict": weights, "optimizer": state["optim_dict"]}, foreign / "best.pth.tar")
    for folder in (ours, foreign):
        ended = script(evaluate, "--model_dir", folder)
        assert ended.status == 0, ended
    one, other = (json.loads((f / "metrics_test_best_weights.json").read_text()) for f in (ours, foreign))
    assert other["accuracy"] == one["accuracy"]
    assert other["cross_entropy"] == pytest.approx(one["cross_entropy"], rel=1e-6)
    assert (one["selected_on"], other["selected_on"]) == ("val", "unknown")


def test_a_run_that_selected_on_the_test_split_says_so(script: Script, make_experiment: Make) -> None:
    folder = make_experiment(dataset={"validate_on": "test"})
    assert script(train, "--model_dir", folder).status == 0
    assert script(evaluate, "--model_dir", folder).status == 0
    for name in ("metrics_val_best_weights.json", "metrics_test_best_weights.json"):
        assert json.loads((folder / name).read_text())["selected_on"] == "test"
    val, test = (json.loads((folder / f"metrics_{s}_best_weights.json").read_text()) for s in ("val", "test"))
    assert val["accuracy"] == test["accuracy"]
    assert "TEST SPLIT" in (folder / "train.log").read_text()


def test_a_teacher_sees_its_own_normalisation_whatever_the_images_are_given(
    script: Script, pair: tuple[Path, Path]
) -> None:
    """Images normalised otherwise are another input to the student; the teacher's view is undone and done again."""
    _, student = pair
    assert script(evaluate, "--model_dir", student, "--save_predictions").status == 0
    plain = read_npz(student / "predictions_test_best_weights.npz")
    override = "dataset.mean=[0.1,0.2,0.3]"
    assert script(evaluate, "--model_dir", student, "--save_predictions", "--overrides", override).status == 0
    shifted = read_npz(student / "predictions_test_best_weights.npz")
    assert not np.allclose(shifted["logits"], plain["logits"], atol=1e-2)
    np.testing.assert_allclose(shifted["teacher_logits"], plain["teacher_logits"], rtol=1e-3, atol=1e-3)


def test_another_teacher_than_the_runs_is_not_compared_with(script: Script, pair: tuple[Path, Path]) -> None:
    teacher, student = pair
    assert script(train, "--model_dir", teacher, "--restart", "--seed", "7").status == 0
    ended = script(evaluate, "--model_dir", student)
    assert ended.status == 0
    assert "has other weights than those that taught this run" in ended.err
    scores = json.loads((student / "metrics_test_best_weights.json").read_text())
    assert "teacher_agreement" not in scores
    assert "kd" not in scores


def test_the_teachers_own_constants_are_used_in_scoring_as_in_training(script: Script, make_experiment: Make) -> None:
    teacher = make_experiment("teacher", num_epochs=1)
    assert script(train, "--model_dir", teacher).status == 0
    section = {"model_dir": str(teacher), "std": [2.0] * 3}
    student = make_experiment("student", num_epochs=1, teacher=section, loss=KD)
    assert script(train, "--model_dir", student).status == 0
    assert script(evaluate, "--model_dir", student, "--split", "val", "--restore_file", "last").status == 0
    scores = json.loads((student / "metrics_val_last_weights.json").read_text())
    recorded = json.loads((student / "metrics.jsonl").read_text().splitlines()[-1])["val"]
    assert scores["kd"] == pytest.approx(recorded["kd"], rel=1e-6)

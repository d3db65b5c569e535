"""The committed experiments."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ROOT, Script, committed_files

import train
from model import schema
from sweep import study
from utils import read_json


def committed() -> list[Path]:
    """Returns the params.json files below experiments/ that are not a search's children."""
    paths = [
        ROOT / name for name in committed_files() if name.startswith("experiments/") and name.endswith("/params.json")
    ]
    return sorted(paths, key=lambda path: str(path.parent))


EXPERIMENTS = [
    "base_cnn",
    "base_cnn/nodropout",
    "base_resnet18",
    "base_resnet20",
    "cnn_distill",
    "cnn_distill/nodropout",
    "cnn_distill_alpha_temp",
    "cnn_distill_resnet20",
    "demo/alpha_temp",
    "demo/student",
    "demo/student_kd",
    "demo/teacher",
]


def test_the_committed_experiments_are_those_that_are_expected() -> None:
    assert [str(path.parent.relative_to(ROOT / "experiments")) for path in committed()] == EXPERIMENTS


def test_every_committed_experiment_passes_the_check(script: Script) -> None:
    ended = script(train, "--check", "--model_dir", *[path.parent for path in committed()])
    assert ended.status == 0, ended.err
    assert f"{len(EXPERIMENTS)} of {len(EXPERIMENTS)}" in ended.out


@pytest.mark.parametrize("path", committed(), ids=lambda path: str(path.parent.relative_to(ROOT / "experiments")))
def test_every_teacher_is_an_experiment_here_on_the_same_dataset(path: Path) -> None:
    params, problems = schema.resolve(read_json(path))
    assert not problems
    if params["teacher"] is not None:
        teacher = read_json(ROOT / params["teacher"]["model_dir"] / "params.json")
        assert teacher["dataset"]["name"] == params["dataset"]["name"]


@pytest.mark.parametrize(("parent", "size"), [("cnn_distill_alpha_temp", 25), ("demo/alpha_temp", 6)])
def test_searches_have_the_expected_children(parent: str, size: int) -> None:
    children = study.plan(ROOT / "experiments" / parent)
    assert len(children) == size
    assert all(child.dir.name.startswith("alpha_") for child in children)


def test_the_ancestors_settings_are_kept() -> None:
    """The table of its params.json files; its `kl_div` mean and its StepLR are named openly here."""
    loaded = {str(p.parent.relative_to(ROOT / "experiments")): schema.resolve(read_json(p))[0] for p in committed()}
    kd = loaded["cnn_distill"]["loss"]
    assert (kd["alpha"], kd["temperature"], kd["reduction"]) == (0.9, 20.0, "mean")
    assert loaded["cnn_distill"]["student"] == {"name": "cnn", "num_channels": 32, "dropout_rate": 0.5}
    assert loaded["cnn_distill/nodropout"]["student"]["dropout_rate"] == 0.0
    assert loaded["base_cnn"]["num_epochs"] == 30
    assert loaded["base_cnn"]["optimizer"]["learning_rate"] == 1e-3
    resnet = loaded["base_resnet18"]
    assert (resnet["num_epochs"], resnet["schedule"]["step_size"], resnet["schedule"]["gamma"]) == (200, 150, 0.1)
    assert (resnet["optimizer"]["momentum"], resnet["optimizer"]["weight_decay"]) == (0.9, 5e-4)
    assert all(params["seed"] == 230 for params in loaded.values())

"""What a run was taught by and began with, compared with what is there now, as a search sees it without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Make, Script

import sources
import train
from checkpoint import has_trailer, load_checkpoint
from sources import changed_sources
from utils import read_json


@pytest.fixture
def student(script: Script, make_experiment: Make, teacher: Path) -> Path:
    """A directory that was taught by `teacher` and began with the weights of a foreign file."""
    first = make_experiment("first", num_epochs=0)
    assert script(train, "--model_dir", first).status == 0
    foreign = first.with_name("foreign.pth.tar")
    torch.save({"state_dict": load_checkpoint(first / "best.pth.tar")[0]["state_dict"]}, foreign)
    loss = {"name": "kd", "alpha": 0.9, "temperature": 4.0}
    folder = make_experiment("student", teacher=str(teacher), loss=loss, student={"init_from": str(foreign)})
    assert script(train, "--model_dir", folder).status == 0
    return folder


def changes(folder: Path, **params: Any) -> str:
    return changed_sources(read_json(folder / "run.json"), read_json(folder / "params.json") | params)


def test_what_a_run_was_trained_with_is_found_unchanged(student: Path, teacher: Path) -> None:
    run = read_json(student / "run.json")
    assert (run["teacher"], run["init"]) != (None, None)
    assert changes(student) == ""
    assert changed_sources(run, run["params"]) == ""  # resolved: the teacher is a section
    moved = teacher.rename(teacher.with_name("moved"))
    assert changes(student, teacher={"model_dir": str(moved)}) == ""  # another place, the same weights
    assert changes(teacher.with_name("first")) == ""


def test_a_teacher_that_was_trained_again_is_another(script: Script, student: Path, teacher: Path) -> None:
    script(train, "--model_dir", teacher, "--restart", "--seed", 9)
    assert changes(student) == "teacher.model_dir: other weights than it was trained with"


def test_of_a_teacher_the_checkpoint_that_is_named_counts(student: Path, teacher: Path) -> None:
    (teacher / "prev.pth.tar").replace(teacher / "best.pth.tar")  # whichever was best, this is not last
    last = read_json(student / "run.json") | {"teacher": load_checkpoint(teacher / "last.pth.tar")[1]}
    params = read_json(student / "params.json")
    assert changed_sources(last, params) != ""
    named = {"model_dir": str(teacher), "restore_file": "last"}
    assert changed_sources(last, params | {"teacher": named}) == ""


def test_other_initial_weights_or_none_are_others(student: Path, teacher: Path) -> None:
    told = "student.init_from: other weights than it was trained with"
    assert changes(student, student={"name": "tiny", "init_from": str(teacher)}) == told
    assert changes(student, student={"name": "tiny", "init_from": None}) == told
    assert changes(student.with_name("first"), student={"name": "tiny", "init_from": str(teacher)}) == told
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, student.with_name("foreign.pth.tar"))
    assert changes(student) == told


def test_of_several_teachers_those_with_other_weights_are_named(
    script: Script, make_experiment: Make, student: Path, teacher: Path
) -> None:
    other, third = (make_experiment(name, num_epochs=0, seed=seed) for name, seed in (("other", 5), ("third", 6)))
    for folder in (other, third):
        assert script(train, "--model_dir", folder).status == 0
    first, second, last = (load_checkpoint(folder / "best.pth.tar")[1] for folder in (teacher, other, third))
    run = {"teacher": f"{first}+{second}"}

    def told(*teachers: Any) -> str:
        return changed_sources(run, {"teacher": [*teachers]})

    assert told(str(teacher), {"model_dir": str(other)}) == ""
    assert told(str(other), str(teacher)) == (
        "teacher.0.model_dir and teacher.1.model_dir: other weights than it was trained with"
    )
    assert told(str(teacher), str(third)) == "teacher.1.model_dir: other weights than it was trained with"
    assert told(str(teacher), "nowhere") == ""  # not told here
    assert told(str(teacher)) == "teacher: other weights than it was trained with"
    assert told(str(teacher), str(other), str(third)) == "teacher: other weights than it was trained with"
    run["teacher"] += f"+{last}"
    assert told(str(teacher), str(other), str(third)) == ""


def test_both_are_told_in_one_line(script: Script, student: Path, teacher: Path) -> None:
    script(train, "--model_dir", teacher, "--restart", "--seed", 9)
    told = "teacher.model_dir and student.init_from: other weights than it was trained with"
    assert changes(student, student={"name": "tiny"}) == told


def test_what_is_missing_or_not_ready_is_not_told_here(student: Path, teacher: Path) -> None:
    student.with_name("foreign.pth.tar").unlink()
    run = read_json(teacher / "run.json") | {"status": "interrupted"}
    (teacher / "run.json").write_text(json.dumps(run))
    assert changes(student) == ""
    assert changes(student, teacher="nowhere", student={"name": "tiny", "init_from": "nowhere"}) == ""


def test_a_teacher_that_the_loss_has_no_use_for_is_not_looked_at(make_experiment: Make, script: Script) -> None:
    folder = make_experiment(teacher="never/trained", loss={"name": "kd", "alpha": 0.0, "temperature": 4.0})
    script(train, "--model_dir", folder)
    assert changes(folder) == ""


def test_weights_that_many_share_are_read_once(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert changes(student) == ""
    seen: list[Path] = []

    def look(path: Path) -> bool:
        seen.append(path)
        return has_trailer(path)

    monkeypatch.setattr(sources, "has_trailer", look)
    for _ in range(10):
        assert changes(student) == ""
    assert seen == []
    foreign = student.with_name("foreign.pth.tar")
    stat = foreign.stat()
    os.utime(foreign, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert changes(student) == ""
    assert seen == [foreign]

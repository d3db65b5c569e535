"""The commands about stored answers, as a person types them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Make, Script, snapshot

import stores
import train
from checkpoint import load_checkpoint
from model.teacher_store import Column, TeacherStore, stores_in

KD = {"name": "kd", "alpha": 0.9, "temperature": 4.0}
CROPS = ["random_resized_crop", "horizontal_flip"]


def test_fill_status_and_verify_of_a_students_or_the_teachers_directory(
    script: Script, make_student: Make, teacher: Path
) -> None:
    student = make_student("student", {"cache": "lazy"}, dataset={"augmentation": "flip"})
    assert "has no stored answers" in script(stores, "status", student).out
    ended = script(stores, "fill", student)
    assert (ended.status, ended.out.splitlines()[-1]) == (0, f"{144 * 2 + 16} answers computed")
    assert script(stores, "fill", student).out.splitlines()[-1] == "0 answers computed"
    ended = script(stores, "fill", teacher, "--overrides", "dataset.augmentation=flip")  # the same images, as it is
    assert ended.out.splitlines()[-1] == "0 answers computed"
    for folder in (student, teacher):
        ended = script(stores, "status", folder)
        assert "| logits-4-fp16 | fp32        | 304 of 320 |" in ended.out
        assert ended.out.splitlines()[-1].endswith("| yes      |")
    ended = script(stores, "verify", student, "--fraction", 1)
    assert ended.status == 0
    assert "304 answers computed again" in ended.out
    assert ", 0 wrong, 0 damaged" in ended.out


@pytest.mark.parametrize("augmentation", ["flip", CROPS], ids=["numbered", "drawn"])
def test_verify_finds_answers_that_are_not_the_teachers(
    augmentation: Any, script: Script, make_student: Make, teacher: Path
) -> None:
    student = make_student("student", {"cache": "lazy"}, dataset={"augmentation": augmentation}, num_epochs=1)
    script(train, "--model_dir", student)
    assert script(stores, "verify", student, "--fraction", 1).status == 0
    [(folder, _)] = stores_in(teacher / "store")
    store = TeacherStore.existing(folder, [Column("logits", 4, "fp16")])
    samples, views = torch.arange(5), torch.full((5,), 0 if augmentation == "flip" else -1)
    store.write({"logits": torch.rand(5, 4)}, samples, views, seed=1, epoch=0)
    ended = script(stores, "verify", student, "--fraction", 1)
    assert ended.status == 1
    assert "5 stored answers are wrong" in ended.err.splitlines()[-1]


def test_verify_says_what_is_lost_where_only_the_largest_logits_are_kept(
    script: Script, make_student: Make, teacher: Path
) -> None:
    student = make_student("student", {"cache": "lazy", "top_k": 2}, num_epochs=1)
    script(train, "--model_dir", student)
    ended = script(stores, "verify", student, "--fraction", 1)
    assert ended.status == 0
    assert ", 0 wrong, 0 damaged" in ended.out
    lines = [line for line in ended.out.splitlines() if line.startswith("keeping the largest logits only")]
    means = [float(line.split("mean ")[1].split(",")[0]) for line in lines]
    assert [line.split(" at T ")[1][0] for line in lines] == ["1", "4"]
    assert all(0 < mean < 0.5 for mean in means)


def test_gc_removes_what_no_weights_here_have_answered(script: Script, make_student: Make, teacher: Path) -> None:
    script(train, "--model_dir", make_student("first", {"cache": "lazy"}))
    assert "0.000 GB freed" in script(stores, "gc", teacher).out
    assert len(stores_in(teacher / "store")) == 1
    script(train, "--model_dir", teacher, "--restart", "--seed", 5)
    assert "no: other weights" in script(stores, "status", teacher).out
    script(train, "--model_dir", make_student("second", {"cache": "lazy"}))
    assert len(stores_in(teacher / "store")) == 2
    assert script(stores, "gc", teacher).status == 0
    assert len(stores_in(teacher / "store")) == 1
    assert len(list((teacher / "store").glob("accuracy_*.json"))) == 1
    assert script(stores, "gc", teacher, "--all").status == 0
    assert snapshot(teacher / "store") == {}


def test_gc_keeps_everything_where_nothing_says_what_is_of_use(
    script: Script, make_student: Make, teacher: Path
) -> None:
    script(train, "--model_dir", make_student("first", {"cache": "lazy"}, num_epochs=1))
    for path in teacher.glob("*.pth.tar"):
        path.unlink()
    ended = script(stores, "gc", teacher)
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


def test_a_teacher_that_had_a_teacher_is_found_on_request(script: Script, make_student: Make, teacher: Path) -> None:
    assistant = make_student("assistant", {"cache": "lazy"}, num_epochs=1)
    script(train, "--model_dir", assistant)
    ended = script(stores, "fill", assistant, "--teacher", "--overrides", "dataset.augmentation=none")
    assert ended.out.splitlines()[-1] == "160 answers computed"
    assert len(stores_in(assistant / "store")) == 1
    assert len(stores_in(teacher / "store")) == 1


def test_the_teachers_directory_takes_options_of_its_section(
    script: Script, make_student: Make, teacher: Path, tmp_path: Path
) -> None:
    options = ["teacher.cache_dir=" + str(tmp_path / "elsewhere"), "teacher.cache_dtype=fp32"]
    ended = script(stores, "fill", teacher, "--overrides", "dataset.augmentation=none", *options)
    assert ended.status == 0, ended
    assert "logits-4-fp32" in script(stores, "status", teacher, "--overrides", *options).out
    assert not (teacher / "store").exists()
    ended = script(stores, "status", teacher, "--overrides", "teacher.cache_dtype=fp8")
    assert ended.status == 2
    assert "teacher.cache_dtype: 'fp8' is not one of" in ended.err


def test_the_commands_are_about_each_of_several_teachers(
    script: Script, make_experiment: Make, teacher: Path, tmp_path: Path
) -> None:
    other = make_experiment("other", num_epochs=0, seed=5)
    assert script(train, "--model_dir", other).status == 0
    sections = [str(teacher), {"model_dir": str(other), "cache_dtype": "fp32"}]
    student = make_experiment("student", teacher=sections, loss=KD, dataset={"augmentation": "none"})
    assert script(stores, "fill", student).out.splitlines()[-1] == f"{2 * 160} answers computed"
    assert script(stores, "fill", student).out.splitlines()[-1] == "0 answers computed"
    assert script(stores, "fill", other, "--overrides", "dataset.augmentation=none").out.splitlines()[-1] == (
        "160 answers computed"  # its own directory would keep them in fp16
    )
    out = script(stores, "status", student).out
    assert out.count("| 160 of 160 |") == 3
    assert out.count("| yes      |") == 3
    ended = script(stores, "verify", student, "--fraction", 1)
    assert ended.status == 0
    for folder in (teacher, other):
        [line] = [line for line in ended.out.splitlines() if line.startswith(str(folder / "store"))]
        assert "160 answers computed again" in line
    assert script(train, "--model_dir", other, "--restart", "--seed", 6).status == 0
    assert script(stores, "status", student).out.count("no: other weights") == 2
    assert script(stores, "gc", student).status == 0
    assert (len(stores_in(teacher / "store")), len(stores_in(other / "store"))) == (1, 0)
    assert script(stores, "gc", student, "--all").status == 0
    assert snapshot(teacher / "store") == {}
    ended = script(stores, "fill", student, "--overrides", f"teacher.1.cache_dir={tmp_path / 'elsewhere'}")
    assert ended.out.splitlines()[-1] == f"{2 * 160} answers computed"
    assert len(list((tmp_path / "elsewhere").glob("other-*/*/*.rows"))) == 1


def test_what_cannot_be_stored_is_one_line(script: Script, make_student: Make) -> None:
    ended = script(stores, "fill", make_student("hints", loss=[{"name": "ce"}, {"name": "fitnets"}]))
    assert ended.status == 2
    [line] = ended.err.splitlines()[-1:]
    assert "loss 'fitnets' needs more of the teacher than can be stored" in line


def test_verify_of_nothing_is_no_success(script: Script, make_student: Make) -> None:
    ended = script(stores, "verify", make_student("student", {"cache": "lazy"}))
    assert ended.status == 1
    assert "nothing was verified" in ended.err


def test_the_weights_of_another_program_are_known_again(script: Script, make_student: Make, teacher: Path) -> None:
    state, _ = load_checkpoint(teacher / "best.pth.tar")
    for path in teacher.iterdir():
        if path.name != "params.json":
            path.unlink()
    torch.save({"state_dict": state["state_dict"], "epoch": 3}, teacher / "best.pth.tar")
    student = make_student("student", {"cache": "lazy"}, num_epochs=1)
    assert script(train, "--model_dir", student).status == 0
    assert script(stores, "status", teacher).out.splitlines()[-1].endswith("| yes      |")
    assert "0.000 GB freed" in script(stores, "gc", teacher).out
    assert script(stores, "verify", student, "--fraction", 1).status == 0


def test_several_processes_are_refused(script: Script, make_student: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student("student")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "has no stored answers" in script(stores, "status", student).out  # others set that, too
    monkeypatch.setenv("RANK", "0")
    ended = script(stores, "status", student)
    assert (ended.status, len(ended.err.splitlines())) == (2, 1)
    assert "start it without torchrun" in ended.err

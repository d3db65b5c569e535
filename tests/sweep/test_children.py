"""Claims about the children of a search: what is planned from the directories, what is refused, what is written."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import search_hyperparams
from checkpoint import load_checkpoint, save_checkpoint
from model.legacy import as_sections
from sweep import children as children_module
from sweep.children import AsSections, Child, Planner, check, check_sources, table, write
from sweep.space import grid
from utils import RunError

MakeParent = Callable[..., Path]
MakeParent = Callable[..., Path]
FLAT = {
    "model_version": "cnn_distill",
    "subset_percent": 1.0,
    "augmentation": "yes",
    "teacher": "resnet18",
    "alpha": 0.9,
    "temperature": 20,
    "learning_rate": 0.001,
    "batch_size": 128,
    "num_epochs": 30,
    "dropout_rate": 0.0,
    "num_channels": 32,
    "save_summary_steps": 100,
    "num_workers": 4,
}


def plan(parent: Path, overrides: Sequence[str] = (), as_sections: AsSections = dict, **more: Any) -> list[Child]:
    planner = Planner.read(parent, overrides, as_sections, **more)
    return planner.children(grid(planner.search))


def put_run(child: Child, **run: Any) -> None:
    (child.dir / "run.json").write_text(json.dumps(run))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def snapshot(parent: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}


def test_a_child_is_the_reference_with_overrides_and_its_point(make_parent: MakeParent) -> None:
    parent = make_parent({"alpha": [0.1], "student.name": ["cnn"]})
    children = plan(parent, ["temperature=8", "seed=1"])
    write(children)
    text = (parent / "alpha_0.1_name_cnn" / "params.json").read_text()
    assert json.loads(text) == {
        "num_epochs": 3,
        "loss": {"name": "kd", "alpha": 0.1, "temperature": 8},
        "stub": {"do": "ok", "seconds": 0},
        "seed": 1,
        "student": {"name": "cnn"},
    }
    assert '\n    "loss": {\n        "name": "kd",' in text


def test_an_override_of_what_is_varied_is_refused(make_parent: MakeParent) -> None:
    with pytest.raises(RunError, match=r"--overrides: loss.alpha is what .*search.json varies"):
        plan(make_parent({"alpha": [0.1]}), ["loss.alpha=0.5"])


@pytest.mark.parametrize("override", ["optimizer.weight_decay=0.5", 'optimizer={"name": "sgd"}', "optimizer.name=sgd"])
def test_an_override_of_a_part_of_what_is_varied_is_refused_too(make_parent: MakeParent, override: str) -> None:
    space = {"optimizer": [{"name": "adam"}, {"name": "sgd"}]}
    with pytest.raises(RunError, match=r"--overrides: optimizer\S* is what .*search.json varies"):
        plan(make_parent(space, optimizer={"name": "adam"}), [override])


def test_without_params_the_parents_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"params.json: does not exist"):
        plan(tmp_path)


def test_writing_again_changes_nothing(make_parent: MakeParent) -> None:
    parent = make_parent({"alpha": [0.1, 0.2]})
    write(plan(parent))
    before = {path: path.stat().st_mtime_ns for path in parent.rglob("*")}
    write(plan(parent))
    assert {path: path.stat().st_mtime_ns for path in parent.rglob("*")} == before


def test_a_child_with_other_params_is_refused_with_the_difference(make_parent: MakeParent) -> None:
    parent = make_parent({"alpha": [0.1, 0.2]})
    write(plan(parent)[1:])
    parent = make_parent({"alpha": [0.1, 0.2]}, num_epochs=5, seed=9)
    with pytest.raises(RunError) as caught:
        plan(parent)
    assert f"{parent / 'alpha_0.2' / 'params.json'} is not what" in str(caught.value)
    assert "seed: 'absent' -> 9" in str(caught.value)
    assert "num_epochs" not in str(caught.value)  # more epochs are no other experiment
    assert "remove that directory, undo the change, or give its results up by --force" in str(caught.value)
    assert not (parent / "alpha_0.1").exists()


def test_more_epochs_in_the_parent_reach_children_that_exist(make_parent: MakeParent) -> None:
    parent = make_parent({"alpha": [0.1, 0.2]})
    write(plan(parent))
    write(plan(make_parent({"alpha": [0.1, 0.2]}, num_epochs=5)))
    for name in ("alpha_0.1", "alpha_0.2"):
        assert json.loads((parent / name / "params.json").read_text())["num_epochs"] == 5


@pytest.mark.parametrize("teacher", ["nowhere", {"model_dir": "nowhere", "restore_file": "last"}])
def test_a_missing_teacher_is_found_before_any_child_is_made(make_parent: MakeParent, teacher: Any) -> None:
    parent = make_parent({"alpha": [0.1, 0.2]}, teacher=teacher)
    children = plan(parent)
    with pytest.raises(RunError, match="teacher nowhere does not exist"):
        check_sources(children)
    assert not list(parent.glob("alpha_*"))


def test_children_without_a_teacher_need_none(make_parent: MakeParent) -> None:
    check_sources(plan(make_parent({"alpha": [0.1]})))
    check_sources(plan(make_parent({"alpha": [0.1]}, teacher=None)))


def test_git_ignores_what_a_search_makes(make_parent: MakeParent) -> None:
    parent = make_parent({"alpha": [0.1]})
    write(plan(parent))
    subprocess.run(["git", "init", "-q", str(parent)], check=True)
    command = ["git", "-C", str(parent), "status", "--porcelain", "-uall"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["??", "params.json", "??", "search.json"]


def test_a_file_in_the_way_of_a_child_is_one_line(make_parent: MakeParent) -> None:
    parent = make_parent({"alpha": [0.1]})
    (parent / "alpha_0.1").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*alpha_0.1: File exists"):
        write(plan(parent))


def test_problems_are_told_before_anything_is_written_and_name_the_childs_own_path(
    make_parent: MakeParent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children_module, "CHECKED_AT_ONCE", 2)
    parent = make_parent({"alpha": [0.5, 1.5, 0.6, 2.5]})
    before = snapshot(parent)
    with pytest.raises(RunError) as caught:
        check(plan(parent))
    assert str(caught.value).splitlines() == [
        f"{parent}/alpha_1.5/params.json: loss.alpha: 1.5 is above 1",
        f"{parent}/alpha_2.5/params.json: loss.alpha: 2.5 is above 1",
    ]
    assert caught.value.exit_status == 2
    assert snapshot(parent) == before
    check(plan(make_parent({"alpha": [0.5, 0.6, 0.7]})))


def test_a_check_that_dies_silently_is_not_a_pass(make_parent: MakeParent) -> None:
    with pytest.raises(RunError, match=r"train.py --check: killed by signal 11"):
        check(plan(make_parent({"loss.name": ["crash"]})))


def test_the_table_says_what_would_happen_to_each_child(make_parent: MakeParent) -> None:
    parent = make_parent({"alpha": [1, 2, 3, 4, 5, 6, 7, 8], "student.name": ["a|b"]})
    children = plan(parent)
    write(children)
    put_run(children[1], status="completed", epoch=3)
    put_run(children[2], status="completed", epoch=2)
    put_run(children[3], status="interrupted", epoch=1)
    put_run(children[4], status="running", epoch=1)
    put_run(children[5], status="failed", reason="diverged", epoch=1)
    put_run(children[6], status="running", epoch=1)
    (children[7].dir / "run.json").write_text("{")
    with FileLock(children[6].dir / ".lock"):
        text = table(children)
    header, _, *rows, _, counts = text.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "child",
        "loss.alpha",
        "student.name",
        "what happens",
    ]
    assert [row.rpartition(" | ")[2].strip(" |") for row in rows] == [
        "run",
        "skip: completed",
        "resume at epoch 3",
        "resume at epoch 2",
        "resume at epoch 2",
        "skip: failed (diverged); --rerun failed",
        "wait: running elsewhere",
        "skip: failed (run.json cannot be read); --rerun failed",
    ]
    assert "a\\|b" in rows[0]
    assert counts == "8 children: 4 to run, 1 completed, 2 failed, 1 running elsewhere"


@pytest.mark.parametrize(
    ("run", "rerun", "expected"),
    [
        ({"status": "failed", "reason": "x", "epoch": 1}, "failed", "run again: failed (x)"),
        ({"status": "failed", "reason": "x", "epoch": 1}, "stale", "skip: failed (x); --rerun failed"),
        ({"status": "failed", "reason": "x", "epoch": 1}, "all", "begin anew: was failed"),
        ({"status": "interrupted", "epoch": 1}, "failed", "resume at epoch 2"),
        ({"status": "interrupted", "epoch": 1}, "stale", "begin anew: was interrupted at epoch 2"),
        ({"status": "running", "epoch": 1}, "none", "resume at epoch 2"),
        ({"status": "running", "epoch": 1}, "stale", "begin anew: was stale at epoch 2"),
        ({"status": "completed", "epoch": 3}, "stale", "skip: completed"),
        ({"status": "completed", "epoch": 2}, "stale", "resume at epoch 3"),
        ({"status": "completed", "epoch": 3}, "all", "begin anew: was completed"),
        ({"status": "pruned", "epoch": 2}, "stale", "skip: pruned at epoch 2"),
        ({"status": "pruned", "epoch": 2}, "all", "begin anew: was pruned"),
    ],
)
def test_what_is_run_again_is_what_was_asked_for(
    make_parent: MakeParent, run: dict[str, Any], rerun: str, expected: str
) -> None:
    [child] = plan(make_parent({"alpha": [0.1]}))
    write([child])
    put_run(child, **run)
    assert child.outlook(rerun).text == expected
    assert child.outlook(rerun).anew == expected.startswith("begin anew")


def test_changed_params_are_accepted_by_force_and_the_results_are_given_up(make_parent: MakeParent) -> None:
    write(plan(make_parent({"alpha": [0.1, 0.2]})))
    parent = make_parent({"alpha": [0.1, 0.2]}, seed=9)
    children = plan(parent, force=True)
    put_run(children[0], status="completed", epoch=3)
    assert [child.outlook().text for child in children] == ["begin anew: seed: 'absent' -> 9", "run"]


def test_the_table_says_what_would_be_refused(make_parent: MakeParent) -> None:
    write(plan(make_parent({"alpha": [0.1, 0.2]})))
    children = plan(make_parent({"alpha": [0.1, 0.2]}, seed=9), force=True)
    put_run(children[0], status="completed", epoch=3)
    assert "refuse: seed: 'absent' -> 9; --force" in table(children)
    assert table(children).endswith("2 children: 0 to run, 0 completed, 2 refused")
    assert "begin anew: seed: 'absent' -> 9" in table(children, force=True)


def test_a_run_with_more_epochs_than_are_asked_for_is_told_apart(make_parent: MakeParent) -> None:
    [child] = plan(make_parent({"alpha": [0.1]}))
    write([child])
    put_run(child, status="completed", epoch=5)
    assert child.outlook().text == "skip: completed, with 5 epochs; 3 are asked for"


def test_results_of_another_teacher_are_not_taken_for_those_of_this_one(
    make_parent: MakeParent, tmp_path: Path
) -> None:
    teachers = [tmp_path / name for name in ("first", "second")]
    for width, teacher in enumerate(teachers):
        teacher.mkdir()
        (teacher / "params.json").write_text("{}")
        save_checkpoint(teacher / "best.pth.tar", {"epoch": width, "net": {}, "state_dict": {}})
    parent = make_parent({"alpha": [0.1]}, teacher={"model_dir": str(teachers[0])})
    [child] = plan(parent)
    write([child])
    taught = load_checkpoint(teachers[0] / "best.pth.tar")[1]
    put_run(child, status="completed", epoch=3, teacher=taught)
    assert plan(parent)[0].outlook().text == "skip: completed"
    make_parent({"alpha": [0.1]}, teacher={"model_dir": str(teachers[1])})
    with pytest.raises(RunError, match=r"teacher.model_dir: other weights than it was trained with"):
        plan(parent)
    assert plan(parent, force=True)[0].outlook().anew
    teachers[0].rename(tmp_path / "moved")
    make_parent({"alpha": [0.1]}, teacher={"model_dir": str(tmp_path / "moved")})
    assert plan(parent)[0].outlook().text == "skip: completed"  # the same in another place


def make_teachers(folder: Path, *names: str) -> list[Path]:
    teachers = [folder / name for name in names]
    for width, teacher in enumerate(teachers):
        teacher.mkdir()
        (teacher / "params.json").write_text("{}")
        save_checkpoint(teacher / "best.pth.tar", {"epoch": width, "net": {}, "state_dict": {}})
    return teachers


@pytest.mark.parametrize("as_text", [True, False])
def test_of_several_teachers_each_is_looked_at(make_parent: MakeParent, tmp_path: Path, as_text: bool) -> None:
    first, second, third = make_teachers(tmp_path, "first", "second", "third")

    def given(*folders: Path) -> list[Any]:
        return [str(folder) if as_text else {"model_dir": str(folder)} for folder in folders]

    parent = make_parent({"alpha": [0.1, 0.2]}, teacher=given(first, tmp_path / "nowhere"))
    with pytest.raises(RunError, match="nowhere does not exist"):
        check_sources(plan(parent))
    assert [path for path in parent.iterdir() if path.name.startswith("alpha")] == []
    parent = make_parent({"alpha": [0.1]}, teacher=given(first, second))
    check_sources(plan(parent))
    [child] = plan(parent)
    write([child])
    shas = [load_checkpoint(teacher / "best.pth.tar")[1] for teacher in (first, second)]
    put_run(child, status="completed", epoch=3, teacher="+".join(shas))
    assert plan(parent)[0].outlook().text == "skip: completed"
    second.rename(tmp_path / "moved")
    make_parent({"alpha": [0.1]}, teacher=given(first, tmp_path / "moved"))
    assert plan(parent)[0].outlook().text == "skip: completed"
    make_parent({"alpha": [0.1]}, teacher=given(first, third))
    with pytest.raises(RunError, match=r"teacher.1.model_dir: other weights than it was trained with"):
        plan(parent)
    for others in ((first,), (first, tmp_path / "moved", third)):
        make_parent({"alpha": [0.1]}, teacher=given(*others))
        with pytest.raises(RunError, match=r"is not what the search asks for \(teacher"):
            plan(parent)


def test_options_of_one_of_several_teachers_may_be_varied(make_parent: MakeParent) -> None:
    children = plan(make_parent({"teacher.1.weight": [1, 2]}, teacher=["a", "b"]))
    assert [child.params["teacher"] for child in children] == [
        [{"model_dir": "a"}, {"model_dir": "b", "weight": weight}] for weight in (1, 2)
    ]
    children = plan(make_parent({"teacher": ["a", ["a", "b"]]}, teacher="a"))
    assert [(child.dir.name, child.params["teacher"]) for child in children] == [
        ("teacher_a", "a"),
        ("teacher_a-b", ["a", "b"]),
    ]


def test_points_of_several_seeds_have_a_directory_for_each(make_parent: MakeParent) -> None:
    children = plan(make_parent({"alpha": [0.1, 0.2], "seeds": [3, 5]}))
    assert [child.dir.name for child in children] == [
        "alpha_0.1_seed_3",
        "alpha_0.1_seed_5",
        "alpha_0.2_seed_3",
        "alpha_0.2_seed_5",
    ]
    assert [child.params["seed"] for child in children] == [3, 5, 3, 5]
    assert [child.trial for child in children] == [0, 0, 1, 1]


def test_seeds_of_the_command_line_count_and_exclude_an_override(make_parent: MakeParent) -> None:
    parent = make_parent({"alpha": [0.1], "seeds": [3, 5]})
    assert [child.params["seed"] for child in plan(parent, seeds=[7])] == [7]
    with pytest.raises(RunError, match=r"--overrides: seed is what .*search.json varies"):
        plan(parent, ["seed=1"])


def test_children_share_the_seed_unless_told_otherwise(make_parent: MakeParent) -> None:
    parent = make_parent({"alpha": [0.1, 0.2]}, seed=9)
    assert [child.params["seed"] for child in plan(parent)] == [9, 9]
    space = {"alpha": [0.1, 0.2], "common_random_numbers": False}
    seeds = [child.params["seed"] for child in plan(make_parent(space, seed=9))]
    assert len({*seeds, 9}) == 3
    assert [child.params["seed"] for child in plan(make_parent({**space, "alpha": [0.2]}, seed=9))] == seeds[1:]


def test_what_exists_was_checked_before_it_was_made(make_parent: MakeParent) -> None:
    """So that going on with a large search does not begin with checking all of it."""
    parent = make_parent({"alpha": [1.5]})
    write(plan(parent))
    check(plan(parent))
    with pytest.raises(RunError, match="above 1"):  # as it would be written otherwise now
        check(plan(make_parent({"alpha": [1.5]}, num_epochs=7)))


# --- parents of the ancestor ----------------------------------------------------------------------------------


def make_flat(folder: Path, space: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Writes a flat params.json; `...` leaves a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {key: value for key, value in {**FLAT, **changes}.items() if value is not ...}
    (folder / "params.json").write_text(json.dumps(flat, indent=4))
    if space is not None:
        (folder / "search.json").write_text(json.dumps(space))
    return folder


def test_children_of_a_flat_parent_are_flat_and_those_of_the_ancestors_search(tmp_path: Path) -> None:
    children = plan(make_flat(tmp_path), as_sections=as_sections)
    write(children)
    assert [child.dir.name for child in children[:2]] == ["alpha_0.99_Temp_20.0", "alpha_0.99_Temp_10.0"]
    assert len(children) == 40
    params = read(tmp_path / "alpha_0.5_Temp_4.5" / "params.json")
    assert list(params) == list(FLAT)
    assert params == FLAT | {"alpha": 0.5, "temperature": 4.5}


def test_a_flat_parent_has_its_own_space_and_may_vary_options_of_ours(tmp_path: Path) -> None:
    space = {"temperature": [2, 4], "augmentation": ["no"], "optimizer.weight_decay": [0.1]}
    children = plan(make_flat(tmp_path, space), as_sections=as_sections)
    assert [child.dir.name for child in children] == [
        "Temp_2_augmentation_no_weight_decay_0.1",
        "Temp_4_augmentation_no_weight_decay_0.1",
    ]
    changes = {"temperature": 4, "augmentation": "no", "optimizer": {"weight_decay": 0.1}}
    assert children[1].params == FLAT | changes


def test_overrides_of_a_flat_parent_say_where_the_data_is(tmp_path: Path) -> None:
    parent = make_flat(tmp_path, {"alpha": [0.5]})
    children = plan(parent, ["dataset.data_dir=/data", "num_epochs=1", "temperature=2"], as_sections)
    changes = {"alpha": 0.5, "temperature": 2, "num_epochs": 1, "dataset": {"data_dir": "/data"}}
    assert children[0].params == FLAT | changes
    with pytest.raises(RunError, match=r"alpha is what .*search.json varies"):
        plan(parent, ["alpha=0.1"], as_sections)


def test_children_that_the_ancestor_made_are_taken_as_they_are(tmp_path: Path) -> None:
    """Its generated files lack keys that the parent got later, with the meaning that the files had without them."""
    parent = make_flat(tmp_path, {"alpha": [0.5], "temperature": [2.0]})
    child = make_flat(parent / "alpha_0.5_Temp_2.0", alpha=0.5, temperature=2.0, augmentation=..., subset_percent=...)
    before = snapshot(parent)
    write(plan(parent, as_sections=as_sections))
    assert snapshot(parent) == before
    make_flat(child, alpha=0.5, temperature=2.0, augmentation=..., num_channels=16)
    with pytest.raises(RunError, match=r"student.num_channels: 16 -> 32\)"):
        plan(parent, as_sections=as_sections)


def test_flat_children_may_be_told_where_the_data_is_and_how_long_to_train(tmp_path: Path) -> None:
    parent = make_flat(tmp_path, {"alpha": [0.5]})
    write(plan(parent, as_sections=as_sections))
    write(plan(parent, ["dataset.data_dir=/data", "num_epochs=60", "num_workers=0"], as_sections))
    params = read(parent / "alpha_0.5" / "params.json")
    assert (params["num_epochs"], params["num_workers"], params["dataset"]) == (60, 0, {"data_dir": "/data"})


def test_the_teacher_of_flat_children_is_the_directory_that_its_name_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    children = plan(make_flat(tmp_path, {"alpha": [0.5]}), as_sections=as_sections)
    with pytest.raises(RunError, match="teacher experiments/base_resnet18 does not exist"):
        check_sources(children, as_sections)
    teacher = make_flat(tmp_path / "experiments" / "base_resnet18", model_version="resnet18", teacher="none")
    with pytest.raises(RunError, match=r"teacher experiments/base_resnet18 has no best.pth.tar"):
        check_sources(children, as_sections)
    (teacher / "best.pth.tar").touch()
    check_sources(children, as_sections)


def test_a_teacher_that_the_ancestor_would_not_have_used_is_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parent = make_flat(tmp_path, {"dropout_rate": [0.0, 0.5]}, model_version="cnn")
    check_sources(plan(parent, as_sections=as_sections), as_sections)


def test_the_command_searches_a_flat_parent_and_says_what_it_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parent = make_flat(tmp_path / "parent", {"alpha": [0.5, 0.9]})
    arguments = ["--parent_dir", str(parent), "--overrides", "num_epochs=3"]
    with pytest.raises(RunError, match="teacher experiments/base_resnet18 does not exist"):
        search_hyperparams.main(arguments)
    assert sorted(path.name for path in parent.iterdir()) == ["params.json", "search.json"]
    (make_flat(tmp_path / "experiments" / "base_resnet18", model_version="resnet18") / "best.pth.tar").touch()
    make_flat(parent / "alpha_0.5", alpha=0.5, augmentation=...)  # the ancestor's own
    assert search_hyperparams.main(arguments) == 0
    assert {read(path)["status"] for path in parent.glob("*/run.json")} == {"completed"}
    first = (parent / "search_hyperparameters.log").read_text().splitlines()[0]
    assert (
        f"WARNING: {parent / 'params.json'} is one of the ancestor's: VALIDATED AND SELECTED ON THE TEST SET" in first
    )
    assert "teacher resnet18 is experiments/base_resnet18" in first


def test_starting_weights_that_are_not_there_are_found_before_anything_is_written(
    make_parent: MakeParent, tmp_path: Path
) -> None:
    weights = tmp_path / "some.pth.tar"
    student = {"name": "tiny", "init_from": str(weights)}
    children = plan(make_parent({"alpha": [0.1, 0.2]}, teacher=None, student=student))
    with pytest.raises(RunError, match=r"student\.init_from: .*some\.pth\.tar does not exist"):
        check_sources(children)
    weights.write_bytes(b"")
    check_sources(children)

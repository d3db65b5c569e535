from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model import schema
from model.registry import Registry, options_of
from model.schema import SECTIONS, json_schema, reference, resolve, run_options, teacher_options

ROOT = Path(__file__).parents[2]
RAW: dict[str, Any] = {
    "num_epochs": 10,
    "dataset": {"name": "synthetic", "batch_size": 16},
    "student": {"name": "tiny"},
    "teacher": "experiments/teacher",
    "loss": {"name": "kd", "alpha": 0.9, "temperature": 4},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
}


def changed(**changes: Any) -> dict[str, Any]:
    """Returns RAW with keys replaced; `...` removes one."""
    raw = copy.deepcopy(RAW) | changes
    return {key: value for key, value in raw.items() if value is not ...}


def problems_of(**changes: Any) -> dict[str, str]:
    _, problems = resolve(changed(**changes))
    found = dict(problems)
    assert len(found) == len(problems)
    return found


# --- what is right --------------------------------------------------------------------------------------------


def test_every_option_is_in_the_result_with_its_default() -> None:
    values, problems = resolve(RAW)
    assert problems == []
    assert set(values) == {*options_of(run_options), *SECTIONS, "teacher", "unlabelled"}
    for section, registry in SECTIONS.items():
        options = {**options_of(registry[values[section]["name"]])}
        options |= options_of(registry.common) if registry.common else {}
        assert set(values[section]) == {"name", *options}
        written = RAW.get(section, {})
        for key, (_, default) in options.items():
            # A loss's own usual weight stands for no weight.
            expected = 1.0 if (section, key) == ("loss", "weight") else written.get(key, default)
            assert values[section][key] == expected
    assert values["seed"] == 230
    assert values["schedule"]["name"] == "constant"
    defaults = {key: default for key, (_, default) in options_of(teacher_options).items()}
    assert values["teacher"] == defaults | {"model_dir": "experiments/teacher"}
    assert (defaults["restore_file"], defaults["cache"], defaults["cache_dtype"]) == ("best", "off", "fp16")


def test_resolving_a_result_changes_nothing() -> None:
    for raw in (RAW, changed(teacher=..., loss=...), changed(schedule={"name": "multistep", "milestones": [3, 6]})):
        values, problems = resolve(raw)
        assert problems == []
        assert resolve(values) == (values, [])
        assert resolve(json.loads(json.dumps(values))) == (values, [])


def test_what_was_given_is_not_changed() -> None:
    raw = copy.deepcopy(RAW)
    resolve(raw)
    assert raw == RAW


def test_without_loss_and_teacher_it_is_plain_training() -> None:
    values, problems = resolve(changed(loss=..., teacher=...))
    assert problems == []
    assert values["loss"] == {"name": "ce", "label_smoothing": 0.0, "weight": 1.0}
    assert values["unlabelled"] is None
    assert values["teacher"] is None
    assert resolve(changed(loss=..., teacher=None)) == (values, [])


# --- what is wrong --------------------------------------------------------------------------------------------


def test_all_problems_are_reported_at_once_with_their_paths() -> None:
    raw = {
        "num_epoch": 3,
        "studnet": {"name": "tiny"},
        "seed": -1,
        "precision": "fp8",
        "dataset": {"name": "synthetic", "batch_size": 0, "noise": "much"},
        "student": {"name": "tinny"},
        "teacher": {"model_dir": 7, "restore": "best"},
        "loss": {"name": "kd", "alpha": 1.4},
        "optimizer": {"learning_rate": 0.1},
        "schedule": {"name": "multistep", "milestones": [0, 4]},
    }
    _, problems = resolve(raw)
    found = dict(problems)
    assert len(found) == len(problems)
    assert found.pop("optimizer.name").startswith("is missing; known: adam")
    assert found.pop("precision").startswith("'fp8' is not one of 'auto'")
    assert found == {
        "num_epoch": "unknown key; did you mean 'num_epochs'?",
        "studnet": "unknown key; did you mean 'student'?",
        "num_epochs": "is missing and has no default",
        "seed": "-1 is below 0",
        "dataset.batch_size": "0 is below 2",
        "dataset.noise": "expected a number, got 'much'",
        "student.name": "unknown net 'tinny'; did you mean 'tiny'?",
        "teacher.model_dir": "expected text, got 7",
        "teacher.restore": "unknown option; did you mean 'restore_file'?",
        "loss.alpha": "1.4 is above 1.0",
        "loss.temperature": "is missing and has no default",
        "schedule.milestones.0": "0 is below 1",
    }


@pytest.mark.parametrize("value", ["0.1", True, None, float("nan"), float("inf"), [0.1], {"start": 0.1}])
def test_a_number_is_a_finite_number_and_nothing_else(value: object) -> None:
    (problem,) = problems_of(optimizer={"name": "sgd", "learning_rate": value}).items()
    expected = "is not a finite number" if isinstance(value, float) else "expected a number, got"
    assert problem[0] == "optimizer.learning_rate"
    assert expected in problem[1]


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1]])
@pytest.mark.parametrize("key", ["num_epochs", "seed"])
def test_a_whole_number_is_a_whole_number_and_nothing_else(key: str, value: object) -> None:
    assert problems_of(**{key: value}) == {key: f"expected a whole number, got {value!r}"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_epochs": -1}, ("num_epochs", "-1 is below 0")),
        ({"seed": 2**63}, ("seed", f"{2**63} is not below {2**63}")),
        ({"checkpoint_minutes": 0}, ("checkpoint_minutes", "0 is not above 0")),
        ({"checkpoint_minutes": None}, ("checkpoint_minutes", "expected a number, got None")),
        ({"dataset": {"name": "synthetic", "val_fraction": 1}}, ("dataset.val_fraction", "1 is not below 1")),
    ],
)
def test_what_is_out_of_range_is_refused(changes: dict[str, Any], problem: tuple[str, str]) -> None:
    ((key, text),) = problems_of(**changes).items()
    assert key == problem[0]
    assert text.startswith(problem[1])


@pytest.mark.parametrize("absent", [..., None])
@pytest.mark.parametrize("section", ["dataset", "student", "optimizer"])
def test_a_section_that_is_needed_and_missing_is_asked_for(section: str, absent: object) -> None:
    (found,) = problems_of(**{section: absent}).items()
    assert found[0] == section
    assert found[1].startswith(f'is missing; add "{section}": {{"name": ...}} (known: ')
    assert all(name in found[1] for name in SECTIONS[section])


@pytest.mark.parametrize(("section", "default"), [("loss", "ce"), ("schedule", "constant")])
def test_a_section_that_has_a_default_goes_by_its_name_unless_it_says_another(section: str, default: str) -> None:
    """So an override may name an option of it; null is no section."""
    assert problems_of(**{section: None})[section].startswith("is missing; add ")
    assert problems_of(**{section: {}}) == {}
    (found,) = problems_of(**{section: {"alpha": 0.9}}).items()
    assert found[0] == f"{section}.alpha"
    assert found[1].startswith("unknown option")


@pytest.mark.parametrize("section", list(SECTIONS))
@pytest.mark.parametrize("value", ["sgd", ["sgd"], 3, True])
def test_a_section_is_an_object(section: str, value: object) -> None:
    text = 'expected {"name": ..., options}, got '
    if section == "loss" and isinstance(value, list):  # a list of one is that one
        assert problems_of(**{section: value}) == {"loss": f"{text}'sgd'"}
        assert problems_of(**{section: [{"name": "ce"}, "sgd"]}) == {"loss.1": f"{text}'sgd'"}
    else:
        assert problems_of(**{section: value}) == {section: f"{text}{value!r}"}


def test_a_teacher_is_a_directory_as_text_or_with_options() -> None:
    full = {"model_dir": "experiments/teacher", "restore_file": "last"}
    defaults = {key: default for key, (_, default) in options_of(teacher_options).items()}
    for teacher, expected in (
        ("experiments/teacher", defaults | {"model_dir": "experiments/teacher"}),
        ({"model_dir": "experiments/teacher"}, defaults | {"model_dir": "experiments/teacher"}),
        (full, defaults | full),
    ):
        values, problems = resolve(changed(teacher=teacher))
        assert (values["teacher"], problems) == (expected, [])


@pytest.mark.parametrize(
    ("teacher", "key", "message"),
    [
        ([], "teacher", "the list is empty; name at least one teacher"),
        (["a", 3], "teacher.1", 'expected an experiment directory as text or {"model_dir": ...}, got 3'),
        (["a", ["b"]], "teacher.1", "expected an experiment directory as text or {\"model_dir\": ...}, got ['b']"),
        (["a", None], "teacher.1", 'expected an experiment directory as text or {"model_dir": ...}, got None'),
        ([{"model_dir": "a"}, {}], "teacher.1.model_dir", "is missing and has no default"),
        ([{"model_dir": "a", "cach": "lazy"}, "b"], "teacher.0.cach", "unknown option; did you mean 'cache'?"),
        ([{"model_dir": "a", "weight": 0}, "b"], "teacher.0.weight", "0 is not above 0.0"),
        (
            ["a", "b", {"model_dir": "a", "weight": 2}],
            "teacher.2.model_dir",
            "teacher 0 again; give that one more weight",
        ),
        ({"model_dir": "a", "weight": 2}, "teacher.weight", "there is one teacher; remove it"),
        ([{"model_dir": "a", "weight": 2}], "teacher.weight", "there is one teacher; remove it"),
        (3, "teacher", 'expected an experiment directory as text or {"model_dir": ...}, got 3'),
        (True, "teacher", 'expected an experiment directory as text or {"model_dir": ...}, got True'),
        ({}, "teacher.model_dir", "is missing and has no default"),
        ({"model_dir": None}, "teacher.model_dir", "expected text, got None"),
        (
            {"model_dir": "a", "restore_file": "first"},
            "teacher.restore_file",
            "'first' is not one of 'best' or 'last'",
        ),
    ],
)
def test_what_is_no_teacher_is_refused(teacher: object, key: str, message: str) -> None:
    assert problems_of(teacher=teacher) == {key: message}


def test_several_teachers_are_a_list_and_a_list_of_one_is_what_is_in_it() -> None:
    defaults = {key: default for key, (_, default) in options_of(teacher_options).items()}
    values, problems = resolve(changed(teacher=["a", {"model_dir": "b", "weight": 2, "cache": "lazy"}]))
    b = defaults | {"model_dir": "b", "weight": 2, "cache": "lazy"}
    assert (values["teacher"], problems) == ([defaults | {"model_dir": "a"}, b], [])
    assert resolve(values) == (values, [])
    assert resolve(changed(teacher=["a"])) == resolve(changed(teacher="a"))
    both = [{"model_dir": "a"}, {"model_dir": "a", "restore_file": "last"}]  # of one directory, but two sets of weights
    assert problems_of(teacher=both) == {}


AT = [{"name": "ce"}, {"name": "at"}]


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        (
            {"loss": AT},
            "teacher",
            "loss 'at' reads maps, which several teachers cannot give together; name one teacher",
        ),
        (
            {"loss": [{"name": "ce"}, {"name": "crd"}]},
            "teacher",
            "loss 'crd' reads embeddings, which several teachers cannot give together; name one teacher",
        ),
        (
            {"loss": [{"name": "kd", "alpha": 0.9, "temperature": t} for t in (4, 2)]},
            "combine_teachers",
            '"probabilities" needs one temperature, but kd has 4 and kd_2 has 2; set them equal or combine "logits"',
        ),
        (
            {"loss": [{"name": "ce"}, {"name": "ctkd"}]},
            "combine_teachers",
            '"probabilities" needs one temperature, but ctkd has no single one; set them equal or combine "logits"',
        ),
        ({"teacher": ["a"], "combine_teachers": "logits"}, "combine_teachers", "there is one teacher; remove it"),
        (
            {"teacher": None, "loss": ..., "combine_teachers": "logits"},
            "combine_teachers",
            "there is no teacher; remove it",
        ),
        ({"combine_teachers": "votes"}, "combine_teachers", "'votes' is not one of 'probabilities' or 'logits'"),
    ],
)
def test_what_several_teachers_cannot_do_together_is_told(changes: dict[str, Any], key: str, message: str) -> None:
    assert problems_of(**({"teacher": ["a", "b"]} | changes)) == {key: message}


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": AT, "teacher": "a"},
        {"loss": [{"name": "kd", "alpha": 0.9, "temperature": t} for t in (4, 2)], "combine_teachers": "logits"},
        {"loss": [{"name": "ce"}, {"name": "ctkd"}], "combine_teachers": "logits"},
        {"loss": [{"name": "ce"}, {"name": "at", "weight": 0}]},  # it never counts
        {"loss": ...},  # teachers that only evaluate.py compares with
    ],
)
def test_what_several_teachers_can_do_together_is_accepted(changes: dict[str, Any]) -> None:
    assert problems_of(**({"teacher": ["a", "b"]} | changes)) == {}


def test_a_store_of_every_one_of_several_teachers_is_checked() -> None:
    teachers = ["a", {"model_dir": "b", "cache": "lazy"}, {"model_dir": "c", "cache": "full"}]
    found = problems_of(teacher=teachers, unlabelled={"name": "rest"})
    assert set(found) == {"teacher.1.cache", "teacher.2.cache"}


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"teacher": ...}, "teacher", 'loss \'kd\' needs a teacher; add "teacher": "experiments/<its directory>"'),
        (
            {"schedule": {"name": "constant", "warmup_epochs": 11}},
            "schedule.warmup_epochs",
            "11 is above num_epochs, 10",
        ),
        (
            {"optimizer": {"name": "sgd", "learning_rate": 0.1, "nesterov": True, "momentum": 0.0}},
            "optimizer.nesterov",
            "needs a momentum above 0",
        ),
    ],
)
def test_contradictions_between_options_are_found(changes: dict[str, Any], key: str, message: str) -> None:
    assert problems_of(**changes) == {key: message}


def test_what_only_looks_like_a_contradiction_is_accepted() -> None:
    without_teacher = {"name": "kd", "alpha": 0, "temperature": 4}  # of weight 0: it is not read
    for changes in (
        {"teacher": ..., "loss": without_teacher},
        {"loss": ...},  # a teacher that only evaluate.py compares with
        {"schedule": {"name": "cosine", "warmup_epochs": 10}},
        {"optimizer": {"name": "sgd", "learning_rate": 0.1, "nesterov": True}},
    ):
        assert problems_of(**changes) == {}


def test_all_contradictions_are_found_at_once() -> None:
    optimizer = {"name": "sgd", "learning_rate": 0.1, "nesterov": True, "momentum": 0.0}
    schedule = {"name": "constant", "warmup_epochs": 11}
    found = problems_of(teacher=..., optimizer=optimizer, schedule=schedule)
    assert set(found) == {"teacher", "optimizer.nesterov", "schedule.warmup_epochs"}


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("alpha", "loss.alpha"),
        ("learning_rate", "optimizer.learning_rate"),
        ("batch_size", "dataset.batch_size"),  # an option of every dataset
        ("num_channels", "student.num_channels"),
        ("pretrained", "student.pretrained"),  # an option of a family
        ("warmup_epochs", "schedule.warmup_epochs"),
    ],
)
def test_an_option_at_the_top_level_is_told_its_section(key: str, path: str) -> None:
    assert problems_of(**{key: 1}) == {key: f"unknown key; it is an option of a section: write {path}"}


@pytest.mark.parametrize(
    ("key", "message"),
    [("optimiser", "did you mean 'optimizer'?"), ("learners", "known: "), ("Seed", "did you mean 'seed'?")],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(key: str, message: str) -> None:
    assert problems_of(**{key: 1})[key].startswith(f"unknown key; {message}")


# --- plug-ins: a new entry is in everything by being registered -------------------------------------------------


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A section with one more registry entry than the program has, and a family."""
    registry = Registry("optimizer")
    for name, entry in SECTIONS["optimizer"].items():
        registry.register(name)(entry)

    @registry.register("mine")
    def mine(parameters: object, *, sharpness: float = 0.5) -> None:
        """My own | optimizer.

        Args:
            sharpness: How sharp
                it is.
        """

    @registry.register("family/", members=lambda: ["a"])
    def family(member: str, parameters: object, *, learning_rate: float) -> None:
        """A family.

        Args:
            learning_rate: A rate.
        """

    monkeypatch.setitem(SECTIONS, "optimizer", registry)


@pytest.mark.usefixtures("extended")
def test_a_new_entry_is_checked_like_the_others() -> None:
    values, problems = resolve(changed(optimizer={"name": "mine"}))
    assert (values["optimizer"], problems) == ({"name": "mine", "sharpness": 0.5}, [])
    assert problems_of(optimizer={"name": "mine", "sharpness": "very"}) == {
        "optimizer.sharpness": "expected a number, got 'very'"
    }
    assert problems_of(optimizer={"name": "family/b", "learning_rate": 0.1}) == {
        "optimizer.name": "unknown optimizer 'family/b'; known: a"
    }
    assert problems_of(sharpness=1)["sharpness"].endswith("write optimizer.sharpness")


@pytest.mark.usefixtures("extended")
def test_a_new_entry_is_in_the_reference_and_in_the_json_schema() -> None:
    row = "| `mine` | My own \\| optimizer. | `sharpness` (number; `0.5`): How sharp it is. |"
    assert row in reference().splitlines()
    assert "| `family/<name>` | A family. | `learning_rate` (number; required): A rate. |" in reference()
    titles = {branch["title"]: branch for branch in json_schema()["properties"]["optimizer"]["oneOf"]}
    assert titles["mine"]["properties"]["name"] == {"type": "string", "const": "mine"}
    pattern = titles["family/"]["properties"]["name"]["pattern"]
    assert re.match(pattern, "family/a")
    assert not re.match(pattern, "family/")


# --- the reference and the JSON Schema --------------------------------------------------------------------------


def test_the_reference_has_every_entry_and_every_option_of_every_registry() -> None:
    text = reference()
    parts = dict(re.findall(r"^#### `(\w+)`\n(.*?)(?=^####|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(parts) == ["teacher", "unlabelled", *SECTIONS]
    for section, registry in SECTIONS.items():
        for option in options_of(registry.common) if registry.common else ():
            assert re.search(rf"^\| `{option}` \| .+ \| .+ \| \S.* \|$", parts[section], re.MULTILINE)
        for name, entry in registry.items():
            shown = re.escape(f"{name}<name>" if name.endswith("/") else name)
            row = re.search(rf"^\| `{shown}` \| \S.* \| .*\|$", parts[section], re.MULTILINE)
            assert row is not None, name
            for option in options_of(entry):
                assert re.search(rf"`{option}` \(.+; .+\): \S", row[0]), f"{name}: {option}"
    for function, part in ((run_options, text.split("####")[1]), (teacher_options, parts["teacher"])):
        for option in options_of(function):
            assert re.search(rf"^\| `{option}` \| .+ \| .+ \| \S.* \|$", part, re.MULTILINE)


def test_the_reference_states_types_bounds_and_defaults() -> None:
    lines = reference().splitlines()
    assert any(line.startswith("| `num_epochs` | whole number ≥ 0, ≤ 1e+06 | required | ") for line in lines)
    assert any(line.startswith("| `seed` | whole number ≥ 0, < 2^63 | `230` | ") for line in lines)
    assert any(line.startswith('| `restore_file` | `best` or `last` | `"best"` | ') for line in lines)
    (kd,) = (line for line in lines if line.startswith("| `kd` |"))
    assert "`alpha` (number ≥ 0, ≤ 1; required): Weight of the teacher term" in kd
    assert "`temperature` (number > 0, ≤ 1000; required): " in kd
    assert '`reduction` (`batchmean` or `mean`; `"batchmean"`): ' in kd
    (multistep,) = (line for line in lines if line.startswith("| `multistep` |"))
    assert "`milestones` (list of whole number ≥ 1; required): " in multistep


def test_every_row_of_the_reference_has_the_columns_of_its_table() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", reference(), re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table.splitlines()[0]


def test_the_json_schema_mentions_every_entry_with_its_options() -> None:
    found = json.loads(json.dumps(json_schema(), allow_nan=False))
    assert found["additionalProperties"] is False
    assert set(found["properties"]) == {*options_of(run_options), *SECTIONS, "teacher", "unlabelled"}
    assert set(found["required"]) == {"num_epochs", "dataset", "student", "optimizer"}
    for section, registry in SECTIONS.items():
        branches = found["properties"][section]["oneOf"]
        if section == "loss":  # one, or a list of them
            *branches, several = branches
            assert several == {"type": "array", "minItems": 1, "items": {"oneOf": branches}}
        assert [branch["title"] for branch in branches] == list(registry)
        for branch, (name, entry) in zip(branches, registry.items(), strict=True):
            options = options_of(entry) | (options_of(registry.common) if registry.common else {})
            assert branch["type"] == "object"
            assert branch["additionalProperties"] is False
            assert set(branch["properties"]) == {"name", *options}
            assert set(branch["required"]) == {
                "name",
                *(key for key, (_, default) in options.items() if default is ...),
            }
            if name.endswith("/"):
                assert re.match(branch["properties"]["name"]["pattern"], f"{name}x")
            else:
                assert branch["properties"]["name"]["const"] == name
    text, null, full, several = found["properties"]["teacher"]["oneOf"]
    assert several == {"type": "array", "minItems": 1, "items": {"oneOf": [text, full]}}
    assert (text["type"], null["type"], set(full["properties"])) == ("string", "null", set(options_of(teacher_options)))
    assert "$ref" not in json.dumps(found), "a reference would not be found below a branch"


def test_making_the_json_schema_leaves_the_checks_as_they_were() -> None:
    assert json_schema() == json_schema()
    assert resolve(RAW)[1] == []


@pytest.mark.parametrize(("arguments", "expected"), [([], reference), (["--json"], json_schema)])
def test_the_module_prints_the_reference_or_the_json_schema(arguments: list[str], expected: Any) -> None:
    command = [sys.executable, "-m", schema.__name__, *arguments]
    printed = subprocess.check_output(command, cwd=ROOT, text=True, encoding="utf-8")
    assert (json.loads(printed) if arguments else printed) == expected()

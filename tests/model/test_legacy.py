"""Claims about the ancestor's params.json: all of them load and mean what they meant, and typos are found.

`upstream_params.json` holds the ancestor's 129 files; TABLE is what they say, written down independently of them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model import schema
from model.errors import InputError
from model.legacy import (
    OURS,
    as_sections,
    assumptions,
    flat_options,
    is_flat,
    net_of,
    net_record,
    normalisation_of,
    translate,
)
from model.losses import LOSSES
from model.nets import NETS
from model.optim import create_optimizer, create_schedule
from model.outputs import Batch, Outputs
from model.registry import options_of
from utils import Params, RunError

FILES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("upstream_params.json").read_text())
ROOT = Path(__file__).parents[2]

CNN = {"name": "cnn", "num_channels": 32}
ADAM = {"name": "adam", "learning_rate": 0.001, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0}
SGD = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0005}
GRIDS = {
    "cnn_distill_alpha_temp": {
        *((alpha, temp) for alpha in ("0.3", "0.5", "0.7", "0.9", "0.95") for temp in ("2", "5", "10", "20", "30")),
        *((alpha, temp) for alpha in ("0.99", "0.999") for temp in ("2", "20")),
    },
    "cnn_distill_nodropout_alpha_temp": {
        (alpha, temp)
        for alpha in ("0.05", "0.1", "0.5", "0.95", "0.99")
        for temp in ("1.5", "2.0", "3.0", "4.5", "6.0", "8.0", "10.0", "20.0")
    },
    "cnn_distill_subset": {
        (alpha, temp)
        for alpha in ("0.01", "0.1", "0.5", "0.95", "0.999")
        for temp in ("1", "2", "3", "4.5", "6", "8", "10", "20", "40")
    },
}
# directory, files; student, share of the images, augmentation, teacher, (alpha, T) or None without one, epochs
GRID = "/alpha_*"
TABLE: dict[str, tuple[int, dict[str, Any], float, str, str | None, tuple[float, float] | None, int]] = {
    "base_cnn": (1, CNN | {"dropout_rate": 0.5}, 1, "none", None, None, 30),
    "base_cnn/nodropout": (1, CNN | {"dropout_rate": 0}, 1, "crop_flip", None, None, 30),
    "base_cnn_subset": (1, CNN | {"dropout_rate": 0}, 0.05, "crop_flip", None, None, 50),
    "base_resnet18": (1, {"name": "resnet18"}, 1, "crop_flip", None, None, 200),
    "base_wrn": (1, {"name": "wrn"}, 1, "crop_flip", None, None, 200),
    "cnn_distill": (1, CNN | {"dropout_rate": 0.5}, 1, "crop_flip", "resnet18", (0.9, 20), 30),
    "cnn_distill/nodropout": (1, CNN | {"dropout_rate": 0}, 1, "crop_flip", "resnet18", (0.9, 20), 30),
    "cnn_distill/noaug_nodrop": (1, CNN | {"dropout_rate": 0}, 1, "none", "resnet18", (0.9, 20), 30),
    "cnn_distill_alpha_temp": (1, CNN | {"dropout_rate": 0.5}, 1, "crop_flip", "resnet18", (0.9, 20), 30),
    f"cnn_distill_alpha_temp{GRID}": (29, CNN | {"dropout_rate": 0.5}, 1, "crop_flip", "resnet18", None, 30),
    "cnn_distill_nodropout_alpha_temp": (1, CNN | {"dropout_rate": 0}, 1, "crop_flip", "resnet18", (0.9, 20), 30),
    f"cnn_distill_nodropout_alpha_temp{GRID}": (40, CNN | {"dropout_rate": 0}, 1, "crop_flip", "resnet18", None, 30),
    "cnn_distill_subset": (1, CNN | {"dropout_rate": 0}, 0.05, "crop_flip", "resnet18", (0.95, 2), 50),
    f"cnn_distill_subset{GRID}": (45, CNN | {"dropout_rate": 0}, 0.05, "crop_flip", "resnet18", None, 50),
    "resnet18_distill/densenet_teacher": (1, {"name": "resnet18"}, 1, "crop_flip", "densenet", (0.95, 6), 200),
    "resnet18_distill/preresnet_teacher": (1, {"name": "resnet18"}, 1, "crop_flip", "preresnet110", (0.95, 6), 170),
    "resnet18_distill/resnext_teacher": (1, {"name": "resnet18"}, 1, "crop_flip", "resnext29", (0.95, 6), 175),
    "resnet18_distill/wrn_teacher": (1, {"name": "resnet18"}, 1, "crop_flip", "wrn", (0.95, 6), 170),
}
DISTIL = FILES["experiments/cnn_distill/params.json"]
PLAIN = FILES["experiments/base_cnn/params.json"]
RESNET = FILES["experiments/base_resnet18/params.json"]


def changed(base: dict[str, Any] = DISTIL, **changes: Any) -> dict[str, Any]:
    """Returns a flat file with keys replaced; `...` removes one."""
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def resolve(raw: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    sections, _, problems = translate(raw)
    return ({}, problems) if problems else schema.resolve(sections)


def resolved(raw: dict[str, Any]) -> dict[str, Any]:
    values, problems = resolve(raw)
    assert problems == []
    return values


def rates(values: dict[str, Any], *epochs: int) -> list[float]:
    """Returns the learning rates of epochs, the first of which is 1."""
    optimizer = create_optimizer(values["optimizer"], [torch.nn.Parameter(torch.zeros(1))])
    schedule = create_schedule(values["schedule"], optimizer, values["num_epochs"], 391)
    found = []
    for epoch in epochs:
        schedule.set(epoch - 1, 0)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def row_of(name: str) -> str:
    return re.sub("/alpha_[^/]*$", GRID, name.removeprefix("experiments/").removesuffix("/params.json"))


# --- the 129 files --------------------------------------------------------------------------------------------


def test_there_are_129_files_in_the_groups_of_the_table() -> None:
    rows = [row_of(name) for name in FILES]
    assert {row: rows.count(row) for row in rows} == {row: entry[0] for row, entry in TABLE.items()}
    assert len(FILES) == 129


@pytest.mark.parametrize("name", FILES, ids=lambda name: name.removeprefix("experiments/").removesuffix("/params.json"))
def test_every_file_means_what_the_table_says(name: str) -> None:
    _, student, share, augmentation, teacher, weights, epochs = TABLE[row_of(name)]
    values = resolved(FILES[name])
    assert (values["num_epochs"], values["seed"], values["precision"]) == (epochs, 230, "fp32")
    assert values["student"].items() >= student.items()
    dataset = values["dataset"]
    assert (dataset["name"], dataset["data_dir"], dataset["validate_on"]) == ("cifar10", "data-cifar10", "test")
    assert (dataset["batch_size"], dataset["num_workers"], dataset["augmentation"]) == (128, 4, augmentation)
    assert dataset["subset_fraction"] == share
    assert (dataset["subset_rule"] == "ancestor") == (share < 1)
    cnn = student["name"] == "cnn"
    assert values["optimizer"].items() >= (ADAM if cnn else SGD).items()
    assert rates(values, 1, 100, 101, 150, 151, 200) == pytest.approx(
        [1e-3, 1e-3, 2e-4, 2e-4, 2e-4, 2e-4] if cnn else [0.1, 0.1, 0.1, 0.1, 0.01, 0.01]
    )
    if teacher is None:
        assert values["teacher"] is None
        assert values["loss"]["name"] == "ce"
        assert not LOSSES.create(values["loss"]).needs_teacher
    else:
        if weights is None:
            alpha, temperature = re.fullmatch(r".*/alpha_([\d.]+)_Temp_([\d.]+)/params.json", name).groups()  # type: ignore[union-attr]
            weights = (float(alpha), float(temperature))
        assert values["teacher"]["model_dir"] == f"experiments/base_{teacher}"
        assert values["teacher"]["restore_file"] == "best"
        assert (values["loss"]["name"], values["loss"]["reduction"]) == ("kd", "mean")
        assert (values["loss"]["alpha"], values["loss"]["temperature"]) == weights


@pytest.mark.parametrize("parent", GRIDS)
def test_the_grids_have_all_their_points(parent: str) -> None:
    folders = [name.split("/")[2] for name in FILES if row_of(name) == f"{parent}{GRID}"]
    assert sorted(folders) == sorted(f"alpha_{alpha}_Temp_{temp}" for alpha, temp in GRIDS[parent])


@pytest.mark.parametrize(
    ("alpha", "temperature", "total"),
    [(0.9, 20, 0.200773), (0.95, 6, 0.206618), (0.5, 1.5, 0.249206), (0.9, 4, 0.216190)],
)
def test_a_translated_loss_has_the_ancestors_values(alpha: float, temperature: float, total: float) -> None:
    """Computed in float64 from the ancestor's formula: the mean over batch and classes."""
    loss = LOSSES.create(resolved(changed(alpha=alpha, temperature=temperature))["loss"])
    student = Outputs(torch.tensor([[2, 0, -1], [0.5, 1.5, -0.5]], dtype=torch.float64))
    teacher = Outputs(torch.tensor([[1, 2, -1], [0, 3, 0]], dtype=torch.float64))
    labels, indices = torch.tensor([0, 1]), torch.arange(2)
    terms = loss(student, teacher, Batch(torch.zeros(2, 3, 1, 1), labels, indices, torch.zeros_like(indices)))
    assert sum(term.item() for term in terms.values()) == pytest.approx(total, abs=1e-6)


def test_the_names_of_nets_are_those_of_the_registry() -> None:
    for version in (
        "cnn",
        "resnet18",
        "wrn",
        "densenet",
        "resnext29",
        "preresnet110",
        "cnn_distill",
        "resnet18_distill",
    ):
        values, lines, problems = translate(changed(model_version=version))
        assert problems == []
        assert values["student"]["name"] == net_of(version) == version.split("_")[0]
        assert values["student"]["name"] in NETS
        assert any("could not be trained there" in line for line in lines) == (
            net_of(version) not in ("cnn", "resnet18")
        )


def test_a_net_that_only_taught_is_trained_as_resnet18_was() -> None:
    for version in ("wrn", "densenet", "resnext29", "preresnet110"):
        values = resolved(changed(RESNET, model_version=version))
        assert values == resolved(RESNET) | {"student": values["student"]}


def test_an_alpha_of_0_is_taken_as_it_is() -> None:
    values = resolved(changed(alpha=0, temperature=1))
    assert (values["loss"]["alpha"], values["teacher"]["model_dir"]) == (0, "experiments/base_resnet18")


def test_the_defaults_are_what_the_files_without_the_keys_meant() -> None:
    absent = changed(subset_percent=..., augmentation=..., save_summary_steps=...)
    assert translate(absent)[0] == translate(changed(subset_percent=1.0, augmentation="yes"))[0]


def test_what_was_given_is_not_changed() -> None:
    raw = changed(teacher={"model_dir": "resnet18"}, dataset={"data_dir": "x"})
    before = json.dumps(raw)
    translate(raw)
    assert json.dumps(raw) == before


def test_nothing_of_it_loads_torch() -> None:
    code = "import sys, model.legacy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- what is wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "key", "words"),
    [
        (changed(tempereture=3), "tempereture", "unknown key; did you mean 'temperature'?"),
        (changed(datset={}), "datset", "unknown key; did you mean 'dataset'?"),
        (changed(zzz=1), "zzz", "unknown key; known: alpha, augmentation, "),
        (changed(model_version="cnn_distil"), "model_version", "'cnn_distil'; did you mean 'cnn_distill'?"),
        (changed(model_version="lenet_distill"), "model_version", "unknown model_version 'lenet_distill'"),
        (changed(model_version="wrn_distill"), "model_version", "unknown model_version 'wrn_distill'"),
        (changed(model_version=7), "model_version", "expected text, got 7"),
        (changed(teacher="resnet19"), "teacher", "unknown teacher 'resnet19'; did you mean 'resnet18'?"),
        (changed(PLAIN, teacher="zzz"), "teacher", "known: densenet, none, preresnet110, resnet18, resnext29, wrn"),
        (changed(teacher="none"), "teacher", "model_version 'cnn_distill' needs one; known: densenet, "),
        (changed(teacher=...), "teacher", "is missing; model_version 'cnn_distill' needs it"),
        (changed(alpha=...), "alpha", "is missing; model_version 'cnn_distill' needs it"),
        (changed(temperature=...), "temperature", "is missing; model_version 'cnn_distill' needs it"),
        (changed(dropout_rate=...), "dropout_rate", "is missing; model_version 'cnn_distill' needs it"),
        (changed(PLAIN, num_channels=...), "num_channels", "is missing; model_version 'cnn' needs it"),
        (changed(learning_rate=...), "learning_rate", "is missing"),
        (changed(batch_size=...), "batch_size", "is missing"),
        (changed(num_epochs=...), "num_epochs", "is missing"),
        (changed(augmentation="Yes"), "augmentation", "'Yes' is not one of 'yes' or 'no'"),
        (changed(augmentation=True), "augmentation", "True is not one of 'yes' or 'no'"),
        (changed(alpha=1.4), "alpha", "1.4 is above 1"),
        (changed(PLAIN, alpha=-0.1), "alpha", "-0.1 is below 0"),
        (changed(alpha="0.9"), "alpha", "expected a number, got '0.9'"),
        (changed(alpha=True), "alpha", "expected a number, got True"),
        (changed(alpha=None), "alpha", "expected a number, got None"),
        (changed(alpha=float("nan")), "alpha", "not a finite number"),
        (changed(temperature=0), "temperature", "0 is not above 0"),
        (changed(subset_percent=0), "subset_percent", "0 is not above 0"),
        (changed(subset_percent=5), "subset_percent", "5 is above 1"),
        (changed(learning_rate=0.0), "learning_rate", "0.0 is not above 0"),
        (changed(batch_size=1), "batch_size", "1 is below 2"),
        (changed(batch_size=12.5), "batch_size", "expected a whole number, got 12.5"),
        (changed(num_epochs=0), "num_epochs", "0 is below 1"),
        (changed(dropout_rate=1), "dropout_rate", "1 is not below 1"),
        (changed(RESNET, dropout_rate="x"), "dropout_rate", "expected a number, got 'x'"),
        (changed(num_channels=0), "num_channels", "0 is below 1"),
        (changed(save_summary_steps=0), "save_summary_steps", "0 is below 1"),
        (changed(num_workers=-1), "num_workers", "-1 is below 0"),
    ],
)
def test_what_is_wrong_is_told_with_its_key(raw: dict[str, Any], key: str, words: str) -> None:
    values, lines, problems = translate(raw)
    assert (values, lines) == ({}, [])
    assert [found for found, _ in problems] == [key]
    assert words in problems[0][1]
    assert "\n" not in problems[0][1]
    assert as_sections(raw) == raw
    assert assumptions(raw) == []


def test_all_problems_are_told_at_once() -> None:
    raw = changed(alpha=2, temperature=0, augmentation="maybe", teacher="x", typo=1, batch_size=...)
    assert {key for key, _ in translate(raw)[2]} == {
        "alpha",
        "temperature",
        "augmentation",
        "teacher",
        "typo",
        "batch_size",
    }


def test_values_that_only_our_schema_refuses_are_refused_by_it() -> None:
    assert resolve(changed(temperature=2000.0))[1] == [("loss.temperature", "2000.0 is above 1000.0")]


# --- ours beside the ancestor's -------------------------------------------------------------------------------


def test_what_of_ours_may_stand_there_is_all_that_the_schema_has() -> None:
    assert {*OURS, "teacher"} == {*schema.SECTIONS, *options_of(schema.run_options), "teacher"} - {"num_epochs"}


def test_sections_of_ours_are_laid_over_option_by_option() -> None:
    extra = {"dataset": {"data_dir": "/data", "validate_on": "val"}, "loss": {"reduction": "batchmean"}, "seed": 7}
    values, plain = resolved(changed(**extra)), resolved(DISTIL)
    assert (values["dataset"]["data_dir"], values["dataset"]["validate_on"]) == ("/data", "val")
    assert values["dataset"] | {"data_dir": "data-cifar10", "validate_on": "test"} == plain["dataset"]
    assert values["loss"] == plain["loss"] | {"reduction": "batchmean"}
    assert values["seed"] == 7
    assert resolved(changed(optimizer={"weight_decay": 1e-4}))["optimizer"] == plain["optimizer"] | {
        "weight_decay": 1e-4
    }


def test_a_section_of_ours_is_checked_like_any_other() -> None:
    assert resolve(changed(dataset={"data_dri": "/data"}))[1][0][0] == "dataset.data_dri"
    assert resolve(changed(loss=5))[1][0][0] == "loss"
    assert resolve(changed(dataset=[]))[1][0][0] == "dataset"
    assert resolve(changed(seed={"a": 1}))[1][0][0] == "seed"
    assert resolve(changed(teacher=5))[1][0][0] == "teacher"


@pytest.mark.parametrize(
    ("section", "option", "value", "key"),
    [
        ("student", "name", "resnet18", "model_version"),
        ("student", "num_channels", 8, "num_channels"),
        ("student", "dropout_rate", 0.1, "dropout_rate"),
        ("dataset", "batch_size", 64, "batch_size"),
        ("dataset", "augmentation", "none", "augmentation"),
        ("dataset", "subset_fraction", 0.5, "subset_percent"),
        ("dataset", "num_workers", 0, "num_workers"),
        ("loss", "alpha", 0.1, "alpha"),
        ("loss", "temperature", 2, "temperature"),
        ("optimizer", "learning_rate", 0.1, "learning_rate"),
    ],
)
def test_an_option_that_is_given_in_both_ways_is_refused(section: str, option: str, value: Any, key: str) -> None:
    _, lines, problems = translate(changed(subset_percent=0.5, **{section: {option: value}}))
    assert lines == []
    assert problems == [(f"{section}.{option}", f"{key} says it too, in the ancestor's way; keep that one")]


def test_an_option_that_the_file_leaves_open_or_has_in_vain_may_be_given_in_our_way() -> None:
    wrn = FILES["experiments/base_wrn/params.json"]
    ours = {"dataset": {"augmentation": "flip", "subset_fraction": 0.5}, "student": {"dropout_rate": 0.1}}
    values = resolved(changed(wrn, **ours))
    assert "no subset_percent" not in said(changed(wrn, **ours))
    assert "no augmentation" not in said(changed(wrn, **ours))
    assert (values["dataset"]["augmentation"], values["student"]["dropout_rate"]) == ("flip", 0.1)
    kd = {"name": "kd", "alpha": 0.5, "temperature": 4.0}
    values = resolved(changed(PLAIN, loss=kd, teacher={"model_dir": "experiments/mine"}))
    assert (values["loss"]["alpha"], values["teacher"]["model_dir"]) == (0.5, "experiments/mine")
    assert "unused: alpha, temperature, save" in said(
        changed(PLAIN, loss=kd, teacher={"model_dir": "experiments/mine"})
    )


def test_a_teachers_section_takes_the_place_of_its_name() -> None:
    values = resolved(changed(teacher={"model_dir": "experiments/mine", "restore_file": "last"}))
    assert (values["teacher"]["model_dir"], values["teacher"]["restore_file"]) == ("experiments/mine", "last")
    assert resolve(changed(teacher={"restore_file": "last"}))[1][0][0] == "teacher.model_dir"
    assert resolve(changed(teacher=None))[1][0][0] == "teacher"
    several = resolved(changed(teacher=["wrn", {"model_dir": "densenet"}, "experiments/mine"]))["teacher"]
    places = ["experiments/base_wrn", "experiments/base_densenet", "experiments/mine"]
    assert [section["model_dir"] for section in several] == places


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("alpha=0.5", "loss.alpha", 0.5),
        ("temperature=2", "loss.temperature", 2),
        ("num_epochs=1", "num_epochs", 1),
        ("augmentation=no", "dataset.augmentation", "none"),
        ("subset_percent=0.05", "dataset.subset_fraction", 0.05),
        ("teacher=wrn", "teacher.model_dir", "experiments/base_wrn"),
        ("teacher.restore_file=last", "teacher.model_dir", "experiments/base_resnet18"),
        ("teacher.model_dir=experiments/mine", "teacher.model_dir", "experiments/mine"),
        ("model_version=resnet18_distill", "optimizer.name", "sgd"),
        ("dataset.data_dir=/data", "dataset.data_dir", "/data"),
        ("optimizer.weight_decay=0.001", "optimizer.weight_decay", 0.001),
        ("seed=3", "seed", 3),
    ],
)
def test_overrides_speak_of_the_file_as_it_is(override: str, path: str, value: Any) -> None:
    found: Any = Params.check(changed(), Path("params.json"), resolve, [override]).dict
    for part in path.split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("alpha=1.4", "--overrides: alpha: 1.4 is above 1.0"),
        ("loss.alpha=0.5", "--overrides: loss.alpha: alpha says it too, in the ancestor's way; keep that one"),
        ("dataset.data_dri=x", "--overrides: dataset.data_dri: unknown option; did you mean 'data_dir'?"),
    ],
)
def test_a_wrong_override_is_told_as_one(override: str, line: str) -> None:
    with pytest.raises(RunError) as caught:
        Params.check(changed(), Path("params.json"), resolve, [override])
    assert str(caught.value) == line


# --- what is said ---------------------------------------------------------------------------------------------


def said(raw: dict[str, Any]) -> str:
    return "\n".join(assumptions(raw))


def test_what_is_assumed_is_said() -> None:
    text = said(FILES["experiments/cnn_distill_alpha_temp/alpha_0.9_Temp_5/params.json"])
    assert text.splitlines()[0].startswith("VALIDATED AND SELECTED ON THE TEST SET")
    for words in (
        "dataset.data_dir is data-cifar10",
        "no subset_percent: all training images",
        "no augmentation: yes",
        "adam, rate x 0.2 every 100 epochs",
        "KL is also divided by the number of classes",
        "teacher resnet18 is experiments/base_resnet18",
        "seed 230",
        "precision fp32",
        "unused: save_summary_steps",
    ):
        assert words in text
    assert "unused: dropout_rate, num_channels, save_summary_steps" in said(changed(RESNET, alpha=..., temperature=...))
    assert "unused: teacher, alpha, temperature, save_summary_steps" in said(
        FILES["experiments/base_cnn/nodropout/params.json"]
    )
    assert "model_version wrn could not be trained there; it is trained as resnet18 was" in said(
        FILES["experiments/base_wrn/params.json"]
    )
    assert "sgd, rate x 0.1 every 150 epochs" in said(RESNET)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": {"validate_on": "val"}}, "TEST SET"),
        ({"dataset": {"data_dir": "/data"}}, "data_dir"),
        ({"loss": {"reduction": "batchmean"}}, "KL"),
        ({"teacher": {"model_dir": "experiments/mine"}}, "experiments/base"),
        ({"optimizer": {"weight_decay": 0.1}}, "adam"),
        ({"schedule": {"step_size": 5}}, "adam"),
        ({"seed": 1}, "seed"),
        ({"precision": "auto"}, "precision"),
        ({"save_summary_steps": ...}, "unused"),
    ],
)
def test_what_the_file_says_itself_is_no_assumption(changes: dict[str, Any], words: str) -> None:
    assert words in said(DISTIL)
    assert words not in said(changed(**changes))


def test_others_params_are_left_as_they_are() -> None:
    raw = {"num_epochs": 1, "student": {"name": "cnn"}, "teacher": "resnet18"}
    assert not is_flat(raw)
    assert is_flat(DISTIL)
    assert as_sections(raw) == raw
    assert assumptions(raw) == []


# --- checkpoints ----------------------------------------------------------------------------------------------

FACTS = {
    "section": {"name": "tiny"},
    "classes": ["cat", "dog"],
    "num_classes": 2,
    "shape": [3, 32, 32],
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.247, 0.243, 0.261],
}


def test_a_checkpoint_of_the_ancestor_is_of_its_directorys_net_on_the_data_at_hand() -> None:
    record = net_record(PLAIN, FACTS)
    assert record == FACTS | {"section": {"name": "cnn", "num_channels": 32, "dropout_rate": 0.5}}
    assert net_record({"student": {"name": "resnet18"}}, FACTS) == FACTS | {"section": {"name": "resnet18"}}


@pytest.mark.parametrize("net", ["wrn", "densenet", "resnext29", "preresnet110"])
def test_the_teachers_that_came_trained_have_their_own_normalisation(net: str) -> None:
    """bearpaw/pytorch-classification, where they come from, normalises with this std."""
    record = net_record(changed(RESNET, model_version=net), FACTS)
    assert record["mean"] == [0.4914, 0.4822, 0.4465]
    assert record["std"] == [0.2023, 0.1994, 0.2010]
    assert record["section"] == {"name": net}
    assert normalisation_of(net) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def test_the_ancestors_own_nets_have_their_datasets_normalisation() -> None:
    assert normalisation_of("cnn") is normalisation_of("resnet18") is None


def test_what_was_trained_on_other_images_is_not_taken_for_the_ancestors() -> None:
    record = net_record({"student": {"name": "wrn"}, "dataset": {"name": "cifar100"}}, FACTS)
    assert (record["mean"], record["std"]) == (FACTS["mean"], FACTS["std"])


def test_a_normalisation_that_params_name_is_the_nets() -> None:
    own = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    for name in ("wrn", "resnet18"):
        assert (
            net_record({"student": {"name": name}, "dataset": {"name": "cifar10", **own}}, FACTS).items() >= own.items()
        )
    record = net_record(changed(RESNET, dataset={"std": own["std"]}), FACTS)
    assert (record["mean"], record["std"]) == (FACTS["mean"], own["std"])


@pytest.mark.parametrize("params", [{}, {"student": "cnn"}, {"student": {}}, changed(model_version="x")])
def test_a_checkpoint_beside_params_that_name_no_net_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="which net the checkpoint holds") as caught:
        net_record(params, FACTS)
    assert caught.value.reason == "checkpoint"


def test_the_reference_has_a_meaning_for_every_key() -> None:
    assert [*options_of(flat_options)] == [*PLAIN]
    assert set(schema._meanings(flat_options)) == set(PLAIN)


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("dataset", {"name": "digits"}),
        ("dataset", {"name": "image_folder", "data_dir": "/images"}),
        ("schedule", {"name": "cosine"}),
        ("loss", {"name": "dkd"}),
        ("optimizer", {"name": "sgd", "learning_rate": 0.1}),
    ],
)
def test_a_section_of_ours_may_name_another_entry(key: str, section: dict[str, Any]) -> None:
    """Options that only the old entry takes go; those that every dataset takes stay."""
    values, problems = resolve(changed(**{key: section}))
    assert problems == []
    assert values[key]["name"] == section["name"]
    assert values["dataset"]["validate_on"] == "test"
    assert values["dataset"]["batch_size"] == 128

"""The committed experiments, and the documents that name them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Script, committed_files

import train
from model import schema
from model.registry import options_of
from sweep.children import Child, Planner
from sweep.space import cover, grid
from utils import flatten, read_json

FOLDER = ROOT / "experiments"
GENERATED = "cifar100/"  # hundreds of directories that a script writes: see test_recipes.py

EXPERIMENTS = {
    "README.md": """
        base_resnet20 cnn_distill_resnet20 cnn_distill_tpe demo/alpha_temp demo/student demo/student_kd demo/teacher
        takd/teacher takd/assistant takd/student takd/student_direct
        born_again/gen0 born_again/gen1 born_again/gen2 born_again/gen3 born_again/ensemble
        ensemble_kd dml/resnet20 tfkd/resnet20
    """,
    "s004.md": """
        base_cnn base_cnn/noaug_nodrop base_cnn/nodropout base_cnn_subset
        base_densenet base_preresnet110 base_resnet18 base_resnext29 base_wrn
        cnn_distill cnn_distill/noaug_nodrop cnn_distill/nodropout
        cnn_distill_alpha_temp cnn_distill_alpha_temp_high cnn_distill_nodropout_alpha_temp cnn_distill_subset
        resnet18_distill/densenet_teacher resnet18_distill/preresnet_teacher
        resnet18_distill/resnext_teacher resnet18_distill/wrn_teacher
    """,
    "s000/README.md": """
        teacher_vgg16 student_scratch student_scratch_sgd
        kd_ce_T1_a1.0 kd_mse_T1_a1.0 kd_ce_T1_a0.5 kd_mse_T1_a0.5
        kd_ce_T2_a0.5 kd_ce_T4_a0.5 kd_ce_T8_a0.5 kd_ce_T16_a0.5
        kd_ce_T16_a0.1 kd_ce_T16_a0.3 kd_ce_T16_a0.7 kd_ce_T16_a0.9 kd_ce_T16_a0.5_sgd
        search_loss search_T search_alpha todo_calibrated_T
        todo_5seeds/teacher_vgg16 todo_5seeds/student_scratch todo_5seeds/student_scratch_sgd
        todo_5seeds/kd_ce_T1_a1.0 todo_5seeds/kd_mse_T1 todo_5seeds/kd_ce_a0.5 todo_5seeds/kd_ce_T16
        todo_5seeds/kd_ce_T16_a0.5_sgd
    """,
    "s001/README.md": """
        teacher_c256 teacher_c101_ft30 teacher_c101_ft60
        M_kd_T5_a0.3_lr1e-4 M_ce_lr1e-4 M_kd_cos_lr1e-4 M_ce_cos_lr1e-4
        M_kd_lr2e-4 M_ce_lr2e-4 M_kd_cos_lr2e-4 M_ce_cos_lr2e-4
        tbd_aug/all tbd_aug/no_randaug tbd_aug/no_erasing tbd_aug/none tbd_T tbd_T_t2 tbd_alpha
    """,
    "s002/README.md": """
        effnetb0_ce effnetb0_ce_finetuned
        teacher_resnext29_32x8d teacher_resnet152 teacher_densenet40 teacher_resnext29_2x64d
        effnetb0_kd_resnext29_32x8d effnetb0_kd_resnet152 effnetb0_kd_densenet40
        effnetb0_kd_resnext29_32x8d_bm effnetb0_kd_resnet152_bm effnetb0_kd_densenet40_bm
        effnetb0_overhaul_resnet152 search_feature_weight
        imagenet/teacher_resnet152 imagenet/effb0_ce imagenet/effb0_kd_resnet152 imagenet/effb0_kd_resnet152_bm
    """,
    "s003/README.md": """
        teacher_vgg19bn teacher_resnet34 student_ce kd_T5 kd_T20 cifar100/teacher cifar100/ce cifar100/kd_T5
    """,
}

SEARCHES = {
    "demo/alpha_temp": 6,
    "cnn_distill_alpha_temp": 25,
    "cnn_distill_alpha_temp_high": 4,
    "cnn_distill_nodropout_alpha_temp": 40,
    "cnn_distill_subset": 45,
    "s000/search_loss": 8,
    "s000/search_T": 5,
    "s000/search_alpha": 5,
    "s000/todo_calibrated_T": 35,
    "s000/todo_5seeds/teacher_vgg16": 5,
    "s000/todo_5seeds/student_scratch": 5,
    "s000/todo_5seeds/student_scratch_sgd": 5,
    "s000/todo_5seeds/kd_ce_T1_a1.0": 5,
    "s000/todo_5seeds/kd_mse_T1": 10,
    "s000/todo_5seeds/kd_ce_a0.5": 25,
    "s000/todo_5seeds/kd_ce_T16": 20,
    "s000/todo_5seeds/kd_ce_T16_a0.5_sgd": 5,
    "s001/tbd_T": 6,
    "s001/tbd_T_t2": 6,
    "s001/tbd_alpha": 5,
    "s002/search_feature_weight": 4,
}


@cache
def committed(file: str = "params.json") -> tuple[str, ...]:
    """Returns the directories below experiments/ that have such a file; git ignores a search's children.

    Those that a script writes are left out.
    """
    ends = (name for name in committed_files() if name.startswith("experiments/") and name.endswith(f"/{file}"))
    found = sorted(name.removeprefix("experiments/").removesuffix(f"/{file}") for name in ends)
    return tuple(name for name in found if not name.startswith(GENERATED))


@cache
def params(name: str) -> dict[str, Any]:
    """Returns the complete params of an experiment by their dotted keys."""
    values, problems = schema.resolve(read_json(FOLDER / name / "params.json"))
    assert not problems
    return flatten(values)


def children_of(parent: str) -> list[Child]:
    """Returns the children of a grid."""
    planner = Planner.read(FOLDER / parent)
    return planner.children(grid(planner.search))


def expected() -> Iterator[tuple[str, str, str]]:
    """Yields (document, name in it, directory below experiments/) of every experiment."""
    for document, names in EXPERIMENTS.items():
        group = Path(document).parent
        yield from ((document, name, str(group / name)) for name in names.split())


# --- what is there ----------------------------------------------------------------------------------------


def test_the_committed_experiments_are_those_that_are_expected() -> None:
    assert list(committed()) == sorted(directory for _, _, directory in expected())


def test_every_committed_experiment_passes_the_check(script: Script) -> None:
    ended = script(train, "--check", "--model_dir", *[FOLDER / name for name in committed()])
    assert ended.status == 0, ended.err
    assert f"{len(committed())} of {len(committed())}" in ended.out


def test_the_committed_searches_are_those_that_are_expected() -> None:
    assert sorted(committed("search.json")) == sorted([*SEARCHES, "cnn_distill_tpe"])


@pytest.mark.parametrize(("parent", "size"), SEARCHES.items())
def test_a_search_has_its_children_and_all_of_them_can_be_run(parent: str, size: int) -> None:
    children = children_of(parent)
    assert len(children) == size
    for child in children:
        assert not schema.resolve(child.params)[1]


def test_the_search_by_tpe_can_be_run_at_all_ends_of_its_ranges() -> None:
    planner = Planner.read(FOLDER / "cnn_distill_tpe")
    points = cover(planner.search)
    assert len(points) >= 2
    for child in planner.children([*points, *planner.search.include]):
        assert not schema.resolve(child.params)[1]


def test_git_ignores_no_experiment() -> None:
    paths = [f"experiments/{name}/params.json" for name in committed()]
    command = ["git", "-c", f"safe.directory={ROOT}", "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(command, cwd=ROOT, input="\n".join(paths), capture_output=True, text=True).stdout
    assert ignored == ""


def test_the_five_seeds_of_seed_000_make_80_runs() -> None:
    assert sum(size for parent, size in SEARCHES.items() if parent.startswith("s000/todo_5seeds/")) == 80


@pytest.mark.parametrize("name", committed())
def test_teachers_and_initial_weights_are_experiments_here_on_the_same_images(name: str) -> None:
    own = params(name)
    teachers = [key for key in own if re.fullmatch(r"teacher\.(\d+\.)?model_dir", key)]
    for key in (*teachers, "student.init_from"):
        if own.get(key):
            other = params(own[key].removeprefix("experiments/"))
            pair = {own["dataset.name"], other["dataset.name"]}
            assert len(pair) == 1 or pair == {"caltech101", "caltech256"}, key
            assert pair != {"caltech101", "caltech256"} or key == "student.init_from"
            if key == "student.init_from":
                assert own["student.name"] == other["student.name"]


@pytest.mark.parametrize("name", committed())
def test_every_epoch_is_selected_on_images_that_are_carved_from_the_training_set(name: str) -> None:
    own = params(name)
    assert own["dataset.validate_on"] == "val"
    assert 0 < own["dataset.val_fraction"] <= 0.25


# --- published settings, typed from the publications ------------------------------------------------------

CROP_FLIP = {"dataset.augmentation": "crop_flip"}
NORMALISED_000 = {"dataset.mean": [0.4914, 0.4822, 0.4465], "dataset.std": [0.2023, 0.1994, 0.2010]}
RECIPE_000 = {"num_epochs": 300, "dataset.name": "cifar10", "dataset.batch_size": 128, **CROP_FLIP, **NORMALISED_000}
ADAM_000 = {"optimizer.name": "adam", "optimizer.learning_rate": 1e-4, "optimizer.weight_decay": 0.0}
ADAM_000 |= {"schedule.name": "constant", "student.name": "studentnet", "student.num_blocks": 4}
SGD_000 = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.1, "optimizer.momentum": 0.9}
SGD_000 |= {"optimizer.weight_decay": 0.0, "optimizer.nesterov": False, "schedule.name": "multistep"}
SGD_000 |= {"schedule.milestones": [150, 250], "schedule.gamma": 0.1, "schedule.reset_momentum": True}

AUGMENTED_001 = ["random_resized_crop", "horizontal_flip", "rand_augment", "random_erasing"]
RECIPE_001 = {"dataset.batch_size": 16, "dataset.image_size": 224, "dataset.mean": [0.5] * 3, "dataset.std": [0.5] * 3}
RECIPE_001 |= {"optimizer.name": "adamw", "optimizer.weight_decay": 0.01}
STUDENT_001 = {**RECIPE_001, "dataset.name": "caltech101", "num_epochs": 120, "student.name": "mobilenets_m"}
CONSTANT = {"schedule.name": "constant"}
COSINE_001 = {"schedule.name": "cosine", "schedule.final_factor": 0.1, "schedule.per": "iteration"}

AUGMENTED_002 = ["crop", "horizontal_flip", {"name": "rotation", "degrees": 15}]
AUGMENTED_002 += [{"name": "color_jitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}]
RECIPE_002 = {"num_epochs": 1500, "dataset.name": "cifar10", "dataset.batch_size": 256, **NORMALISED_000}
RECIPE_002 |= {"dataset.augmentation": AUGMENTED_002, "optimizer.name": "sgd", "optimizer.learning_rate": 0.1}
RECIPE_002 |= {"optimizer.momentum": 0.9, "optimizer.nesterov": True, "optimizer.weight_decay": 0.0}
RECIPE_002 |= {"schedule.name": "warm_restarts", "schedule.first_cycle_epochs": 10, "schedule.cycle_factor": 1}
RECIPE_002 |= {"schedule.min_learning_rate": 0.0, "schedule.per": "epoch"}

RECIPE_003 = {"seed": 42, "dataset.batch_size": 128, "dataset.augmentation": ["horizontal_flip", "vertical_flip"]}
RECIPE_003 |= {"dataset.mean": [0.485, 0.456, 0.406], "dataset.std": [0.229, 0.224, 0.225], "student.init": "he"}
CIFAR10_003 = {**RECIPE_003, "dataset.name": "cifar10", "num_epochs": 50, "optimizer.name": "adam"}
CIFAR10_003 |= {"optimizer.learning_rate": 1e-3, "optimizer.beta1": 0.5, "optimizer.beta2": 0.999}
CIFAR10_003 |= {"schedule.name": "cosine", "schedule.period_epochs": 10, "schedule.final_factor": 0.0}
CIFAR100_003 = {**RECIPE_003, "dataset.name": "cifar100", "num_epochs": 100, "optimizer.name": "sgd"}
CIFAR100_003 |= {"optimizer.learning_rate": 1e-3, "optimizer.momentum": 0.9, "optimizer.weight_decay": 5e-4}
CIFAR100_003 |= {"schedule.name": "step", "schedule.step_size": 15, "schedule.gamma": 0.25}

CNN_004 = {"dataset.name": "cifar10", "dataset.batch_size": 128, "student.name": "cnn", "student.num_channels": 32}
CNN_004 |= {"optimizer.name": "adam", "optimizer.learning_rate": 1e-3, "schedule.name": "constant"}
SUBSET_004 = {"dataset.subset_fraction": 0.05, "dataset.subset_rule": "ancestor", "num_epochs": 50}
SGD_004 = {"dataset.batch_size": 128, **CROP_FLIP, "student.name": "resnet18", "optimizer.name": "sgd"}
SGD_004 |= {"optimizer.learning_rate": 0.1, "optimizer.momentum": 0.9, "optimizer.weight_decay": 5e-4}
SGD_004 |= {"optimizer.nesterov": False, "schedule.name": "step", "schedule.step_size": 150, "schedule.gamma": 0.1}


def no_teacher(**others: Any) -> dict[str, Any]:
    return {"loss.name": "ce", "teacher": None, **others}


def taught(teacher: str, alpha: float, temperature: float, **others: Any) -> dict[str, Any]:
    """Returns what an experiment with the `kd` loss must say; of what is not named the default."""
    loss = {"divergence": "kl", "reduction": "batchmean", "temperature_squared": True, "alpha_of": "teacher", **others}
    named = {"name": "kd", "alpha": alpha, "temperature": temperature, "teacher_noise_std": 0.0, **loss}
    return {"teacher.model_dir": f"experiments/{teacher}", **{f"loss.{key}": value for key, value in named.items()}}


def taught_000(alpha: float, temperature: float, mse: bool = False) -> dict[str, Any]:
    loss = {"divergence": "mse_probabilities", "reduction": "mean"} if mse else {"divergence": "cross_entropy"}
    return {**RECIPE_000, **taught("s000/teacher_vgg16", alpha, temperature, **loss)}


def taught_001(temperature: float, **others: Any) -> dict[str, Any]:
    loss = {"alpha_of": "hard", "temperature_squared": False, **others}
    return {**STUDENT_001, **taught("s001/teacher_c101_ft30", 0.3, temperature, **loss)}


def rate(value: float) -> dict[str, Any]:
    return {"optimizer.learning_rate": value}


PUBLISHED: dict[str, dict[str, Any]] = {
    # 000
    "s000/teacher_vgg16": {**RECIPE_000, **SGD_000, **no_teacher(), "student.name": "vgg16"},
    "s000/student_scratch": {**RECIPE_000, **ADAM_000, **no_teacher()},
    "s000/student_scratch_sgd": {**RECIPE_000, **SGD_000, **no_teacher(), "student.name": "studentnet"},
    "s000/kd_ce_T1_a1.0": {**taught_000(1.0, 1), **ADAM_000},
    "s000/kd_mse_T1_a1.0": {**taught_000(1.0, 1, mse=True), **ADAM_000},
    "s000/kd_ce_T1_a0.5": {**taught_000(0.5, 1), **ADAM_000},
    "s000/kd_mse_T1_a0.5": {**taught_000(0.5, 1, mse=True), **ADAM_000},
    "s000/kd_ce_T2_a0.5": {**taught_000(0.5, 2), **ADAM_000},
    "s000/kd_ce_T4_a0.5": {**taught_000(0.5, 4), **ADAM_000},
    "s000/kd_ce_T8_a0.5": {**taught_000(0.5, 8), **ADAM_000},
    "s000/kd_ce_T16_a0.5": {**taught_000(0.5, 16), **ADAM_000},
    "s000/kd_ce_T16_a0.1": {**taught_000(0.1, 16), **ADAM_000},
    "s000/kd_ce_T16_a0.3": {**taught_000(0.3, 16), **ADAM_000},
    "s000/kd_ce_T16_a0.7": {**taught_000(0.7, 16), **ADAM_000},
    "s000/kd_ce_T16_a0.9": {**taught_000(0.9, 16), **ADAM_000},
    "s000/kd_ce_T16_a0.5_sgd": {**taught_000(0.5, 16), **SGD_000, "student.name": "studentnet"},
    # 001
    "s001/teacher_c256": {
        **RECIPE_001,
        **no_teacher(),
        **rate(1e-4),
        "dataset.name": "caltech256",
        "dataset.augmentation": AUGMENTED_001,
        "num_epochs": 300,
        "student.name": "mobilenetv2",
        "schedule.name": "warm_restarts",
        "schedule.first_cycle_epochs": 34560 / 1728,  # iterations; iterations of an epoch
        "schedule.cycle_factor": 2,
        "schedule.min_learning_rate": 9e-6,
        "schedule.per": "iteration",
    },
    **{
        f"s001/teacher_c101_ft{epochs}": {
            **RECIPE_001,
            **CONSTANT,
            **no_teacher(),
            **rate(1e-4),
            "dataset.name": "caltech101",
            "dataset.augmentation": AUGMENTED_001,
            "num_epochs": epochs,
            "student.name": "mobilenetv2",
            "student.init_from": "experiments/s001/teacher_c256",
            "student.freeze": ["features"],
            "student.freeze_bn": False,
        }
        for epochs in (30, 60)
    },
    "s001/M_kd_T5_a0.3_lr1e-4": {**taught_001(5), **rate(1e-4), **CONSTANT, "dataset.augmentation": AUGMENTED_001},
    "s001/M_ce_lr1e-4": {**STUDENT_001, **no_teacher(), **rate(1e-4), **CONSTANT},
    "s001/M_kd_cos_lr1e-4": {**taught_001(5), **rate(1e-4), **COSINE_001},
    "s001/M_ce_cos_lr1e-4": {**STUDENT_001, **no_teacher(), **rate(1e-4), **COSINE_001},
    "s001/M_kd_lr2e-4": {**taught_001(5), **rate(2e-4), **CONSTANT},
    "s001/M_ce_lr2e-4": {**STUDENT_001, **no_teacher(), **rate(2e-4), **CONSTANT},
    "s001/M_kd_cos_lr2e-4": {**taught_001(5), **rate(2e-4), **COSINE_001},
    "s001/M_ce_cos_lr2e-4": {**STUDENT_001, **no_teacher(), **rate(2e-4), **COSINE_001},
    **{
        f"s001/tbd_aug/{name}": {
            **taught_001(3),
            **rate(2e-4),
            **CONSTANT,
            "dataset.augmentation": [step for step in AUGMENTED_001 if step not in left_out],
        }
        for name, left_out in {
            "all": (),
            "no_randaug": ("rand_augment",),
            "no_erasing": ("random_erasing",),
            "none": ("rand_augment", "random_erasing"),
        }.items()
    },
    "s001/tbd_T": {**taught_001(3), **rate(2e-4), **CONSTANT},
    "s001/tbd_alpha": {**taught_001(3), **rate(2e-4), **CONSTANT},
    "s001/tbd_T_t2": {**taught_001(3, temperature_squared=True), **rate(2e-4), **CONSTANT},
    # 002
    "s002/effnetb0_ce": {**RECIPE_002, **no_teacher(), "student.name": "efficientnet_b0_cifar"},
    **{
        f"s002/teacher_{net}": {**RECIPE_002, **no_teacher(), "student.name": net}
        for net in ("resnext29_32x8d", "resnet152", "densenet40", "resnext29_2x64d")
    },
    **{
        f"s002/effnetb0_kd_{net}{suffix}": {
            **RECIPE_002,
            **taught(f"s002/teacher_{net}", 0.8, 3, reduction=reduction),
            "student.name": "efficientnet_b0_cifar",
            "student.init_from": "experiments/s002/effnetb0_ce",
        }
        for net in ("resnext29_32x8d", "resnet152", "densenet40")
        for suffix, reduction in (("", "mean"), ("_bm", "batchmean"))
    },
    "s002/effnetb0_overhaul_resnet152": {
        **RECIPE_002,
        "teacher.model_dir": "experiments/s002/teacher_resnet152",
        "loss.ce.name": "ce",
        "loss.overhaul.name": "overhaul",
        "loss.overhaul.weight": 1e-3,
        "loss.overhaul.teacher_statistics": "batch",
    },
    "s002/imagenet/teacher_resnet152": {**no_teacher(), "num_epochs": 0, "student.name": "torchvision/resnet152"},
    "s002/imagenet/effb0_kd_resnet152": {
        **taught("s002/imagenet/teacher_resnet152", 0.8, 3, reduction="mean"),
        "dataset.name": "imagenet",
        "dataset.batch_size": 256,
        "num_epochs": 10,
        "student.name": "torchvision/efficientnet_b0",
        "student.pretrained": True,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 1e-5,
    },
    # 003
    "s003/teacher_vgg19bn": {**CIFAR10_003, **no_teacher(), "student.name": "vgg19_bn_linear"},
    "s003/teacher_resnet34": {**CIFAR10_003, **no_teacher(), "student.name": "torchvision/resnet34"},
    "s003/student_ce": {**CIFAR10_003, **no_teacher(), "student.name": "studentmodel"},
    "s003/kd_T5": {**CIFAR10_003, **taught("s003/teacher_vgg19bn", 0.2, 5, alpha_of="hard")},
    "s003/kd_T20": {**CIFAR10_003, **taught("s003/teacher_vgg19bn", 0.2, 20, alpha_of="hard")},
    "s003/cifar100/teacher": {**CIFAR100_003, **no_teacher(), "student.name": "vgg19_bn_linear"},
    "s003/cifar100/ce": {**CIFAR100_003, **no_teacher(), "student.name": "studentmodel"},
    "s003/cifar100/kd_T5": {**CIFAR100_003, **taught("s003/cifar100/teacher", 0.2, 5, alpha_of="hard")},
    # 004
    "base_cnn": {**CNN_004, **CROP_FLIP, **no_teacher(), "num_epochs": 30, "student.dropout_rate": 0.5},
    "base_cnn/nodropout": {**CNN_004, **CROP_FLIP, **no_teacher(), "num_epochs": 30, "student.dropout_rate": 0.0},
    "base_cnn/noaug_nodrop": {**CNN_004, "dataset.augmentation": "none", "student.dropout_rate": 0.0},
    "base_cnn_subset": {**CNN_004, **CROP_FLIP, **SUBSET_004, **no_teacher(), "student.dropout_rate": 0.0},
    "base_resnet18": {**SGD_004, **no_teacher(), "num_epochs": 200},
    **{
        name: {
            **CNN_004,
            **CROP_FLIP,
            **taught("base_resnet18", 0.9, 20, reduction="mean"),
            "num_epochs": 30,
            "student.dropout_rate": dropout_rate,
        }
        for name, dropout_rate in {
            "cnn_distill": 0.5,
            "cnn_distill/nodropout": 0.0,
            "cnn_distill_alpha_temp": 0.5,
            "cnn_distill_alpha_temp_high": 0.5,
            "cnn_distill_nodropout_alpha_temp": 0.0,
        }.items()
    },
    "cnn_distill/noaug_nodrop": {
        **CNN_004,
        **taught("base_resnet18", 0.9, 20, reduction="mean"),
        "dataset.augmentation": "none",
        "student.dropout_rate": 0.0,
    },
    "cnn_distill_subset": {
        **CNN_004,
        **CROP_FLIP,
        **SUBSET_004,
        **taught("base_resnet18", 0.95, 2, reduction="mean"),
        "student.dropout_rate": 0.0,
    },
    **{
        f"resnet18_distill/{name}_teacher": {
            **SGD_004,
            **taught(f"base_{net}", 0.95, 6, reduction="mean"),
            "num_epochs": num_epochs,
        }
        for name, net, num_epochs in (
            ("densenet", "densenet", 200),
            ("preresnet", "preresnet110", 170),
            ("resnext", "resnext29", 175),
            ("wrn", "wrn", 170),
        )
    },
    **{
        f"base_{net}": {
            **no_teacher(),
            **NORMALISED_000,
            "num_epochs": num_epochs,
            "dataset.batch_size": batch_size,
            "student.name": net,
            "optimizer.learning_rate": 0.1,
            "optimizer.momentum": 0.9,
            "optimizer.weight_decay": weight_decay,
            "schedule.milestones": milestones,
            "schedule.gamma": gamma,
        }
        for net, num_epochs, batch_size, weight_decay, milestones, gamma in (
            ("wrn", 200, 128, 5e-4, [60, 120, 160], 0.2),
            ("densenet", 300, 64, 1e-4, [150, 225], 0.1),
            ("resnext29", 300, 128, 5e-4, [150, 225], 0.1),
            ("preresnet110", 164, 128, 1e-4, [81, 122], 0.1),
        )
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings_are_kept(name: str) -> None:
    own = params(name)
    assert {key: own.get(key) for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", [name for name in committed() if not name.startswith("born_again/")])
def test_the_seed_is_the_published_one_or_the_default(name: str) -> None:
    assert params(name)["seed"] == (42 if name.startswith("s003/") else 0 if "/todo_" in name else 230)


GRIDS: dict[str, dict[str, list[Any]]] = {
    "cnn_distill_alpha_temp": {"alpha": [0.3, 0.5, 0.7, 0.9, 0.95], "temperature": [2, 5, 10, 20, 30]},
    "cnn_distill_alpha_temp_high": {"alpha": [0.99, 0.999], "temperature": [2, 20]},
    "cnn_distill_nodropout_alpha_temp": {
        "alpha": [0.99, 0.95, 0.5, 0.1, 0.05],
        "temperature": [20.0, 10.0, 8.0, 6.0, 4.5, 3.0, 2.0, 1.5],
    },
    "cnn_distill_subset": {
        "alpha": [0.01, 0.1, 0.5, 0.95, 0.999],
        "temperature": [1, 2, 3, 4.5, 6, 8, 10, 20, 40],
    },
    "s000/search_T": {"temperature": [1, 2, 4, 8, 16]},
    "s000/search_alpha": {"alpha": [0.1, 0.3, 0.5, 0.7, 0.9]},
    "s001/tbd_T": {"temperature": [0.5, 1, 3, 5, 7, 10]},
    "s001/tbd_T_t2": {"temperature": [0.5, 1, 3, 5, 7, 10]},
    "s001/tbd_alpha": {"alpha": [0, 0.3, 0.5, 0.7, 1]},
    "s002/search_feature_weight": {"loss.overhaul.weight": [1e-3, 1e-4, 1e-5, 1e-6]},
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_published_grids_are_kept(name: str) -> None:
    assert read_json(FOLDER / name / "search.json") == GRIDS[name]


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        ("cnn_distill_alpha_temp", "alpha_0.95_Temp_2"),
        ("cnn_distill_nodropout_alpha_temp", "alpha_0.5_Temp_20.0"),
        ("cnn_distill_nodropout_alpha_temp", "alpha_0.5_Temp_1.5"),
        ("cnn_distill_subset", "alpha_0.95_Temp_4.5"),
        ("cnn_distill_subset", "alpha_0.95_Temp_40"),
    ],
)
def test_children_have_the_ancestors_names(parent: str, child: str) -> None:
    assert FOLDER / parent / child in [found.dir for found in children_of(parent)]


def runs(parent: str) -> list[dict[str, Any]]:
    """Returns the complete params of a search's children."""
    return [flatten(schema.resolve(child.params)[0]) for child in children_of(parent)]


@pytest.mark.parametrize(
    ("parent", "rows"),
    [
        ("s000/search_T", [f"kd_ce_T{t}_a0.5" for t in (1, 2, 4, 8, 16)]),
        ("s000/search_alpha", [f"kd_ce_T16_a0.{tenths}" for tenths in (1, 3, 5, 7, 9)]),
        ("s000/search_loss", ["kd_ce_T1_a1.0", "kd_ce_T1_a0.5", "kd_mse_T1_a1.0", "kd_mse_T1_a0.5"]),
    ],
)
def test_the_searches_of_seed_000_hold_the_rows_of_its_tables(parent: str, rows: list[str]) -> None:
    children = runs(parent)
    assert all(params(f"s000/{row}") in children for row in rows)


def test_the_five_seeds_of_seed_000_are_its_16_runs() -> None:
    rows = [params(directory) for directory in committed() if re.match("s000/(teacher|student|kd)_", directory)]
    wanted = [{**row, "seed": seed} for row in rows for seed in range(5)]
    found = [run for parent in SEARCHES if parent.startswith("s000/todo_5seeds/") for run in runs(parent)]
    assert len(rows) == 16
    assert sorted(map(repr, found)) == sorted(map(repr, wanted))


# --- chains -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "teachers"),
    [
        ("takd/teacher", []),
        ("takd/assistant", ["takd/teacher"]),
        ("takd/student", ["takd/assistant"]),
        ("takd/student_direct", ["takd/teacher"]),
        ("born_again/gen0", []),
        *((f"born_again/gen{generation}", [f"born_again/gen{generation - 1}"]) for generation in (1, 2, 3)),
        ("born_again/ensemble", [f"born_again/gen{generation}" for generation in (1, 2, 3)]),
        ("ensemble_kd", ["takd/teacher", "base_resnet18"]),
        ("dml/resnet20", []),
        ("tfkd/resnet20", []),
    ],
)
def test_chains_name_each_other_and_have_one_recipe(name: str, teachers: list[str]) -> None:
    own, base = params(name), params("base_resnet20")
    named = [value for key, value in own.items() if re.fullmatch(r"teacher\.(\d+\.)?model_dir", key)]
    assert named == [f"experiments/{teacher}" for teacher in teachers]
    shared = [key for key in base if key.startswith(("dataset.", "optimizer.", "schedule."))]
    assert {key: own[key] for key in shared} == {key: base[key] for key in shared}
    assert own["num_epochs"] == 160
    assert own["combine_teachers"] == "probabilities"


def test_generations_are_of_one_net_and_begin_with_weights_of_their_own() -> None:
    generations = [params(f"born_again/{name}") for name in ("gen0", "gen1", "gen2", "gen3", "ensemble")]
    assert {own["student.name"] for own in generations} == {"resnet32"}
    assert len({own["seed"] for own in generations}) == 5


# --- the documents ----------------------------------------------------------------------------------------

DOCUMENTS = ["docs/seeds.md", "experiments/cifar100/README.md", *(f"experiments/{name}" for name in EXPERIMENTS)]


def words(document: str) -> list[str]:
    """Returns what a document has in backticks and in code blocks, split at blanks."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [word.rstrip(",;") for part in (*blocks, *spans) for word in part.split()]


@pytest.mark.parametrize(("document", "name"), [(document, name) for document, name, _ in expected()])
def test_every_experiment_is_in_the_document_of_its_group(document: str, name: str) -> None:
    assert name in words(f"experiments/{document}")


@pytest.mark.parametrize("directory", [directory for document, _, directory in expected() if document != "README.md"])
def test_every_experiment_of_a_seed_but_for_variants_of_ours_is_in_the_table_of_capabilities(directory: str) -> None:
    ours = ("_bm", "_finetuned")
    named = [word for word in words("docs/seeds.md") if word.startswith("experiments/")]
    parents = [f"experiments/{directory}", f"experiments/{Path(directory).parent}"]
    assert directory.endswith(ours) or any(parent in named for parent in parents)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_directory_and_test_that_a_document_names_exists(document: str) -> None:
    found = [word for word in words(document) if re.match(r"(experiments|tests)/", word)]
    assert found
    for word in found:
        assert any(ROOT.glob(word)), f"{document}: {word}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_that_exist(document: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text()):
        assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_name_scripts_and_flags_that_exist(document: str) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    for line in (line.partition("  #")[0] for block in blocks for line in block.splitlines()):
        _, script, *arguments = line.split()
        if script == "-m":
            script = f"{arguments.pop(0).replace('.', '/')}.py"
        for flag in (word for word in arguments if word.startswith("--")):
            assert f'"{flag}"' in (ROOT / script).read_text(), f"{document}: {line}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_overrides_that_a_document_advises_are_options(document: str) -> None:
    for word in words(document):
        if found := re.match(r"(\w+\.\w+)=", word):
            assert found[1] in options(), f"{document}: {word}"


@cache
def options() -> set[str]:
    """Returns `section.option` of every option that some entry of the section has."""
    known = {f"teacher.{option}" for option in options_of(schema.teacher_options)}
    for section, registry in schema.SECTIONS.items():
        functions = [function for _, entry in registry.items() for function in registry.functions(entry)]
        known |= {f"{section}.{option}" for function in functions for option in ("name", *options_of(function))}
    return known

"""The generated recipes of the CIFAR-100 benchmark: as the script writes them, right, and all of them able to start."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, committed_files
from torch import nn

from benchmarks.cifar100_recipes import FOLDER, NETS, PAIRS, differences, recipes, texts
from model import nets, schema
from model.engine import probe
from model.losses import create_objective, sections_of
from model.outputs import Batch, Outputs, Probe, Samples, answers, outputs_of
from model.teacher import FrozenTeacher
from utils import flatten

CIFAR = (3, 32, 32)
NUM_CLASSES = 100


@cache
def params(name: str) -> dict[str, Any]:
    """Returns the complete params of a recipe by their dotted keys; those of its losses by `loss.<name>.<option>`."""
    values, problems = schema.resolve(json.loads((FOLDER / name / "params.json").read_text()))
    assert not problems
    losses = sections_of(values["loss"])
    return flatten({**values, "loss": losses})


def students(names: str = ".*") -> list[str]:
    """Returns the recipes with a teacher whose method matches."""
    return [name for name in recipes() if "/" in name and re.fullmatch(names, name.partition("/")[2])]


# --- the files --------------------------------------------------------------------------------------------------


def test_the_committed_recipes_are_those_that_the_script_writes() -> None:
    assert differences() == []
    assert {ROOT / name for name in committed_files() if re.match("experiments/cifar100/.*json", name)} == set(texts())


def test_the_script_says_what_differs(tmp_path: Path) -> None:
    for path, text in texts(tmp_path).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert differences(tmp_path) == []
    changed, missing, unknown = (tmp_path / name / "params.json" for name in ("vgg8", "vgg13", "vgg19"))
    changed.write_text(changed.read_text().replace("0.05", "0.5"))
    missing.unlink()
    unknown.parent.mkdir()
    unknown.write_text("{}\n")
    assert differences(tmp_path) == sorted([changed, missing, unknown])


def test_the_command_checks_and_writes_nothing() -> None:
    command = [sys.executable, "benchmarks/cifar100_recipes.py", "--check"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{len(recipes())} recipes\n"


def test_every_recipe_passes_the_check() -> None:
    for name in recipes():
        assert params(name)


def test_the_thirteen_pairs_have_the_methods_and_every_net_is_there_alone() -> None:
    some = {"fsp": 6, "reviewkd": 8}
    assert len(PAIRS) == 13
    assert len(VALUES) == 24
    assert len(students()) == 13 * (24 - len(some)) + sum(some.values())
    for method in VALUES:
        assert len(students(method)) == some.get(method, 13), method
    assert [name for name in recipes() if "/" not in name] == list(NETS)
    assert {net for pair in PAIRS for net in pair} == set(NETS)


def test_the_document_names_every_net_pair_and_method() -> None:
    text = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"`([^`\n]+)`", text))
    parts = {part for name in students() for part in name.split("/")}
    assert parts <= named
    assert all(re.search(rf"\b{net}\b", text) or net in ("resnet20", "resnet32", "resnet8x4") for net in NETS)


# --- the values, typed from the publications ----------------------------------------------------------------------

COMMON = {
    "dataset.name": "cifar100",
    "dataset.batch_size": 64,
    "dataset.augmentation": "crop_flip",
    "dataset.mean": [0.5071, 0.4867, 0.4408],
    "dataset.std": [0.2675, 0.2565, 0.2761],
    "dataset.validate_on": "val",
    "dataset.val_fraction": 0.02,
    "dataset.subset_fraction": 1.0,
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": False,
    "optimizer.weight_decay": 5e-4,
    "schedule.name": "multistep",
    "schedule.gamma": 0.1,
    "schedule.per": "epoch",
    "schedule.warmup_epochs": 0.0,
    "schedule.reset_momentum": False,
    "precision": "fp32",
    "seed": 230,
}


def test_the_training_is_that_of_the_benchmark() -> None:
    for name in recipes():
        own = params(name)
        method = name.partition("/")[2]
        late = 30 if method in ("ab", "ft", "fsp") else 0
        light = own["student.name"].startswith(("mobilenet", "shufflenet"))
        assert {key: own.get(key) for key in COMMON} == COMMON, name
        assert own["schedule.milestones"] == [150 + late, 180 + late, 210 + late], name
        assert own["num_epochs"] == (480 if method == "mlkd" else 240 + late), name
        assert own["optimizer.learning_rate"] == (0.01 if light else 0.025 if method == "mlkd" else 0.05), name


def test_the_teacher_is_the_net_alone_after_its_last_epoch() -> None:
    for name in students():
        own, (teacher, student) = params(name), name.partition("/")[0].split("_to_")
        assert own["teacher.model_dir"] == f"experiments/cifar100/{teacher}"
        assert own["teacher.restore_file"] == "last"
        assert own["teacher.cache"] == "off"
        assert own["student.name"] == student
        assert teacher in recipes()


def test_a_net_alone_learns_from_the_labels() -> None:
    for name in NETS:
        own = params(name)
        assert own["teacher"] is None
        assert own["student.name"] == name
        assert {key: value for key, value in own.items() if key.startswith("loss.")} == {
            "loss.ce.name": "ce",
            "loss.ce.weight": 1.0,
            "loss.ce.label_smoothing": 0.0,
        }


def section_of(name: str) -> dict[str, Any]:
    section, problems = nets.NETS.resolve(NETS[name])
    assert not problems
    return section


# Parameters of RepDistiller's nets with 100 classes, in thousands.
SIZES = {"resnet20": 278.3, "resnet32": 472.8, "resnet56": 861.6, "resnet110": 1736.6, "resnet50": 23705.3}
SIZES |= {"resnet8x4": 1233.5, "resnet32x4": 7433.9, "wrn_16_2": 703.3, "wrn_40_1": 569.8, "wrn_40_2": 2255.2}
SIZES |= {"vgg8": 3965.0, "vgg13": 9462.2, "mobilenetv2_half": 812.8, "shufflenetv1": 949.3, "shufflenetv2": 1355.5}


@pytest.mark.parametrize("name", NETS)
def test_the_nets_are_those_of_the_benchmark(name: str) -> None:
    with torch.device("meta"):
        net = nets.create(section_of(name), NUM_CLASSES)
    assert round(sum(weight.numel() for weight in net.parameters()) / 1000, 1) == SIZES[name]


WARM = {"name": "constant", "warmup_epochs": 20}
VALUES: dict[str, dict[str, Any]] = {
    "kd": {"ce.weight": 0.1, "kd.alpha": 1.0, "kd.temperature": 4.0, "kd.weight": 0.9, "kd.reduction": "batchmean"},
    "ls_kd": {"ce.weight": 0.1, "kd.alpha": 1.0, "kd.temperature": 2.0, "kd.weight": 9.0, "kd.standardise": True},
    "dist": {"ce.weight": 1.0, "dist.weight": 2.0, "dist.beta": 1.0, "dist.gamma": 1.0, "dist.temperature": 4.0},
    "nkd": {"ce.weight": 1.0, "nkd.weight": 1.0, "nkd.gamma": 3.5, "nkd.temperature": 3.0},
    "ctkd": {"ce.weight": 0.1, "ctkd.weight": 0.9, "ctkd.reversal_epochs": 10},
    "mlkd": {
        "mlkd.weight": 1.0,
        "mlkd.temperature": 4.0,
        "mlkd.alpha": 0.9,
        "mlkd.ce_weight": 0.1,
        "mlkd.mask": "code",
    },
    "fitnets": {"ce.weight": 1.0, "fitnets.weight": 100.0},
    "at": {"ce.weight": 1.0, "at.weight": 1000.0, "at.p": 2.0},
    "sp": {"ce.weight": 1.0, "sp.weight": 3000.0},
    "cc": {"ce.weight": 1.0, "cc.weight": 0.02, "cc.width": 128},
    "vid": {"ce.weight": 1.0, "vid.weight": 1.0, "vid.initial_variance": 5.0},
    "rkd": {"ce.weight": 1.0, "rkd.weight": 1.0, "rkd.distance_weight": 25.0, "rkd.angle_weight": 50.0},
    "pkt": {"ce.weight": 1.0, "pkt.weight": 30000.0},
    "nst": {"ce.weight": 1.0, "nst.weight": 50.0},
    "ab": {"ce.weight": 1.0, "ab.weight": 1.0, "ab.margin": 1.0, "ab.initial_epochs": 30},
    "ft": {"ce.weight": 1.0, "ft.weight": 200.0, "ft.initial_epochs": 30},
    "fsp": {"ce.weight": 1.0, "fsp.weight": 1.0, "fsp.initial_epochs": 30},
    "crd": {"ce.weight": 1.0, "crd.weight": 0.8, "crd.negatives": 16384, "crd.temperature": 0.07, "crd.momentum": 0.5},
    "crd_kd": {"ce.weight": 1.0, "kd.alpha": 1.0, "kd.weight": 1.0, "kd.temperature": 4.0, "crd.weight": 0.8},
    "overhaul": {"ce.weight": 1.0, "overhaul.weight": 1e-3, "overhaul.teacher_statistics": "batch"},
    "simkd": {"simkd.weight": 1.0, "simkd.factor": 2},
    "dkd": {"ce.weight": 1.0, "dkd.alpha": 1.0, "dkd.temperature": 4.0, "dkd.standardise": False},
    "ls_dkd": {"ce.weight": 1.0, "dkd.alpha": 9.0, "dkd.temperature": 2.0, "dkd.standardise": True},
    "reviewkd": {"ce.weight": 1.0, "reviewkd.max_channels": 512},
}


@pytest.mark.parametrize("method", VALUES)
def test_the_published_weights_are_kept(method: str) -> None:
    expected = {f"loss.{key}": value for key, value in VALUES[method].items()}
    named = {key.split(".")[0] for key in VALUES[method]}
    for name in students(method):
        own = params(name)
        assert {key: own.get(key) for key in expected} == expected, name
        assert {key.split(".")[1] for key in own if key.startswith("loss.")} == named, name


@pytest.mark.parametrize(
    ("pair", "beta"),
    [
        ("resnet56_to_resnet20", 2),
        ("resnet110_to_resnet32", 2),
        ("vgg13_to_vgg8", 6),
        ("vgg13_to_mobilenetv2_half", 6),
        ("wrn_40_2_to_wrn_16_2", 6),
        ("wrn_40_2_to_wrn_40_1", 6),
        ("resnet32x4_to_resnet8x4", 8),
        ("resnet32x4_to_shufflenetv1", 8),
        ("resnet50_to_mobilenetv2_half", 8),
    ],
)
def test_dkd_has_the_published_beta_of_the_pair_and_rises_for_20_epochs(pair: str, beta: float) -> None:
    for method, factor in (("dkd", 1), ("ls_dkd", 9)):
        own = params(f"{pair}/{method}")
        assert own["loss.dkd.beta"] == factor * beta
        assert [own[f"loss.dkd.weight.{key}"] for key in ("name", "value", "warmup_epochs")] == ["constant", 1.0, 20]


@pytest.mark.parametrize(
    ("pair", "weight"),
    [
        ("resnet32x4_to_resnet8x4", 5),
        ("wrn_40_2_to_wrn_16_2", 5),
        ("wrn_40_2_to_wrn_40_1", 5),
        ("wrn_40_2_to_shufflenetv1", 5),
        ("resnet32x4_to_shufflenetv1", 5),
        ("resnet32x4_to_shufflenetv2", 8),
        ("resnet56_to_resnet20", 0.6),
        ("resnet110_to_resnet32", 1),
    ],
)
def test_reviewkd_has_the_published_weight_of_the_pair_and_rises_for_20_epochs(pair: str, weight: float) -> None:
    own = params(f"{pair}/reviewkd")
    kept = [own[f"loss.reviewkd.weight.{key}"] for key in ("name", "value", "warmup_epochs")]
    assert kept == ["constant", weight, 20]


def test_mlkd_sees_a_second_view_of_stronger_augmentation() -> None:
    for name in recipes():
        second = params(name)["dataset.second_augmentation"]
        if name.endswith("/mlkd"):
            assert [step if isinstance(step, str) else step["name"] for step in second] == [
                "crop",
                "horizontal_flip",
                "rand_augment",
            ]
        else:
            assert second is None


# --- which maps meet ----------------------------------------------------------------------------------------------

# Channels of RepDistiller's f1, f2, ...
CHANNELS = {"wrn_40_2": [32, 64, 128], "wrn_16_2": [32, 64, 128], "wrn_40_1": [16, 32, 64]}
CHANNELS |= {f"resnet{depth}": [16, 32, 64] for depth in (20, 32, 56, 110)}
CHANNELS |= {"resnet8x4": [64, 128, 256], "resnet32x4": [64, 128, 256], "resnet50": [256, 512, 1024, 2048]}
CHANNELS |= {"vgg8": [128, 256, 512, 512], "vgg13": [128, 256, 512, 512], "mobilenetv2_half": [12, 16, 48, 160]}
CHANNELS |= {"shufflenetv1": [240, 480, 960], "shufflenetv2": [116, 232, 464]}


@cache
def shapes_of(name: str) -> Probe:
    with torch.device("meta"):
        return probe(nets.create(section_of(name), NUM_CLASSES), name, CIFAR)


@pytest.mark.parametrize(("teacher", "student"), PAIRS, ids="_to_".join)
def test_the_maps_of_repdistiller_meet(teacher: str, student: str) -> None:
    probes = [shapes_of(student), shapes_of(teacher)]
    expected = [CHANNELS[student], CHANNELS[teacher]]
    values, _ = schema.resolve(recipes()[f"{teacher}_to_{student}/at"])
    objective = create_objective(values["loss"], values["num_epochs"])
    objective.attach(*probes)
    chosen = list(zip(*objective.losses["at"].pairs, strict=True))
    assert [
        [shown.outputs.features[stage - 1].shape[1] for stage in stages]
        for shown, stages in zip(probes, chosen, strict=True)
    ] == expected
    for method in ("vid", "nst", "ab", "overhaul", "fsp"):
        if f"{teacher}_to_{student}/{method}" in recipes():
            values, _ = schema.resolve(recipes()[f"{teacher}_to_{student}/{method}"])
            other = create_objective(values["loss"], values["num_epochs"])
            other.attach(*probes)
            pairs = other.losses[method].pairs
            assert [*zip(*pairs, strict=True)] == chosen or (method, student) == ("fsp", "vgg8"), method
    own = params(f"{teacher}_to_{student}/fitnets")
    hints = [own[f"loss.fitnets.{key}"] for key in ("student_stage", "teacher_stage")]
    found = [shown.outputs.features[stage - 1].shape[1] for shown, stage in zip(probes, hints, strict=True)]
    assert found == [channels[1] for channels in expected]


# --- every recipe can start ---------------------------------------------------------------------------------------


class Bench:
    """A pair of nets as a run begins with it, and what both make of a batch."""

    def __init__(self, teacher: str, student: str) -> None:
        torch.manual_seed(230)
        self.student, net = (nets.create(section_of(name), NUM_CLASSES) for name in (student, teacher))
        self.probes = probe(self.student, student, CIFAR), probe(net, teacher, CIFAR, "teacher")
        self.teacher = FrozenTeacher(net)
        images, second = torch.randn(2, 6, *CIFAR)
        indices = torch.arange(6)
        self.batch = Batch(images, indices % 3, indices, torch.zeros_like(indices), strong_images=second)
        self.samples = Samples(torch.arange(400) % NUM_CLASSES, NUM_CLASSES)
        self.fields = frozenset(field.name for field in dataclasses.fields(Outputs)) - {"peer_logits"}
        with torch.no_grad():
            self.taught = answers(lambda shown, needs: outputs_of(self.teacher, shown, needs), self.batch, self.fields)

    def answers_of(self, student: nn.Module) -> Outputs:
        return answers(lambda shown, needs: outputs_of(student, shown, needs), self.batch, self.fields)


def begin(bench: Bench, name: str) -> None:
    """Takes a recipe from its params.json to gradients, in its first epoch and after an initial stage."""
    values, problems = schema.resolve(recipes()[name])
    assert not problems
    objective = create_objective(values["loss"], values["num_epochs"])
    objective.attach(*bench.probes)
    objective.enrol(bench.samples)
    student, _ = objective.equip(copy.deepcopy(bench.student))
    assert objective.describe()
    outputs = bench.answers_of(student)
    learnt: set[str] = set()
    for epoch in sorted({0, objective.initial_epochs}):
        objective.on_epoch(epoch)
        terms = objective(outputs, bench.taught, bench.batch)
        assert all(term.isfinite() for term in terms.values()), name
        total = torch.stack(list(terms.values())).sum()
        named = [(key, weight) for key, weight in student.named_parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(total, [weight for _, weight in named], retain_graph=True, allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients), name
        learnt |= {
            key for (key, _), gradient in zip(named, gradients, strict=True) if gradient is not None and gradient.any()
        }
    first = next(key for key, weight in student.named_parameters() if weight.requires_grad)
    assert first in learnt, f"{name}: nothing reaches the student's first layer"


def marked(pair: tuple[str, str]) -> Any:
    """Returns a pair as a parameter; all but a quick one, of nets of different numbers of stages, are slow."""
    marks = [] if pair == ("vgg13", "mobilenetv2_half") else [pytest.mark.slow]
    return pytest.param(*pair, marks=marks, id="_to_".join(pair))


@pytest.mark.parametrize(("teacher", "student"), [marked(pair) for pair in PAIRS])
def test_every_objective_of_a_pair_can_begin(teacher: str, student: str) -> None:
    bench = Bench(teacher, student)
    for name in students():
        if name.startswith(f"{teacher}_to_{student}/"):
            begin(bench, name)

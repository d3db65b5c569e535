"""Writes the recipes of the field's CIFAR-100 benchmark: every net alone, and every pair of nets with every method.

    python benchmarks/cifar100_recipes.py            write experiments/cifar100/**/params.json
    python benchmarks/cifar100_recipes.py --check    only tell whether they are what would be written

The benchmark is that of Tian, Krishnan and Isola, "Contrastive Representation Distillation", 2020, and of their code,
RepDistiller; later methods were published on it, mostly with mdistiller. What differs from the published recipes is in
experiments/cifar100/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "experiments" / "cifar100"

Section = dict[str, Any]
Pair = tuple[str, str]  # teacher, student

# As RepDistiller has them. Its thin ResNets have convolutions as shortcuts; its VGGs pool only after the first three of
# five stages.
NETS: dict[str, Section] = {
    **{name: {"name": name} for name in ("wrn_40_2", "wrn_16_2", "wrn_40_1", "resnet32x4", "resnet8x4", "resnet50")},
    **{name: {"name": name, "shortcut": "conv"} for name in ("resnet20", "resnet32", "resnet56", "resnet110")},
    **{name: {"name": name, "last_stage_size": 4} for name in ("vgg8", "vgg13")},
    **{name: {"name": name} for name in ("mobilenetv2_half", "shufflenetv1", "shufflenetv2")},
}
LIGHT = ("mobilenetv2_half", "shufflenetv1", "shufflenetv2")

PAIRS: tuple[Pair, ...] = (
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "wrn_40_1"),
    ("resnet56", "resnet20"),
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
    ("vgg13", "mobilenetv2_half"),
    ("resnet50", "mobilenetv2_half"),
    ("resnet50", "vgg8"),
    ("resnet32x4", "shufflenetv1"),
    ("resnet32x4", "shufflenetv2"),
    ("wrn_40_2", "shufflenetv1"),
)

# RepDistiller's f1, f2, ...: what its methods of several maps compare, one to one. Its stem is f0; of VGG the first
# stage is. Nets that are not here have three stages, f1 to f3.
STAGES = {
    "vgg8": [2, 3, 4, 5],
    "vgg13": [2, 3, 4, 5],
    "resnet50": [1, 2, 3, 4],
    "mobilenetv2_half": [2, 3, 5, 7],
}

NUM_EPOCHS = 240
MILESTONES = [150, 180, 210]
INITIAL_EPOCHS = 30  # RepDistiller, --init_epochs
WARM_UP = 20  # of the weights of DKD (mdistiller, DKD.WARMUP) and ReviewKD (--kd-warm-up)

# mdistiller, configs/cifar100/dkd; 8 is its default. Nothing is published for ResNet110 to 20, which has the weight of
# the other thin ResNets here, and for ResNet50 to VGG8.
DKD_BETA: dict[Pair, float] = {
    ("resnet56", "resnet20"): 2.0,
    ("resnet110", "resnet20"): 2.0,
    ("resnet110", "resnet32"): 2.0,
    ("vgg13", "vgg8"): 6.0,
    ("vgg13", "mobilenetv2_half"): 6.0,
    ("wrn_40_2", "wrn_16_2"): 6.0,
    ("wrn_40_2", "wrn_40_1"): 6.0,
}
USUAL_DKD_BETA = 8.0

# dvlab-research/ReviewKD, CIFAR-100/script/reviewKD.sh: the pairs for which a weight is published.
REVIEWKD_WEIGHT: dict[Pair, float] = {
    ("wrn_40_2", "wrn_16_2"): 5.0,
    ("wrn_40_2", "wrn_40_1"): 5.0,
    ("wrn_40_2", "shufflenetv1"): 5.0,
    ("resnet32x4", "resnet8x4"): 5.0,
    ("resnet32x4", "shufflenetv1"): 5.0,
    ("resnet32x4", "shufflenetv2"): 8.0,
    ("resnet56", "resnet20"): 0.6,
    ("resnet110", "resnet32"): 1.0,
}

# FSP compares matrices of channels by channels, so both nets must be of one width.
EQUALLY_WIDE: tuple[Pair, ...] = (
    ("wrn_40_2", "wrn_16_2"),
    ("resnet56", "resnet20"),
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
)


def ce(weight: float = 1.0) -> Section:
    return {"name": "ce", "weight": weight}


def stages(teacher: str, student: str, always: bool = False) -> Section:
    """Returns which stages meet, where that is not all of both; or always, for a method that would pair by size."""
    if teacher not in STAGES and student not in STAGES and not always:
        return {}
    return {"student_stages": STAGES.get(student, [1, 2, 3]), "teacher_stages": STAGES.get(teacher, [1, 2, 3])}


def hint(teacher: str, student: str) -> Section:
    """Returns which stages are f2 (RepDistiller, --hint_layer 2)."""
    own, other = (STAGES.get(net, [1, 2, 3])[1] for net in (student, teacher))
    return {"student_stage": own, "teacher_stage": other}


def warming(weight: float) -> Section:
    return {"name": "constant", "value": weight, "warmup_epochs": WARM_UP}


def methods(teacher: str, student: str) -> dict[str, list[Section]]:
    """Returns the objective of every method that is there for a pair of nets."""
    pair = teacher, student
    these = stages(*pair)
    beta = DKD_BETA.get(pair, USUAL_DKD_BETA)
    kd = {"name": "kd", "alpha": 1.0, "temperature": 4.0}
    crd = {"name": "crd", "weight": 0.8, "negatives": 16384, "temperature": 0.07, "momentum": 0.5, "dimensions": 128}
    found = {
        # RepDistiller, scripts/run_cifar_distill.sh; its gamma, alpha and beta weigh the labels, KD and the method.
        "kd": [ce(0.1), {**kd, "weight": 0.9}],
        "fitnets": [ce(), {"name": "fitnets", "weight": 100.0, **hint(*pair)}],
        "at": [ce(), {"name": "at", "weight": 1000.0, "p": 2.0, **these}],
        "sp": [ce(), {"name": "sp", "weight": 3000.0}],
        "cc": [ce(), {"name": "cc", "weight": 0.02, "width": 128}],
        "vid": [ce(), {"name": "vid", "weight": 1.0, "initial_variance": 5.0, **these}],
        "rkd": [ce(), {"name": "rkd", "weight": 1.0, "distance_weight": 25.0, "angle_weight": 50.0}],
        "pkt": [ce(), {"name": "pkt", "weight": 30000.0}],
        "nst": [ce(), {"name": "nst", "weight": 50.0, **these}],
        "crd": [ce(), {**crd, "sampling": "exact"}],
        "crd_kd": [ce(), {**kd, "weight": 1.0}, {**crd, "sampling": "exact"}],
        # Its --beta of AB and FSP, 1 and 50, has no effect: their terms count in the initial stage only, and there as
        # they are.
        "ab": [ce(), {"name": "ab", "weight": 1.0, "margin": 1.0, "initial_epochs": INITIAL_EPOCHS, **these}],
        "ft": [ce(), {"name": "ft", "weight": 200.0, "initial_epochs": INITIAL_EPOCHS}],
        "fsp": [ce(), {"name": "fsp", "weight": 1.0, "initial_epochs": INITIAL_EPOCHS}],
        # mdistiller: DKD.CE_WEIGHT, ALPHA, BETA, T and WARMUP; OFD.LOSS.
        "dkd": [ce(), {"name": "dkd", "alpha": 1.0, "beta": beta, "temperature": 4.0, "weight": warming(1.0)}],
        "overhaul": [ce(), {"name": "overhaul", "weight": 1e-3, **stages(*pair, always=True)}],
        "reviewkd": [ce(), {"name": "reviewkd", "weight": warming(REVIEWKD_WEIGHT.get(pair, 0.0))}],
        # hunto/image_classification_sota, the CIFAR-100 strategies of DIST.
        "dist": [ce(), {"name": "dist", "weight": 2.0, "beta": 1.0, "gamma": 1.0, "temperature": 4.0}],
        # yzd-v/cls_KD, its CIFAR-100 config.
        "nkd": [ce(), {"name": "nkd", "weight": 1.0, "gamma": 3.5, "temperature": 3.0}],
        # sunshangquan/logit-standardization-KD, README: --base-temp 2 --kd-weight 9; both parts of DKD get nine times
        # their weight.
        "ls_kd": [ce(0.1), {"name": "kd", "alpha": 1.0, "temperature": 2.0, "standardise": True, "weight": 9.0}],
        "ls_dkd": [
            ce(),
            {
                "name": "dkd",
                "alpha": 9.0,
                "beta": 9.0 * beta,
                "temperature": 2.0,
                "standardise": True,
                "weight": warming(1.0),
            },
        ],
        # zhengli97/CTKD, scripts/run_cifar_distill.sh, the global temperature.
        "ctkd": [ce(0.1), {"name": "ctkd", "weight": 0.9, "reversal_epochs": 10}],
        # Jin-Ying/Multi-Level-Logit-Distillation: its KD_ours has both views' labels as a part of it.
        "mlkd": [{"name": "mlkd", "weight": 1.0, "temperature": 4.0, "alpha": 0.9, "ce_weight": 0.1}],
        # DefangChen/SimKD: -r 0 -a 0 -b 1 --factor 2.
        "simkd": [{"name": "simkd", "weight": 1.0, "factor": 2}],
    }
    left_out = {
        "reviewkd": pair not in REVIEWKD_WEIGHT,
        "fsp": pair not in EQUALLY_WIDE,
    }
    return {name: losses for name, losses in found.items() if not left_out.get(name)}


def recipe(student: str, losses: list[Section], teacher: str | None = None) -> dict[str, Any]:
    """Returns a params.json: RepDistiller's training, but for what a method has of its own."""
    names = {section["name"] for section in losses}
    initial = max(section.get("initial_epochs", 0) for section in losses)
    rate = 0.01 if student in LIGHT else 0.05  # train_student.py, train_teacher.py
    dataset: Section = {
        "name": "cifar100",
        "batch_size": 64,
        "augmentation": "crop_flip",
        "val_fraction": 0.02,
        "mean": [0.5071, 0.4867, 0.4408],  # dataset/cifar100.py
        "std": [0.2675, 0.2565, 0.2761],
    }
    num_epochs, milestones = NUM_EPOCHS + initial, [epoch + initial for epoch in MILESTONES]
    if "mlkd" in names:
        # The configs of MLKD in logit-standardization-KD, whose log of ResNet32x4 to 8x4 shows the drops: twice the
        # epochs, the milestones of half as many, half the rate but for light students.
        num_epochs, rate = 2 * NUM_EPOCHS, min(rate, 0.025)
        randomly = {"name": "rand_augment", "num_ops": 2, "magnitude": 10}  # mdistiller/dataset/cifar100.py there
        dataset["second_augmentation"] = ["crop", "horizontal_flip", randomly]
    params: dict[str, Any] = {"seed": 230, "num_epochs": num_epochs, "dataset": dataset, "student": NETS[student]}
    if teacher is not None:
        # Its last weights: the best of a thousand validation images would be a matter of luck.
        params["teacher"] = {"model_dir": f"experiments/cifar100/{teacher}", "restore_file": "last", "cache": "off"}
    return params | {
        "loss": losses if len(losses) > 1 else losses[0],
        "optimizer": {
            "name": "sgd",
            "learning_rate": rate,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 5e-4,
        },
        "schedule": {"name": "multistep", "milestones": milestones, "gamma": 0.1, "per": "epoch"},
        "precision": "fp32",
    }


def recipes() -> dict[str, dict[str, Any]]:
    """Returns every params.json by its directory below experiments/cifar100."""
    found = {net: recipe(net, [ce()]) for net in NETS}
    for teacher, student in PAIRS:
        for name, losses in methods(teacher, student).items():
            found[f"{teacher}_to_{student}/{name}"] = recipe(student, losses, teacher)
    return found


def texts(folder: Path = FOLDER) -> dict[Path, str]:
    """Returns the files that are to be there, with their content."""
    return {
        folder / name / "params.json": json.dumps(params, indent=4, ensure_ascii=False) + "\n"
        for name, params in recipes().items()
    }


def differences(folder: Path = FOLDER) -> list[Path]:
    """Returns the files that are missing, are not what would be written, or would not be written at all."""
    wanted = texts(folder)
    wrong = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    return sorted([*wrong, *(path for path in folder.glob("**/params.json") if path not in wanted)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a file differs")
    if not parser.parse_args().check:
        for path, text in texts().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    wrong = differences()
    for path in wrong:
        print(path)
    print(f"{len(wrong)} of {len(texts())} recipes differ" if wrong else f"{len(texts())} recipes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

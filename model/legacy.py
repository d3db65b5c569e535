"""The ancestor's params.json: thirteen keys on one level, read into sections that mean what those keys meant there.

What they leave open, its code decided: optimizer, schedule and seed, the mean of `kl_div`, the folder of the data, and
that a run is validated and selected on the test set. Whoever uses such a file is told.

Source: haitongli/knowledge-distillation-pytorch, commit b1e4b6a.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from model.errors import InputError
from model.registry import Problem, check_options, options_of, suggest

NET_NAMES = ("cnn", "resnet18", "wrn", "densenet", "resnext29", "preresnet110")  # the same here and there
DISTIL = "_distill"
MODEL_VERSIONS = (*NET_NAMES, f"cnn{DISTIL}", f"resnet18{DISTIL}")
TEACHERS = {net: f"experiments/base_{net}" for net in NET_NAMES if net != "cnn"}
DATA_DIR = "data-cifar10"
# These came trained from bearpaw/pytorch-classification, which normalises with another std than the ancestor.
TEACHER_MEAN = (0.4914, 0.4822, 0.4465)
TEACHER_STD = dict.fromkeys(("wrn", "densenet", "resnext29", "preresnet110"), (0.2023, 0.1994, 0.2010))
# What of ours may stand beside the flat keys; a teacher's section takes the place of its name.
OURS = (
    *("dataset", "student", "loss", "optimizer", "schedule", "seed", "precision", "compile", "checkpoint_minutes"),
    *("log_gradient_norms", "combine_teachers"),
)
# Options of ours that flat keys set: where both are given, neither is obviously meant.
PLACES = {
    "student.name": "model_version",
    "student.num_channels": "num_channels",
    "student.dropout_rate": "dropout_rate",
    "dataset.batch_size": "batch_size",
    "dataset.augmentation": "augmentation",
    "dataset.subset_fraction": "subset_percent",
    "dataset.num_workers": "num_workers",
    "loss.alpha": "alpha",
    "loss.temperature": "temperature",
    "optimizer.learning_rate": "learning_rate",
}

# Options that stay where a section of ours names another entry: those that every entry takes.
KEPT_BY_ANY = {
    "dataset": ("batch_size", "augmentation", "validate_on", "num_workers", "subset_fraction", "subset_rule")
}


def flat_options(
    *,
    model_version: str,
    subset_percent: Annotated[float, Field(gt=0, le=1)] = 1.0,
    augmentation: Literal["yes", "no"] = "yes",
    teacher: str = "none",
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    learning_rate: Annotated[float, Field(gt=0)],
    batch_size: Annotated[int, Field(ge=2)],
    num_epochs: Annotated[int, Field(ge=1)],
    dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    num_channels: Annotated[int, Field(ge=1)] = 32,
    save_summary_steps: Annotated[int, Field(ge=1)] = 100,
    num_workers: Annotated[int, Field(ge=0)] = 4,
) -> None:
    """The ancestor's params.json, told by its `model_version`. A default is what a file without the key meant.

    Args:
        model_version: The net to train; `cnn_distill` and `resnet18_distill` have a teacher.
        subset_percent: Share of the training images, not a percentage.
        augmentation: Zero-padded 4-pixel crop and mirroring; the ancestor took any text but `yes` for `no`.
        teacher: The teacher's net, which stands for `experiments/base_<net>`; with `_distill` required, else unused.
        alpha: Weight of the teacher term; with `_distill` required, else unused.
        temperature: Divides both nets' logits before the softmax; with `_distill` required, else unused.
        learning_rate: Base learning rate.
        batch_size: Training samples per step.
        num_epochs: Passes over the training set.
        dropout_rate: Of the `cnn`, where it is required; other nets do without.
        num_channels: Of the `cnn`, where it is required; other nets do without.
        save_summary_steps: Unused: training metrics are means over all batches, not over every n-th.
        num_workers: Processes that prepare batches.
    """


def is_flat(raw: Mapping[str, Any]) -> bool:
    """Tells whether raw params are the ancestor's."""
    return "model_version" in raw


def net_of(name: str) -> str:
    """Returns the net that a `model_version` or a `teacher` names."""
    return name.removesuffix(DISTIL)


def normalisation_of(net: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Returns mean and std that the ancestor's checkpoint of a net was trained with; None: those of its dataset."""
    return (TEACHER_MEAN, TEACHER_STD[net]) if net in TEACHER_STD else None


def translate(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """Turns flat params into sections.

    Sections and top-level keys of ours may stand beside the flat keys. They are laid over the result option by option:
    `"dataset": {"data_dir": "/data"}` changes that one option.

    Args:
        raw: What the file holds, overrides applied.

    Returns:
        The raw sections, for `model.schema.resolve`; a line for each thing that was assumed; and every problem found
        as (dotted key, text). With problems the first two are empty.
    """
    flat, problems = _check(raw)
    if problems:
        return {}, [], problems
    sections = _sections(flat)
    ours = {key: value for key, value in raw.items() if key in OURS}
    if not isinstance(raw.get("teacher", ""), str):
        ours["teacher"] = _teacher(raw["teacher"])
    for key, value in ours.items():
        section = sections.get(key)
        if isinstance(value, Mapping) and isinstance(section, Mapping):
            if value.get("name", section.get("name")) != section.get("name"):  # what the old one alone takes goes
                kept = ("name", *KEPT_BY_ANY.get(key, ()))
                section = {option: section[option] for option in kept if option in section}
            for place in [f"{key}.{option}" for option in value if option in section]:
                if PLACES.get(place) in raw:
                    problems.append((place, f"{PLACES[place]} says it too, in the ancestor's way; keep that one"))
            value = {**section, **value}
        sections[key] = value
    return ({}, [], problems) if problems else (sections, list(_assumed(raw, sections)), [])


def _check(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Returns the flat keys with their defaults, and all that is wrong with them."""
    known = options_of(flat_options)
    unknown = [key for key in raw if key not in known and key not in OURS]
    own = {key: value for key, value in raw.items() if key in known}
    if not isinstance(own.get("teacher"), str):
        own.pop("teacher", None)
    flat, problems = check_options(own, flat_options)
    problems += [(key, f"unknown key; {suggest(key, [*known, *OURS])}") for key in unknown]
    version, teacher = own.get("model_version"), own.get("teacher", "none")
    if isinstance(version, str) and version not in MODEL_VERSIONS:
        problems.append(("model_version", f"unknown model_version {version!r}; {suggest(version, MODEL_VERSIONS)}"))
    elif isinstance(version, str):
        needed = ["dropout_rate", "num_channels"] if net_of(version) == "cnn" else []
        needed += ["teacher", "alpha", "temperature"] if version.endswith(DISTIL) else []
        problems += [(key, f"is missing; model_version {version!r} needs it") for key in needed if key not in raw]
        if "teacher" in needed and own.get("teacher") == "none":
            problems.append(("teacher", f"model_version {version!r} needs one; {suggest('', TEACHERS)}"))
    if teacher != "none" and teacher not in TEACHERS:
        way = 'another directory is {"model_dir": ...}'
        problems.append(("teacher", f"unknown teacher {teacher!r}; {suggest(teacher, [*TEACHERS, 'none'])}; {way}"))
    return flat, problems


def _sections(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what checked flat keys meant to the ancestor's code."""
    net, distil, rate = net_of(flat["model_version"]), flat["model_version"].endswith(DISTIL), flat["learning_rate"]
    dataset = {
        "name": "cifar10",
        "data_dir": DATA_DIR,
        "batch_size": flat["batch_size"],
        "augmentation": "crop_flip" if flat["augmentation"] == "yes" else "none",
        "validate_on": "test",
        "num_workers": flat["num_workers"],
    }
    if flat["subset_percent"] < 1:
        dataset |= {"subset_fraction": flat["subset_percent"], "subset_rule": "ancestor"}
    student: dict[str, Any] = {"name": net}
    loss: dict[str, Any] = {"name": "ce"}
    optimizer = {"name": "sgd", "learning_rate": rate, "momentum": 0.9, "weight_decay": 5e-4}
    schedule = {"name": "step", "step_size": 150, "gamma": 0.1}
    if net == "cnn":
        student |= {"num_channels": flat["num_channels"], "dropout_rate": flat["dropout_rate"]}
        optimizer = {"name": "adam", "learning_rate": rate}
        schedule = {"name": "step", "step_size": 100, "gamma": 0.2}
    if distil:
        loss = {"name": "kd", "alpha": flat["alpha"], "temperature": flat["temperature"], "reduction": "mean"}
    return {
        "num_epochs": flat["num_epochs"],
        "seed": 230,
        "precision": "fp32",
        "dataset": dataset,
        "student": student,
        "teacher": {"model_dir": TEACHERS[flat["teacher"]]} if distil and flat["teacher"] != "none" else None,
        "loss": loss,
        "optimizer": optimizer,
        "schedule": schedule,
    }


def _teacher(section: Any) -> Any:
    """Returns a teacher's section, whose `model_dir` may be a name: `--overrides teacher.mean=...` makes it of one."""
    if isinstance(section, list):
        return [TEACHERS.get(each, each) if isinstance(each, str) else _teacher(each) for each in section]
    if isinstance(section, Mapping) and isinstance(section.get("model_dir"), str):
        return {**section, "model_dir": TEACHERS.get(section["model_dir"], section["model_dir"])}
    return section


def _assumed(raw: Mapping[str, Any], sections: Mapping[str, Any]) -> Iterator[str]:
    """Yields what the file leaves open and still stands in `sections`, and what it says in vain."""
    version, net = raw["model_version"], net_of(raw["model_version"])
    dataset, loss = (sections[key] if isinstance(sections[key], Mapping) else {} for key in ("dataset", "loss"))
    if dataset.get("validate_on") == "test":
        yield (
            "VALIDATED AND SELECTED ON THE TEST SET, as there: the best score is too good"
            " (dataset.validate_on=val carves a validation split)"
        )
    if dataset.get("data_dir") == DATA_DIR:
        yield f"dataset.data_dir is {DATA_DIR}"
    if "subset_percent" not in raw and "subset_fraction" not in dataset:
        yield "no subset_percent: all training images"
    if "augmentation" not in raw and dataset.get("augmentation") == "crop_flip":
        yield "no augmentation: yes, which was all there was"
    if net not in ("cnn", "resnet18"):
        yield f"model_version {version} could not be trained there; it is trained as resnet18 was"
    if "optimizer" not in raw and "schedule" not in raw:
        yield "adam, rate x 0.2 every 100 epochs" if net == "cnn" else "sgd, rate x 0.1 every 150 epochs"
    if loss.get("reduction") == "mean":
        yield "KL is also divided by the number of classes (loss.reduction mean)"
    if sections["teacher"] and isinstance(raw["teacher"], str):
        yield f"teacher {raw['teacher']} is {TEACHERS[raw['teacher']]}"
    for key in ("seed", "precision"):
        if key not in raw:
            yield f"{key} {sections[key]}"
    unused = {"save_summary_steps"}
    unused |= set() if net == "cnn" else {"dropout_rate", "num_channels"}
    unused |= set() if version.endswith(DISTIL) else {"teacher", "alpha", "temperature"}
    in_vain = [key for key in raw if key in unused and isinstance(raw[key], int | float | str) and raw[key] != "none"]
    if in_vain:
        yield f"unused: {', '.join(in_vain)}"


def as_sections(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns raw params as sections: flat ones translated; others, and flat ones with problems, as they are."""
    sections = translate(raw)[0] if is_flat(raw) else {}
    return sections or dict(raw)


def assumptions(raw: Mapping[str, Any]) -> list[str]:
    """Returns a line for each thing that was assumed of flat params; nothing for others."""
    return translate(raw)[1] if is_flat(raw) else []


def net_record(params: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint of ours says of its net, for one of the ancestor's, which says nothing.

    Args:
        params: The raw params of its directory, flat or not.
        facts: Classes, image shape and normalisation of the data that the net shall be used on.

    Raises:
        InputError: The params do not say which net it is.
    """
    sections = as_sections(params)
    student, dataset = (sections.get(key) for key in ("student", "dataset"))
    if not isinstance(student, Mapping) or not isinstance(student.get("name"), str):
        line = "which net the checkpoint holds is not to be found in params.json beside it"
        raise InputError(f"{line}; correct that: python train.py --check --model_dir DIR", "checkpoint")
    record = {**facts, "section": dict(student)}
    name = dataset.get("name") if isinstance(dataset, Mapping) else None
    if name == "cifar10" and (constants := normalisation_of(student["name"])):
        record |= {"mean": list(constants[0]), "std": list(constants[1])}
    if isinstance(dataset, Mapping):
        record |= {key: dataset[key] for key in ("mean", "std") if dataset.get(key) is not None}
    return record

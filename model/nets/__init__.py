"""Networks: one file per family. Every module of this folder is imported, so a new file is all a new net needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from model.errors import InputError
from model.nets.initialisation import initialise
from model.plugins import import_all
from model.projected import equipped
from model.registry import Registry, suggest
from model.taps import classifier_of, set_taps


def net_options(
    *,
    init: Literal["default", "he", "xavier", "normal"] = "default",
    init_from: Annotated[str, Field(min_length=1)] | None = None,
    freeze: list[str] | None = None,
    freeze_bn: bool = False,
    stages: Annotated[list[str], Field(min_length=1)] | None = None,
) -> None:
    """Options of every net: what it begins with, and which of it learns.

    Args:
        init: Weights of convolutions and linear layers: the net's own (`default`), He's normal by fan-in, Xavier's
            normal, or N(0, 0.02); their biases are 0 then.
        init_from: Experiment directory (its best checkpoint) or checkpoint file whose weights the net begins with; a
            classifier for another number of classes stays new.
        freeze: Paths of modules that do not learn, such as `features` or `layer1.0`.
        freeze_bn: All batch norms stay in eval mode: they use and keep the statistics that they begin with.
        stages: Paths of the modules whose outputs are the stages' maps, from the first to the last, such as `layer1` or
            `features.4`; null: the net's own stages, or, of nets of torchvision and timm, the last maps of each size.
    """


def peer_options(*, init: Literal["default", "he", "xavier", "normal"] = "default") -> None:
    """Options of a net that learns beside the student; what it begins with is always new.

    Args:
        init: As for `student`.
    """


NETS = Registry("net", common=net_options)

import_all(__name__, __path__)


def create(section: Mapping[str, Any], num_classes: int) -> nn.Module:
    """Returns the new net that a resolved section names, with the initial weights that its `init` asks for."""
    net: nn.Module = NETS.create(section, num_classes)
    if section["init"] != "default":
        initialise(net, section["init"])
    set_taps(net, section["stages"])
    return net


def adopt(net: nn.Module, weights: Mapping[str, Tensor], where: str) -> bool:
    """Puts the weights of a trained net into a new one of the same kind.

    Args:
        net: Changed in place.
        weights: A `state_dict`.
        where: Its file, for messages.

    Returns:
        Whether the classifier was adopted, too; with another number of classes it stays as it is.

    Raises:
        InputError: Anything else does not fit.
    """
    own, classifier = net.state_dict(), f"{classifier_of(net)}."
    # Its other dimensions must agree: the classes are the first.
    heads = [(own[key], weights[key]) for key in own if key.startswith(classifier) and key in weights]
    fits = all(len(a) == len(b) or a.shape[1:] != b.shape[1:] for a, b in heads)
    given = {key: value for key, value in weights.items() if fits or not key.startswith(classifier)}
    kept = {} if fits else {key: value for key, value in own.items() if key.startswith(classifier)}
    try:
        net.load_state_dict({**given, **kept})
    except RuntimeError as error:
        line = f"student.init_from: {where}: its weights do not fit the student: {mismatch_of(error)}"
        raise InputError(f"{line}; name a checkpoint of the same net", "checkpoint") from None
    return fits


def mismatch_of(error: RuntimeError) -> str:
    """Returns what torch says of weights that do not fit, without listing hundreds of names."""
    text = " ".join(str(error).partition("\n")[2].split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def freeze(net: nn.Module, section: Mapping[str, Any], whole: nn.Module | None = None) -> list[nn.Module]:
    """Excludes the parameters of the modules that a resolved section's `freeze` names from training.

    Args:
        net: As the section makes it.
        section: The resolved `student` section.
        whole: What is trained, if that is more than the net.

    Returns:
        The batch norms that are to stay in eval mode.

    Raises:
        InputError: There is no such module, or nothing would be left to learn.
    """
    modules = dict(net.named_modules())
    for path in section["freeze"] or []:
        if path not in modules or not path:
            known = suggest(path, [name for name, _ in net.named_children()])
            raise InputError(f"student.freeze: net {section['name']!r} has no module {path!r}; {known}")
        modules[path].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in (whole or net).parameters()):
        raise InputError(f"student.freeze: {section['freeze']} leaves nothing to learn; freeze less")
    return [m for m in modules.values() if section["freeze_bn"] and isinstance(m, nn.modules.batchnorm._BatchNorm)]


def restore(state: Mapping[str, Any], where: str) -> nn.Module:
    """Returns the net that a checkpoint describes, with its weights.

    Args:
        state: A checkpoint: `net` holds the section that named it and its number of classes.
        where: The checkpoint's file, for messages.

    Raises:
        InputError: The net is unknown here, or its weights do not fit it.
    """
    section, num_classes = state["net"]["section"], state["net"]["num_classes"]
    _, problems = NETS.resolve(section)
    if problems:
        raise InputError(f"{where}: its net cannot be built: {problems[0][0]}: {problems[0][1]}", "checkpoint")
    # A checkpoint holds all weights: nothing is fetched for a net that began with pretrained ones.
    net = NETS.create({**section, "pretrained": False} if "pretrained" in section else section, num_classes)
    set_taps(net, section.get("stages"))  # older checkpoints do not name them
    net = equipped(net, state["net"].get("equipment", {}))
    try:
        net.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        line = f"{where}: its weights do not fit net '{section['name']}': {mismatch_of(error)}"
        raise InputError(line, "checkpoint") from None
    return net

"""The shape of params.json: which sections it has, and what each may hold.

Nothing is listed here twice: a section's options are the keyword-only parameters of the callable that it names
(`model.registry`), the top level's are those of `run_options`. `python -m model.schema` prints the reference
that the README shows; `python -m model.schema --json` a JSON Schema for editors.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field

from model.data import DATASETS, REST, resolve_unlabelled
from model.data.augmentations import TRANSFORMS
from model.data.pipeline import unlabelled_options
from model.errors import InputError
from model.legacy import flat_options, is_flat, translate
from model.losses import LOSSES, create_objective, sections_of
from model.losses import resolve as resolve_loss
from model.losses.objective import COMBINABLE, Objective
from model.losses.weights import WEIGHTS
from model.nets import NETS, peer_options
from model.optim import OPTIMIZERS, SCHEDULES
from model.optim import check as check_optim
from model.registry import Problem, Registry, check_options, options_model, options_of, suggest

SECTIONS: dict[str, Registry] = {
    "dataset": DATASETS,
    "student": NETS,
    "loss": LOSSES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}
OTHERS = ("teacher", "unlabelled")
UNLABELLED = (
    "Images without labels, or whose labels are not used, for the parts of the loss that need none: a section as"
    " `dataset`, of which all training images are taken, or `rest`, those that `dataset.subset_fraction` leaves out. It"
    " takes the options of the dataset it names, and:"
)
WHAT = {"features": "maps", "preacts": "maps before the activation", "embedding": "embeddings"}  # of a net, in messages
DEFAULTS: dict[str, dict[str, Any]] = {"loss": {"name": "ce"}, "schedule": {"name": "constant"}}


def run_options(
    *,
    num_epochs: Annotated[int, Field(ge=0, le=1_000_000)],
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 230,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0,
    log_gradient_norms: bool = False,
    combine_teachers: Literal["probabilities", "logits"] = "probabilities",
) -> None:
    """Options at the top level of params.json.

    Args:
        num_epochs: Passes over the training set; with 0 the net is scored and kept as it begins (a pretrained one).
        seed: Decides initial weights, order, augmentation and dropout.
        precision: What the nets compute in; `auto` is bf16 where the device has it in hardware, else fp32. Losses
            are always float32.
        compile: `on`: torch.compile makes the student's forward and backward out of fewer kernels; where it cannot, the
            log says so and training goes on without. `auto` is `off`: on a CPU it takes half a minute at each start,
            and on a GPU nobody has measured it here.
        checkpoint_minutes: A long epoch is also saved on the way, this often.
        log_gradient_norms: Also log, for each term of the loss, the norm of its gradient on the student's logits, as
            `<term>_gradient`: which of them pulls how strongly. It costs a backward pass through the losses.
        combine_teachers: What several teachers' mean is of: their `probabilities` at the temperature of the loss, which
            must then be one, or their `logits`.
    """


def teacher_options(
    *,
    model_dir: str,
    restore_file: Literal["best", "last"] = "best",
    mean: list[float] | None = None,
    std: list[Annotated[float, Field(gt=0)]] | None = None,
    cache: Literal["off", "lazy", "full"] = "off",
    cache_dtype: Literal["fp16", "fp32"] = "fp16",
    top_k: Annotated[int, Field(ge=1)] | None = None,
    max_gb: Annotated[float, Field(gt=0)] = 10.0,
    cache_dir: Annotated[str, Field(min_length=1)] | None = None,
    stages: Annotated[list[str], Field(min_length=1)] | None = None,
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0,
) -> None:
    """The teacher: another experiment directory. A plain text stands for its `model_dir`.

    A list names several, which teach together losses that read logits; see `combine_teachers`.

    Args:
        model_dir: The teacher's directory, from where the command is run.
        restore_file: Which of its checkpoints: `best` on its validation split, or `last`.
        mean: What the teacher's images were normalised with, per channel; null: what its checkpoint says.
        std: The same for the standard deviation.
        cache: Keep the teacher's answers in files, for every run under it: `lazy`, as they are computed; `full`, all of
            them before training; `off`: ask it in every step. For losses that need logits or embeddings only.
        cache_dtype: What they are kept in. With fp32, a run from the store equals one without it to the bit if its
            batches were computed together.
        top_k: Keep the k largest logits and the mass of the others, as if these were equal; null: all.
        max_gb: What the stores of this teacher may take. Where it does not fit, `lazy` does without, `full` ends.
        cache_dir: Where the stores are; null: `store` in the teacher's directory.
        stages: Paths of the teacher's modules whose outputs are its stages' maps, as for the student; null: as in its
            own run.
        weight: Of several teachers: the share of this one; they are divided by their sum.
    """


def resolve(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Checks the whole of a params.json and fills in every default.

    Args:
        raw: What the file holds, overrides applied; the ancestor's flat keys, too.

    Returns:
        The complete params, and every problem found as (dotted key, text). With problems the params are unusable.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    if is_flat(raw):
        raw, _, problems = translate(raw)
        if problems:
            return values, problems
    own = {key: value for key, value in raw.items() if key not in (*SECTIONS, *OTHERS)}
    known = [*options_of(run_options), *SECTIONS, *OTHERS]
    for key in [key for key in own if key not in known]:
        problems.append((key, f"unknown key; {_place(key, raw) or suggest(key, known)}"))
        del own[key]
    top, found = check_options(own, run_options)
    values |= top
    problems += found
    for key, registry in SECTIONS.items():
        section = raw.get(key, DEFAULTS.get(key))
        if isinstance(section, Mapping) and "name" not in section:  # an option of the default, by an override say
            section = {**DEFAULTS.get(key, {}), **section}
        if section is None:
            problems.append((key, f'is missing; add "{key}": {{"name": ...}} ({suggest("", registry)})'))
            continue
        values[key], found = resolve_loss(section) if key == "loss" else registry.resolve(section)
        problems += [(f"{key}.{path}".rstrip("."), text) for path, text in found]
    values["teacher"], found = resolve_teacher(raw.get("teacher"))
    problems += [(f"teacher.{path}".rstrip("."), text) for path, text in found]
    values["unlabelled"], found = resolve_unlabelled(raw.get("unlabelled"))
    problems += [(f"unlabelled.{path}".rstrip("."), text) for path, text in found]
    if not problems:
        problems += _contradictions(values)
    return values, problems


def _place(key: str, raw: Mapping[str, Any]) -> str:
    """Returns a hint for an option that was written at the top level instead of in its section."""
    for section, registry in SECTIONS.items():
        options = {*(options_of(registry.common) if registry.common else ())}
        for _, entry in registry.items():
            options |= set(options_of(entry))
        if key in options:
            label = "<its label>." if isinstance(raw.get(section), list) else ""
            return f"it is an option of a section: write {section}.{label}{key}"
    return ""


def resolve_teacher(value: Any) -> tuple[Any, list[Problem]]:
    """Checks a `teacher` section, a text that stands for one, or a list of these, and fills in every default.

    Returns:
        The complete section, or the list of several, and every problem found, as (key below `teacher`, text).
    """
    if value is None:
        return None, []
    if not isinstance(value, list) or len(value) == 1:
        section, problems = _resolve_one_teacher(value[0] if isinstance(value, list) else value)
        if not problems and section["weight"] != 1:
            problems = [("weight", "there is one teacher; remove it")]
        return section, problems
    if not value:
        return None, [("", "the list is empty; name at least one teacher")]
    found = [_resolve_one_teacher(section) for section in value]
    problems = [(f"{place}.{key}".rstrip("."), text) for place, (_, own) in enumerate(found) for key, text in own]
    sections = [section for section, _ in found]
    if not problems:
        places: dict[tuple[str, str], int] = {}
        for place, section in enumerate(sections):
            first = places.setdefault((section["model_dir"], section["restore_file"]), place)
            if first != place:
                problems.append((f"{place}.model_dir", f"teacher {first} again; give that one more weight"))
    return sections, problems


def _resolve_one_teacher(section: Any) -> tuple[dict[str, Any], list[Problem]]:
    if isinstance(section, str):
        section = {"model_dir": section}
    if not isinstance(section, Mapping):
        return {}, [("", f'expected an experiment directory as text or {{"model_dir": ...}}, got {section!r}')]
    return check_options(section, teacher_options)


def _contradictions(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields what no single option shows."""
    try:
        objective = create_objective(values["loss"], values["num_epochs"])
    except InputError as error:
        yield "loss", str(error)
        return
    silent = {*sections_of(values["loss"])} - {label for label, _ in objective.parts()}
    names = " and ".join(f"{label!r}{' (weight 0)' * (label in silent)}" for label in sections_of(values["loss"]))
    taught = " and ".join(repr(label) for label, part in objective.parts() if part.needs_teacher)
    if objective.needs_teacher and values["teacher"] is None:
        text = f'loss {taught} needs a teacher; add "teacher": "experiments/<its directory>"'
        yield "teacher", text
    yield from _contradictions_of_several(values, objective)
    kept = [key for key, section in _teachers(values) if section["cache"] != "off"]
    if objective.needs_teacher and not objective.can_be_stored:
        text = f'loss {taught} needs more of the teacher than can be kept in files; set it to "off"'
        yield from ((f"{key}.cache", text) for key in kept)
    for label, section in sections_of(values["loss"]).items():
        for number, peer in enumerate(section.get("peers") or []):
            _, found = NETS.resolve(peer, peer_options)
            yield from ((f"loss.{label}.peers.{number}.{path}".rstrip("."), text) for path, text in found)
    if "strong_logits" in objective.needs and values["dataset"]["second_augmentation"] is None:
        text = f"loss {names} compares two views of each image; name the transforms of the second, such as"
        yield "dataset.second_augmentation", f'{text} ["crop", "horizontal_flip", "rand_augment"]'
    if values["dataset"]["second_augmentation"] is not None and "strong_logits" not in objective.needs:
        yield "dataset.second_augmentation", f"loss {names} looks at one view only; remove it"
    changes = objective.initial_epochs or any(
        isinstance(s["weight"], dict) for s in sections_of(values["loss"]).values()
    )
    if changes and values["schedule"].get("metric") == "val.loss":
        yield "schedule.metric", "val.loss is another function in other epochs here; take val.accuracy"
    if values["unlabelled"] is not None:
        if objective.needs_labels:
            yield "unlabelled", f"loss {names} has no use for images without labels; give one that has a weight"
        for key in kept:
            yield f"{key}.cache", 'answers for unlabelled images cannot be kept; set it to "off"'
        if values["dataset"]["second_augmentation"] is not None:
            yield "unlabelled", "its images have no second view; remove dataset.second_augmentation"
    for key in ("init", "init_from"):
        if values["student"].get("pretrained") and values["student"][key] not in ("default", None):
            yield f"student.{key}", "would overwrite the pretrained weights; remove one of the two"
    yield from check_optim(values["optimizer"], values["schedule"], values["num_epochs"])


def _teachers(values: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the resolved sections of the teachers, with their paths."""
    teacher = values["teacher"]
    if isinstance(teacher, list):
        return [(f"teacher.{place}", section) for place, section in enumerate(teacher)]
    return [] if teacher is None else [("teacher", teacher)]


def _contradictions_of_several(values: Mapping[str, Any], objective: Objective) -> Iterator[Problem]:
    """Yields what is wrong with several teachers together, or with what is said of several where there are none."""
    number = len(_teachers(values))
    if number < 2:
        if values["combine_teachers"] != "probabilities":
            yield "combine_teachers", f"there is {'one' if number else 'no'} teacher; remove it"
        return
    for label, loss in objective.parts():
        if loss.needs_teacher and (more := sorted(loss.teacher_needs - COMBINABLE)):
            what = " and ".join(WHAT[field] for field in more)
            yield (
                "teacher",
                f"loss {label!r} reads {what}, which several teachers cannot give together; name one teacher",
            )
            return
    if values["combine_teachers"] == "probabilities":
        try:
            objective.teacher_temperature  # noqa: B018
        except InputError as error:
            yield "combine_teachers", f'"probabilities" {error}; set them equal or combine "logits"'


# --- the reference ----------------------------------------------------------------------------------------


def reference() -> str:
    """Returns the params.json reference as Markdown, made from signatures and docstrings."""
    parts = ["#### Top level", "", *_table(run_options), "", "#### `teacher`", "", *_table(teacher_options)]
    parts += ["", "#### `unlabelled`", "", UNLABELLED, "", *_table(unlabelled_options)]
    for section, registry in {**SECTIONS, "loss.weight": WEIGHTS, "dataset.augmentation": TRANSFORMS}.items():
        parts += ["", f"#### `{section}`", ""]
        if registry.common:
            parts += ["Every entry:", "", *_table(registry.common), ""]
        parts += ["| name | what it is | options |", "|:--|:--|:--|"]
        for name, entry in registry.items():
            shown = f"{name}<name>" if name.endswith("/") else name
            options = "<br>".join(_option(*row) for row in _rows(entry))
            parts.append(f"| `{shown}` | {_summary(entry)} | {options} |")
    parts += ["", "#### The ancestor's flat keys", "", *_table(flat_options)]
    return "\n".join(parts) + "\n"


def methods() -> str:
    """Returns a table of all losses as Markdown, made from their attributes and docstrings."""
    lines = ["| name | what it is | reads | unlabelled images | usual weight | source |", "|:--|:--|:--|:-:|--:|:--|"]
    for name, entry in LOSSES.items():
        given: Any = entry
        reads = ", ".join(field.replace("_", " ") for field in sorted(given.needs))
        source = re.search(r"^Source: (.*?)(?=\n\n|\n\w+: |\Z)", inspect.getdoc(entry) or "", re.DOTALL | re.MULTILINE)
        cells = [
            f"`{name}`",
            _summary(entry),
            reads,
            "" if given.needs_labels else "yes",
            f"{given.usual_weight:g}",
            " ".join(source[1].split()).replace("|", "\\|") if source else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _table(function: Callable[..., Any]) -> list[str]:
    rows = [f"| `{name}` | {kind} | {default} | {text} |" for name, kind, default, text in _rows(function)]
    return ["| key | value | default | meaning |", "|:--|:--|:--|:--|", *rows]


def _option(name: str, kind: str, default: str, text: str) -> str:
    return f"`{name}` ({kind}; {default}): {text}"


def _rows(function: Callable[..., Any]) -> Iterator[tuple[str, str, str, str]]:
    meanings = _meanings(function)
    for name, (annotation, default) in options_of(function).items():
        shown = "required" if default is ... else f"`{json.dumps(default)}`"
        yield name, _kind(annotation), shown, meanings[name]


def _summary(function: Callable[..., Any]) -> str:
    return inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _meanings(function: Callable[..., Any]) -> dict[str, str]:
    """Returns the texts of a docstring's `Args:` part by name."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", inspect.cleandoc(function.__doc__ or ""), re.MULTILINE)
    entries = re.findall(r"^    ([\w, ]+): ((?:.*\n?)(?:     +.*\n?)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()).replace("|", "\\|") for names, text in entries for name in names.split(", ")}


_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        base, *notes = get_args(annotation)
        limits = [
            f"{sign} {_short(getattr(bound, key))}"
            for note in notes
            for bound in getattr(note, "metadata", [])
            for key, sign in _SIGNS.items()
            if hasattr(bound, key)
        ]
        return " ".join([_kind(base), ", ".join(limits)]).strip()
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is dict:
        return "object"
    if get_origin(annotation) is list:
        return f"list of {_kind(get_args(annotation)[0])}"
    if get_args(annotation):
        return " or ".join(_kind(branch) for branch in get_args(annotation))
    return _TYPES.get(annotation, str(annotation))


def _short(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def json_schema() -> dict[str, Any]:
    """Returns a JSON Schema of params.json: each section is one of its entries, told apart by `name`."""

    def section_schema(
        registry: Registry, name: str, entry: Callable[..., Any], common: Callable[..., Any] | None = None
    ) -> dict[str, Any]:
        own, *others = registry.functions(entry)
        schema = options_model(own, *([common] if common else others)).model_json_schema()
        named = {"pattern": f"^{name}.+"} if name.endswith("/") else {"const": name}
        schema["properties"] = {"name": {"type": "string", **named}, **schema.get("properties", {})}
        schema["required"] = ["name", *schema.get("required", [])]
        schema["title"] = name
        return schema

    schema = options_model(run_options).model_json_schema()
    for section, registry in SECTIONS.items():
        schema["properties"][section] = {"oneOf": [section_schema(registry, *item) for item in registry.items()]}
        if section not in DEFAULTS:
            schema["required"].append(section)
    loss = schema["properties"]["loss"]
    loss["oneOf"] = [*loss["oneOf"], {"type": "array", "minItems": 1, "items": {"oneOf": loss["oneOf"]}}]
    sources = [section_schema(DATASETS, *item, unlabelled_options) for item in DATASETS.items()]
    rest = options_model(unlabelled_options).model_json_schema()
    rest["properties"]["name"] = {"const": REST}
    schema["properties"]["unlabelled"] = {"oneOf": [{"const": REST}, {"type": "null"}, rest, *sources]}
    teacher = options_model(teacher_options).model_json_schema()
    several = {"type": "array", "minItems": 1, "items": {"oneOf": [{"type": "string"}, teacher]}}
    schema["properties"]["teacher"] = {"oneOf": [{"type": "string"}, {"type": "null"}, teacher, several]}
    return schema


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2) if "--json" in sys.argv else reference(), end="")

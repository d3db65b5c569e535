"""What a run is taught with: its objective, complete; its teacher, ready to answer.

A teacher is made fast, as good as its original, and gets the stores of what it has answered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import data, nets, parallel, teacher_store
from model.data.loader import Loader
from model.devices import device_name
from model.engine import Totals, correct, evaluate, probe, probe_teacher
from model.ensemble import Teacher, TeacherEnsemble, create_teachers
from model.errors import DivergedError, InputError
from model.losses import create_objective
from model.losses.objective import Objective
from model.outputs import Probe, outputs_of
from model.rng import derive_seed
from model.taps import taps_of
from model.teacher import FrozenTeacher
from model.teacher_store import StoreFullError, TeacherStore
from utils import FAILED, Params, RunError, read_json, write_json

TOLERANCE = 0.001  # of accuracy: what a fast teacher may differ from its original
CHANCE, SMALL = 3, 0.02  # standard errors and accuracy: what a teacher may differ from what its own run reports

Remark = tuple[int, str]  # a level of logging, and a line


def root_of(section: Mapping[str, Any]) -> Path:
    """Returns the folder with the stores of the teacher that a resolved `teacher` section names."""
    teacher_dir = Path(section["model_dir"])
    if section["cache_dir"] is None:
        return teacher_dir / "store"
    # Other teachers may keep theirs there, too.
    return Path(section["cache_dir"]) / f"{teacher_dir.name}-{teacher_store.digest({'of': str(teacher_dir.resolve())})}"


def complete(
    loss: Objective,
    student: Probe,
    teacher: Probe | None,
    splits: data.Data,
    section: Mapping[str, Any],
    seed: int,
) -> None:
    """Completes a run's objective with all that it has besides its options: adapters, memories, nets that learn beside.

    Args:
        loss: Changed in place.
        student: As it begins.
        teacher: If there is one.
        splits: The run's data.
        section: The resolved `student` section.
        seed: The run's, from which all initial weights follow.

    Raises:
        InputError: The nets or the samples do not give what a loss needs.
    """
    alone = [label for label, part in loss.parts() if not part.processes]
    if alone and parallel.size() > 1:
        line = f"{' and '.join(alone)}: cannot be shared by {parallel.size()} processes"
        raise InputError(f"loss {line}; start one, without torchrun", "usage")
    torch.manual_seed(derive_seed(seed, "loss"))
    loss.attach(student, teacher)
    loss.enrol(splits.samples())
    # The weights of a pretrained student are no other initial weights.
    alike = {**section, "stages": None, **({"pretrained": False} if "pretrained" in section else {})}
    wanted = [(part, own) for _, part in loss.parts() for own in part.peer_sections]
    for place, (part, own) in enumerate(wanted):
        torch.manual_seed(derive_seed(seed, "peer", place))
        whole = nets.NETS.resolve(own)[0] if own else alike
        peer = nets.create(whole, splits.num_classes)
        probe(peer, whole["name"], splits.shape)  # it may not take these images
        part.peers.append(peer)


def rehearse(params: Params, sections: Sequence[Mapping[str, Any]], theirs: Sequence[Params]) -> None:
    """Lets new nets stand for a run and its teachers, so that what cannot fit is refused before these are trained.

    Args:
        params: The run's.
        sections: Its resolved `teacher` sections.
        theirs: The params of the teachers' own runs, one by one.

    Raises:
        InputError: As `create_teachers` and `complete`.
    """
    if any(create_objective(own.loss, own.num_epochs).equips for own in theirs):
        return  # which parts such a teacher will have, its own teacher decides
    loss = create_objective(params.loss, params.num_epochs)
    with parallel.first_goes_first():
        splits = data.create(params.dataset, seed=params.seed, device=torch.device("cpu"))

    def made(section: Mapping[str, Any]) -> tuple[nn.Module, Probe, dict[str, Any]]:
        section = {**section, **({"pretrained": False} if "pretrained" in section else {})}
        net = nets.create(section, splits.num_classes)
        shown = probe(net, section["name"], splits.shape)
        return net, shown, {"section": {**section, "stages": [*taps_of(net)] or None}, **splits.facts()}

    bare, shown, record = made(params.student)
    states = [{"net": own, "state_dict": net.state_dict()} for net, _, own in (made(each.student) for each in theirs)]
    teacher = create_teachers(states, sections, record, params.combine_teachers, loss)
    complete(loss, shown, probe_teacher(teacher, splits.shape), splits, params.student, params.seed)
    loss.equip(bare)


# --- fast -------------------------------------------------------------------------------------------------


def make_ready(
    teacher: Teacher,
    sections: Sequence[Mapping[str, Any]],
    splits: data.Data,
    loss: Objective,
    precision: str,
    num_epochs: int,
) -> tuple[Teacher, list[Remark]]:
    """Returns a teacher as a run is to have it, fast and with its stores, and what there is to say about it.

    Args:
        teacher: As it was trained, on its device; or several, together.
        sections: The resolved `teacher` section of each.
        splits: The run's data.
        loss: What the teacher is for.
        precision: fp32, bf16 or fp16.
        num_epochs: Of the run.

    Raises:
        InputError: As `open_stores`.
    """
    made = [
        _make_one_ready(member, section, splits, loss, precision, num_epochs)
        for member, section in zip(teacher.members, sections, strict=True)
    ]
    remarks = [remark for _, told in made for remark in told]
    if not isinstance(teacher, TeacherEnsemble):
        return made[0][0], remarks
    together = teacher.of([member for member, _ in made])
    score = accuracy_of(together, splits.val)
    return together, [*remarks, (INFO, f"{together.describe()}: val accuracy {score:.4f} here")]


def _make_one_ready(
    teacher: FrozenTeacher,
    section: Mapping[str, Any],
    splits: data.Data,
    loss: Objective,
    precision: str,
    num_epochs: int,
) -> tuple[FrozenTeacher, list[Remark]]:
    where, num_samples = section["model_dir"], splits.val.num_samples
    if loss.teacher_statistics == "batch":  # folded, a batch norm has no statistics any more
        teacher.precision = precision
        score = evaluate(teacher, splits.val)["accuracy"]
        line = f"teacher in {precision}, normalising by each batch; with its own statistics, val accuracy {score:.4f}"
        return teacher, [compared(teacher, where, score, num_samples), (INFO, line)]
    cached = section["cache"] != "off"
    root = root_of(section) if cached else None
    quick, score, told = faster(teacher, splits, precision, loss.teacher_needs, root)
    opened = open_stores(quick, splits, section, loss.teacher_needs, num_epochs) if cached else []
    return quick, [compared(teacher, where, score, num_samples), told, *opened]


def compared(teacher: FrozenTeacher, where: str, here: float, num_samples: int) -> Remark:
    """Returns how well a teacher does on a run's validation images, next to what its own directory reports.

    Where the classes, the normalisation or the images are not what it was trained with, nothing else may show it.

    Args:
        teacher: With its accuracy in its own run, if that is known.
        where: Its directory.
        here: Its accuracy on the validation images of this run.
        num_samples: How many these are. How many its own run had is not known; as many are assumed.
    """
    line, own = f"teacher {where}: {teacher.name}, val accuracy {here:.4f} here", teacher.accuracy
    if own is None:
        return INFO, line
    line += f", {own:.4f} in its own run"
    share = (here + own) / 2
    chance = CHANCE * math.sqrt(2 * share * (1 - share) / num_samples)
    if abs(here - own) <= max(chance, SMALL):
        return INFO, line
    asked = (
        "is it the right dataset, normalisation and class order?"
        if here < own
        else "has it been trained on images that this run validates on (dataset.val_fraction, dataset.val_seed)?"
    )
    return WARNING, f"{line}: too different to be chance; {asked}"


def accuracy_of(teacher: TeacherEnsemble, loader: Loader) -> float:
    """Returns the accuracy of teachers together; what they have answered before is not computed again."""
    totals = Totals(next(teacher.parameters()).device)
    with teacher.lesson(loader, 0, frozenset({"logits"})) as ask:
        for batch in loader.epoch(0):
            totals.add(correct(ask(batch).logits, batch.labels), {}, len(batch.labels))
    return totals.of_all().means()["accuracy"]


def faster(
    teacher: FrozenTeacher, splits: data.Data, precision: str, needs: frozenset[str], root: Path | None
) -> tuple[FrozenTeacher, float, Remark]:
    """Makes a copy of a teacher that answers faster.

    Args:
        teacher: As it was trained, in fp32 on its device.
        splits: The scores of both on `val` must agree.
        precision: Of the copy.
        needs: What it will be asked for.
        root: Where the scores are remembered, as long as neither teacher nor data nor machine changes; None: nowhere.

    Returns:
        The copy, or the teacher itself where the copy would score differently; the accuracy of the teacher as it was
        trained; and what there is to say.
    """
    fast = teacher.fast(precision, needs, splits.shape)
    what = {
        "teacher": teacher.fingerprint,
        "input": teacher.input,
        "data": splits.fingerprint,
        "precision": precision,
        "folded": fast.num_folded,
        "device": device_name(next(teacher.parameters()).device),
        "torch": torch.__version__,
    }
    path = None if root is None else root / f"accuracy_{teacher_store.digest(what)}.json"
    scores: dict[str, Any] = {}
    with contextlib.suppress(RunError, OSError):
        scores = read_json(path) if path and path.exists() else {}
    scores = parallel.from_first(scores)  # another process may read what this one has just written
    if not all(isinstance(scores.get(name), float) for name in ("original", "fast")):
        scores = {"original": evaluate(teacher, splits.val)["accuracy"], "fast": 0.0}
        with contextlib.suppress(DivergedError):  # fp16 ends at 65504
            scores["fast"] = evaluate(fast, splits.val)["accuracy"]
        with contextlib.suppress(RunError, OSError):  # a teacher of somebody else's
            if path and parallel.rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {**scores, **what})
    line = (
        f"teacher in {precision}, {fast.num_folded} batch norms folded: val accuracy {scores['fast']:.4f} here,"
        f" {scores['original']:.4f} as it was trained"
    )
    # One image of a small split is more than the tolerance.
    if abs(scores["fast"] - scores["original"]) <= max(TOLERANCE, 1 / splits.val.num_samples) + 1e-9:
        return fast, scores["original"], (INFO, line)
    line = f"{line}; that is too different, so it computes in fp32, as it was trained"
    return teacher, scores["original"], (WARNING, line)


# --- with its stores --------------------------------------------------------------------------------------


def open_stores(
    teacher: FrozenTeacher,
    splits: data.Data,
    section: Mapping[str, Any],
    needs: frozenset[str],
    num_epochs: int,
) -> list[Remark]:
    """Gives a teacher the stores of its answers for the training and the validation images of a run.

    Args:
        teacher: As it will answer.
        splits: The run's data.
        section: The resolved `teacher` section.
        needs: What it will be asked for.
        num_epochs: Of the run.

    Returns:
        What there is to say about them.

    Raises:
        InputError: A store cannot be used; or there is no room for it, and the run would not be the same without.
    """
    root, remarks = root_of(section), []
    outputs = vars(outputs_of(teacher, torch.zeros(1, *splits.shape, device=splits.train.device), needs))
    widths = {field: outputs[field].shape[1] for field in sorted(needs | {"logits"})}
    for name, loader in (("training", splits.train), ("validation", splits.val)):
        if any(split is loader.split for split, _ in teacher.stores):
            continue  # they are of one list
        error = None
        try:
            store = TeacherStore.open(
                root,
                manifest(teacher, loader, splits),
                num_samples=len(loader.split),
                num_views=loader.num_views,
                widths=widths,
                dtype=section["cache_dtype"],
                top_k=section["top_k"],
                max_bytes=int(section["max_gb"] * 1e9),
                epochs=[(loader.seed, epoch) for epoch in range(num_epochs)] if loader.num_views is None else [],
            )
        except StoreFullError as found:
            error = found
        if any(parallel.maximum(int(error is not None))):  # all processes of a run do the same
            error = error or StoreFullError(f"{root}: another process of this run could not open it", "teacher")
            if section["cache"] == "full" or section["top_k"]:  # without the rows, top_k would be another loss
                raise error
            teacher.stores = []
            return [(WARNING, f"{error}; the teacher is asked in every step")]
        pairs = list(needed(loader, num_epochs))
        filled = sum(store.num_filled(*each) for each in pairs)
        total = sum(len(samples) * len(views) for samples, views, _, _ in pairs)
        ours = [store.folder, *(other.folder for _, other in teacher.stores)]
        others = [found for folder, found in teacher_store.stores_in(root) if found and folder not in ours]
        if others and not filled:
            why = teacher_store.why_not(store.manifest, others)
            remarks.append((INFO, f"no store of this teacher has answers for this run: {why}"))
        line = f"teacher's answers for {name} images: {filled:,} of {total:,} are in {store.folder}"
        remarks.append((INFO, line))
        teacher.stores.append((loader.split, store))
    return remarks


def manifest(teacher: FrozenTeacher, loader: Loader, splits: data.Data) -> dict[str, Any]:
    """Returns what decides a teacher's answers for the samples of a loader's list."""
    views: dict[str, Any] = dataclasses.asdict(loader.augmentation)
    if loader.num_views is None:
        views = {"transforms": splits.augmentation, "torchvision": importlib.metadata.version("torchvision")}
    return {
        "teacher": {"net": teacher.name, "weights": teacher.fingerprint},
        "dataset": loader.split.fingerprint(),
        "preprocessing": {"shape": list(splits.shape), **teacher.input, "views": views},
        "precision": teacher.precision,
        "folded": teacher.num_folded,
    }


def needed(loader: Loader, num_epochs: int) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Yields all that a run can ask for: samples, views of each of them, seed and epoch, as a store takes them."""
    if loader.num_views is not None:
        yield loader.indices, torch.arange(loader.num_views), loader.seed, 0
    else:
        yield from ((loader.indices, torch.tensor([-1]), loader.seed, epoch) for epoch in range(num_epochs))


def fill(
    teacher: FrozenTeacher,
    splits: data.Data,
    needs: frozenset[str],
    num_epochs: int,
    after_batch: Callable[[], None] = lambda: None,
    quiet: bool = False,
) -> int:
    """Computes all answers that a run can ask for and that its stores lack; they are kept as they come.

    Args:
        teacher: With its stores.
        splits: The run's data.
        needs: What it will be asked for.
        num_epochs: Of the run.
        after_batch: Called whenever the run may stop; it may raise.
        quiet: Show no bar.

    Returns:
        How many it has computed.

    Raises:
        RunError: Reason `storage`: there is no room for them any more; what was computed stays.
    """
    # Blocks of many batches, so that workers read ahead; but short, as other processes take the next.
    stores = [(loader, store) for loader in (splits.train, splits.val) if (store := teacher.store_of(loader))]
    work = [(loader, store, pairs) for loader, store in stores for pairs in needed(loader, num_epochs)]
    total = sum(len(samples) * len(views) for *_, (samples, views, _, _) in work)
    filled = sum(store.num_filled(*pairs) for _, store, pairs in work)
    computed = 0
    with tqdm(desc="teacher", total=total, initial=filled, unit="img", disable=quiet or None, leave=False) as bar:
        for loader, store, (samples, views, seed, epoch) in work:
            for block in store.missing_blocks(samples, views, 16 * loader.batch_size, seed, epoch):
                for batch in loader.show(*block, epoch):
                    outputs = vars(teacher.compute(needs, batch))
                    fields = {column.field: outputs[column.field] for column in store.columns}
                    try:
                        store.write(fields, batch.indices, batch.views, seed, epoch)
                    except StoreFullError as error:
                        raise RunError(str(error), "storage", FAILED) from None
                    computed += len(batch.labels)
                    bar.update(len(batch.labels))
                    after_batch()
    return computed

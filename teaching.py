"""The teacher of a run, ready to answer: fast, as good as its original, with the store of what it has answered.

Also the commands about such stores, `python -m model.teacher_store status|verify|fill|gc <dir>`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_checkpoint
from model import data, nets, parallel, schema, teacher_store
from model.data.loader import Loader
from model.devices import choose_device, choose_precision, device_name, place
from model.engine import evaluate
from model.errors import InputError
from model.losses import LOSSES
from model.losses.base import Loss
from model.outputs import outputs_of
from model.teacher import FrozenTeacher, create_teacher, fingerprint_of
from model.teacher_store import Column, StoreSizeError, TeacherStore, top_k_error
from process import log, set_logger
from sources import load_teacher_checkpoint
from utils import FAILED, OK, Params, RunError, read_json, write_json

TOLERANCE = 0.001  # of accuracy: what a fast teacher may differ from its original
# What an answer may differ if it is computed again, in another batch or on another machine: see `difference`.
TOLERATED = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}


def root_of(section: Mapping[str, Any]) -> Path:
    """Returns the folder with the stores of the teacher that a resolved `teacher` section names."""
    return Path(section["cache_dir"] or Path(section["model_dir"]) / "store")


def make_ready(
    teacher: FrozenTeacher,
    section: Mapping[str, Any],
    splits: data.Data,
    loss: Loss,
    precision: str,
    num_epochs: int,
    after_batch: Callable[[], None],
    quiet: bool,
) -> FrozenTeacher:
    """Returns a teacher as a run is to have it, fast and with its stores; says what it is and how well it does here.

    Args:
        teacher: As it was trained, on its device.
        section: The resolved `teacher` section.
        splits: The run's data.
        loss: What the teacher is for.
        precision: fp32, bf16 or fp16.
        num_epochs: Of the run.
        after_batch, quiet: As for `fill`.
    """
    own = "" if teacher.accuracy is None else f", val accuracy {teacher.accuracy:.4f} in its own run"
    log.info("teacher %s: %s%s", section["model_dir"], teacher.name, own)
    if loss.teacher_statistics == "batch":  # folded, a batch norm has no statistics any more
        teacher.precision = precision
        score = evaluate(teacher, splits.val)["accuracy"]
        line = "teacher in %s, normalising by each batch; with its own statistics, val accuracy %.4f"
        log.info(line, precision, score)
        return teacher
    teacher = faster(teacher, splits, precision, loss.needs, None if section["cache"] == "off" else root_of(section))
    if section["cache"] != "off":
        open_stores(teacher, splits, section, loss.needs, num_epochs)
    if section["cache"] == "full":
        fill(teacher, splits, loss.needs, num_epochs, after_batch, quiet)
    return teacher


def faster(
    teacher: FrozenTeacher, splits: data.Data, precision: str, needs: frozenset[str], root: Path | None
) -> FrozenTeacher:
    """Returns a copy of a teacher that answers faster, or the teacher itself where the copy would score differently.

    Args:
        teacher: As it was trained, in fp32 on its device.
        splits: Its scores on `val` must agree.
        precision: Of the copy.
        needs: What it will be asked for.
        root: Where the scores are remembered, as long as neither teacher nor data nor machine changes; None: nowhere.
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
        scores = {name: evaluate(net, splits.val)["accuracy"] for name, net in (("original", teacher), ("fast", fast))}
        with contextlib.suppress(RunError, OSError):  # a teacher of somebody else's
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {**scores, **what})
    log.info(
        "teacher in %s, %d batch norms folded: val accuracy %.4f here, %.4f as it was trained",
        *(precision, fast.num_folded, scores["fast"], scores["original"]),
    )
    # One image of a small split is more than the tolerance.
    if abs(scores["fast"] - scores["original"]) <= max(TOLERANCE, 1 / splits.val.num_samples) + 1e-9:
        return fast
    log.warning("teacher: in %s it scores too differently; it computes in fp32, as it was trained", precision)
    return teacher


# --- with its stores --------------------------------------------------------------------------------------


def open_stores(
    teacher: FrozenTeacher,
    splits: data.Data,
    section: Mapping[str, Any],
    needs: frozenset[str],
    num_epochs: int,
) -> None:
    """Gives a teacher the stores of its answers for the training and the validation images of a run.

    Args:
        teacher: As it will answer.
        splits: The run's data.
        section: The resolved `teacher` section.
        needs: What it will be asked for.
        num_epochs: Of the run.

    Raises:
        InputError: A store cannot be used; or, if `cache` is `full`, they do not fit.
    """
    root = root_of(section)
    outputs = vars(outputs_of(teacher, torch.zeros(1, *splits.shape, device=splits.train.device), needs))
    widths = {field: outputs[field].shape[1] for field in sorted(needs | {"logits"})}
    for name, loader in (("training", splits.train), ("validation", splits.val)):
        if any(split is loader.split for split, _ in teacher.stores):
            continue  # they are of one list
        wanted = manifest(teacher, loader, splits)
        try:
            store = TeacherStore.open(
                root,
                wanted,
                num_samples=len(loader.split),
                num_views=loader.num_views,
                widths=widths,
                dtype=section["cache_dtype"],
                top_k=section["top_k"],
                max_bytes=int(section["max_gb"] * 1e9),
                epochs=[(loader.seed, epoch) for epoch in range(num_epochs)] if loader.num_views is None else [],
            )
        except StoreSizeError as error:
            if section["cache"] == "full":
                raise
            log.warning("%s; the teacher is asked in every step", error)
            return
        pairs = list(needed(loader, num_epochs))
        filled = sum(store.num_filled(*each) for each in pairs)
        total = sum(len(samples) * len(views) for samples, views, _, _ in pairs)
        ours = [store.folder, *(other.folder for _, other in teacher.stores)]
        others = [found for folder, found in teacher_store.stores_in(root) if found and folder not in ours]
        if others and not filled:
            why = teacher_store.why_not(teacher_store.read_manifest(store.folder), others)
            log.info("no store of this teacher has answers for this run: %s", why)
        log.info("teacher's answers for %s images: %d of %d are in %s", name, filled, total, store.folder)
        teacher.stores.append((loader.split, store))


def manifest(teacher: FrozenTeacher, loader: Loader, splits: data.Data) -> dict[str, Any]:
    """Returns what decides a teacher's answers for the samples of a loader's list."""
    digest = hashlib.sha256()
    loader.split.update(digest, torch.arange(len(loader.split)))
    views: dict[str, Any] = dataclasses.asdict(loader.augmentation)
    if loader.num_views is None:
        versions = {name: importlib.metadata.version(name) for name in ("torchvision", "pillow")}
        views = {"transforms": splits.augmentation, **versions}
    return {
        "teacher": {"net": teacher.name, "weights": teacher.fingerprint},
        "dataset": digest.hexdigest(),
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
        StoreFullError: There is no room for them.
    """
    stores = [(loader, store) for loader in (splits.train, splits.val) if (store := teacher.store_of(loader))]
    work = [(loader, store, pairs) for loader, store in stores for pairs in needed(loader, num_epochs)]
    total = sum(len(samples) * len(views) for *_, (samples, views, _, _) in work)
    filled = sum(store.num_filled(*pairs) for _, store, pairs in work)
    computed = 0
    with tqdm(desc="teacher", total=total, initial=filled, unit="img", disable=quiet or None, leave=False) as bar:
        for loader, store, (samples, views, seed, epoch) in work:
            for block in store.missing_blocks(samples, views, loader.batch_size, seed, epoch):
                for batch in loader.show(*block, epoch):
                    outputs = vars(teacher.compute(needs, batch))
                    fields = {column.field: outputs[column.field] for column in store.columns}
                    store.write(fields, batch.indices, batch.views, seed, epoch)
                    computed += len(batch.labels)
                    bar.update(len(batch.labels))
                    after_batch()
    return computed


# --- the commands -----------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.teacher_store",
        description="The stored answers of a teacher: how much there is, whether it is right, all of it, what is of no"
        " use any more.",
    )
    parser.add_argument("command", choices=["status", "verify", "fill", "gc"])
    parser.add_argument("dir", type=Path, help="a teacher's directory, or that of a student, for what its runs ask for")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="as for train.py")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    parser.add_argument("--fraction", type=float, default=0.01, help="verify: the share of the answers (default 0.01)")
    parser.add_argument("--all", action="store_true", help="gc: remove every store, also those of use")
    args = parser.parse_args()
    if not 0 < args.fraction <= 1:
        parser.error(f"--fraction {args.fraction}: must be above 0 and at most 1")
    return args


@dataclasses.dataclass
class Seat:
    """A teacher before the images of a directory's run."""

    params: Params
    section: Mapping[str, Any]
    needs: frozenset[str]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Seat:
        params = Params.load(args.dir, schema.resolve, args.overrides)
        loss: Loss = LOSSES.create(params.loss)
        if params.teacher is not None and loss.needs_teacher:
            return cls(params, {**params.teacher, "cache": "full"}, loss.needs)
        section, _ = schema.resolve_teacher({"model_dir": str(args.dir), "cache": "full"})
        return cls(params, section or {}, frozenset({"logits"}))

    def take(self, device: torch.device) -> tuple[FrozenTeacher, data.Data]:
        """Returns the teacher, with its stores, and the data."""
        teacher_dir = Path(self.section["model_dir"])
        state, _ = load_teacher_checkpoint(teacher_dir, self.section["restore_file"])
        splits = data.create(self.params.dataset, seed=self.params.seed, device=device)
        teacher = create_teacher(state, self.section, splits.facts())
        precision = choose_precision(self.params.precision, device)
        teacher = faster(place(teacher, device), splits, precision, self.needs, root_of(self.section))
        open_stores(teacher, splits, self.section, self.needs, self.params.num_epochs)
        return teacher, splits


def main() -> int:
    args = parse_args()
    set_logger()
    seat = Seat.of(args)
    root = root_of(seat.section)
    if args.command == "status":
        return status(root, fingerprints(Path(seat.section["model_dir"])))
    if args.command == "gc":
        return gc(root, fingerprints(Path(seat.section["model_dir"])), everything=args.all)
    teacher, splits = seat.take(choose_device(args.device))
    if args.command == "fill":
        log.info("%d answers computed", fill(teacher, splits, seat.needs, seat.params.num_epochs))
        return OK
    return verify(teacher, splits, seat.needs, args.fraction)


def fingerprints(teacher_dir: Path) -> set[str]:
    """Returns the fingerprints of the weights in a teacher's directory; none where no checkpoint says what it is of."""
    found = set()
    for name in ("best", "last"):
        with contextlib.suppress(RunError, InputError):
            state, _ = load_checkpoint(teacher_dir / f"{name}.pth.tar")
            net = nets.restore(state, str(teacher_dir))
            found.add(fingerprint_of(net, state["net"]["section"]))
    return found


def status(root: Path, current: set[str]) -> int:
    """Prints what there is: a line for each table."""
    rows = []
    for folder, found in teacher_store.stores_in(root):
        if found is None:
            rows.append([folder.name, "damaged", "", "", "", "no"])
            continue
        of_use = "yes" if found["teacher"]["weights"] in current else "no: other weights" if current else "?"
        for table in teacher_store.status(folder):
            share, size = f"{table.filled:,} of {table.total:,}", f"{table.bytes_on_disk / 1e9:.3f}"
            name = table.column.name if table.epochs is None else f"{table.column.name}, {table.epochs} epochs"
            rows.append([folder.name, name, found["precision"], share, size, of_use])
    if rows:
        print(tabulate(rows, ["store", "table", "precision", "answers", "GB on disk", "of use"], tablefmt="github"))
    else:
        print(f"{root} has no stored answers; train a student with teacher.cache, or: fill")
    return OK


def gc(root: Path, current: set[str], everything: bool) -> int:
    """Removes the stores of weights that the teacher has no more."""
    if not current and not everything:
        raise RunError(f"no checkpoint beside {root} says which stores are of use; --all removes every one", "teacher")
    freed = 0
    for folder, found in teacher_store.stores_in(root):
        if everything or found is None or found["teacher"]["weights"] not in current:
            freed += sum(table.bytes_on_disk for table in teacher_store.status(folder)) if found else 0
            teacher_store.remove(folder)
            log.info("removed %s", folder)
    for path in root.glob("accuracy_*.json"):
        with contextlib.suppress(RunError):
            if everything or read_json(path).get("teacher") not in current:
                path.unlink()
    log.info("%.3f GB freed", freed / 1e9)
    return OK


def verify(teacher: FrozenTeacher, splits: data.Data, needs: frozenset[str], fraction: float) -> int:
    """Computes a random part of the stored answers again and compares; says what keeping only some classes changes."""
    generator = torch.Generator()
    generator.seed()
    wrong = 0
    for loader in (splits.train, splits.val):
        store = teacher.store_of(loader)
        if store is None or (loader is splits.val and loader.split is splits.train.split):
            continue
        for samples, views, seed, epoch in store.sample_filled(fraction, generator):
            drawn = int(views[0]) < 0
            if drawn and seed != loader.seed:
                log.info("%s: the views of seed %d are verified with --overrides seed=%d", store.folder, seed, seed)
                continue
            plain = loader.num_views is None and not drawn
            differences, losses, damaged = [torch.zeros(0)], {1: [torch.zeros(0)], 4: [torch.zeros(0)]}, 0
            for batch in (loader.plain() if plain else loader).show(samples, views, epoch):
                values, valid = store.read(batch.indices, batch.views, seed, epoch)
                damaged += int((~valid).sum())
                outputs = vars(teacher.compute(needs, batch))
                by_column = [
                    difference(c, values[c.field], store.stored(c.field, outputs[c.field])) for c in store.columns
                ]
                differences.append(torch.stack(by_column).amax(0)[valid])
                for column in store.columns:
                    for temperature, parts in losses.items() if column.top_k else ():
                        parts.append(top_k_error(outputs[column.field], column.top_k, temperature).cpu())
            found = torch.cat(differences)
            bad = int((found > TOLERATED[teacher.precision]).sum())
            wrong += bad
            log.info(
                "%s: %d answers computed again: difference at most %.2g, %d wrong, %d damaged (as if missing)",
                *(store.folder, len(found), found.max().item() if len(found) else 0, bad, damaged),
            )
            for temperature, parts in losses.items():
                if len(lost := torch.cat(parts)):
                    line = "keeping the largest logits only: total variation distance at T %d: mean %.2g, at most %.2g"
                    log.info(line, temperature, lost.mean().item(), lost.max().item())
    if wrong:
        raise RunError(f"{wrong} stored answers are wrong; remove their store: gc --all, or rm -r", "teacher", FAILED)
    return OK


def difference(column: Column, stored: Tensor, again: Tensor) -> Tensor:
    """Returns, `(n,)`, how far answers are apart: relative to their norm, or as probabilities if they are not whole.

    Which class is the last of the k largest may hang on a rounding, and with it a logit that hardly matters.
    """
    again = again.cpu()
    if column.top_k:
        return (stored.softmax(1) - again.softmax(1)).abs().sum(1) / 2
    return (stored - again).norm(dim=1) / again.norm(dim=1).clamp_min(1e-6)

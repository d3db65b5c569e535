"""The stored answers of teachers: `python -m model.teacher_store status|verify|fill|gc <dir>`."""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from checkpoint import load_checkpoint
from model import data, parallel, schema, teacher_store
from model.devices import choose_device, choose_precision, place
from model.errors import InputError
from model.legacy import net_record
from model.losses import create_objective
from model.teacher import FrozenTeacher, create_teacher, fingerprint_of
from model.teacher_store import Column, top_k_error
from process import log, run_main, set_logger
from sources import load_teacher_checkpoints
from teaching import faster, fill, open_stores, root_of
from utils import FAILED, OK, Params, RunError, apply_overrides, read_json, teachers_of

# What an answer may differ if it is computed again, in another batch or on another machine: see `difference`.
TOLERATED = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m model.teacher_store", description=__doc__)
    parser.add_argument("command", choices=["status", "verify", "fill", "gc"])
    parser.add_argument("dir", type=Path, help="a student's directory, for what its runs ask for, or a teacher's")
    parser.add_argument("--teacher", action="store_true", help="take a directory that has a teacher for one itself")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="as for train.py")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    parser.add_argument("--fraction", type=float, default=0.01, help="verify: the share of the answers (default 0.01)")
    parser.add_argument("--all", action="store_true", help="gc: remove every store, also those of use")
    args = parser.parse_args()
    if not 0 < args.fraction <= 1:
        parser.error(f"--fraction {args.fraction}: must be above 0 and at most 1")
    return args


def read_directory(args: argparse.Namespace) -> tuple[Params, list[Mapping[str, Any]], frozenset[str]]:
    """Returns the params of a directory, the sections of its teachers, and what is asked of these.

    A directory without a teacher is one: then its images are those of its own training, and options of the section,
    such as `teacher.cache_dir`, come from the overrides alone.

    Raises:
        RunError: The params are wrong.
        InputError: What is asked cannot be stored.
    """
    about_teacher = [override for override in args.overrides if override.startswith("teacher.")]
    params = Params.load(args.dir, schema.resolve, [o for o in args.overrides if o not in about_teacher])
    loss = create_objective(params.loss, params.num_epochs)
    if params.teacher is None or not loss.needs_teacher or args.teacher:
        raw = {"teacher": {"model_dir": str(args.dir)}}
        needs = frozenset({"logits"})
    elif not loss.can_be_stored:
        names = " and ".join(repr(label) for label, part in loss.parts() if part.needs_teacher)
        raise InputError(f"{args.dir}: loss {names} needs more of the teacher than can be stored")
    else:
        raw, needs = {"teacher": copy.deepcopy(params.teacher)}, loss.teacher_needs
    apply_overrides(raw, about_teacher)
    asked = [{**section, "cache": "full"} for section in teachers_of(raw["teacher"]).values()]
    teacher, problems = schema.resolve_teacher(asked)
    if problems or teacher is None:
        raise InputError("; ".join(f"teacher.{key}: {text}" for key, text in problems))
    return params, [*teachers_of(teacher).values()], needs


def take_seats(
    params: Params, sections: Sequence[Mapping[str, Any]], needs: frozenset[str], device: torch.device
) -> tuple[list[FrozenTeacher], data.Data]:
    """Returns the teachers, with their stores, and the images of a run."""
    states, _ = load_teacher_checkpoints(sections)
    splits = data.create(params.dataset, seed=params.seed, device=device)
    teachers = []
    for state, section in zip(states, sections, strict=True):
        teacher = place(create_teacher(state, section, splits.facts()), device)
        precision = choose_precision(params.precision, device)
        teacher, _, told = faster(teacher, splits, precision, needs, root_of(section))
        for level, line in [told, *open_stores(teacher, splits, section, needs, params.num_epochs)]:
            log.log(level, "%s", line)
        teachers.append(teacher)
    return teachers, splits


def main() -> int:
    args = parse_args()
    set_logger()
    parallel.refuse_several("model.teacher_store")
    params, sections, needs = read_directory(args)
    if args.command in ("status", "gc"):
        # Several may share a folder: what is of use to one of them is of use.
        current: dict[Path, set[str]] = {}
        for section in sections:
            current.setdefault(root_of(section), set()).update(fingerprints(Path(section["model_dir"])))
        for root, found in current.items():
            status(root, found) if args.command == "status" else gc(root, found, everything=args.all)
        return OK
    teachers, splits = take_seats(params, sections, needs, choose_device(args.device))
    if args.command == "fill":
        log.info("%d answers computed", sum(fill(teacher, splits, needs, params.num_epochs) for teacher in teachers))
        return OK
    return verify(teachers, splits, needs, args.fraction)


def fingerprints(teacher_dir: Path) -> set[str]:
    """Returns the fingerprints of the weights in a teacher's directory; none where there is no readable checkpoint."""
    found = set()
    for name in ("best", "last"):
        with contextlib.suppress(RunError, InputError):
            state, _ = load_checkpoint(teacher_dir / f"{name}.pth.tar", foreign=True)
            record = state["net"] or net_record(read_json(teacher_dir / "params.json"), {})
            found.add(fingerprint_of(state["state_dict"], record["section"]))
    return found


def status(root: Path, current: set[str]) -> None:
    """Prints what there is: a line for each table."""
    rows = []
    for folder, found in teacher_store.stores_in(root):
        if found is None:
            rows.append([folder.name, *[""] * 5, "no: damaged"])
            continue
        images = f"{found['num_samples']:,} x {found['num_views'] or 'drawn'}"
        of_use = "yes" if found["teacher"]["weights"] in current else "no: other weights" if current else "?"
        for table in teacher_store.status(folder):
            share, size = f"{table.filled:,} of {table.total:,}", f"{table.bytes_on_disk / 1e9:.3f}"
            name = table.column.name if table.epochs is None else f"{table.column.name}, {table.epochs} epochs"
            rows.append([folder.name, images, name, found["precision"], share, size, of_use])
    if rows:
        print(
            tabulate(
                rows,
                ["store", "images x views", "table", "precision", "answers", "GB on disk", "of use"],
                tablefmt="github",
            )
        )
    else:
        print(f"{root} has no stored answers; train a student with teacher.cache, or: fill")


def gc(root: Path, current: set[str], everything: bool) -> None:
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


def verify(teachers: Sequence[FrozenTeacher], splits: data.Data, needs: frozenset[str], fraction: float) -> int:
    """Computes a random part of the stored answers again and compares; says what keeping only some classes changes."""
    generator = torch.Generator()
    generator.seed()
    wrong = checked = 0
    for teacher, loader in itertools.product(teachers, (splits.train, splits.val)):
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
                    if column.top_k is not None:
                        for temperature, parts in losses.items():
                            parts.append(top_k_error(outputs[column.field], column.top_k, temperature).cpu())
            found = torch.cat(differences)
            bad = int((found > TOLERATED[teacher.precision]).sum())
            wrong += bad
            checked += len(found)
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
    if not checked:
        raise RunError(
            "nothing of what this directory's runs ask for is stored, so nothing was verified", "teacher", FAILED
        )
    return OK


def difference(column: Column, stored: Tensor, again: Tensor) -> Tensor:
    """Returns, `(n,)`, how far answers are apart: relative to their norm, or as probabilities if they are not whole.

    Which class is the last of the k largest may hang on a rounding, and with it a logit that hardly matters.
    """
    again = again.cpu()
    if column.top_k:
        apart = [((stored / t).softmax(1) - (again / t).softmax(1)).abs().sum(1) / 2 for t in (1, 4)]
        return torch.maximum(*apart)
    return (stored - again).norm(dim=1) / again.norm(dim=1).clamp_min(1e-6)


if __name__ == "__main__":
    run_main(main)

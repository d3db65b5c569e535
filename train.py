"""Trains one experiment directory: `python train.py --model_dir experiments/cnn_distill`.

Reads its params.json, builds student, teacher and loss, trains, and leaves checkpoints, metrics and logs beside it.
Plain training is distillation with no teacher and the `ce` loss: there is one loop. Run again, it goes on where it
stopped; on a finished directory it does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from logging import INFO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from experiment import Experiment, Follower, read_status
from model import data, legacy, nets, parallel, schema
from model.data import DATASETS
from model.devices import choose_device, choose_precision, compiled, device_name, place
from model.engine import Learner, Totals, evaluate, probe, probe_teacher, train_epoch
from model.ensemble import Teacher, create_teachers
from model.errors import InputError
from model.losses import create_objective
from model.metrics import count_parameters
from model.optim import create_optimizer, create_schedule
from model.outputs import Probe, outputs_of
from model.rng import derive_seed
from model.taps import taps_of
from process import EpochBar, log, run_main, set_logger
from sources import AND, find_weights, load_initial, load_teacher_checkpoints
from teaching import Remark, complete, fill, make_ready, rehearse
from utils import OK, USAGE, Params, RunError, apply_overrides, read_json, teachers_of

# What goes without saying of how a run is trained; the teacher's answers may be rounded as they are kept.
USUAL = {"processes": 1, "compile": "off", "answers": "as computed"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, nargs="+", required=True, help="directory that holds params.json")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="such as loss.alpha=0.5")
    parser.add_argument("--seed", type=int, help="short for --overrides seed=N")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    parser.add_argument("--restore_file", metavar="NAME", help="begin with the weights of a file, or of a name here")
    parser.add_argument("--train_teacher", action="store_true", help="train the teacher first if it is not trained")
    parser.add_argument("--restart", action="store_true", help="begin anew and remove what an earlier run left")
    parser.add_argument("--check", action="store_true", help="only check params.json (of several directories, too)")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on the console")
    args = parser.parse_args()
    if len(args.model_dir) > 1 and not args.check:
        parser.error("several directories go with --check only; search_hyperparams.py runs many")
    if args.check and args.restore_file:
        parser.error("--check looks at params.json only; leave --restore_file out")
    if args.seed is not None:
        args.overrides.append(f"seed={args.seed}")
    return args


def begin_log(args: argparse.Namespace, path: Path | None = None) -> None:
    """Sends log lines to the console and to a file; of several processes, only the first one's."""
    first = parallel.rank() == 0
    set_logger(path if first else None, args.quiet, mute=not first)


def load_params(model_dir: Path, overrides: Sequence[str]) -> Params:
    """Returns the checked params of a directory, which may be neither its own teacher nor its own beginning."""
    params = Params.load(model_dir, schema.resolve, overrides)
    others = {f"{key}.model_dir": section["model_dir"] for key, section in teachers_of(params.teacher).items()}
    others["student.init_from"] = params.student["init_from"]
    for key, path in others.items():
        if path and Path(path).resolve() == model_dir.resolve():
            raise RunError(f"{model_dir / 'params.json'}: {key}: the directory itself; name another", "params")
    return params


def assumptions(model_dir: Path, overrides: Sequence[str]) -> list[str]:
    """Returns a line with what was assumed of a params.json of the ancestor; nothing for one of ours."""
    path = model_dir / "params.json"
    apply_overrides(raw := read_json(path), overrides)
    assumed = legacy.assumptions(raw)
    return [f"{path} is one of the ancestor's: {'; '.join(assumed)}"] if assumed else []


def check(model_dirs: Sequence[Path], overrides: Sequence[str]) -> int:
    """Reports every problem of every directory's params; touches nothing."""
    wrong = 0
    for model_dir in model_dirs:
        try:
            load_params(model_dir, overrides)
            for line in assumptions(model_dir, overrides):
                print(line)
        except RunError as error:
            wrong += 1
            print(error, file=sys.stderr)
    print(f"{len(model_dirs) - wrong} of {len(model_dirs)} params.json pass the check")
    return USAGE if wrong else OK


def train_teachers(
    args: argparse.Namespace, params: Params, sections: Sequence[Mapping[str, Any]], students: Sequence[Path]
) -> None:
    """Trains those teachers of `params` that are not trained, as soon as nothing that is known now is in the way."""
    student, teacher_dirs = args.model_dir[0], [Path(section["model_dir"]) for section in sections]
    init_from = Path(params.student["init_from"] or ".")
    if not init_from.exists() and not init_from.parent.exists():  # if that does, the file may be a teacher's to be
        load_initial(init_from)
    missing = [teacher_dir for teacher_dir in teacher_dirs if is_untrained(teacher_dir)]
    for teacher_dir in missing:
        if teacher_dir.resolve() in students:
            raise RunError(f"teacher {teacher_dir} is taught by its own student; break the circle", "teacher")
    # Which images, and where they are; how many of them and in what batches is the teacher's own affair.
    _, own_affair = DATASETS.split(params.dataset)
    keys = apply_overrides(read_json(student / "params.json"), args.overrides)
    shared = [
        f"{key}={override.partition('=')[2]}"
        for key, override in zip(keys, args.overrides, strict=True)
        if key.startswith("dataset.") and key.removeprefix("dataset.") not in own_affair
    ]
    theirs = [load_params(teacher_dir, shared) for teacher_dir in missing]
    for teacher_dir, own in zip(missing, theirs, strict=True):
        if own.dataset["name"] != params.dataset["name"]:
            line = f"teacher {teacher_dir} is on dataset {own.dataset['name']!r}, its student {student} on"
            raise RunError(f"{line} {params.dataset['name']!r}; name the same dataset in both", "teacher")
    if missing and missing == teacher_dirs:  # of a trained one, params.json may have changed since
        with naming(student / "params.json"):
            rehearse(params, sections, theirs)
    for teacher_dir in filter(is_untrained, missing):  # one of them may have been another one's teacher
        log.info("first the teacher, %s", teacher_dir)
        changed = {"model_dir": [teacher_dir], "overrides": shared, "restart": False, "restore_file": None}
        train(argparse.Namespace(**{**vars(args), **changed}), students)
        begin_log(args)  # the teacher's train.log ends here


def is_untrained(teacher_dir: Path) -> bool:
    """Tells whether a directory is an experiment that could be trained and is not, neither here nor elsewhere."""
    if not (teacher_dir / "params.json").is_file():
        return False
    status = read_status(teacher_dir)
    return not (status == "completed" or (status == "pending" and (teacher_dir / "best.pth.tar").exists()))


@dataclass
class Run:
    """One attempt at training: the loop over epochs, and where in it the run can be saved."""

    params: Params
    experiment: Experiment
    splits: data.Data
    learner: Learner
    teacher: Teacher | None
    identity: Mapping[str, str | None]  # what besides params decides the result
    machine: Mapping[str, Any]
    head: Mapping[str, Any]  # what every checkpoint of this run says of itself
    remarks: Sequence[Remark]  # what the log begins with
    quiet: bool

    def introduce(self) -> None:
        """Logs what is trained with what."""
        for level, line in self.remarks:
            log.log(level, "%s", line)

    def fill(self) -> None:
        """Computes all that the teacher will be asked for, where params.json wants that done before training."""

        def pause() -> None:
            self.experiment.stop_if_asked("while the teacher's answers were computed", alone=True)

        sections = teachers_of(self.params.teacher).values()
        for member, section in zip(self.teacher.members, sections, strict=True) if self.teacher is not None else ():
            if section["cache"] == "full":
                needs = self.learner.loss.teacher_needs
                fill(member, self.splits, needs, self.params.num_epochs, pause, self.quiet)

    def restore(self, state: Mapping[str, Any] | None) -> tuple[int, Totals]:
        """Returns the epoch to go on with and the sums of what is done of it already."""
        totals = Totals(self.learner.device)
        if state is None:
            return 0, totals
        self.learner.load_state_dict(state)
        totals.load_state_dict(state["totals"])
        log.info("going on after epoch %d, step %d", state["epoch"], totals.steps)
        begun = {**USUAL, **state}
        keys = ("device", "threads", *USUAL)
        other = [f"{key} {begun[key]} -> {self.head[key]}" for key in keys if begun[key] != self.head[key]]
        if other:
            log.warning("the last bits will differ from those of an uninterrupted run: %s", ", ".join(other))
        return state["epoch"], totals

    def snapshot(self, epoch: int, totals: Totals) -> dict[str, Any]:
        """Returns all that a resume needs, at `totals.steps` steps into an epoch (from 0)."""
        totals.of_all().means()  # raises where a sum is not finite: no such state may be kept
        position = {"epoch": epoch, "step": totals.steps, "totals": totals.state_dict()}
        return {**self.head, **self.learner.state_dict(), **position}

    def validate(self, after_batch: Callable[..., None] = lambda *_: None) -> dict[str, float]:
        """Returns the student's scores on the validation split, the loss and its terms among them."""
        parallel.align(self.learner.student, self.learner.loss)
        return evaluate(
            self.learner.student,
            self.splits.val,
            precision=self.learner.precision,
            loss=self.learner.loss,
            teacher=self.teacher if self.learner.loss.asks_teacher else None,
            after_batch=after_batch,
        )

    def keep(self) -> None:
        """Scores and saves the student as it begins, as for a teacher whose weights come from elsewhere."""
        val_metrics = self.validate()
        record = {"epoch": 0, "learning_rate": 0.0, "train": {}, "val": val_metrics}
        self.experiment.record(self.snapshot(0, Totals(self.learner.device)), record, {})
        log.info("no epochs to train: kept as it begins, val accuracy %.4f", val_metrics["accuracy"])

    def epoch(self, epoch: int, totals: Totals) -> None:
        """Trains, validates and commits an epoch (from 0), or what is left of it."""
        name = f"epoch {epoch + 1}/{self.params.num_epochs}"
        started, done = time.monotonic(), totals.samples
        processes, calls = parallel.size(), itertools.count(1)
        bar = EpochBar(name, self.splits.train.num_samples, done, self.quiet)

        def pause(*_: object) -> None:
            if next(calls) % parallel.stride() == 0:
                where = f"in {name} after step {totals.steps}"
                self.experiment.pause(lambda: self.snapshot(epoch, totals), self.params.checkpoint_minutes, where)

        def after_step() -> None:
            if parallel.rank() == 0:
                bar.show(done + processes * (totals.samples - done), totals.means)
            pause()

        train_metrics = train_epoch(
            self.learner,
            self.splits.lessons,
            epoch=epoch,
            seed=self.params.seed,
            teacher=self.teacher,
            totals=totals,
            gradient_norms=self.params.log_gradient_norms,
            after_step=after_step,
        )
        progress = {}
        if totals.samples > done:  # not when only validation was left
            progress["images_per_second"] = processes * (totals.samples - done) / (time.monotonic() - started)
        bar.close()
        val_metrics = self.validate(pause)
        seconds = time.monotonic() - started
        rate = self.learner.optimizer.param_groups[0]["lr"]
        record = {"epoch": epoch + 1, "learning_rate": rate, "train": train_metrics, "val": val_metrics}
        counts = epoch >= self.learner.loss.initial_epochs  # in a loss's own stage nothing is learnt of the classes
        if counts:
            self.learner.schedule.observe(record)
        state = self.snapshot(epoch + 1, Totals(self.learner.device))
        is_best = self.experiment.record(state, record, {**progress, "epoch_seconds": seconds}, candidate=counts)
        left = tqdm.format_interval((self.params.num_epochs - epoch - 1) * seconds)
        log.info(
            "Epoch %d/%d: train loss %.4f accuracy %.4f; val loss %.4f accuracy %.4f%s; %.0f images/s, %s left",
            *(epoch + 1, self.params.num_epochs, train_metrics["loss"], train_metrics["accuracy"]),
            *(val_metrics["loss"], val_metrics["accuracy"], " (best)" if is_best else ""),
            *(progress.get("images_per_second", 0), left),
        )
        self.experiment.stop_if_asked(f"after {name}")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file in front of what is found wrong with the options that it holds."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}", error.reason) from error


def _frozen(student: nn.Module, frozen_norms: Sequence[nn.Module]) -> str:
    """Returns what of a student does not learn, for the log."""
    learning = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    text = "" if learning == count_parameters(student) else f", of which {learning:,} learn"
    return f"{text}, statistics of {len(frozen_norms)} batch norms fixed" if frozen_norms else text


def kept_answers(teacher: Teacher | None, sections: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Returns in what type the answers of teachers are kept, and what part of them, if that is not all."""
    types, parts, usual = list[str](), list[str](), str(USUAL["answers"])
    for member, section in zip(teacher.members, sections, strict=True) if teacher is not None else ():
        types.append(section["cache_dtype"] if member.stores else usual)
        parts.append(f"top {section['top_k']}" if member.stores and section["top_k"] else "all")
    return AND.join(types) if {*types} - {usual} else usual, AND.join(parts) if {*parts} - {"all"} else None


def prepare(args: argparse.Namespace, params: Params, students: Sequence[Path]) -> Run:
    """Builds everything that a run of `params` needs; whatever is missing or does not fit ends it here."""
    model_dir, device = args.model_dir[0], choose_device(args.device)
    precision = choose_precision(params.precision, device)
    torch.manual_seed(derive_seed(params.seed, "loss"))
    loss = create_objective(params.loss, params.num_epochs)
    sections = list(teachers_of(params.teacher).values()) if loss.needs_teacher else []
    if args.train_teacher:
        train_teachers(args, params, sections, [*students, model_dir.resolve()])
    states, teacher_sha = load_teacher_checkpoints(sections) if sections else ([], None)  # before any work
    init_from = params.student["init_from"]
    init_state, init_sha = load_initial(Path(init_from)) if init_from else (None, None)

    with naming(model_dir / "params.json"):
        with parallel.first_goes_first():
            splits = data.create(params.dataset, seed=params.seed, device=device, unlabelled=params.unlabelled)
        splits.share(parallel.rank(), parallel.size())
        torch.manual_seed(derive_seed(params.seed, "init"))
        bare = nets.create(params.student, splits.num_classes)
        shown = probe(bare, params.student["name"], splits.shape)
        adopted = init_state is not None and nets.adopt(bare, init_state["state_dict"], init_from)
        section = {**params.student, "stages": [*taps_of(bare)] or None}  # those that were chosen, too
        net_record = {"section": section, **splits.facts()}
        teacher: Teacher | None = None
        if states:
            teacher = create_teachers(states, sections, net_record, params.combine_teachers, loss)
        taught = probe_teacher(teacher, splits.shape) if teacher is not None else None
        complete(loss, shown, taught, splits, params.student, params.seed)
        student, net_record["equipment"] = loss.equip(bare)
        student = parallel.synchronised(student, device)
        frozen_norms = nets.freeze(bare, params.student, student)
    student, loss = place(student, device), place(parallel.synchronised(loss, device), device)
    optimizer = create_optimizer(params.optimizer, [*student.parameters(), *loss.parameters()])
    schedule = create_schedule(params.schedule, optimizer, params.num_epochs, len(splits.train))
    run = compiled(partial(outputs_of, student)) if params.compile == "on" else None
    learner = Learner(student, loss, optimizer, schedule, precision, frozen_norms, run)
    about_teacher: list[Remark] = []
    if teacher is not None:
        teacher = place(teacher, device)
        teacher, about_teacher = make_ready(teacher, sections, splits, loss, precision, params.num_epochs)
    kept, kept_part = kept_answers(teacher, sections)

    machine = {
        "device": device_name(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "processes": parallel.size(),
        "compile": "on" if params.compile == "on" else "off",
        "answers": kept,
    }
    lines = [
        *assumptions(model_dir, args.overrides),
        f"{model_dir}: {', '.join(f'{key} {value}' for key, value in machine.items() if USUAL.get(key) != value)}",
        splits.summary,
        *introduction(params, learner, shown, taught),
    ]
    if init_from:
        but = "" if adopted else " but for the classifier, which is new: it has another number of classes"
        lines.append(f"begins with the weights of {init_from}{but}")
    return Run(
        params=params,
        experiment=(Follower if parallel.rank() else Experiment)(model_dir, parallel.maximum),
        splits=splits,
        learner=learner,
        teacher=teacher,
        identity={
            "data": splits.fingerprint,
            "teacher": teacher_sha,
            "init": init_sha,
            "precision": precision,
            "answers": kept_part,
        },
        machine=machine,
        head={"net": net_record, "params": params.dict, **machine},
        remarks=[*((INFO, line) for line in lines), *about_teacher],
        quiet=args.quiet or parallel.rank() > 0,
    )


def introduction(params: Params, learner: Learner, student: Probe, teacher: Probe | None) -> Iterator[str]:
    """Yields what the log says of a student and its objective."""
    size = f"{count_parameters(learner.student):,} parameters"
    yield f"student {params.student['name']}: {size}{_frozen(learner.student, learner.frozen_norms)}"
    yield f"loss: {learner.loss.describe()}"
    for role, shown in (("student", student), ("teacher", teacher)):
        if shown is not None and "features" in learner.loss.needs and (stages := shown.taps()):
            yield f"stages of the {role}: {stages}"
    yield from parallel.remarks(learner.device, [learner.student, learner.loss], learner.frozen_norms)


def train(args: argparse.Namespace, students: Sequence[Path] = ()) -> int:
    """Trains `args.model_dir`, whose own students, if it is trained as a teacher, are `students`."""
    model_dir = args.model_dir[0]
    params = load_params(model_dir, args.overrides)
    if args.restore_file and (weights := find_weights(model_dir, args.restore_file, args.restart)):
        log.info("beginning with the weights of %s; optimizer and epochs begin anew", weights)
        args.overrides.append(f"student.init_from={weights}")
        params = load_params(model_dir, args.overrides)
    if not args.restart and Experiment(model_dir).is_finished(params):
        log.info("%s is finished: %d epochs. Nothing to do; --restart begins anew.", model_dir, params.num_epochs)
        return OK
    run = prepare(args, params, students)
    details = {"set_aside": bool(args.restore_file), **run.machine, "overrides": args.overrides}
    attempt = run.experiment.attempt(params, run.identity, restart=args.restart, **details)
    with parallel.fenced(), attempt as state:
        begin_log(args, model_dir / "train.log")
        run.introduce()
        run.fill()
        first, totals = run.restore(state := parallel.from_first(state))
        if params.num_epochs == 0 and state is None:
            run.keep()
        for epoch in range(first, params.num_epochs):
            run.epoch(epoch, totals)
            totals = Totals(run.learner.device)
        if run.teacher is not None and any(member.stores for member in run.teacher.members):
            log.info("the teacher was asked for %d answers; the others had been kept", run.teacher.num_computed)
    return OK


def main() -> int:
    args = parse_args()
    if args.check:
        return OK if parallel.rank() else check(args.model_dir, args.overrides)
    begin_log(args)
    with parallel.together(args.device) as args.device:
        return train(args)


if __name__ == "__main__":
    run_main(main)

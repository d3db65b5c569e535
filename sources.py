"""What a run begins with: its teacher, and the weights of other directories and files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from checkpoint import has_trailer, load_checkpoint
from experiment import KEPT, Experiment, read_status
from utils import RunError, read_json, teachers_of

INITIAL = "student.init_from:"  # the role of initial weights in messages
AND = "+"  # between the SHA-256 of several teachers


def find_teacher(teacher_dir: Path, restore_file: str, role: str = "teacher") -> Path:
    """Returns the checkpoint of a teacher, an experiment directory whose training has ended.

    Args:
        teacher_dir: The directory.
        restore_file: `best` or `last`.
        role: What to call it in messages.

    Raises:
        RunError: Reason `teacher`: it is missing or not trained to its end; with the command to run.
    """
    command = f"python train.py --model_dir {shlex.quote(str(teacher_dir))}"
    if not (teacher_dir / "params.json").is_file():
        line = f"{role} {teacher_dir} does not exist or has no params.json; name an experiment directory"
        raise RunError(line, "teacher")
    status = read_status(teacher_dir)
    if status not in ("completed", "pending"):  # pending with a checkpoint: a teacher from elsewhere
        line = f"{role} {teacher_dir} is {status}, not completed; wait for it, or train it to its end with: {command}"
        raise RunError(line, "teacher")
    path = teacher_dir / f"{restore_file}.pth.tar"
    if not path.exists():
        way = (
            f"{command} --restart"
            if status == "completed"
            else f"{command}{' (or let train.py do it first: --train_teacher)' if role == 'teacher' else ''}"
        )
        raise RunError(f"{role} {teacher_dir} has no {path.name}; train it with: {way}", "teacher")
    return path


def load_teacher_checkpoint(teacher_dir: Path, restore_file: str, role: str = "teacher") -> tuple[dict[str, Any], str]:
    """Reads the checkpoint that `find_teacher` finds, which may be one of the ancestor's.

    Returns:
        The state and its SHA-256; a foreign one, whose `net` is None, with the directory's raw `params`.

    Raises:
        RunError: As `find_teacher`; or it is damaged, or was saved in the middle of an epoch.
    """
    path = find_teacher(teacher_dir, restore_file, role)
    command = f"python train.py --model_dir {shlex.quote(str(teacher_dir))} --restart"
    try:
        state, sha = load_checkpoint(path, foreign=True)
    except RunError as error:
        raise RunError(f"{role} {error}; train it again with: {command}", "teacher") from None
    if state["step"]:
        raise RunError(f"{role} {path} was saved in the middle of an epoch; name its best, or train it on", "teacher")
    if state["net"] is None:
        state["params"] = read_json(teacher_dir / "params.json")
    return state, sha


def load_teacher_checkpoints(sections: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Reads the checkpoints of the teachers that resolved `teacher` sections name: see `load_teacher_checkpoint`.

    Returns:
        Their states, and their SHA-256, joined.
    """
    found = [load_teacher_checkpoint(Path(section["model_dir"]), section["restore_file"]) for section in sections]
    return [state for state, _ in found], AND.join(sha for _, sha in found)


def load_initial(path: Path) -> tuple[dict[str, Any], str]:
    """Reads the weights that a student begins with: a checkpoint file, or the best one of an experiment directory.

    Raises:
        RunError: It is missing, damaged, or of an experiment that is not trained to its end.
    """
    if path.is_dir():
        return load_teacher_checkpoint(path, "best", INITIAL)
    path = find_initial(path)
    try:
        return load_checkpoint(path, foreign=True)
    except RunError as error:
        raise RunError(f"{INITIAL} {error}; name a directory or a .pth.tar file", "params") from None


def find_initial(path: Path) -> Path:
    """Returns the file that `load_initial` reads.

    Raises:
        RunError: As for `load_initial`, but that nothing is read.
    """
    if not path.exists() and path.name.startswith(KEPT):
        path = path.with_name(path.name.removeprefix(KEPT))  # it is renamed when training begins
    if path.is_file() or path.suffix == ".tar":
        return path
    return find_teacher(path, "best", INITIAL)


def find_weights(model_dir: Path, restore_file: str, restart: bool) -> Path | None:
    """Returns the file or directory whose weights training is to begin with; None where a resume does just that.

    Args:
        model_dir: The directory that is trained.
        restore_file: `last` or another name of a checkpoint in it, or the path of a checkpoint or an experiment.
        restart: Whether what a run has left in the directory will be removed.

    Raises:
        RunError: They are those of the directory's own run, which goes on from its last epoch only.
    """
    path = Path(restore_file)
    if not path.exists() and path.suffix != ".tar":
        path = model_dir / f"{restore_file}.pth.tar"
    written = path.name in ("last.pth.tar", "best.pth.tar", "prev.pth.tar")
    if path.is_dir() or not written or path.parent.resolve() != model_dir.resolve():
        return path
    kept = path.with_name(f"{KEPT}{path.name}")
    if kept.exists() or path in Experiment(model_dir).strangers():
        return kept
    if not path.exists():
        return path
    if restart:
        what = "--restart removes it"
    elif Experiment(model_dir).is_being_removed():
        what = "it is being removed"
    elif path.name == "last.pth.tar":
        return None
    else:
        what = "a run goes on from its last epoch"
    line = f"--restore_file {restore_file}: {path} is of the run in that directory, and {what}"
    raise RunError(f"{line}; copy it to another place and name that, or train in another directory")


def changed_sources(run: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    """Tells which weights a run was taught by, or began with, that are not those that params now lead to.

    It needs no torch and reads little, so that a search can ask it of each of its children.

    Args:
        run: Its run.json.
        params: What is asked for, in sections.

    Returns:
        Such as `teacher.model_dir: other weights than it was trained with`; nothing where they are the same, or where
        they cannot be read, which is not told here.
    """
    teachers, student = teachers_of(params.get("teacher")), params.get("student")
    init_from = student.get("init_from") if isinstance(student, Mapping) else None
    changed = []
    if run.get("teacher") and teachers:  # else the loss had no use for one
        before = str(run["teacher"]).split(AND)
        for (key, section), sha in zip(teachers.items(), before, strict=False):
            if section.get("model_dir"):
                where = Path(section["model_dir"]), section.get("restore_file", "best")
                found = _sha(functools.partial(find_teacher, *where))
                changed += [f"{key}.model_dir"] if found not in (None, sha) else []
        changed += ["teacher"] if len(before) != len(teachers) else []
    found = _sha(lambda: find_initial(Path(init_from))) if init_from else ""
    changed += ["student.init_from"] if found not in (None, run.get("init") or "") else []
    return f"{' and '.join(changed)}: other weights than it was trained with" if changed else ""


def _sha(find: Callable[[], Path]) -> str | None:
    """Returns the SHA-256 of a checkpoint, as `load_checkpoint` does; None if there is none."""
    with contextlib.suppress(OSError, RunError):
        path = find()
        if path.is_file():
            stat = path.stat()
            return _sha_of(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return None


@functools.cache
def _sha_of(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        if not has_trailer(path):
            return hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(-32, os.SEEK_END)  # the trailer ends with it; whether the file is whole, who loads it finds out
        return file.read().hex()

"""Files of an experiment directory, and the errors that end a script with one line.

A thing belongs here only if it reads or writes such a file and needs to know no network, loss or dataset. Nothing here
imports torch, so that `search_hyperparams.py` and `synthesize_results.py` start at once.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

OK, FAILED, USAGE, TEMPORARY = 0, 1, 2, 75  # exit statuses; 128 + n: stopped by signal n after saving
MAX_JSON_BYTES = 1_000_000


class RunError(Exception):
    """Ends a script with one line instead of a traceback.

    Args:
        message: What was given, what is allowed, where it came from, what to do next. One line per problem.
        reason: What was at fault, as run.json records it: `usage`, `params`, `data`, `teacher`,
            `checkpoint`, `diverged`, `storage`, `locked`, `signal`, `preempted`; of a search also `cluster`.
        exit_status: 2 for what the user gave, 1 for what went wrong later, 75 for what another try may mend.
    """

    def __init__(self, message: str, reason: str = "usage", exit_status: int = USAGE) -> None:
        super().__init__(message)
        self.reason = reason
        self.exit_status = exit_status


# --- JSON and whole files ---------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object as strictly as JSON is defined.

    Raises:
        RunError: The file is missing, larger than 1 MB, not UTF-8, not JSON, not an object, has a key twice, or
            holds NaN or an infinity.
    """

    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise ValueError(f"{what}; an experiment directory needs it")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"is larger than {MAX_JSON_BYTES} bytes; that is not a file of parameters")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_number, parse_float=_number)
        if not isinstance(value, dict):
            raise ValueError(f"expected an object {{...}}, got {type(value).__name__}")
        if "\\u" in text:  # json turns "\ud800" into a lone surrogate, which no file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise RunError(f"{path}: not JSON: {error.msg} at {where}; correct it there", "params") from None
    except UnicodeError:
        raise RunError(f"{path}: not UTF-8 text; save it as UTF-8 without a byte order mark", "params") from None
    except RecursionError:
        raise RunError(f"{path}: nested too deeply", "params") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {error}", "params") from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there twice; keep one")
    return found


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replaces a JSON file atomically: a reader finds the old or the new one, never half of one."""
    write_file(path, (json.dumps(value, indent=4, allow_nan=False) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file atomically and durably: temporary file beside it, fsync, rename, fsync of the folder.

    Raises:
        RunError: Reason `storage`; the old file is intact and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise storage_error(error, path, len(content)) from error


def link_file(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, atomically; copies where the file system has no hard links."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            os.link(source, temporary)
            temporary.replace(target)
            temporary.unlink(missing_ok=True)  # rename of two links to one file does nothing, by POSIX
            sync_folder(target.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.ENOSYS):
                raise
            write_file(target, source.read_bytes())
    except OSError as error:
        raise storage_error(error, target) from error


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def storage_error(error: OSError, path: Path, need: int = 0) -> RunError:
    """Returns the one line for a file that cannot be written."""
    line = f"cannot write {path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            have = shutil.disk_usage(path.parent).free
            line += f" (need {need / 1e6:.1f} MB, have {have / 1e6:.1f} MB)"
        line += "; free some space, then run the same command again: it goes on from the last checkpoint"
    else:
        line += "; check the folder's owner and permissions"
    return RunError(line, "storage", FAILED)


# --- params.json ------------------------------------------------------------------------------------------

Resolve = Callable[[dict[str, Any]], tuple[dict[str, Any], list[tuple[str, str]]]]


class Params:
    """What params.json and the overrides say, checked and complete; `params.num_epochs` reads a key.

    Args:
        values: Every key with its value, sections as dicts.
        resolve: What completed them.
    """

    def __init__(self, values: dict[str, Any], resolve: Resolve | None = None) -> None:
        self.dict = values
        self._resolve = resolve

    def complete(self, values: dict[str, Any]) -> dict[str, Any]:
        """Returns older params of the same kind with the options that have come since, at their defaults."""
        completed, problems = self._resolve(values) if self._resolve else ({}, [])
        return values if problems else completed or values

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["dict"][key]
        except KeyError:
            raise AttributeError(f"params.json has no key {key!r}") from None

    @classmethod
    def load(cls, model_dir: Path, resolve: Resolve, overrides: Iterable[str] = ()) -> Params:
        """Reads `model_dir/params.json`, applies overrides and checks the whole: see `check`."""
        path = model_dir / "params.json"
        return cls.check(read_json(path), path, resolve, overrides)

    @classmethod
    def check(cls, raw: dict[str, Any], path: Path, resolve: Resolve, overrides: Iterable[str] = ()) -> Params:
        """Applies overrides to raw values and checks the whole.

        Args:
            raw: The values; overrides are set in place.
            path: Where they come from, for messages.
            resolve: Checks the raw values and fills in defaults, as `model.schema.resolve` does.
            overrides: Texts `key=value`.

        Raises:
            RunError: With a line for each problem: file, key, what is wrong, what to do.
        """
        origin = dict.fromkeys(apply_overrides(raw, overrides), "--overrides")
        values, problems = resolve(raw)
        if problems:
            lines = [f"{origin.get(key, path)}: {key}: {text}" for key, text in problems]
            raise RunError("\n".join(lines), "params")
        return cls(values, resolve)


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Sets options of raw params in place and returns their dotted keys.

    `loss.alpha=0.5` names an option by its path. A bare key is a top-level one, or the option of the one
    section that has it. A value is read as JSON; what is not JSON is text.

    Raises:
        RunError: No "=", a bare key that several sections have, or a path through something that is no section.
    """
    keys = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RunError(f"--overrides: {override!r} is not key=value, such as loss.alpha=0.5")
        if key.startswith("teacher."):
            spell_out_teachers(raw)
        key = full_key(raw, key)
        try:
            value = json.loads(text, object_pairs_hook=_once, parse_constant=_number, parse_float=_number)
        except json.JSONDecodeError:
            value = text
        except (ValueError, RecursionError) as error:
            raise RunError(f"--overrides: {key}: {error}", "params") from None
        set_option(raw, key, value)
        keys.append(key)
    return keys


def teachers_of(teacher: Any) -> dict[str, Any]:
    """Returns the sections of the teachers that a params.json names, by their paths: `teacher`, or `teacher.0` and on.

    Args:
        teacher: A directory as text, a section, a list of these, or None. A list of one is what is in it.
    """
    if isinstance(teacher, list) and len(teacher) == 1:
        [teacher] = teacher
    if isinstance(teacher, list):
        return {f"teacher.{place}": _teacher_section(each) for place, each in enumerate(teacher)}
    return {} if teacher is None else {"teacher": _teacher_section(teacher)}


def spell_out_teachers(raw: dict[str, Any]) -> None:
    """Makes sections, in place, of teachers that are given by their directories alone."""
    teacher = raw.get("teacher")
    if isinstance(teacher, list):
        raw["teacher"] = [_teacher_section(each) for each in teacher]
    elif isinstance(teacher, str):
        raw["teacher"] = _teacher_section(teacher)


def _teacher_section(teacher: Any) -> Any:
    return {"model_dir": teacher} if isinstance(teacher, str) else teacher


def full_key(raw: Mapping[str, Any], key: str) -> str:
    """Returns the dotted path of an option that may be named by its bare key, or in a list by its place."""
    first, *others = key.split(".")
    if others and is_list_of_sections(raw.get(first)):  # a place is called by its label, so that each has one path
        place = place_of(raw[first], others[0])
        return key if place is None else ".".join([first, labels_of(raw[first])[place], *others[1:]])
    if others or key in raw:
        return key
    holders = [prefix for prefix, section in _sections(raw) if key in section]
    if len(holders) > 1:
        choices = " or ".join(f"{prefix}.{key}" for prefix in holders)
        raise RunError(f"{key!r} is an option of several sections; write {choices}")
    return f"{holders[0]}.{key}" if holders else key


def _sections(raw: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each section with its path; those of a list one by one."""
    for name, value in raw.items():
        if isinstance(value, dict):
            yield name, value
        elif is_list_of_sections(value):
            yield from ((f"{name}.{label}", section) for label, section in zip(labels_of(value), value, strict=True))


def is_list_of_sections(value: Any) -> bool:
    """Tells whether a value is a list of objects, such as the losses of a run or its teachers."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(element, dict) for element in value)


def labels_of(sections: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what paths call the sections of a list: by name, numbered where that is taken (`kd_2`); else by place."""
    labels: list[str] = []
    for place, section in enumerate(sections):
        name = label = str(section.get("name", place))
        for number in itertools.count(2):
            if label not in labels:
                break
            label = f"{name}_{number}"
        labels.append(label)
    return labels


def place_of(sections: Sequence[Mapping[str, Any]], part: str) -> int | None:
    """Returns the place in a list of the section that a path names by its label, or by its place from 0."""
    labels = labels_of(sections)
    if part in labels:
        return labels.index(part)
    return int(part) if part.isdecimal() and int(part) < len(sections) else None


def set_option(raw: dict[str, Any], key: str, value: Any) -> None:
    """Sets `raw["a"]["b"] = value` for the key `a.b`, making the section if it is missing.

    A section of a list is named by its label, `loss.crd.weight`, or by its place from 0, `loss.1.weight`.
    """
    *path, last = key.split(".")
    section: Any = raw
    for part in path:
        if is_list_of_sections(section):
            place = place_of(section, part)
            if place is None:
                raise RunError(f"{key}: the list has no {part!r}; it has {', '.join(labels_of(section))}")
            section = section[place]
            continue
        section = section.setdefault(part, {})
        if not isinstance(section, dict) and not is_list_of_sections(section):
            raise RunError(f"{key}: {part!r} is {section!r}, not a section; override {part}=... as a whole")
    if not isinstance(section, dict):
        labels = labels_of(section)
        raise RunError(f"{key}: a list; name one of {', '.join(labels)}, as in {'.'.join([*path, labels[0], last])}")
    section[last] = value


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested sections as one level of dotted keys; those of a top-level list as `set_option` names them."""
    flat: dict[str, Any] = {}

    def add(section: Mapping[str, Any], prefix: str) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                add(value, f"{prefix}{key}.")
            elif not prefix and is_list_of_sections(value):
                add(dict(zip(labels_of(value), value, strict=True)), f"{key}.")
            else:
                flat[prefix + key] = value

    add(values, "")
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Returns the options in which two sets of params differ, as dotted key -> `old -> new`."""
    before, after = flatten(old), flatten(new)
    absent = "absent"
    for key in old.keys() & new.keys():  # what a checkpoint holds of a list stands in its order
        if is_list_of_sections(old[key]) and is_list_of_sections(new[key]):
            before[key], after[key] = labels_of(old[key]), labels_of(new[key])
    return {
        key: f"{before.get(key, absent)!r} -> {after.get(key, absent)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
    }

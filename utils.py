"""Files of an experiment directory, and the errors that end a script with one line.

A thing belongs here only if it reads or writes such a file and needs to know no network, loss or dataset. Nothing here
imports torch, so that `search_hyperparams.py` and `synthesize_results.py` start at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
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
        if key.startswith("teacher.") and isinstance(raw.get("teacher"), str):
            raw["teacher"] = {"model_dir": raw["teacher"]}
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


def full_key(raw: Mapping[str, Any], key: str) -> str:
    """Returns the dotted path of an option that may be named by its bare key."""
    if "." in key or key in raw:
        return key
    sections = [name for name, section in raw.items() if isinstance(section, dict) and key in section]
    if len(sections) > 1:
        choices = " or ".join(f"{name}.{key}" for name in sections)
        raise RunError(f"{key!r} is an option of several sections; write {choices}")
    return f"{sections[0]}.{key}" if sections else key


def set_option(raw: dict[str, Any], key: str, value: Any) -> None:
    """Sets `raw["a"]["b"] = value` for the key `a.b`, making the section if it is missing."""
    *path, last = key.split(".")
    section = raw
    for part in path:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise RunError(f"{key}: {part!r} is {section!r}, not a section; override {part}=... as a whole")
    section[last] = value


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested sections as one level of dotted keys."""
    flat: dict[str, Any] = {}

    def add(section: Mapping[str, Any], prefix: str) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                add(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    add(values, "")
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Returns the options in which two sets of params differ, as dotted key -> `old -> new`."""
    before, after = flatten(old), flatten(new)
    absent = "absent"
    return {
        key: f"{before.get(key, absent)!r} -> {after.get(key, absent)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
    }

"""The process and its files: params.json, JSON on disk, logging, signals, provenance, exit statuses.

A thing belongs here only if it reads or writes a file of an experiment directory, or sets process-wide
state once before training, and needs to know no network, loss or dataset. Nothing here imports torch, so
that `search_hyperparams.py` and `synthesize_results.py` start at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import logging
import math
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

OK, FAILED, USAGE, TEMPORARY = 0, 1, 2, 75  # exit statuses; 128 + n: stopped by signal n after saving
MAX_JSON_BYTES = 1_000_000
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")

log = logging.getLogger("kdlab")


class RunError(Exception):
    """Ends a script with one line instead of a traceback.

    Args:
        message: What was given, what is allowed, where it came from, what to do next. One line per problem.
        reason: What was at fault, as run.json records it: `usage`, `params`, `data`, `teacher`,
            `checkpoint`, `diverged`, `storage`, `locked`, `signal`, `preempted`.
        exit_status: 2 for what the user gave, 1 for what went wrong later, 75 for what another try may mend.
    """

    def __init__(self, message: str, reason: str = "usage", exit_status: int = USAGE) -> None:
        super().__init__(message)
        self.reason = reason
        self.exit_status = exit_status


def run_main(main: Callable[[], int]) -> None:
    """Runs a script's `main` and exits with its status; errors that carry an `exit_status` are one line."""
    status: int | None
    try:
        status = main()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # `... | head`: the reader has gone, and has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = OK
    except Exception as error:
        status = getattr(error, "exit_status", None)
        if not any(isinstance(handler, ConsoleHandler) for handler in log.handlers):  # set_logger has not run yet
            if status is None:
                raise
            print(error, file=sys.stderr)
        elif status is None:
            status = FAILED
            log.exception("a fault in the program, or in the machine:")
        else:
            log.error("%s", error)
    sys.exit(status)


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
        text.encode()  # json turns "\ud800" into a lone surrogate, which no file can hold
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
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there twice; keep one")
    return dict(pairs)


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
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.dict = values

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
        return cls(values)


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


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested sections as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
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


# --- logging ----------------------------------------------------------------------------------------------


class ConsoleHandler(logging.Handler):
    """Writes lines above a progress bar; a closed standard output ends the lines, not the training."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            tqdm.write(self.format(record), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout)
            sys.stdout.flush()


def set_logger(path: Path | None = None, quiet: bool = False) -> None:
    """Sends log lines, warnings included, to the console and appends them to a file.

    Args:
        path: The log file; None for the console alone.
        quiet: Only warnings and errors go to the console.
    """
    logging.captureWarnings(True)
    console = ConsoleHandler(logging.WARNING if quiet else logging.INFO)
    handlers: list[logging.Handler] = [console]
    if path is not None:
        try:
            file = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            raise storage_error(error, path) from error
        file.setFormatter(logging.Formatter("%(asctime)s:%(levelname)s: %(message)s"))
        handlers.append(file)
    for logger in (log, logging.getLogger("py.warnings")):
        for old in logger.handlers[:]:  # a second run in one process must not log into the first one's file
            logger.removeHandler(old)
            old.close()
        logger.handlers[:] = handlers
        logger.setLevel(logging.INFO)
        logger.propagate = False


class EpochBar:
    """One line on the terminal for the epoch that runs, with images/s and time left; silent without a terminal.

    Args:
        label: Such as `epoch 3/30`.
        total: Images in the epoch.
        done: Images that an earlier attempt has done.
        quiet: Show nothing.
    """

    def __init__(self, label: str, total: int, done: int, quiet: bool) -> None:
        self._bar = tqdm(desc=label, total=total, initial=done, unit="img", disable=quiet or None, leave=False)
        self._shown = time.monotonic()

    def show(self, done: int, means: Callable[[], Mapping[str, float]]) -> None:
        """Advances to `done` images; calls `means`, which waits for the device, at most once a second."""
        self._bar.update(done - self._bar.n)
        if not self._bar.disable and time.monotonic() - self._shown > 1:
            self._bar.set_postfix({name: f"{value:.3f}" for name, value in means().items()})
            self._shown = time.monotonic()

    def close(self) -> None:
        self._bar.close()


# --- signals ----------------------------------------------------------------------------------------------


class StopSignals:
    """Remembers a signal to stop, so that the loop can save at its next step; a second one kills at once.

    SIGINT and SIGTERM end with status 130 and 143; SIGHUP and SIGUSR1 (Slurm before its time limit) with 75.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignals:
        # Who ignores a signal, as nohup does SIGHUP for its command, shall go on ignoring it.
        heeded = [s for s in self.SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._previous = {s: signal.signal(s, self._remember) for s in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)

    def error(self, done: str) -> RunError:
        """Returns what ends the script after saving; `done` says how far it got."""
        assert self.received is not None
        ended = self.received in (signal.SIGINT, signal.SIGTERM)
        status = 128 + self.received if ended else TEMPORARY
        line = f"stopped by {self.received.name} {done}; the same command goes on from there"
        return RunError(line, "signal" if ended else "preempted", status)


# --- provenance -------------------------------------------------------------------------------------------

PACKAGES = ("torch", "torchvision", "numpy", "pydantic", "tensorboardX")


def provenance() -> dict[str, Any]:
    """Returns what is known of this process: command, code, versions, machine. Works outside git too."""
    return {
        "argv": sys.argv,
        "git": git_state(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "host": platform.node(),
        "system": platform.platform(),
        "processor": processor(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_state() -> dict[str, Any] | None:
    """Returns the commit of the code and whether files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """Returns the processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def follow(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a journal; a last line that is not finished yet is left out."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)

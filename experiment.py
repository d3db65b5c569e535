"""The experiment directory: its states, its lock, its checkpoints and its journal.

    params.json                  the only input, written by a person or a search
    run.json                     status, attempts, provenance
    train.log                    appended, one header line per attempt
    metrics.jsonl                one line per epoch, cut back to the checkpoint on resume
    last.pth.tar                 the newest state: the single commit point, everything below follows from it
    prev.pth.tar                 the state before it, for when last.pth.tar is damaged
    best.pth.tar                 the state with the best validation accuracy
    kept_*.pth.tar               checkpoints that were put here and that training would have written over
    metrics_val_{best,last}_weights.json

Write order: journal, last.pth.tar, best.pth.tar, derived JSON. After a crash at any point the same command
goes on from last.pth.tar, cuts the journal to the length that it records and restores what follows from it. A removal
of all this is announced in run.json, which goes last: who finds the announcement finishes the removal.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from checkpoint import has_trailer, is_foreign, load_checkpoint, save_checkpoint
from process import StopSignals, log, provenance
from utils import (
    FAILED,
    TEMPORARY,
    Params,
    RunError,
    differences,
    link_file,
    read_json,
    storage_error,
    sync_folder,
    write_json,
)

LOCK_SECONDS = 5.0  # a killed run's lock is free at once; this covers one that is just ending
MAX_ATTEMPTS = 100  # of a run, that run.json tells of: the last ones
# Params that may differ between the attempts of one run: they say where things are or when to stop.
# What they lead to, data and teacher, is compared by content.
MAY_CHANGE = (
    "num_epochs",
    "checkpoint_minutes",
    "dataset.data_dir",
    "dataset.cache_dir",
    "dataset.download",
    "dataset.num_workers",
    "unlabelled.data_dir",
    "unlabelled.cache_dir",
    "unlabelled.download",
    "unlabelled.num_workers",
    "student.init_from",
    "teacher.model_dir",
    "teacher.cache",
    "teacher.max_gb",
    "teacher.cache_dir",
    "compile",
)
BY_CONTENT = ("student.init_from", "teacher.model_dir")
OF_SEVERAL = re.compile(r"(?<=^teacher\.)\d+\.")  # what the path of an option has more if there are several teachers
CALLED = {  # in messages
    "init": "checkpoint of student.init_from or --restore_file",
    "answers": "part of the teacher's answers that is kept (teacher.top_k, with teacher.cache)",
}
KEPT = "kept_"  # before the names of checkpoints that training would have written over
WRITTEN = (  # in the order in which it is removed
    "metrics.jsonl",
    "metrics_*.json",
    "*_weights.csv",
    "*_weights.npz",
    "last.pth.tar",
    "prev.pth.tar",
    "best.pth.tar",
    "calibration_*.json",
    "*_temp*_*.txt",
    "curves.png",
    "events.out.tfevents.*",
)
REMOVED = "removed"  # the reason in run.json while these are removed; run.json itself goes last


def may_change(key: str) -> bool:
    """Tells whether an option, given by its path, may differ between the attempts of one run."""
    return OF_SEVERAL.sub("", key) in MAY_CHANGE


def read_status(model_dir: Path) -> str:
    """Returns pending, running, stale, completed, failed, interrupted or pruned; takes no lasting lock."""
    path = model_dir / "run.json"
    if not path.exists():
        return "pending"
    status = str(read_json(path).get("status", "pending"))
    if status == "running" and not is_locked(model_dir):
        # Read again: the run may have ended, and let go of the lock, between the two looks.
        status = str(read_json(path).get("status", "pending"))
        return "stale" if status == "running" else status
    return status


def is_locked(model_dir: Path) -> bool:
    """Tells whether a live process holds the directory; needs no permission to write there."""
    try:
        with (model_dir / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once, by closing
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class Experiment:
    """One experiment directory, as `train.py` writes it.

    Args:
        model_dir: The directory; it must hold a params.json.
        agree: Returns the greatest of each number that it is given among all processes of the run, if it has several.

    Attributes:
        best: Validation metrics of the best epoch so far with its number, or None.
        stop: Remembers a signal to stop; `pause` and `stop_if_asked` heed it.
    """

    def __init__(self, model_dir: str | Path, agree: Callable[..., Sequence[int]] = lambda *numbers: numbers) -> None:
        self.dir = Path(model_dir)
        self._agree = agree
        self.last, self.prev, self.best_file = (self.dir / f"{name}.pth.tar" for name in ("last", "prev", "best"))
        self.journal = self.dir / "metrics.jsonl"
        self._run_file = self.dir / "run.json"
        self.best: dict[str, Any] | None = None
        self.stop = StopSignals()
        self._saved = time.monotonic()
        self._run_id = uuid.uuid4().hex
        self._run: dict[str, Any] = {}
        self._identity: dict[str, Any] = {}
        self._selected_on = "val"
        self._board: Any = None

    def strangers(self) -> list[Path]:
        """Returns the checkpoints here, under the names that training writes, that are of no run of this directory."""
        present = [path for path in (self.last, self.best_file) if path.exists()]
        foreign = [path for path in present if is_foreign(path)]
        began = self._recorded().get("attempts", self._run_file.exists())  # a run may be marked before it has begun
        if foreign or not present or began:
            return foreign
        try:
            load_checkpoint(self.last if self.last.exists() else self.prev)
        except RunError:  # there is nothing to go on from, so they were put here
            return present
        return []

    def is_finished(self, params: Params) -> bool:
        """Tells whether a run with these params has ended and no more epochs are asked for.

        Raises:
            RunError: The directory holds a run with other params.
        """
        run = self._read_run()
        if not run.get("params"):
            return False
        self._refuse_other_params(run, params)
        found = differences(params.complete(run["params"]), params.dict)
        if any(OF_SEVERAL.sub("", key) in BY_CONTENT for key in found):
            return False  # whether it is the same in another place, an attempt finds out
        done = run.get("status") == "completed" and run.get("epoch", 0) >= params.num_epochs
        return done and self.best_file.exists()

    @contextlib.contextmanager
    def attempt(
        self,
        params: Params,
        identity: Mapping[str, str | None],
        *,
        restart: bool = False,
        set_aside: bool = False,
        **details: Any,
    ) -> Iterator[dict[str, Any] | None]:
        """Holds the directory for one attempt at training and records how it ends.

        Within it, signals to stop are only remembered.

        Args:
            params: What is trained.
            identity: What else decides the result (data, teacher, precision): a resume with others is refused.
            restart: Begin anew: what an earlier run wrote is removed, except train.log.
            set_aside: Training may begin beside checkpoints that no run of this directory has written. Those are never
                written over: they are kept under other names, also by `restart`.
            details: What else run.json shall say of this attempt.

        Yields:
            The checkpoint to go on from, or None at the beginning.

        Raises:
            RunError: Locked (75), other params or data than the run began with (2), no usable checkpoint (1).
        """
        lock = self._acquire()
        try:
            for litter in self.dir.glob(".*.tmp"):
                litter.unlink(missing_ok=True)
            self._keep_strangers(self.strangers(), allowed=restart or set_aside)
            if restart or self.is_being_removed():
                self._remove_results()
            run = self._read_run()
            self._refuse_other_params(run, params)
            state = self._load(run.get("epoch", 0))
            self._identity = dict(identity)
            self._selected_on = params.dict.get("dataset", {}).get("validate_on", "val")
            if state is not None:
                self._refuse_other_params(state, params)  # run.json may be gone
                self._refuse_other_inputs(state)
            self._cut_journal(0 if state is None else state["journal_bytes"])
            self.best = self._restore_best(state)
            if state is not None and state["step"] == 0:
                self._write_metrics(state["metrics"])
            started = {**provenance(), **details, "from_epoch": state["epoch"] if state else 0}
            self._run = {
                "status": "running",
                "reason": None,
                "run_id": self._run_id,
                "epoch": started["from_epoch"],
                "num_epochs": params.num_epochs,
                "best": self.best,
                "params": params.dict,
                **{key: value for key, value in self._identity.items() if value is not None},
                "attempts": [*run.get("attempts", [])[1 - MAX_ATTEMPTS :], started],
            }
            write_json(self._run_file, self._run)
            clock = self._saved = time.monotonic()
            try:
                with self.stop:
                    yield state
            except BaseException as error:
                reason = getattr(error, "reason", None) or type(error).__name__
                stopped = reason in ("signal", "preempted") or isinstance(error, KeyboardInterrupt)
                with contextlib.suppress(RunError):  # the error itself matters more than recording it
                    self._end("interrupted" if stopped else "failed", str(reason), time.monotonic() - clock)
                raise
            self._end("completed", None, time.monotonic() - clock)
        finally:
            if self._board is not None:
                self._board.close()
            lock.release()

    def record(
        self,
        state: Mapping[str, Any],
        record: Mapping[str, Any],
        progress: Mapping[str, float],
        candidate: bool = True,
    ) -> bool:
        """Commits a finished epoch.

        Args:
            state: What a resume needs, of plain types and tensors.
            record: The journal's line: `epoch`, `train` and `val` metrics; `val.accuracy` selects the best.
            progress: What differs from run to run (seconds, images per second): run.json and TensorBoard only.
            candidate: Whether it may be the best.

        Returns:
            Whether this epoch is the best so far.
        """
        val = {**record["val"], "epoch": record["epoch"]}
        is_best = candidate and (self.best is None or val["accuracy"] > self.best["accuracy"])
        if is_best:
            self.best = val
        self._append(record)
        self.save({**state, "metrics": val})
        if is_best:
            link_file(self.last, self.best_file)
        self._write_metrics(val)
        self._run |= {"epoch": record["epoch"], "best": self.best, "progress": dict(progress)}
        write_json(self._run_file, self._run)
        self._scalars(record, progress)
        return is_best

    def stop_if_asked(self, where: str, alone: bool = False) -> None:
        """Ends the run if a signal has come.

        Args:
            where: Says how far it has been saved.
            alone: Do not ask the other processes of the run, which may be elsewhere.

        Raises:
            RunError: Reason `signal` or `preempted`, with the exit status of the signal.
        """
        own = self.stop.received or 0
        (asked,) = [own] if alone else self._agree(own)
        if asked:
            self.stop.received = signal.Signals(asked)
            raise self.stop.error(where)

    def pause(self, snapshot: Callable[[], Mapping[str, Any]], minutes: float, where: str) -> None:
        """Offers a point in mid-epoch at which the run can be saved: after a signal, or every so many minutes.

        Args:
            snapshot: Returns the state to save, with `epoch` (those finished) and `step` (of the next one).
            minutes: Save when this long has passed since the last time.
            where: As in `stop_if_asked`.
        """
        asked, late = self._agree(self.stop.received or 0, int(time.monotonic() - self._saved > 60 * minutes))
        if asked or late:
            self.save(snapshot())
            self.stop_if_asked(where)

    def save(self, state: Mapping[str, Any]) -> None:
        """Publishes a state as last.pth.tar and keeps the one before as prev.pth.tar."""
        self._refuse_if_taken_over()
        if self.last.is_file():
            link_file(self.last, self.prev)
        extra = {"format": 1, "best": self.best, "journal_bytes": self._journal_size(), "identity": self._identity}
        save_checkpoint(self.last, {**state, **extra})
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Removes what runs have written here, except logs; checkpoints that they have not written are kept aside."""
        with self._acquire():
            self._clear()

    def is_being_removed(self) -> bool:
        """Tells whether a removal was cut off: what is left here counts no more, and who begins a run finishes it."""
        return self._recorded().get("reason") == REMOVED

    def mark(self, status: str, reason: str | None = None) -> None:
        """Changes how the last attempt is recorded to have ended, for who has ended it and knows why.

        It may have ended before there was a record. Nothing is done where another process has the directory meanwhile.
        """
        with contextlib.suppress(RunError), self._acquire():
            if self.is_being_removed():
                self._clear()
            run = {"epoch": 0, "attempts": [], **self._read_run(), "status": status, "reason": reason}
            run["attempts"][-1:] = [{**attempt, "status": status, "reason": reason} for attempt in run["attempts"][-1:]]
            write_json(self._run_file, run)

    # --- what stands behind them ---

    def _clear(self) -> None:
        present = [path for path in (self.last, self.best_file) if path.exists()]
        self._keep_strangers([path for path in present if not has_trailer(path)], allowed=True)
        self._remove_results()

    def _remove_results(self) -> None:
        # Until it is gone too, run.json claims nothing and says what is going on: a crash may come at any point.
        write_json(self._run_file, {"status": "interrupted", "reason": REMOVED, "epoch": 0})
        for pattern in WRITTEN:
            for path in self.dir.glob(pattern):
                path.unlink()
        sync_folder(self.dir)
        self._run_file.unlink()

    def _acquire(self) -> FileLock:
        if not self.dir.is_dir():  # the lock would make it
            raise RunError(f"{self.dir}: not a directory (any more)", "storage", FAILED)
        lock = FileLock(self.dir / ".lock", timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout:
            holder = (self._read_run().get("attempts") or [{}])[-1]
            who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('started', '?')}"
            line = f"{self.dir} is in use by {who}; wait for it or stop it"
            raise RunError(line, "locked", TEMPORARY) from None
        except OSError as error:
            raise storage_error(error, self.dir / ".lock") from error
        return lock

    def _recorded(self) -> dict[str, Any]:
        """Returns run.json as it is; nothing where there is none, or none that can be read."""
        with contextlib.suppress(RunError):
            return read_json(self._run_file)
        return {}

    def _read_run(self) -> dict[str, Any]:
        run = read_json(self._run_file) if self._run_file.exists() else {}
        if not all(isinstance(run.get(key, empty), type(empty)) for key, empty in (("attempts", []), ("params", {}))):
            line = f"{self._run_file}: not of the shape that train.py writes; --restart begins anew"
            raise RunError(line, "checkpoint", FAILED)
        return run

    def _refuse_other_params(self, old: Mapping[str, Any], params: Params) -> None:
        """Refuses params that differ from those of a run.json or a checkpoint, if any epoch stands behind it."""
        if not old.get("params") or not (old.get("epoch") or self.last.exists()):
            return
        found = differences(params.complete(old["params"]), params.dict)
        changes = {key: change for key, change in found.items() if not may_change(key)}
        if changes:
            listed = "; ".join(f"{key}: {change}" for key, change in changes.items())
            way = "--restart begins anew (and removes its results); or use another directory"
            raise RunError(f"{self.dir} holds a run with other params ({listed}); {way}", "params")

    def _refuse_other_inputs(self, state: Mapping[str, Any]) -> None:
        for name, value in self._identity.items():
            if state["identity"].get(name) != value:
                line = f"{self.dir}: the {CALLED.get(name, name)} is not what this run began with"
                raise RunError(f"{line}; restore it, or --restart begins anew", name)

    def _load(self, epochs_done: int) -> dict[str, Any] | None:
        """Returns the newest usable state; None where there has never been one."""
        if not self.last.exists() and not self.prev.exists():
            if epochs_done:
                line = f"{self.dir}: {epochs_done} epochs are done but their checkpoint is gone"
                way = "restore last.pth.tar from a copy, or --restart trains from the beginning"
                raise RunError(f"{line}; {way}", "checkpoint", FAILED)
            return None
        try:
            return load_checkpoint(self.last)[0]
        except RunError as damage:
            try:
                state = load_checkpoint(self.prev)[0]
            except RunError as second:
                way = "restore one of them from a copy, or --restart trains from the beginning"
                raise RunError(f"{damage}; {second}; {way}", "checkpoint", FAILED) from None
            log.warning("%s; going on from %s, epoch %d", damage, self.prev, state["epoch"])
            # The damaged file must not become prev.pth.tar at the next save.
            link_file(self.prev, self.last)
            return state

    def _keep_strangers(self, strangers: Sequence[Path], allowed: bool) -> None:
        if strangers and not allowed:
            path = strangers[0]
            line = f"{path}: no run of this directory has written it, and training would replace it"
            name = path.name.removesuffix(".pth.tar")
            way = f"begin with its weights by --restore_file {name}, or without them by --restart"
            raise RunError(f"{line}; {way} (both keep it as {KEPT}{path.name})", "checkpoint")
        for path in strangers:
            kept = path.with_name(f"{KEPT}{path.name}")
            if kept.exists():
                raise RunError(
                    f"{path} would be kept as {kept.name}, which exists; move one of them away", "checkpoint"
                )
            path.rename(kept)
            log.info("%s is kept as %s", path, kept.name)

    def _restore_best(self, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Makes best.pth.tar agree with the state; a crash can come between publishing the two."""
        if state is None or state["best"] is None:
            return None
        best = state["best"]
        is_this = state["step"] == 0 and best["epoch"] == state["epoch"]
        try:
            held = load_checkpoint(self.best_file)[0]["metrics"]
        except RunError as damage:
            if not is_this:
                log.warning("%s, and the weights of epoch %d are in no other file", damage, best["epoch"])
                return None
            held = None
        if is_this and held != best:
            link_file(self.last, self.best_file)
            held = best
        # What the file holds is what counts: it may be of an epoch that is done again after damage to last.
        return held

    def _write_metrics(self, val: Mapping[str, Any]) -> None:
        write_json(self.dir / "metrics_val_last_weights.json", {**val, "selected_on": "nothing"})
        if self.best is not None:
            write_json(self.dir / "metrics_val_best_weights.json", {**self.best, "selected_on": self._selected_on})

    def _journal_size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    def _cut_journal(self, size: int) -> None:
        if self._journal_size() < size:
            way = "restore it from a copy, or --restart trains from the beginning"
            raise RunError(f"{self.journal}: shorter than its checkpoint says; {way}", "checkpoint", FAILED)
        if self._journal_size() > size:
            os.truncate(self.journal, size)

    def _append(self, record: Mapping[str, Any]) -> None:
        self._refuse_if_taken_over()
        try:
            with self.journal.open("ab") as file:
                file.write((json.dumps(record, allow_nan=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise storage_error(error, self.journal) from error

    def _refuse_if_taken_over(self) -> None:
        """A lock is no proof on a network disk: the record in the directory must still be ours."""
        try:
            holder = read_json(self._run_file).get("run_id")
        except RunError as error:
            raise RunError(f"{error}: the directory has changed under this run", "storage", FAILED) from None
        if holder != self._run_id:
            raise RunError(f"{self.dir} was taken over by another run; this one stops", "locked", TEMPORARY)

    def _end(self, status: str, reason: str | None, seconds: float) -> None:
        self._refuse_if_taken_over()
        ended = {"status": status, "reason": reason, "to_epoch": self._run["epoch"], "seconds": round(seconds, 2)}
        self._run["attempts"][-1] |= ended
        self._run |= {"status": status, "reason": reason}
        write_json(self._run_file, self._run)

    def _scalars(self, record: Mapping[str, Any], progress: Mapping[str, float]) -> None:
        epoch = record["epoch"]
        if self._board is None:
            from tensorboardX import SummaryWriter

            # The default file name is host and second: two writers would share a file. After a resume,
            # purge_step hides what an earlier attempt wrote beyond the checkpoint.
            suffix = f".{platform.node()}.{os.getpid()}.{self._run_id[:8]}"
            self._board = SummaryWriter(str(self.dir), purge_step=epoch, filename_suffix=suffix)
        scalars = {"learning_rate": record["learning_rate"], **progress}
        for split in ("train", "val"):
            scalars |= {f"{split}/{name}": value for name, value in record[split].items()}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, epoch)
        self._board.flush()


class Follower(Experiment):
    """The directory as the other processes of a run have it: the first one writes, these end in silence."""

    @contextlib.contextmanager
    def attempt(self, *_: Any, **__: Any) -> Iterator[None]:
        self._saved = time.monotonic()
        with self.stop:
            yield None

    def record(self, *_: Any, **__: Any) -> bool:
        return False

    def save(self, state: Mapping[str, Any]) -> None:
        self._saved = time.monotonic()

    def stop_if_asked(self, where: str, alone: bool = False) -> None:
        try:
            super().stop_if_asked(where, alone)
        except RunError as error:
            if not alone:  # torchrun ends all as soon as one has ended: the first goes first, and no more agrees
                with contextlib.suppress(Exception):
                    self._agree(0)
            raise SystemExit(error.exit_status) from None

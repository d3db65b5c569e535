"""Runs a search: hands children to a launcher, watches them, and says what becomes of each.

One child never stops the others. Whatever ends the search, the same command goes on from the directories.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment import Experiment
from process import StopSignals, log
from sweep.children import UNREADABLE, Child, Outlook, describe, write
from sweep.launchers.base import Launcher
from sweep.space import Search
from sweep.trials import Fixed, Trials, score_of
from sweep.view import Running, Snapshot, View, estimate, read_running
from utils import FAILED, OK, TEMPORARY, RunError

POLL_SECONDS = 0.1
LOOK_SECONDS = 1.0  # between two looks at directories that are not ours to wait for
QUEUE_SECONDS = 5.0  # between two looks at the directories of all that wait in a queue
GRACE_SECONDS = 60.0  # for a child that was told to end, before it is killed
LEAVE_SECONDS = 10.0  # for children to save when the search ends by an error
MAX_CONSOLE_BYTES = 100_000_000  # a child that prints without end must not fill the disk of all the others
FAILED_FAST = "a child failed (--fail_fast)"
FINAL = ("diverged", "params", "data", "teacher", "usage")  # reasons that another try does not mend


class Stop(StopSignals):
    """At the first signal the children save and end, at the second they are killed, at the third we leave them."""

    insisted = 0

    def _insist(self, number: int) -> None:
        self.insisted += 1

    @property
    def count(self) -> int:
        return 0 if self.received is None else 1 + self.insisted


@dataclass(frozen=True)
class Rules:
    """What a search does when all does not go well; times in seconds."""

    rerun: str = "none"
    retry: int = 0  # how often a child that fails is tried again at once
    fail_fast: bool = False
    timeout: float | None = None  # of the whole search
    trial_timeout: float | None = None  # of an attempt at one child
    stop_file: Path | None = None


@dataclass
class Handed:
    """A child that the launcher has."""

    child: Child
    since: float
    begun: bool  # it does not wait in a queue any more
    verdict: str | None = None  # why we have ended it: pruned or timeout
    told: float | None = None  # when it was told to end: train.py takes a second time for an order to die


class Tally:
    """What has become of the children so far, and the best of them; lines go to console and log as they come."""

    def __init__(self, trials: Trials, search: Search) -> None:
        self._trials, self._objective, self._num_seeds = trials, search.objective, search.num_seeds
        self.lines: dict[str, list[str]] = {"done": [], "skipped": [], "failed": []}
        self.seconds: list[float] = []  # that finished children have taken
        self._scores: dict[int, list[float]] = {}
        self._best: tuple[tuple[float, int], str] | None = None

    @property
    def best(self) -> str:
        return self._best[1] if self._best else "none yet"

    def add(self, child: Child, outcome: str, line: str, quiet: bool = False) -> None:
        self.lines.setdefault(outcome, []).append(line)
        if outcome in ("done", "skipped"):
            self._compare(child)
        if not quiet:
            say = log.error if outcome == "failed" else log.info
            say("[%d/%d] %s", self.number(*self.lines), self._trials.total, line)

    def _compare(self, child: Child) -> None:
        """Keeps the best point: with several seeds by its mean, once all of them are there."""
        run = child.read_run()
        if not run.get("best"):  # completed, says somebody who has not trained it
            return
        scores = self._scores.setdefault(child.trial, [])
        scores.append(score_of(child, self._objective, run))
        if len(scores) < self._num_seeds:
            return
        mean, line = statistics.fmean(scores), child.result(self._objective.metric, run)
        if self._num_seeds > 1:
            name = child.dir.name.removesuffix(f"_seed_{child.point['seed']}")
            spread = statistics.stdev(scores)
            line = f"{name}: {self._objective.metric} {mean:.4f} ± {spread:.4f} over {len(scores)} seeds"
        # Of equals the first point, not the first to end, so that it does not depend on who was faster.
        rank = (mean if self._objective.mode == "max" else -mean, -child.trial)
        if self._best is None or rank > self._best[0]:
            self._best = (rank, line)

    def number(self, *outcomes: str) -> int:
        return sum(len(self.lines.get(outcome, ())) for outcome in outcomes)

    def counts(self) -> dict[str, int]:
        return {outcome: len(lines) for outcome, lines in self.lines.items()}

    def summarise(self) -> None:
        for line in self.lines["failed"]:
            log.error(line)
        counts = [f"{number} {outcome}" for outcome, number in self.counts().items()]
        log.info(", ".join([*counts, f"{self._trials.total - self.number(*self.lines)} not started"]))
        log.info("best: %s", self.best)


class Study:
    """One call of a search.

    Args:
        trials: Hands out the children.
        launcher: Runs them.
        rules: What to do when not all goes well.
        search: What is sought.
        title: What the live view is headed with.
    """

    def __init__(self, trials: Trials, launcher: Launcher, rules: Rules, search: Search, title: str) -> None:
        self._trials, self._launcher, self._rules = trials, launcher, rules
        self._objective, self._title = search.objective, title
        self.tally = Tally(trials, search)
        self._stop = Stop()
        self._running: dict[Path, Handed] = {}
        self._elsewhere: dict[Path, Child] = {}
        self._left: set[Path] = set()  # those that were elsewhere at some time
        self._occupied: set[Path] = set()  # those of them that take a slot
        self._again: deque[Child] = deque()
        self._tries: dict[Path, int] = {}  # attempts of ours
        self._closed: str | None = None  # why no more children are started
        self._ending: str | None = None  # why all of them were told to end
        self._killed = self._is_known = False
        self._looked = self._asked = 0.0
        self._began = time.monotonic()

    def run(self, view: View) -> int:
        """Runs the children that need it, as many at a time as the launcher takes, whatever becomes of each.

        Returns:
            0 if all children are completed or pruned, else 1.

        Raises:
            RunError: The search was ended before all were done: by a signal, its time, or the stop file.
        """
        try:
            with self._stop, view:
                while self._step():
                    if view.due():
                        view.show(self._snapshot())
                    time.sleep(POLL_SECONDS)
        finally:
            self._abandon()
        self.tally.summarise()
        done = self.tally.number("done", "skipped", "pruned")
        if done == self._trials.total:
            return OK
        how_far = f"after {done} of {self._trials.total} children"
        way = "the same command"
        if self._rules.rerun in ("all", "stale"):
            way += f" without --rerun {self._rules.rerun}"
        if self._stop.count:
            raise self._stop.error(how_far, way)
        if (why := self._closed) and why != FAILED_FAST:
            raise RunError(f"stopped {how_far}: {why}; {way} goes on from there", "preempted", TEMPORARY)
        return FAILED

    def _abandon(self) -> None:
        """After an error of ours: nothing may go on without a search that knows of it."""
        with contextlib.suppress(Exception):
            deadline = time.monotonic() + LEAVE_SECONDS
            for handed in self._running.values():
                self._tell(handed)
            while self._running and time.monotonic() < deadline and self._stop.count < 3:
                for path in self._launcher.poll():
                    del self._running[path]
                time.sleep(POLL_SECONDS)

    def _step(self) -> bool:
        """Does what there is to do now; tells whether anything is left."""
        self._heed()
        self._look_elsewhere()
        more = self._hand_out()
        self._watch()
        ended = self._launcher.poll()
        for path, status in ended.items():
            handed = self._running.pop(path)
            self._settle(handed.child, *self._judge(handed, status))
        # What has ended may be tried again, or make room for what depends on it.
        return bool(self._running or ended or more or (self._elsewhere and self._closed is None))

    # --- starting -----------------------------------------------------------------------------------------

    def _heed(self) -> None:
        """Looks for reasons to start no more, or to end all."""
        rules = self._rules
        if self._ending is None:
            if self._stop.count:
                self._end_all("a signal", "saving and ending (a second signal kills)")
            elif rules.timeout is not None and time.monotonic() - self._began > rules.timeout:
                self._end_all("the time of --timeout is over")
            elif self._closed is None and rules.stop_file is not None and rules.stop_file.exists():
                self._closed = f"{rules.stop_file} is there (remove it to go on)"
                log.warning("%s: no new trials; those that run go on to their end", self._closed)
        if self._stop.count > 1 and not self._killed:
            self._killed = True
            log.warning("killed: %s", self._names())
            for path in self._running:
                self._launcher.cancel(path, force=True)
        if self._stop.count > 2:
            raise self._stop.error(f"without waiting for {self._names()}, which may still run")

    def _names(self) -> str:
        return ", ".join(path.name for path in self._running) or "none runs"

    def _end_all(self, why: str, what: str = "saving and ending") -> None:
        self._ending = self._closed = why
        log.warning("%s: no new trials; %s: %s", why, what, self._names())
        for handed in self._running.values():
            self._tell(handed)

    def _tell(self, handed: Handed) -> None:
        if handed.told is None:
            handed.told = time.monotonic()
            self._launcher.cancel(handed.child.dir)

    def _hand_out(self) -> bool:
        """Starts children while there is room; tells whether there may be more."""
        # Points that follow from results must not all be chosen before there are any.
        room = self._launcher.at_once if self._trials.learns else self._launcher.slots
        while self._closed is None and len(self._running) + len(self._occupied) < room:
            child = self._again.popleft() if self._again else self._trials.next()
            if child is None:
                return False
            self._begin(child)
            if self._stop.count:
                return False
        return self._closed is None

    def _begin(self, child: Child) -> None:
        """Does with a child what its directory asks for."""
        tries = self._tries.get(child.dir, 0)
        # What we have begun goes on; what others have begun is left as they leave it.
        outlook = child.outlook("failed" if tries else "none" if child.dir in self._left else self._rules.rerun)
        if outlook.action == "skip":
            self._skip(child, outlook)
        elif self._launcher.adopt(child.dir):
            self._tries[child.dir] = tries + 1
            self._running[child.dir] = Handed(child, time.monotonic(), begun=outlook.action == "wait")
        elif outlook.action == "wait":
            self._leave(child)
        else:
            self._tries[child.dir] = tries + 1
            try:
                if outlook.anew:
                    Experiment(child.dir).clear()
                write([child])
            except RunError as error:  # a full disk, say: no other try mends that
                self._count(child, "failed", f"{child.dir.name} failed: {error}")
                return
            child.run_before = child.read_run()
            try:
                self._launcher.submit(child.dir)
                self._running[child.dir] = Handed(child, time.monotonic(), begun=not self._launcher.queues)
            except (OSError, RunError) as error:
                self._settle(child, "failed", f"{child.dir.name} failed: it could not be started: {error}")

    def _skip(self, child: Child, outlook: Outlook) -> None:
        if outlook.state == "failed":
            before = "elsewhere" if child.dir in self._left else "in an earlier search"
            reason = child.read_run().get("reason", UNREADABLE)
            line = f"{child.dir.name} failed {before} ({reason}); --rerun failed tries it again"
            self.tally.add(child, "failed", line)
            self._trials.ended(child, "failed")
        else:
            outcome = "pruned" if outlook.state == "pruned" else "skipped"
            self.tally.add(child, outcome, child.dir.name, quiet=True)
            self._trials.ended(child, outcome)

    # --- children that others run -------------------------------------------------------------------------

    def _leave(self, child: Child) -> None:
        """Waits for a child that another process trains; on this machine it takes a slot."""
        self._elsewhere[child.dir] = child
        self._left.add(child.dir)
        attempt = (child.read_run().get("attempts") or [{}])[-1]
        gpu = attempt.get("environment", {}).get("CUDA_VISIBLE_DEVICES")
        if attempt.get("host") == platform.node() and self._launcher.occupy(child.dir, gpu):
            self._occupied.add(child.dir)
        log.info("%s is running elsewhere: process %s on %s", child.dir.name, attempt.get("pid"), attempt.get("host"))

    def _look_elsewhere(self) -> None:
        """Takes back the children that others have let go of, finished or not."""
        if self._elsewhere and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            for path, child in list(self._elsewhere.items()):
                if child.outlook().action != "wait":
                    del self._elsewhere[path]
                    self._again.append(child)
                    if path in self._occupied:
                        self._occupied.remove(path)
                        self._launcher.vacate(path)

    # --- watching and ending ------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Ends children that are to be pruned, take too long, print without end, or do not end when told to."""
        self._look_at_queue()
        now, limit = time.monotonic(), self._rules.trial_timeout
        for handed in self._running.values():
            has_flooded = handed.begun and _has_flooded(handed.child)
            if has_flooded or (handed.told is not None and now - handed.told > GRACE_SECONDS):
                self._launcher.cancel(handed.child.dir, force=True)
            elif limit is not None and handed.told is None and handed.begun and now - handed.since > limit:
                self._condemn(handed, "timeout")
        watched = {handed.child.dir: handed for handed in self._begun() if handed.told is None}
        self._look_for_metric([handed.child for handed in watched.values()])
        for child in self._trials.watch([handed.child for handed in watched.values()]):
            self._condemn(watched[child.dir], "pruned")

    def _begun(self) -> list[Handed]:
        return [handed for handed in self._running.values() if handed.begun]

    def _look_at_queue(self) -> None:
        """Finds out which of the children that wait elsewhere have begun: seldom, as there may be thousands."""
        now = time.monotonic()
        if self._launcher.queues and now - self._asked > QUEUE_SECONDS:
            self._asked = now
            for handed in self._running.values():
                if not handed.begun:
                    before = handed.child.run_before.get("attempts")
                    handed.begun, handed.since = handed.child.read_run().get("attempts") != before, now

    def _look_for_metric(self, running: Sequence[Child]) -> None:
        """Ends the search after the first epoch of any child if that has no such metric as is sought."""
        if self._is_known:
            return
        for child in running:
            if child.run_before.get("epoch") or not (best := child.read_run().get("best")):
                continue
            score_of(child, self._objective, {"best": best})
            self._is_known = True

    def _condemn(self, handed: Handed, verdict: str) -> None:
        handed.verdict = verdict
        self._tell(handed)

    def _judge(self, handed: Handed, status: int) -> tuple[str, str]:
        """Returns the outcome of an attempt that has ended and a line about it; the directory's word counts most."""
        child = handed.child
        name, run = child.dir.name, child.read_run()
        epoch = run.get("epoch", 0)
        if child.is_finished():
            self.tally.seconds.append(time.monotonic() - handed.since)
            return "done", child.result(self._objective.metric)
        if handed.verdict == "pruned":
            Experiment(child.dir).mark("pruned")
            return "pruned", f"{name} is pruned at epoch {epoch}"
        if handed.verdict == "timeout":
            Experiment(child.dir).mark("failed", "timeout")
            return "failed", f"{name} failed: longer than --trial_timeout, after epoch {epoch}"
        reason = run.get("reason") if run != child.run_before else None  # else it is an earlier attempt's
        if status == TEMPORARY and reason is None:
            return "elsewhere", f"{name} is running elsewhere"
        if handed.told is not None or (reason and run.get("status") == "interrupted"):
            return "interrupted", f"{name} is interrupted after epoch {epoch}"
        if _has_flooded(child):
            reason = f"console.log is larger than {MAX_CONSOLE_BYTES} bytes; remove it"
        what = describe(status) if status else "exit status 0, but run.json is not of a completed run"
        return "failed", f"{name} failed: {what}{f' ({reason})' if reason else ''}: {child.last_line()}"

    def _settle(self, child: Child, outcome: str, line: str) -> None:
        """Counts what has become of a child, unless it is to be tried again."""
        tries, reason = self._tries.get(child.dir, 0), child.read_run().get("reason")
        if outcome == "elsewhere":
            self._leave(child)
        elif outcome == "failed" and self._closed is None and tries <= self._rules.retry and reason not in FINAL:
            log.warning("%s; tried again (%d of %d)", line, tries, self._rules.retry)
            self._again.append(child)
        else:
            self._count(child, outcome, line)

    def _count(self, child: Child, outcome: str, line: str) -> None:
        self.tally.add(child, outcome, line)
        if outcome != "interrupted":
            self._trials.ended(child, outcome)
        if outcome == "failed" and self._rules.fail_fast and self._ending is None:
            self._end_all(FAILED_FAST)

    def _snapshot(self) -> Snapshot:
        metric = self._objective.metric
        begun = [*(handed.child for handed in self._begun()), *self._elsewhere.values()]
        waiting = self._trials.total - self.tally.number(*self.tally.lines) - len(begun)
        counts = {**self.tally.counts(), "running": len(begun), "waiting": waiting}
        running = [read_running(child.dir, metric, len(child.run_before.get("attempts", []))) for child in begun]
        left = estimate(self.tally.seconds, waiting, running, self._launcher.at_once)
        return Snapshot(self._title, metric, counts, self._trials.total, running, self.tally.best, left)


def status_of(children: Sequence[Child], total: int, search: Search, title: str) -> Snapshot:
    """Returns how far a search is, from its directories alone."""
    metric, tally = search.objective.metric, Tally(Fixed(children), search)
    running: list[Running] = []
    seconds: list[float] = []
    counts = dict.fromkeys(("completed", "pruned", "failed"), 0)
    for child in children:
        outlook = child.outlook()
        if outlook.state == "running":
            running.append(read_running(child.dir, metric))
        elif outlook.action == "skip":
            counts[outlook.state] += 1
            if outlook.state == "completed":
                tally.add(child, "skipped", "", quiet=True)
                if took := sum(attempt.get("seconds") or 0 for attempt in child.read_run().get("attempts", [])):
                    seconds.append(took)
    waiting = total - sum(counts.values()) - len(running)
    left = estimate(seconds, waiting, running, len(running)) if running else None
    counts |= {"running": len(running), "waiting": waiting}
    return Snapshot(title, metric, counts, total, running, tally.best, left)


def _has_flooded(child: Child) -> bool:
    """Tells whether console.log is larger than any training needs."""
    path = child.dir / "console.log"
    return path.exists() and path.stat().st_size > MAX_CONSOLE_BYTES

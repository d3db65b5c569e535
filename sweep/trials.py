"""Which child comes next, and what its end means for the others.

`Fixed` hands out the points of a grid. `Adaptive` asks a tuner for one point after the other, shows it how the runs
go and tells it how they ended.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from process import log
from sweep.children import Child, Planner
from sweep.space import JOURNAL, Objective, Point, Search, Values, grid
from utils import RunError

if TYPE_CHECKING:
    from sweep.tuner import Asked, Tuner


class Trials(Protocol):
    """What a search hands out."""

    learns: bool  # from results: so no more are to be handed out than run

    @property
    def total(self) -> int:
        """Children in all, those that are not known yet among them."""
        ...

    def next(self) -> Child | None:
        """Returns the next child to look at; None if there is none now."""

    def watch(self, running: Sequence[Child]) -> list[Child]:
        """Returns those of the running children that are to be ended early."""
        ...

    def ended(self, child: Child, outcome: str) -> None:
        """Takes note of a child that is done, skipped, pruned or failed for good."""


class Fixed:
    """Children that are all known from the start, in their order.

    What others run comes first, here and below: it may hold a GPU that no other is to get meanwhile.
    """

    learns = False

    def __init__(self, children: Sequence[Child]) -> None:
        self.total = len(children)
        self._waiting = deque(sorted(children, key=lambda child: not is_elsewhere(child)))

    def next(self) -> Child | None:
        return self._waiting.popleft() if self._waiting else None

    def watch(self, running: Sequence[Child]) -> list[Child]:
        return []

    def ended(self, child: Child, outcome: str) -> None:
        pass


@dataclass
class _Trial:
    """A point with its children, one per seed."""

    children: list[Child]
    waiting: deque[Child]
    scores: list[float] = field(default_factory=list)
    num_ended: int = 0
    num_dropped: int = 0  # other seeds of a point that was pruned


class Adaptive:
    """Points that a tuner chooses as results come in.

    With several seeds a point's result is the mean over them. With a pruner the first seed is the one that is judged:
    the others are trained after it, unless it was pruned, so that only runs with equal data are compared.

    Args:
        tuner: Chooses the points.
        planner: Makes their children.
    """

    def __init__(self, tuner: Tuner, planner: Planner) -> None:
        search = planner.search
        self._tuner, self._planner = tuner, planner
        self._objective, self._prunes = search.objective, search.pruner.name != "none"
        self.learns = search.learns
        self._trials: dict[int, _Trial] = {}
        known = [self._children(asked) for asked in tuner.asked]
        self._known = deque(sorted(known, key=lambda children: not any(map(is_elsewhere, children))))
        self._ready: deque[Child] = deque()
        self._shown: dict[Path, int] = {}  # bytes of the journal that the tuner has seen
        self._most = most_children(search)
        self._exhausted = False

    @property
    def total(self) -> int:
        known = sum(len(trial.children) - trial.num_dropped for trial in self._trials.values())
        num_seeds = self._planner.search.num_seeds
        return known if self._exhausted else known + max(0, self._most - num_seeds * len(self._trials))

    def next(self) -> Child | None:
        while not self._ready and not self._exhausted:
            if self._known:
                children = self._known.popleft()
            elif (asked := self._tuner.ask()) is not None:
                children = self._children(asked)
            else:
                self._exhausted = True
                break
            trial = self._trials[children[0].trial] = _Trial(children, deque(children))
            self._release(trial)
        return self._ready.popleft() if self._ready else None

    def _children(self, asked: Asked) -> list[Child]:
        return self._planner.children([asked.point], asked.number)

    def _release(self, trial: _Trial) -> None:
        """Hands out a point's children: with a pruner the first one alone, the others once it is through."""
        while trial.waiting:
            self._ready.append(trial.waiting.popleft())
            if self._prunes and trial.num_ended == 0:
                break

    def watch(self, running: Sequence[Child]) -> list[Child]:
        if not self._prunes:
            return []
        return [child for child in running if child is self._trials[child.trial].children[0] and self._judge(child)]

    def _judge(self, child: Child) -> bool:
        """Shows the tuner what is new in a journal; tells whether the run is to be ended."""
        path = child.dir / "metrics.jsonl"
        seen = self._shown.get(path, 0)
        if not path.exists() or path.stat().st_size < seen:  # it has begun anew
            self._shown[path] = 0
            return False
        with path.open("rb") as file:
            file.seek(seen)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._shown[path] = seen + len(complete)
        for line in complete.splitlines():
            value = None
            # What is wrong with a line train.py will say.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                record = json.loads(line)
                epoch, value = int(record["epoch"]), record["val"].get(self._objective.metric.removeprefix("val."))
            # What comes after the decision, as the run goes on until it has heard of it, decides nothing.
            if isinstance(value, float) and self._tuner.report(child.trial, epoch, value):
                return True
        return False

    def ended(self, child: Child, outcome: str) -> None:
        trial = self._trials[child.trial]
        trial.num_ended += 1
        if self._prunes and child is trial.children[0]:
            self._judge(child)  # others are compared with all of its epochs
        if outcome in ("done", "skipped"):
            trial.scores.append(score_of(child, self._objective))
        if outcome == "pruned" or (outcome == "failed" and self._prunes and child is trial.children[0]):
            trial.num_dropped = len(trial.waiting)
            trial.waiting.clear()
        self._release(trial)
        if outcome in ("pruned", "failed"):
            self._tuner.tell(child.trial, outcome)
        elif len(trial.scores) == len(trial.children):
            self._tuner.tell(child.trial, "completed", statistics.fmean(trial.scores))


def most_children(search: Search) -> int:
    """Returns how many children a search has, unless its space has fewer points than are asked for."""
    num_points = len(grid(search)) if search.strategy.name == "grid" else search.max_trials or 0
    return num_points * search.num_seeds


def is_elsewhere(child: Child) -> bool:
    """Tells whether another process trains a child now."""
    return child.outlook().action == "wait"


def score_of(child: Child, objective: Objective, run: Mapping[str, Any] | None = None) -> float:
    """Returns the objective of a completed child.

    Raises:
        RunError: Its metrics have no such number.
    """
    run = child.read_run() if run is None else run
    score = child.score(objective.metric, run)
    if score is None:
        names = ", ".join(f"val.{name}" for name, value in (run.get("best") or {}).items() if isinstance(value, float))
        line = f"objective: {child.dir} has no {objective.metric}"
        raise RunError(f"{line}; it has {names or 'no metrics at all'}", "params")
    return score


def warn_of_objective(search: Search) -> None:
    """Logs a warning where children are compared by a number that is not the same thing in each of them."""
    varied = [key for key in search.space if key.partition(".")[0] == "loss"]
    if varied and search.objective.metric == "val.loss":
        log.warning("val.loss is another function wherever %s differs; val.cross_entropy is the same in all", varied[0])


# --- the tuner's journal --------------------------------------------------------------------------------------


def open_tuner(planner: Planner, force: bool = False, folder: Path | None = None) -> Tuner:
    """Returns the tuner of a search, with its journal in the parent, or with a copy in another folder."""
    from sweep.tuner import Tuner  # and with it Optuna, which a grid does not need

    shown, durable = planner.parent / JOURNAL, folder is None
    where = folder or planner.parent
    return Tuner(where, planner.search, _most_epochs(planner), force=force, shown=shown, durable=durable)


def rehearse(planner: Planner, ahead: bool, force: bool = False) -> list[Point]:
    """Returns the points that a tuner has chosen, and with `ahead` those that it will choose whatever comes out.

    It works on a copy of the journal, so nothing is decided by looking.
    """
    with tempfile.TemporaryDirectory(prefix="kdlab-") as folder:
        if (journal := planner.parent / JOURNAL).exists():
            shutil.copy(journal, folder)
        with contextlib.closing(open_tuner(planner, force, Path(folder))) as tuner:
            if ahead and planner.search.strategy.name != "tpe":
                while tuner.ask() is not None:
                    pass
            return [asked.point for asked in tuner.asked]


def _most_epochs(planner: Planner) -> int:
    """Returns the number of epochs of the children, of the longest where they differ."""
    varied = planner.search.space.get("num_epochs")
    values = varied.values if isinstance(varied, Values) else [varied.high] if varied else []
    numbers = [value for value in [*values, planner.reference.get("num_epochs")] if type(value) is int]
    return max(numbers, default=1)

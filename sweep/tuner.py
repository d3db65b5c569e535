"""Asks Optuna which point comes next, and whether a run is worth going on. The only module that knows Optuna.

The directories are the truth about results. The journal beside them, in Optuna's format, says which points were asked
for, what was reported of them and what was decided. One coordinator writes it; any Optuna tool can read it.

What can be reproduced, with one version of Optuna:

- `grid` and `random`: the sequence of points is decided by search.json alone, whatever the number of jobs, the order of
  the results, or the kills in between.
- `tpe`: a point is decided by search.json, its place in the sequence, and which results are known when it is asked for
  (not by the order in which these came). So with one job at a time and equal results the sequence is the same, also if
  the coordinator was killed and started again at any moment. With several jobs it depends on which runs end first; the
  points are still those of a valid search, as runs that have not ended count as tried without success (constant liar).
- With a pruner a run is compared with those that were there before it, so with several jobs the decisions depend on
  who was first. What was decided at an epoch stays. (One gap: if the coordinator is killed between Hyperband's
  comparison and the line with its answer, that run goes on to the next comparison.)

A run may be run again, or go on, after its end: then the newest that is known of a point counts, and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from sweep.space import (
    JOURNAL,
    MAX_POINTS,
    Dimension,
    Point,
    Pruner,
    Range,
    Search,
    Values,
    active,
    canonical,
    enumerate_points,
    grid,
    is_excluded,
    same,
    takes,
)
from utils import RunError, storage_error

# In a row, before a space counts as exhausted: even if 19 of 20 points are excluded, one in 30,000 asks ends too early.
MAX_DRAWS = 200
# Significant ones of a drawn number, so that names stay short. Optuna gets the number that is trained, too.
DIGITS = 6
STATES = {
    TrialState.WAITING: "open",
    TrialState.RUNNING: "open",
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
ENDS = {name: state for state, name in STATES.items() if state.is_finished()}

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Asked:
    """A point that was asked for."""

    number: int  # its place, from 0, counted over points that are different (not Optuna's number)
    point: Point
    state: str  # open (no result told yet), completed, pruned or failed


class Tuner:
    """Chooses points as results come in, and ends runs early.

    Args:
        parent: The directory of the search, where the journal is or will be.
        search: What is searched, and how.
        num_epochs: Of a run; none is ended early in its last one. It may change: Hyperband keeps the brackets that it
            had when the sequence began, and compares on after as many epochs more as there are.
        force: Begin a new sequence in the journal if it is another search's.
        shown: The journal's path in messages, if it is a copy that the user does not know.
        durable: Have every line on the disk before going on.

    Raises:
        RunError: The journal is damaged, cannot be written, or belongs to another search.
    """

    def __init__(
        self,
        parent: Path,
        search: Search,
        num_epochs: int,
        *,
        force: bool = False,
        shown: Path | None = None,
        durable: bool = True,
    ) -> None:
        self._search, self._num_epochs = search, num_epochs
        self._distributions = {key: _distribution(dimension) for key, dimension in search.space.items()}
        if search.pruner.name == "hyperband" and search.pruner.min_epochs > num_epochs:
            raise RunError(f"pruner.min_epochs: {search.pruner.min_epochs} is above num_epochs, {num_epochs}", "params")
        self._journal = _Journal(parent / JOURNAL, shown or parent / JOURNAL, durable)
        try:
            self._storage = self._read()
            self._study = self._open(force)
            self._study.pruner = _create_pruner(search.pruner, self._study.user_attrs.get("num_epochs", num_epochs))
            # The place of a point -> Optuna's id of what is known of it; a run that was run again has several.
            self._newest: dict[int, int] = {}
            for trial in self._study.get_trials(deepcopy=False):
                self._note(trial.user_attrs.get("number", -1), trial._trial_id)
            if self._newest.keys() != set(range(len(self._newest))):
                raise self._journal.damage("some of its points are missing")
            self._known = {canonical(asked.point) for asked in self.asked}
        except BaseException:
            self.close()
            raise

    def _read(self) -> _Storage:
        try:
            return _Storage(self._journal)
        except Exception as error:  # whatever Optuna makes of lines that it has not written so
            raise self._journal.damage(f"{type(error).__name__}: {error}") from error

    def _open(self, force: bool) -> optuna.Study:
        """Returns the newest study in the journal if it is of this search, or a new one."""
        storage, identity = self._storage, _identity(self._search)
        direction = StudyDirection.MAXIMIZE if self._search.objective.mode == "max" else StudyDirection.MINIMIZE
        sampler = RandomSampler()  # of no use: points are drawn in studies that are made for it
        names = optuna.get_all_study_names(storage)
        if names:
            study = optuna.load_study(study_name=names[-1], storage=storage, sampler=sampler)
            present, is_empty = study.user_attrs.get("search", {}), not study.get_trials(deepcopy=False)
            if present == identity and not is_empty:
                return study
            if not (is_empty or force):
                raise self._other_search(present, identity)
        if not names or not is_empty or study.direction != direction:
            # Hyperband puts runs into brackets by the study's name, so that is the same in every parent.
            name = next(name for number in itertools.count(1) if (name := f"search-{number}") not in names)
            study = optuna.create_study(study_name=name, storage=storage, direction=direction, sampler=sampler)
        if self._search.pruner.name == "hyperband":
            study.set_user_attr("num_epochs", self._num_epochs)
        study.set_user_attr("search", identity)
        return study

    def _other_search(self, present: Mapping[str, str], wanted: Mapping[str, str]) -> RunError:
        absent = "absent"
        changes = "; ".join(
            f"{key}: {present.get(key, absent)} -> {wanted.get(key, absent)}"
            for key in {**present, **wanted}
            if present.get(key) != wanted.get(key)
        )
        way = "undo the change; or --force begins a new sequence (directories stay)"
        return RunError(f"{self._journal.shown} is of another search ({changes}); {way}", "params")

    def close(self) -> None:
        self._journal.close()

    @property
    def asked(self) -> list[Asked]:
        """All points so far in their order, those of earlier coordinators too."""
        trials = enumerate(self._trials())
        return [Asked(number, trial.user_attrs["point"], STATES[trial.state]) for number, trial in trials]

    def _trials(self) -> list[FrozenTrial]:
        """Returns what is known of each point, in their order."""
        return [self._trial(number) for number in range(len(self._newest))]

    def _trial(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._newest[number])

    # --- points -------------------------------------------------------------------------------------------

    def ask(self) -> Asked | None:
        """Returns the next new point; None if there are max_trials, or the space has no other."""
        number = len(self._newest)
        if self._search.max_trials is not None and number >= self._search.max_trials:
            return None
        is_grid = self._search.strategy.name == "grid"
        candidates = itertools.islice(self._grid, number, None) if is_grid else self._candidates(number)
        new = (p for p in candidates if canonical(p) not in self._known and not is_excluded(self._search, p))
        point = next(new, None)
        if point is None:
            return None
        params = self._params(point)
        distributions = {key: self._distributions[key] for key in params}
        attributes = {"number": number, "point": point}
        self._add(
            create_trial(state=TrialState.RUNNING, params=params, distributions=distributions, user_attrs=attributes)
        )
        self._known.add(canonical(point))
        return Asked(number, point, "open")

    @cached_property
    def _grid(self) -> list[Point]:
        return grid(self._search)

    def _candidates(self, number: int) -> Iterator[Point]:
        """Yields included points, then drawn ones; at last, in a space that can be counted, one of those that are left.

        A draw that was of no use counts as tried without success, so that TPE looks elsewhere.
        """
        yield from self._search.include
        view = self._view()
        left: list[Point] | None = None
        for draw in range(MAX_DRAWS):
            view.sampler = self._sampler(number, draw)
            yield self._draw(view.ask())
            if draw == 0 and self._countable is not None:
                left = [point for text, point in self._countable.items() if text not in self._known]
                if not left:
                    return
        if left:
            yield left[_seed(self._search.strategy.seed, number, MAX_DRAWS) % len(left)]

    @cached_property
    def _countable(self) -> dict[str, Point] | None:
        """All points of the space by their texts, if each option has countable values and there are not too many."""
        space: dict[str, Dimension] = {}
        for key, dimension in self._search.space.items():
            if isinstance(dimension, Range) and not dimension.step:
                if not dimension.is_whole:
                    return None
                dimension = replace(dimension, step=1)
            space[key] = dimension
        search = replace(self._search, space=space)
        points = list(itertools.islice(enumerate_points(search), MAX_POINTS + 1))
        if len(points) > MAX_POINTS:
            return None
        return {canonical(point): point for point in points if not is_excluded(search, point)}

    def _view(self) -> optuna.Study:
        """Returns what a sampler is to see: results in the order of their points, and of each point the newest one.

        Points that do not lie in the space are not in it: one without params would end all joint sampling.
        """
        view = optuna.create_study(direction=self._study.direction, pruner=NopPruner())
        if self._search.strategy.name == "tpe":
            view.add_trials(trial for trial in self._trials() if trial.params)
        return view

    def _sampler(self, number: int, draw: int) -> BaseSampler:
        """Returns a sampler for one draw: what it draws must not depend on how many were drawn in this process."""
        strategy = self._search.strategy
        seed = _seed(strategy.seed, number, draw)
        if strategy.name == "random":
            return RandomSampler(seed=seed)
        with warnings.catch_warnings():  # both options are Optuna 5's defaults, and experimental before
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(
                n_startup_trials=strategy.startup_trials, multivariate=True, constant_liar=True, seed=seed
            )

    def _draw(self, trial: Trial) -> Point:
        point: Point = {}
        for key, dimension in self._search.space.items():
            if active(self._search, key, point):
                point[key] = _decode(dimension, _suggest(trial, key, self._distributions[key]))
        return point

    def _params(self, point: Point) -> dict[str, Any]:
        """Returns a point as Optuna writes it, with the numbers that are trained; {} if it is not in the space."""
        space = self._search.space
        keys = [key for key in space if active(self._search, key, point)]
        if point.keys() != set(keys) or not all(takes(space[key], point[key]) for key in keys):
            return {}
        return {key: _encode(space[key], point[key]) for key in keys}

    # --- results ------------------------------------------------------------------------------------------

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Takes note of the objective after an epoch; tells whether to end the run early.

        What was reported before, by an earlier coordinator too, changes nothing: what was decided then is the answer.
        But another value for the same epoch tells that the run has begun anew, there or before: what was known of it
        from that epoch on is forgotten, its result and what was decided too. An epoch more, after an end that was not
        decided here, tells that it goes on: all that was reported of it stays, and its result is open again.

        Args:
            number: The point's.
            epoch: From 1, in order.
            value: The objective.
        """
        trial = self._trial(number)
        decided, values = trial.user_attrs.get("pruned_at"), trial.intermediate_values
        if epoch in values and repr(values[epoch]) != repr(float(value)):  # as texts: in them NaN is NaN
            trial = self._reopen(number, {before: values[before] for before in values if before < epoch})
            decided = None
        if epoch not in trial.intermediate_values:
            if trial.state.is_finished() and decided is None:
                trial = self._reopen(number, values)
            if not trial.state.is_finished() and decided in (None, epoch):
                running = Trial(self._study, trial._trial_id)
                if epoch < self._num_epochs and self._is_hopeless(number, {**trial.intermediate_values, epoch: value}):
                    decided = epoch
                    running.set_user_attr("pruned_at", epoch)  # before the value: a kill in between loses nothing
                running.report(value, epoch)
        return decided is not None and epoch >= decided

    def _is_hopeless(self, number: int, values: dict[int, float]) -> bool:
        seen = copy.copy(self._trial(number))
        seen.intermediate_values = values
        return self._study.pruner.prune(self._study, seen)

    def tell(self, number: int, state: str, value: float | None = None) -> None:
        """Takes note of a result. It may change, if the run was run again; the same one again changes nothing.

        Args:
            number: The point's.
            state: completed, pruned or failed.
            value: The objective of a completed one.
        """
        trial, end = self._trial(number), ENDS[state]
        if trial.state.is_finished():
            if trial.state == end and (end != TrialState.COMPLETE or trial.value == value):
                return
            trial = self._reopen(number, trial.intermediate_values, trial.user_attrs.get("pruned_at"))
        self._study.tell(trial.number, value, end)

    def _reopen(self, number: int, values: dict[int, float], decided: int | None = None) -> FrozenTrial:
        """Puts an open trial, of which this is known, in the place of one that Optuna does not change any more."""
        earlier = self._trial(number)
        attributes = {"number": number, "point": earlier.user_attrs["point"]}
        self._add(
            create_trial(
                state=TrialState.RUNNING,
                params=earlier.params,
                distributions=earlier.distributions,
                user_attrs=attributes if decided is None else {**attributes, "pruned_at": decided},
                intermediate_values=values,
            )
        )
        for epoch in sorted(values):  # so that Hyperband has it in its comparisons; the answers come too late
            self._is_hopeless(number, {before: values[before] for before in values if before <= epoch})
        return self._trial(number)

    def _add(self, trial: FrozenTrial) -> None:
        added = self._storage.create_new_trial(self._study._study_id, trial)  # add_trial does not tell the id
        self._note(trial.user_attrs["number"], added)

    def _note(self, number: int, trial_id: int) -> None:
        if number in self._newest:
            self._storage.superseded.add(self._newest[number])
        self._newest[number] = trial_id


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(numbers).encode()).digest()[:4], "big")


def _create_pruner(pruner: Pruner, num_epochs: int) -> BasePruner:
    if pruner.name == "median":
        # Optuna counts from 0, epochs begin with 1.
        return MedianPruner(n_startup_trials=pruner.startup_trials, n_warmup_steps=pruner.warmup_epochs + 1)
    if pruner.name == "hyperband":
        return HyperbandPruner(pruner.min_epochs, num_epochs, pruner.reduction_factor)
    return NopPruner()


def _identity(search: Search) -> dict[str, str]:
    """Returns what decides the sequence of points, as texts: in them 1 is not 1.0, and keys have an order."""
    strategy, pruner = search.strategy, search.pruner
    identity: dict[str, Any] = {
        "space": list(search.space),
        **{f"space.{key}": asdict(dimension) for key, dimension in search.space.items()},
        "include": search.include,
        "exclude": search.exclude,
        "objective": asdict(search.objective),
        "strategy": strategy.name,
        "strategy.seed": None if strategy.name == "grid" else strategy.seed,
        "strategy.startup_trials": strategy.startup_trials if strategy.name == "tpe" else None,
        "seeds": search.seeds if strategy.name == "tpe" or pruner.name != "none" else None,
        "pruner": None if pruner.name == "none" else asdict(pruner),
    }
    return {key: json.dumps(value) for key, value in identity.items() if value is not None}


# --- values -----------------------------------------------------------------------------------------------


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Values):
        return CategoricalDistribution(_choices(dimension))
    low, high, log, step = dimension.low, dimension.high, dimension.log, dimension.step
    if step is not None:
        high = _at(dimension, dimension.number_of_steps() - 1)
    if dimension.is_whole:
        return IntDistribution(int(low), int(high), log, int(step or 1))
    return FloatDistribution(low, high, log, step)


def _suggest(trial: Trial, key: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    if isinstance(distribution, IntDistribution):
        low, high = distribution.low, distribution.high
        return trial.suggest_int(key, low, high, step=distribution.step, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _decode(dimension: Dimension, drawn: Any) -> Any:
    """Returns the value that is trained for one that Optuna has drawn."""
    if isinstance(dimension, Values):
        return dimension.values[_choices(dimension).index(drawn)]
    if dimension.is_whole:
        return drawn
    if dimension.step is not None:
        return _at(dimension, round((drawn - dimension.low) / dimension.step))
    return float(min(max(float(f"{drawn:.{DIGITS}g}"), dimension.low), dimension.high))


def _encode(dimension: Dimension, value: Any) -> Any:
    if isinstance(dimension, Values):
        index = next(index for index, listed in enumerate(dimension.values) if same(listed, value))
        return _choices(dimension)[index]
    return int(value) if dimension.is_whole else float(value)


def _choices(dimension: Values) -> Sequence[Any]:
    """Returns listed values as Optuna can tell them apart: itself it takes 1 for true, and no lists or sections."""
    values = dimension.values
    is_plain = all(isinstance(value, (NoneType, bool, int, float, str)) for value in values)
    return values if is_plain and len(set(values)) == len(values) else [json.dumps(value) for value in values]


def _at(dimension: Range, number: int) -> float:
    """Returns a value of a range with steps, as the grid has it: 0.1 + 0.2 is 0.3."""
    return float(Fraction(str(dimension.low)) + number * Fraction(str(dimension.step)))


# --- the journal ------------------------------------------------------------------------------------------


class _Journal(BaseJournalBackend):
    """A journal file with one writer, which has locked the directory.

    Optuna's own backend has a lock file, which would stand in the way for half a minute after a kill; and it passes
    over a line that a kill has cut off, to write the next one right behind it.
    """

    def __init__(self, path: Path, shown: Path, durable: bool) -> None:
        self._path, self.shown, self._durable = path, shown, durable
        try:
            content = path.read_bytes() if path.exists() else b""
            end = content.rfind(b"\n") + 1
            self._lines = [self._read(line, number) for number, line in enumerate(content[:end].split(b"\n")[:-1], 1)]
            self._file = path.open("ab", buffering=0)
            if end < len(content):  # nothing has followed from what was not written to its end
                self._file.truncate(end)
        except OSError as error:
            raise storage_error(error, shown) from error

    def _read(self, line: bytes, number: int) -> dict[str, Any]:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(value := json.loads(line), dict):
                return value
        raise self.damage(f"line {number} is not what was written")

    def damage(self, what: str) -> RunError:
        way = "restore it, or move it away: the search then begins a new sequence (directories stay)"
        return RunError(f"{self.shown} is damaged: {what}; {way}", "storage")

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self._lines[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = [json.dumps(log, separators=(",", ":")) for log in logs]
        content = "".join(f"{line}\n" for line in lines).encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            rest = content
            while rest:
                rest = rest[self._file.write(rest) :]
            if self._durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise storage_error(error, self._path, len(content)) from error
        self._lines += map(json.loads, lines)  # as a reader of the file has them

    def close(self) -> None:
        self._file.close()


class _Storage(JournalStorage):
    """Hides trials in whose place there is a newer one: pruners are not to compare with them."""

    def __init__(self, journal: _Journal) -> None:
        self.superseded: set[int] = set()
        super().__init__(journal)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = super().get_all_trials(study_id, deepcopy, states)
        return [trial for trial in trials if trial._trial_id not in self.superseded]

"""What a run minimises: a weighted sum of losses, each weight a number or a function of the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from model.errors import InputError
from model.losses.base import Loss
from model.losses.weights import Weight, create_weight, describe_weight, resolve_weight
from model.outputs import Batch, Outputs, Probe, Samples
from model.registry import free_name

# Outputs that a store of the teacher's answers can hold: small, and the same whatever else is in the batch.
STORABLE = frozenset({"logits", "embedding"})
LOGITS = frozenset({"logits", "strong_logits"})
# Outputs that several teachers can give together: what they say of the classes, which are the same for all.
COMBINABLE = frozenset({"logits", "strong_logits"})


class Objective(nn.Module):
    """The sum of losses, each times its weight in the current epoch; of weight 0, a loss is not computed.

    A loss may begin with a stage of its own (`initial_epochs`) in which no other counts. The others count their epochs,
    those of their weights too, from its end.

    Args:
        losses: By their labels: names, numbered where several are of one name.
        weights: As params.json has them, by the same labels; None is the loss's usual one.
        num_epochs: Of the run.

    Raises:
        InputError: The parts cannot stand together.
    """

    def __init__(self, losses: Mapping[str, Loss], weights: Mapping[str, Any], num_epochs: int) -> None:
        super().__init__()
        # What never counts is not even kept: a run with weight 0 is the run without that part.
        weights = {label: resolve_weight(weights[label], loss.usual_weight)[0] for label, loss in losses.items()}
        kept = {label: loss for label, loss in losses.items() if ever_counts(weights[label])}
        if not kept:
            raise InputError(f"every weight is 0 ({', '.join(losses)}): nothing is left to learn; raise one")
        self.losses = nn.ModuleDict(kept)
        self.weights = {label: weights[label] for label in kept}
        stages = {label: loss.initial_epochs for label, loss in kept.items() if loss.initial_epochs}
        if len(stages) > 1:
            raise InputError(f"{' and '.join(stages)} begin with a stage of their own; an objective can have one such")
        self.initial_epochs = max(stages.values(), default=0)
        if self.initial_epochs >= num_epochs > 0:
            [label] = stages
            raise InputError(f"{label}: initial_epochs {self.initial_epochs} is not below num_epochs, {num_epochs}")
        self.curves: dict[str, Weight] = {
            label: create_weight(self.weights[label], num_epochs - self._before(loss)) for label, loss in kept.items()
        }
        self.epoch = 0
        idle = next((epoch for epoch in range(max(num_epochs, 1)) if not any(self._counting(epoch))), None)
        if idle is not None:
            line = f"in epoch {idle + 1} of {num_epochs} every weight is 0 ({', '.join(kept)})"
            raise InputError(f"{line}: nothing would be learnt then; raise one")
        if not any(loss.trains_classifier for loss in kept.values()):
            raise InputError(
                f"{' and '.join(kept)}: nothing here trains the classifier; add the labels' part, such as "
                f'"loss": [{{"name": "ce"}}, {{"name": "{next(iter(kept))}"}}]'
            )
        by_batch = [label for label, loss in self._taught() if loss.teacher_statistics == "batch"]
        if by_batch and len(by_batch) < len(self._taught()):
            raise InputError(
                f"{' and '.join(by_batch)}: normalises the teacher by each batch, which the other losses of a teacher"
                f' must not see; set its teacher_statistics to "running"'
            )

    def parts(self) -> list[tuple[str, Loss]]:
        """Returns the losses that count, with their labels."""
        return list(self.losses.items())  # type: ignore[arg-type]

    def _taught(self) -> list[tuple[str, Loss]]:
        return [(label, loss) for label, loss in self.parts() if loss.needs_teacher]

    # --- what all of them need together ---

    @property
    def needs(self) -> frozenset[str]:
        """Which fields of `Outputs` are read."""
        return frozenset({"logits"}).union(*(loss.needs for _, loss in self.parts()))

    @property
    def teacher_needs(self) -> frozenset[str]:
        """Which fields of the teacher's outputs are read."""
        return frozenset({"logits"}).union(*(loss.teacher_needs for _, loss in self._taught()))

    @property
    def needs_teacher(self) -> bool:
        return bool(self._taught())

    @property
    def needs_labels(self) -> bool:
        """Whether nothing here has a use for images without labels."""
        return all(loss.needs_labels for _, loss in self.parts())

    @property
    def teacher_statistics(self) -> str:
        return "batch" if any(loss.teacher_statistics == "batch" for _, loss in self._taught()) else "running"

    @property
    def can_be_stored(self) -> bool:
        """Whether all that is read of the teacher can be kept in files."""
        return self.teacher_needs <= STORABLE and self.teacher_statistics == "running"

    @property
    def teacher_temperatures(self) -> dict[str, float | None]:
        """See `Loss.teacher_temperature`: that of each loss that has a teacher, by its label."""
        return {label: loss.teacher_temperature for label, loss in self._taught()}

    @property
    def teacher_temperature(self) -> float:
        """The one temperature at which all losses read the teacher's probabilities; 1 where none has a teacher.

        Raises:
            InputError: There is no such temperature.
        """
        found = self.teacher_temperatures
        first = next(iter(found.values()), 1.0)
        if first is None or set(found.values()) - {first}:
            each = [f"{name} has {'no single one' if t is None else f'{t:g}'}" for name, t in found.items()]
            raise InputError(f"needs one temperature, but {' and '.join(each)}")
        return first

    @property
    def equips(self) -> bool:
        """Whether a loss gives the student parts that stay with it for good: see `Loss.equip`."""
        return any(type(loss).equip is not Loss.equip for _, loss in self.parts())

    @property
    def peers(self) -> list[nn.Module]:
        """The nets that learn beside the student."""
        return [peer for _, loss in self.parts() for peer in loss.peers]

    # --- once, before training ---

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        """Makes adapters: see `Loss.attach`."""
        for _, loss in self.parts():
            loss.attach(student, teacher if loss.needs_teacher else None)

    def enrol(self, samples: Samples) -> None:
        """Makes memories: see `Loss.enrol`."""
        for _, loss in self.parts():
            loss.enrol(samples)

    def equip(self, student: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """Returns the net that is trained, and what it is made from: see `Loss.equip`."""
        equipment: dict[str, Any] = {}
        for label, loss in self.parts():
            student, parts = loss.equip(student)
            if parts and equipment:
                raise InputError(f"{label}: another loss has given the student parts already; name one such loss")
            others = [name for name, other in self.parts() if other is not loss and other.needs - LOGITS]
            if parts and others:
                line = f"{label} gives the student other maps than those that {' and '.join(others)} would compare"
                raise InputError(f"{line}; beside it only losses of logits can stand")
            equipment |= parts
        return student, equipment

    # --- in training ---

    def on_epoch(self, epoch: int) -> None:
        """Takes note of the epoch, from 0, that begins."""
        self.epoch = epoch
        for _, loss in self.parts():
            loss.on_epoch(max(epoch - self._before(loss), 0))

    def _before(self, loss: Loss) -> int:
        """Returns how many epochs are over before a loss may count: those of another one's stage."""
        return 0 if loss.initial_epochs else self.initial_epochs

    def _counting(self, epoch: int) -> Iterator[tuple[str, Loss, float]]:
        """Yields the losses that count in an epoch, from 0, with their labels and their weights in it."""
        for label, loss in self.parts():
            first, in_own_stage = self._before(loss), epoch < loss.initial_epochs
            if epoch < first or (loss.initial_only and not in_own_stage):
                continue
            weight = self.curves[label](epoch - first)
            if in_own_stage and loss.initial_weight is not None:
                weight = loss.initial_weight
            if weight:
                yield label, loss, weight

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher's outputs are read in the current epoch."""
        return any(loss.needs_teacher for _, loss, _ in self._counting(self.epoch))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """Returns the weighted terms, whose sum is the objective.

        Those of a loss whose label has a number have it, too, whatever else counts: `kd`, `kd_2`. The teacher is None
        where it is not asked in this epoch.
        """
        terms: dict[str, Tensor] = {}
        for label, loss, weight in self._counting(self.epoch):
            own, other, shown = labelled(student, teacher, batch) if loss.needs_labels else (student, teacher, batch)
            for name, term in loss(own, other if loss.needs_teacher else None, shown).items():
                terms[free_name(name + number_of(label), terms)] = term if weight == 1 else weight * term
        return terms

    def describe(self) -> str:
        """Returns the sum with its effective weights in one line."""
        described = []
        for label, loss in self.parts():
            weight = describe_weight(self.weights[label])
            described.append(loss.describe() if weight == "1" else f"{weight} x [{loss.describe()}]")
        return " + ".join(described)


def ever_counts(weight: float | Mapping[str, Any]) -> bool:
    """Tells whether a complete weight is above 0 in some epoch, be it one that only a longer run would come to."""
    return any(weight.get(key) for key in ("value", "start", "end")) if isinstance(weight, Mapping) else weight > 0


def number_of(label: str) -> str:
    """Returns the number that tells losses of one name apart: `_2` of `kd_2`, nothing of `kd`."""
    _, line, number = label.rpartition("_")
    return line + number if number.isdecimal() else ""


def labelled(student: Outputs, teacher: Outputs | None, batch: Batch) -> tuple[Outputs, Outputs | None, Batch]:
    """Returns the part of a batch that has labels: its first samples."""
    number = len(batch.labels)
    if number == len(batch.images):
        return student, teacher, batch
    return student.first(number), None if teacher is None else teacher.first(number), batch.first(number)

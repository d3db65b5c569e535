"""Several frozen teachers that answer as one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.losses.objective import Objective
from model.outputs import Batch, Outputs
from model.teacher import FrozenTeacher, create_teacher

Combination = Literal["probabilities", "logits"]


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns the weighted mean of several nets' logits, whose softmax is the normalised geometric mean of theirs.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 1: the geometric mean of
    predictive distributions.

    Args:
        logits: `(N, C)` of each net.
        weights: Above 0; they are divided by their sum.
    """
    total = math.fsum(weights)
    return torch.stack([weight / total * each for weight, each in zip(weights, logits, strict=True)]).sum(dim=0)


def mean_probabilities(logits: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Returns logits whose softmax at a temperature is the weighted mean of several nets' at that temperature.

    `T log sum_k w_k softmax(z_k / T)`, in log space: finite however far the logits are apart. At another temperature
    the softmax of the result is not the mean of the softmaxes.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 1: the arithmetic mean of
    predictive distributions.

    Args:
        logits: `(N, C)` of each net.
        weights: Above 0; they are divided by their sum.
        temperature: Above 0.
    """
    total = math.log(math.fsum(weights))
    parts = [
        F.log_softmax(each / temperature, dim=1) + (math.log(weight) - total)
        for weight, each in zip(weights, logits, strict=True)
    ]
    return temperature * torch.logsumexp(torch.stack(parts), dim=0)


class TeacherEnsemble(nn.Module):
    """Teachers that answer as one: a mean of their probabilities, or of their logits.

    Each member keeps its own normalisation, precision and stores; only their answers meet.

    Args:
        members: Teachers of the same classes.
        weights: Their shares, above 0.
        combine: What the mean is of: see `mean_probabilities` and `mean_logits`.
        temperature: At which probabilities are averaged; without use for logits.
    """

    def __init__(
        self,
        members: Sequence[FrozenTeacher],
        weights: Sequence[float],
        combine: Combination = "probabilities",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self._members = nn.ModuleList(members)
        self.weights = list(weights)
        self.combine: Combination = combine
        self.temperature = temperature
        self.train(False)

    @property
    def members(self) -> list[FrozenTeacher]:
        """The teachers, in order."""
        return list(self._members)  # type: ignore[arg-type]

    def of(self, members: Sequence[FrozenTeacher]) -> TeacherEnsemble:
        """Returns the same ensemble of other members, such as faster ones."""
        return TeacherEnsemble(members, self.weights, self.combine, self.temperature)

    @property
    def name(self) -> str:
        return " + ".join(member.name for member in self.members)

    @property
    def num_computed(self) -> int:
        """For how many images a member was asked and its net had to run."""
        return sum(member.num_computed for member in self.members)

    def train(self, mode: bool = True) -> TeacherEnsemble:
        """Stays in eval mode, whatever a surrounding module asks for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.combined([member(images).float() for member in self.members])

    def combined(self, logits: Sequence[Tensor]) -> Tensor:
        """Returns the logits, `(N, C)`, that the members' own come to."""
        if self.combine == "logits":
            return mean_logits(logits, self.weights)
        return mean_probabilities(logits, self.weights, self.temperature)

    @contextlib.contextmanager
    def lesson(self, loader: Any, epoch: int, needs: frozenset[str]) -> Iterator[Callable[[Batch], Outputs]]:
        """Yields what answers for the batches of an epoch of a loader: see `FrozenTeacher.lesson`."""
        with contextlib.ExitStack() as stack:
            asks = [stack.enter_context(member.lesson(loader, epoch, needs)) for member in self.members]
            yield lambda batch: self._answer([ask(batch) for ask in asks])

    def compute(self, needs: frozenset[str], batch: Batch) -> Outputs:
        """Returns what the nets make of a batch; no store is asked."""
        return self._answer([member.compute(needs, batch) for member in self.members])

    def _answer(self, answers: Sequence[Outputs]) -> Outputs:
        strong = [each.strong_logits for each in answers if each.strong_logits is not None]
        logits = self.combined([each.logits for each in answers])
        return Outputs(logits, strong_logits=self.combined(strong) if strong else None)

    def describe(self) -> str:
        """Returns how the answers are combined, for the log."""
        total = math.fsum(self.weights)
        shares = ", ".join(f"{weight / total:.4g}" for weight in self.weights)
        of = "logits" if self.combine == "logits" else f"probabilities at T {self.temperature:g}"
        return f"{len(self.weights)} teachers together, mean of {of} (shares {shares})"


Teacher = FrozenTeacher | TeacherEnsemble


def create_teachers(
    states: Sequence[Mapping[str, Any]],
    sections: Sequence[Mapping[str, Any]],
    student: Mapping[str, Any],
    combine: Combination,
    loss: Objective,
) -> Teacher:
    """Returns the only teacher, or an ensemble of several.

    Args:
        states: The checkpoint of each, at least one.
        sections: The resolved `teacher` section of each.
        student: The student's `net` record: see `create_teacher`.
        combine: See `TeacherEnsemble`.
        loss: What they are for; it says at which temperature probabilities are averaged.

    Raises:
        InputError: It does not say; or a teacher does not fit the student's data.
    """
    members = [create_teacher(state, section, student) for state, section in zip(states, sections, strict=True)]
    return united(members, [section["weight"] for section in sections], combine, loss)


def united(
    members: Sequence[FrozenTeacher], weights: Sequence[float], combine: Combination, loss: Objective
) -> Teacher:
    """Returns the only teacher, or an ensemble of several: see `create_teachers`."""
    if len(members) == 1:
        return members[0]
    return TeacherEnsemble(members, weights, combine, 1.0 if combine == "logits" else loss.teacher_temperature)

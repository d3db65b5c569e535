"""Which stage of the student is to meet which of the teacher, by their numbers or by the size of their maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from model.errors import InputError
from model.losses.base import Loss
from model.outputs import Probe

Shape = tuple[int, int, int]  # channels, height, width
Pairs = list[tuple[int, int]]  # a stage of the student and the teacher's that it meets, both counted from 1
StageList = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class StagedLoss(Loss):
    """A loss that compares stages, of which a subclass has the options.

    Attributes:
        ordered: Whether the pairs must be named from the first to the last.
        pairs: Which stages meet; `attach` makes it of what `Stages.pairs` returns.

    Args:
        student_stages: The student's, counted from 1; None: those that `Stages.pairs` finds.
        teacher_stages: The teacher's that they meet, one by one.

    Raises:
        InputError: They are of different lengths, only one of them is given, a pair is there twice, or they fall.
    """

    ordered: bool = False

    def __init__(self, student_stages: list[int] | None, teacher_stages: list[int] | None) -> None:
        super().__init__()
        if len(student_stages or []) != len(teacher_stages or []):
            lists = f"student_stages {student_stages or 'null'} and teacher_stages {teacher_stages or 'null'}"
            raise InputError(f"{lists} are not of one length; name as many stages of both, or of none")
        pairs = list(zip(student_stages or [], teacher_stages or [], strict=True))
        lists = f"student_stages {student_stages} and teacher_stages {teacher_stages}"
        if len({*pairs}) < len(pairs):
            raise InputError(f"{lists} have a pair twice; name each once")
        if self.ordered and any(a > c or b > d for (a, b), (c, d) in pairwise(pairs)):
            raise InputError(f"{lists} do not rise; name the stages from the first to the last")
        self.student_stages = student_stages
        self.teacher_stages = teacher_stages
        self.pairs: Pairs = []


def paired(
    pairs: Pairs, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the maps of each pair of stages, the student's first."""
    for own, other in pairs:
        yield student_maps[own - 1], teacher_maps[other - 1]


def describe_pairs(pairs: Pairs) -> str:
    """Returns which stages meet, for the log."""
    return f"student stages {[own for own, _ in pairs]} to teacher stages {[other for _, other in pairs]}"


class Side(NamedTuple):
    """What one of the two nets is called, and the shapes of its stages' maps."""

    name: str
    shapes: list[Shape]

    def __str__(self) -> str:
        return f"{self.name} has {', '.join('x'.join(map(str, shape)) for shape in self.shapes) or 'none'}"


class Stages:
    """The stages of a student and a teacher, numbered from 1.

    Args:
        loss: Name of the loss that asks, for messages.
        field: Which maps it reads.
        student, teacher: The nets.

    Raises:
        InputError: One of them does not give such maps.
    """

    def __init__(self, loss: str, field: Literal["features", "preacts"], student: Probe, teacher: Probe) -> None:
        self.loss, self.field = loss, field
        self.student, self.teacher = (
            Side(f"{role} {probe.name!r}", [(*maps.shape[1:],) for maps in getattr(probe.outputs, field)])
            for role, probe in (("student", student), ("teacher", teacher))
        )
        for side in (self.student, self.teacher):
            if not side.shapes:
                raise self.error(f"{side.name} does not give them")

    def error(self, problem: str) -> InputError:
        """Returns the complaint, with what both nets have."""
        return InputError(
            f"loss {self.loss!r} reads the stages' {self.field}: {problem}; {self.student}, {self.teacher};"
            " choose other stages or other nets"
        )

    def shapes(self, student_stage: int, teacher_stage: int) -> tuple[Shape, Shape]:
        """Returns the shapes of the maps of a stage of each.

        Raises:
            InputError: There is no such stage.
        """
        for side, stage in ((self.student, student_stage), (self.teacher, teacher_stage)):
            if stage > len(side.shapes):
                raise self.error(f"{side.name} has no stage {stage}")
        return self.student.shapes[student_stage - 1], self.teacher.shapes[teacher_stage - 1]

    def pairs(
        self,
        student_stages: Sequence[int] | None = None,
        teacher_stages: Sequence[int] | None = None,
        by_size: bool = False,
    ) -> Pairs:
        """Returns which stages meet: those that are named, or else all of nets with as many stages as each other.

        Of nets with different numbers of stages it is the last stage of every map size that both have.

        Args:
            student_stages, teacher_stages: As many of each, or None of both.
            by_size: Where no stages are named, take the last one of every size that both have in any case.

        Raises:
            InputError: A stage does not exist, or no size is common.
        """
        if not student_stages or not teacher_stages:
            if by_size or len(self.student.shapes) != len(self.teacher.shapes):
                return self.of_equal_size()
            return [(number, number) for number in range(1, len(self.student.shapes) + 1)]
        pairs = list(zip(student_stages, teacher_stages, strict=True))
        for pair in pairs:
            self.shapes(*pair)  # refuses one that does not exist
        return pairs

    def of_equal_size(self) -> Pairs:
        """Returns the last stage of each for every height and width that both have, from the first to the last.

        Raises:
            InputError: There is no such size.
        """
        last = {shape[1:]: number for number, shape in enumerate(self.teacher.shapes, start=1)}
        students = {shape[1:]: number for number, shape in enumerate(self.student.shapes, start=1)}
        pairs = [(number, last[size]) for size, number in students.items() if size in last]
        if not pairs:
            raise self.error("they have no height and width in common")
        return pairs

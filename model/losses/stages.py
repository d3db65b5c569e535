"""Which stage of the student is to meet which of the teacher, by their numbers or by the size of their maps."""

from __future__ import annotations

from typing import Literal, NamedTuple

from model.errors import InputError
from model.outputs import Probe

Shape = tuple[int, int, int]  # channels, height, width


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

    def of_equal_size(self) -> list[tuple[int, int]]:
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

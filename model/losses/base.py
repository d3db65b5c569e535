"""The contract that every loss keeps."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from model.outputs import Batch, Outputs, Probe


class Loss(nn.Module):
    """A training objective: weighted terms whose sum is the loss.

    A subclass takes its options as keyword-only parameters. Whatever it trains besides the student is a
    parameter of it, is optimised with the student and checkpointed beside it; the student's weights stay clean.

    Attributes:
        needs: Which fields of `Outputs` it reads, of student and teacher alike.
        needs_teacher: Whether it reads the teacher's outputs at all.
        teacher_statistics: What the teacher's batch norms normalise with: the `running` statistics of its own training,
            or those of the `batch`; its buffers stay as they are either way.
    """

    needs: frozenset[str] = frozenset({"logits"})
    needs_teacher: bool = False
    teacher_statistics: Literal["running", "batch"] = "running"

    def __init__(self) -> None:  # nn.Module's own takes **kwargs: a loss without options would be refused
        super().__init__()

    @property
    def can_be_stored(self) -> bool:
        """Whether what it reads of the teacher is small, and the same whatever else is in the batch."""
        return self.needs <= {"logits", "embedding"} and self.teacher_statistics == "running"

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        """Makes what depends on the nets, such as adapters between their maps; called once, before anything else.

        Raises:
            InputError: The nets do not give what the loss needs, or their shapes cannot be fitted.
        """

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """Returns the weighted terms, each a scalar, for a batch; `teacher` is None iff `needs_teacher` is False."""
        raise NotImplementedError

    def describe(self) -> str:
        """Returns the objective with its effective weights, for the log."""
        raise NotImplementedError

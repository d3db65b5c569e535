"""The contract that every loss keeps."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from model.outputs import Batch, Outputs, Probe, Samples


class Loss(nn.Module):
    """A method: terms whose sum is to become small. The objective of a run is a weighted sum of such losses.

    A subclass takes its options as keyword-only parameters. Whatever it trains besides the student is a
    parameter of it, is optimised with the student and checkpointed beside it; the student's weights stay clean.
    Cross-entropy with the labels is a loss of its own (`ce`), to be named beside a method.

    Attributes:
        needs: Which fields of `Outputs` it reads, of student and teacher alike.
        needs_teacher: Whether it reads the teacher's outputs at all.
        needs_labels: Whether every sample that it is given must have a label: of a batch with unlabelled images it then
            gets only the labelled part.
        usual_weight: Its weight in an objective that does not say another: the published one.
        trains_classifier: Whether the student's classifier learns the classes from it. An objective of which no part
            does that is refused.
        initial_epochs: How many epochs a stage of its own takes, in which no other loss counts; the objective, on
            validation too, is then another function.
        initial_only: Whether it gives nothing after those epochs.
        initial_weight: Its weight in those; None: as in all others.
        processes: Whether the processes of a run may each compute it on their own part of a batch.
        teacher_statistics: What the teacher's batch norms normalise with: the `running` statistics of its own training,
            or those of the `batch`; its buffers stay as they are either way.
        least_at_teacher: Whether its value and its gradient vanish where student and teacher agree. The contract tests
            hold a loss to this, and to the two attributes that follow.
        batch_factor: What its value is multiplied by if every sample of a batch is there twice: 1 for means over
            samples; None where there is no such number.
        order_matters: Whether its value depends on the order of the samples in a batch.
    """

    needs: frozenset[str] = frozenset({"logits"})
    needs_teacher: bool = False
    needs_labels: bool = False
    usual_weight: float = 1.0
    trains_classifier: bool = True
    initial_epochs: int = 0
    initial_only: bool = False
    initial_weight: float | None = None
    processes: bool = True
    teacher_statistics: Literal["running", "batch"] = "running"
    least_at_teacher: bool = True
    batch_factor: float | None = 1.0
    order_matters: bool = False

    def __init__(self) -> None:  # nn.Module's own takes **kwargs: a loss without options would be refused
        super().__init__()
        self.peers = nn.ModuleList()

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher's outputs are read; an objective's answer depends on the epoch."""
        return self.needs_teacher

    @property
    def peer_sections(self) -> list[dict[str, Any]]:
        """Sections of the nets that learn beside the student, if any: the program makes them into `peers`.

        An empty one stands for the student's own net with other initial weights.
        """
        return []

    @property
    def teacher_needs(self) -> frozenset[str]:
        """Which fields of the teacher's outputs are read."""
        return self.needs

    @property
    def teacher_temperature(self) -> float | None:
        """The temperature at which the teacher's logits become probabilities, if they are read as just these.

        None where there are several, where it is learnt, or where the logits themselves count. The probabilities of
        several teachers can be averaged at such a temperature only.
        """
        return getattr(self, "temperature", 1.0)

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        """Makes what depends on the nets, such as adapters between their maps; called once, before anything else.

        Raises:
            InputError: The nets do not give what the loss needs, or their shapes cannot be fitted.
        """

    def enrol(self, samples: Samples) -> None:
        """Makes what depends on the training samples, such as a memory with a row for each; called once.

        Raises:
            InputError: The samples will not do.
        """

    def equip(self, student: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """Returns the net that is trained, where a method gives the student parts that stay with it for good.

        Called once, after `attach`. The second value is what `model.projected.equipped` makes the same parts from when
        the net is restored from a checkpoint; without parts it is empty.
        """
        return student, {}

    def on_epoch(self, epoch: int) -> None:
        """Takes note of the epoch that begins; all that changes with it must follow from it alone.

        It is counted from 0, which is the first one in which the loss may count: see `Objective`.
        """

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """Returns the terms, each a scalar, for a batch; `teacher` is None iff `needs_teacher` is False.

        A term with the name `ce` is cross-entropy with the labels.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """Returns the formula with its effective weights in one line, for the log."""
        raise NotImplementedError

"""Contrast of embeddings: the teacher's of the same sample against many of others, kept in a memory."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from model.errors import InputError
from model.losses import LOSSES
from model.losses.adapters import embedding_widths, unit
from model.losses.base import Loss
from model.outputs import Batch, Outputs, Probe, Samples

EPSILON = 1e-7  # of the reference: it is added to the denominators
# A product with the whole memory costs less than picking the rows of every sample up to this many rows per negative.
DENSE_ROWS = 32


def contrast(scores: Tensor, log_normaliser: Tensor, num_rows: int) -> Tensor:
    """Returns the contrastive loss of scores with one memory, mean over the batch, a scalar.

    With `P = exp(scores) / Z` and `c = K / num_rows` it is the negative mean of
    `log(P_0 / (P_0 + c)) + sum_k log(c / (P_k + c))`, all of it in log space: `exp(scores)` reaches 10^6 at a
    temperature of 0.07.

    Source: Tian, Krishnan and Isola, "Contrastive Representation Distillation", 2020, section 3.1; their code,
    RepDistiller.

    Args:
        scores: `(N, 1 + K)`, inner products divided by the temperature; the first is that of the positive.
        log_normaliser: Logarithm of Z, a scalar.
        num_rows: Rows of the memory.
    """
    odds = (scores.shape[1] - 1) / num_rows
    shift = math.log(odds + EPSILON)
    logits = scores - log_normaliser - shift
    negatives = F.logsigmoid(-logits[:, 1:]).sum(1) + (scores.shape[1] - 1) * (math.log(odds) - shift)
    return -(F.logsigmoid(logits[:, 0]) + negatives).mean()


def products(embedding: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
    """Returns the inner products of each sample's embedding with rows of the memory, which may be changed afterwards.

    Args:
        embedding: `(N, D)`.
        memory: `(R, D)`, without gradient.
        rows: `(N, K)` int64, each sample's own.

    Returns:
        `(N, K)`.
    """
    if len(memory) <= DENSE_ROWS * rows.shape[1]:
        return (embedding @ memory.clone().t()).gather(1, rows)
    return torch.bmm(memory[rows], embedding[:, :, None]).squeeze(2)


def draw(below: Tensor, number: int) -> Tensor:
    """Returns whole numbers drawn evenly from 0 up to a bound, with replacement, on its device.

    Args:
        below: `(N,)` int64, below 2^31.
        number: How many for each bound.

    Returns:
        `(N, number)` int64.
    """
    # Scaled from 2^32 values: the chances of two numbers differ by a share of bound / 2^32 at most.
    drawn = torch.randint(2**32, (len(below), number), device=below.device)
    return drawn.mul_(below[:, None]).bitwise_right_shift_(32)


def evenly(below: Tensor, number: int) -> Tensor:
    """Returns, for each bound, whole numbers spread evenly from 0 up to it: what `draw` returns, without chance."""
    return (2 * torch.arange(number, device=below.device) + 1) * below[:, None] // (2 * number)


@LOSSES.register("crd")
class CRDLoss(Loss):
    """Contrast of linear maps of both embeddings, of length 1, against memories of those of all training samples.

    Each map is contrasted with the other net's memory: the sample's own row is the positive, rows of other samples are
    the negatives. A sample's rows then move towards its new embeddings. On validation samples, which have no row, the
    positive is the other net's embedding of the sample itself, negatives are spread evenly over the rows, and the
    memories stay as they are. The memories take `2 * 4 * dimensions` bytes for each training sample.

    Source: Tian, Krishnan and Isola, "Contrastive Representation Distillation", 2020, section 3.1; the constants Z and
    1e-7 of their code, RepDistiller.
    Deviation: in that code a sample's negatives are all different, unless there are too few. Here they are drawn with
    replacement, on the device: of 49,500 rows, 16,384 draws meet 13,950 different ones, and the sum over them varies
    1.2 times as much around the same mean.

    Args:
        negatives: Negatives of each sample in a step.
        temperature: Divides the inner products.
        momentum: Share of a row that is kept when its sample is seen.
        dimensions: Of the linear maps.
        sampling: `exact` draws negatives from other classes, `relax` from all other samples.
    """

    needs = frozenset({"embedding"})
    needs_teacher = True
    needs_labels = True
    usual_weight = 0.8
    trains_classifier = False
    processes = False  # each would have a memory of its own
    least_at_teacher = False
    batch_factor = None

    student_map: nn.Linear
    teacher_map: nn.Linear
    student_memory: Tensor
    teacher_memory: Tensor
    log_normalisers: Tensor
    has_begun: Tensor
    first_rows: Tensor
    num_rows: Tensor

    def __init__(
        self,
        *,
        negatives: Annotated[int, Field(ge=1)] = 16384,
        temperature: Annotated[float, Field(gt=0)] = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        dimensions: Annotated[int, Field(ge=1)] = 128,
        sampling: Literal["exact", "relax"] = "exact",
    ) -> None:
        super().__init__()
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.dimensions = dimensions
        self.sampling = sampling
        self.register_buffer("log_normalisers", torch.zeros(2))
        self.register_buffer("has_begun", torch.zeros((), dtype=torch.bool))  # whether these are known

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        widths = embedding_widths("crd", student, teacher)
        self.student_map, self.teacher_map = (nn.Linear(width, self.dimensions) for width in widths)

    def enrol(self, samples: Samples) -> None:
        trained = samples.labels >= 0
        labels = samples.labels[trained]
        counts = torch.bincount(labels, minlength=samples.num_classes)
        if self.sampling == "exact" and int(counts.count_nonzero()) < 2:
            raise InputError(
                f"loss 'crd' draws negatives from other classes, but all {len(labels)} training samples are of one;"
                ' add samples, or set its sampling to "relax"'
            )
        if len(labels) < 2:
            raise InputError("loss 'crd' draws negatives from other samples, but there is only one; add samples")
        # Rows stand in the order of classes, so that those of a class are a range that is easily stepped over.
        self.row_of = torch.full((len(samples.labels),), -1)
        self.row_of[trained.nonzero()[:, 0][labels.argsort(stable=True)]] = torch.arange(len(labels))
        self.register_buffer("first_rows", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("num_rows", counts, persistent=False)
        bound = 1 / math.sqrt(self.dimensions / 3)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(len(labels), self.dimensions).uniform_(-bound, bound))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        own = unit(self.student_map(student.embedding), dim=1)
        other = unit(self.teacher_map(teacher.embedding), dim=1)
        if not self.training:
            negatives = self.negatives_of(batch.labels, None)
            return {"crd": self.loss_of(own, other, negatives, positive=(own * other).sum(1, keepdim=True))}
        found = self.row_of[batch.indices]  # on the CPU, where a check waits for nothing
        if bool((found < 0).any()):
            raise ValueError("crd was given samples that were not enrolled")
        rows = found.to(own.device, non_blocking=True)
        negatives = self.negatives_of(batch.labels, rows)
        loss = self.loss_of(own, other, torch.cat([rows[:, None], negatives], dim=1))
        self.remember(own, other, rows)
        return {"crd": loss}

    def negatives_of(self, labels: Tensor, rows: Tensor | None) -> Tensor:
        """Returns the rows of each sample's negatives, `(N, K)`.

        Args:
            labels: `(N,)`.
            rows: `(N,)`, the samples' own; None: they have none, and the negatives are not drawn, but spread evenly.
        """
        total = len(self.student_memory)
        if self.sampling == "exact":
            first, number = self.first_rows[labels], self.num_rows[labels]
        elif rows is not None:
            first, number = rows, torch.ones_like(rows)
        else:
            first, number = torch.zeros_like(labels), torch.zeros_like(labels)
        left = (evenly if rows is None else draw)(total - number, self.negatives)
        return left + number[:, None] * (left >= first[:, None])  # steps over what is not to be drawn

    def loss_of(self, own: Tensor, other: Tensor, rows: Tensor, positive: Tensor | None = None) -> Tensor:
        """Returns the loss of embeddings, `(N, D)` each, of length 1.

        Args:
            own: Of the student, contrasted with the teacher's memory.
            other: Of the teacher, contrasted with the student's.
            rows: `(N, 1 + K)` of both memories, the positive's first.
            positive: `(N, 1)`, its product, if it has no row.
        """
        total, losses = len(self.student_memory), []
        for side, (embedding, memory) in enumerate(((own, self.teacher_memory), (other, self.student_memory))):
            found = products(embedding, memory, rows)
            scores = (found if positive is None else torch.cat([positive, found], dim=1)) / self.temperature
            # Z makes the mean of the first batch's P the chance of a row, 1 / num_rows; then it stays.
            log_mean = scores.detach().logsumexp((0, 1)) - math.log(scores.numel())
            log_normaliser = torch.where(self.has_begun, self.log_normalisers[side], log_mean + math.log(total))
            if self.training:
                self.log_normalisers[side] = log_normaliser
            losses.append(contrast(scores, log_normaliser, total))
        if self.training:
            self.has_begun.fill_(True)
        return losses[0] + losses[1]

    @torch.no_grad()
    def remember(self, own: Tensor, other: Tensor, rows: Tensor) -> None:
        """Moves the rows of a batch towards the embeddings of its samples, each of which is there once."""
        for embedding, memory in ((own, self.student_memory), (other, self.teacher_memory)):
            moved = self.momentum * memory[rows] + (1 - self.momentum) * embedding
            memory.index_copy_(0, rows, unit(moved, dim=1))

    def describe(self) -> str:
        origin = "other classes" if self.sampling == "exact" else "all other samples"
        return (
            f"CRD of {self.dimensions} dimensions with {self.negatives} negatives from {origin}"
            f" (T {self.temperature:g}, momentum {self.momentum:g}), mean over the batch"
        )

"""Distillation of softened logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.base import Loss
from model.losses.logits import standardised
from model.outputs import Batch, Outputs

Divergence = Literal["kl", "cross_entropy", "mse_probabilities", "mse_logits"]
Reduction = Literal["batchmean", "mean"]


def kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Returns `sum p_t (log p_t - log p_s)`; both sides from log_softmax, so that gaps of hundreds stay finite."""
    student_log_probs = F.log_softmax(student_logits, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits, dim=1)
    return F.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True)


def cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Returns `-sum p_t log p_s`: the KL divergence plus the teacher's entropy, so of the same gradient."""
    return -(F.softmax(teacher_logits, dim=1) * F.log_softmax(student_logits, dim=1)).sum()


def mse_probabilities(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Returns `sum (p_s - p_t)^2 / 2`."""
    return (F.softmax(student_logits, dim=1) - F.softmax(teacher_logits, dim=1)).square().sum() / 2


def mse_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Returns `sum (z_s - z_t)^2`."""
    return (student_logits - teacher_logits).square().sum()


# Each takes logits that are divided by the temperature, and sums over samples and classes.
DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "cross_entropy": cross_entropy,
    "mse_probabilities": mse_probabilities,
    "mse_logits": mse_logits,
}


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor,
    reduction: Reduction = "batchmean",
    divergence: Divergence = "kl",
    temperature_squared: bool = True,
) -> Tensor:
    """Returns `T^2 * D(teacher / T, student / T)`, a scalar; by default D is `KL(softmax(.) || softmax(.))`.

    The factor T^2 keeps the gradient's size about the same whatever the temperature. The teacher's side is not
    detached here.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.

    Args:
        student_logits: `(N, C)`.
        teacher_logits: `(N, C)`.
        temperature: Above 0; a tensor is one number, and gets its gradient, that of the factor T^2 included.
        reduction: `batchmean` is D summed over classes and averaged over the batch. `mean` divides by the number of
            classes as well, as kl_div's default does and the ancestor did.
        divergence: D, a key of `DIVERGENCES`.
        temperature_squared: False leaves the factor T^2 out.
    """
    if student_logits.shape != teacher_logits.shape:  # kl_div would broadcast a teacher batch of one in silence
        raise ValueError(f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}")
    total = DIVERGENCES[divergence](student_logits / temperature, teacher_logits / temperature)
    total = total * ((temperature**2 if temperature_squared else 1) / len(student_logits))
    return total / student_logits.shape[1] if reduction == "mean" else total


@LOSSES.register("kd")
class KDLoss(Loss):
    """`(1 - alpha) * CE(student, labels) + alpha * T^2 * KL(teacher || student)`; a term of weight 0 is not computed.

    This loss brings its own share of cross-entropy; with `alpha` 1 it is the teacher term alone, to be combined with
    others. Images without labels count in the teacher term only.

    With `standardise` its authors take T 2, a weight of 9 for the teacher term and 0.1 for the labels (CIFAR-100):
    `[{"name": "ce", "weight": 0.1}, {"name": "kd", "alpha": 1, "temperature": 2, "standardise": true, "weight": 9}]`.
    Where a student's logits are constant over the classes, its gradient is then of the order of a million (see
    `model/losses/logits.py`): do not let the classifier begin at zero.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2; `mse_logits`:
    Ba and Caruana, "Do Deep Nets Really Need to be Deep?", 2014, section 2.2; the noise: Sau and Balasubramanian,
    "Deep Model Compression: Distilling Knowledge from Noisy Teachers", 2016; `standardise`: Sun et al., "Logit
    Standardization in Knowledge Distillation", 2024, section 4.
    Deviation: Hinton et al. leave the weights open; here they sum to 1, the cross-entropy at temperature 1. Sau and
    Balasubramanian multiply the logits by 1 plus the noise; here it is added to them.

    Args:
        alpha: Weight of the teacher term; `1 - alpha` weighs the labels.
        temperature: Divides both networks' logits before the softmax; higher means softer targets.
        reduction: `batchmean` is the divergence averaged over the batch; `mean` also divides it by the number of
            classes, as the ancestor's code did and as is usual for squared differences.
        alpha_of: `hard` reads alpha the other way round: it weighs the labels, and `1 - alpha` the teacher term.
        divergence: What is between teacher and student: `kl`; `cross_entropy` with the softened teacher, which has
            the same gradient; `mse_probabilities`, half the squared difference of softened probabilities;
            `mse_logits`, the squared difference of logits divided by T, which with T^2 does not depend on T.
        temperature_squared: Multiply the teacher term by T^2; without it the term fades as the temperature rises.
        standardise: Replace both networks' logits by their z-scores, sample by sample, before the temperature.
        teacher_noise_std: Standard deviation of Gaussian noise added to the teacher's logits in training.
        teacher_noise_probability: Share of the samples that get the noise, drawn anew at each step.
    """

    def __init__(
        self,
        *,
        alpha: Annotated[float, Field(ge=0, le=1)],
        temperature: Annotated[float, Field(gt=0, le=1000)],
        reduction: Reduction = "batchmean",
        alpha_of: Literal["teacher", "hard"] = "teacher",
        divergence: Divergence = "kl",
        temperature_squared: bool = True,
        standardise: bool = False,
        teacher_noise_std: Annotated[float, Field(ge=0)] = 0.0,
        teacher_noise_probability: Annotated[float, Field(gt=0, le=1)] = 1.0,
    ) -> None:
        super().__init__()
        self.alpha = alpha if alpha_of == "teacher" else 1 - alpha
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.alpha_of = alpha_of
        self.divergence: Divergence = divergence
        self.temperature_squared = temperature_squared
        self.standardise = standardise
        self.teacher_noise_std = teacher_noise_std
        self.teacher_noise_probability = teacher_noise_probability
        self.needs_teacher = self.alpha > 0
        self.needs_labels = not self.needs_teacher
        self.least_at_teacher = divergence != "cross_entropy"

    @property
    def teacher_temperature(self) -> float | None:
        # Squared differences are of the logits themselves, and of z-scores each sample has a temperature of its own.
        return None if self.standardise or self.divergence == "mse_logits" else self.temperature

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        if self.alpha < 1:
            labelled = student.logits[: len(batch.labels)]  # the first samples of a batch that is partly unlabelled
            terms["ce"] = (1 - self.alpha) * F.cross_entropy(labelled, batch.labels)
        if self.needs_teacher:
            assert teacher is not None, "without it a part of the loss would be missing in silence"
            prepared = standardised if self.standardise else lambda logits: logits
            terms["kd"] = self.alpha * kd_loss(
                prepared(student.logits),
                prepared(self.with_noise(teacher.logits)),
                self.temperature,
                self.reduction,
                self.divergence,
                self.temperature_squared,
            )
        return terms

    def with_noise(self, logits: Tensor) -> Tensor:
        """Returns the teacher's logits as training is to see them; in eval mode, as they are."""
        if not self.training or self.teacher_noise_std == 0:
            return logits
        chosen = torch.rand(len(logits), 1, device=logits.device) < self.teacher_noise_probability
        return logits + self.teacher_noise_std * torch.randn_like(logits) * chosen

    def describe(self) -> str:
        name = {
            "kl": "KL",
            "cross_entropy": "soft CE",
            "mse_probabilities": "squared difference of probabilities / 2",
            "mse_logits": "squared difference of (logits / T)",
        }[self.divergence]
        squared = self.temperature**2 if self.temperature_squared else 1
        given = f"alpha {self.alpha:g}" if self.alpha_of == "teacher" else f"alpha {1 - self.alpha:g} of the labels"
        factor = "T^2" if self.temperature_squared else "no T^2"
        over = "batch" if self.reduction == "batchmean" else "batch, of the teacher term over the classes, too"
        line = (
            f"CE x {1 - self.alpha:.4g} + {name} x {self.alpha:.4g} x {squared:.4g}"
            f" ({given}, {factor} at T {self.temperature:g}), mean over the {over}"
        )
        if self.standardise:
            line += "; logits standardised"
        if self.teacher_noise_std == 0:
            return line
        share = f"{self.teacher_noise_probability:.4g} of the samples"
        return f"{line}; in training N(0, {self.teacher_noise_std:g}^2) on the teacher's logits of {share}"

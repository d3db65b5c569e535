"""Distillation at several temperatures and levels: samples, pairs of samples, pairs of classes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.base import Loss
from model.outputs import Batch, Outputs

Mask = Literal["code", "paper"]
FURTHER_TEMPERATURES = (3.0, 5.0, 2.0, 6.0)  # besides the one that is an option
STRONG_TEMPERATURES = (3.0, 5.0)  # of the strong view, besides that one
DOUBLED_TEMPERATURES = (2.0, 6.0)  # at which the weak view counts once more, without a mask


def divergences(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Returns `T^2 KL(p_t || p_s)` of each sample, `(N,)`."""
    own, other = (F.log_softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    return temperature**2 * (other.exp() * (other - own)).sum(dim=1)


def class_correlations(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Returns the squared difference of `P'P`, the row of each class, `(C,)`; P the `(N, C)` probabilities at T.

    Their mean is `|P_t'P_t - P_s'P_s|^2 / C`. There is no factor T^2, and the values grow with the batch's square.
    """
    own, other = (F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    return (other.T @ other - own.T @ own).square().sum(dim=1)


def batch_correlations(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Returns the squared difference of `PP'`, the row of each sample, `(N,)`; P the `(N, C)` probabilities at T.

    Their mean is `|P_tP_t' - P_sP_s'|^2 / N`. There is no factor T^2, and the values grow with the batch.
    """
    own, other = (F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    return (other @ other.T - own @ own.T).square().sum(dim=1)


def masks(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which samples, `(N,)`, and which classes, `(C,)`, the teacher is less sure of, as 0 and 1.

    Those whose largest probability, or sum of probabilities in the batch, is not above the median.
    """
    probs = F.softmax(teacher_logits, dim=1)
    confidence, presence = probs.amax(dim=1), probs.sum(dim=0)
    # Of an even number the lower middle one: no value is between it and the middle of the two.
    return tuple((values <= values.median()).to(values.dtype) for values in (confidence, presence))  # type: ignore[return-value]


def mlkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_strong: Tensor,
    teacher_strong: Tensor,
    temperature: float = 4.0,
    mask: Mask = "code",
) -> Tensor:
    """Returns the sum of the divergences of samples, classes and pairs of samples, a scalar.

    With `KD`, `CC` and `BC` the means of the three functions above, w and s the weak and the strong view,
    and T over the temperature, 3, 5, 2 and 6:
    `sum_T m KD_w(T) + KD_s(temperature) + KD_s(3) + KD_s(5) + KD_w(2) + KD_w(6) + sum_T m_c CC_w(T) + sum_T m BC_w(T)`.

    Source: Jin, Wang and Lin, "Multi-Level Logit Distillation", 2023, section 3, and the authors' code.

    Args:
        student_logits: `(N, C)`, of the weak view.
        teacher_logits: `(N, C)`, of the weak view.
        student_strong: `(N, C)`, of the strong view.
        teacher_strong: `(N, C)`, of the strong view.
        temperature: The first of the temperatures.
        mask: What m and m_c are: see `MLKDLoss`.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)}")
    of_samples, of_classes = masks(teacher_logits)

    def masked(values: Tensor, chosen: Tensor) -> Tensor:
        return chosen.mean() * values.mean() if mask == "code" else (chosen * values).mean()

    weak, strong = (student_logits, teacher_logits), (student_strong, teacher_strong)
    loss = student_logits.new_zeros(())
    for each in (temperature, *FURTHER_TEMPERATURES):
        loss = loss + masked(divergences(*weak, each), of_samples)
        loss = loss + masked(class_correlations(*weak, each), of_classes)
        loss = loss + masked(batch_correlations(*weak, each), of_samples)
    for each in (temperature, *STRONG_TEMPERATURES):
        loss = loss + divergences(*strong, each).mean()
    for each in DOUBLED_TEMPERATURES:
        loss = loss + divergences(*weak, each).mean()
    return loss


@LOSSES.register("mlkd")
class MLKDLoss(Loss):
    """`alpha` * (divergences of samples, classes and pairs of samples, at five temperatures) + `ce_weight` * CE.

    The temperatures are `temperature`, 3, 5, 2 and 6. Per temperature and over the weak view: T^2 KL, the squared
    difference of the class-by-class matrices of summed products of probabilities over C, and that of the
    sample-by-sample matrices over N. Over the strong view: T^2 KL at `temperature`, 3 and 5; at 2 and 6 the weak view
    counts once more, as in the authors' code. Without a second view in the data the only one stands for both. The
    matrices' parts grow with the batch: the authors have batches of 64, weak views as usual and strong ones of
    RandAugment, a learning rate of 0.025 and 480 epochs. Of several processes each takes the samples of its own part.

    Cross-entropy of both views is a part of the method: name no `ce` beside it.

    Source: Jin, Wang and Lin, "Multi-Level Logit Distillation", 2023, section 3, and the authors' code.
    Deviation: none from the code with `mask` "code"; the parts of the strong view's matrices, which the code computes
    and drops, are not computed.

    Args:
        temperature: The first of the five temperatures.
        alpha: Weight of the teacher's part.
        ce_weight: Weight of the sum of both views' cross-entropies with the labels.
        mask: Each masked part belongs to the samples (or classes) of which the teacher's confidence is not above the
            batch's median. With `code` it is the mean of all, times the share of those, about 1/2, as the authors'
            code has it, by which nothing is selected; with `paper` the others count as 0.
    """

    needs = frozenset({"logits", "strong_logits"})
    needs_teacher = True
    needs_labels = True
    teacher_temperature = None  # there are five
    batch_factor = None

    def __init__(
        self,
        *,
        temperature: Annotated[float, Field(gt=0, le=1000)] = 4.0,
        alpha: Annotated[float, Field(gt=0)] = 0.9,
        ce_weight: Annotated[float, Field(ge=0)] = 0.1,
        mask: Mask = "code",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.alpha = alpha
        self.ce_weight = ce_weight
        self.mask: Mask = mask

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        assert student.strong_logits is not None
        assert teacher.strong_logits is not None
        terms = {}
        if self.ce_weight > 0:
            weak, strong = (F.cross_entropy(each, batch.labels) for each in (student.logits, student.strong_logits))
            terms["ce"] = self.ce_weight * (weak + strong)
        views = student.logits, teacher.logits, student.strong_logits, teacher.strong_logits
        loss = mlkd_loss(*views, self.temperature, self.mask)
        return terms | {"mlkd": self.alpha * loss}

    def describe(self) -> str:
        temperatures = ", ".join(f"{each:g}" for each in (self.temperature, *FURTHER_TEMPERATURES))
        return (
            f"(CE of the weak + CE of the strong view) x {self.ce_weight:.4g} + (KL x T^2 + class and batch matrices,"
            f" at T {temperatures}) x {self.alpha:.4g}, masks as in the {self.mask}, mean over the batch"
        )

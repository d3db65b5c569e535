"""Measures of a net: from its logits, and from its structure."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


def expected_calibration_error(logits: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Returns the mean gap between confidence and accuracy, in [0, 1], over bins of equal width, weighed by their size.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017, section 2. Bins are (low, high].

    Args:
        logits: `(N, C)`.
        labels: `(N,)`.
        num_bins: Number of bins over confidences in (0, 1].
    """
    confidence, predicted = F.softmax(logits.double(), dim=1).max(dim=1)
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    gaps = (predicted == labels).double() - confidence
    # |sum of gaps in a bin| / N is the bin's share times its mean gap.
    return torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, gaps).abs().sum().item() / len(labels)


def calibrated_temperature(logits: Tensor, labels: Tensor) -> float:
    """Returns the temperature in [0.01, 100] at which softmax(logits / T) has the least negative log-likelihood.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4.2, temperature scaling. In 1 / T the
    likelihood is concave, so there is one optimum; where no label is missed it is at 0, and any small T will do.

    Args:
        logits: `(N, C)`, of samples that were not trained on.
        labels: `(N,)`.
    """
    from scipy.optimize import minimize_scalar  # here, not above: most runs do not calibrate

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits.double() / math.exp(log_temperature), labels).item()

    bounds = math.log(0.01), math.log(100)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Returns counts `(C, C)`: rows are true classes, columns predicted ones."""
    cells = labels * num_classes + predicted
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, float]:
    """Returns how closely the student follows the teacher.

    Returns:
        `teacher_agreement`, the share of samples for which both choose the same class, and `teacher_kl`, the mean of
        KL(teacher || student) at temperature 1, in nats.
    """
    same = (student_logits.argmax(1) == teacher_logits.argmax(1)).double().mean().item()
    student, teacher = (F.log_softmax(z.double(), dim=1) for z in (student_logits, teacher_logits))
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True).item()
    return {"teacher_agreement": same, "teacher_kl": kl}


def count_parameters(net: nn.Module) -> int:
    """Returns the number of trainable and frozen parameters; buffers do not count."""
    return sum(parameter.numel() for parameter in net.parameters())


def count_macs(net: nn.Module, shape: Sequence[int]) -> int:
    """Returns the multiply-accumulate operations of convolutions and matrix products for one image.

    Args:
        net: Returns logits.
        shape: `(C, H, W)` of an image.
    """
    # On the meta device nothing is computed and the net itself is left alone.
    dummy = copy.deepcopy(net).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dummy(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


def weight_bytes(net: nn.Module) -> int:
    """Returns the size of the net's weights and buffers, which is about that of a file with nothing else."""
    return sum(value.numel() * value.element_size() for value in net.state_dict().values())

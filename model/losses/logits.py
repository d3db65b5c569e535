"""What several losses do with logits: standardise them, or leave the label's class out."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from model.errors import Notice
from model.outputs import Probe

EPSILON = 1e-7


def notice_two_classes(loss: str, student: Probe) -> None:
    """Warns of two classes: there is one class besides the label, and what compares those is constant."""
    if student.outputs.logits.shape[1] == 2:
        line = f"loss {loss!r}: of two classes, its part of the other classes is constant and teaches nothing"
        warnings.warn(line, Notice, stacklevel=2)


def standardised(logits: Tensor) -> Tensor:
    """Returns each sample's logits minus their mean, divided by `1e-7 + std` over the classes (std with C - 1).

    What is left of two networks' logits are their shapes: neither shift nor positive scale of either one matters.

    Beware of logits that are constant over the classes, as of a classifier that begins at zero: there the derivative
    of this is up to 1e7 in each direction, and a gradient of usual size becomes one of a million. Nothing here clips
    it: begin with another classifier.

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", 2024, section 4, and the authors' code, from
    which the 1e-7 is.

    Args:
        logits: `(N, C)`, C at least 2.
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (EPSILON + logits.std(dim=1, keepdim=True))


def is_label(labels: Tensor, num_classes: int) -> Tensor:
    """Returns `(N, C)` bool, True at each sample's label; unlike `one_hot` it never looks at values on the host."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)


def non_target_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns `(N, C)`, the log-softmax over all classes but the label's, and 0 in the label's place.

    The label takes no part in the sum, so that nothing overflows or is rounded away however certain the network is.

    Args:
        logits: `(N, C)`, C at least 2.
        labels: `(N,)`.
    """
    target = is_label(labels, logits.shape[1])
    return F.log_softmax(logits.masked_fill(target, -torch.inf), dim=1).masked_fill(target, 0)

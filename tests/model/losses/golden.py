"""Values of reference implementations, and the inputs in closed form that they are of.

`kd_golden.json` holds, for each case, the bare method term in float64 and a fingerprint of its gradient with respect to
the student's input. All arrays here are float64 unless told otherwise; indices count from 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.losses.base import Loss
from model.outputs import Batch, Outputs

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "kd_golden.json").read_text())
BATCH, CLASSES = 8, 10
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


# --- inputs ---------------------------------------------------------------------------------------------------


def student_logits(dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns `3 sin(.7i + 1.3j + .1ij)`, `(8, 10)`, a leaf with gradient."""
    i, j = np.arange(BATCH)[:, None], np.arange(CLASSES)[None]
    return torch.tensor(3 * np.sin(0.7 * i + 1.3 * j + 0.1 * i * j), dtype=dtype, requires_grad=True)


def teacher_logits(dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns `4 cos(.9i - .5j + .05ij)`, `(8, 10)`."""
    i, j = np.arange(BATCH)[:, None], np.arange(CLASSES)[None]
    return torch.tensor(4 * np.cos(0.9 * i - 0.5 * j + 0.05 * i * j), dtype=dtype)


def golden_logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Returns the student's logits, a leaf with gradient, and the teacher's."""
    return student_logits(dtype), teacher_logits(dtype)


def golden_labels() -> Tensor:
    """Returns `(3i + 1) mod 10`, `(8,)`."""
    return (3 * torch.arange(BATCH) + 1) % CLASSES


def maps(c: int, h: int, a: float, A: float) -> Tensor:
    """Returns `A sin(a(b+1) + .3k(y+1) + .17x(k+1) + .05bx)`, `(8, c, h, h)`, b sample, k channel, y row, x column."""
    b, k, y, x = np.ogrid[:BATCH, :c, :h, :h]
    values = A * np.sin(a * (b + 1) + 0.3 * k * (y + 1) + 0.17 * x * (k + 1) + 0.05 * b * x)
    return torch.tensor(values, dtype=torch.float64)


def student_maps(c: int = 4, h: int = 6) -> Tensor:
    """Returns the student's map of most cases, a leaf with gradient."""
    return maps(c, h, 0.5, 1).requires_grad_()


def teacher_maps(c: int = 6, h: int = 6) -> Tensor:
    """Returns the teacher's map of most cases."""
    return maps(c, h, 0.8, 1.5)


def emb_s(d: int = 12) -> Tensor:
    """Returns `sin(.4i + .9j + .07ij)`, `(8, d)`, a leaf with gradient."""
    i, j = np.arange(BATCH)[:, None], np.arange(d)[None]
    return torch.tensor(np.sin(0.4 * i + 0.9 * j + 0.07 * i * j), dtype=torch.float64, requires_grad=True)


def emb_t(d: int = 16) -> Tensor:
    """Returns `2 cos(.6i - .3j + .03ij)`, `(8, d)`."""
    i, j = np.arange(BATCH)[:, None], np.arange(d)[None]
    return torch.tensor(2 * np.cos(0.6 * i - 0.3 * j + 0.03 * i * j), dtype=torch.float64)


def fill_tensor(tensor: Tensor, k: int = 0) -> None:
    """Writes `.3 sin(.37n + k)` into a tensor, n its flattened index; for modules with an order of their own."""
    values = 0.3 * np.sin(0.37 * np.arange(tensor.numel()) + k)
    with torch.no_grad():
        tensor.copy_(torch.tensor(values, dtype=torch.float64).view(tensor.shape))


def fill(module: nn.Module) -> nn.Module:
    """Makes a module float64 and fills its k-th parameter, in the order of definition, with `.3 sin(.37n + k)`."""
    module.double()
    for k, parameter in enumerate(module.parameters()):
        fill_tensor(parameter, k)
    return module


# --- checks ---------------------------------------------------------------------------------------------------


def check_golden(case: str, loss: Tensor, student: Tensor, tolerance: float | None = None) -> None:
    """Compares a loss, and its gradient with respect to the student's input, with an entry of kd_golden.json.

    Args:
        case: The entry.
        loss: A scalar.
        student: The leaf that the loss was computed from; its `grad` is left alone.
        tolerance: Relative; of the gradient's sum and first entries, relative to its norm. None: that of the dtype.
    """
    golden = GOLDEN[case]
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    tolerance = TOLERANCES[student.dtype] if tolerance is None else tolerance
    norm = golden["grad_l2"]
    assert loss.shape == ()
    assert loss.dtype == student.dtype
    assert loss.item() == pytest.approx(golden["loss"], rel=tolerance)
    assert gradient.norm().item() == pytest.approx(norm, rel=tolerance)
    assert gradient.sum().item() == pytest.approx(golden["grad_sum"], abs=tolerance * norm)
    assert gradient.flatten()[:3].tolist() == pytest.approx(golden["grad_first3"], abs=tolerance * norm)


def check_golden_logits(case: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Compares a function of the student's and the teacher's logits with an entry, in float64 and in float32."""
    for dtype in TOLERANCES:
        student, teacher = golden_logits(dtype)
        check_golden(case, function(student, teacher), student)


# --- what a loss is called with -------------------------------------------------------------------------------


def batch_of(labels: Tensor, size: int | None = None) -> Batch:
    """Returns a batch with these labels; of a larger size, its last samples have none."""
    size = len(labels) if size is None else size
    indices = torch.arange(size)
    return Batch(torch.zeros(size, 3, 1, 1), labels, indices, torch.zeros_like(indices))


def terms_of(loss: Loss, student: Tensor, teacher: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    """Returns what a loss of logits makes of them; of logits with more rows than labels, the last have none."""
    return loss(Outputs(student), None if teacher is None else Outputs(teacher), batch_of(labels, len(student)))


# --- numpy ----------------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def central_difference(function: Callable[[float], float], at: float, step: float = 1e-5) -> float:
    """Returns the slope of a function of one number, to `O(step^2)`."""
    return (function(at + step) - function(at - step)) / (2 * step)

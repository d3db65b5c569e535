"""What makes the outputs of two nets comparable: convolutions between maps, sizes, norms, widths of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.errors import InputError
from model.losses.stages import Shape
from model.outputs import Probe


def fitting(student: Shape, teacher: Shape) -> nn.Module | None:
    """Returns the convolution that makes maps of the teacher's shape from the student's; None if there is none.

    It halves the size, multiplies it by a whole number, or takes off the difference without padding.

    Source: RepDistiller, the regressor of its hint loss; there maps are enlarged to twice their size only.
    """
    (student_channels, *student_size), (teacher_channels, *teacher_size) = student, teacher
    channels = student_channels, teacher_channels
    # Without biases: a batch norm follows.
    if student_size == [2 * size for size in teacher_size]:
        return nn.Conv2d(*channels, 3, stride=2, padding=1, bias=False)
    ratio = teacher_size[0] // student_size[0]
    if ratio > 1 and [ratio * size for size in student_size] == teacher_size:
        margin = ratio // 2
        kernel = ratio + 2 * margin  # each response reaches half a step into its neighbours
        return nn.ConvTranspose2d(*channels, kernel, stride=ratio, padding=margin, bias=False)
    height, width = (own - other + 1 for own, other in zip(student_size, teacher_size, strict=True))
    return nn.Conv2d(*channels, (height, width), bias=False) if min(height, width) > 0 else None


def match_sizes(student_maps: Tensor, teacher_maps: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both, the larger one average-pooled to the smaller one's height and width.

    Args:
        student_maps: `(N, C, H, W)`.
        teacher_maps: `(N, C', H', W')`.
    """
    sizes = student_maps.shape[2:], teacher_maps.shape[2:]
    height, width = (min(pair) for pair in zip(*sizes, strict=True))
    return pooled(student_maps, height, width), pooled(teacher_maps, height, width)


def pooled(maps: Tensor, height: int, width: int) -> Tensor:
    """Returns `(N, C, H, W)` maps average-pooled to a smaller or an equal size; windows may differ by one in size."""
    if maps.shape[2:] == (height, width):
        return maps
    rows, columns = maps.shape[2] // height, maps.shape[3] // width
    if maps.shape[2:] == (rows * height, columns * width):  # the same, and on CUDA its gradient is deterministic
        return F.avg_pool2d(maps, (rows, columns))
    return F.adaptive_avg_pool2d(maps, (height, width))


def unit(vectors: Tensor, dim: int, eps: float = 1e-12) -> Tensor:
    """Returns vectors divided by their L2 norm along a dimension; those of a norm up to `eps` become constant zeros.

    Dividing by `eps` instead would give them a gradient 1e12 times that of others: finite, but no step survives it.
    """
    norms = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / torch.where(norms > eps, norms, torch.inf)


def embedding_widths(loss: str, student: Probe, teacher: Probe) -> tuple[int, int]:
    """Returns the number of features in the input of each net's classifier.

    Args:
        loss: Name of the loss that asks, for messages.
        student, teacher: The nets.

    Raises:
        InputError: One of them does not give such an input.
    """
    widths = []
    for role, probe in (("student", student), ("teacher", teacher)):
        if probe.outputs.embedding is None:
            raise InputError(
                f"loss {loss!r} reads the embedding, the classifier's input: {role} {probe.name!r} does not give it;"
                " choose another net"
            )
        widths.append(probe.outputs.embedding.shape[1])
    return widths[0], widths[1]

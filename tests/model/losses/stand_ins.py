"""Nets as a loss sees them, without the nets: shapes to attach it to, and outputs of given maps and embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.errors import InputError
from model.losses import LOSSES
from model.losses.stages import Shape
from model.outputs import Batch, Outputs, Probe

CLASSES = 5


def created(name: str, **options: Any) -> Any:
    """Returns a loss as params.json would have it."""
    section, problems = LOSSES.resolve({"name": name, **options})
    if problems:
        raise InputError(str(problems))
    return LOSSES.create(section)


def probe_of(name: str, *shapes: Shape, field: str = "features", width: int | None = None) -> Probe:
    """Returns a net that gives maps of these shapes and, with a width, an embedding."""
    maps = tuple(torch.empty(1, *shape, device="meta") for shape in shapes)
    embedding = None if width is None else torch.empty(1, width, device="meta")
    logits = torch.empty(1, CLASSES, device="meta")
    return Probe(name, nn.Identity(), Outputs(logits, embedding=embedding, **{field: maps}))


def outputs_of(*features: Tensor, embedding: Tensor | None = None) -> Outputs:
    """Returns outputs of these maps or this embedding, with logits of no meaning."""
    [size] = {len(tensor) for tensor in (*features, *([] if embedding is None else [embedding]))}
    return Outputs(torch.zeros(size, CLASSES), features=features, embedding=embedding)


def any_batch(size: int) -> Batch:
    """Returns a batch of which nothing should be read."""
    indices = torch.arange(size)
    return Batch(torch.zeros(size, 3, 1, 1), torch.zeros_like(indices), indices, torch.zeros_like(indices))


def maps_of(*shape: int, seed: int = 0, size: int = 6) -> Tensor:
    """Returns normal float64 values, `(size, *shape)`, a leaf with gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, *shape, dtype=torch.float64, generator=generator).requires_grad_()


def turned(vectors: Tensor) -> Tensor:
    """Returns the rows, all rotated by the same matrix."""
    generator = torch.Generator().manual_seed(3)
    width = vectors.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(width, width, dtype=vectors.dtype, generator=generator))
    return vectors @ rotation


class _Sizes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@contextmanager
def largest_tensor() -> Iterator[_Sizes]:
    """Notes the number of entries of the largest tensor that is made, also by a backward."""
    with _Sizes() as sizes:
        yield sizes

"""What a net hands to a loss, and what a loader hands to both."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Outputs:
    """The outputs of a net on one batch; what a loss has not asked for may be missing.

    Attributes:
        logits: `(N, C)`.
        features: A map `(N, C_i, H_i, W_i)` for each stage, after the stage's last activation.
        preacts: The same maps before that activation.
        embedding: `(N, D)`, the input of the classifier.
    """

    logits: Tensor
    features: tuple[Tensor, ...] = field(default=())
    preacts: tuple[Tensor, ...] = field(default=())
    embedding: Tensor | None = None

    def float(self) -> Outputs:
        """Returns the same outputs in float32: losses are computed in full precision under autocast."""
        return Outputs(
            self.logits.float(),
            tuple(m.float() for m in self.features),
            tuple(m.float() for m in self.preacts),
            None if self.embedding is None else self.embedding.float(),
        )

    def shapes(self) -> Outputs:
        """Returns the same outputs on the meta device: shapes without values."""

        def bare(values: Tensor) -> Tensor:
            return torch.empty(values.shape, device="meta")

        return Outputs(
            bare(self.logits),
            tuple(map(bare, self.features)),
            tuple(map(bare, self.preacts)),
            None if self.embedding is None else bare(self.embedding),
        )


@dataclass(frozen=True)
class Probe:
    """A net and the shapes that it makes, for a loss that must fit something between two of them.

    Attributes:
        name: The net, for messages.
        net: The net itself, on its device; for reading.
        outputs: What it makes of one image, on the meta device: shapes `(1, ...)` and no values.
    """

    name: str
    net: nn.Module
    outputs: Outputs


@dataclass(frozen=True)
class Batch:
    """A batch of samples under the view that their epoch gives them.

    Attributes:
        images: `(N, C, H, W)` float32, augmented and normalised.
        labels: `(N,)` int64.
        indices: `(N,)` int64 on the CPU, so that nothing waits for the device when something is looked up by them: the
            samples' positions in the dataset's own training (or test) list, whatever part of it was drawn.
        views: `(N,)` int64 on the CPU, which of the augmentation's views each image shows; 0 is the plain image, -1 a
            view out of too many to be numbered.
        share: What part of the step's samples these are, if other processes have the rest.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    views: Tensor
    share: float = 1.0

    def part(self, rows: Tensor) -> Batch:
        """Returns the samples at `rows`, `(n,)` int64 on the CPU, with images channels last as they were."""
        placed = rows.to(self.images.device, non_blocking=True)
        images = self.images[placed].contiguous(memory_format=torch.channels_last)
        return Batch(images, self.labels[placed], self.indices[rows], self.views[rows])


def outputs_of(net: nn.Module, images: Tensor, needs: frozenset[str]) -> Outputs:
    """Runs a net and returns what a loss needs of it, in float32."""
    if needs <= {"logits"}:
        return Outputs(net(images).float())
    return net.forward_with_features(images).float()  # type: ignore[operator]

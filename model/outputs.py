"""What a net hands to a loss, and what a loader hands to both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.taps import listen, taps_of

NET_FIELDS = frozenset({"logits", "features", "preacts", "embedding"})  # of `Outputs`: what a net itself gives


@dataclass(frozen=True)
class Outputs:
    """The outputs of a net on one batch; what a loss has not asked for may be missing.

    Attributes:
        logits: `(N, C)`.
        features: A map `(N, C_i, H_i, W_i)` for each stage, after the stage's last activation.
        preacts: The same maps before that activation.
        embedding: `(N, D)`, the input of the classifier.
        strong_logits: `(N, C)`, the logits of the same samples under their second view; the logits of the only view
            where a batch has one.
        peer_logits: Of the student's outputs: `(N, C)` of each net that learns beside it, with its gradient.
    """

    logits: Tensor
    features: tuple[Tensor, ...] = field(default=())
    preacts: tuple[Tensor, ...] = field(default=())
    embedding: Tensor | None = None
    strong_logits: Tensor | None = None
    peer_logits: tuple[Tensor, ...] = field(default=())

    def map(self, function: Callable[[Tensor], Tensor]) -> Outputs:
        """Returns the same outputs, each tensor as a function makes it."""

        def mapped(value: Any) -> Any:
            if value is None:
                return None
            return tuple(map(function, value)) if isinstance(value, tuple) else function(value)

        return Outputs(**{name: mapped(value) for name, value in vars(self).items()})

    def float(self) -> Outputs:
        """Returns the same outputs in float32: losses are computed in full precision under autocast."""
        return self.map(Tensor.float)

    def shapes(self) -> Outputs:
        """Returns the same outputs on the meta device: shapes without values."""
        return self.map(lambda values: torch.empty(values.shape, device="meta"))

    def first(self, number: int) -> Outputs:
        """Returns the outputs of the first samples."""
        return self.map(lambda values: values[:number])


@dataclass(frozen=True)
class Probe:
    """A net and the shapes that it makes, for a loss that must fit something between two of them.

    Attributes:
        name: The net, for messages.
        net: The net itself, on its device; for reading.
        outputs: What it makes of one image, on the meta device: shapes `(1, ...)` and no values.
        shape: `(C, H, W)` of that image; empty if there was none.
    """

    name: str
    net: nn.Module
    outputs: Outputs
    shape: tuple[int, ...] = ()

    def taps(self) -> str:
        """Returns which layers are the net's stages, with the shapes of their maps; nothing if it gives its own."""
        shapes = ("x".join(map(str, maps.shape[1:])) for maps in self.outputs.features)
        return ", ".join(f"{path} ({shape})" for path, shape in zip(taps_of(self.net), shapes, strict=False))


@dataclass(frozen=True)
class Batch:
    """A batch of samples under the view that their epoch gives them.

    Attributes:
        images: `(N, C, H, W)` float32, augmented and normalised.
        labels: `(N,)` int64; in a batch that is partly unlabelled shorter: of its first samples.
        indices: `(N,)` int64 on the CPU, so that nothing waits for the device when something is looked up by them: the
            samples' positions in the dataset's own training (or test) list, whatever part of it was drawn; -1 for
            unlabelled ones.
        views: `(N,)` int64 on the CPU, which of the augmentation's views each image shows; 0 is the plain image, -1 a
            view out of too many to be numbered.
        share: What part of the step's samples these are, if other processes have the rest.
        strong_images: The same samples under their second view, if they have one.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    views: Tensor
    share: float = 1.0
    strong_images: Tensor | None = None

    def part(self, rows: Tensor) -> Batch:
        """Returns the samples at `rows`, `(n,)` int64 on the CPU, with images channels last as they were."""
        placed = rows.to(self.images.device, non_blocking=True)
        images = self.images[placed].contiguous(memory_format=torch.channels_last)
        return Batch(images, self.labels[placed], self.indices[rows], self.views[rows])

    def first(self, number: int) -> Batch:
        """Returns the first samples."""
        strong = None if self.strong_images is None else self.strong_images[:number]
        parts = self.images[:number], self.labels[:number], self.indices[:number], self.views[:number]
        return Batch(*parts, self.share, strong)


@dataclass(frozen=True)
class Samples:
    """What a run trains on, for a loss that keeps something of each sample.

    Attributes:
        labels: `(N,)` int64 on the CPU, by position in the dataset's own training list (as in `Batch.indices`); -1 for
            samples that the run does not train on.
        num_classes: Number of classes.
    """

    labels: Tensor
    num_classes: int


def answers(run: Callable[[Tensor, frozenset[str]], Outputs], batch: Batch, needs: frozenset[str]) -> Outputs:
    """Returns what a loss needs of a net for a batch: under the samples' views and, if it asks for that, their second.

    Args:
        run: Returns a net's outputs for images, as `outputs_of(net, ...)` does.
        batch: The batch.
        needs: Fields of `Outputs`.
    """
    outputs = run(batch.images, needs & NET_FIELDS)
    if "strong_logits" not in needs:
        return outputs
    second = batch.strong_images
    strong = outputs.logits if second is None else run(second, frozenset({"logits"})).logits
    return replace(outputs, strong_logits=strong)


def outputs_of(net: nn.Module, images: Tensor, needs: frozenset[str]) -> Outputs:
    """Runs a net and returns what a loss needs of it, in float32; what it does not need is let go of at once."""
    if needs <= {"logits"}:
        return Outputs(net(images).float())
    told = features_of(net, images)
    features, preacts = (getattr(told, name) if name in needs else () for name in ("features", "preacts"))
    return Outputs(told.logits, features, preacts, told.embedding if "embedding" in needs else None).float()


def features_of(net: nn.Module, images: Tensor) -> Outputs:
    """Runs a net and returns all that it tells: the maps are its own, or those of its taps, without preacts then.

    Raises:
        TapError: A tapped layer is not there, or it gives no map.
    """
    own: Callable[[Tensor], Outputs] | None = getattr(net, "forward_with_features", None)
    if own is None:
        logits, maps, embedding = listen(net, net, images)
        return Outputs(logits, maps, (), embedding)
    if not taps_of(net):
        return own(images)
    outputs, maps, _ = listen(net, own, images)
    return Outputs(outputs.logits, maps, (), outputs.embedding)

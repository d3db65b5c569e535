"""The frozen teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FrozenTeacher(nn.Module):
    """A net that answers and never learns: always in eval mode, no gradient, no graph, buffers untouched.

    `no_grad` and not `inference_mode`: tensors of the latter cannot be saved for a student's backward.

    Args:
        net: Takes images normalised with its own training set's constants.
        mean, std: The constants that the images given to `forward` are normalised with, per channel.
        net_mean, net_std: The constants that `net` was trained with.
    """

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        net_mean: Sequence[float] = (),
        net_std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        self.same_input = list(mean) == list(net_mean) and list(std) == list(net_std)
        if not self.same_input:
            a, b, c, d = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std, net_mean, net_std))
            self.register_buffer("scale", b / d, persistent=False)
            self.register_buffer("shift", (a - c) / d, persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode, whatever a surrounding module asks for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.net(self._own_view(images))

    @torch.no_grad()
    def forward_with_features(self, images: Tensor):  # type: ignore[no-untyped-def]
        return self.net.forward_with_features(self._own_view(images))

    def _own_view(self, images: Tensor) -> Tensor:
        return images if self.same_input else images * self.scale + self.shift

"""Weights for comparing a net of ours with the same net put together from other parts."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn


def randomise(net: nn.Module) -> nn.Module:
    """Puts a net into eval mode and float64 and draws all that it holds, so that nothing is neutral; returns it."""
    generator = torch.Generator().manual_seed(0)
    net.double().eval()
    for key, value in net.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            value.normal_(std=1 if value.ndim == 1 else (2 / value[0].numel()) ** 0.5, generator=generator)
    return net


def copy_in_order(source: nn.Module, target: nn.Module, skip: Container[str] = ()) -> None:
    """Copies each tensor of a net into the one at its place in another, in which those named in `skip` do not count."""
    targets = [value for key, value in target.state_dict().items() if key not in skip]
    for value, place in zip(source.state_dict().values(), targets, strict=True):
        assert value.shape == place.shape
        place.copy_(value)

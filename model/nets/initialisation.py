"""Initial weights: those that a user asks for, and those that the published CIFAR nets share."""

from __future__ import annotations

from torch import nn


def he_normal_by_fan_out(net: nn.Module) -> None:
    """Draws the weights of every convolution from N(0, 2 / (kernel area * output channels)).

    Source: He et al., "Delving Deep into Rectifiers", 2015, equation 14; the groups of a convolution do not count.

    Args:
        net: Changed in place.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def initialise(net: nn.Module, init: str) -> None:
    """Draws the weights of every convolution and linear layer anew and sets their biases to 0.

    Source: he: He et al., "Delving Deep into Rectifiers", 2015, equation 10; xavier: Glorot and Bengio,
    "Understanding the difficulty of training deep feedforward neural networks", 2010, section 4.2.1.

    Args:
        net: Changed in place.
        init: `he` N(0, 2 / fan_in), `xavier` N(0, 2 / (fan_in + fan_out)), or `normal` N(0, 0.02^2).
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if init == "he":
                nn.init.kaiming_normal_(module.weight)
            elif init == "xavier":
                nn.init.xavier_normal_(module.weight)
            else:
                nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

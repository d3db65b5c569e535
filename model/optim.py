"""Optimisers, and schedules that are pure functions of the position in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from model.registry import Registry

LearningRate = Annotated[float, Field(gt=0, le=1000)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0, le=10)]
Factor = Callable[[float], float]  # position in epochs, from 0 -> factor on the base learning rate


def schedule_options(
    *,
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0,
    per: Literal["epoch", "iteration"] = "epoch",
) -> None:
    """Options of every schedule.

    Args:
        warmup_epochs: Linear warm-up in front of the schedule, in epochs; the first step is not 0.
        per: Change the rate once an `epoch` or at every `iteration`.
    """


OPTIMIZERS = Registry("optimizer")
SCHEDULES = Registry("schedule", common=schedule_options)


def create_optimizer(section: Mapping[str, Any], parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the optimizer that a resolved section names, for the parameters that require a gradient."""
    return OPTIMIZERS.create(section, [p for p in parameters if p.requires_grad])


@OPTIMIZERS.register("sgd")
def sgd(
    parameters: list[nn.Parameter],
    *,
    learning_rate: LearningRate,
    momentum: Rate = 0.9,
    nesterov: bool = False,
    weight_decay: Decay = 0.0,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent.

    Args:
        learning_rate: Base learning rate; the schedule multiplies it.
        momentum: Share of the last step that is kept.
        nesterov: Nesterov's look-ahead; needs a momentum.
        weight_decay: L2 penalty, added to the gradient of every parameter.
    """
    return torch.optim.SGD(
        parameters, learning_rate, momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True
    )


@OPTIMIZERS.register("adam")
def adam(
    parameters: list[nn.Parameter],
    *,
    learning_rate: LearningRate,
    beta1: Rate = 0.9,
    beta2: Rate = 0.999,
    weight_decay: Decay = 0.0,
) -> torch.optim.Optimizer:
    """Adam.

    Source: Kingma and Ba, "Adam", 2015.

    Args:
        learning_rate: Base learning rate; the schedule multiplies it.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        weight_decay: L2 penalty, added to the gradient.
    """
    return torch.optim.Adam(parameters, learning_rate, (beta1, beta2), weight_decay=weight_decay, fused=True)


@OPTIMIZERS.register("adamw")
def adamw(
    parameters: list[nn.Parameter],
    *,
    learning_rate: LearningRate,
    beta1: Rate = 0.9,
    beta2: Rate = 0.999,
    weight_decay: Decay = 0.01,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.

    Args:
        learning_rate: Base learning rate; the schedule multiplies it.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        weight_decay: Share of a weight taken off per step, times the learning rate.
    """
    return torch.optim.AdamW(parameters, learning_rate, (beta1, beta2), weight_decay=weight_decay, fused=True)


class Schedule:
    """Sets an optimizer's learning rates for a position in training.

    It keeps no state: the rate at (epoch, step) is the same whether or not the run was resumed on the way.

    Args:
        optimizer: Its groups' rates at this moment are the base rates.
        factor: Position in epochs -> factor.
        steps_per_epoch: Iterations in an epoch.
        warmup_epochs: Linear warm-up before `factor` takes over; positions go on being counted from the start.
        per: `epoch` or `iteration`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factor: Factor,
        steps_per_epoch: int,
        warmup_epochs: float = 0.0,
        per: str = "epoch",
    ) -> None:
        self.optimizer = optimizer
        self.factor = factor
        self.steps_per_epoch = steps_per_epoch
        self.warmup_epochs = warmup_epochs
        self.per = per
        self.base = [group["lr"] for group in optimizer.param_groups]

    def factor_at(self, epoch: int, step: int) -> float:
        """Returns the factor for a step (from 0) of an epoch (from 0)."""
        unit = 1.0 if self.per == "epoch" else 1 / self.steps_per_epoch
        position = float(epoch) if self.per == "epoch" else epoch + step * unit
        if position < self.warmup_epochs:
            return min(1.0, (position + unit) / self.warmup_epochs)
        return self.factor(position)

    def set(self, epoch: int, step: int) -> None:
        """Sets the learning rates for a step; to be called before it."""
        factor = self.factor_at(epoch, step)
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * factor


def create_schedule(
    section: Mapping[str, Any], optimizer: torch.optim.Optimizer, num_epochs: int, steps_per_epoch: int
) -> Schedule:
    """Returns the schedule that a resolved section names."""
    _, common = SCHEDULES.split(section)
    factor = SCHEDULES.create(section, num_epochs, common["warmup_epochs"])
    return Schedule(optimizer, factor, steps_per_epoch, **common)


@SCHEDULES.register("constant")
def constant(num_epochs: int, warmup_epochs: float) -> Factor:
    """The base learning rate throughout."""
    return lambda position: 1.0


@SCHEDULES.register("step")
def step(
    num_epochs: int,
    warmup_epochs: float,
    *,
    step_size: Annotated[int, Field(ge=1)],
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1,
) -> Factor:
    """A drop every `step_size` epochs.

    Args:
        step_size: Epochs between drops; the first is after `step_size` epochs.
        gamma: Factor of each drop.
    """
    return lambda position: gamma ** (int(position) // step_size)


@SCHEDULES.register("multistep")
def multistep(
    num_epochs: int,
    warmup_epochs: float,
    *,
    milestones: list[Annotated[int, Field(ge=1)]],
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1,
) -> Factor:
    """A drop after each of the given numbers of epochs.

    Args:
        milestones: After how many epochs the rate drops, counted from the start of training.
        gamma: Factor of each drop.
    """
    return lambda position: gamma ** sum(position >= milestone for milestone in milestones)


@SCHEDULES.register("cosine")
def cosine(
    num_epochs: int,
    warmup_epochs: float,
    *,
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0,
) -> Factor:
    """Half a cosine from the base rate down to `final_factor` of it, over the epochs after the warm-up.

    Source: Loshchilov and Hutter, "SGDR", 2017, equation 5, without restarts.

    Args:
        final_factor: Share of the base rate that the curve ends at.
    """
    span = max(num_epochs - warmup_epochs, 1e-9)

    def factor(position: float) -> float:
        done = min(1.0, (position - warmup_epochs) / span)
        return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * done)) / 2

    return factor

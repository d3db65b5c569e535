"""Optimisers, and schedules that are functions of the position in training."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from model.registry import Milestones, Problem, Registry

LearningRate = Annotated[float, Field(gt=0, le=1000)]
LowestRate = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0, le=10)]
Epochs = Annotated[float, Field(ge=1e-6)]
Drop = Annotated[float, Field(gt=0, le=1)]


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
    optimizer = torch.optim.SGD(
        parameters, learning_rate, momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True
    )
    if momentum:
        # The fused step would allocate them without a value, and leave them so if fp16 overflows in the first step.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


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


@OPTIMIZERS.register("rmsprop")
def rmsprop(
    parameters: list[nn.Parameter],
    *,
    learning_rate: LearningRate,
    smoothing: Rate = 0.99,
    momentum: Rate = 0.0,
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8,
    weight_decay: Decay = 0.0,
) -> torch.optim.Optimizer:
    """RMSprop, with momentum on the normalised gradient.

    Source: Tieleman and Hinton, "Lecture 6.5: rmsprop", 2012.

    Args:
        learning_rate: Base learning rate; the schedule multiplies it.
        smoothing: Decay of the mean of squared gradients.
        momentum: Share of the last step that is kept.
        epsilon: Added to the root of that mean.
        weight_decay: L2 penalty, added to the gradient.
    """
    return torch.optim.RMSprop(parameters, learning_rate, smoothing, epsilon, weight_decay, momentum, foreach=True)


class Curve:
    """A learning rate over training: a function of the position and, in a subclass, of what it observed.

    Positions are in epochs from 0, and exact: no rounding puts one on the wrong side of a drop.

    Args:
        rate: (position, base rate) -> rate.
        phase: Position -> a number; where it changes, the optimizer begins anew.
    """

    def __init__(
        self, rate: Callable[[Fraction, float], float], phase: Callable[[Fraction], int] = lambda position: 0
    ) -> None:
        self.rate = rate
        self.phase = phase

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Takes note of an epoch's validation metrics."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what it keeps of its observations, in plain types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


class Schedule:
    """Prepares an optimizer for a position in training.

    All that it does at (epoch, step) follows from these two and from `state_dict`, which only `observe` changes: it is
    the same whether or not the run was resumed on the way.

    Args:
        optimizer: Its groups' rates at this moment are the base rates.
        curve: What the rates follow.
        steps_per_epoch: Iterations in an epoch.
        warmup_epochs: Linear warm-up before `curve` takes over; positions go on being counted from the start.
        per: `epoch` or `iteration`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        curve: Curve,
        steps_per_epoch: int,
        warmup_epochs: Fraction,
        per: str,
    ) -> None:
        self.optimizer = optimizer
        self.curve = curve
        self.steps_per_epoch = steps_per_epoch
        self.warmup_epochs = warmup_epochs
        self.stride = steps_per_epoch if per == "epoch" else 1  # iterations from one change of the rate to the next
        self.base = [group["lr"] for group in optimizer.param_groups]

    def set(self, epoch: int, step: int) -> None:
        """Sets the learning rates for a step (from 0) of an epoch (from 0); to be called before it.

        Where a new phase of the curve begins, the optimizer begins anew.
        """
        iteration = epoch * self.steps_per_epoch + step
        position = self._position(iteration)
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = self._rate(position, base)
        if iteration > 0 and self.curve.phase(position) != self.curve.phase(self._position(iteration - 1)):
            begin_anew(self.optimizer)

    def observe(self, record: Mapping[str, Any]) -> None:
        """Takes note of an epoch, to be called after its validation.

        Args:
            record: Its number from 1 as `epoch`, its validation metrics as `val`. The warm-up's epochs are ignored.
        """
        if record["epoch"] > self.warmup_epochs:
            self.curve.observe(record["val"])

    def state_dict(self) -> dict[str, Any]:
        """Returns what it keeps of its observations, in plain types; nothing, if only the position counts."""
        return self.curve.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.curve.load_state_dict(state)

    def _position(self, iteration: int) -> Fraction:
        return Fraction(iteration // self.stride * self.stride, self.steps_per_epoch)

    def _rate(self, position: Fraction, base: float) -> float:
        if position < self.warmup_epochs:
            end = position + Fraction(self.stride, self.steps_per_epoch)
            return base * float(min(end / self.warmup_epochs, Fraction(1)))
        return self.curve.rate(position, base)


def begin_anew(optimizer: torch.optim.Optimizer) -> None:
    """Sets an optimizer's state to zeros: each of `OPTIMIZERS` begins with these, or does what comes to the same."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def exact(epochs: float) -> Fraction:
    """Returns the number as it was written: 2.4 is 12/5, not the nearest binary fraction."""
    return Fraction(str(epochs))


def create_schedule(
    section: Mapping[str, Any], optimizer: torch.optim.Optimizer, num_epochs: int, steps_per_epoch: int
) -> Schedule:
    """Returns the schedule that a resolved section names."""
    _, common = SCHEDULES.split(section)
    common["warmup_epochs"] = exact(common["warmup_epochs"])
    curve = SCHEDULES.create(section, num_epochs, common["warmup_epochs"])
    return Schedule(optimizer, curve, steps_per_epoch, **common)


def check(optimizer: Mapping[str, Any], schedule: Mapping[str, Any], num_epochs: int) -> Iterator[Problem]:
    """Yields what no single option of the two resolved sections shows."""
    if optimizer.get("nesterov") and not optimizer["momentum"]:
        yield "optimizer.nesterov", "needs a momentum above 0"
    warmup = schedule["warmup_epochs"]
    if warmup > num_epochs > 0:
        yield "schedule.warmup_epochs", f"{warmup:g} is above num_epochs, {num_epochs}"
    lowest, base = schedule.get("min_learning_rate", 0), optimizer.get("learning_rate", math.inf)
    if lowest >= base:
        yield "schedule.min_learning_rate", f"{lowest:g} is not below optimizer.learning_rate, {base:g}"


@SCHEDULES.register("constant")
def constant(num_epochs: int, warmup_epochs: Fraction) -> Curve:
    """The base learning rate throughout."""
    return Curve(lambda position, base: base)


@SCHEDULES.register("step")
def step(
    num_epochs: int,
    warmup_epochs: Fraction,
    *,
    step_size: Epochs,
    gamma: Drop = 0.1,
    reset_momentum: bool = False,
) -> Curve:
    """A drop every `step_size` epochs.

    Args:
        step_size: Epochs between drops, such as 2.4; the first comes that long after the start of training.
        gamma: Factor of each drop.
        reset_momentum: With each drop the optimizer forgets its momentum and means, as if it were a new one.
    """
    size = exact(step_size)
    return dropping(lambda position: position // size, gamma, reset_momentum)


@SCHEDULES.register("multistep")
def multistep(
    num_epochs: int,
    warmup_epochs: Fraction,
    *,
    milestones: Milestones,
    gamma: Drop = 0.1,
    reset_momentum: bool = False,
) -> Curve:
    """A drop after each of the given numbers of epochs.

    Args:
        milestones: After how many epochs the rate drops, from the start of training, in rising order.
        gamma: Factor of each drop.
        reset_momentum: With each drop the optimizer forgets its momentum and means, as if it were a new one.
    """
    return dropping(lambda position: bisect_right(milestones, position), gamma, reset_momentum)


def dropping(drops: Callable[[Fraction], int], gamma: float, reset_momentum: bool) -> Curve:
    """Returns the curve of a rate that has dropped by `gamma` as often as `drops` says."""

    def rate(position: Fraction, base: float) -> float:
        return base * gamma ** drops(position)

    return Curve(rate, drops) if reset_momentum else Curve(rate)


@SCHEDULES.register("cosine")
def cosine(
    num_epochs: int,
    warmup_epochs: Fraction,
    *,
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0,
    period_epochs: Epochs | None = None,
) -> Curve:
    """Half a cosine from the base rate down to `final_factor` of it; it begins where the warm-up ends.

    Source: Loshchilov and Hutter, "SGDR", 2017, equation 5, without restarts.

    Args:
        final_factor: Share of the base rate that the curve falls to.
        period_epochs: Epochs from the base rate down to the lowest; then the rate swings back up, and so on. `null`:
            all epochs after the warm-up.
    """
    period = exact(period_epochs) if period_epochs else num_epochs - warmup_epochs

    def rate(position: Fraction, base: float) -> float:
        done = (position - warmup_epochs) / period
        left = half_cosine(done if period_epochs else min(done, Fraction(1)))
        return base * (final_factor + (1 - final_factor) * left)

    return Curve(rate)


@SCHEDULES.register("warm_restarts")
def warm_restarts(
    num_epochs: int,
    warmup_epochs: Fraction,
    *,
    first_cycle_epochs: Epochs,
    cycle_factor: Annotated[int, Field(ge=1)] = 1,
    min_learning_rate: LowestRate = 0.0,
) -> Curve:
    """Cycles of half a cosine, each from the base rate down; the first begins where the warm-up ends.

    Source: Loshchilov and Hutter, "SGDR", 2017, section 3.

    Args:
        first_cycle_epochs: Epochs from the start of the first cycle to the first restart.
        cycle_factor: How many times as long as the last each further cycle is.
        min_learning_rate: The rate that each cycle falls towards.
    """
    first = exact(first_cycle_epochs)

    def rate(position: Fraction, base: float) -> float:
        done, length = position - warmup_epochs, first
        if cycle_factor == 1:
            done %= length
        while done >= length:
            done, length = done - length, length * cycle_factor
        return min_learning_rate + (base - min_learning_rate) * half_cosine(done / length)

    return Curve(rate)


def half_cosine(done: Fraction) -> float:
    """Returns the share that is left: from 1 where `done` is 0 to 0 where it is 1, and at 2 it is 1 again."""
    return (1 + math.cos(math.pi * done)) / 2


@SCHEDULES.register("plateau")
class Plateau(Curve):
    """A drop whenever a validation metric has stopped improving; the epochs of a warm-up do not count.

    Args:
        factor: Factor of each drop.
        patience: Epochs in a row without an improvement that are borne; the next one brings the drop.
        threshold: An improvement is one by more than this share of the best value.
        metric: `val.loss` improves downwards, `val.accuracy` upwards.
        min_learning_rate: The rate falls no lower.
    """

    def __init__(
        self,
        num_epochs: int,
        warmup_epochs: Fraction,
        *,
        factor: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        patience: Annotated[int, Field(ge=0)] = 10,
        threshold: Annotated[float, Field(ge=0, lt=1)] = 1e-4,
        metric: Literal["val.loss", "val.accuracy"] = "val.loss",
        min_learning_rate: LowestRate = 0.0,
    ) -> None:
        super().__init__(lambda position, base: max(base * factor**self.drops, min_learning_rate))
        self.patience = patience
        self.threshold = threshold
        self.metric = metric.removeprefix("val.")
        self.sign = -1 if self.metric == "loss" else 1
        self.best: float | None = None
        self.waited = 0
        self.drops = 0

    def observe(self, metrics: Mapping[str, float]) -> None:
        value = self.sign * metrics[self.metric]
        if self.best is None or value > self.best + self.threshold * abs(self.best):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited > self.patience:
            self.drops, self.waited = self.drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "drops": self.drops}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited, self.drops = state["best"], state["waited"], state["drops"]

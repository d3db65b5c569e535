"""The loop: objects in, a dict of floats out. Opens no file, logs nothing, reads no global."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.errors import DivergedError, InputError
from model.losses.base import Loss
from model.optim import Schedule
from model.outputs import Batch, Outputs, Probe
from model.rng import derive_seed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Loader(Sized, Protocol):
    """What the loop needs of a data loader: the batches of an epoch from a step on."""

    def epoch(self, epoch: int, start: int = 0) -> Iterable[Batch]: ...


def choose_device(name: str) -> torch.device:
    """Returns the device for `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, ...

    Raises:
        InputError: The name is no device, or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("known are cpu, cuda and mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"--device {name}: cannot be used: {why}; name another, such as cpu", "usage") from None
    return device


NetT = TypeVar("NetT", bound=nn.Module)


def place(net: NetT, device: torch.device) -> NetT:
    """Moves a net to where it runs, channels last: the layout that batches have, and the fastest for convolutions."""
    return net.to(device).to(memory_format=torch.channels_last)


def device_name(device: torch.device) -> str:
    """Returns what to call a device in a record: the model of a GPU, else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_precision(name: str, device: torch.device) -> str:
    """Returns `fp32`, `bf16` or `fp16`; `auto` is bf16 where the device computes in it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Not public, so it may go: then bf16 is to be asked for by name.
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if device.type == "cpu" and capable() else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which nets run forward; losses stay outside of it, in float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def outputs_of(net: nn.Module, images: Tensor, needs: frozenset[str]) -> Outputs:
    """Runs a net and returns what a loss needs of it, in float32."""
    if needs <= {"logits"}:
        return Outputs(net(images).float())
    return net.forward_with_features(images).float()  # type: ignore[operator]


def probe(net: nn.Module, name: str, shape: Sequence[int]) -> Probe:
    """Shows a net one image of a shape `(C, H, W)` on the meta device; nothing is computed.

    Raises:
        InputError: The net does not take it; with the net's own reason.
    """
    dummy = copy.deepcopy(net).to("meta").eval()
    image = torch.empty(1, *shape, device="meta")
    try:
        with torch.no_grad():
            tell = getattr(dummy, "forward_with_features", lambda images: Outputs(dummy(images)))
            outputs = tell(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "x".join(map(str, shape))
        why = str(error).partition("\n")[0]
        raise InputError(f"net {name!r} does not take the dataset's images of {size}: {why}") from None
    return Probe(name, net, outputs)


@dataclass
class Learner:
    """Everything that training changes.

    Attributes:
        student: The net that learns.
        loss: The objective, with whatever it trains besides the student.
        optimizer: Over the parameters of both.
        schedule: Of the optimizer's learning rate.
        precision: fp32, bf16 or fp16.
        frozen_norms: Batch norms of the student that stay in eval mode.
    """

    student: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    precision: str = "fp32"
    frozen_norms: Sequence[nn.Module] = ()
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        # Only fp16's range is so short that gradients vanish without a scale.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors and plain types from which `load_state_dict` restores the very same learner.

        Raises:
            DivergedError: A weight is not finite: no such state may be kept.
        """
        for name, value in [*self.student.state_dict().items(), *self.loss.state_dict().items()]:
            if not torch.isfinite(value).all():
                raise DivergedError(f"the weights of {name} are not finite; {LOWER}")
        return {
            "state_dict": self.student.state_dict(),
            "loss_dict": self.loss.state_dict(),
            "optim_dict": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.student.load_state_dict(state["state_dict"])
        self.loss.load_state_dict(state["loss_dict"])
        self.optimizer.load_state_dict(state["optim_dict"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


LOWER = "lower the learning rate, or add a warm-up, and begin anew with --restart"


class Totals:
    """Sums over samples that stay on the device; reading them out is the only synchronisation.

    Args:
        device: Where the sums live.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.samples = 0
        self.steps = 0

    def add(self, counts: Mapping[str, Tensor], means: Mapping[str, Tensor], samples: int) -> None:
        """Adds a batch of `samples`: counts of samples, which stay whole numbers, and means over them."""
        # MPS has no float64.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        values = {**{k: v.to(dtype) for k, v in counts.items()}, **{k: v.to(dtype) * samples for k, v in means.items()}}
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach()
        self.samples += samples
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Returns means over all samples so far.

        Raises:
            DivergedError: One of them is not finite.
        """
        if not self.sums:
            return {}
        values = (torch.stack(list(self.sums.values())) / self.samples).tolist()
        means = dict(zip(self.sums, values, strict=True))
        bad = [name for name, value in means.items() if not abs(value) < float("inf")]
        if bad:
            raise DivergedError(f"training diverged: {', '.join(bad)} became not finite; {LOWER}")
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "samples": self.samples, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.samples, self.steps = state["samples"], state["steps"]


def train_epoch(
    learner: Learner,
    loader: Loader,
    *,
    epoch: int,
    seed: int,
    teacher: nn.Module | None = None,
    totals: Totals | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Trains for one epoch, or for the rest of one.

    Dropout and every other random choice of the nets are a function of (seed, epoch, step).

    Args:
        learner: The student and what trains it.
        loader: The training set.
        epoch: From 0.
        seed: The run's seed.
        teacher: Runs on the very batch that the student sees; None if the loss needs none.
        totals: Sums of the steps of this epoch that are done already; the epoch goes on after them.
        after_step: Called after each step, on a boundary at which the learner may be saved; it may raise.

    Returns:
        Means over the samples of `loss`, each of its terms, `accuracy` and, with more than 5 classes, `accuracy_top5`
        (of the student in train mode).

    Raises:
        DivergedError: The loss is not finite.
    """
    student, loss, device = learner.student, learner.loss, learner.device
    totals = totals or Totals(device)
    student.train()
    loss.train()
    for norm in learner.frozen_norms:
        norm.eval()
    by_batch = loss.teacher_statistics == "batch"
    with batch_statistics(teacher) if teacher is not None and by_batch else contextlib.nullcontext():
        for step, batch in enumerate(loader.epoch(epoch, totals.steps), start=totals.steps):
            torch.manual_seed(derive_seed(seed, "step", epoch, step))
            learner.schedule.set(epoch, step)
            with autocast(learner.precision, device):
                teacher_outputs = None if teacher is None else outputs_of(teacher, batch.images, loss.needs)
                student_outputs = outputs_of(student, batch.images, loss.needs)
            terms = loss(student_outputs, teacher_outputs, batch)
            total = torch.stack(list(terms.values())).sum()
            learner.optimizer.zero_grad(set_to_none=True)
            learner.scaler.scale(total).backward()
            learner.scaler.step(learner.optimizer)
            learner.scaler.update()
            hits = correct(student_outputs.logits, batch.labels)
            totals.add(hits, {"loss": total, **terms}, len(batch.labels))
            after_step()
    return totals.means()


@torch.no_grad()
def evaluate(
    net: nn.Module,
    loader: Loader,
    *,
    precision: str = "fp32",
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    after_batch: Callable[[Batch, Outputs, Outputs | None], None] = lambda batch, outputs, teacher_outputs: None,
) -> dict[str, float]:
    """Scores a net on a whole split, in eval mode; its mode is as before afterwards.

    Args:
        net: Returns logits.
        loader: The split, in its natural order and without augmentation.
        precision: fp32, bf16 or fp16.
        loss: Adds `loss` and its terms, as in training.
        teacher: For the loss.
        after_batch: Called with each batch and what the nets made of it; it may raise.

    Returns:
        Means over the samples: `accuracy`, `accuracy_top5` (with more than 5 classes), `cross_entropy`, and `loss`
        with its terms.

    Raises:
        DivergedError: The cross-entropy is not finite: with a NaN logit, argmax would still name a plausible class.
    """
    device = next(net.parameters()).device
    needs = loss.needs if loss else frozenset({"logits"})
    totals = Totals(device)
    with evaluating(net, *([loss] if loss else [])):
        for batch in loader.epoch(0):
            with autocast(precision, device):
                outputs = outputs_of(net, batch.images, needs)
                teacher_outputs = None if teacher is None else outputs_of(teacher, batch.images, needs)
            means = {"cross_entropy": F.cross_entropy(outputs.logits, batch.labels)}
            if loss is not None:
                terms = loss(outputs, teacher_outputs, batch)
                means |= {"loss": torch.stack(list(terms.values())).sum(), **terms}
            totals.add(correct(outputs.logits, batch.labels), means, len(batch.labels))
            after_batch(batch, outputs, teacher_outputs)
    return totals.means()


def correct(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Returns how many samples have their label as the first choice and, with over 5 classes, among the first 5."""
    counts = {"accuracy": (logits.argmax(1) == labels).sum()}
    if logits.shape[1] > 5:
        counts["accuracy_top5"] = (logits.topk(5, dim=1).indices == labels[:, None]).sum()
    return counts


@contextlib.contextmanager
def batch_statistics(net: nn.Module) -> Iterator[None]:
    """Lets a net's batch norms normalise with each batch's own statistics; their buffers and their mode stay."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    modes = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, mode in zip(norms, modes, strict=True):
            norm.training, norm.track_running_stats = mode


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Puts modules into eval mode and back into the mode they were in."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)

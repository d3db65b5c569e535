"""The loop: objects in, a dict of floats out. Opens no file, logs nothing, reads no global."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import parallel
from model.devices import autocast
from model.ensemble import Teacher
from model.errors import DivergedError, InputError
from model.losses.base import Loss
from model.losses.objective import Objective
from model.optim import Schedule
from model.outputs import Batch, Outputs, Probe, answers, features_of, outputs_of
from model.rng import derive_seed
from model.taps import TapError, choose, set_taps, taps_of


class Loader(Sized, Protocol):
    """What the loop needs of a data loader: the batches of an epoch from a step on."""

    def epoch(self, epoch: int, start: int = 0) -> Iterable[Batch]: ...


def probe(net: nn.Module, name: str, shape: Sequence[int], role: str = "student") -> Probe:
    """Shows a net one image, black, and tells the shapes of what it makes of it; one without stages is given some.

    Args:
        net: Gets taps if it gives no maps itself and has none yet.
        name: What it is called.
        shape: `(C, H, W)` of the image.
        role: The section of params.json that may name its stages: `student` or `teacher`.

    Raises:
        InputError: The net does not take the image, with the net's own reason; or it has no such stages.
    """
    image = torch.zeros(1, *shape, device=next(net.parameters()).device)
    try:
        with torch.no_grad(), evaluating(net):
            if not hasattr(net, "forward_with_features") and not taps_of(net):
                set_taps(net, choose(net, image))
            outputs = features_of(net, image).shapes()
    except TapError as error:
        raise InputError(f"{role}.stages: net {name!r} {error.predicate}") from None
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "x".join(map(str, shape))
        why = str(error).partition("\n")[0]
        raise InputError(f"net {name!r} does not take the dataset's images of {size}: {why}") from None
    return Probe(name, net, outputs, tuple(shape))


def probe_teacher(teacher: Teacher, shape: Sequence[int]) -> Probe:
    """Shows a teacher one image: see `probe`. What several of them give together is logits alone."""
    several = len(teacher.members) > 1
    roles = [f"teacher.{place}" if several else "teacher" for place in range(len(teacher.members))]
    probes = [probe(each.net, each.name, shape, role) for each, role in zip(teacher.members, roles, strict=True)]
    if not several:
        return probes[0]
    return replace(probes[0], name=teacher.name, net=teacher, outputs=Outputs(probes[0].outputs.logits))


@dataclass
class Learner:
    """Everything that training changes.

    Attributes:
        student: The net that learns.
        loss: The objective, with whatever it trains besides the student, nets that learn beside it among that.
        optimizer: Over the parameters of both.
        schedule: Of the optimizer's learning rate.
        precision: fp32, bf16 or fp16.
        frozen_norms: Batch norms of the student that stay in eval mode.
        run: What runs the student in training, as `outputs_of(student, ...)` does, if not just that.
    """

    student: nn.Module
    loss: Loss | Objective
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    precision: str = "fp32"
    frozen_norms: Sequence[nn.Module] = ()
    run: Callable[[Tensor, frozenset[str]], Outputs] | None = None
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


LOGITS = frozenset({"logits"})
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

    def of_all(self) -> Totals:
        """Returns the sums over the samples of all processes of the run; each of them must call this."""
        if parallel.size() == 1:
            return self
        values = [torch.tensor(self.samples), *self.sums.values()]
        samples, *sums = parallel.total(torch.stack([value.cpu().double() for value in values]))
        everything = Totals(self.device)
        everything.sums = dict(zip(self.sums, sums, strict=True))
        everything.samples, everything.steps = int(samples), self.steps
        return everything

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums of each process of the run, in order; each of them must call this."""
        parts = parallel.gather(({name: value.cpu() for name, value in self.sums.items()}, self.samples))
        sums = {name: torch.stack([part[name] for part, _ in parts]) for name in self.sums}
        return {"sums": sums, "samples": torch.tensor([samples for _, samples in parts]), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes this process's part of what `state_dict` returned; of another number of processes, the first takes all.

        Added up in another order, sums would differ in the last bits from those of an uninterrupted run.
        """

        def own(values: Any) -> Tensor:
            each = torch.as_tensor(values).reshape(-1)
            if len(each) == parallel.size():
                return each[parallel.rank()]
            return each.sum() if parallel.rank() == 0 else torch.zeros_like(each[0])

        self.sums = {name: own(values).to(self.device) for name, values in state["sums"].items()}
        self.samples, self.steps = int(own(state["samples"])), state["steps"]


def train_epoch(
    learner: Learner,
    loader: Loader,
    *,
    epoch: int,
    seed: int,
    teacher: Teacher | None = None,
    totals: Totals | None = None,
    gradient_norms: bool = False,
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
        gradient_norms: Also measure how strongly each term pulls at the student's logits: see `pulls`.
        after_step: Called after each step, on a boundary at which the learner may be saved; it may raise.

    Returns:
        Means over the samples of `loss`, each of its terms, `accuracy` and, with more than 5 classes, `accuracy_top5`
        (of the student in train mode).

    Raises:
        DivergedError: The loss is not finite.
        InputError: It reaches nothing that learns.
    """
    student, loss, device = learner.student, learner.loss, learner.device
    totals = totals or Totals(device)
    own = (parallel.rank(),) if parallel.size() > 1 else ()
    student.train()
    loss.train()
    loss.on_epoch(epoch)
    for norm in learner.frozen_norms:
        norm.eval()
    run = learner.run or functools.partial(outputs_of, student)
    needs = loss.needs
    by_batch = loss.teacher_statistics == "batch"
    with (
        batch_statistics(teacher) if teacher is not None and by_batch else contextlib.nullcontext(),
        lesson(teacher if loss.asks_teacher else None, loader, epoch, loss.teacher_needs) as ask,
    ):
        for step, batch in enumerate(loader.epoch(epoch, totals.steps), start=totals.steps):
            torch.manual_seed(derive_seed(seed, "step", epoch, step, *own))
            learner.schedule.set(epoch, step)
            teacher_outputs = ask(batch)
            with autocast(learner.precision, device):
                student_outputs = with_peers(answers(run, batch, needs), loss, batch)
            terms = loss(student_outputs, teacher_outputs, batch)
            total = torch.stack(list(terms.values())).sum()
            measured = pulls(terms, student_outputs.logits) if gradient_norms else {}
            if not total.requires_grad:
                line = f"in epoch {epoch + 1} nothing that learns is reached by the loss"
                raise InputError(f"{line}; freeze less of the student, or give another loss a weight")
            learner.optimizer.zero_grad(set_to_none=True)
            learner.scaler.scale(total * batch.share).backward()
            parallel.sum_gradients(learner.optimizer)
            learner.scaler.step(learner.optimizer)
            learner.scaler.update()
            hits = correct(student_outputs.logits, batch.labels)
            totals.add(hits, {"loss": total, **terms, **measured}, len(batch.labels))
            after_step()
    return totals.of_all().means()


@torch.no_grad()
def evaluate(
    net: nn.Module,
    loader: Loader,
    *,
    precision: str = "fp32",
    loss: Loss | Objective | None = None,
    teacher: Teacher | None = None,
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
        Means over the samples: `accuracy`, `accuracy_top5` (with more than 5 classes), `cross_entropy`, `loss` with its
        terms, and `peer<n>_accuracy` of the nets that learn beside the student.

    Raises:
        DivergedError: The cross-entropy is not finite: with a NaN logit, argmax would still name a plausible class.
    """
    device = next(net.parameters()).device
    needs, asked = (loss.needs, loss.teacher_needs) if loss else (LOGITS, LOGITS)
    run = functools.partial(outputs_of, net)
    totals = Totals(device)
    with evaluating(net, *([loss] if loss else [])), lesson(teacher, loader, 0, asked) as ask:
        for batch in loader.epoch(0):
            with autocast(precision, device):
                outputs = answers(run, batch, needs)
                outputs = outputs if loss is None else with_peers(outputs, loss, batch)
            teacher_outputs = ask(batch)
            means = {"cross_entropy": F.cross_entropy(outputs.logits, batch.labels)}
            counts = correct(outputs.logits, batch.labels)
            if loss is not None:
                terms = loss(outputs, teacher_outputs, batch)
                means |= {"loss": torch.stack(list(terms.values())).sum(), **terms}
                for number, logits in enumerate(outputs.peer_logits, start=1):
                    counts[f"peer{number}_accuracy"] = correct(logits, batch.labels)["accuracy"]
            totals.add(counts, means, len(batch.labels))
            after_batch(batch, outputs, teacher_outputs)
    return totals.of_all().means()


def with_peers(outputs: Outputs, loss: Loss | Objective, batch: Batch) -> Outputs:
    """Returns a student's outputs with the logits of the nets that learn beside it, if there are any."""
    if not len(loss.peers):
        return outputs
    return replace(outputs, peer_logits=tuple(peer(batch.images).float() for peer in loss.peers))


def pulls(terms: Mapping[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
    """Returns the norm of each term's gradient with respect to the student's logits, as `<term>_gradient`.

    0 for a term that does not depend on them; logits of a second view are not among them. The sum of squares is over
    the batch, whose mean a term is: the norm of a batch of N is about that of one sample over the square root of N.
    """
    norms = {}
    for name, term in terms.items():
        gradient = None
        if term.requires_grad:
            (gradient,) = torch.autograd.grad(term, logits, retain_graph=True, allow_unused=True)
        norms[f"{name}_gradient"] = logits.new_zeros(()) if gradient is None else gradient.norm()
    return norms


def lesson(
    teacher: Teacher | None, loader: Loader, epoch: int, needs: frozenset[str]
) -> contextlib.AbstractContextManager[Callable[[Batch], Outputs | None]]:
    """Returns the context in which a teacher, if there is one, answers for the batches of an epoch."""
    return contextlib.nullcontext(lambda batch: None) if teacher is None else teacher.lesson(loader, epoch, needs)


def correct(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Returns how many samples have their label as the first choice and, with over 5 classes, among the first 5.

    Those without a label, which stand behind the others, do not count.
    """
    logits = logits[: len(labels)]
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

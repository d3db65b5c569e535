"""What every loss is held to, and all that this takes: nets, batches, a real training.

Each claim is a function `check_...(case)`, so that broken losses, nets and engines can show that it rejects them. A
plug-in needs nothing here: options without a default get a plausible value, and nets of several stages stand ready.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from model import engine
from model.devices import autocast
from model.engine import Learner, probe
from model.errors import InputError, Notice
from model.losses import LOSSES
from model.losses.base import Loss
from model.losses.ce import CELoss
from model.losses.objective import Objective
from model.losses.weights import resolve_weight
from model.nets.resnet import ResNet
from model.optim import SCHEDULES, create_schedule
from model.outputs import Batch, Outputs, Probe, Samples, answers, outputs_of
from model.registry import Registry, check_options, options_of
from model.teacher import FrozenTeacher

FIELDS = frozenset(field.name for field in dataclasses.fields(Outputs))
CPU = torch.device("cpu")


# --- a loss with plausible options ----------------------------------------------------------------------------

# Values at which a loss is itself; a required option that is not here gets one from its type and its bounds.
USUAL = {"alpha": 0.5, "temperature": 4.0}
# Values that make a loss quick, also where the option has a default: a stage of its own is over within a test.
QUICK = {"initial_epochs": 1, "negatives": 9, "max_channels": 8}


def bounds_of(annotation: Any) -> tuple[Any, dict[str, float]]:
    """Returns the bare type of an option and its bounds."""
    bounds: dict[str, float] = {}
    if get_origin(annotation) is Annotated:
        annotation, *notes = get_args(annotation)
        for bound in (bound for note in notes for bound in getattr(note, "metadata", [])):
            bounds |= {key: getattr(bound, key) for key in ("gt", "ge", "lt", "le") if hasattr(bound, key)}
    return annotation, bounds


def plausible(name: str, annotation: Any) -> Any:
    """Returns a value that a required option accepts."""
    base, bounds = bounds_of(annotation)
    if name in USUAL and base is float:
        return USUAL[name]
    if base in (int, float):
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        if low is None:
            return base(1 if high is None else high - 1)
        # Not at a bound, where a loss may be degenerate, and not far off: a bound is often just out of reach.
        return base(low + 1 if high is None or high - low > 2 else (low + high) / 2)
    if get_origin(base) is Literal:
        return get_args(base)[0]
    if get_origin(base) is list:
        return [plausible(name, get_args(base)[0])]
    if base is bool:
        return True
    if base is str:
        return "some text"
    if get_origin(base) is dict:
        return {}
    if type(None) in get_args(base):
        return None
    return pytest.fail(f"no plausible value for the option {name}: {annotation}; give it a default, or extend USUAL")


def plausible_options(entry: Callable[..., Any]) -> dict[str, Any]:
    """Returns the options with which a loss is tested: its defaults but for those of `QUICK`."""
    options = {
        name: plausible(name, annotation) if default is ... else default
        for name, (annotation, default) in options_of(entry).items()
    }
    options |= {name: value for name, value in QUICK.items() if name in options}
    values, problems = check_options(options, entry)
    assert problems == []
    return values


@functools.cache
def maker(name: str, registry: Registry = LOSSES) -> Callable[[], Loss]:
    """Returns what makes the registered loss with plausible options."""
    entry = registry[name]
    options = plausible_options(entry)
    return lambda: entry(**copy.deepcopy(options))


# --- what a loss is given -------------------------------------------------------------------------------------

BATCH, CLASSES, SHAPE = 6, 7, (3, 16, 16)
NUM_SAMPLES = 24  # of the training list
WIDTHS = {  # of the three stages of student and teacher
    "equal": ((8, 12, 16), (8, 12, 16)),
    "unequal": ((6, 8, 12), (8, 16, 20)),
}
Pair = Literal["equal", "unequal"]


def net_of(widths: tuple[int, ...], classes: int = CLASSES) -> nn.Module:
    return ResNet(classes, [1] * len(widths), widths=widths)


def nets(pair: Pair = "equal", classes: int = CLASSES) -> tuple[nn.Module, nn.Module]:
    """Returns student and teacher: nets with several stages, preacts and embedding, always the same two.

    Both in eval mode, so that every call sees the same net, with statistics as after a training. Their logits differ
    from image to image, with mean 0 and standard deviation 3 for every class; of a fresh net, they hardly do.
    """
    return _nets(pair, classes)


@functools.cache
def _nets(pair: Pair, classes: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(230)
    made = [net_of(widths, classes) for widths in WIDTHS[pair]]
    images = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1))
    for net in made:
        with torch.no_grad():
            norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
            for norm in norms:
                norm.momentum = None  # the mean of all batches
            net.train()(images)
            for norm in norms:
                norm.momentum = 0.1
            logits, classifier = net.eval()(images), net.linear
            classifier.weight.mul_(3 / logits.std(0)[:, None])  # type: ignore[operator, union-attr]
            classifier.bias.sub_(logits.mean(0)).mul_(3 / logits.std(0))  # type: ignore[operator, union-attr]
    student, teacher = (net.eval() for net in made)
    return student, teacher


@functools.cache
def probes(pair: Pair, classes: int) -> tuple[Probe, Probe]:
    student, teacher = nets(pair, classes)
    return probe(student, "student", SHAPE), probe(teacher, "teacher", SHAPE)


def samples_of(classes: int = CLASSES) -> Samples:
    """Returns the training list: two of every three samples are trained on, in classes of about equal size."""
    places = torch.arange(NUM_SAMPLES)
    labels = (places // 2) % classes
    return Samples(torch.where(places % 3 == 2, -1, labels), classes)


def batch_of(size: int = BATCH, classes: int = CLASSES, seed: int = 0) -> Batch:
    """Returns samples that are trained on, all different, in no order, with their second views."""
    generator = torch.Generator().manual_seed(seed)
    images, second = (torch.randn(size, *SHAPE, generator=generator) for _ in range(2))
    samples = samples_of(classes)
    trained = (samples.labels >= 0).nonzero().flatten()
    indices = trained[torch.randperm(len(trained), generator=generator)[:size]]
    return Batch(images, samples.labels[indices], indices, torch.zeros_like(indices), 1.0, second)


@functools.cache
def everything(pair: Pair, batch_size: int, classes: int, seed: int, precision: str) -> tuple[Outputs, Outputs]:
    """Returns all that student and teacher make of a batch."""
    batch = batch_of(batch_size, classes, seed)
    return tuple(all_of(net, batch, precision) for net in nets(pair, classes))  # type: ignore[return-value]


def all_of(net: nn.Module, batch: Batch, precision: str = "fp32") -> Outputs:
    with torch.no_grad(), autocast(precision, CPU):
        return answers(functools.partial(outputs_of, net), batch, FIELDS)


def only(outputs: Outputs, needs: frozenset[str]) -> Outputs:
    """Returns what a net may hand over at the least; logits are always there, those of peers if there are peers."""
    missing = {"features": (), "preacts": (), "embedding": None, "strong_logits": None}
    return replace(outputs, **{name: value for name, value in missing.items() if name not in needs})


def tensors_of(outputs: Outputs) -> list[Tensor]:
    found: list[Tensor] = []
    outputs.map(lambda tensor: found.append(tensor) or tensor)
    return found


def as_leaves(outputs: Outputs) -> Outputs:
    """Returns the same outputs as the start of a graph."""
    return outputs.map(lambda tensor: tensor.detach().clone().requires_grad_())


def detached(outputs: Outputs) -> Outputs:
    return outputs.map(lambda tensor: tensor.detach().clone())


Inputs = tuple[Outputs, Outputs | None, Batch]


@dataclass
class Ready:
    """A loss as a run begins with it, and the nets that it is for.

    Attributes:
        loss: Attached, enrolled, with its peers.
        student: The net that is trained, with what the loss has given to it.
        teacher: The other one.
        pair, classes: What the nets are.
        equipped: Whether the loss has given the student parts.
    """

    loss: Loss
    student: nn.Module
    teacher: nn.Module
    pair: Pair
    classes: int
    equipped: bool

    def inputs(self, size: int = BATCH, seed: int = 0, precision: str = "fp32", minimal: bool = True) -> Inputs:
        """Returns what the engine would hand to the loss, the student's part as leaves."""
        batch = batch_of(size, self.classes, seed)
        student, teacher = everything(self.pair, size, self.classes, seed, precision)
        if self.equipped:
            student = all_of(self.student, batch, precision)
        if len(self.loss.peers):
            with torch.no_grad(), autocast(precision, CPU):
                student = replace(student, peer_logits=tuple(peer(batch.images).float() for peer in self.loss.peers))
        if minimal:
            student, teacher = only(student, self.loss.needs), only(teacher, self.loss.teacher_needs)
        return as_leaves(student), detached(teacher) if self.loss.needs_teacher else None, batch

    def terms(self, *inputs: Any, seed: int = 0) -> dict[str, Tensor]:
        seeded(seed)  # for a loss that draws
        return self.loss(*inputs)

    def values(self, *inputs: Any, seed: int = 0) -> dict[str, float]:
        return {name: term.item() for name, term in self.terms(*inputs, seed=seed).items()}


@dataclass(frozen=True)
class Case:
    """A loss to hold to the contract.

    Attributes:
        make: Makes it, every time anew.
        pair: Which nets it is for.
        epoch: In which epoch it is looked at.
    """

    make: Callable[[], Loss]
    pair: Pair = "equal"
    epoch: int = 0

    def ready(self, classes: int = CLASSES, seed: int = 1) -> Ready:
        """Returns a new loss, made ready as train.py does it; of equal seeds, equal ones."""
        student, teacher = nets(self.pair, classes)
        seeded(seed)
        loss = self.make()
        shown, taught = probes(self.pair, classes)
        with warnings.catch_warnings():  # of two classes, say
            warnings.simplefilter("ignore", Notice)
            loss.attach(shown, taught if loss.needs_teacher else None)
        loss.enrol(samples_of(classes))
        loss.peers.extend(net_of(WIDTHS[self.pair][0], classes).eval() for _ in loss.peer_sections)
        if type(loss).equip is not Loss.equip:
            student = copy.deepcopy(student)  # it may be changed
        equipped, parts = loss.equip(student)
        loss.on_epoch(self.epoch)
        return Ready(loss, equipped.eval(), teacher, self.pair, classes, bool(parts))

    def epochs(self) -> list[int]:
        """Returns an epoch of each stage in which the loss counts."""
        loss = self.make()
        return sorted({0, 0 if loss.initial_only else loss.initial_epochs})

    def stages(self) -> list[Case]:
        return [replace(self, epoch=epoch) for epoch in self.epochs()]


Check = Callable[[Case], None]


def seeded(seed: int) -> None:
    """Seeds what CPU tensors are drawn from; torch.manual_seed asks for every kind of device besides."""
    torch.default_generator.manual_seed(seed)


def total(terms: dict[str, Tensor]) -> Tensor:
    """Returns the loss as the engine forms it."""
    return torch.stack(list(terms.values())).sum()


def without_ce(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([0 * total(terms), *(term for name, term in terms.items() if name != "ce")]).sum()


def backward(value: Tensor) -> None:
    """Runs a backward, if there is anything to run it through: a stage may have nothing for a loss to do."""
    if value.requires_grad:
        value.backward()


def gradients_of(outputs: Outputs) -> list[Tensor]:
    return [tensor.grad for tensor in tensors_of(outputs) if tensor.grad is not None]


def size_of(gradients: Iterable[Tensor]) -> float:
    return sum((float(gradient.double().square().sum()) for gradient in gradients), 0.0) ** 0.5


def in_float64(ready: Ready, inputs: Inputs) -> Inputs:
    """Makes a loss and its inputs float64, so that a difference is one of the formula and not of rounding."""
    ready.loss.double()
    student, teacher, batch = inputs
    doubled = [None if outputs is None else outputs.map(Tensor.double) for outputs in (student, teacher)]
    assert doubled[0] is not None
    return as_leaves(doubled[0]), doubled[1], batch


def with_rows(inputs: Inputs, rows: Tensor) -> Inputs:
    """Returns the samples of a batch at `rows`, in that order."""
    student, teacher, batch = inputs
    shown = {key: value[rows] for key, value in vars(batch).items() if isinstance(value, Tensor)}
    return (
        as_leaves(student.map(lambda t: t.detach()[rows])),
        None if teacher is None else teacher.map(lambda t: t[rows]),
        replace(batch, **shown),
    )


@functools.cache
def draws(case: Case) -> bool:
    """Tells whether the loss draws random numbers in training: then two calls do not agree."""
    one, other = case.ready(), case.ready()
    return one.values(*one.inputs(), seed=0) != other.values(*other.inputs(), seed=1)


# --- the contract: what it gives ------------------------------------------------------------------------------


def check_terms_are_named_finite_float32_scalars(case: Case) -> None:
    ready = case.ready()
    terms = ready.terms(*ready.inputs())
    assert terms
    assert not {"loss", "accuracy"} & set(terms), "names that the engine gives"
    for name, term in terms.items():
        assert isinstance(name, str)
        assert term.shape == ()
        assert term.dtype == torch.float32
        assert term.isfinite()
    assert total(terms).item() == pytest.approx(sum(term.item() for term in terms.values()), rel=1e-6)


def check_it_reads_no_more_than_it_says(case: Case) -> None:
    ready, twin = case.ready(), case.ready()
    assert ready.loss.needs <= FIELDS
    assert twin.values(*twin.inputs(minimal=False)) == ready.values(*ready.inputs())


def check_it_needs_labels_if_and_only_if_it_says_so(case: Case) -> None:
    """A loss that says no is given batches whose last images have neither label nor place in the training list."""
    ready = case.ready()
    student, teacher, batch = ready.inputs()
    if ready.loss.needs_labels:
        others = replace(batch, labels=(batch.labels + 1) % CLASSES, indices=batch.indices.roll(1))
        changed = False
        for stage in case.stages():
            one, other = stage.ready(), stage.ready()
            student, teacher, _ = one.inputs()
            for step, second in enumerate((batch, others)):  # a memory may have to be written before it is read
                first = one.values(student, teacher, batch, seed=step)
                changed |= first != other.values(student, teacher, second, seed=step)
        assert changed, "it says that it needs labels but gives the same whatever they are"
        return
    indices = torch.where(torch.arange(BATCH) < 2, batch.indices, -1)
    terms = ready.terms(student, teacher, replace(batch, labels=batch.labels[:2], indices=indices))
    assert total(terms).isfinite()
    backward(total(terms))
    assert all(gradient.isfinite().all() for gradient in gradients_of(student))


# --- the contract: whom it teaches ----------------------------------------------------------------------------


def check_gradient_reaches_the_student_and_every_parameter(case: Case) -> None:
    """Of a loss with several stages: in one of them."""
    ready = case.ready()
    reached = 0.0
    for epoch in case.epochs():
        ready.loss.on_epoch(epoch)
        student, teacher, batch = ready.inputs()
        backward(total(ready.terms(student, teacher, batch)))
        gradients = gradients_of(student)
        assert all(gradient.isfinite().all() for gradient in gradients)
        reached += size_of(tensor.grad for tensor in tensors_of(student) if tensor.grad is not None)
        assert all(logits.grad is not None for logits in student.peer_logits), "a peer learns nothing"
    assert reached > 0, "the student learns nothing"
    own = [(name, p) for name, p in ready.loss.named_parameters() if not name.startswith("peers.")]
    assert [name for name, p in own if p.requires_grad and p.grad is None] == []


def check_every_learnable_tensor_is_a_parameter(case: Case) -> None:
    """Whatever is hidden in a list or a closure would neither be optimised nor be saved."""
    ready = case.ready()
    student, teacher, batch = ready.inputs()
    known = {id(t) for t in [*tensors_of(student), *ready.loss.parameters(), *ready.student.parameters()]}
    leaves = list(leaves_of(total(ready.terms(student, teacher, batch))))
    assert [tuple(leaf.shape) for leaf in leaves if id(leaf) not in known] == []
    assert {name for name, _ in ready.loss.named_parameters()} <= set(ready.loss.state_dict())


def leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yields every tensor that a backward from here would give a gradient to."""
    seen, queue = set(), [tensor.grad_fn]
    while queue:
        function = queue.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            yield function.variable
        queue += [following for following, _ in function.next_functions]


def check_neither_net_is_a_part_of_it(case: Case) -> None:
    """A net that `attach` keeps as a module would be optimised, saved and put into other modes with the loss."""
    ready = case.ready()
    both = nets(case.pair)

    def parts(*modules: nn.Module) -> set[int]:
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    assert not parts(ready.loss) & parts(*both)
    assert not {id(module) for net in both for module in net.modules()} & {id(m) for m in ready.loss.modules()}
    assert not parts(ready.student) & parts(ready.loss), "what the student has for good is not the loss's as well"


def check_nothing_reaches_the_teacher(case: Case, freeze: Callable[[nn.Module], nn.Module] = FrozenTeacher) -> None:
    ready = case.ready()
    net = copy.deepcopy(nets(case.pair)[1])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    student, _, batch = ready.inputs()
    outputs = answers(functools.partial(outputs_of, freeze(net)), batch, ready.loss.needs)
    assert not any(tensor.requires_grad for tensor in tensors_of(outputs))
    outputs = only(outputs, ready.loss.teacher_needs)
    backward(total(ready.terms(student, outputs if ready.loss.needs_teacher else None, batch)))
    assert [name for name, parameter in net.named_parameters() if parameter.grad is not None] == []
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def check_its_inputs_are_left_alone(case: Case) -> None:
    ready = case.ready()
    student, teacher, batch = ready.inputs()
    given = [*tensors_of(student), *(tensors_of(teacher) if teacher else [])]
    given += [value for value in vars(batch).values() if isinstance(value, Tensor)]
    before = [tensor.detach().clone() for tensor in given]
    with torch.no_grad():  # where autograd would not forbid it: validation
        ready.terms(student, teacher, batch)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


# --- the contract: what its value is a function of ------------------------------------------------------------


def check_student_equal_to_teacher_is_the_minimum_if_it_says_so(case: Case) -> None:
    """Value and gradient vanish: a wrong sign, or a target that is not the teacher, shows here.

    The tolerance is relative to value and gradient for two different nets. Rounding is below 1e-6 of those, and small
    constants that keep some formulas finite, such as that of DIST's correlations, are below 1e-4.
    """
    ready = case.ready()
    if not ready.loss.needs_teacher or case.pair != "equal":
        return  # nothing to be equal to

    def measured(alike: bool, seed: int) -> tuple[float, float]:
        value = gradient = 0.0
        for stage in case.stages():
            ready = stage.ready()
            student, teacher, batch = ready.inputs(seed=seed)
            if alike and teacher is not None:
                teacher = replace(detached(student), peer_logits=())
            terms = ready.terms(student, teacher, batch)
            loss = without_ce(terms)
            backward(loss)
            value, gradient = value + abs(loss.item()), gradient + size_of(gradients_of(student))
        return value, gradient

    vanishes = True
    for seed in range(2):
        value, gradient = measured(alike=True, seed=seed)
        usual_value, usual_gradient = measured(alike=False, seed=seed)
        assert usual_value > 0
        vanishes &= value < 1e-4 * usual_value and gradient < 1e-4 * usual_gradient
    assert vanishes == ready.loss.least_at_teacher


def check_its_batch_factor_is_as_it_says(case: Case) -> None:
    """Every sample twice: the value is multiplied by a declared number, or by one that differs from batch to batch."""
    declared = case.ready().loss.batch_factor
    twice = torch.arange(2 * BATCH) % BATCH
    factors = []
    for stage, seed in itertools.product(case.stages(), range(2)):
        one, other = stage.ready(), stage.ready()
        single = one.terms(*in_float64(one, one.inputs(seed=seed)))
        double = other.terms(*with_rows(in_float64(other, other.inputs(seed=seed)), twice))
        assert list(single) == list(double)
        for name, term in single.items():
            if name == "ce":  # within one a method's own: a mean over samples
                assert double[name].item() == pytest.approx(term.item(), rel=1e-5)
            elif declared is not None and not draws(stage):
                assert double[name].item() == pytest.approx(declared * term.item(), rel=1e-5)
        value = without_ce(single).item()
        factors += [without_ce(double).item() / value] if value else []
    assert declared is not None or max(factors) - min(factors) > 1e-6, f"the factor is always {factors[0]}"


def check_the_order_of_a_batch_matters_only_if_it_says_so(case: Case) -> None:
    declared = case.ready().loss.order_matters
    changed = False
    for stage in case.stages():
        if draws(stage):
            changed |= not of_the_same_mean(stage, torch.arange(BATCH).roll(1))
            continue
        for seed in range(2):
            order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(seed))
            one, other = stage.ready(), stage.ready()
            before = one.terms(*in_float64(one, one.inputs(seed=seed)))
            after = other.terms(*with_rows(in_float64(other, other.inputs(seed=seed)), order))
            same = [after[name].item() == pytest.approx(term.item(), rel=1e-7) for name, term in before.items()]
            changed |= not all(same)
    assert changed == declared


def of_the_same_mean(case: Case, order: Tensor, number: int = 16) -> bool:
    """Tells whether a loss that draws has about the same mean over draws for a batch and for it in another order."""
    found = []
    for first_seed, rows in ((0, torch.arange(len(order))), (number, order)):
        readies = [case.ready() for _ in range(number)]
        found.append([
            without_ce(ready.terms(*with_rows(ready.inputs(), rows), seed=seed)).item()
            for seed, ready in enumerate(readies, start=first_seed)
        ])  # fmt: skip
    one, other = torch.tensor(found, dtype=torch.float64)
    error = ((one.var() + other.var()) / number).sqrt()
    return bool((one.mean() - other.mean()).abs() < 6 * error)


def check_classes_have_no_order(case: Case) -> None:
    """For losses of logits: with the classes renamed, in labels, too, nothing changes."""
    ready, other = case.ready(), case.ready()
    if not ready.loss.needs <= {"logits", "strong_logits"} or draws(case):
        return
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(3))
    renamed = torch.argsort(order)
    samples = samples_of()
    other.loss.enrol(Samples(torch.where(samples.labels < 0, -1, renamed[samples.labels]), CLASSES))
    student, teacher, batch = in_float64(other, other.inputs())
    before = ready.values(*in_float64(ready, ready.inputs()))
    columns = [None if each is None else each.map(lambda t: t.detach()[:, order]) for each in (student, teacher)]
    after = other.values(*columns, replace(batch, labels=renamed[batch.labels]))
    assert after == pytest.approx(before, rel=1e-7)


def check_of_the_teacher_it_reads_probabilities_if_it_says_so(case: Case) -> None:
    """Of a loss with a temperature for the teacher: a constant added to all logits of a sample changes nothing."""
    one, other = case.ready(), case.ready()
    if not one.loss.needs_teacher or "logits" not in one.loss.needs or one.loss.teacher_temperature is None:
        return
    before = one.values(*in_float64(one, one.inputs()))
    student, teacher, batch = in_float64(other, other.inputs())
    assert teacher is not None
    shifts = torch.linspace(-3, 5, BATCH, dtype=torch.float64)[:, None]
    after = other.values(student, replace(teacher, logits=teacher.logits + shifts), batch)
    assert after == pytest.approx(before, rel=1e-7)


# --- the contract: numbers ------------------------------------------------------------------------------------


def extremes(student: Outputs, teacher: Outputs, size: float = 200.0) -> Iterator[tuple[Outputs, Outputs]]:
    """Yields gaps of a size between logits, constant logits, maps of zeros and embeddings of zeros."""

    def said(outputs: Outputs, logits: Tensor, peers: Tensor) -> Outputs:
        strong = None if outputs.strong_logits is None else logits
        return replace(outputs, logits=logits, strong_logits=strong, peer_logits=(peers,) * len(outputs.peer_logits))

    constant = torch.zeros_like(teacher.logits)
    gap = constant.clone()
    gap[:, 0] = size
    for own, other in ((gap, -gap), (-gap, gap), (gap, gap), (gap, constant), (constant, gap), (constant, constant)):
        yield said(student, own, other), said(teacher, other, other)
    empty, missing = (outputs.map(lambda t: torch.zeros_like(t)) for outputs in (student, teacher))
    yield from ((empty, teacher), (student, missing), (empty, missing))
    yield student, replace(student, peer_logits=()) if same_shapes(student, teacher) else teacher


def same_shapes(one: Outputs, other: Outputs) -> bool:
    first, second = (replace(outputs, peer_logits=()) for outputs in (one, other))
    return [t.shape for t in tensors_of(first)] == [t.shape for t in tensors_of(second)]


def temperatures_of(loss: Loss) -> list[float]:
    """Returns the defaults of the options that sound like temperatures, and what a required one is given."""
    named = {name: default for name, (_, default) in options_of(type(loss)).items() if "temperature" in name}
    found = [USUAL["temperature"] if default is ... else default for default in named.values()]
    return [float(value) for value in found if isinstance(value, int | float) and not isinstance(value, bool)]


def check_loss_and_gradient_are_finite_at_the_extremes(case: Case) -> None:
    # A temperature makes a gap small, which another user's does not.
    hottest = max([1.0, *temperatures_of(case.make())])
    for size, classes, gap in itertools.product((BATCH, 1), (CLASSES, 2), (200.0, 200.0 * hottest)):
        ready = case.ready(classes)
        ready.loss.train(size > 1)  # one occurs in validation only: batch norm cannot train on it
        student, teacher, batch = ready.inputs(size)
        for own, other in extremes(detached(student), teacher or detached(student), gap):
            leaves = as_leaves(own)
            ready.loss.zero_grad()
            value = total(ready.terms(leaves, detached(other) if teacher else None, batch))
            assert value.isfinite()
            backward(value)
            found = [*gradients_of(leaves), *(p.grad for p in ready.loss.parameters() if p.grad is not None)]
            assert all(gradient.isfinite().all() for gradient in found)


def check_outputs_computed_in_bf16_give_about_the_same_loss(case: Case) -> None:
    one, other = case.ready(), case.ready()
    full, half = one.terms(*one.inputs()), other.terms(*other.inputs(precision="bf16"))
    assert list(full) == list(half)
    for name in full:
        assert half[name].dtype == torch.float32
        assert_close(half[name], full[name], rtol=0.05, atol=0.02)


def check_float32_is_close_to_float64(case: Case) -> None:
    one, other = case.ready(), case.ready()
    student, teacher, batch = one.inputs()
    exact_student, *exact = in_float64(other, other.inputs())
    terms, exact_terms = one.terms(student, teacher, batch), other.terms(exact_student, *exact)
    for name, term in terms.items():
        assert term.item() == pytest.approx(exact_terms[name].item(), rel=1e-4, abs=1e-6)
    backward(total(terms))
    backward(total(exact_terms))
    for gradient, expected in zip(gradients_of(student), gradients_of(exact_student), strict=True):
        error = (gradient.double() - expected).norm().item()
        assert error <= 1e-3 * expected.norm().item() + 1e-6


# --- the contract: its weight ---------------------------------------------------------------------------------

NUM_EPOCHS = 6


def objective_of(case: Case, weight: Any, kind: type[Objective] = Objective) -> tuple[Ready, Objective]:
    """Returns a loss and the objective of cross-entropy plus that loss times a weight, in the epoch of the case."""
    ready = case.ready()
    weight, problems = resolve_weight(weight)
    assert problems == []
    objective = kind({"ce": CELoss(), "own": ready.loss}, {"ce": 1.0, "own": weight}, NUM_EPOCHS)
    objective.on_epoch(case.epoch)
    return ready, objective


def check_it_is_linear_in_its_weight_down_to_0(case: Case, kind: type[Objective] = Objective) -> None:
    """With weight 0 the objective is the one without that loss, and of a stage of its own nothing is left."""

    def terms(weight: float) -> tuple[dict[str, float], dict[str, float]]:
        ready, objective = objective_of(case, weight, kind)
        inputs = ready.inputs()
        seeded(0)
        given = {name: term.item() for name, term in objective(*inputs).items()}
        own = case.ready().values(*inputs)
        return given, own

    plain = Objective({"ce": CELoss()}, {"ce": 1.0}, NUM_EPOCHS)
    inputs = case.ready().inputs()
    alone = {name: term.item() for name, term in plain(*inputs).items()}
    assert terms(0.0)[0] == alone
    for weight in (1e-3, 3.0):
        given, own = terms(weight)
        loss = case.ready().loss
        if case.epoch < loss.initial_epochs and loss.initial_weight is not None:
            weight = loss.initial_weight
        expected = [weight * value for value in own.values()]
        if case.epoch >= loss.initial_epochs:
            expected = [*alone.values(), *expected]
        assert list(given.values()) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def check_with_weight_0_it_is_not_computed(case: Case, kind: type[Objective] = Objective) -> None:
    for weight in (0.0, {"name": "step", "milestones": [1], "gamma": 0.0}, {"name": "constant", "value": 0.0}):
        ready, objective = objective_of(replace(case, epoch=3), weight, kind)
        calls: list[str] = []
        inputs = ready.inputs()
        for name, module in ready.loss.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name, calls=calls: calls.append(name))
        assert list(objective(*inputs)) == ["ce"]
        assert calls == []


# --- the contract: what is kept -------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_its_state_dict_is_all_there_is_to_it(case: Case) -> None:
    """Also after steps, in which memories are written and buffers are filled."""
    for steps in (0, 2):
        ready, twin = case.ready(seed=1), case.ready(seed=2)
        own = [*ready.loss.parameters(), *ready.student.parameters()]
        optimizer = torch.optim.SGD([*own, nn.Parameter(torch.zeros(()))], lr=0.01)
        for step in range(steps):
            optimizer.zero_grad()
            backward(total(ready.terms(*ready.inputs(seed=step), seed=step)))
            optimizer.step()
        if not steps:
            with torch.no_grad():
                for value in ready.loss.state_dict().values():
                    if value.is_floating_point():
                        value.mul_(1.25)
        twin.loss.load_state_dict(through_a_file(ready.loss.state_dict()))
        twin.student.load_state_dict(through_a_file(ready.student.state_dict()))
        inputs = ready.inputs(seed=5)
        assert ready.values(*inputs) == twin.values(*inputs)
        assert ready.loss.eval() is ready.loss
        twin.loss.eval()
        assert ready.values(*inputs) == twin.values(*inputs)
        assert same_state(ready.loss.state_dict(), twin.loss.state_dict())


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


def check_it_is_described_in_one_line(case: Case) -> None:
    described = case.ready().loss.describe()
    assert described
    assert "\n" not in described


# --- the contract: options and documentation ------------------------------------------------------------------


def check_documentation(entry: Callable[..., Any]) -> None:
    documentation = inspect.getdoc(entry)
    assert documentation
    assert "Source: " in documentation
    for option in options_of(entry):
        assert f"\n    {option}: " in documentation


def other_values(name: str, annotation: Any, value: Any) -> list[Any]:
    """Returns values of an option that differ from a given one; not all of them need be accepted."""
    base, _ = bounds_of(annotation)
    if get_origin(base) is not Literal and (types := [t for t in get_args(base) if t is not type(None)]):
        if get_origin(base) is list:
            given = value or [plausible(name, get_args(base)[0])]
            others = other_values(name, get_args(base)[0], given[0])
            pairs = [sorted(two) for two in itertools.combinations([given[0], *others], 2)] if others else []
            return [
                *([given[:-1]] if len(given) > 1 else []),
                *([each] for each in others),
                *pairs,
                [*given, given[-1]],
            ]
        if len(types) < len(get_args(base)):  # may be missing
            found = [plausible(name, each) for each in types] if value is None else [None]
            return [*found, *(each for t in types for each in other_values(name, t, value or found[0]))]
    if base is bool:
        return [not value]
    if get_origin(base) is Literal:
        return [each for each in get_args(base) if each != value]
    if base is int:
        return [value + 1, value - 1, 2 * value, 0]
    if base is str:  # whatever it may be, it must count; one of few names is a Literal
        return [f"{value} and more"]
    if base is float:
        return [1.5 * value, 0.5 * value, value + 0.25, value - 0.25, 0.0, 1.0]
    return []


def must_all_count(annotation: Any) -> bool:
    """Tells whether each value of an option means something of its own."""
    base, _ = bounds_of(annotation)
    return base is bool or get_origin(base) is Literal


# Attributes that options may set and that the program acts on.
DECLARED = ("needs", "needs_teacher", "needs_labels", "initial_epochs", "processes", "teacher_statistics")


def response(entry: Callable[..., Loss], options: dict[str, Any], pair: Pair) -> list[Any] | None:
    """Returns all by which options may show: values and gradients over several epochs and steps; None if refused."""
    values, problems = check_options(options, entry)
    if problems:
        return None
    case = Case(lambda: entry(**values), pair)
    try:
        ready = case.ready()
    except InputError:
        return None
    found: list[Any] = [*(getattr(ready.loss, name) for name in DECLARED), ready.loss.peer_sections]
    own = [*ready.loss.parameters(), *ready.student.parameters()]
    optimizer = torch.optim.SGD([*own, nn.Parameter(torch.zeros(()))], lr=0.01)
    for epoch in (0, 1, 3, 40):
        ready.loss.on_epoch(epoch)
        student, teacher, batch = ready.inputs(seed=epoch)
        optimizer.zero_grad()
        value = total(ready.terms(student, teacher, batch))
        backward(value)
        found += [value.item(), size_of(gradients_of(student)), size_of(p.grad for p in own if p.grad is not None)]
        optimizer.step()
    found.append(total(ready.terms(*ready.inputs())).item())
    ready.loss.eval()
    found.append(total(ready.terms(*ready.inputs())).item())
    return found


def differs(one: list[Any], other: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return a == pytest.approx(b, rel=1e-6, abs=1e-12) if isinstance(a, float) else bool(a == b)

    return len(one) != len(other) or not all(map(same, one, other))


def check_no_option_changes_the_formula_at_its_bound(entry: Callable[..., Loss]) -> None:
    """At an end of its range, which often switches something off, an option means what it means close to it."""
    base = plausible_options(entry)
    for name, (annotation, _) in options_of(entry).items():
        kind, bounds = bounds_of(annotation)
        if kind is not float:
            continue
        for bound, step in ((bounds.get("ge"), 1e-5), (bounds.get("le"), -1e-5)):
            if bound is None:
                continue
            values = [float(bound), bound + step * (abs(bound) or 1)]
            with contextlib.suppress(InputError):  # nothing may be left of it
                pair = [Case(functools.partial(entry, **base | {name: value})).ready() for value in values]
                there, near = (total(ready.terms(*ready.inputs())).item() for ready in pair)
                assert there == pytest.approx(near, rel=0.01, abs=0.01), f"{name} at {bound}"


def check_every_option_changes_the_loss(entry: Callable[..., Loss]) -> None:
    """An option that changes nothing misleads; one that counts only beside another may do so."""
    base = plausible_options(entry)
    idle = [
        (name, value)
        for name, (annotation, _) in options_of(entry).items()
        for value in values_without_effect(entry, base, name, annotation)
    ]
    assert idle == []


def values_without_effect(entry: Callable[..., Loss], base: dict[str, Any], name: str, annotation: Any) -> list[Any]:
    """Returns the values of an option that count nowhere; if any one of them has to count and does, none.

    In some surroundings, two values that are accepted there must differ in what they do; of choices, each two. Where
    the value of `base` is refused, two options belong together, and together they must do something else than `base`.
    """
    values = [base[name], *other_values(name, annotation, base[name])]
    waiting = list(itertools.combinations(range(len(values)), 2))
    for surroundings, pair in places(entry, base, name):
        if not waiting:
            break
        found = [cached_response(entry, surroundings | {name: value}, pair) for value in values]
        found[0] = found[0] or cached_response(entry, base, pair)
        told_apart = {
            two for two in waiting if (one := found[two[0]]) and (other := found[two[1]]) and differs(one, other)
        }
        if told_apart and not must_all_count(annotation):
            return []
        waiting = [two for two in waiting if two not in told_apart]
    return [values[second] for _, second in waiting]


def places(entry: Callable[..., Loss], base: dict[str, Any], name: str) -> Iterator[tuple[dict[str, Any], Pair]]:
    """Yields what may stand beside an option: the defaults, on both pairs of nets, and each other option changed."""
    yield base, "equal"
    yield base, "unequal"
    for other, (annotation, _) in options_of(entry).items():
        if other != name:
            for value in other_values(other, annotation, base[other]):
                yield base | {other: value}, "equal"


_RESPONSES: dict[tuple[Any, str, str], list[Any] | None] = {}


def cached_response(entry: Callable[..., Loss], options: dict[str, Any], pair: Pair) -> list[Any] | None:
    key = (entry, repr(sorted(options.items())), pair)
    if key not in _RESPONSES:
        _RESPONSES[key] = response(entry, options, pair)
    return _RESPONSES[key]


# --- a real training ------------------------------------------------------------------------------------------


class Batches:
    """A loader of batches that come in another order, and are composed of other samples, in every epoch.

    Args:
        places: Positions in the dataset's own list.
        size: Of a batch.
        shuffle: Whether the order is another one in every epoch.
    """

    seed = 3

    def __init__(self, places: Tensor, labels: Tensor, size: int, shuffle: bool) -> None:
        self.places, self.labels, self.size, self.shuffle = places, labels, size, shuffle
        self.split = object()
        generator = torch.Generator().manual_seed(7)
        self.images = torch.randn(len(labels), *SHAPE, generator=generator)
        self.images += torch.randn(CLASSES, *SHAPE, generator=generator)[labels.clamp(min=0)]

    def __len__(self) -> int:
        return len(self.places) // self.size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self.places), generator=torch.Generator().manual_seed(epoch))
        for rows in list(self.places[order if self.shuffle else slice(None)].split(self.size))[start:]:
            yield Batch(
                self.images[rows], self.labels[rows], rows, torch.zeros_like(rows), 1.0, self.images[rows].flip(3)
            )


@dataclass
class Diary:
    """What happened in a training.

    Attributes:
        learner: As it is now.
        teacher: The frozen teacher.
        modes: (epoch, module, whether it was in train mode) of each call of a module of student and loss in training.
        modes_in_validation: The same in validation.
        before: Every learnable tensor as it was, by name.
        after: As it is now.
        unoptimised: Learnable tensors that the optimizer does not have.
        teacher_before: State and answers of the teacher as they were.
        teacher_after: As they are now.
        teacher_modes: Whether a part of the teacher that is no batch norm was ever in train mode.
        loss_in_validation: Names of the loss's tensors that a validation changed.
        means: What the engine reports of each epoch.
    """

    learner: Learner
    teacher: FrozenTeacher
    modes: list[tuple[int, str, bool]] = dataclasses.field(default_factory=list)
    modes_in_validation: list[tuple[int, str, bool]] = dataclasses.field(default_factory=list)
    before: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    after: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    unoptimised: list[str] = dataclasses.field(default_factory=list)
    teacher_before: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    teacher_after: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    teacher_modes: list[bool] = dataclasses.field(default_factory=list)
    loss_in_validation: list[str] = dataclasses.field(default_factory=list)
    means: list[dict[str, float]] = dataclasses.field(default_factory=list)


def train(
    make: Callable[[], Loss],
    *,
    pair: Pair = "equal",
    weight: float | None = None,
    train_epoch: Callable[..., dict[str, float]] = engine.train_epoch,
    evaluate: Callable[..., dict[str, float]] = engine.evaluate,
    freeze: Callable[[nn.Module], FrozenTeacher] = FrozenTeacher,
    ready_teacher: Callable[[FrozenTeacher, Batches], None] = lambda teacher, loader: None,
    num_epochs: int = 3,
) -> Diary:
    """Trains a student with cross-entropy plus a loss, as train.py does, with a validation after every epoch."""
    samples = samples_of()
    places = torch.arange(NUM_SAMPLES)
    labels = (places // 2) % CLASSES
    loader = Batches(places[samples.labels >= 0], labels, 8, shuffle=True)
    validation = Batches(places[samples.labels < 0], labels, 4, shuffle=False)

    loss = make()
    torch.manual_seed(5)
    student = net_of(WIDTHS[pair][0])
    net = copy.deepcopy(nets(pair)[1])
    parts = {"ce": CELoss(), "own": loss}
    objective = Objective(parts, {"ce": 1.0, "own": weight}, num_epochs)
    teacher = freeze(net)
    objective.attach(probe(student, "student", SHAPE), probe(net, "teacher", SHAPE) if loss.needs_teacher else None)
    objective.enrol(samples)
    for _, part in objective.parts():
        part.peers.extend(net_of(WIDTHS[pair][0]) for _ in part.peer_sections)
    student, _ = objective.equip(student)
    ready_teacher(teacher, loader)
    teacher.train()  # whatever a surrounding module asks for

    # Adam moves whatever has a gradient, however small; a decay would move also what has none.
    optimizer = torch.optim.Adam([*student.parameters(), *objective.parameters()], lr=1e-3)
    schedule = create_schedule(SCHEDULES.resolve({"name": "constant"})[0], optimizer, num_epochs, len(loader))
    diary = Diary(Learner(student, objective, optimizer, schedule), teacher)

    learnable = {
        **{f"student.{name}": p for name, p in student.named_parameters() if p.requires_grad},
        **{f"loss.{name}": p for name, p in objective.named_parameters() if p.requires_grad},
    }
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    diary.unoptimised = [name for name, p in learnable.items() if id(p) not in optimised]
    diary.before = {name: p.detach().clone() for name, p in learnable.items()}
    batch = next(iter(validation.epoch(0)))

    def teacher_state() -> dict[str, Tensor]:
        outputs = teacher.forward_with_features(batch.images)
        answered = {f"output {number}": tensor.detach() for number, tensor in enumerate(tensors_of(outputs))}
        return {**{name: value.clone() for name, value in teacher.state_dict().items()}, **answered}

    now: dict[str, Any] = {}

    def note(module: nn.Module, name: str) -> None:
        if now:
            now["modes"].append((now["epoch"], name, module.training))

    for module, prefix in ((student, "student"), (objective, "loss")):
        for name, part in module.named_modules():
            part.register_forward_hook(lambda part, *_, name=f"{prefix}.{name}": note(part, name))
    for part in net.modules():
        if not isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.register_forward_hook(lambda part, *_: diary.teacher_modes.append(part.training))

    taught = teacher if objective.needs_teacher else None
    diary.teacher_before = teacher_state()
    for epoch in range(num_epochs):
        now |= {"epoch": epoch, "modes": diary.modes}
        diary.means.append(train_epoch(diary.learner, loader, epoch=epoch, seed=1, teacher=taught))
        now |= {"modes": diary.modes_in_validation}
        kept = {name: value.clone() for name, value in objective.state_dict().items()}
        evaluate(student, validation, loss=objective, teacher=taught)
        diary.loss_in_validation += [n for n, v in objective.state_dict().items() if not torch.equal(v, kept[n])]
    # What evaluate.py does: the test list is another one, and its positions mean nothing to the training list.
    test = Batches(torch.arange(2 * NUM_SAMPLES), torch.arange(2 * NUM_SAMPLES) % CLASSES, 24, shuffle=False)
    diary.means.append(evaluate(student, test, loss=objective, teacher=taught))
    now.clear()
    diary.teacher_after = teacher_state()
    diary.after = {name: p.detach().clone() for name, p in learnable.items()}
    return diary


def check_student_and_loss_were_in_train_mode_at_every_step(diary: Diary) -> None:
    for epoch in range(len(diary.means) - 1):
        modes = [(name, training) for number, name, training in diary.modes if number == epoch]
        assert {"student", "loss"} <= {name.partition(".")[0] for name, _ in modes}
        assert {name for name, training in modes if not training} == set(), f"in eval mode in epoch {epoch}"
    assert {name for _, name, training in diary.modes_in_validation if training} == set(), "in train mode in validation"


def check_the_teacher_is_as_it_was(diary: Diary) -> None:
    changed = [
        name for name, value in diary.teacher_before.items() if not torch.equal(value, diary.teacher_after[name])
    ]
    assert changed == []
    assert not any(module.training for module in diary.teacher.modules())
    assert not any(diary.teacher_modes)
    assert [name for name, p in diary.teacher.named_parameters() if p.grad is not None] == []


def check_all_that_can_learn_has_learnt(diary: Diary) -> None:
    assert diary.unoptimised == []
    assert [name for name, value in diary.before.items() if torch.equal(value, diary.after[name])] == []
    assert all(value.isfinite().all() for value in diary.after.values())


def check_validation_leaves_the_loss_as_it_is(diary: Diary) -> None:
    assert diary.loss_in_validation == []


def check_a_run_with_weight_0_is_the_run_without_it(make: Callable[[], Loss]) -> None:
    """Bit by bit: it draws no random number, makes no module and has no stage of its own."""
    with_it, without = (train(each, weight=0.0, num_epochs=2) for each in (make, CELoss))
    assert same_state(with_it.learner.state_dict()["state_dict"], without.learner.state_dict()["state_dict"])
    assert [dict(means) for means in with_it.means] == [dict(means) for means in without.means]


TRAINING_CHECKS: list[Callable[[Diary], None]] = [
    check_student_and_loss_were_in_train_mode_at_every_step,
    check_the_teacher_is_as_it_was,
    check_all_that_can_learn_has_learnt,
    check_validation_leaves_the_loss_as_it_is,
]


# --- all of it ------------------------------------------------------------------------------------------------

# For every stage of a loss, ...
CHECKS: list[Check] = [
    check_terms_are_named_finite_float32_scalars,
    check_it_reads_no_more_than_it_says,
    check_every_learnable_tensor_is_a_parameter,
    check_neither_net_is_a_part_of_it,
    check_nothing_reaches_the_teacher,
    check_its_inputs_are_left_alone,
    check_classes_have_no_order,
    check_of_the_teacher_it_reads_probabilities_if_it_says_so,
    check_loss_and_gradient_are_finite_at_the_extremes,
    check_outputs_computed_in_bf16_give_about_the_same_loss,
    check_float32_is_close_to_float64,
    check_it_is_linear_in_its_weight_down_to_0,
    check_its_state_dict_is_all_there_is_to_it,
    check_it_is_described_in_one_line,
]
# ... and for all of them together.
CHECKS_OF_THE_WHOLE: list[Check] = [
    check_it_needs_labels_if_and_only_if_it_says_so,
    check_gradient_reaches_the_student_and_every_parameter,
    check_student_equal_to_teacher_is_the_minimum_if_it_says_so,
    check_its_batch_factor_is_as_it_says,
    check_the_order_of_a_batch_matters_only_if_it_says_so,
    check_with_weight_0_it_is_not_computed,
]


def id_of(value: Any) -> str:
    return str(getattr(value, "__name__", value)).removeprefix("check_")


@functools.cache
def pairs_for(make: Callable[[], Loss]) -> list[Pair]:
    """Returns the pairs of nets that a loss accepts; all accept equal ones."""
    pairs: list[Pair] = ["equal"]
    try:
        Case(make, "unequal").ready()
    except InputError:
        return pairs
    return [*pairs, "unequal"]


def hold(make: Callable[[], Loss], check: Check) -> None:
    """Holds a loss to a claim, for each pair of nets that it accepts and in each of its stages."""
    for pair in pairs_for(make):
        whole = Case(make, pair)
        for case in [whole] if check in CHECKS_OF_THE_WHOLE else whole.stages():
            try:
                check(case)
            except BaseException as error:
                error.add_note(f"for nets of {pair} shapes, in epoch {case.epoch}")
                raise

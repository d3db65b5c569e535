"""What holds for every registered loss, a plug-in's too: a new file in model/losses is held to it as it is.

Each claim is a plain function that takes `create`, so that broken losses can show that it rejects them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from model.devices import autocast
from model.engine import probe
from model.losses import LOSSES
from model.losses.base import Loss
from model.losses.kd import KDLoss
from model.nets import NETS
from model.outputs import Batch, Outputs, Probe, outputs_of
from model.registry import Registry, options_of
from model.teacher import FrozenTeacher

Create = Callable[[], Loss]
Check = Callable[[Create], None]
FIELDS = frozenset(field.name for field in dataclasses.fields(Outputs))
CPU = torch.device("cpu")


# --- a loss with plausible options ----------------------------------------------------------------------------

# Values at which a loss is itself; a required option that is not here gets one from its type and its bounds.
USUAL = {"alpha": 0.5, "temperature": 4.0}


def plausible(name: str, annotation: Any) -> Any:
    """Returns a value that a required option accepts."""
    base, bounds = annotation, {}
    if get_origin(annotation) is Annotated:
        base, *notes = get_args(annotation)
        for bound in (bound for note in notes for bound in getattr(note, "metadata", [])):
            bounds |= {key: getattr(bound, key) for key in ("gt", "ge", "lt", "le") if hasattr(bound, key)}
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
    if type(None) in get_args(base):
        return None
    return pytest.fail(f"no plausible value for the option {name}: {annotation}; give it a default, or extend USUAL")


def section_of(registry: Registry, name: str) -> dict[str, Any]:
    options = options_of(registry[name])
    required = {key: plausible(key, kind) for key, (kind, default) in options.items() if default is ...}
    section, problems = registry.resolve({"name": name, **required})
    assert problems == []
    return section


def test_required_options_of_every_kind_get_a_value_that_is_accepted() -> None:
    toys = Registry("toy")

    @toys.register("toy")
    def toy(
        *,
        temperature: Annotated[float, Field(gt=0, le=1000)],
        share: Annotated[float, Field(gt=0, lt=1)],
        margin: Annotated[float, Field(lt=0)],
        weight: float,
        width: Annotated[int, Field(ge=1)],
        levels: list[Annotated[int, Field(ge=0, le=1)]],
        kind: Literal["a", "b"],
        flag: bool,
        missing: float | None,
    ) -> None: ...

    section = section_of(toys, "toy")
    assert section["temperature"] == 4.0
    assert set(section) == {"name", *options_of(toy)}


# --- what a loss is given -------------------------------------------------------------------------------------

BATCH, CLASSES, SHAPE = 6, 7, (3, 16, 16)


@functools.cache
def nets() -> tuple[nn.Module, nn.Module]:
    """Returns student and teacher: nets with maps, preacts and embedding, of equal sizes for losses without adapters.

    Both in eval mode, so that every call sees the same net.
    """
    torch.manual_seed(230)
    student, teacher = (NETS.create({"name": "tiny"}, CLASSES).eval() for _ in range(2))
    return student, teacher


@functools.cache
def probes() -> tuple[Probe, Probe]:
    student, teacher = nets()
    return probe(student, "tiny", SHAPE), probe(teacher, "tiny", SHAPE)


def attached(loss: Loss) -> Loss:
    """Returns a loss as a run begins with it."""
    student, teacher = probes()
    loss.attach(student, teacher if loss.needs_teacher else None)
    return loss


def batch_of(size: int = BATCH, classes: int = CLASSES) -> Batch:
    images = torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(0))
    indices = torch.arange(size)
    return Batch(images, (3 * indices + 1) % classes, indices, torch.zeros_like(indices))


def only(outputs: Outputs, needs: frozenset[str]) -> Outputs:
    """Returns what a net may hand over at the least; logits are always there."""
    missing = {"features": (), "preacts": (), "embedding": None}
    return dataclasses.replace(outputs, **{name: value for name, value in missing.items() if name not in needs})


def tensors_of(outputs: Outputs) -> list[Tensor]:
    several = [outputs.logits, *outputs.features, *outputs.preacts, outputs.embedding]
    return [tensor for tensor in several if tensor is not None]


def as_leaves(outputs: Outputs) -> Outputs:
    """Returns the same outputs as the start of a graph."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    return Outputs(
        leaf(outputs.logits),
        tuple(map(leaf, outputs.features)),
        tuple(map(leaf, outputs.preacts)),
        None if outputs.embedding is None else leaf(outputs.embedding),
    )


def inputs_of(loss: Loss, precision: str = "fp32") -> tuple[Outputs, Outputs | None, Batch]:
    """Returns what the engine would hand to a loss; the student's part as leaves."""
    batch = batch_of()
    with torch.no_grad(), autocast(precision, CPU):
        student, teacher = (only(outputs_of(net, batch.images, FIELDS), loss.needs) for net in nets())
    return as_leaves(student), teacher if loss.needs_teacher else None, batch


def terms_of(loss: Loss, *inputs: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)  # for a loss that draws
    return loss(*inputs)


def values_of(loss: Loss, *inputs: Any) -> dict[str, float]:
    return {name: term.item() for name, term in terms_of(loss, *inputs).items()}


def alike(create: Create) -> Iterator[Loss]:
    """Yields two new losses of equal state; a loss may keep a state that a call changes."""
    for _ in range(2):
        torch.manual_seed(1)
        yield create()


def total(terms: dict[str, Tensor]) -> Tensor:
    """Returns the loss as the engine forms it."""
    return torch.stack(list(terms.values())).sum()


# --- the contract ---------------------------------------------------------------------------------------------


def check_terms_are_named_finite_float32_scalars(create: Create) -> None:
    loss = create()
    terms = terms_of(loss, *inputs_of(loss))
    assert terms
    assert not {"loss", "accuracy"} & set(terms), "names that the engine gives"
    for name, term in terms.items():
        assert isinstance(name, str)
        assert term.shape == ()
        assert term.dtype == torch.float32
        assert term.isfinite()
    assert total(terms).item() == pytest.approx(sum(term.item() for term in terms.values()), rel=1e-6)


def check_it_reads_no_more_than_it_says(create: Create) -> None:
    loss, twin = alike(create)
    assert loss.needs <= FIELDS
    batch = batch_of()
    with torch.no_grad():
        student, teacher = (outputs_of(net, batch.images, FIELDS) for net in nets())
    everything = student, teacher if loss.needs_teacher else None, batch
    assert values_of(twin, *everything) == values_of(loss, *inputs_of(loss))


def check_gradient_reaches_the_student_and_every_parameter(create: Create) -> None:
    loss = create()
    student, teacher, batch = inputs_of(loss)
    total(terms_of(loss, student, teacher, batch)).backward()
    gradients = [tensor.grad for tensor in tensors_of(student) if tensor.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0, "the student learns nothing"
    unreached = [name for name, p in loss.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == []


def check_every_learnable_tensor_is_a_parameter(create: Create) -> None:
    """Whatever is hidden in a list or a closure would neither be optimised nor be saved."""
    loss = create()
    student, teacher, batch = inputs_of(loss)
    known = {id(tensor) for tensor in [*tensors_of(student), *loss.parameters()]}
    leaves = list(leaves_of(total(terms_of(loss, student, teacher, batch))))
    assert [tuple(leaf.shape) for leaf in leaves if id(leaf) not in known] == []
    assert {name for name, _ in loss.named_parameters()} <= set(loss.state_dict())


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


def check_neither_net_is_a_part_of_it(create: Create) -> None:
    """A net that `attach` keeps as a module would be optimised, saved and put into other modes with the loss."""
    loss = create()

    def parts(*modules: nn.Module) -> set[int]:
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    assert not parts(loss) & parts(*nets())
    assert not {id(module) for net in nets() for module in net.modules()} & {id(module) for module in loss.modules()}


def check_nothing_reaches_the_teacher(create: Create, freeze: Callable[[nn.Module], nn.Module] = FrozenTeacher) -> None:
    loss = create()
    net = copy.deepcopy(nets()[1])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    student, _, batch = inputs_of(loss)
    outputs = only(outputs_of(freeze(net), batch.images, FIELDS), loss.needs)
    total(terms_of(loss, student, outputs if loss.needs_teacher else None, batch)).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is not None] == []
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def check_its_inputs_are_left_alone(create: Create) -> None:
    loss = create()
    student, teacher, batch = inputs_of(loss)
    given = [*tensors_of(student), *(tensors_of(teacher) if teacher else []), batch.images, batch.labels]
    before = [tensor.detach().clone() for tensor in given]
    with torch.no_grad():  # where autograd would not forbid it: validation
        terms_of(loss, student, teacher, batch)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


def check_loss_and_gradient_are_finite_at_logit_gaps_of_200(create: Create) -> None:
    loss = create().eval()  # a batch of one occurs in validation only: batch norm cannot train on it
    with torch.no_grad():
        full = [outputs_of(net, batch_of().images, FIELDS) for net in nets()]
    for size, classes in ((BATCH, CLASSES), (BATCH, 2), (1, CLASSES), (1, 2)):
        student, teacher = (only(cut(outputs, size), loss.needs) for outputs in full)
        for gap in (0.0, 200.0, -200.0):  # 0: constant logits
            target = torch.zeros(size, classes)
            target[:, 0] = gap
            teacher = dataclasses.replace(teacher, logits=target)
            for logits in (target, -target, torch.zeros_like(target)):
                leaves = as_leaves(dataclasses.replace(student, logits=logits))
                inputs = leaves, teacher if loss.needs_teacher else None, batch_of(size, classes)
                value = total(terms_of(loss, *inputs))
                assert value.isfinite()
                value.backward()
                found = [tensor.grad for tensor in tensors_of(leaves) if tensor.grad is not None]
                assert all(gradient.isfinite().all() for gradient in found)


def cut(outputs: Outputs, size: int) -> Outputs:
    assert outputs.embedding is not None
    maps = (tuple(m[:size] for m in maps) for maps in (outputs.features, outputs.preacts))
    return Outputs(outputs.logits[:size], *maps, outputs.embedding[:size])


def check_outputs_computed_in_bf16_give_about_the_same_loss(create: Create) -> None:
    full, half = (
        terms_of(loss, *inputs_of(loss, precision))
        for loss, precision in zip(alike(create), ("fp32", "bf16"), strict=True)
    )
    assert list(full) == list(half)
    for name in full:
        assert half[name].dtype == torch.float32
        assert_close(half[name], full[name], rtol=0.05, atol=0.02)


def check_its_state_dict_is_all_there_is_to_it(create: Create) -> None:
    torch.manual_seed(1)
    loss = create()
    with torch.no_grad():
        for value in loss.state_dict().values():
            if value.is_floating_point():
                value.mul_(1.25)
    torch.manual_seed(2)
    twin = create()
    twin.load_state_dict(loss.state_dict())
    inputs = inputs_of(loss)
    assert values_of(twin, *inputs) == values_of(loss, *inputs)
    assert values_of(twin.eval(), *inputs) == values_of(loss.eval(), *inputs)


def check_it_is_described_in_one_line(create: Create) -> None:
    described = create().describe()
    assert described
    assert "\n" not in described


def check_documentation(entry: Callable[..., Any]) -> None:
    documentation = inspect.getdoc(entry)
    assert documentation
    assert "Source: " in documentation
    for option in options_of(entry):
        assert f"\n    {option}: " in documentation


CHECKS: list[Check] = [
    check_terms_are_named_finite_float32_scalars,
    check_it_reads_no_more_than_it_says,
    check_gradient_reaches_the_student_and_every_parameter,
    check_every_learnable_tensor_is_a_parameter,
    check_neither_net_is_a_part_of_it,
    check_nothing_reaches_the_teacher,
    check_its_inputs_are_left_alone,
    check_loss_and_gradient_are_finite_at_logit_gaps_of_200,
    check_outputs_computed_in_bf16_give_about_the_same_loss,
    check_its_state_dict_is_all_there_is_to_it,
    check_it_is_described_in_one_line,
]


def id_of(check: Check) -> str:
    return check.__name__.removeprefix("check_")


@pytest.mark.parametrize("check", CHECKS, ids=id_of)
@pytest.mark.parametrize("name", list(LOSSES))
def test_contract(name: str, check: Check) -> None:
    check(lambda: attached(LOSSES.create(section_of(LOSSES, name))))


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_option_is_described_and_a_source_is_named(name: str) -> None:
    check_documentation(LOSSES[name])


# --- the contract itself: a right loss passes, broken ones do not -----------------------------------------------


class Hint(Loss):
    """A regression of the teacher's embedding through a learnt map: all that a feature loss may have.

    Source: made here.

    Args:
        scale: Where the learnt scale begins.
    """

    needs = frozenset({"embedding", "features"})
    needs_teacher = True

    def __init__(self, *, scale: Annotated[float, Field(gt=0)] = 1.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        own, other = student.outputs.embedding, teacher.outputs.embedding
        assert own is not None
        assert other is not None
        self.adapter = nn.Sequential(
            nn.Linear(own.shape[1], other.shape[1], bias=False), nn.BatchNorm1d(other.shape[1])
        )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        hint = F.mse_loss(self.adapter(student.embedding), teacher.embedding)
        return {
            "hint": hint * (-self.log_scale).exp() + self.log_scale,
            "map": F.mse_loss(student.features[-1], teacher.features[-1]),
        }

    def describe(self) -> str:
        return "hint x 1 + map x 1"


@pytest.mark.parametrize("check", CHECKS, ids=id_of)
def test_a_loss_with_adapters_can_pass(check: Check) -> None:
    check(lambda: attached(Hint()))
    check_documentation(Hint)


def test_a_loss_without_options_needs_no_constructor() -> None:
    losses = Registry("loss")

    @losses.register("mse")
    class MSE(Loss):
        needs_teacher = True

        def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
            assert teacher is not None
            return {"mse": F.mse_loss(student.logits, teacher.logits)}

    loss = losses.create(section_of(losses, "mse"))
    assert terms_of(loss, *inputs_of(loss))["mse"] > 0
    assert losses.resolve({"name": "mse", "weight": 1})[1] == [("weight", "unknown option; known: none")]


class WithKD(KDLoss):
    """Source: a base for what is broken below."""

    def __init__(self) -> None:
        super().__init__(alpha=0.5, temperature=4.0)


class LogOfSoftmax(WithKD):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        p_s, p_t = student.logits.softmax(1), teacher.logits.softmax(1)
        return {"kd": (p_t * (p_t.log() - p_s.log())).sum(1).mean()}


class TermPerSample(WithKD):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(student.logits, batch.labels, reduction="none")}


class TermNamedLoss(WithKD):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(student.logits, batch.labels)}


class HalfPrecision(WithKD):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(student.logits.bfloat16(), batch.labels)}


class DetachedStudent(WithKD):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        logits = student.logits.detach() + 0 * student.logits
        return {"ce": F.cross_entropy(logits, batch.labels)}


class ScalesInAList(WithKD):
    """Like the variances of VID in a known codebase: neither optimised nor saved."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [torch.zeros((), requires_grad=True)]

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"kd": super().forward(student, teacher, batch)["kd"] * self.scales[0].exp()}


class IdleParameter(WithKD):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))


class Forgetful(WithKD):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(()), persistent=False)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"kd": super().forward(student, teacher, batch)["kd"] * self.weight}


class TeacherKept(WithKD):
    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        self.teacher = teacher.net


class ClassifierShared(WithKD):
    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        self.register_buffer("classifier", teacher.net.get_parameter("linear.weight").detach())


class InPlace(WithKD):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        teacher.logits.div_(4)
        return super().forward(student, teacher, batch)


class SilentlyGreedy(WithKD):
    """Reads the embedding without saying so, where it is there."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        extra = {} if student.embedding is None else {"norm": student.embedding.norm()}
        return super().forward(student, teacher, batch) | extra


class TwoLines(WithKD):
    def describe(self) -> str:
        return "KL\n"


class Undocumented(WithKD):
    """Source: the option is not explained."""

    def __init__(self, *, sharpness: float = 1.0) -> None:
        super().__init__()


class WithoutASource(WithKD):
    """A loss from nowhere."""


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (LogOfSoftmax, check_loss_and_gradient_are_finite_at_logit_gaps_of_200),
        (TermPerSample, check_terms_are_named_finite_float32_scalars),
        (TermNamedLoss, check_terms_are_named_finite_float32_scalars),
        (HalfPrecision, check_terms_are_named_finite_float32_scalars),
        (HalfPrecision, check_outputs_computed_in_bf16_give_about_the_same_loss),
        (DetachedStudent, check_gradient_reaches_the_student_and_every_parameter),
        (IdleParameter, check_gradient_reaches_the_student_and_every_parameter),
        (ScalesInAList, check_every_learnable_tensor_is_a_parameter),
        (Forgetful, check_its_state_dict_is_all_there_is_to_it),
        (TeacherKept, check_neither_net_is_a_part_of_it),
        (ClassifierShared, check_neither_net_is_a_part_of_it),
        (InPlace, check_its_inputs_are_left_alone),
        (SilentlyGreedy, check_it_reads_no_more_than_it_says),
        (TwoLines, check_it_is_described_in_one_line),
        (Undocumented, check_documentation),
        (WithoutASource, check_documentation),
    ],
    ids=lambda value: value.__name__.removeprefix("check_"),
)
def test_the_contract_rejects_a_broken_loss(broken: Create, check: Check) -> None:
    with pytest.raises(AssertionError):
        check(lambda: attached(broken()))


def test_the_contract_rejects_a_teacher_that_is_not_frozen() -> None:
    with pytest.raises(AssertionError):
        check_nothing_reaches_the_teacher(WithKD, freeze=lambda net: net)

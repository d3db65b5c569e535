"""What holds for every registered loss, a plug-in's too: a new file in model/losses is held to it as it is.

The claims are in contract.py; here they meet every loss of the registry, and losses that are made to break one of them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from contract import (
    CHECKS,
    CHECKS_OF_THE_WHOLE,
    TRAINING_CHECKS,
    Check,
    check_a_run_with_weight_0_is_the_run_without_it,
    check_all_that_can_learn_has_learnt,
    check_classes_have_no_order,
    check_documentation,
    check_every_option_changes_the_loss,
    check_float32_is_close_to_float64,
    check_gradient_reaches_the_student_and_every_parameter,
    check_it_is_described_in_one_line,
    check_it_needs_labels_if_and_only_if_it_says_so,
    check_it_reads_no_more_than_it_says,
    check_its_batch_factor_is_as_it_says,
    check_its_inputs_are_left_alone,
    check_its_state_dict_is_all_there_is_to_it,
    check_neither_net_is_a_part_of_it,
    check_no_option_changes_the_formula_at_its_bound,
    check_of_the_teacher_it_reads_probabilities_if_it_says_so,
    check_outputs_computed_in_bf16_give_about_the_same_loss,
    check_student_and_loss_were_in_train_mode_at_every_step,
    check_student_equal_to_teacher_is_the_minimum_if_it_says_so,
    check_terms_are_named_finite_float32_scalars,
    check_the_order_of_a_batch_matters_only_if_it_says_so,
    check_validation_leaves_the_loss_as_it_is,
    hold,
    id_of,
    maker,
    plausible_options,
    train,
)
from helpers import ROOT
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.base import Loss
from model.outputs import Batch, Outputs, Probe, Samples
from model.registry import Registry, options_of

Create = Callable[[], Loss]

# The scope makes pytest run all tests of a loss in a row; where several processes share them, too.
every_loss = pytest.mark.parametrize("name", list(LOSSES))


@every_loss
@pytest.mark.parametrize("check", [*CHECKS, *CHECKS_OF_THE_WHOLE], ids=id_of)
def test_contract(name: str, check: Check) -> None:
    hold(maker(name), check)


@every_loss
def test_in_a_real_training_all_learn_but_the_teacher(name: str) -> None:
    diary = train(maker(name))
    for check in TRAINING_CHECKS:
        check(diary)


@every_loss
def test_a_run_with_weight_0_is_the_run_without_it(name: str) -> None:
    check_a_run_with_weight_0_is_the_run_without_it(maker(name))


@every_loss
def test_every_option_changes_the_loss(name: str) -> None:
    check_every_option_changes_the_loss(LOSSES[name])


@every_loss
def test_no_option_changes_the_formula_at_its_bound(name: str) -> None:
    check_no_option_changes_the_formula_at_its_bound(LOSSES[name])


@every_loss
def test_every_option_is_described_and_a_source_is_named(name: str) -> None:
    check_documentation(LOSSES[name])


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
        initial_epochs: Annotated[int, Field(ge=1)] = 30,
    ) -> None: ...

    options = plausible_options(toys["toy"])
    assert options["temperature"] == 4.0
    assert options["initial_epochs"] == 1
    assert set(options) == set(options_of(toy))


# --- the contract itself: a right loss passes, broken ones do not -----------------------------------------------


class Hint(Loss):
    """All that a loss may have: adapters, a memory, a stage of its own, draws, labels, a learnt scale.

    Source: made here.

    Args:
        scale: Where the learnt scale begins.
        initial_epochs: In which only the map is learnt.
        kind: Of the distance between maps.
    """

    needs = frozenset({"embedding", "features"})
    needs_teacher = True
    needs_labels = True
    trains_classifier = False
    usual_weight = 2.0
    least_at_teacher = False
    batch_factor = None

    memory: Tensor

    def __init__(
        self,
        *,
        scale: Annotated[float, Field(gt=0)] = 1.0,
        initial_epochs: Annotated[int, Field(ge=1)] = 5,
        kind: Literal["squares", "absolute"] = "squares",
    ) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.initial_epochs = initial_epochs
        self.distance = F.mse_loss if kind == "squares" else F.l1_loss
        self.epoch = 0

    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        own, other = student.outputs, teacher.outputs
        assert own.embedding is not None
        assert other.embedding is not None
        width = other.embedding.shape[1]
        self.adapter = nn.Sequential(nn.Linear(own.embedding.shape[1], width, bias=False), nn.BatchNorm1d(width))
        self.map = nn.Conv2d(own.features[-1].shape[1], other.features[-1].shape[1], 1)

    def enrol(self, samples: Samples) -> None:
        self.register_buffer("memory", torch.zeros(len(samples.labels)))

    def on_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        if self.epoch < self.initial_epochs:
            return {"map": self.distance(self.map(student.features[-1]), teacher.features[-1])}
        fitted = self.adapter(student.embedding)
        distances = (fitted - teacher.embedding).square().mean(1)
        noise = 1 + 0.1 * torch.rand(distances.shape, device=distances.device) if self.training else 1
        if self.training:
            places = batch.indices.to(self.memory.device)
            distances = distances + self.memory[places]
            self.memory[places] = distances.detach().to(self.memory.dtype)
        hint = (distances * noise).mean() / distances.detach().max().clamp(min=1e-12)
        return {"hint": hint * (-self.log_scale).exp() + self.log_scale}

    def describe(self) -> str:
        return "map, then hint"


@pytest.mark.parametrize("check", [*CHECKS, *CHECKS_OF_THE_WHOLE], ids=id_of)
def test_a_loss_that_has_all_that_a_loss_may_have_can_pass(check: Check) -> None:
    hold(lambda: Hint(initial_epochs=1), check)


def test_and_can_be_trained_and_has_no_idle_option() -> None:
    diary = train(lambda: Hint(initial_epochs=1))
    for check in TRAINING_CHECKS:
        check(diary)
    check_every_option_changes_the_loss(Hint)
    check_documentation(Hint)


def test_a_loss_without_options_needs_no_constructor() -> None:
    losses = Registry("loss")

    @losses.register("mse")
    class MSE(Loss):
        """Source: made here."""

        needs_teacher = True
        teacher_temperature = None  # it reads logits

        def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
            assert teacher is not None
            return {"mse": F.mse_loss(student.logits, teacher.logits)}

        def describe(self) -> str:
            return "MSE"

    for check in (*CHECKS, *CHECKS_OF_THE_WHOLE):
        hold(maker("mse", losses), check)
    assert losses.resolve({"name": "mse", "weight": 1})[1] == [("weight", "unknown option; known: none")]


class Divergence(Loss):
    """KL of the softened teacher to the softened student.

    Source: a base for what is broken below.
    """

    needs_teacher = True
    temperature = 4.0

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        log_p_s, log_p_t = ((each.logits / self.temperature).log_softmax(1) for each in (student, teacher))
        return {"kl": (log_p_t.exp() * (log_p_t - log_p_s)).sum(1).mean() * self.temperature**2}

    def describe(self) -> str:
        return "KL x 16"


def test_the_base_of_the_broken_ones_is_right() -> None:
    for check in (*CHECKS, *CHECKS_OF_THE_WHOLE):
        hold(Divergence, check)


class TermPerSample(Divergence):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(student.logits, batch.labels, reduction="none")}


class TermNamedLoss(Divergence):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"loss": super().forward(student, teacher, batch)["kl"]}


class HalfPrecision(Divergence):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return super().forward(student.map(Tensor.bfloat16), teacher.map(Tensor.bfloat16), batch)


class Cancels(Divergence):
    """Takes the difference of large numbers."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {"kl": ((student.logits + 1e6) - (teacher.logits + 1e6)).square().mean()}


class DetachedStudent(Divergence):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return super().forward(student.map(lambda t: t.detach() + 0 * t), teacher, batch)


class IdleParameter(Divergence):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))


class Forgetful(Divergence):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(()), persistent=False)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"kl": super().forward(student, teacher, batch)["kl"] * self.weight}


class RemembersTheLastStep(Divergence):
    """A running mean that is no buffer: a run that is resumed is another one."""

    last = 1.0

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        term = super().forward(student, teacher, batch)["kl"]
        scaled = term * self.last
        self.last = 0.5 * self.last + term.item()
        return {"kl": scaled}


class WritesInValidation(Divergence):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        self.count += 1
        return super().forward(student, teacher, batch)


class TeacherKept(Divergence):
    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        self.teacher = teacher.net


class ClassifierShared(Divergence):
    def attach(self, student: Probe, teacher: Probe | None) -> None:
        assert teacher is not None
        self.register_buffer("classifier", teacher.net.get_parameter("linear.weight").detach())


class InPlace(Divergence):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        teacher.logits.div_(4)
        return super().forward(student, teacher, batch)


class SilentlyGreedy(Divergence):
    """Reads the embedding without saying so, where it is there."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        extra = {} if student.embedding is None else {"norm": student.embedding.norm()}
        return super().forward(student, teacher, batch) | extra


class ReadsTheTeachersLogits(Divergence):
    """Says with its temperature that it reads probabilities."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {"kl": F.mse_loss(student.logits, teacher.logits)}


class NeedsLabelsInSilence(Divergence):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        right = student.logits.argmax(1) == batch.labels
        return {"kl": super().forward(student, teacher, batch)["kl"] * (1 + right.float().mean())}


class NeedsNoLabels(Divergence):
    needs_labels = True


class SaysItIsNotLeast(Divergence):
    least_at_teacher = False


class SaysItHasNoFactor(Divergence):
    batch_factor = None


class SaysThatOrderMatters(Divergence):
    order_matters = True


class OrderMatters(Divergence):
    """Weighs the samples by their places."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        weights = torch.arange(len(student.logits)).to(student.logits)
        gap = (student.logits - teacher.logits).square().mean(1)
        return {"kl": (weights * gap).mean()}


class ClassesInOrder(Divergence):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {"kl": (student.logits.cumsum(1) - teacher.logits.cumsum(1)).square().mean()}


class FrozenInSilence(Divergence):
    """A parameter whose gradient is always 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        return {"kl": super().forward(student, teacher, batch)["kl"] * (1 + self.scale - self.scale)}


class StaysInEval(Divergence):
    """An adapter that is put into eval mode by the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(7, 7)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        assert teacher is not None
        return {"kl": F.mse_loss(self.adapter.eval()(student.logits), teacher.logits)}


class TwoLines(Divergence):
    def describe(self) -> str:
        return "KL\n"


class Undocumented(Divergence):
    """Source: the option is not explained."""

    def __init__(self, *, sharpness: float = 1.0) -> None:
        super().__init__()


class WithoutASource(Divergence):
    """A loss from nowhere."""


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (TermPerSample, check_terms_are_named_finite_float32_scalars),
        (TermNamedLoss, check_terms_are_named_finite_float32_scalars),
        (HalfPrecision, check_terms_are_named_finite_float32_scalars),
        (HalfPrecision, check_outputs_computed_in_bf16_give_about_the_same_loss),
        (Cancels, check_float32_is_close_to_float64),
        (DetachedStudent, check_gradient_reaches_the_student_and_every_parameter),
        (IdleParameter, check_gradient_reaches_the_student_and_every_parameter),
        (Forgetful, check_its_state_dict_is_all_there_is_to_it),
        (RemembersTheLastStep, check_its_state_dict_is_all_there_is_to_it),
        (TeacherKept, check_neither_net_is_a_part_of_it),
        (ClassifierShared, check_neither_net_is_a_part_of_it),
        (InPlace, check_its_inputs_are_left_alone),
        (SilentlyGreedy, check_it_reads_no_more_than_it_says),
        (NeedsNoLabels, check_it_needs_labels_if_and_only_if_it_says_so),
        (SaysItIsNotLeast, check_student_equal_to_teacher_is_the_minimum_if_it_says_so),
        (SaysItHasNoFactor, check_its_batch_factor_is_as_it_says),
        (SaysThatOrderMatters, check_the_order_of_a_batch_matters_only_if_it_says_so),
        (OrderMatters, check_the_order_of_a_batch_matters_only_if_it_says_so),
        (ClassesInOrder, check_classes_have_no_order),
        (ReadsTheTeachersLogits, check_of_the_teacher_it_reads_probabilities_if_it_says_so),
        (TwoLines, check_it_is_described_in_one_line),
    ],
    ids=id_of,
)
def test_the_contract_rejects_a_broken_loss(broken: Create, check: Check) -> None:
    with pytest.raises(AssertionError):
        hold(broken, check)


def test_the_contract_rejects_a_loss_that_reads_labels_in_silence() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        hold(NeedsLabelsInSilence, check_it_needs_labels_if_and_only_if_it_says_so)


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (FrozenInSilence, check_all_that_can_learn_has_learnt),
        (StaysInEval, check_student_and_loss_were_in_train_mode_at_every_step),
        (WritesInValidation, check_validation_leaves_the_loss_as_it_is),
    ],
    ids=id_of,
)
def test_the_contract_rejects_a_broken_training(broken: Create, check: Callable[[Any], None]) -> None:
    diary = train(broken)
    with pytest.raises(AssertionError):
        check(diary)


@pytest.mark.parametrize("broken", [Undocumented, WithoutASource], ids=id_of)
def test_the_contract_rejects_a_loss_that_is_not_explained(broken: Callable[..., Loss]) -> None:
    with pytest.raises(AssertionError):
        check_documentation(broken)


# --- a plug-in ------------------------------------------------------------------------------------------------

PLUGIN = '''
"""A plug-in."""
from typing import Annotated

from pydantic import Field
from torch.nn import functional as F

from model.losses import LOSSES
from model.losses.base import Loss


@LOSSES.register("{name}")
class Plugin(Loss):
    """Squared differences of logits to a power.

    Source: made here.

    Args:
        power: The power.
    """

    needs_teacher = True

    teacher_temperature = None

    def __init__(self, *, power: Annotated[float, Field(gt=0, le=3)]) -> None:
        super().__init__()
        self.power = power

    def forward(self, student, teacher, batch):
        gap = (student.logits - teacher.logits).square() + 0.5
        return {{"{name}": (gap**self.power - 0.5**self.power).{reduction}()}}

    def describe(self):
        return "gap"
'''


def test_a_new_file_in_model_losses_is_held_to_the_contract_without_any_other_change(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "model", tmp_path / "model", ignore=ignore)
    shutil.copytree(ROOT / "tests/model/losses", tmp_path / "tests/model/losses", ignore=ignore)
    for name in ("helpers.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    for name in ("pyproject.toml", "process.py", "utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name, reduction in (("plugin_right", "mean"), ("plugin_wrong", "sum")):
        (tmp_path / f"model/losses/{name}.py").write_text(PLUGIN.format(name=name, reduction=reduction))

    tests = "tests/model/losses/test_loss_contracts.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-rA", tests]
    done = subprocess.run(
        [*command, "-k", "plugin_right or (plugin_wrong and (factor or described))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    outcomes = {
        line.partition(" - ")[0].split("::")[-1]: line.split()[0]
        for line in done.stdout.splitlines()
        if line.startswith(("PASSED", "FAILED", "ERROR"))
    }
    assert len([test for test in outcomes if "right" in test]) == len(CHECKS) + len(CHECKS_OF_THE_WHOLE) + 5, (
        done.stdout
    )
    assert len([test for test in outcomes if "wrong" in test]) == 3
    failed = {test for test, outcome in outcomes.items() if outcome != "PASSED"}
    assert failed == {"test_contract[its_batch_factor_is_as_it_says-plugin_wrong]"}, done.stdout

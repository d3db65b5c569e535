"""Mistakes that other frameworks have made with losses: a broken twin of what we have, and the claim that it breaks.

The numbers are those of the list of traps in the notes on methods. Where a line of the engine is what matters, the twin
is the engine's own source with that line changed. Traps 18, 19 and 22, into which scripts fall and no loss, are in
tests/test_script_traps.py.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from contract import (
    CLASSES,
    NUM_SAMPLES,
    Batches,
    Case,
    Diary,
    check_all_that_can_learn_has_learnt,
    check_every_learnable_tensor_is_a_parameter,
    check_every_option_changes_the_loss,
    check_it_is_linear_in_its_weight_down_to_0,
    check_its_batch_factor_is_as_it_says,
    check_its_state_dict_is_all_there_is_to_it,
    check_loss_and_gradient_are_finite_at_the_extremes,
    check_no_option_changes_the_formula_at_its_bound,
    check_nothing_reaches_the_teacher,
    check_student_and_loss_were_in_train_mode_at_every_step,
    check_student_equal_to_teacher_is_the_minimum_if_it_says_so,
    check_the_teacher_is_as_it_was,
    check_with_weight_0_it_is_not_computed,
    hold,
    train,
)
from golden import check_golden_logits, golden_labels, golden_logits
from helpers import ROOT, changed, rejected
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from model import engine
from model.losses import LOSSES, objective
from model.losses.base import Loss
from model.losses.dkd import DKDLoss, dkd_loss
from model.losses.kd import KDLoss, kd_loss
from model.losses.mlkd import MLKDLoss
from model.losses.objective import Objective
from model.outputs import Batch, Outputs
from model.teacher import FrozenTeacher
from model.teacher_store import TeacherStore

Terms = dict[str, Tensor]


def logits_of(student: Outputs, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
    assert teacher is not None
    return student.logits, teacher.logits


class KL(Loss):
    """Source: the plainest loss of a teacher."""

    needs_teacher = True

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        return {"kl": kd_loss(*logits_of(student, teacher), 4.0)}

    def describe(self) -> str:
        return "KL"


def test_what_is_broken_below_is_right() -> None:
    check_the_teacher_is_as_it_was(train(KL))
    check_student_and_loss_were_in_train_mode_at_every_step(train(KL))
    for check in (
        check_its_batch_factor_is_as_it_says,
        check_it_is_linear_in_its_weight_down_to_0,
        check_student_equal_to_teacher_is_the_minimum_if_it_says_so,
        check_loss_and_gradient_are_finite_at_the_extremes,
        check_nothing_reaches_the_teacher,
        check_with_weight_0_it_is_not_computed,
    ):
        hold(KL, check)


# --- the teacher and the engine -------------------------------------------------------------------------------


class Drifting(FrozenTeacher):
    """Goes into train mode with whatever it is a part of."""

    def train(self, mode: bool = True) -> Drifting:
        nn.Module.train(self, mode)
        return self


def test_trap_1_a_teacher_in_train_mode_whose_statistics_drift() -> None:
    with rejected():
        check_the_teacher_is_as_it_was(train(KL, freeze=Drifting))


def test_trap_4_a_student_in_eval_mode_from_the_second_epoch_on() -> None:
    train_epoch = changed(
        engine.train_epoch,
        ("    student.train()\n", "    student.train() if epoch == 0 else None\n"),
    )
    evaluate = changed(
        engine.evaluate,
        ("    device = next(net.parameters()).device\n", "    device = next(net.eval().parameters()).device\n"),
    )
    with rejected():
        check_student_and_loss_were_in_train_mode_at_every_step(train(KL, train_epoch=train_epoch, evaluate=evaluate))


class WithAGraph(FrozenTeacher):
    """Runs the net as any other, and its parameters learn."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        net.requires_grad_()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def forward_with_features(self, images: Tensor) -> Outputs:
        return self.net.forward_with_features(images)  # type: ignore[operator]


def test_trap_5_a_teacher_that_builds_a_graph_and_gathers_gradients() -> None:
    with rejected():
        hold(KL, lambda case: check_nothing_reaches_the_teacher(case, freeze=WithAGraph))
    with rejected():
        check_the_teacher_is_as_it_was(train(KL, freeze=WithAGraph))


class ByBatch(KL):
    """Source: wants the teacher's batch norms to normalise with the statistics of each batch."""

    teacher_statistics = "batch"


def test_trap_10_a_teacher_by_batch_statistics_that_leaks_into_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    check_the_teacher_is_as_it_was(train(ByBatch))

    @contextlib.contextmanager
    def in_train_mode(net: nn.Module) -> Iterator[None]:
        for part in net.modules():
            part.training = True
        yield
        net.eval()

    monkeypatch.setattr(engine, "batch_statistics", in_train_mode)
    with rejected():
        check_the_teacher_is_as_it_was(train(ByBatch))


def test_trap_10_a_teacher_by_batch_statistics_that_leaks_into_what_comes_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextlib.contextmanager
    def for_good(net: nn.Module) -> Iterator[None]:
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.training, part.track_running_stats = True, False
        yield

    monkeypatch.setattr(engine, "batch_statistics", for_good)
    with rejected():
        check_the_teacher_is_as_it_was(train(ByBatch))


class ByPosition:
    """A store that keeps answers by their places in the batch, as a list over an epoch does."""

    def __init__(self, store: TeacherStore) -> None:
        self.store = store

    def read(self, samples: Tensor, *key: Any) -> Any:
        return self.store.read(torch.arange(len(samples)), *key)

    def write(self, outputs: Any, samples: Tensor, *key: Any) -> None:
        self.store.write(outputs, torch.arange(len(samples)), *key)

    def stored(self, field: str, values: Tensor) -> Tensor:
        return self.store.stored(field, values)


def check_stored_answers_train_as_fresh_ones_do(root: Path, kept_as: Callable[[TeacherStore], Any]) -> None:
    """Batches are drawn in another order, of other samples, in every epoch."""

    def with_store(teacher: FrozenTeacher, loader: Batches) -> None:
        widths = {"logits": CLASSES}
        store = TeacherStore.open(root, {}, num_samples=NUM_SAMPLES, num_views=1, widths=widths, dtype="fp32")
        teacher.stores.append((loader.split, kept_as(store)))

    fresh, stored = train(KL), train(KL, ready_teacher=with_store)
    assert stored.teacher.num_computed < fresh.teacher.num_computed, "nothing was stored"
    for name, value in fresh.after.items():
        assert_close(stored.after[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_trap_13_stored_answers_of_other_samples(tmp_path: Path) -> None:
    check_stored_answers_train_as_fresh_ones_do(tmp_path / "right", lambda store: store)
    with rejected():
        check_stored_answers_train_as_fresh_ones_do(tmp_path / "broken", ByPosition)


# --- formulas -------------------------------------------------------------------------------------------------


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Returns Pearson's correlation along the last dimension."""
    one, other = (values - values.mean(-1, keepdim=True) for values in (one, other))
    return F.cosine_similarity(one, other, dim=-1)


class CorrelationAdded(KL):
    """Like DIST, but that what classes have in common costs."""

    sign = 1.0

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        own, other = (logits.softmax(1) for logits in logits_of(student, teacher))
        rows, columns = 1 - correlation(own, other).mean(), 1 - correlation(own.T, other.T).mean()
        return {"dist": rows + (columns if self.sign > 0 else 1 - columns)}


class CorrelationSubtracted(CorrelationAdded):
    sign = -1.0


def test_trap_2_a_correlation_with_the_wrong_sign() -> None:
    hold(CorrelationAdded, check_student_equal_to_teacher_is_the_minimum_if_it_says_so)
    with rejected():
        hold(CorrelationSubtracted, check_student_equal_to_teacher_is_the_minimum_if_it_says_so)


class Summed(DKDLoss):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        return {"dkd": super().forward(student, teacher, batch)["dkd"] * len(student.logits)}


def check_dkd_is_that_of_the_authors(function: Callable[..., Tensor]) -> None:
    check_golden_logits("DKD_a1_b8_T4", lambda s, t: function(s, t, golden_labels(), 1.0, 8.0, 4.0))


def test_trap_3_a_sum_over_the_batch_that_was_to_be_a_mean() -> None:
    hold(DKDLoss, check_its_batch_factor_is_as_it_says)
    with rejected():
        hold(Summed, check_its_batch_factor_is_as_it_says)
    check_dkd_is_that_of_the_authors(dkd_loss)
    with rejected():
        check_dkd_is_that_of_the_authors(lambda *inputs: dkd_loss(*inputs) * len(inputs[0]))


def check_it_is_kd(function: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    for temperature in (1.0, 4.0):
        check_golden_logits(f"KD_T{temperature:g}", lambda s, t, at=temperature: function(s, t, at))


def test_trap_6_squared_differences_of_probabilities_under_the_name_of_kd() -> None:
    check_it_is_kd(kd_loss)
    with rejected():
        check_it_is_kd(lambda s, t, at: F.mse_loss((s / at).softmax(1), (t / at).softmax(1)))


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
def test_trap_11_a_divergence_divided_by_the_number_of_classes_as_well() -> None:
    def mean(student: Tensor, teacher: Tensor, at: float) -> Tensor:
        return F.kl_div((student / at).log_softmax(1), (teacher / at).softmax(1), reduction="mean") * at**2

    with rejected():
        check_it_is_kd(mean)
    check_it_is_kd(lambda s, t, at: s.shape[1] * mean(s, t, at))
    # Old params.json mean just this one.
    student, teacher = golden_logits()
    assert_close(kd_loss(student, teacher, 4.0, "mean"), mean(student, teacher, 4.0), rtol=1e-12, atol=0)


class LogOfSoftmax(KL):
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        own, other = (logits.softmax(1) for logits in logits_of(student, teacher))
        return {"kl": (other * (other.log() - own.log())).sum(1).mean()}


class LogOfSoftmaxAtATemperature(KL):
    """Safe at its own temperature, and at no other."""

    def __init__(self, *, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        own, other = ((logits / self.temperature).softmax(1) for logits in logits_of(student, teacher))
        return {"kl": (other * (other.log() - own.log())).sum(1).mean()}


class SubtractsAThousand(KL):
    """DKD with sums of probabilities, and a number that is large enough, as it was hoped."""

    needs_labels = True

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        is_label = F.one_hot(batch.labels, student.logits.shape[1])
        own, other = (logits.softmax(1) for logits in logits_of(student, teacher))
        binary = [torch.stack([(p * is_label).sum(1), (p * (1 - is_label)).sum(1)], 1) for p in (own, other)]
        target = F.kl_div(binary[0].log(), binary[1], reduction="batchmean")
        rest = [logits - 1000 * is_label for logits in logits_of(student, teacher)]
        return {"dkd": target + F.kl_div(rest[0].log_softmax(1), rest[1].softmax(1), reduction="batchmean")}


@pytest.mark.parametrize("broken", [LogOfSoftmax, LogOfSoftmaxAtATemperature, SubtractsAThousand])
def test_trap_8_logarithms_of_what_has_become_0(broken: type[Loss]) -> None:
    with rejected():
        hold(broken, check_loss_and_gradient_are_finite_at_the_extremes)
    hold(DKDLoss, check_loss_and_gradient_are_finite_at_the_extremes)


# --- parameters -----------------------------------------------------------------------------------------------


class VariancesInAList(KL):
    """Like VID in a known codebase: neither optimised nor saved."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scales = [torch.zeros((), requires_grad=True)]

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        gap = F.mse_loss(*logits_of(student, teacher))
        return {"vid": gap * (-self.log_scales[0]).exp() + self.log_scales[0]}


class VariancesInABuffer(VariancesInAList):
    """Saved, but not optimised."""

    log_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_scale", torch.zeros(()))
        self.log_scales = [self.log_scale.requires_grad_()]


class VariancesLeftOut(VariancesInAList):
    """Parameters that the optimizer never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.log_scales = [self.log_scale]


def test_trap_7_variances_that_are_never_learnt() -> None:
    for broken in (VariancesInAList, VariancesInABuffer):
        with rejected():
            hold(broken, check_every_learnable_tensor_is_a_parameter)
    right = train(VariancesLeftOut)
    check_all_that_can_learn_has_learnt(right)
    frozen = Diary(right.learner, right.teacher, before=right.before, after={**right.after})
    frozen.after["loss.losses.own.log_scale"] = frozen.before["loss.losses.own.log_scale"]
    with rejected():
        check_all_that_can_learn_has_learnt(frozen)


class DrawsItsMemoryAnew(KL):
    """A memory that a checkpoint does not hold: a run that is resumed is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.rand(NUM_SAMPLES)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        return {"kl": super().forward(student, teacher, batch)["kl"] * self.memory.mean()}


def test_trap_7_a_memory_that_is_not_kept() -> None:
    with rejected():
        hold(DrawsItsMemoryAnew, check_its_state_dict_is_all_there_is_to_it)


# --- options and weights --------------------------------------------------------------------------------------


class MaskOfAllOrNothing(MLKDLoss):
    """Whatever the option says, the mask is a factor of the whole."""

    def __init__(self, *, mask: Literal["code", "paper"] = "code") -> None:
        super().__init__(mask="code")


class OneMask(MLKDLoss):
    def __init__(self, *, mask: Literal["code", "paper"] = "code") -> None:
        super().__init__(mask=mask)


def test_trap_9_a_mask_that_selects_nothing() -> None:
    check_every_option_changes_the_loss(OneMask)
    with rejected():
        check_every_option_changes_the_loss(MaskOfAllOrNothing)


class AnotherConventionAtTheEnd(Objective):
    """Without T^2 where the labels' part is off, as if that were another loss."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        weight = self.curves["own"](self.epoch) if "own" in self.curves else 0
        return {
            name: term / 16 if name != "ce" and weight < 0.1 else term
            for name, term in super().forward(student, teacher, batch).items()
        }


def check_kd_is_linear_in_alpha(kd: Callable[..., Loss]) -> None:
    def value(alpha: float) -> float:
        ready = Case(lambda: kd(alpha=alpha, temperature=4.0)).ready()
        return sum(ready.values(*ready.inputs()).values())

    labels, teacher = value(0.0), value(1.0)
    for alpha in (0.25, 0.5, 1e-6, 1 - 1e-6):
        assert value(alpha) == pytest.approx((1 - alpha) * labels + alpha * teacher, rel=1e-5)


class KDWithAFlag(KDLoss):
    """Without labels another loss: KL as it is."""

    def __init__(self, *, alpha: float, temperature: float) -> None:
        super().__init__(alpha=alpha, temperature=temperature, temperature_squared=alpha < 1)


class LosesItsFactorAtTheEnd(KL):
    def __init__(self, *, alpha: Annotated[float, Field(ge=0, le=1)] = 0.5) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        factor = 16 if self.alpha < 1 else 1
        return {"kl": self.alpha * factor * super().forward(student, teacher, batch)["kl"]}


def test_trap_12_conventions_that_change_with_a_weight() -> None:
    with rejected():
        hold(KL, lambda case: check_it_is_linear_in_its_weight_down_to_0(case, AnotherConventionAtTheEnd))
    check_kd_is_linear_in_alpha(KDLoss)
    with rejected():
        check_kd_is_linear_in_alpha(KDWithAFlag)
    with rejected():  # without knowing that it is a kind of KD
        check_no_option_changes_the_formula_at_its_bound(LosesItsFactorAtTheEnd)


class IdleOption(KL):
    """Source: made here.

    Args:
        sharpness: Of nothing.
    """

    def __init__(self, *, sharpness: float = 1.0) -> None:
        super().__init__()


class IdleText(KL):
    def __init__(self, *, mode: str = "x") -> None:
        super().__init__()


class IdleChoice(KL):
    """One of the choices is the default under another name."""

    def __init__(self, *, kind: Literal["plain", "fourfold", "as_ever"] = "plain") -> None:
        super().__init__()
        self.factor = 4 if kind == "fourfold" else 1

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        return {"kl": super().forward(student, teacher, batch)["kl"] * self.factor}


class CountsBesideAnother(KL):
    """Not idle: the power counts as soon as there is a share to which it is applied."""

    def __init__(
        self, *, power: Annotated[int, Field(ge=1, le=4)] = 2, share: Annotated[float, Field(ge=0, le=1)] = 0.0
    ) -> None:
        super().__init__()
        self.power, self.share = power, share

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        own, other = logits_of(student, teacher)
        extra = (own - other).abs().pow(self.power).mean()
        return {"kl": super().forward(student, teacher, batch)["kl"] + self.share * extra}


def check_standardisation_is_that_of_the_authors(dkd: Callable[..., Loss]) -> None:
    def value(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
        batch = Batch(torch.zeros(8, 3, 1, 1), golden_labels(), torch.arange(8), torch.zeros(8, dtype=torch.int64))
        return lambda student, teacher: loss(Outputs(student), Outputs(teacher), batch)["dkd"]

    check_golden_logits("LS_DKD_a9_b72_T2", value(dkd(alpha=9.0, beta=72.0, temperature=2.0, standardise=True)))
    check_golden_logits("DKD_a1_b8_T4", value(dkd(alpha=1.0, beta=8.0, temperature=4.0, standardise=False)))


class Inverted(DKDLoss):
    def __init__(self, *, alpha: float, beta: float, temperature: float, standardise: bool) -> None:
        super().__init__(alpha=alpha, beta=beta, temperature=temperature, standardise=not standardise)


def test_trap_15_options_that_are_idle_or_mean_the_opposite() -> None:
    for idle in (IdleOption, IdleText, IdleChoice):
        with rejected():
            check_every_option_changes_the_loss(idle)
    check_every_option_changes_the_loss(CountsBesideAnother)
    check_standardisation_is_that_of_the_authors(DKDLoss)
    with rejected():
        check_standardisation_is_that_of_the_authors(Inverted)


class MisspeltInOnePath(KL):
    """Draws negatives by itself only in one of its ways of sampling."""

    def __init__(self, *, sampling: Literal["given", "drawn"] = "given") -> None:
        super().__init__()
        self.sampling = sampling
        self.probs = torch.ones(NUM_SAMPLES)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        weights = self.probs if self.sampling == "given" else self.prob  # type: ignore[attr-defined]
        return {"kl": super().forward(student, teacher, batch)["kl"] * weights.multinomial(1).sum()}


def test_trap_14_recordings_of_its_own_as_an_oracle() -> None:
    """A value recorded from a loss agrees with it for ever, however wrong it is; that of another program does not."""

    def value(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
        batch = Batch(torch.zeros(8, 3, 1, 1), golden_labels(), torch.arange(8), torch.zeros(8, dtype=torch.int64))
        return lambda student, teacher: loss(Outputs(student), Outputs(teacher), batch)["dkd"]

    broken, right = (value(make(alpha=1.0, beta=8.0, temperature=4.0)) for make in (Summed, DKDLoss))
    recording = broken(*golden_logits()).item()
    assert broken(*golden_logits()).item() == recording, "so this oracle would protect the mistake"
    check_golden_logits("DKD_a1_b8_T4", right)
    with rejected():
        check_golden_logits("DKD_a1_b8_T4", broken)


def test_trap_16_a_way_of_sampling_that_nobody_has_run() -> None:
    with rejected(AttributeError):
        check_every_option_changes_the_loss(MisspeltInOnePath)
    for sampling in ("exact", "relax"):
        train(lambda sampling=sampling: LOSSES["crd"](negatives=9, sampling=sampling))


class ComputesAll(Objective):
    def _counting(self, epoch: int) -> Iterator[tuple[str, Loss, float]]:
        for label, loss in self.parts():
            yield label, loss, self.curves[label](epoch)


def test_trap_20_a_term_that_is_computed_although_its_weight_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    with rejected():
        hold(KL, lambda case: check_with_weight_0_it_is_not_computed(case, ComputesAll))
    monkeypatch.setattr(objective, "ever_counts", lambda weight: True)
    with rejected():
        hold(KL, lambda case: check_it_is_linear_in_its_weight_down_to_0(case, ComputesAll))


class OnlyInItsStage(KL):
    """What it gives is 0 where its option is a factor, as in the ancestors of AB and FSP.

    Source: made here.
    """

    needs = frozenset({"logits", "features"})

    def __init__(self, *, beta: float = 1.0, initial_epochs: Annotated[int, Field(ge=1)] = 30) -> None:
        super().__init__()
        self.beta = beta
        self.initial_epochs = initial_epochs
        self.epoch = 0

    def on_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        term = super().forward(student, teacher, batch)["kl"]
        return {"kl": term if self.epoch < self.initial_epochs else self.beta * 0 * term}


class UnweightedInItsStage(Objective):
    def _counting(self, epoch: int) -> Iterator[tuple[str, Loss, float]]:
        for label, loss, weight in super()._counting(epoch):
            yield label, loss, 1.0 if epoch < self.initial_epochs else weight


def test_trap_21_a_weight_without_effect() -> None:
    with rejected():
        check_every_option_changes_the_loss(OnlyInItsStage)
    # The weight of its section is a weight in its stage, too.
    in_its_stage = functools.partial(OnlyInItsStage, initial_epochs=1)
    hold(in_its_stage, check_it_is_linear_in_its_weight_down_to_0)
    with rejected():
        hold(in_its_stage, lambda case: check_it_is_linear_in_its_weight_down_to_0(case, UnweightedInItsStage))


# --- imports --------------------------------------------------------------------------------------------------

# What is not everywhere where Python is, and what an editor likes to import when a name is half typed.
FOREIGN = (
    "turtle",
    "tkinter",
    "_tkinter",
    "idlelib",
    "termios",
    "tty",
    "pty",
    "curses",
    "readline",
    "this",
    "antigravity",
)
IMPORT_ALL = f"""
import importlib, pkgutil, sys

class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FOREIGN!r}:
            raise ModuleNotFoundError(f"no {{name}} here")

sys.path[:0] = ["."] + {[path for path in sys.path if path.endswith("site-packages")]!r}
sys.meta_path.insert(0, Nowhere())
import model
for module in pkgutil.walk_packages(model.__path__, "model."):
    importlib.import_module(module.name)
    print(module.name)
"""


def import_all(root: Path) -> list[str]:
    """Imports every module under model/ in an interpreter without site, tkinter and terminals; returns their names."""
    command = [sys.executable, "-I", "-S", "-c", IMPORT_ALL]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_trap_17_imports_that_nobody_meant(tmp_path: Path) -> None:
    imported = set(import_all(ROOT))
    files = {path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "model").rglob("*.py")}
    assert {name.replace(".", "/") for name in imported} >= {name for name in files if not name.endswith("__init__")}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/__init__.py").touch()
    (tmp_path / "model/junk.py").write_text("from math import inf\n")
    assert import_all(tmp_path) == ["model.junk"]
    (tmp_path / "model/junk.py").write_text("from turtle import st\n")
    with rejected():
        import_all(tmp_path)

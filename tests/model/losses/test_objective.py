"""Sums of losses."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from model import losses
from model.errors import InputError
from model.losses import LOSSES, create_objective, sections_of
from model.losses.base import Loss
from model.losses.objective import Objective
from model.outputs import Batch, Outputs

CE: dict[str, Any] = {"name": "ce"}
KD: dict[str, Any] = {"name": "kd", "alpha": 1.0, "temperature": 4.0}


def objective_of(*sections: dict[str, Any], num_epochs: int = 10) -> Objective:
    resolved, problems = losses.resolve(list(sections))
    assert problems == []
    return create_objective(resolved, num_epochs)


def inputs(num_labels: int = 6) -> tuple[Outputs, Outputs, Batch]:
    """Returns outputs for six samples of four classes, the first of them labelled."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, generator=generator) for _ in range(2))
    positions = torch.arange(6)
    batch = Batch(torch.zeros(6, 3, 2, 2), positions[:num_labels] % 4, positions, positions)
    return Outputs(student.requires_grad_()), Outputs(teacher), batch


def values_of(terms: dict[str, Tensor]) -> dict[str, float]:
    return {name: term.item() for name, term in terms.items()}


class Counting(Loss):
    """Counts its calls, and remembers the epoch."""

    needs_teacher = True

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.epoch = 0, -1

    def on_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        return {"counting": student.logits.square().mean()}

    def describe(self) -> str:
        return "counting"


class Beginning(Counting):
    """Has a stage of its own."""

    def __init__(self, epochs: int = 2, initial_only: bool = False) -> None:
        super().__init__()
        self.initial_epochs = epochs
        self.initial_only = initial_only


# --- the sum ------------------------------------------------------------------------------------------------


def test_each_term_is_multiplied_by_its_weight() -> None:
    student, teacher, batch = inputs()
    terms = objective_of({**CE, "weight": 0.5}, {**KD, "weight": 3.0})(student, teacher, batch)
    p, q = (F.softmax(outputs.logits / 4, 1) for outputs in (teacher, student))
    kl = (p * (p.log() - q.log())).sum(1).mean()
    assert list(terms) == ["ce", "kd"]
    assert_close(terms["ce"], 0.5 * F.cross_entropy(student.logits, batch.labels))
    assert_close(terms["kd"], 3 * 16 * kl)


def test_a_list_of_one_is_the_section_itself() -> None:
    student, teacher, batch = inputs()
    resolved, _ = losses.resolve(KD)
    alone = create_objective(resolved, 10)(student, teacher, batch)
    assert values_of(objective_of(KD)(student, teacher, batch)) == values_of(alone)


def test_two_losses_of_one_name_have_two_labels_and_two_terms() -> None:
    student, teacher, batch = inputs()
    terms = objective_of({**KD, "temperature": 1.0}, {**KD, "temperature": 8.0})(student, teacher, batch)
    assert list(terms) == ["kd", "kd_2"]
    assert terms["kd"].item() != terms["kd_2"].item()


def test_a_term_keeps_its_name_when_the_other_of_that_name_counts_no_more() -> None:
    student, teacher, batch = inputs()
    off = {"name": "step", "milestones": [1], "gamma": 0.0, "value": 1.0}
    objective = objective_of({**KD, "temperature": 1.0, "weight": off}, {**KD, "temperature": 8.0})
    before = objective(student, teacher, batch)["kd_2"].item()
    objective.on_epoch(1)
    assert values_of(objective(student, teacher, batch)) == {"kd_2": before}


def test_a_weight_that_is_a_function_of_the_epoch_follows_it() -> None:
    student, teacher, batch = inputs()
    objective = objective_of(CE, {**KD, "weight": {"name": "linear", "start": 0.0, "end": 1.0, "epochs": 4}})
    whole = objective_of(CE, KD)(student, teacher, batch)["kd"].item()
    for epoch, share in ((0, 0.25), (1, 0.5), (3, 1.0), (7, 1.0), (0, 0.25)):  # whatever came before
        objective.on_epoch(epoch)
        assert objective(student, teacher, batch)["kd"].item() == pytest.approx(share * whole)


def test_a_loss_of_weight_0_is_neither_computed_nor_kept() -> None:
    silent = Counting()
    objective = Objective({"ce": LOSSES.create(CE), "c": silent}, {"ce": 1.0, "c": 0.0}, 3)
    student, _, batch = inputs()
    assert list(objective(student, None, batch)) == ["ce"]
    assert silent.calls == 0
    assert not objective.needs_teacher, "no teacher is loaded for it"
    assert [label for label, _ in objective.parts()] == ["ce"]


def test_in_an_epoch_in_which_its_weight_is_0_a_loss_is_not_computed() -> None:
    silent = Counting()
    weight = {"name": "step", "value": 1.0, "milestones": [1], "gamma": 0.0, "warmup_epochs": 0}
    objective = Objective({"ce": LOSSES.create(CE), "c": silent}, {"ce": 1.0, "c": weight}, 3)
    student, teacher, batch = inputs()
    for epoch, calls in ((0, 1), (1, 1), (2, 1)):
        objective.on_epoch(epoch)
        objective(student, teacher, batch)
        assert silent.calls == calls


def test_an_epoch_in_which_nothing_would_count_is_refused() -> None:
    off = {"name": "step", "value": 1.0, "milestones": [2], "gamma": 0.0, "warmup_epochs": 0}
    with pytest.raises(InputError) as refused:
        Objective({"c": Counting(), "d": Counting()}, {"c": off, "d": off}, 5)
    assert str(refused.value) == "in epoch 3 of 5 every weight is 0 (c, d): nothing would be learnt then; raise one"
    Objective({"c": Counting()}, {"c": off}, 2)
    Objective({"c": Counting(), "d": Counting()}, {"c": off, "d": 1.0}, 5)


def test_a_stage_of_its_own_leaves_the_other_losses_out() -> None:
    first, other = Beginning(), Counting()
    objective = Objective({"a": first, "b": other}, {"a": 1.0, "b": 1.0}, 5)
    student, teacher, batch = inputs()
    for epoch in range(4):
        objective.on_epoch(epoch)
        objective(student, teacher, batch)
    assert (first.calls, other.calls) == (4, 2)
    assert (first.epoch, other.epoch) == (3, 1), "each from when it may count"


# --- labels -------------------------------------------------------------------------------------------------


def test_only_what_needs_no_labels_sees_the_samples_without_one() -> None:
    student, teacher, batch = inputs(num_labels=2)
    terms = objective_of(CE, KD)(student, teacher, batch)
    assert_close(terms["ce"], F.cross_entropy(student.logits[:2], batch.labels))
    every, _, whole = inputs()
    assert_close(terms["kd"], objective_of(KD)(every, teacher, whole)["kd"])


def test_what_needs_no_labels_is_given_the_batch_as_it_is() -> None:
    student, teacher, batch = inputs(num_labels=2)
    seen = []

    class Watching(Counting):
        def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
            seen.append((len(student.logits), len(batch.images), len(batch.labels)))
            return super().forward(student, teacher, batch)

    class Labelled(Watching):
        needs_labels = True

    Objective({"a": Watching(), "b": Labelled()}, {"a": 1.0, "b": 1.0}, 1)(student, teacher, batch)
    assert seen == [(6, 6, 2), (2, 2, 2)]


def test_an_objective_has_no_use_for_unlabelled_images_if_none_of_its_parts_has() -> None:
    assert objective_of(CE).needs_labels
    assert not objective_of(CE, KD).needs_labels


# --- what cannot stand together -----------------------------------------------------------------------------


def refusal(losses_: dict[str, Loss], weights: dict[str, Any] | None = None, num_epochs: int = 5) -> str:
    with pytest.raises(InputError) as caught:
        Objective(losses_, weights or dict.fromkeys(losses_, 1.0), num_epochs)
    return str(caught.value)


def test_all_weights_0_are_refused() -> None:
    text = refusal({"ce": Counting(), "kd": Counting()}, {"ce": 0.0, "kd": 0})
    assert text == "every weight is 0 (ce, kd): nothing is left to learn; raise one"


def test_an_objective_that_leaves_the_classifier_as_it_began_is_refused() -> None:
    class OnMaps(Counting):
        trains_classifier = False

    text = refusal({"maps": OnMaps()})
    assert "nothing here trains the classifier" in text
    assert '"loss": [{"name": "ce"}, {"name": "maps"}]' in text
    Objective({"ce": LOSSES.create(CE), "maps": OnMaps()}, {"ce": 1.0, "maps": 1.0}, 1)


def test_a_teacher_that_normalises_by_the_batch_is_not_shown_to_others() -> None:
    class ByBatch(Counting):
        teacher_statistics = "batch"

    assert "set its teacher_statistics to" in refusal({"b": ByBatch(), "kd": Counting()})
    alone = Objective({"b": ByBatch(), "ce": LOSSES.create(CE)}, {"b": 1.0, "ce": 1.0}, 1)
    assert alone.teacher_statistics == "batch"
    assert not alone.can_be_stored


def test_two_stages_of_their_own_are_refused() -> None:
    assert "can have one such" in refusal({"ab": Beginning(), "ft": Beginning()})


def test_a_stage_of_its_own_must_end_before_training_does() -> None:
    assert refusal({"ab": Beginning(5)}) == "ab: initial_epochs 5 is not below num_epochs, 5"


def test_after_its_stage_a_loss_that_gives_nothing_more_is_left_out() -> None:
    student, teacher, batch = inputs()
    for only, later in ((False, {"ce", "counting"}), (True, {"ce"})):
        objective = Objective({"ce": LOSSES.create(CE), "b": Beginning(2, only)}, {"ce": 1.0, "b": 1.0}, 5)
        for epoch, expected in ((1, {"counting"}), (2, later), (4, later)):
            objective.on_epoch(epoch)
            assert {*objective(student, teacher, batch)} == expected
            assert objective.asks_teacher == ("counting" in expected)


def test_the_others_count_their_epochs_and_those_of_their_weights_from_the_end_of_a_stage() -> None:
    student, teacher, batch = inputs()
    other, warm = Counting(), {"name": "constant", "value": 1.0, "warmup_epochs": 2}
    weights = {"b": 1.0, "c": warm, "ce": {"name": "linear", "start": 0.0, "end": 1.0}}
    objective = Objective({"b": Beginning(3, True), "c": other, "ce": LOSSES.create(CE)}, weights, 7)
    whole = other(student, teacher, batch)["counting"].item()
    for epoch, own, share, rising in ((0, 0, None, None), (3, 0, 0.5, 0.25), (4, 1, 1.0, 0.5), (6, 3, 1.0, 1.0)):
        objective.on_epoch(epoch)
        assert other.epoch == own
        terms = values_of(objective(student, teacher, batch))
        if share is not None:
            labels = F.cross_entropy(student.logits, batch.labels).item()
            assert terms == pytest.approx({"counting": share * whole, "ce": rising * labels})
    with pytest.raises(InputError, match="warmup_epochs: 2 is above the 1 epochs in which it counts"):
        Objective({"b": Beginning(3), "c": other}, {"b": 1.0, "c": warm}, 4)


def test_when_nothing_is_left_to_count_after_a_stage_that_is_refused() -> None:
    off = {"name": "step", "value": 1.0, "milestones": [2], "gamma": 0.0}
    with pytest.raises(InputError, match="in epoch 6 of 7 every weight is 0"):
        Objective({"b": Beginning(3, True), "ce": LOSSES.create(CE)}, {"b": 1.0, "ce": off}, 7)


def test_a_weight_that_ends_at_0_leaves_a_loss_that_a_longer_run_goes_on_with() -> None:
    for num_epochs in (1, 2):
        falling = {"name": "linear", "start": 1.0, "end": 0.0}
        objective = Objective({"ce": LOSSES.create(CE), "c": Counting()}, {"ce": 1.0, "c": falling}, num_epochs)
        assert [label for label, _ in objective.parts()] == ["ce", "c"]


def test_parts_for_the_student_come_from_one_loss() -> None:
    class Equipping(Counting):
        def equip(self, student: Any) -> Any:
            return student, {"projected": {}}

    objective = Objective({"a": Equipping(), "b": Equipping()}, {"a": 1.0, "b": 1.0}, 1)
    with pytest.raises(InputError, match="another loss has given the student parts"):
        objective.equip(torch.nn.Identity())


def test_beside_parts_for_the_student_nothing_compares_its_maps() -> None:
    class Equipping(Counting):
        def equip(self, student: Any) -> Any:
            return student, {"projected": {}}

    class OnMaps(Counting):
        needs = frozenset({"features"})

    for other, refused in ((OnMaps(), True), (Counting(), False)):
        objective = Objective({"a": Equipping(), "b": other}, {"a": 1.0, "b": 1.0}, 1)
        with pytest.raises(InputError, match="other maps than those that b would") if refused else nullcontext():
            objective.equip(torch.nn.Identity())


# --- for the log --------------------------------------------------------------------------------------------


def test_the_description_has_every_weight() -> None:
    described = objective_of(CE, {**KD, "weight": 9.0}).describe()
    assert described.startswith("CE x 1, mean over the batch + 9 x [")
    assert "KL" in described
    assert "\n" not in described


# --- the section of params.json -------------------------------------------------------------------------------

BLEND: dict[str, Any] = {"name": "kd", "alpha": 0.9, "temperature": 4.0}


def test_a_loss_without_a_weight_gets_its_usual_one() -> None:
    for name in LOSSES:
        entry: Any = LOSSES[name]
        assert issubclass(entry, Loss)
        assert entry.usual_weight > 0
    resolved, problems = losses.resolve(BLEND)
    assert problems == []
    assert resolved["weight"] == 1.0


def test_resolving_a_result_changes_nothing() -> None:
    weight = {"name": "linear", "start": 0, "end": 1}
    for value in (BLEND, [{"name": "ce", "weight": 0.1}, {**BLEND, "weight": weight}]):
        resolved, problems = losses.resolve(value)
        assert problems == []
        assert losses.resolve(resolved) == (resolved, [])


@pytest.mark.parametrize(
    ("value", "key", "text"),
    [
        ([], "", "the list is empty"),
        ([{"name": "ce"}, {"name": "kdd"}], "kdd.name", "did you mean 'kd'?"),
        ([{"name": "ce"}, {**BLEND, "temperature": 0}], "kd.temperature", "0 is not above 0"),
        ([{"name": "ce"}, BLEND, {**BLEND, "alpha": 2}], "kd_2.alpha", "2 is above 1"),
        ([{"name": "ce", "weight": -1}, BLEND], "ce.weight", "expected a number from 0 to 1e9, or"),
        ([{"name": "ce", "weight": {"name": "linear", "start": 0}}, BLEND], "ce.weight.end", "is missing"),
        ([{"name": "ce"}, 3], "1", "expected {"),
        ({"name": "kd", "alpha": 0.5, "temperature": 4.0, "weigth": 2}, "weigth", "did you mean 'weight'?"),
    ],
)
def test_what_is_wrong_is_said_with_the_label_of_the_loss(value: Any, key: str, text: str) -> None:
    problems = losses.resolve(value)[1]
    assert [found for found, _ in problems] == [key]
    assert text in problems[0][1]


def test_every_problem_of_a_list_is_found_at_once() -> None:
    problems = losses.resolve([{"name": "c"}, {**BLEND, "alpha": -1, "temperature": 0}])[1]
    assert [key for key, _ in problems] == ["c.name", "kd.alpha", "kd.temperature"]


def test_a_list_of_one_loss_is_that_loss() -> None:
    assert losses.resolve([BLEND]) == losses.resolve(BLEND)


@pytest.mark.parametrize("weight", [0, {"name": "constant", "value": 0}, {"name": "linear", "start": 0, "end": 0}])
def test_weights_that_stay_0_are_found_whatever_they_are_written_as(weight: Any) -> None:
    resolved, problems = losses.resolve([{"name": "ce", "weight": weight}, {**BLEND, "weight": 0}])
    assert problems == []
    with pytest.raises(InputError, match="every weight is 0"):
        create_objective(resolved, 5)
    resolved, _ = losses.resolve([{"name": "ce", "weight": weight}, {"name": "at"}])
    with pytest.raises(InputError, match="nothing here trains the classifier"):
        create_objective(resolved, 5)


def test_labels_are_names_and_numbered_where_they_are_taken() -> None:
    assert list(sections_of([{"name": "ce"}, BLEND, BLEND, BLEND])) == ["ce", "kd", "kd_2", "kd_3"]
    assert list(sections_of(BLEND)) == ["kd"]


def test_options_that_contradict_each_other_name_their_loss() -> None:
    resolved, problems = losses.resolve([{"name": "ce"}, {"name": "overhaul", "student_stages": [1]}])
    assert problems == []
    with pytest.raises(InputError, match=r"^overhaul: student_stages \[1\]"):
        create_objective(resolved, 3)

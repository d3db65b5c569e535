"""Several teachers as one, against numpy written from the definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from model.ensemble import Combination, TeacherEnsemble, mean_logits, mean_probabilities, united
from model.errors import InputError
from model.losses import LOSSES, create_objective, resolve
from model.losses.kd import kd_loss
from model.losses.objective import COMBINABLE, Objective
from model.nets import NETS
from model.outputs import Batch, Outputs
from model.registry import options_of
from model.teacher import FrozenTeacher
from model.teacher_store import TeacherStore

LOGITS = frozenset({"logits"})
SHARES = [1.0, 3.0, 0.5]


def draw(*shape: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


# --- the two means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], SHARES, [1e-3, 1e3, 7.0]])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_softmax_at_the_temperature_is_the_weighted_mean_of_softmaxes(
    temperature: float, weights: list[float]
) -> None:
    logits = draw(3, 6, 5)
    combined = mean_probabilities([*logits], weights, temperature).numpy()
    shares = np.array(weights) / sum(weights)
    expected = sum(share * softmax(each / temperature) for share, each in zip(shares, logits.numpy(), strict=True))
    np.testing.assert_allclose(softmax(combined / temperature), expected, rtol=1e-12)
    np.testing.assert_allclose(np.exp(combined / temperature).sum(axis=1), 1, rtol=1e-12)  # log-probabilities


def test_the_mean_of_logits_is_weighted_and_its_softmax_is_the_geometric_mean() -> None:
    logits = draw(3, 6, 5)
    combined = mean_logits([*logits], SHARES).numpy()
    shares = np.array(SHARES)[:, None, None] / sum(SHARES)
    np.testing.assert_allclose(combined, (shares * logits.numpy()).sum(axis=0), rtol=1e-12)
    product = np.prod(np.stack([softmax(each) for each in logits.numpy()]) ** shares, axis=0)
    np.testing.assert_allclose(softmax(combined), product / product.sum(axis=1, keepdims=True), rtol=1e-12)


def test_weights_count_by_their_ratios_alone_and_a_weight_of_2_is_a_teacher_named_twice() -> None:
    logits = [*draw(2, 6, 5)]
    for mean in (lambda z, w: mean_probabilities(z, w, 4.0), mean_logits):
        assert_close(mean(logits, [2.0, 6.0]), mean(logits, [1.0, 3.0]))
        assert_close(mean(logits, [2.0, 1.0]), mean([logits[0], *logits], [1.0, 1.0, 1.0]))


def test_teachers_that_agree_are_as_one_of_them() -> None:
    logits = draw(6, 5)
    assert_close(mean_logits([logits] * 3, SHARES), logits)
    found = mean_probabilities([logits] * 3, SHARES, 4.0)
    assert_close((found / 4).softmax(1), (logits / 4).softmax(1))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_both_are_finite_where_logits_are_200_apart_and_teachers_contradict_each_other(temperature: float) -> None:
    first = torch.tensor([[200.0, 0.0, -200.0], [-200.0, 200.0, 0.0]])
    logits = [first, -first]
    for combined in (mean_probabilities(logits, [1.0, 1.0], temperature), mean_logits(logits, [1.0, 1.0])):
        assert torch.isfinite(combined).all()
    # Of each sample one teacher is sure of the largest class, the other of the smallest: half and half.
    halves = torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
    found = (mean_probabilities(logits, [1.0, 1.0], temperature) / temperature).softmax(1)
    assert_close(found, halves, rtol=0, atol=1e-4 if temperature == 20 else 1e-6)


def test_a_cross_entropy_with_the_mean_of_probabilities_is_the_mean_of_cross_entropies() -> None:
    # It is linear in the teacher's probabilities, at its own temperature only.
    student, teachers = draw(6, 5, seed=1), [*draw(3, 6, 5)]

    def loss(logits: Tensor, temperature: float) -> Tensor:
        return kd_loss(student, logits, temperature, divergence="cross_entropy")

    for temperature in (1.0, 4.0):
        total = sum(weight * loss(each, temperature) for weight, each in zip(SHARES, teachers, strict=True))
        combined = mean_probabilities(teachers, SHARES, temperature)
        assert_close(loss(combined, temperature), total / sum(SHARES))
        assert (loss(combined, 2.0) - loss(mean_probabilities(teachers, SHARES, 2.0), 2.0)).abs() > 1e-3


def test_a_squared_difference_from_the_mean_of_logits_has_the_mean_gradient() -> None:
    student, teachers = draw(6, 5, seed=1).requires_grad_(), [*draw(3, 6, 5)]

    def gradient(logits: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(kd_loss(student, logits, 4.0, divergence="mse_logits"), student)
        return found

    total = sum(weight * gradient(each) for weight, each in zip(SHARES, teachers, strict=True))
    assert_close(gradient(mean_logits(teachers, SHARES)), total / sum(SHARES))


# --- at which temperature -------------------------------------------------------------------------------------


def objective(*sections: dict[str, Any]) -> Objective:
    values, problems = resolve([*sections])
    assert problems == []
    return create_objective(values, 10)


KD = {"name": "kd", "alpha": 0.9, "temperature": 4.0}
NKD, DKD = {"name": "nkd", "temperature": 1.0}, {"name": "dkd", "temperature": 1.0}


@pytest.mark.parametrize(
    ("sections", "temperature"),
    [
        ([{"name": "ce"}], 1.0),
        ([KD], 4.0),
        ([{"name": "ce"}, {"name": "dkd"}, {"name": "dist"}, KD], 4.0),
        ([{"name": "ce"}, NKD, DKD], 1.0),  # both parts of nkd are at 1 then
        ([KD, {"name": "dist", "temperature": 2.0, "weight": 0}], 4.0),  # what never counts
        ([{"name": "ce"}, {"name": "tfkd"}, KD], 4.0),  # its teacher is virtual
    ],
)
def test_the_temperature_is_that_of_the_losses_of_a_teacher(sections: list[dict[str, Any]], temperature: float) -> None:
    assert objective(*sections).teacher_temperature == temperature


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ([KD, {**KD, "temperature": 2}], "kd has 4 and kd_2 has 2"),
        ([KD, {"name": "ctkd"}], "kd has 4 and ctkd has no single one"),
        ([{"name": "ctkd"}], "ctkd has no single one"),
        ([{"name": "mlkd"}], "mlkd has no single one"),
        ([{"name": "ce"}, {"name": "nkd"}], "nkd has no single one"),
        ([{**KD, "standardise": True}], "kd has no single one"),
        ([{**KD, "divergence": "mse_logits"}], "kd has no single one"),
        ([{"name": "ce"}, {"name": "dkd", "standardise": True}], "dkd has no single one"),
    ],
)
def test_without_one_temperature_there_is_no_mean_of_probabilities(sections: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(InputError, match=rf"^needs one temperature, but {said}$"):
        _ = objective(*sections).teacher_temperature


def test_a_loss_with_a_temperature_sees_of_the_teacher_nothing_but_the_probabilities_there() -> None:
    tried = []
    student, logits = (draw(12, 5, seed=seed).float() for seed in (1, 2))
    labels = torch.arange(12) % 5
    batch = Batch(torch.zeros(12, 1, 1, 1), labels, torch.arange(12), torch.zeros(12, dtype=torch.long))
    for name, entry in LOSSES.items():
        options = {"alpha": 0.9, "temperature": 4.0} if name == "kd" else {}
        options |= {"temperature": 1.0} if name == "nkd" else {}
        loss = LOSSES.create({"name": name, **options})
        if not loss.needs_teacher or not loss.teacher_needs <= COMBINABLE or loss.teacher_temperature is None:
            continue
        tried.append(name)
        at = loss.teacher_temperature
        assert "temperature" not in options_of(entry) or at == loss.temperature
        values = [
            torch.stack([*loss(Outputs(student), Outputs(each), batch).values()]).sum()
            for each in (logits, mean_probabilities([logits], [1.0], at))
        ]
        assert_close(values[1], values[0], rtol=1e-4, atol=1e-6)
    assert {"kd", "dkd", "dist", "nkd"} <= {*tried}


# --- frozen teachers together ---------------------------------------------------------------------------------


def net_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net: nn.Module = NETS.create({"name": "tiny", "width": 4 + seed, "dropout_rate": 0.5}, 3)
    with torch.no_grad():
        for _ in range(3):
            net(images() + 1)
    return net


def images(seed: int = 0, number: int = 5) -> Tensor:
    return torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def together(combine: Combination = "probabilities", temperature: float = 4.0) -> TeacherEnsemble:
    """Returns an ensemble whose second member was trained with other constants of normalisation."""
    constants = [([0.5] * 3, [0.2] * 3), ([0.5] * 3, [0.2] * 3)], [([0.5] * 3, [0.2] * 3), ([0.1] * 3, [0.4] * 3)]
    members = [
        FrozenTeacher(net_of(seed), *given, *own, name=f"tiny{seed}") for seed, (given, own) in enumerate(constants)
    ]
    return TeacherEnsemble(members, [1.0, 2.0], combine, temperature)


def expected_of(ensemble: TeacherEnsemble, pictures: Tensor) -> Tensor:
    return ensemble.combined([member(pictures) for member in ensemble.members])


def batch_of(*pairs: tuple[int, int]) -> Batch:
    """Returns a batch in which sample `i` under view `v` is noise of its own."""
    pictures = torch.cat([images(100 * sample + view, 1) for sample, view in pairs])
    samples, views = torch.tensor(pairs).unbind(1)
    return Batch(pictures.contiguous(memory_format=torch.channels_last), samples % 3, samples, views)


class Loader:
    """What a lesson asks of a loader."""

    split = object()
    seed = 3


def with_store(ensemble: TeacherEnsemble, place: int, root: Path, dtype: str = "fp32") -> None:
    store = TeacherStore.open(root, {}, num_samples=10, num_views=4, widths={"logits": 3}, dtype=dtype)
    ensemble.members[place].stores.append((Loader.split, store))


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_all_ways_to_ask_give_the_combined_answers_of_the_members(combine: Combination) -> None:
    ensemble, batch = together(combine), batch_of((0, 0), (1, 3), (2, 1))
    expected = expected_of(ensemble, batch.images)
    assert torch.equal(ensemble(batch.images), expected)
    assert torch.equal(ensemble.compute(LOGITS, batch).logits, expected)
    with ensemble.lesson(Loader, 0, LOGITS) as ask:
        answers = ask(batch)
    assert torch.equal(answers.logits, expected)
    assert (answers.strong_logits, answers.embedding, answers.features) == (None, None, ())
    assert not torch.equal(
        expected, together("logits" if combine == "probabilities" else "probabilities")(batch.images)
    )


def test_the_second_view_is_combined_as_the_first_is() -> None:
    ensemble, batch, second = together(), batch_of((0, 0), (1, 3)), images(9, 2)
    batch = Batch(batch.images, batch.labels, batch.indices, batch.views, strong_images=second)
    answers = ensemble.compute(frozenset({"logits", "strong_logits"}), batch)
    assert torch.equal(answers.logits, expected_of(ensemble, batch.images))
    assert answers.strong_logits is not None
    assert torch.equal(answers.strong_logits, expected_of(ensemble, second))


def test_it_is_frozen_and_moves_as_a_whole() -> None:
    ensemble = together()
    for ask in (ensemble.train, lambda: ensemble.train(True), nn.Sequential(ensemble).train):
        ask()
        assert {module.training for module in ensemble.modules()} == {False}
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())
    assert not ensemble(images().requires_grad_()).requires_grad
    number = sum(parameter.numel() for member in ensemble.members for parameter in member.parameters())
    assert sum(parameter.numel() for parameter in ensemble.parameters()) == number
    assert ensemble.to("meta")(images().to("meta")).device.type == "meta"


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_members_may_be_exchanged_for_fast_ones_each_in_a_precision_of_its_own(combine: Combination) -> None:
    ensemble = together(combine)
    first, second = ensemble.members
    quick = ensemble.of([first.fast("bf16", LOGITS, (3, 16, 16)), second.fast("fp32", LOGITS, (3, 16, 16))])
    assert [member.precision for member in quick.members] == ["bf16", "fp32"]
    assert [member.num_folded for member in quick.members] == [2, 2]
    assert quick(images()).dtype == torch.float32
    assert_close(quick(images()), ensemble(images()), rtol=0.05, atol=0.05)
    assert (quick.combine, quick.weights, quick.temperature) == (combine, [1.0, 2.0], 4.0)


@pytest.mark.parametrize("stored", [[0], [1], [0, 1]])
def test_what_is_kept_of_some_members_gives_the_answers_of_asking_all(stored: list[int], tmp_path: Path) -> None:
    online, ensemble, batch = together(), together(), batch_of(*((sample, sample % 4) for sample in range(10)))
    for place in stored:
        with_store(ensemble, place, tmp_path / str(place))
    for _ in range(2):
        with online.lesson(Loader, 0, LOGITS) as ask, ensemble.lesson(Loader, 0, LOGITS) as recall:
            assert torch.equal(recall(batch).logits, ask(batch).logits)
    assert [member.num_computed for member in ensemble.members] == [10 if place in stored else 20 for place in (0, 1)]
    assert ensemble.num_computed == 40 - 10 * len(stored)


def test_a_store_of_fp16_changes_the_answer_by_its_rounding_only(tmp_path: Path) -> None:
    ensemble, batch = together(), batch_of(*((sample, 0) for sample in range(10)))
    with_store(ensemble, 0, tmp_path, "fp16")
    with ensemble.lesson(Loader, 0, LOGITS) as ask:
        found = ask(batch).logits
    exact = together()(batch.images)
    assert not torch.equal(found, exact)
    assert_close(found, exact, rtol=0, atol=2**-10 * ensemble.members[0](batch.images).abs().max().item())


def test_an_epoch_that_fails_keeps_what_every_member_has_computed(tmp_path: Path) -> None:
    ensemble = together()
    for place in (0, 1):
        with_store(ensemble, place, tmp_path / str(place))
    lesson = ensemble.lesson(Loader, 0, LOGITS)
    lesson.__enter__()(batch_of((0, 0), (1, 1)))
    assert not lesson.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    with ensemble.lesson(Loader, 0, LOGITS) as ask:
        ask(batch_of((1, 1), (0, 0)))
    assert [member.num_computed for member in ensemble.members] == [2, 2]


def test_one_teacher_stays_what_it_is_and_several_are_named_together() -> None:
    first, second = together().members
    loss = objective(KD)
    assert united([first], [1.0], "probabilities", objective({"name": "ctkd"})) is first
    assert first.members == [first]
    assert first.of([second]) is second
    found = united([first, second], [1.0, 3.0], "probabilities", loss)
    assert isinstance(found, TeacherEnsemble)
    assert (found.name, found.temperature) == ("tiny0 + tiny1", 4.0)
    assert found.describe() == "2 teachers together, mean of probabilities at T 4 (shares 0.25, 0.75)"
    assert united([first, second], [1.0, 1.0], "logits", objective({"name": "ctkd"})).members == [first, second]
    with pytest.raises(InputError, match="needs one temperature"):
        united([first, second], [1.0, 1.0], "probabilities", objective({"name": "ctkd"}))

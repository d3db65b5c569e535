"""Oracles: values of a reference implementation, the paper's formula in numpy, what a draw must never be."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from golden import BATCH, GOLDEN, check_golden, emb_s, emb_t, fill_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from model.errors import InputError
from model.losses import LOSSES, crd
from model.losses.crd import CRDLoss, contrast, draw, evenly, products
from model.outputs import Batch, Outputs, Probe, Samples

CLASSES = 5


def probe_of(name: str, dimensions: int | None) -> Probe:
    embedding = None if dimensions is None else torch.empty(1, dimensions, device="meta")
    return Probe(name, nn.Identity(), Outputs(torch.empty(1, CLASSES, device="meta"), embedding=embedding))


def loss_of(labels: Tensor, **options: Any) -> CRDLoss:
    """Returns the loss of a student with 12 dimensions and a teacher with 16, with few negatives of few dimensions."""
    section, problems = LOSSES.resolve({"name": "crd", "negatives": 16, "dimensions": 8, **options})
    assert problems == []
    loss: CRDLoss = LOSSES.create(section)
    loss.attach(probe_of("small", 12), probe_of("large", 16))
    loss.enrol(Samples(labels, CLASSES))
    return loss


def outputs(embedding: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(embedding), CLASSES), embedding=embedding)


def batch_at(indices: Tensor, labels: Tensor) -> Batch:
    return Batch(torch.zeros(len(indices), 3, 1, 1), labels[indices], indices, torch.zeros_like(indices))


def labels_in_order(number: int = 50) -> Tensor:
    """Returns labels of a list that is in the order of classes: a sample's row is its position."""
    return torch.arange(number) * CLASSES // number


# --- the formula ------------------------------------------------------------------------------------------


def golden_loss(dense: int, monkeypatch: pytest.MonkeyPatch) -> tuple[CRDLoss, Tensor, Tensor, Tensor]:
    """Returns the loss of the golden case, the student's embedding, and rows of positives and of all."""
    monkeypatch.setattr(crd, "DENSE_ROWS", dense)
    loss = loss_of(labels_in_order()).double()
    for linear in (loss.student_map, loss.teacher_map):
        fill_tensor(linear.weight, 0)
        fill_tensor(linear.bias, 1)
    for name, q in (("student_memory", 0.21), ("teacher_memory", 0.33)):
        values = np.sin(q * np.arange(400) + 1).reshape(50, 8)
        getattr(loss, name).copy_(torch.tensor(values / np.linalg.norm(values, axis=1, keepdims=True)))
    i, k = torch.arange(BATCH), torch.arange(16)
    rows = (5 * i + 2) % 50
    negatives = (7 * i[:, None] + 3 * k + 11) % 50
    return loss, emb_s(), rows, torch.cat([rows[:, None], negatives], dim=1)


@pytest.mark.parametrize("dense", [0, 8])
def test_loss_gradient_constants_and_memory_are_those_of_the_reference(
    dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, embedding, rows, all_rows = golden_loss(dense, monkeypatch)
    own = F.normalize(loss.student_map(embedding))
    other = F.normalize(loss.teacher_map(emb_t()))
    value = loss.loss_of(own, other, all_rows)
    loss.remember(own, other, rows)
    check_golden("CRD_step1", value, embedding)  # the gradient is computed after the memories have changed
    golden = GOLDEN["CRD_step1"]
    assert loss.log_normalisers.exp().tolist() == pytest.approx(golden["Z"], rel=1e-12)
    assert loss.student_memory[2].tolist() == pytest.approx(golden["mem_v1_row2_after"], rel=1e-12)


def numpy_crd(scores: np.ndarray, normaliser: float, num_rows: int) -> float:
    p, odds = np.exp(scores) / normaliser, (scores.shape[1] - 1) / num_rows
    each = np.log(p[:, 0] / (p[:, 0] + odds + 1e-7)) + np.log(odds / (p[:, 1:] + odds + 1e-7)).sum(axis=1)
    return -each.mean()


def test_contrast_is_the_papers_formula() -> None:
    scores = np.random.default_rng(0).normal(size=(6, 21)) * 4
    value = contrast(torch.tensor(scores), torch.tensor(3.5, dtype=torch.float64), 70)
    assert value.item() == pytest.approx(numpy_crd(scores, np.exp(3.5), 70), rel=1e-12)


def test_contrast_is_finite_where_the_exponential_of_a_score_is_not() -> None:
    scores = torch.tensor([[-500.0, 500.0, 0.0], [500.0, -500.0, 0.0]], requires_grad=True)
    value = contrast(scores, torch.tensor(0.0), 2)
    value.backward()
    assert value.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_a_whole_step_is_the_papers_formula_for_the_rows_drawn() -> None:
    labels = torch.tensor([3, 0, -1, 1, 0, 3, 1, -1, 0])
    loss = loss_of(labels, negatives=7).double()
    indices = torch.tensor([5, 0, 4, 3])
    student, teacher = emb_s()[:4], emb_t()[:4]
    memories = [loss.teacher_memory.clone().numpy(), loss.student_memory.clone().numpy()]
    torch.manual_seed(3)
    terms = loss(outputs(student), outputs(teacher), batch_at(indices, labels))
    torch.manual_seed(3)
    rows = loss.row_of[indices]
    drawn = torch.cat([rows[:, None], loss.negatives_of(labels[indices], rows)], dim=1).numpy()
    expected = 0.0
    for linear, embedding, memory in zip(
        (loss.student_map, loss.teacher_map), (student, teacher), memories, strict=True
    ):
        v = embedding.detach().numpy() @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        scores = np.einsum("nd,nkd->nk", v, memory[drawn]) / 0.07
        expected += numpy_crd(scores, 7 * np.exp(scores).mean(), 7)  # 7 samples are trained on
    assert list(terms) == ["crd"]
    assert terms["crd"].item() == pytest.approx(expected, rel=1e-12)


def test_both_ways_of_computing_products_agree_and_outlive_a_change_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = torch.randint(30, (6, 10), generator=torch.Generator().manual_seed(0))
    found = []
    for dense in (0, 3):
        monkeypatch.setattr(crd, "DENSE_ROWS", dense)
        memory, embedding = torch.linspace(-1, 1, 120).view(30, 4), torch.linspace(0, 1, 24).view(6, 4).requires_grad_()
        values = products(embedding, memory, rows)
        memory.zero_()
        values.square().sum().backward()
        found.append((values, embedding.grad))
    torch.testing.assert_close(found[0], found[1])
    expected = torch.linspace(-1, 1, 120).view(30, 4)[rows] @ torch.linspace(0, 1, 24).view(6, 4, 1)
    torch.testing.assert_close(found[0][0], expected[..., 0])


# --- negatives --------------------------------------------------------------------------------------------

# Of very different frequency, one not there at all, in no order, and some samples that are not trained on.
IMBALANCED = torch.tensor([4] * 3 + [0] * 40 + [-1] * 5 + [2] + [0] * 20 + [1] * 12)[
    torch.randperm(81, generator=torch.Generator().manual_seed(4))
]


def labels_of_rows(loss: CRDLoss, labels: Tensor) -> Tensor:
    found = torch.empty(len(loss.student_memory), dtype=torch.int64)
    found[loss.row_of[labels >= 0]] = labels[labels >= 0]
    return found


def test_each_trained_sample_has_a_row_of_its_own() -> None:
    loss = loss_of(IMBALANCED)
    assert len(loss.student_memory) == len(loss.teacher_memory) == 76
    assert sorted(loss.row_of[IMBALANCED >= 0].tolist()) == list(range(76))
    assert (loss.row_of[IMBALANCED < 0] == -1).all()
    bound = (8 / 3) ** -0.5
    for memory in (loss.student_memory, loss.teacher_memory):
        assert memory.abs().max() <= bound
        assert memory.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(loss.student_memory, loss.teacher_memory)


@pytest.mark.parametrize("label", [0, 1, 2, 4])
@pytest.mark.parametrize("sampling", ["exact", "relax"])
def test_every_row_but_the_forbidden_ones_is_drawn_evenly(sampling: str, label: int) -> None:
    loss = loss_of(IMBALANCED, sampling=sampling, negatives=20_000)
    indices = (label == IMBALANCED).nonzero()[:1, 0].repeat(5)
    rows = loss.row_of[indices]
    torch.manual_seed(0)
    negatives = loss.negatives_of(IMBALANCED[indices], rows)
    assert negatives.shape == (5, 20_000)
    counts = negatives.flatten().bincount(minlength=76)
    forbidden = labels_of_rows(loss, IMBALANCED) == label if sampling == "exact" else torch.arange(76) == rows[0]
    assert counts[forbidden].tolist() == [0] * int(forbidden.sum())
    expected = 100_000 / int((~forbidden).sum())
    chi_square = ((counts[~forbidden] - expected) ** 2 / expected).sum().item()
    degrees = int((~forbidden).sum()) - 1
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("sampling", ["exact", "relax"])
def test_samples_of_a_batch_have_negatives_of_their_own(sampling: str) -> None:
    loss = loss_of(IMBALANCED, sampling=sampling, negatives=300)
    indices = (IMBALANCED >= 0).nonzero()[:, 0]
    rows = loss.row_of[indices]
    negatives = loss.negatives_of(IMBALANCED[indices], rows)
    assert len(negatives.unique(dim=0)) == len(indices)
    labels = labels_of_rows(loss, IMBALANCED)
    if sampling == "exact":
        assert (labels[negatives] != IMBALANCED[indices][:, None]).all()
    else:
        assert (negatives != rows[:, None]).all()
        assert (labels[negatives] == IMBALANCED[indices][:, None]).any()


def test_draws_reach_both_ends_of_their_range_and_no_further() -> None:
    below = torch.tensor([1, 2, 3, 2**31 - 1])
    drawn = draw(below, 1000)
    assert [row.unique().tolist() for row in drawn[:3]] == [[0], [0, 1], [0, 1, 2]]
    assert 0 <= drawn[3].min() < 0.01 * 2**31
    assert 0.99 * 2**31 < drawn[3].max() < 2**31 - 1


def test_without_chance_negatives_are_spread_evenly() -> None:
    assert evenly(torch.tensor([5, 10, 2]), 5).tolist() == [[0, 1, 2, 3, 4], [1, 3, 5, 7, 9], [0, 0, 1, 1, 1]]


def test_samples_of_one_class_are_refused_where_negatives_are_of_another() -> None:
    labels = torch.tensor([2, -1, 2, 2])
    with pytest.raises(InputError) as error:
        loss_of(labels)
    assert str(error.value) == (
        "loss 'crd' draws negatives from other classes, but all 3 training samples are of one; add samples, or set its"
        ' sampling to "relax"'
    )
    assert loss_of(labels, sampling="relax").negatives_of(torch.tensor([2]), torch.tensor([1])).shape == (1, 16)
    with pytest.raises(InputError, match="from other samples, but there is only one"):
        loss_of(torch.tensor([2, -1]), sampling="relax")


# --- state ------------------------------------------------------------------------------------------------


def step(loss: CRDLoss, seed: int, labels: Tensor = IMBALANCED) -> Tensor:
    """Returns the loss of a random batch."""
    torch.manual_seed(seed)
    indices = (labels >= 0).nonzero()[:, 0]
    indices = indices[torch.randperm(len(indices))[:6]]
    student, teacher = torch.randn(6, 12), torch.randn(6, 16)
    return loss(outputs(student), outputs(teacher), batch_at(indices, labels))["crd"]


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("sampling", ["exact", "relax"])
def test_a_resumed_run_goes_on_as_the_one_that_was_not_interrupted(sampling: str, steps: int) -> None:
    loss = loss_of(IMBALANCED, sampling=sampling)
    for seed in range(steps):
        step(loss, seed)
    state = copy.deepcopy(loss.state_dict())
    expected = [step(loss, seed).item() for seed in range(steps, steps + 3)]
    other = loss_of(IMBALANCED, sampling=sampling)
    other.load_state_dict(state)
    assert [step(other, seed).item() for seed in range(steps, steps + 3)] == expected
    assert all(torch.equal(value, loss.state_dict()[name]) for name, value in other.state_dict().items())
    fresh = loss_of(IMBALANCED, sampling=sampling)
    maps = {name: value for name, value in state.items() if "_map" in name}
    fresh.load_state_dict({**fresh.state_dict(), **maps})
    assert [step(fresh, seed).item() for seed in range(steps, steps + 3)] != expected, "memories and Z are state"


def test_the_constants_are_those_of_the_first_batch_for_ever() -> None:
    loss = loss_of(IMBALANCED)
    assert not loss.has_begun
    step(loss, 0)
    first = loss.log_normalisers.clone()
    step(loss, 1)
    assert loss.has_begun
    assert torch.equal(loss.log_normalisers, first)
    assert (first != 0).all()


def test_only_the_rows_of_a_batch_change_and_they_keep_length_1() -> None:
    loss = loss_of(IMBALANCED, momentum=0.25)
    before = loss.student_memory.clone(), loss.teacher_memory.clone()
    indices = (IMBALANCED >= 0).nonzero()[10:14, 0]
    student, teacher = torch.randn(4, 12), torch.randn(4, 16)
    loss(outputs(student), outputs(teacher), batch_at(indices, IMBALANCED))
    rows = loss.row_of[indices]
    sides = (loss.student_map(student), loss.teacher_map(teacher))
    for old, new, embedding in zip(before, (loss.student_memory, loss.teacher_memory), sides, strict=True):
        moved = 0.25 * old[rows] + 0.75 * embedding / embedding.norm(dim=1, keepdim=True)
        expected = old.clone()
        expected[rows] = (moved / moved.norm(dim=1, keepdim=True)).detach()
        torch.testing.assert_close(new, expected)
    assert not loss.student_memory.requires_grad


def test_validation_changes_nothing_draws_nothing_and_needs_no_row() -> None:
    loss = loss_of(IMBALANCED)
    step(loss, 0)
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    batch = Batch(torch.zeros(3, 3, 1, 1), torch.tensor([0, 3, 4]), torch.tensor([7, 9, 700]), torch.zeros(3).long())
    student, teacher = torch.randn(3, 12), torch.randn(3, 16)
    values = []
    for seed in range(2):
        torch.manual_seed(seed)
        values.append(loss(outputs(student), outputs(teacher), batch)["crd"].item())
    assert values[0] == values[1]
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    own, other = F.normalize(loss.student_map(student)), F.normalize(loss.teacher_map(teacher))
    negatives = loss.negatives_of(batch.labels, None)
    labels = labels_of_rows(loss, IMBALANCED)
    assert (labels[negatives] != batch.labels[:, None]).all()
    expected = 0.0
    for side, (v, memory) in enumerate(((own, loss.teacher_memory), (other, loss.student_memory))):
        scores = torch.cat([(own * other).sum(1, keepdim=True), torch.einsum("nd,nkd->nk", v, memory[negatives])], 1)
        scores = (scores / 0.07).detach().double().numpy()
        expected += numpy_crd(scores, np.exp(loss.log_normalisers[side].item()), 76)
    assert values[0] == pytest.approx(expected, rel=1e-5)


def test_validation_before_the_first_step_sets_no_constants() -> None:
    loss = loss_of(IMBALANCED).eval()
    indices = (IMBALANCED >= 0).nonzero()[:4, 0]
    loss(outputs(torch.randn(4, 12)), outputs(torch.randn(4, 16)), batch_at(indices, IMBALANCED))
    assert not loss.has_begun
    assert loss.log_normalisers.tolist() == [0, 0]


def test_a_sample_that_was_not_enrolled_is_not_taken_for_another() -> None:
    loss = loss_of(IMBALANCED)
    indices = torch.stack([(IMBALANCED >= 0).nonzero()[0, 0], (IMBALANCED < 0).nonzero()[0, 0]])
    batch = Batch(torch.zeros(2, 3, 1, 1), torch.tensor([0, 0]), indices, torch.zeros(2).long())
    with pytest.raises(ValueError, match="not enrolled"):
        loss(outputs(torch.randn(2, 12)), outputs(torch.randn(2, 16)), batch)


# --- options ----------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_reference_implementation() -> None:
    resolved, problems = LOSSES.resolve({"name": "crd"})
    assert problems == []
    expected = {"negatives": 16384, "temperature": 0.07, "momentum": 0.5, "dimensions": 128, "sampling": "exact"}
    assert {key: resolved[key] for key in expected} == expected
    assert CRDLoss.usual_weight == 0.8
    assert CRDLoss().describe() == (
        "CRD of 128 dimensions with 16384 negatives from other classes (T 0.07, momentum 0.5), mean over the batch"
    )


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("negatives", 0, "0 is below 1"),
        ("temperature", 0, "0 is not above 0.0"),
        ("momentum", 1, "1 is not below 1.0"),
        ("sampling", "all", "'all' is not one of 'exact' or 'relax'"),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: object, problem: str) -> None:
    assert LOSSES.resolve({"name": "crd", option: value})[1] == [(option, problem)]


def test_a_net_without_an_embedding_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="teacher 'large' does not give it; choose another net"):
        CRDLoss().attach(probe_of("small", 12), probe_of("large", None))


# --- what it is for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["exact", "relax"])
def test_training_brings_each_sample_closer_to_its_own_teacher_embedding_than_to_others(sampling: str) -> None:
    torch.manual_seed(0)
    labels = labels_in_order(40)
    teacher = torch.randn(40, 16)
    student = nn.Parameter(torch.randn(40, 12))
    loss = loss_of(labels, sampling=sampling, negatives=64, dimensions=16)
    optimizer = torch.optim.Adam([student, *loss.parameters()], lr=0.02)

    def ranks() -> float:
        products = F.normalize(loss.student_map(student)) @ F.normalize(loss.teacher_map(teacher)).t()
        return (products >= products.diag()[:, None]).float().sum(1).mean().item()

    before = ranks()
    for _ in range(60):
        for indices in torch.randperm(40).split(10):
            optimizer.zero_grad()
            loss(outputs(student[indices]), outputs(teacher[indices]), batch_at(indices, labels))["crd"].backward()
            optimizer.step()
    assert before > 10
    assert ranks() < 2


def test_the_first_step_of_a_batch_of_one_is_finite() -> None:
    loss = loss_of(IMBALANCED)
    indices = (IMBALANCED == 2).nonzero()[:, 0]
    student = torch.zeros(1, 12, requires_grad=True)
    value = loss(outputs(student), outputs(torch.zeros(1, 16)), batch_at(indices, IMBALANCED))["crd"]
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()

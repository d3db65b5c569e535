"""Oracles: values of a reference implementation, the formulas in numpy, convolutions written as sums of shifts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden import batch_of, check_golden, fill, maps, student_maps
from torch import Tensor, nn

from model.engine import outputs_of, probe
from model.errors import InputError
from model.losses import LOSSES, create_objective, resolve
from model.losses.reviewkd import Fusion, ReviewKDLoss, hcl_loss
from model.losses.stages import Shape
from model.nets import NETS
from model.outputs import Batch, Outputs, Probe
from model.teacher import FrozenTeacher

CLASSES = 5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs_with(width: int, *shapes: Shape, size: int = 1, seed: int = 0) -> Outputs:
    """Returns random outputs; the features are not the preacts' ReLU, so that it shows which of them is read."""
    features, preacts = (
        tuple(noise(size, *shape, seed=seed + 10 * i + j) for i, shape in enumerate(shapes)) for j in range(2)
    )
    return Outputs(noise(size, CLASSES, seed=seed), features, preacts, noise(size, width, seed=seed + 99))


def loss_of(student: Outputs, teacher: Outputs, **options: Any) -> ReviewKDLoss:
    section, problems = LOSSES.resolve({"name": "reviewkd", **options})
    assert problems == []
    loss: ReviewKDLoss = LOSSES.create(section)
    shown = [Probe(name, nn.Identity(), each.shapes()) for name, each in (("small", student), ("large", teacher))]
    loss.attach(*shown)
    return loss.double()


# --- hierarchical context loss ----------------------------------------------------------------------------


def test_the_context_loss_has_value_and_gradient_of_the_reference() -> None:
    student = student_maps(6, 8)
    check_golden("ReviewKD_HCL_8x8", hcl_loss(student, maps(6, 8, 0.8, 1.5)), student)


def mse_at(student: Tensor, teacher: Tensor, size: int) -> float:
    gap = (student - teacher).numpy()  # pooling is linear
    n, c, h, w = gap.shape
    return float((gap.reshape(n, c, size, h // size, size, w // size).mean(axis=(3, 5)) ** 2).mean())


@pytest.mark.parametrize(
    ("height", "width", "sizes"),
    [(8, 8, (4, 2, 1)), (16, 8, (4, 2, 1)), (4, 4, (2, 1)), (4, 8, (2, 1)), (2, 2, (1,)), (1, 1, ())],
)
def test_the_context_loss_weighs_smaller_sizes_by_halves(height: int, width: int, sizes: tuple[int, ...]) -> None:
    student, teacher = noise(3, 5, height, width), noise(3, 5, height, width, seed=1)
    weights = [0.5 ** (i + 1) for i in range(len(sizes))]
    total = ((student - teacher) ** 2).mean().item()
    total += sum(w * mse_at(student, teacher, size) for w, size in zip(weights, sizes, strict=True))
    assert hcl_loss(student, teacher).item() == pytest.approx(total / (1 + sum(weights)), rel=1e-12)


def test_equal_maps_cost_nothing_and_other_shapes_are_refused() -> None:
    assert hcl_loss(noise(2, 3, 8, 8), noise(2, 3, 8, 8)).item() == 0
    with pytest.raises(ValueError, match="student maps"):
        hcl_loss(noise(2, 3, 8, 8), noise(2, 1, 8, 8))


# --- fusion -----------------------------------------------------------------------------------------------


def test_a_fusion_has_value_and_gradient_of_the_reference() -> None:
    student = student_maps(4, 8)
    fusion = fill(Fusion(4, 5, 6)).eval()
    fitted, _ = fusion(student, maps(5, 4, 0.2, 0.7), (8, 8))
    check_golden("ReviewKD_ABF_fill_eval_sumsq", fitted.square().sum(), student)


def numpy_conv(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Returns a convolution of stride 1 with zero padding that keeps the size."""
    k, (h, w) = weight.shape[2], x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    shifts = [(dy, dx) for dy in range(k) for dx in range(k)]
    return sum(np.einsum("oc,nchw->nohw", weight[:, :, y, x], padded[:, :, y : y + h, x : x + w]) for y, x in shifts)  # type: ignore[return-value]


def numpy_nearest(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.arange(to) * of // to for of, to in zip(x.shape[2:], size, strict=True))
    return x[:, :, rows][:, :, :, columns]


def numpy_fusion(
    fusion: Fusion, maps: np.ndarray, residual: np.ndarray | None, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a new fusion in eval mode makes: its batch norms only divide by sqrt(1 + 1e-5)."""
    state = {name: value.numpy() for name, value in fusion.state_dict().items()}
    scale = np.sqrt(1 + 1e-5)
    fused = numpy_conv(maps, state["narrow.0.weight"]) / scale
    if residual is not None:
        residual = numpy_nearest(residual, fused.shape[2:])  # type: ignore[arg-type]
        both = np.concatenate([fused, residual], axis=1)
        gates = 1 / (1 + np.exp(-(numpy_conv(both, state["gates.weight"]) + state["gates.bias"].reshape(1, 2, 1, 1))))
        fused = fused * gates[:, :1] + residual * gates[:, 1:]
    fused = numpy_nearest(fused, size)
    return numpy_conv(fused, state["fit.0.weight"]) / scale, fused


@pytest.mark.parametrize(("own", "other"), [((8, 8), (8, 8)), ((8, 8), (4, 4)), ((4, 6), (8, 12)), ((6, 6), (4, 4))])
def test_a_fusion_is_the_papers(own: tuple[int, int], other: tuple[int, int]) -> None:
    fusion = Fusion(4, 5, 6).double().eval()
    student, residual = noise(3, 4, *own), noise(3, 5, 2, 2, seed=1)
    fitted, left = fusion(student, residual, other)
    assert fitted.shape == (3, 6, *other)
    expected = numpy_fusion(fusion, student.numpy(), residual.numpy(), other)
    np.testing.assert_allclose(fitted.detach().numpy(), expected[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(left.detach().numpy(), expected[1], rtol=1e-10, atol=1e-12)


# --- the loss ---------------------------------------------------------------------------------------------


def test_each_level_is_fused_with_the_deeper_ones_and_meets_the_teachers_preact() -> None:
    student = outputs_with(7, (3, 8, 8), (4, 4, 4), size=2)
    teacher = outputs_with(9, (5, 8, 8), (6, 2, 2), size=2, seed=500)
    loss = loss_of(student, teacher, student_stages=[1, 2], teacher_stages=[1, 2], max_channels=5).eval()
    assert student.embedding is not None
    assert teacher.embedding is not None
    own = [student.embedding[:, :, None, None], student.features[1], student.features[0]]
    other = [teacher.embedding[:, :, None, None], teacher.preacts[1], teacher.preacts[0]]
    expected, residual = 0.0, None
    for fusion, maps_, target in zip(loss.fusions, own, other, strict=True):
        assert isinstance(fusion, Fusion)
        fitted, residual = numpy_fusion(fusion, maps_.numpy(), residual, target.shape[2:])  # type: ignore[arg-type]
        expected += hcl_loss(torch.tensor(fitted), target).item()
    terms = loss(student, teacher, batch_of(torch.arange(2)))
    assert list(terms) == ["reviewkd"]
    assert terms["reviewkd"].item() == pytest.approx(expected, rel=1e-10)


def test_fused_maps_have_as_many_channels_as_the_embedding_up_to_a_maximum() -> None:
    student, teacher = outputs_with(7, (3, 8, 8)), outputs_with(9, (5, 8, 8))
    assert [loss_of(student, teacher, max_channels=most).channels for most in (512, 7, 6)] == [7, 7, 6]
    assert loss_of(student, teacher, max_channels=6).fusions[0].fit[0].in_channels == 6  # type: ignore[index, union-attr]


def test_a_teacher_without_preacts_is_refused_by_name() -> None:
    student, teacher = outputs_with(7, (3, 8, 8)), outputs_with(9, (5, 8, 8))
    with pytest.raises(InputError, match="teacher 'large' does not give those before the last activation"):
        loss_of(student, replace(teacher, preacts=()))
    assert loss_of(replace(student, preacts=()), teacher).fusions, "of the student they are not read"


def test_a_net_without_an_embedding_is_refused_by_name() -> None:
    student, teacher = outputs_with(7, (3, 8, 8)), outputs_with(9, (5, 8, 8))
    with pytest.raises(InputError, match="student 'small' does not give it"):
        loss_of(replace(student, embedding=None), teacher)


def test_lists_of_stages_of_different_length_are_refused() -> None:
    with pytest.raises(InputError, match="are not of one length"):
        ReviewKDLoss(student_stages=[1], teacher_stages=[1, 2])


def test_the_defaults_are_those_of_the_reference_implementation() -> None:
    resolved, problems = LOSSES.resolve({"name": "reviewkd"})
    assert problems == []
    assert resolved["max_channels"] == 512
    loss = loss_of(outputs_with(7, (3, 8, 8)), outputs_with(9, (5, 8, 8)))
    assert loss.usual_weight == 5
    assert not loss.trains_classifier
    assert loss.describe() == (
        "MSE at several scales of maps fused from the deepest on (7 channels), sum over the embedding and student"
        " stages [1] to teacher stages [1], mean over the batch and the map"
    )


def test_the_warm_up_that_its_documentation_shows_is_accepted() -> None:
    weight = {"name": "constant", "value": 5, "warmup_epochs": 20}
    sections, problems = resolve([{"name": "ce"}, {"name": "reviewkd", "weight": weight}])
    assert problems == []
    student = outputs_with(7, (3, 8, 8), size=2).float()
    teacher = outputs_with(9, (5, 8, 8), size=2, seed=50).float()
    objective = create_objective(sections, 240)
    objective.attach(*(Probe("net", nn.Identity(), each.shapes()) for each in (student, teacher)))
    loss = dict(objective.parts())["reviewkd"].eval()
    alone = loss(student, teacher, batch_of(torch.arange(2)))["reviewkd"].item()
    for epoch, factor in ((0, 0.25), (9, 2.5), (19, 5.0), (100, 5.0)):
        objective.on_epoch(epoch)
        value = objective(student, teacher, batch_of(torch.arange(2)))["reviewkd"]
        assert value.item() == pytest.approx(factor * alone, rel=1e-6)


def test_training_lowers_it() -> None:
    torch.manual_seed(0)
    student, net = (NETS.create({"name": "tiny", "width": width}, CLASSES) for width in (4, 8))
    loss = LOSSES.create(LOSSES.resolve({"name": "reviewkd"})[0])
    loss.attach(probe(student, "student", (3, 16, 16)), probe(net, "teacher", (3, 16, 16)))
    teacher, labels = FrozenTeacher(net), torch.arange(16) % CLASSES
    batch = Batch(torch.randn(16, 3, 16, 16), labels, labels, labels)
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.05, momentum=0.9)
    values = []
    for _ in range(40):
        answers = (outputs_of(each, batch.images, loss.needs) for each in (student, teacher))
        value = loss(*answers, batch)["reviewkd"]
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert values[-1] < 0.5 * values[0]

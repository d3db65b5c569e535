"""Oracles: values of a reference implementation, the papers' formula in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden import batch_of, check_golden, maps
from torch import Tensor, nn

from model.errors import InputError
from model.losses import LOSSES
from model.losses.fsp import FSPLoss, flow, fsp_loss
from model.losses.stages import Shape
from model.outputs import Outputs, Probe

CLASSES = 5


def probe_of(name: str, *shapes: Shape) -> Probe:
    features = tuple(torch.empty(1, *shape, device="meta") for shape in shapes)
    return Probe(name, nn.Identity(), Outputs(torch.empty(1, CLASSES, device="meta"), features=features))


def loss_of(student: list[Shape], teacher: list[Shape], **options: Any) -> FSPLoss:
    section, problems = LOSSES.resolve({"name": "fsp", **options})
    assert problems == []
    loss: FSPLoss = LOSSES.create(section)
    loss.attach(probe_of("small", *student), probe_of("large", *teacher))
    return loss


def outputs(*features: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(features[0]), CLASSES, dtype=features[0].dtype), features=features)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the formula ------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_those_of_the_reference() -> None:
    student = [maps(4, 8, 0.5, 1).requires_grad_(), maps(4, 4, 0.5, 1)]
    teacher = [maps(4, 8, 0.8, 1.5), maps(4, 4, 0.9, 1.1)]
    check_golden("FSP", fsp_loss(student, teacher), student[0])


def numpy_flow(maps: Tensor, following: Tensor) -> np.ndarray:
    """Returns mean_HW f[b,c] g[b,d], the first map pooled to half its size."""
    n, c, h, w = maps.shape
    pooled = maps.numpy().reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5))
    return np.einsum("bchw,bdhw->bdc", pooled, following.numpy()) / (h * w / 4)


def test_a_flow_is_the_mean_product_of_two_stages_channels() -> None:
    first, second = noise(3, 4, 8, 6), noise(3, 5, 4, 3, seed=1)
    found = flow(first, second)
    assert found.shape == (3, 5, 4)
    np.testing.assert_allclose(found.numpy(), numpy_flow(first, second), rtol=1e-12)
    np.testing.assert_allclose(flow(second, first).numpy(), found.transpose(1, 2).numpy(), rtol=1e-12)


def test_the_loss_is_the_sum_over_neighbouring_stages_that_are_paired() -> None:
    shapes: list[Shape] = [(4, 16, 16), (6, 8, 8), (8, 4, 4)]
    student, teacher = ([noise(3, *shape, seed=seed + i) for i, shape in enumerate(shapes)] for seed in (0, 10))

    def squares(first: int, second: int) -> float:
        own, other = (numpy_flow(stages[first], stages[second]) for stages in (student, teacher))
        return float(((own - other) ** 2).mean())

    terms = loss_of(shapes, shapes)(outputs(*student), outputs(*teacher), batch_of(torch.arange(3)))
    assert list(terms) == ["fsp"]
    assert terms["fsp"].item() == pytest.approx(squares(0, 1) + squares(1, 2), rel=1e-12)
    some = loss_of(shapes, shapes, student_stages=[2, 3], teacher_stages=[2, 3])
    value = some(outputs(*student), outputs(*teacher), batch_of(torch.arange(3)))["fsp"]
    assert value.item() == pytest.approx(squares(1, 2), rel=1e-12)


def test_nets_of_other_sizes_have_comparable_flows() -> None:
    loss = loss_of([(4, 8, 8), (6, 4, 4)], [(4, 16, 16), (6, 8, 8)])
    student = outputs(noise(3, 4, 8, 8), noise(3, 6, 4, 4))
    teacher = outputs(noise(3, 4, 16, 16, seed=2), noise(3, 6, 8, 8, seed=3))
    value = loss(student, teacher, batch_of(torch.arange(3)))["fsp"]
    expected = [numpy_flow(*side.features) for side in (student, teacher)]
    assert value.item() == pytest.approx(((expected[0] - expected[1]) ** 2).mean(), rel=1e-12)


# --- options ----------------------------------------------------------------------------------------------


def test_stages_of_different_width_are_refused_in_one_sentence() -> None:
    with pytest.raises(InputError) as error:
        loss_of([(4, 8, 8), (6, 4, 4)], [(4, 8, 8), (7, 4, 4)])
    assert str(error.value) == (
        "loss 'fsp' reads the stages' features: student stage 2 and teacher stage 2 have 6 and 7 channels, which must"
        " be as many; student 'small' has 4x8x8, 6x4x4, teacher 'large' has 4x8x8, 7x4x4; choose other stages or other"
        " nets"
    )


def test_a_single_stage_is_refused() -> None:
    with pytest.raises(InputError, match="a flow is between two stages, and only one is paired"):
        loss_of([(4, 8, 8), (6, 4, 4)], [(4, 8, 8), (6, 4, 4)], student_stages=[1], teacher_stages=[1])


def test_the_defaults_are_those_of_the_reference_implementation() -> None:
    resolved, problems = LOSSES.resolve({"name": "fsp"})
    assert problems == []
    assert resolved["initial_epochs"] == 30
    shapes: list[Shape] = [(4, 8, 8), (6, 4, 4)]
    loss = loss_of(shapes, shapes)
    assert loss.usual_weight == 1
    assert not loss.trains_classifier
    assert loss.describe() == (
        "MSE of the flows between neighbouring stages, sum over student stages [1, 2] to teacher stages [1, 2], mean"
        " over the batch and the matrix (in the first 30 epochs, alone)"
    )


def test_a_stage_of_no_epochs_is_refused() -> None:
    assert LOSSES.resolve({"name": "fsp", "initial_epochs": 0})[1] == [("initial_epochs", "0 is below 1")]

"""Oracles: values of the reference implementation, the formula in numpy, the closed form of the best variance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden import check_golden, fill_tensor, student_maps, teacher_maps
from stand_ins import any_batch, created, maps_of, outputs_of, probe_of
from torch import nn
from torch.nn import functional as F

from model.errors import InputError
from model.losses import LOSSES
from model.losses.vid import Predictor, vid_loss


def rho_of(variance: float, channels: int) -> torch.Tensor:
    """Returns the parameter of a variance: the inverse of softplus."""
    return torch.full((channels,), float(np.log(np.expm1(variance - 1e-5))), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_is_the_reference_implementations(dtype: torch.dtype) -> None:
    predictor = Predictor(4, 6).double()
    for k, convolution in enumerate(module for module in predictor.mean if isinstance(module, nn.Conv2d)):
        fill_tensor(convolution.weight, k)
    with torch.no_grad():
        predictor.rho.copy_(rho_of(5, 6))  # of full precision, as the reference value's
    student = student_maps().detach().to(dtype).requires_grad_()
    check_golden("VID_fill", predictor.to(dtype)(student, teacher_maps().to(dtype)), student)


def test_the_loss_is_the_formula() -> None:
    predicted, teacher = maps_of(3, 5, 4), maps_of(3, 5, 4, seed=1)
    rho = torch.tensor([-2.0, 0.5, 3], dtype=torch.float64)
    variance = (np.log1p(np.exp(rho.numpy())) + 1e-5).reshape(1, 3, 1, 1)
    squares = (predicted.detach().numpy() - teacher.detach().numpy()) ** 2
    expected = (0.5 * (squares / variance + np.log(variance))).mean()
    assert vid_loss(predicted, teacher, rho).item() == pytest.approx(expected, rel=1e-12)


def test_a_channels_best_variance_is_its_mean_squared_error() -> None:
    predicted, teacher = maps_of(3, 5, 4), maps_of(3, 5, 4, seed=1)
    errors = (predicted - teacher).detach().square().mean((0, 2, 3))
    rho = torch.log(torch.expm1(errors - 1e-5)).requires_grad_()
    best = vid_loss(predicted, teacher, rho)
    assert torch.autograd.grad(best, rho)[0].abs().max() < 1e-12
    assert best.item() == pytest.approx(((1 + errors.log()) / 2).mean().item(), rel=1e-12)
    for other in (rho + 0.3, rho - 0.3):
        assert vid_loss(predicted, teacher, other) > best


def test_variances_are_learnt_and_precise_predictions_have_a_loss_below_0() -> None:
    teacher = maps_of(3, 5, 4).detach()
    predictor = Predictor(3, 3).double()
    optimizer = torch.optim.Adam([predictor.rho], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss = vid_loss(teacher + 0.01, teacher, predictor.rho)
        loss.backward()
        optimizer.step()
    assert loss.item() < -2
    assert "rho" in predictor.state_dict()


@pytest.mark.parametrize("rho", [-1e4, -100.0, 100.0, 1e4])
def test_any_variance_is_finite(rho: float) -> None:
    parameter = torch.full((3,), rho, requires_grad=True)
    loss = vid_loss(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), parameter)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, parameter)[0].isfinite().all()


@pytest.mark.parametrize("variance", [0.001, 1, 5, 100])
def test_variances_begin_as_told(variance: float) -> None:
    rho = Predictor(4, 6, variance).rho
    assert (F.softplus(rho.double()) + 1e-5).tolist() == pytest.approx([variance] * 6, rel=1e-4)


def test_the_mean_comes_from_three_convolutions_of_1x1_without_biases() -> None:
    predictor = Predictor(4, 6).double()
    shapes = {name: tuple(parameter.shape) for name, parameter in predictor.named_parameters()}
    assert shapes == {
        "rho": (6,),
        "mean.0.weight": (6, 4, 1, 1),
        "mean.2.weight": (6, 6, 1, 1),
        "mean.4.weight": (6, 6, 1, 1),
    }
    values = maps_of(4, 3, 2)
    expected = values.detach().numpy()
    for number in (0, 2, 4):
        weight = predictor.mean[number].weight.detach().numpy()[:, :, 0, 0]
        expected = np.einsum("oc,nchw->nohw", weight, expected)
        expected = np.maximum(expected, 0) if number < 4 else expected
    np.testing.assert_allclose(predictor.mean(values).detach().numpy(), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("sizes", [(8, 4), (4, 8)])
def test_the_larger_map_is_averaged_first(sizes: tuple[int, int]) -> None:
    predictor = Predictor(2, 3).double()
    student, teacher = maps_of(2, sizes[0], sizes[0]), maps_of(3, sizes[1], sizes[1], seed=1)
    own, other = (F.adaptive_avg_pool2d(each, 4) for each in (student, teacher))
    expected = vid_loss(predictor.mean(own), other, predictor.rho).item()
    assert predictor(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_a_batch_repeated_twice_has_the_same_loss() -> None:
    predictor = Predictor(4, 6).double()
    once, twice = (predictor(student_maps().repeat(n, 1, 1, 1), teacher_maps().repeat(n, 1, 1, 1)) for n in (1, 2))
    assert twice.item() == pytest.approx(once.item(), rel=1e-12)


def test_no_map_is_spread_over_others() -> None:
    with pytest.raises(ValueError, match=r"predicted maps \(2, 3, 4, 4\), teacher maps \(1, 3, 4, 4\)"):
        vid_loss(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(3))


# --- stages -----------------------------------------------------------------------------------------------------

STUDENT, TEACHER = [(2, 8, 8), (3, 4, 4)], [(4, 8, 8), (5, 6, 6), (6, 4, 4)]


@pytest.mark.parametrize(
    ("options", "pairs"),
    [({}, [(0, 0), (1, 2)]), ({"student_stages": [2], "teacher_stages": [1]}, [(1, 0)])],
)
def test_the_stages_are_summed_each_with_a_predictor_of_its_own(
    options: dict[str, Any], pairs: list[tuple[int, int]]
) -> None:
    loss = created("vid", **options)
    loss.attach(probe_of("small", *STUDENT), probe_of("large", *TEACHER))
    loss.double()
    student = [maps_of(*shape) for shape in STUDENT]
    teacher = [maps_of(*shape, seed=1) for shape in TEACHER]
    expected = sum(
        predictor(student[own], teacher[other]).item()
        for predictor, (own, other) in zip(loss.predictors, pairs, strict=True)
    )
    terms = loss(outputs_of(*student), outputs_of(*teacher), any_batch(6))
    assert list(terms) == ["vid"]
    assert terms["vid"].item() == pytest.approx(expected, rel=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"student_stages null and teacher_stages \[1\] are not of one length"):
        created("vid", teacher_stages=[1])
    with pytest.raises(InputError, match="loss 'vid' reads the stages' features: student 'small' has no stage 3;"):
        created("vid", student_stages=[3], teacher_stages=[1]).attach(
            probe_of("small", *STUDENT), probe_of("large", *TEACHER)
        )
    assert LOSSES.resolve({"name": "vid", "initial_variance": 0})[1] == [("initial_variance", "0 is below 0.001")]


def test_the_defaults_are_those_of_the_reference_implementation() -> None:
    loss = created("vid")
    loss.attach(probe_of("small", *STUDENT), probe_of("large", *TEACHER))
    assert (loss.initial_variance, loss.usual_weight) == (5, 1)
    assert "from 5), sum over student stages [1, 2] to teacher stages [1, 3]," in loss.describe()

"""Oracles: values of a reference implementation, the formula in numpy, what is to learn when."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden import batch_of, check_golden, student_maps, teacher_maps
from torch import Tensor, nn
from torch.nn import functional as F

from model.losses import LOSSES, create_objective, resolve
from model.losses.ft import FTLoss, Paraphraser, ft_loss
from model.losses.stages import Shape
from model.outputs import Outputs, Probe

CLASSES = 5


def probe_of(name: str, *shapes: Shape) -> Probe:
    features = tuple(torch.empty(1, *shape, device="meta") for shape in shapes)
    return Probe(name, nn.Identity(), Outputs(torch.empty(1, CLASSES, device="meta"), features=features))


def loss_of(student: Shape, teacher: Shape, **options: Any) -> FTLoss:
    section, problems = LOSSES.resolve({"name": "ft", **options})
    assert problems == []
    loss: FTLoss = LOSSES.create(section)
    loss.attach(probe_of("small", (2, 16, 16), student), probe_of("large", (2, 16, 16), teacher))
    return loss


def outputs(features: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(features), CLASSES, requires_grad=True), features=(features[:, :1], features))


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- the formula ------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_those_of_the_reference() -> None:
    student = student_maps(6)
    check_golden("FT_p2_1", ft_loss(student, teacher_maps()), student)


def test_the_loss_is_the_formula_on_maps_pooled_to_one_size() -> None:
    student, teacher = noise(4, 3, 6, 8, dtype=torch.float64), noise(4, 5, 3, 4, seed=1, dtype=torch.float64)
    pooled = student.numpy().reshape(4, 3, 3, 2, 4, 2).mean(axis=(3, 5))
    energies = [(maps**2).mean(axis=1).reshape(4, 12) for maps in (pooled, teacher.numpy())]
    own, other = (energy / np.linalg.norm(energy, axis=1, keepdims=True) for energy in energies)
    assert ft_loss(student, teacher).item() == pytest.approx(np.abs(own - other).mean(), rel=1e-12)


def test_equal_factors_cost_nothing_and_their_scale_does_not_matter() -> None:
    factors = noise(4, 3, 5, 5, dtype=torch.float64)
    scales = torch.tensor([0.1, 1, 5, 100], dtype=torch.float64).view(4, 1, 1, 1)
    assert ft_loss(factors, factors).item() == 0
    assert ft_loss(scales * factors, factors).item() == pytest.approx(0, abs=1e-14)
    other = noise(4, 3, 5, 5, seed=1, dtype=torch.float64)
    assert ft_loss(scales * other, factors).item() == pytest.approx(ft_loss(other, factors).item(), rel=1e-12)


def test_maps_of_zeros_have_a_finite_loss_without_gradient() -> None:
    zeros = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = ft_loss(zeros, noise(2, 3, 4, 4))
    value.backward()
    assert value.isfinite()
    assert zeros.grad is not None
    assert (zeros.grad == 0).all()


# --- its nets ---------------------------------------------------------------------------------------------


def test_paraphraser_and_translator_have_the_layers_of_the_reference() -> None:
    loss = loss_of((6, 8, 8), (10, 8, 8))

    def layers(net: nn.Module, kind: type[nn.Module]) -> list[tuple[int, int]]:
        return [(m.in_channels, m.out_channels) for m in net.modules() if type(m) is kind]  # type: ignore[misc]

    assert layers(loss.paraphraser.encoder, nn.Conv2d) == [(10, 10), (10, 5), (5, 5)]
    assert layers(loss.paraphraser.decoder, nn.ConvTranspose2d) == [(5, 5), (5, 10), (10, 10)]
    assert layers(loss.translator, nn.Conv2d) == [(6, 6), (6, 5), (5, 5)]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in loss.translator.modules()) == 3
    assert not any(isinstance(m, nn.BatchNorm2d) for m in loss.paraphraser.modules())
    assert {m.negative_slope for m in loss.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}
    assert loss.paraphraser(noise(2, 10, 8, 8)).shape == (2, 10, 8, 8)
    assert Paraphraser(1, 1)(noise(2, 1, 8, 8)).shape == (2, 1, 8, 8)


# --- its two stages ---------------------------------------------------------------------------------------


def test_at_first_the_paraphraser_learns_to_reconstruct_and_the_student_learns_nothing() -> None:
    loss = loss_of((6, 8, 8), (10, 8, 8))
    student, teacher = noise(4, 6, 8, 8).requires_grad_(), noise(4, 10, 8, 8, seed=1)
    own = outputs(student)
    terms = loss(own, outputs(teacher), batch_of(torch.arange(4)))
    assert list(terms) == ["ft_paraphraser"]
    with torch.no_grad():
        expected = F.mse_loss(loss.paraphraser(teacher), teacher)
    assert terms["ft_paraphraser"].item() == pytest.approx(expected.item(), rel=1e-6)
    terms["ft_paraphraser"].backward()
    assert student.grad is None
    assert own.logits.grad is None
    assert all(p.grad is not None for p in loss.paraphraser.parameters())
    assert all(p.grad is None for p in loss.translator.parameters())


def test_afterwards_the_paraphraser_is_fixed_and_student_and_translator_learn() -> None:
    loss = loss_of((6, 8, 8), (10, 4, 4), initial_epochs=3)
    loss.on_epoch(3)
    student, teacher = noise(4, 6, 8, 8).requires_grad_(), noise(4, 10, 4, 4, seed=1)
    terms = loss(outputs(student), outputs(teacher), batch_of(torch.arange(4)))
    assert list(terms) == ["ft"]
    expected = ft_loss(loss.translator(student), loss.paraphraser.encoder(teacher))
    assert terms["ft"].item() == pytest.approx(expected.item(), rel=1e-6)
    terms["ft"].backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.paraphraser.parameters())
    assert all(p.grad is not None for p in loss.translator.parameters())


def test_training_in_two_stages_lowers_both_terms() -> None:
    torch.manual_seed(0)
    loss = loss_of((3, 4, 4), (4, 4, 4), initial_epochs=1)
    student, teacher = nn.Parameter(noise(8, 3, 4, 4)), noise(8, 4, 4, 4, seed=1).relu()
    optimizer = torch.optim.Adam([student, *loss.parameters()], lr=0.03)
    for epoch in range(2):
        loss.on_epoch(epoch)
        before = student.detach().clone(), [p.detach().clone() for p in loss.paraphraser.parameters()]
        values = []
        for _ in range(25):
            [value] = loss(outputs(student), outputs(teacher), batch_of(torch.arange(8))).values()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        assert values[-1] < 0.7 * values[0]
        assert torch.equal(before[0], student) == (epoch == 0)
        fixed = all(torch.equal(old, new) for old, new in zip(before[1], loss.paraphraser.parameters(), strict=True))
        assert fixed == (epoch == 1)


def test_in_an_objective_the_paraphraser_learns_alone_and_with_weight_1() -> None:
    sections, problems = resolve([{"name": "ce"}, {"name": "ft", "initial_epochs": 1}])
    assert problems == []
    objective = create_objective(sections, 3)
    objective.attach(probe_of("small", (6, 8, 8)), probe_of("large", (10, 8, 8)))
    loss = dict(objective.parts())["ft"]
    student, teacher, batch = outputs(noise(4, 6, 8, 8)), outputs(noise(4, 10, 8, 8)), batch_of(torch.arange(4))
    objective.on_epoch(0)
    alone = objective(student, teacher, batch)
    assert {name: term.item() for name, term in alone.items()} == {
        name: term.item() for name, term in loss(student, teacher, batch).items()
    }
    assert list(alone) == ["ft_paraphraser"]
    objective.on_epoch(1)
    terms = objective(student, teacher, batch)
    assert list(terms) == ["ce", "ft"]
    assert terms["ft"].item() == pytest.approx(200 * loss(student, teacher, batch)["ft"].item(), rel=1e-6)


# --- options ----------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_reference_implementation() -> None:
    resolved, problems = LOSSES.resolve({"name": "ft"})
    assert problems == []
    assert resolved["initial_epochs"] == 30
    assert FTLoss.usual_weight == 200
    assert not FTLoss.trains_classifier
    assert FTLoss().describe() == (
        "mean absolute difference of the factors' energies (mean of f^2 over the channels, of length 1) on the last"
        " map, mean over the batch and the map (in the first 30 epochs, alone and x 1: the paraphraser's MSE)"
    )


def test_a_stage_of_no_epochs_is_refused() -> None:
    assert LOSSES.resolve({"name": "ft", "initial_epochs": 0})[1] == [("initial_epochs", "0 is below 1")]

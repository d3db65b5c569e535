"""Oracles: values of the reference implementation, the formula as a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import check_golden, emb_s, emb_t
from stand_ins import any_batch, created, maps_of, outputs_of, probe_of
from torch import nn

from model.losses.cc import cc_loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_loss_is_the_reference_implementations(dtype: torch.dtype) -> None:
    student = emb_s(12).detach().to(dtype).requires_grad_()
    check_golden("CC", cc_loss(student, emb_t(12).to(dtype)), student)


def test_the_loss_is_the_formula() -> None:
    student, teacher = maps_of(5), maps_of(5, seed=1)
    delta = abs(student - teacher).tolist()
    products = [delta[i][d] * delta[i + 1][d] for i in range(5) for d in range(5)]
    assert cc_loss(student, teacher).item() == pytest.approx(sum(products) / 5, rel=1e-12)


def test_its_value_depends_on_the_order_of_the_batch_and_on_the_scale() -> None:
    student, teacher = emb_s(12), emb_t(12)
    expected = cc_loss(student, teacher).item()
    order = torch.tensor([3, 1, 4, 0, 5, 7, 2, 6])
    assert cc_loss(student[order], teacher[order]).item() != pytest.approx(expected, rel=0.01)
    assert cc_loss(3 * student, 3 * teacher).item() == pytest.approx(9 * expected, rel=1e-12)


def test_a_batch_repeated_twice_has_another_loss_of_known_size() -> None:
    once, twice = (cc_loss(emb_s(12).repeat(n, 1), emb_t(12).repeat(n, 1)).item() for n in (1, 2))
    assert twice / once == pytest.approx(1.01, abs=0.005)


def test_at_the_teacher_value_and_gradient_are_0() -> None:
    student = emb_t(12).requires_grad_()
    loss = cc_loss(student, emb_t(12))
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_a_single_sample_has_no_neighbour() -> None:
    student = torch.randn(1, 4, requires_grad=True)
    loss = cc_loss(student, torch.randn(1, 4))
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_no_embedding_is_spread_over_others() -> None:
    with pytest.raises(ValueError, match=r"student embedding \(8, 12\), teacher embedding \(8, 1\)"):
        cc_loss(emb_s(12), emb_t(1))


def attached(student_width: int, teacher_width: int, **options: Any) -> Any:
    loss = created("cc", **options)
    loss.attach(probe_of("small", width=student_width), probe_of("large", width=teacher_width))
    return loss


def test_both_embeddings_pass_a_linear_map_that_is_trained() -> None:
    loss = attached(5, 9, width=3).double()
    shapes = {name: tuple(parameter.shape) for name, parameter in loss.named_parameters()}
    assert shapes == {
        "student_map.weight": (3, 5),
        "student_map.bias": (3,),
        "teacher_map.weight": (3, 9),
        "teacher_map.bias": (3,),
    }
    student, teacher = maps_of(5), maps_of(9, seed=1).detach()
    own, other = (
        vectors @ linear.weight.T + linear.bias
        for vectors, linear in ((student, loss.student_map), (teacher, loss.teacher_map))
    )
    terms = loss(outputs_of(embedding=student), outputs_of(embedding=teacher), any_batch(6))
    assert list(terms) == ["cc"]
    assert terms["cc"].item() == pytest.approx(cc_loss(own, other).item(), rel=1e-12)
    terms["cc"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())


def test_the_defaults_are_those_of_the_reference_implementation() -> None:
    loss = attached(5, 9)
    assert isinstance(loss.student_map, nn.Linear)
    assert loss.student_map.out_features == loss.teacher_map.out_features == 128
    assert loss.usual_weight == 0.02
    assert "linear maps to 128, both trained" in loss.describe()

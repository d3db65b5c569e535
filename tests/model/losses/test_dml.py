"""Deep mutual learning against the paper's formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from model.losses.dml import DMLLoss, mimicry
from model.outputs import Batch, Outputs


def logits_of(number: int, samples: int = 5, classes: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(samples, classes, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(number)
    ]


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def batch_of(samples: int = 5) -> Batch:
    positions = torch.arange(samples)
    return Batch(torch.zeros(samples, 3, 2, 2), positions % 4, positions, positions)


@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_each_net_is_taught_by_the_mean_of_the_others(number: int, temperature: float) -> None:
    logits = logits_of(number)
    p = [softmax(z.detach().numpy() / temperature) for z in logits]
    for k, found in enumerate(mimicry(logits, temperature)):
        divergences = [(p[j] * np.log(p[j] / p[k])).sum(1).mean() for j in range(number) if j != k]
        assert found.item() == pytest.approx(temperature**2 * np.mean(divergences), rel=1e-12)


def test_a_gradient_reaches_only_the_net_that_is_taught() -> None:
    first, second = logits_of(2)
    own, other = mimicry([first, second])
    own.backward(retain_graph=True)
    assert second.grad is None
    expected = (first.softmax(1) - second.softmax(1)) / len(first)
    assert_close(first.grad, expected.detach())
    first.grad = None
    other.backward()
    assert first.grad is None


def test_peers_learn_from_labels_and_from_the_others() -> None:
    student, *peers = logits_of(3)
    batch = batch_of()
    terms = DMLLoss(peers=[{}, {}])(Outputs(student, peer_logits=tuple(peers)), None, batch)
    own, *others = (lesson.item() for lesson in mimicry([student, *peers]))
    rows = np.arange(5)
    ce = sum(-np.log(softmax(z.detach().numpy())[rows, batch.labels.numpy()]).mean() for z in peers)
    assert terms["dml"].item() == pytest.approx(own, rel=1e-12)
    assert terms["peers"].item() == pytest.approx(ce + sum(others), rel=1e-12)


def test_of_unlabelled_samples_the_labels_part_is_left_out() -> None:
    student, peer = logits_of(2)
    whole = batch_of()
    partly = Batch(whole.images, whole.labels[:2], whole.indices, whole.views)
    terms = DMLLoss()(Outputs(student, peer_logits=(peer,)), None, partly)
    ce = torch.nn.functional.cross_entropy(peer[:2], partly.labels)
    assert_close(terms["peers"], ce + mimicry([student, peer])[1])


def test_without_peers_named_there_is_one_of_the_students_kind() -> None:
    assert DMLLoss().peer_sections == [{}]
    assert DMLLoss(peers=[{"name": "cnn"}]).peer_sections == [{"name": "cnn"}]


def test_peers_are_a_part_of_the_loss_and_not_of_the_student() -> None:
    loss = DMLLoss()
    loss.peers.append(nn.Linear(2, 2))
    assert set(loss.state_dict()) == {"peers.0.weight", "peers.0.bias"}

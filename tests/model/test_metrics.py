"""Oracles: the papers' definitions as plain numpy loops, and nets small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.metrics import (
    agreement,
    calibrated_temperature,
    confusion_matrix,
    count_macs,
    count_parameters,
    expected_calibration_error,
    weight_bytes,
)


def logits_of(size: int, classes: int = 7, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(size, classes, generator=torch.Generator().manual_seed(seed))


def labels_of(size: int, classes: int = 7) -> Tensor:
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(1))


def softmax(logits: Tensor) -> np.ndarray:
    values = logits.double().numpy()
    exp = np.exp(values - values.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


# --- calibration ----------------------------------------------------------------------------------------------


def paper_ece(logits: Tensor, labels: Tensor, bins: int) -> float:
    """Returns sum_m |B_m| / n * |acc(B_m) - conf(B_m)| with B_m = ((m - 1) / M, m / M]: Guo et al., equation 5."""
    probabilities = softmax(logits)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels.numpy()
    error = 0.0
    for m in range(1, bins + 1):
        inside = (confidence > (m - 1) / bins) & (confidence <= m / bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            error += inside.sum() / len(labels) * gap
    return error


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_calibration_error_is_the_papers(scale: float, bins: int) -> None:
    logits, labels = logits_of(500, scale=scale), labels_of(500)
    labels[::2] = logits[::2].argmax(1)  # right more often than by chance
    found = expected_calibration_error(logits, labels, bins)
    assert found == pytest.approx(paper_ece(logits, labels, bins), rel=1e-9, abs=1e-12)
    assert bins != 15 or found == expected_calibration_error(logits, labels)


def test_the_calibration_error_of_known_cases() -> None:
    certain = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    assert expected_calibration_error(certain, torch.tensor([0, 1])) == 0
    assert expected_calibration_error(certain, torch.tensor([1, 0])) == 1
    # Confidence 0.5 everywhere, right half of the time; ties go to the first class.
    assert expected_calibration_error(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])) == 0
    assert expected_calibration_error(torch.zeros(4, 2), torch.tensor([0, 0, 0, 0])) == pytest.approx(0.5)
    # A confidence on a border belongs to the bin below it: of 0.5, wrong, and 0.7, right, each has a bin of its own.
    on_a_border = torch.tensor([[0.5, 0.5], [0.7, 0.3]], dtype=torch.float64).log()
    assert expected_calibration_error(on_a_border, torch.tensor([1, 0]), 2) == pytest.approx((0.5 + 0.3) / 2)


# --- confusion and agreement ----------------------------------------------------------------------------------


def test_rows_of_the_confusion_matrix_are_true_classes() -> None:
    predicted, labels = torch.tensor([0, 2, 2, 1, 2]), torch.tensor([0, 1, 1, 1, 0])
    expected = torch.tensor([[1, 0, 1, 0], [0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(confusion_matrix(predicted, labels, 4), expected)


def test_the_confusion_matrix_counts_every_sample() -> None:
    predicted, labels = logits_of(300).argmax(1), labels_of(300)
    matrix = confusion_matrix(predicted, labels, 7)
    expected = np.zeros((7, 7), dtype=int)
    for true, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
        expected[true, guess] += 1
    assert matrix.tolist() == expected.tolist()


def test_agreement_is_the_share_of_equal_choices_and_the_divergence_from_the_teacher() -> None:
    student, teacher = logits_of(200), logits_of(200, seed=3)
    p_s, p_t = softmax(student), softmax(teacher)
    found = agreement(student, teacher)
    assert found == pytest.approx(
        {
            "teacher_agreement": (p_s.argmax(axis=1) == p_t.argmax(axis=1)).mean(),
            "teacher_kl": (p_t * np.log(p_t / p_s)).sum(axis=1).mean(),
        },
        rel=1e-9,
    )
    assert agreement(teacher, teacher) == {"teacher_agreement": 1.0, "teacher_kl": 0.0}


# --- sizes ----------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """For images of 3x8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)  # 4 x 4x4 outputs, 27 products each: 1728
        self.bn = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 2, groups=2, bias=False)  # 6 x 3x3 outputs, 2 * 4 products each: 432
        self.linear = nn.Linear(6, 5)  # 30
        self.register_buffer("steps", torch.zeros(7, dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        maps = self.grouped(self.bn(self.conv(images)).relu())
        return self.linear(maps.mean((2, 3)))


def test_multiply_accumulate_operations_of_one_image() -> None:
    assert count_macs(Counted(), (3, 8, 8)) == 1728 + 432 + 30


def test_counting_operations_leaves_the_net_alone() -> None:
    net = Counted().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    count_macs(net, [3, 8, 8])
    assert net.training
    assert {value.device.type for value in net.state_dict().values()} == {"cpu"}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_parameters_are_counted_frozen_or_not_and_buffers_are_not() -> None:
    net = Counted()
    net.conv.requires_grad_(False)
    assert count_parameters(net) == (4 * 27 + 4) + 2 * 4 + 6 * 2 * 4 + (5 * 6 + 5)


def test_the_weights_size_counts_buffers_and_the_bytes_of_each_type() -> None:
    net = Counted()
    buffers = 2 * 4 * 4 + 8 + 7 * 8  # running mean and variance, num_batches_tracked, steps
    assert weight_bytes(net) == 4 * count_parameters(net) + buffers
    assert weight_bytes(net.half()) == 2 * count_parameters(net) + 2 * 4 * 2 + 8 + 7 * 8


def test_the_calibrated_temperature_is_the_one_that_the_labels_were_drawn_at() -> None:
    """Labels drawn from softmax(z / T) make T the best temperature, up to the error of the sample."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40_000, 10, generator=generator)
    for temperature in (0.5, 1.0, 2.5):
        labels = torch.multinomial(torch.softmax(logits / temperature, 1), 1, generator=generator).flatten()
        assert calibrated_temperature(logits, labels) == pytest.approx(temperature, rel=0.03)


def test_at_the_calibrated_temperature_the_slope_of_the_likelihood_is_zero() -> None:
    """d NLL / d(1/T) = mean over samples of (expected logit under softmax(z/T) - logit of the label)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 7, generator=generator).double()
    labels = torch.randint(7, (500,), generator=generator)
    labels[:300] = logits[:300].argmax(1)
    temperature = calibrated_temperature(logits, labels)
    expected = (torch.softmax(logits / temperature, 1) * logits).sum(1)
    assert (expected - logits[torch.arange(500), labels]).mean().item() == pytest.approx(0, abs=1e-4)


def test_a_net_that_misses_no_label_is_calibrated_where_nothing_is_left_to_gain() -> None:
    logits = 5 * torch.eye(4).double()
    temperature = calibrated_temperature(logits, torch.arange(4))
    assert 0.01 <= temperature < 0.15
    assert F.cross_entropy(logits / temperature, torch.arange(4)).item() < 1e-12

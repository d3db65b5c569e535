"""Oracles: what the parts alone make of the same maps, closed counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from model.metrics import count_macs, count_parameters
from model.nets import NETS
from model.outputs import features_of
from model.projected import ProjectedNet, equipped, projector
from model.taps import set_taps

CLASSES = 5


def record(student_channels: int, size: int, **changes: Any) -> dict[str, Any]:
    options = {"teacher_channels": 8, "factor": 2, "num_classes": CLASSES, "bias": True}
    return {"projected": {"student_channels": student_channels, "size": [size, size], **options, **changes}}


def tapped() -> nn.Module:
    """Returns a net that gives no maps itself, with a classifier in a part of it."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
    return nn.Sequential(
        body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(nn.Dropout(0.5), nn.Linear(6, CLASSES))
    )


def test_the_projector_keeps_the_size_and_has_three_convolutions_without_bias() -> None:
    net = projector(6, 8, 2)
    kernels = [(m.in_channels, m.out_channels, m.kernel_size) for m in net if isinstance(m, nn.Conv2d)]
    assert kernels == [(6, 4, (1, 1)), (4, 4, (3, 3)), (4, 8, (1, 1))]
    assert all(m.bias is None for m in net if isinstance(m, nn.Conv2d))
    assert net(torch.randn(2, 6, 5, 7)).shape == (2, 8, 5, 7)
    assert projector(6, 2, 100)(torch.randn(2, 6, 5, 7)).shape == (2, 2, 5, 7)


def test_a_net_with_taps_has_them_after_a_restart_too() -> None:
    net = tapped()
    set_taps(net, ["0.1", "0.3"])
    images = torch.randn(4, 3, 16, 16)
    maps = features_of(net.eval(), images).features
    taps = {"taps": ["0.1", "0.3"]}
    found = equipped(net, record(6, 6, **taps)).eval()
    again = equipped(tapped(), record(6, 6, **taps)).eval()
    again.load_state_dict(found.state_dict())
    for each in (found, again):
        outputs = features_of(each, images)
        assert [tuple(m.shape[1:]) for m in outputs.features] == [(4, 8, 8), (6, 6, 6), (8, 6, 6)]
        assert outputs.preacts == ()
        assert_close(outputs.features[:2], maps)
    assert torch.equal(found(images), again(images))


def test_the_students_classifier_is_gone_wherever_it_was() -> None:
    net = tapped()
    set_taps(net, ["0.3"])
    found = equipped(net, record(6, 6))
    names = [name for name, _ in found.named_parameters() if name.startswith("student.")]
    assert names == ["student.0.0.weight", "student.0.0.bias", "student.0.2.weight", "student.0.2.bias"]


def test_larger_maps_are_pooled_before_they_are_projected_and_smaller_ones_stay() -> None:
    images = torch.randn(2, 3, 16, 16)
    for size, expected in ((4, 4), (3, 3), (2, 2), (8, 4)):
        net = equipped(NETS.create({"name": "tiny", "width": 3}, CLASSES), record(6, size)).eval()
        assert isinstance(net, ProjectedNet)
        outputs = features_of(net, images)
        maps = outputs.features[-2]  # 4x4
        assert maps.shape[2:] == (4, 4)
        pooled = nn.functional.adaptive_avg_pool2d(maps, expected)
        assert_close(outputs.features[-1], net.projector(pooled).relu())


@pytest.mark.parametrize("bias", [True, False])
def test_the_classifier_is_frozen_and_counted(bias: bool) -> None:
    net = equipped(NETS.create({"name": "tiny", "width": 3}, CLASSES), record(6, 4, bias=bias))
    plain = count_parameters(NETS.create({"name": "tiny", "width": 3}, CLASSES)) - 7 * CLASSES
    convolutions = 6 * 4 + 9 * 4 * 4 + 4 * 8
    assert count_parameters(net) == plain + convolutions + 2 * (4 + 4 + 8) + 8 * CLASSES + bias * CLASSES
    learning = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert learning == {"classifier.weight", *(["classifier.bias"] if bias else [])}
    student = count_macs(NETS.create({"name": "tiny", "width": 3}, CLASSES), (3, 16, 16)) - 6 * CLASSES
    assert count_macs(net, (3, 16, 16)) == student + 16 * convolutions + 8 * CLASSES


def test_gradients_reach_student_and_projector() -> None:
    net = equipped(NETS.create({"name": "tiny", "width": 3}, CLASSES), record(6, 4)).train()
    loss: Tensor = net(torch.randn(4, 3, 16, 16)).square().sum()
    loss.backward()
    assert {name for name, p in net.named_parameters() if p.grad is None} == {"classifier.weight", "classifier.bias"}


def test_it_takes_the_images_that_the_student_takes() -> None:
    assert equipped(NETS.create({"name": "cnn", "num_channels": 4}, CLASSES), record(16, 4)).input_size == 32
    assert equipped(NETS.create({"name": "tiny"}, CLASSES), record(32, 4)).input_size is None

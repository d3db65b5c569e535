from __future__ import annotations

import pytest
import torch
from reference_nets import copy_in_order, randomise
from torch import nn
from torch.testing import assert_close

from model.errors import InputError
from model.metrics import count_macs, count_parameters
from model.nets import NETS


# Heejoon Koo's Knowledge-Distillation, by instantiation.
@pytest.mark.parametrize(("num_classes", "parameters"), [(10, 114_186), (100, 298_596)])
def test_number_of_parameters_is_the_published_one(num_classes: int, parameters: int) -> None:
    assert count_parameters(NETS.create({"name": "studentmodel"}, num_classes)) == parameters


def test_multiply_accumulates_are_the_published_ones() -> None:
    assert round(count_macs(NETS.create({"name": "studentmodel"}, 10), (3, 32, 32)) / 1e6, 2) == 10.34


def test_batch_norm_comes_last_and_stages_are_taken_around_the_relu() -> None:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(after)]
    reference = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))
    net = NETS.create({"name": "studentmodel"}, 10).double().eval()
    # The net holds its convolutions first, then its batch norms.
    randomise(reference)
    for source, target in zip([*reference[:12:4], *reference[3:12:4]], [*net.convs, *net.norms], strict=True):
        copy_in_order(source, target)
    copy_in_order(reference[-1], net.classifier)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = net.forward_with_features(images)
        assert_close(outputs.logits, reference(images))
        assert_close(list(outputs.preacts), [reference[:end](images) for end in (1, 5, 9)])
        assert_close(list(outputs.features), [reference[:end](images) for end in (2, 6, 10)])
        assert_close(outputs.embedding, reference[:13](images))


def test_images_of_another_size_are_refused_with_both_sizes() -> None:
    net = NETS.create({"name": "studentmodel"}, 10)
    with pytest.raises(InputError, match="StudentModel takes images of 32x32 pixels, got 28x28"):
        net(torch.zeros(2, 3, 28, 28))

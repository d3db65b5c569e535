from __future__ import annotations

import pytest
import torch
from reference_nets import copy_in_order, randomise
from torch import nn
from torch.testing import assert_close

from model.metrics import count_macs, count_parameters
from model.nets import NETS


# JoonyoungYi/KD-pytorch: 4 blocks are its code's, by instantiation; 3 its README's, by hand: 1,792 + 2 * 36,928 for the
# convolutions, 3 * 128 for the batch norms, (64 * 4 * 4 + 1) * 10 for the classifier.
@pytest.mark.parametrize(("num_blocks", "parameters"), [(4, 115_658), (3, 86_282)])
def test_number_of_parameters_is_the_published_one(num_blocks: int, parameters: int) -> None:
    assert count_parameters(NETS.create({"name": "studentnet", "num_blocks": num_blocks}, 10)) == parameters


def test_multiply_accumulates_are_the_published_ones() -> None:
    assert round(count_macs(NETS.create({"name": "studentnet"}, 10), (3, 32, 32)) / 1e6, 2) == 14.16


@pytest.mark.parametrize("num_blocks", [3, 4])
def test_logits_are_those_of_a_chain_of_layers(num_blocks: int) -> None:
    layers: list[nn.Module] = []
    for channels in (3, 64, 64, 64)[:num_blocks]:
        layers += [nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    size = 32 // 2**num_blocks
    reference = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * size * size, 10))
    net = NETS.create({"name": "studentnet", "num_blocks": num_blocks}, 10).double().eval()
    copy_in_order(randomise(reference), net)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = net.forward_with_features(images)
        assert_close(outputs.logits, reference(images))
        stages = [reference[: 4 * block + 3](images) for block in range(num_blocks)]
    assert_close(list(outputs.features), stages)


@pytest.mark.parametrize(("num_blocks", "problem"), [(2, "2 is below 3"), (5, "5 is above 4")])
def test_other_numbers_of_blocks_are_refused(num_blocks: int, problem: str) -> None:
    _, problems = NETS.resolve({"name": "studentnet", "num_blocks": num_blocks})
    assert problems == [("num_blocks", problem)]

from __future__ import annotations

import torch
from reference_nets import copy_in_order, randomise
from torch import nn
from torch.testing import assert_close
from torchvision.models.efficientnet import EfficientNet, MBConvConfig

from model.metrics import count_macs, count_parameters
from model.nets import NETS

# The paper's table 1: expansion, kernel, stride, channels before and after, blocks.
TABLE = [
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
]


def of_torchvisions_parts() -> EfficientNet:
    rows = [MBConvConfig(*row[:5], row[5], 1.0, 1.0) for row in TABLE]
    net = EfficientNet(rows, dropout=0.2, num_classes=10, last_channel=320)
    net.features[0][0].stride = (1, 1)
    net.features[-1] = nn.Identity()
    return net


def test_size_is_that_of_kuanglius() -> None:
    # kuangliu/pytorch-cifar, efficientnet.py before July 2020, by instantiation.
    with torch.device("meta"):
        net = NETS.create({"name": "efficientnet_b0_cifar"}, 10)
    assert count_parameters(net) == 3_599_686
    assert round(count_macs(net, (3, 32, 32)) / 1e6, 1) == 30.3


def test_unused_parameters_are_the_first_blocks_expansion() -> None:
    net = NETS.create({"name": "efficientnet_b0_cifar"}, 10)
    unused = [parameter for name, parameter in net.named_parameters() if name in net.unused_parameters]
    assert [tuple(parameter.shape) for parameter in unused] == [(32, 32, 1, 1), (32,), (32,)]
    assert sum(parameter.numel() for parameter in unused) == 1088


def test_maps_and_logits_are_those_of_torchvisions_parts() -> None:
    reference = randomise(of_torchvisions_parts())
    net = NETS.create({"name": "efficientnet_b0_cifar"}, 10).double().eval()
    inert = [key for key in net.state_dict() if key.startswith("features.1.0.expand.")]
    copy_in_order(reference, net, skip=inert)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = net.forward_with_features(images)
        assert_close(outputs.logits, reference(images))
        stages = [reference.features[:end](images) for end in range(2, 9)]
    assert_close(list(outputs.features), stages)


def test_there_is_a_stage_for_each_row_of_the_table() -> None:
    with torch.device("meta"):
        outputs = NETS.create({"name": "efficientnet_b0_cifar"}, 10).forward_with_features(torch.empty(2, 3, 32, 32))
    assert [tuple(feature.shape[1:]) for feature in outputs.features] == [
        (16, 32, 32),
        (24, 16, 16),
        (40, 8, 8),
        (80, 4, 4),
        (112, 4, 4),
        (192, 2, 2),
        (320, 2, 2),
    ]
    assert outputs.embedding.shape == (2, 320)

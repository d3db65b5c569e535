from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from model.errors import InputError
from model.nets import NETS


def test_features_are_the_three_pooled_maps() -> None:
    with torch.device("meta"):
        outputs = NETS.create({"name": "cnn", "num_channels": 5}, 10).forward_with_features(torch.empty(2, 3, 32, 32))
    assert [tuple(f.shape) for f in outputs.features] == [(2, 5, 16, 16), (2, 10, 8, 8), (2, 20, 4, 4)]


def test_batch_norm_sees_the_maps_before_pooling() -> None:
    # Eval logits cannot tell (upstream_nets.json has positive scales, which commute with the maximum); training can.
    net = NETS.create({"name": "cnn", "num_channels": 5}, 10)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.train()(images)
        assert_close(net.bn1.running_mean, net.bn1.momentum * net.conv1(images).mean((0, 2, 3)))


def test_embedding_is_what_dropout_leaves() -> None:
    net = NETS.create({"name": "cnn", "num_channels": 5, "dropout_rate": 0.75}, 10)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        embedding = net.train().forward_with_features(images).embedding
    # Half is zero by the ReLU after batch norm, and of the rest three quarters by dropout.
    assert (embedding == 0).float().mean() > 0.75


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 3, 32, 64), (2, 3, 224, 224)])
def test_images_of_another_size_are_refused_with_both_sizes(shape: tuple[int, ...]) -> None:
    net = NETS.create({"name": "cnn"}, 10)
    assert net.input_size == 32
    with pytest.raises(InputError, match=f"32x32 pixels, got {shape[2]}x{shape[3]}"):
        net(torch.zeros(shape))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dropout_rate", 1.0, "1.0 is not below 1"),
        ("dropout_rate", -0.1, "-0.1 is below 0"),
        ("num_channels", 0, "0 is below 1"),
        ("num_channels", 32.0, "expected a whole number"),
        ("num_chanels", 32, "did you mean 'num_channels'?"),
    ],
)
def test_an_option_that_makes_no_net_is_refused(option: str, value: float, message: str) -> None:
    _, [(key, problem)] = NETS.resolve({"name": "cnn", option: value})
    assert key == option
    assert message in problem

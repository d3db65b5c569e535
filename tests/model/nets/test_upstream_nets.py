"""The six nets that the ancestor names against its own: keys, shapes, number of parameters, and logits of three.

`upstream_nets.json` and the closed forms come from the ancestor's own code, run independently.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from model.nets import NETS

VECTORS = json.loads(Path(__file__).with_name("upstream_nets.json").read_text())


def closed_form_weight(key: str, shape: tuple[int, ...], position: int) -> Tensor:
    n = np.arange(math.prod(shape), dtype=np.float64)
    h = np.sin(12.9898 * n + 78.233 * (position + 1)) * 43758.5453
    u = h - np.floor(h)
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("running_var"):
        values = 0.75 + 0.5 * u
    elif key.endswith("running_mean"):
        values = 0.2 * (u - 0.5)
    elif len(shape) == 1 and key.endswith("weight"):
        values = 0.8 + 0.4 * u
    elif key.endswith("bias"):
        values = 0.2 * (u - 0.5)
    else:
        values = (u - 0.5) * math.sqrt(12) * math.sqrt(2 / math.prod(shape[1:]))
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def closed_form_images() -> Tensor:
    b, c, y, x = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in (4, 3, 32, 32)), indexing="ij")
    values = 1.5 * np.sin(0.35 * x * (c + 1) + 0.21 * y + 0.9 * b) + 0.5 * np.cos(0.13 * x * y + b)
    return torch.from_numpy(values.astype(np.float32))


def create_without_memory(name: str) -> nn.Module:
    with torch.device("meta"):
        net: nn.Module = NETS.create({"name": name}, 10)
    return net


def test_the_vectors_are_those_of_the_six_nets_that_the_ancestor_names() -> None:
    assert list(VECTORS) == ["cnn", "resnet18", "wrn", "densenet", "resnext29", "preresnet110"]


@pytest.mark.parametrize("name", VECTORS)
def test_state_dict_has_the_ancestors_keys_and_shapes_in_order(name: str) -> None:
    state = create_without_memory(name).state_dict()
    assert [[key, list(tensor.shape)] for key, tensor in state.items()] == VECTORS[name]["state_dict"]


@pytest.mark.parametrize("name", VECTORS)
def test_there_are_as_many_parameters_as_in_the_ancestors(name: str) -> None:
    net = create_without_memory(name)
    assert sum(parameter.numel() for parameter in net.parameters()) == VECTORS[name]["parameters"]


@pytest.mark.parametrize("name", ["cnn", "resnet18", "densenet"])
def test_logits_are_the_ancestors(name: str) -> None:
    net = NETS.create({"name": name}, 10)
    net.load_state_dict(
        {
            key: closed_form_weight(key, tuple(tensor.shape), position)
            for position, (key, tensor) in enumerate(net.state_dict().items())
        }
    )
    expected = torch.tensor(VECTORS[name]["logits"])
    with torch.no_grad():
        logits = net.eval()(closed_form_images())
    assert_close(logits, expected, rtol=0, atol=1e-3 * expected.abs().max().item())

"""`cnn` and `resnet18` against the ancestor's: keys, shapes and logits for weights and images in closed form.

`upstream_nets.json` and the closed forms are those of shared/vectors/README.md.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

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
    images = 1.5 * np.sin(0.35 * x * (c + 1) + 0.21 * y + 0.9 * b) + 0.5 * np.cos(0.13 * x * y + b)
    return torch.from_numpy(images.astype(np.float32))


def keys_and_shapes(net: nn.Module) -> list[list[Any]]:
    return [[key, list(tensor.shape)] for key, tensor in net.state_dict().items()]


@pytest.mark.parametrize("name", VECTORS)
def test_state_dict_has_the_ancestors_keys_and_shapes_in_order(name: str) -> None:
    with torch.device("meta"):
        net = NETS.create({"name": name}, 10)
    assert keys_and_shapes(net) == VECTORS[name]["state_dict"]


@pytest.mark.parametrize("name", VECTORS)
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
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * expected.abs().max().item())

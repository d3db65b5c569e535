from __future__ import annotations

from typing import Any

import pytest
import torch
from reference_nets import randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from model.nets import NETS


def create(**options: Any) -> nn.Module:
    net: nn.Module = NETS.create({"name": "wrn", **options}, 10)
    return net


def reference(weights: dict[str, Tensor], num_blocks: int, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns logits and the maps before the ReLU that ends each stage: B(3, 3) of the paper, key by key."""

    def norm(key: str, maps: Tensor) -> Tensor:
        statistics = (weights[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(maps, *statistics)

    maps, sums = F.conv2d(images, weights["conv1.weight"], padding=1), []
    for stage in (1, 2, 3):
        for block in range(num_blocks):
            key, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            activated = norm(f"{key}.bn1", maps).relu()
            branch = F.conv2d(activated, weights[f"{key}.conv1.weight"], None, stride, 1)
            branch = F.conv2d(norm(f"{key}.bn2", branch).relu(), weights[f"{key}.conv2.weight"], padding=1)
            if f"{key}.convShortcut.weight" in weights:
                maps = F.conv2d(activated, weights[f"{key}.convShortcut.weight"], stride=stride)
            maps = maps + branch
        sums.append(maps)
    preacts = [norm("block2.layer.0.bn1", sums[0]), norm("block3.layer.0.bn1", sums[1]), norm("bn1", sums[2])]
    pooled = F.avg_pool2d(preacts[2].relu(), 8).flatten(1)
    return F.linear(pooled, weights["fc.weight"], weights["fc.bias"]), preacts


@pytest.mark.parametrize("depth", [10, 16, 22, 28, 34, 40])
def test_depth_is_the_number_of_convolutions(depth: int) -> None:
    with torch.device("meta"):
        net = create(depth=depth, widen_factor=2)
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == depth


# With a factor of 1 the first stage is as wide as the stem, and its shortcuts are all clean.
@pytest.mark.parametrize("widen_factor", [1, 2])
def test_logits_and_maps_are_those_of_the_formula(widen_factor: int) -> None:
    net: Any = randomise(create(depth=16, widen_factor=widen_factor))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = net.forward_with_features(images)
    logits, preacts = reference(net.state_dict(), 2, images)
    assert_close(outputs.logits, logits)
    assert_close(outputs.preacts, tuple(preacts))


def test_stages_are_taken_at_their_own_resolution() -> None:
    with torch.device("meta"):
        outputs = create().forward_with_features(torch.empty(2, 3, 32, 32))
    assert [tuple(f.shape) for f in outputs.features] == [(2, 160, 32, 32), (2, 320, 16, 16), (2, 640, 8, 8)]


def test_a_pass_uses_each_batch_norm_once() -> None:
    net = create(depth=16, widen_factor=1).train()
    net(torch.randn(2, 3, 32, 32))
    assert {norm.num_batches_tracked.item() for norm in net.modules() if isinstance(norm, nn.BatchNorm2d)} == {1}


def test_dropout_acts_on_the_inputs_of_each_second_convolution_and_on_no_others() -> None:
    torch.manual_seed(0)
    net = create(depth=16, widen_factor=2, dropout_rate=0.9).train()
    zeros = {}

    def record(path: str) -> Any:
        return lambda _, inputs: zeros.__setitem__(path, (inputs[0] == 0).float().mean().item())

    for path, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(record(path))
    net(torch.randn(2, 3, 32, 32))
    assert len(zeros) == 17
    # Half of what follows a ReLU is zero anyway; of the rest, dropout leaves a tenth.
    for path, share in zeros.items():
        assert (share > 0.9) == path.endswith("conv2"), f"{path}: {share}"


def test_the_default_is_the_ancestors_wrn_28_10_with_dropout_of_0_3() -> None:
    section, problems = NETS.resolve({"name": "wrn"})
    assert problems == []
    assert {key: section[key] for key in ("depth", "widen_factor", "dropout_rate")} == {
        "depth": 28,
        "widen_factor": 10,
        "dropout_rate": 0.3,
    }


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("depth", 29, "29 is not one of 10, 16, 22, 28, 34 or 40"),
        ("widen_factor", 0, "0 is below 1"),
        ("dropout_rate", 1.0, "1.0 is not below 1"),
    ],
)
def test_an_option_that_makes_no_net_is_refused(option: str, value: float, message: str) -> None:
    _, [(key, problem)] = NETS.resolve({"name": "wrn", option: value})
    assert key == option
    assert message in problem


def test_any_size_of_image_will_do() -> None:
    with torch.device("meta"):
        net = create(depth=10, widen_factor=1)
        assert net.input_size is None
        assert net(torch.empty(2, 3, 33, 47)).shape == (2, 10)


@pytest.mark.parametrize(("depth", "widen_factor"), [(16, 2), (40, 1), (40, 2)])
def test_a_short_name_says_depth_and_factor_and_there_is_no_dropout(depth: int, widen_factor: int) -> None:
    with torch.device("meta"):
        net = NETS.create({"name": f"wrn_{depth}_{widen_factor}"}, 10)
        long = create(depth=depth, widen_factor=widen_factor)
    shapes, expected = ({key: value.shape for key, value in n.state_dict().items()} for n in (net, long))
    assert shapes == expected
    assert {module.p for module in net.modules() if isinstance(module, nn.Dropout)} == {0.0}

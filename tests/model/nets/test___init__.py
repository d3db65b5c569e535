"""What a net begins with, and which of it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from model import nets
from model.errors import InputError
from model.nets import NETS

CLASSES = 5


def section_of(name: str = "resnet20", **options: Any) -> dict[str, Any]:
    section, problems = NETS.resolve({"name": name, **options})
    assert problems == []
    return section


def create(name: str = "resnet20", seed: int = 0, classes: int = CLASSES, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return nets.create(section_of(name, **options), classes)


def weights_of(net: nn.Module) -> list[tuple[nn.Module, torch.Tensor]]:
    return [(m, m.weight.detach()) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


# --- init ---


def test_the_default_init_is_the_nets_own() -> None:
    torch.manual_seed(0)
    own = NETS.create({"name": "resnet20"}, CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), create().parameters(), strict=True))


@pytest.mark.parametrize("init", ["he", "xavier", "normal"])
def test_init_draws_weights_of_the_papers_variance_and_zero_biases(init: str) -> None:
    """Var of he is 2 / fan_in, of xavier 2 / (fan_in + fan_out): He 2015 eq. 10, Glorot 2010 eq. 12."""
    checked = 0
    for module, weight in weights_of(create("cnn", init=init, num_channels=64)):
        receptive = weight[0, 0].numel()
        fan_in, fan_out = weight.shape[1] * receptive, weight.shape[0] * receptive
        variance = {"he": 2 / fan_in, "xavier": 2 / (fan_in + fan_out), "normal": 0.02**2}[init]
        if weight.numel() > 10_000:  # the estimate is good to 5 sigma = 5 * sqrt(2 / n)
            assert weight.var().item() == pytest.approx(variance, rel=5 * (2 / weight.numel()) ** 0.5)
            assert abs(weight.mean().item()) < 5 * (variance / weight.numel()) ** 0.5
            checked += 1
        assert module.bias is None or not module.bias.any()
    assert checked >= 3


def test_init_leaves_batch_norms_at_one_and_zero() -> None:
    for module in create(init="he").modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


# --- init_from ---


def test_a_net_adopts_all_weights_and_buffers_of_another() -> None:
    donor, net = create(seed=1), create(seed=2)
    donor.bn1.running_mean.fill_(0.25)
    assert nets.adopt(net, donor.state_dict(), "x")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), donor.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["resnet20", "cnn", "tiny", "torchvision/squeezenet1_1"])
def test_a_classifier_for_another_number_of_classes_stays_new_and_all_else_is_adopted(name: str) -> None:
    donor, net = create(name, 1, classes=9), create(name, 2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert not nets.adopt(net, donor.state_dict(), "x")
    classifier = nets.classifier_of(net)
    for key, value in net.state_dict().items():
        expected = before[key] if key.startswith(f"{classifier}.") else donor.state_dict()[key]
        assert torch.equal(value, expected), key


def test_batch_norms_from_before_2018_load_without_their_counters() -> None:
    donor, net = create(seed=1), create(seed=2)
    old = {key: value for key, value in donor.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert nets.adopt(net, old, "x")
    assert torch.equal(net.layer3[0].conv1.weight, donor.layer3[0].conv1.weight)


@pytest.mark.parametrize(
    ("donor", "part"), [("tiny", "Missing key"), ("cnn", "Missing key"), ("resnet32", "Unexpected key")]
)
def test_weights_of_another_net_are_refused_with_the_file(donor: str, part: str) -> None:
    with pytest.raises(InputError, match=f"student.init_from: some/file: .*{part}.*name a checkpoint of the same net"):
        nets.adopt(create(), create(donor).state_dict(), "some/file")


def test_a_wider_net_is_not_mistaken_for_another_classifier() -> None:
    with pytest.raises(InputError, match=r"size mismatch for conv1\.weight"):
        nets.adopt(create("tiny"), create("tiny", width=8).state_dict(), "x")


# --- freeze ---


def test_frozen_modules_do_not_learn_and_the_others_do() -> None:
    net = create()
    assert nets.freeze(net, section_of(freeze=["conv1", "layer1", "layer2.0"])) == []
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    expected = {n for n, _ in net.named_parameters() if n.startswith(("conv1.", "layer1.", "layer2.0."))}
    assert frozen == expected != set()


def test_freeze_bn_names_every_batch_norm() -> None:
    net = create()
    norms = nets.freeze(net, section_of(freeze_bn=True))
    assert {id(m) for m in norms} == {id(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_module_that_is_not_there_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        InputError, match=r"student\.freeze: net 'resnet20' has no module 'layr1'; did you mean 'layer1'"
    ):
        nets.freeze(create(), section_of(freeze=["layr1"]))


def test_a_net_of_which_nothing_would_learn_is_refused() -> None:
    net = create()
    with pytest.raises(InputError, match="leaves nothing to learn"):
        nets.freeze(net, section_of(freeze=[name for name, _ in net.named_children()]))


def test_the_whole_net_has_no_name_to_be_frozen_by() -> None:
    with pytest.raises(InputError, match="has no module ''"):
        nets.freeze(create(), section_of(freeze=[""]))

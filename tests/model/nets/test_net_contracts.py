"""What holds for every registered net."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from model.nets import NETS
from model.outputs import Outputs
from model.registry import options_of

NUM_CLASSES = 7
MEMBERS = {
    "timm/": ["timm/mobilenetv3_small_050"],
    "torchvision/": ["torchvision/resnet18", "torchvision/mobilenet_v3_small"],
}
# A loss finds the layers of the others by their paths.
OURS = [name for name in NETS if name not in MEMBERS]
NAMES = OURS + [name for members in MEMBERS.values() for name in members]

# The scope makes pytest run all tests of a net in a row, so that one net at a time is in memory.
every_net = pytest.mark.parametrize("name", NAMES, scope="module")
every_net_of_ours = pytest.mark.parametrize("name", OURS, scope="module")


def create(name: str) -> nn.Module:
    net: nn.Module = NETS.create({"name": name}, NUM_CLASSES)
    return net


@functools.lru_cache(maxsize=1)
def net_in_eval(name: str) -> nn.Module:
    """Returns one net for all tests of a name: to initialise the large ones takes longer than to run them."""
    torch.manual_seed(230)
    return create(name).eval()


def images_for(net: nn.Module, name: str) -> Tensor:
    # As small as the net takes them: the claims do not depend on the size.
    size = net.input_size or (32 if "/" in name else 8)
    assert isinstance(size, int)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def outputs_of(name: str) -> tuple[nn.Module, Outputs]:
    net: Any = net_in_eval(name)
    with torch.no_grad():
        return net, net.forward_with_features(images_for(net, name))


@every_net
def test_logits_have_one_row_per_image_and_one_column_per_class(name: str) -> None:
    net = net_in_eval(name)
    with torch.no_grad():
        logits = net(images_for(net, name))
    assert logits.shape == (2, NUM_CLASSES)
    assert logits.isfinite().all()


@every_net
def test_training_mode_returns_a_plain_tensor_of_logits(name: str) -> None:
    with torch.device("meta"):
        net = create(name).train()
    logits = net(images_for(net, name).to("meta"))
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, NUM_CLASSES)


@every_net_of_ours
def test_forward_returns_the_logits_of_forward_with_features(name: str) -> None:
    net, outputs = outputs_of(name)
    with torch.no_grad():
        assert torch.equal(net(images_for(net, name)), outputs.logits)


@every_net_of_ours
def test_a_feature_is_the_activation_of_its_preact(name: str) -> None:
    net, outputs = outputs_of(name)
    activation = getattr(net, "activation", F.relu)
    assert len(outputs.features) == len(outputs.preacts) >= 2
    for feature, preact in zip(outputs.features, outputs.preacts, strict=True):
        assert feature.ndim == 4
        assert torch.equal(activation(preact), feature)
        assert preact.min() < 0, "an in-place ReLU has overwritten the preact"


@every_net_of_ours
def test_a_stage_norm_is_the_last_one_before_its_preact(name: str) -> None:
    net: Any = net_in_eval(name)
    outputs = net.forward_with_features(images_for(net, name))
    norms = getattr(net, "stage_norms", ())
    assert len(norms) in (0, len(outputs.preacts))
    for norm, preact in zip(norms, outputs.preacts, strict=False):
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.num_features == preact.shape[1]
        # What is between them, a shortcut to add or a maximum to take, moves every value as the bias moves.
        (slope,) = torch.autograd.grad(preact.sum(), norm.bias, retain_graph=True)
        assert (slope == preact[:, 0].numel()).all()


@every_net
def test_the_size_of_images_is_one_number_or_any(name: str) -> None:
    size = net_in_eval(name).input_size
    assert size is None or isinstance(size, int)


@every_net_of_ours
def test_the_classifier_maps_the_embedding_to_the_logits(name: str) -> None:
    net, outputs = outputs_of(name)
    classifier = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    assert outputs.embedding is not None
    assert outputs.embedding.shape == (2, classifier.in_features)
    with torch.no_grad():
        assert_close(classifier(outputs.embedding), outputs.logits)


@every_net
def test_gradient_reaches_every_parameter_but_those_said_to_be_unused(name: str) -> None:
    # In eval mode: with batch statistics a convolution's bias has no influence and rightly gets no gradient.
    net = net_in_eval(name)
    logits = net(images_for(net, name))
    coefficients = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    parameters = dict(net.named_parameters())
    gradients = torch.autograd.grad((logits * coefficients).sum(), list(parameters.values()), allow_unused=True)
    unreached = {key for key, g in zip(parameters, gradients, strict=True) if g is None or not g.abs().sum() > 0}
    assert unreached == getattr(net, "unused_parameters", set())


@every_net
def test_eval_mode_is_deterministic(name: str) -> None:
    net = net_in_eval(name)
    images = images_for(net, name)
    with torch.no_grad():
        assert torch.equal(net(images), net(images))


@pytest.mark.parametrize("name", [name for name in NAMES if "dropout_rate" in options_of(NETS[name])])
def test_dropout_rate_acts_in_training_and_not_in_eval(name: str) -> None:
    net = NETS.create({"name": name, "dropout_rate": 0.5}, NUM_CLASSES)
    images = images_for(net, name)
    with torch.no_grad():
        assert not torch.equal(net.train()(images), net(images))
        without = NETS.create({"name": name, "dropout_rate": 0.0}, NUM_CLASSES)
        without.load_state_dict(net.state_dict())
        assert torch.equal(net.eval()(images), without.eval()(images))


@every_net
def test_a_net_loaded_from_a_state_dict_gives_the_same_logits(name: str) -> None:
    net = net_in_eval(name)
    with torch.device("meta"):
        twin = create(name)
    assert list(twin.state_dict()) == list(net.state_dict())
    twin.to_empty(device="cpu").load_state_dict(net.state_dict())
    images = images_for(net, name)
    with torch.no_grad():
        assert torch.equal(twin.eval()(images), net(images))


@every_net
def test_every_option_is_described_and_a_source_is_named(name: str) -> None:
    entry = NETS[name]
    documentation = (entry.func if isinstance(entry, functools.partial) else entry).__doc__
    assert documentation is not None
    assert "Source: " in documentation
    for option in options_of(entry):
        assert f"\n        {option}: " in documentation


@every_net
def test_its_defaults_are_valid_options(name: str) -> None:
    section, problems = NETS.resolve({"name": name})
    assert problems == []
    options = [option for function in NETS.functions(NETS[name]) for option in options_of(function)]
    assert sorted(section) == sorted(["name", *options])


def test_an_unknown_net_is_refused_with_the_nearest_name() -> None:
    _, problems = NETS.resolve({"name": "cnm"})
    assert problems == [("name", "unknown net 'cnm'; did you mean 'cnn'?")]

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from model.folding import cast_weights, fold_batch_norms
from model.nets import NETS
from model.outputs import Outputs, features_of
from model.taps import set_taps

NUM_CLASSES = 5
FEATURES = frozenset({"logits", "features"})
OURS = [name for name in NETS if not name.endswith("/")]
SMALL: dict[str, dict[str, Any]] = {"wrn": {"depth": 10, "widen_factor": 2}}
# One of each family and form; the others are as these are, just larger.
FAST = {"cnn", "densenet", "densenet40", "efficientnet_b0_cifar", "mobilenets_s", "mobilenetv2", "mobilenetv2_cifar"}
FAST |= {"preresnet110", "resnet18", "resnet20", "resnet50", "resnext29", "resnext29_2x64d", "studentmodel"}
FAST |= {"shufflenetv1", "shufflenetv2", "studentnet", "tiny", "vgg11", "wrn"}
THEIRS = ["torchvision/googlenet", "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5"]
NAMES = [pytest.param(name, marks=[] if name in {*FAST, *THEIRS} else pytest.mark.slow) for name in [*OURS, *THEIRS]]


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Returns a net in eval mode whose batch norms scale by what training may have made of it: also by 0 and less."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.normal_()
                    module.weight[0] = 0
                    module.bias.normal_()
    return net.eval()


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = NETS.create({"name": name, **SMALL.get(name, {})}, NUM_CLASSES)
    return randomised(net)


def images_for(net: nn.Module, name: str = "") -> Tensor:
    size = getattr(net, "input_size", None) or (32 if name.startswith("torchvision/") else 8)
    assert isinstance(size, int)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def tensors_of(outputs: Outputs) -> list[Tensor]:
    embedding = [] if outputs.embedding is None else [outputs.embedding]
    return [outputs.logits, *outputs.features, *outputs.preacts, *embedding]


def answers(net: Any, images: Tensor) -> list[Tensor]:
    """Returns everything that a net says of images."""
    with torch.no_grad():
        told = tensors_of(net.forward_with_features(images)) if hasattr(net, "forward_with_features") else []
        return [net(images), *told]


def nodes_of(outputs: list[Tensor]) -> Iterator[tuple[Any, Any]]:
    """Yields the edges (reader, read) of the graph that autograd keeps of a computation; the reader of an output is
    None."""
    seen: set[Any] = set()
    # An output that is there twice, as a preact and as a feature, is one.
    waiting: list[tuple[Any, Any]] = [(None, node) for node in {output.grad_fn for output in outputs}]
    while waiting:
        reader, node = waiting.pop()
        yield reader, node
        if node not in seen:
            seen.add(node)
            waiting += [(node, read) for read, _ in node.next_functions if read is not None]


def foldable_norms(outputs: list[Tensor]) -> int:
    """Returns how many batch norms are all that reads a convolution or a matrix product, by autograd's account."""
    edges = list(nodes_of(outputs))
    readers = Counter(node for _, node in edges)
    return sum(
        "BatchNorm" in type(reader).__name__
        and type(node).__name__ in {"ConvolutionBackward0", "AddmmBackward0", "MmBackward0"}
        and readers[node] == 1
        for reader, node in edges
    )


def norms_in(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize("name", NAMES)
def test_every_norm_that_alone_reads_a_layer_is_folded_and_nothing_that_the_net_says_changes(name: str) -> None:
    net: Any = create(name).double()
    images = images_for(net, name).double()
    ours = hasattr(net, "forward_with_features")
    folded, number = fold_batch_norms(net, FEATURES if ours else frozenset({"logits"}), images.shape[1:])
    outputs = tensors_of(net.forward_with_features(images)) if ours else [net(images)]
    assert number == foldable_norms(outputs)
    assert norms_in(folded) == norms_in(net) - number
    for found, expected in zip(answers(folded, images), answers(net, images), strict=True):
        assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def test_the_original_stays_as_it_is_and_the_copy_only_answers() -> None:
    net = create("resnet20").train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    folded, number = fold_batch_norms(net)
    assert number == 19
    assert list(before) == list(net.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert {module.training for module in net.modules()} == {True}
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert type(folded) is type(net)
    assert {module.training for module in folded.modules()} == {False}
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    theirs = {value.data_ptr() for value in net.state_dict().values()}
    assert theirs.isdisjoint(value.data_ptr() for value in folded.state_dict().values())


def test_folded_weights_are_the_exact_ones_rounded_once() -> None:
    layer: Any
    norm: Any
    for layer, norm in ((nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)), (nn.Linear(8, 64), nn.BatchNorm1d(64))):
        net = randomised(nn.Sequential(layer, norm))
        scale = norm.weight.double().numpy(force=True) / np.sqrt(norm.running_var.double().numpy() + norm.eps)
        weight, bias = (value.double().numpy(force=True) for value in (layer.weight, layer.bias))
        exact_weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        exact_bias = (bias - norm.running_mean.double().numpy()) * scale + norm.bias.double().numpy(force=True)
        folded: Any
        folded, number = fold_batch_norms(net, shape=(3, 8, 8) if weight.ndim == 4 else (8,))
        assert number == 1
        assert folded[0].weight.dtype == folded[0].bias.dtype == torch.float32
        assert np.array_equal(folded[0].weight.numpy(), exact_weight.astype(np.float32))
        assert np.array_equal(folded[0].bias.numpy(), exact_bias.astype(np.float32))


def test_a_folded_net_can_be_tapped_where_its_norms_were() -> None:
    nets: tuple[Any, Any] = (create("tiny"), fold_batch_norms(create("tiny"))[0])
    seen: list[Tensor] = []
    for net in nets:
        net.get_submodule("bn2").register_forward_hook(lambda _, inputs, output: seen.append(output))
        net(images_for(net))
    assert_close(seen[1], seen[0])


class Net(nn.Module):
    """A net whose `forward` is given."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, images: Tensor) -> Any:
        return self.run(self, images)


def with_one_weight(net: Any) -> Any:
    """Lets two convolutions share their weight."""
    net.other.weight = net.conv.weight
    return net


def with_a_hook(net: Net, path: str) -> Net:
    net.get_submodule(path).register_forward_hook(lambda _, inputs, output: 2 * output)
    return net


def with_two_names(net: Any) -> Any:
    net.alias = net.norm
    return net


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1)


UNSUITABLE: dict[str, Net] = {
    "its output is added to the norm's": Net(lambda net, x: (y := net.conv(x)) + net.norm(y)),
    "its output is normalised and changed in place": Net(lambda net, x: net.norm(y := net.conv(x)) + y.relu_()),
    "its output is an output of the net": Net(lambda net, x: (y := net.conv(x), net.norm(y))),
    "its output is normalised twice": Net(lambda net, x: net.norm(y := net.conv(x)) + net.norm(y)),
    "its output is normalised by two": Net(
        lambda net, x: net.norm(y := net.conv(x)) + net.other(y), other=nn.BatchNorm2d(3)
    ),
    "it is called twice": Net(lambda net, x: net.norm(net.conv(net.conv(x)))),
    "the norm is called twice": Net(
        lambda net, x: net.norm(net.norm(net.conv(x))), norm=nn.BatchNorm2d(3, affine=False)
    ),
    "its weight is another's, too": with_one_weight(
        Net(lambda net, x: net.norm(net.conv(x)) + net.other(x), other=conv())
    ),
    "its weight is read by a function": Net(lambda net, x: net.norm(net.conv(x)) * net.conv.weight.sum()),
    "the norm's bias is read by a function": Net(lambda net, x: net.norm(net.conv(x)) * net.norm.bias.sum()),
    "there is something between them": Net(lambda net, x: net.norm(net.conv(x).relu())),
    "the norm comes first": Net(lambda net, x: net.conv(net.norm(x))),
    "a hook changes its output": with_a_hook(Net(lambda net, x: net.norm(net.conv(x))), "conv"),
    "a hook changes the norm's output": with_a_hook(Net(lambda net, x: net.norm(net.conv(x))), "norm"),
    "the norm has no statistics": Net(
        lambda net, x: net.norm(net.conv(x)), norm=nn.BatchNorm2d(3, track_running_stats=False)
    ),
    "the norm's channels are other ones": Net(
        lambda net, x: net.norm1d(net.linear(x.flatten(2)[:, :, :3])), linear=nn.Linear(3, 3), norm1d=nn.BatchNorm1d(3)
    ),
    "it is a transposed one": Net(lambda net, x: net.norm(net.transposed(x)), transposed=nn.ConvTranspose2d(3, 3, 3)),
    "its weight is made of others": Net(
        lambda net, x: net.norm(net.normed(x)), normed=nn.utils.parametrizations.weight_norm(conv())
    ),
    "what the net does depends on what it sees": Net(
        lambda net, x: net.norm(net.conv(x)) if x.sum() > 0 else net.conv(x)
    ),
    "what the net does is unknown": Net(lambda net, x: torch.from_numpy(net.norm(net.conv(x)).detach().numpy())),
}


@pytest.mark.parametrize("why", UNSUITABLE)
def test_a_layer_is_left_as_it_is_if(why: str) -> None:
    net = randomised(UNSUITABLE[why].double())
    images = images_for(net).double()
    folded, number = fold_batch_norms(net, shape=images.shape[1:])
    assert number == 0
    with torch.no_grad():
        for given in (images, -images):
            for found, expected in zip(folded(given), net(given), strict=True):
                assert torch.equal(found, expected)


SUITABLE: dict[str, Net] = {
    "the norm neither scales nor shifts": Net(
        lambda net, x: net.norm(net.conv(x)), norm=nn.BatchNorm2d(3, affine=False)
    ),
    "it has no bias": Net(lambda net, x: net.norm(net.other(x)), other=nn.Conv2d(3, 3, 3, bias=False, groups=3)),
    "only its shape is read besides": Net(lambda net, x: net.norm(y := net.conv(x)) * y.shape[-1]),
    "another layer comes before it": Net(lambda net, x: net.norm(net.conv(net.other(x))), other=conv()),
    "the norm has two names": with_two_names(Net(lambda net, x: net.alias(net.conv(x)))),
    "what the net does depends on the image's size": Net(
        lambda net, x: net.norm(net.conv(x)) if x.shape[-1] == 8 else net.conv(x)
    ),
}


@pytest.mark.parametrize("why", SUITABLE)
def test_a_layer_takes_the_norm_in_also_if(why: str) -> None:
    net = randomised(SUITABLE[why].double())
    images = images_for(net).double()
    folded, number = fold_batch_norms(net, shape=images.shape[1:])
    assert number == 1
    assert norms_in(folded) == norms_in(net) - 1
    with torch.no_grad():
        assert_close(folded(images), net(images), rtol=1e-12, atol=1e-12)


def test_what_is_told_besides_the_logits_matters_only_where_it_is_needed() -> None:
    class Told(nn.Module):
        """The preact is what the convolution puts out; `forward` keeps it to itself."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            return self.forward_with_features(images).logits

        def forward_with_features(self, images: Tensor) -> Outputs:
            preact = self.conv(images)
            return Outputs(self.norm(preact).mean((2, 3)), preacts=(preact,))

    net: Any = randomised(Told())
    images = images_for(net)
    folded: Any
    folded, number = fold_batch_norms(net, shape=images.shape[1:])
    assert number == 1
    with torch.no_grad():
        assert_close(folded(images), net(images))
    folded, number = fold_batch_norms(net, FEATURES, images.shape[1:])
    assert number == 0
    assert all(map(torch.equal, answers(folded, images), answers(net, images)))


def test_a_folded_net_gives_the_maps_of_its_taps() -> None:
    net: Any = create("torchvision/resnet18")
    # What a norm reads, what a norm puts out, and whole stages.
    set_taps(net, ["relu", "layer1.0.conv1", "layer2.0.downsample.1", "layer3", "layer4"])
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    folded, number = fold_batch_norms(net, FEATURES, images.shape[1:])
    assert number == norms_in(net) - 1  # the tapped convolution's stays
    assert isinstance(folded.get_submodule("layer1.0.bn1"), nn.BatchNorm2d)
    assert isinstance(folded.get_submodule("layer2.0.downsample.1"), nn.Identity)
    with torch.no_grad():
        pairs = zip(tensors_of(features_of(folded, images)), tensors_of(features_of(net, images)), strict=True)
        for found, expected in pairs:
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_tap_does_not_matter_where_only_logits_are_needed() -> None:
    net: Any = create("tiny")
    set_taps(net, ["conv1"])
    assert [fold_batch_norms(net, needs)[1] for needs in (frozenset({"logits"}), FEATURES)] == [2, 1]


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["cnn", "mobilenetv2", "wrn", "resnet20", *THEIRS])
def test_weights_that_are_cast_once_give_the_very_bits_of_autocast(name: str, precision: str) -> None:
    net, _ = fold_batch_norms(create(name))
    net = net.to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", PRECISIONS[precision]):
        expected = answers(net, images)
        assert cast_weights(net, precision) is net
        found = answers(net, images)
    assert all(map(torch.equal, found, expected))
    for module in net.modules():
        computed = type(module) in {nn.Conv2d, nn.Linear}
        dtypes = {tensor.dtype for tensor in [*module.parameters(recurse=False)]}
        assert dtypes <= {PRECISIONS[precision] if computed else torch.float32}


def test_in_fp32_no_weight_is_cast() -> None:
    assert {parameter.dtype for parameter in cast_weights(create("resnet20"), "fp32").parameters()} == {torch.float32}

"""Layers of any net as its stages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from model import nets, taps
from model.errors import InputError
from model.nets import NETS
from model.outputs import Outputs, features_of, outputs_of
from model.taps import TapError, choose, map_of, set_taps, taps_of

CLASSES = 7
FEATURES = frozenset({"logits", "features", "embedding"})


def images(size: int = 32, number: int = 3) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))


def resnet18(*paths: str) -> Any:
    torch.manual_seed(0)
    net = models.get_model("resnet18", weights=None, num_classes=CLASSES).eval()
    set_taps(net, paths)
    return net


def own(name: str, **options: Any) -> Any:
    section, problems = NETS.resolve({"name": name, **options})
    assert problems == []
    torch.manual_seed(0)
    return nets.create(section, CLASSES).eval()


class Net(nn.Module):
    """A net whose `forward` is given; its classifier is `head`."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.run(self, values))


# --- maps ---


@pytest.mark.parametrize(("before", "prefixes"), [(0, 0), (1, 0), (2, 0), (0, 4), (1, 4), (4, 4)])
def test_tokens_are_the_cells_of_a_map_row_by_row_without_those_before_them(before: int, prefixes: int) -> None:
    expected = np.random.default_rng(0).normal(size=(2, 5, 4, 4)).astype(np.float32)
    tokens = np.full((2, before + 16, 5), np.nan, np.float32)
    for row in range(4):
        for column in range(4):
            tokens[:, before + 4 * row + column] = expected[:, :, row, column]
    found = map_of(torch.from_numpy(tokens), 2, prefixes)
    assert found is not None
    assert np.array_equal(found.numpy(), expected)


def test_maps_with_channels_last_are_turned_and_others_are_not_touched() -> None:
    maps = torch.randn(2, 5, 4, 4)
    assert map_of(maps, 2) is maps
    turned = map_of(torch.from_numpy(np.ascontiguousarray(np.moveaxis(maps.numpy(), 1, 3))), 2)
    assert turned is not None
    assert torch.equal(turned, maps)
    cube = torch.randn(2, 4, 4, 4)
    assert map_of(cube, 2) is cube


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros(2, 5, 4, 3),
        torch.zeros(2, 7, 5),
        torch.zeros(2, 0, 5),
        torch.zeros(2, 5),
        torch.zeros(3, 5, 4, 4),
        torch.zeros(()),
        torch.zeros(2, 5, 4, 4, dtype=torch.int64),
        (torch.zeros(2, 5, 4, 4),),
        None,
    ],
    ids=lambda output: str(getattr(output, "shape", type(output).__name__)),
)
def test_nothing_else_is_a_map(output: Any) -> None:
    assert map_of(output, 2) is None


# --- listening ---


def test_features_of_a_foreign_net_are_the_outputs_of_its_taps() -> None:
    paths = ("layer1.0.conv1", "layer2", "layer3.1")
    net = resnet18(*paths)
    oracle = create_feature_extractor(net, {path: path for path in paths} | {"flatten": "embedding", "fc": "logits"})
    with torch.no_grad():
        found, expected = features_of(net, images()), oracle(images())
    assert len(found.features) == 3
    for path, feature in zip(paths, found.features, strict=True):
        assert torch.equal(feature, expected[path])
    assert torch.equal(found.logits, expected["logits"])
    assert found.embedding is not None
    assert torch.equal(found.embedding, expected["embedding"])
    assert found.preacts == ()


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "mobilenetv2_cifar", "cnn", "tiny"])
def test_taps_of_our_own_nets_replace_their_maps_and_nothing_else(name: str) -> None:
    net = own(name)
    path = next(path for path, module in net.named_modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        before = features_of(net, images())
        set_taps(net, [path])
        after = features_of(net, images())
        first = net.get_submodule(path)(images())
    assert_close(after.features, (first,))
    assert after.preacts == ()
    assert torch.equal(after.logits, before.logits)
    assert after.embedding is not None
    assert before.embedding is not None
    assert torch.equal(after.embedding, before.embedding)


def test_gradient_passes_through_a_tap() -> None:
    net = resnet18("layer2").train()
    outputs_of(net, images(), FEATURES).features[0].sum().backward()
    assert net.conv1.weight.grad is not None
    assert net.layer3[0].conv1.weight.grad is None


def test_between_calls_there_is_no_hook_also_if_a_call_fails() -> None:
    net: Any = resnet18("layer2")
    keys = list(net.state_dict())
    features_of(net, images())
    choose(net, images())
    for ask in (features_of, choose):
        with pytest.raises(RuntimeError):
            ask(net, torch.zeros(1, 5, 8, 8))  # type: ignore[operator]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert list(net.state_dict()) == keys


def test_a_copy_has_the_taps_and_listens_to_itself() -> None:
    net: Any = resnet18("layer1")
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.conv1.weight.mul_(2)
        ours, theirs = (features_of(each, images()).features[0] for each in (net, other))
        expected = other.layer1(other.maxpool(other.relu(other.bn1(other.conv1(images())))))
    assert taps_of(other) == ("layer1",)
    assert torch.equal(theirs, expected)
    assert not torch.equal(ours, theirs)


def test_under_autocast_maps_come_in_half_precision_and_leave_in_full() -> None:
    net = resnet18("layer1.0.conv1")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        raw, outputs = features_of(net, images()), outputs_of(net, images(), FEATURES)
    assert raw.features[0].dtype == torch.bfloat16
    assert outputs.features[0].dtype == torch.float32
    assert torch.equal(outputs.features[0], raw.features[0].float())


def test_tokens_and_channels_last_come_as_maps() -> None:
    def run(net: Any, values: Tensor) -> Tensor:
        tokens = net.tokens(values.flatten(2).transpose(1, 2))
        return net.last(tokens.unflatten(1, values.shape[2:])).mean((1, 2))

    net = Net(run, tokens=nn.Identity(), last=nn.Identity())
    set_taps(net, ["tokens", "last"])
    values = images(8)
    assert all(torch.equal(maps, values) for maps in features_of(net, values).features)


def test_the_embedding_is_what_the_classifier_reads_averaged_over_a_map() -> None:
    net: Any = models.get_model("squeezenet1_1", weights=None, num_classes=CLASSES).eval()
    with torch.no_grad():
        found = features_of(net, images(64)).embedding
        expected = net.features(images(64)).mean((2, 3))
    assert found is not None
    assert_close(found, expected)
    unclear = Net(lambda net, values: values.flatten(2).transpose(1, 2))
    assert features_of(unclear, images(8)).embedding is None


# --- taps that are none ---


def broken(net: Any, values: Tensor) -> Tensor:
    net.overwritten(values).add_(1)
    net.twice(net.twice(values))
    net.flat(values.mean((2, 3)))
    return net.vectors(values.mean((2, 3)))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("twise", "the net has no module 'twise'; did you mean 'twice'?"),
        ("xyz", "the net has no module 'xyz'; it has overwritten, twice, flat, idle, vectors, head"),
        ("", "the net has no module ''; it has overwritten, twice, flat, idle, vectors, head"),
        ("idle", "the net does not call module 'idle' for an image; name one that it calls once"),
        ("twice", "the net calls module 'twice' 2 times for an image; name one that it calls once"),
        (
            "overwritten",
            "the net overwrites in place what module 'overwritten' puts out; name the layer that does so instead",
        ),
        ("flat", "the net has no maps at 'flat': shape (3, 3) of 3 images; a map is (N, C, S, S), "),
    ],
)
def test_what_cannot_be_tapped_is_one_line_that_says_why(path: str, said: str) -> None:
    modules = {name: nn.Conv2d(3, 3, 1) for name in ("overwritten", "twice")}
    idle = {name: nn.Identity() for name in ("flat", "idle", "vectors")}
    net = Net(broken, **modules, **idle)
    set_taps(net, [path])
    with pytest.raises(TapError) as caught, torch.no_grad():
        features_of(net, images(8))
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_map_that_only_training_overwrites_is_found_there() -> None:
    net = Net(lambda net, x: net.drop(net.conv(x)).mean((2, 3)), conv=nn.Conv2d(3, 3, 1), drop=nn.Dropout(0.5, True))
    set_taps(net.eval(), ["conv"])
    with torch.no_grad():
        assert len(features_of(net, images(8)).features) == 1
        with pytest.raises(TapError, match="overwrites in place what module 'conv' puts out"):
            features_of(net.train(), images(8))


def test_a_block_that_returns_several_tensors_is_no_tap() -> None:
    with pytest.raises(TapError, match=r"has no maps at 'layer1': a tuple of 3 images"):
        features_of(own("resnet20", stages=["layer1"]), images(8))


# --- choosing ---


def chosen(name: str, size: int) -> dict[str, tuple[int, ...]]:
    """Returns the stages that are chosen of a net of torchvision, and the shapes of their maps."""
    with torch.device("meta"):
        net: nn.Module = NETS.create({"name": f"torchvision/{name}"}, CLASSES).eval()
        set_taps(net, choose(net, torch.empty(1, 3, size, size)))
        outputs: Outputs = features_of(net, torch.empty(2, 3, size, size))
    return {path: tuple(maps.shape[1:]) for path, maps in zip(taps_of(net), outputs.features, strict=True)}


STAGES: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {
    ("resnet18", 64): {
        "relu": (64, 32, 32),
        "layer1": (64, 16, 16),
        "layer2": (128, 8, 8),
        "layer3": (256, 4, 4),
        "layer4": (512, 2, 2),
    },
    # Maps of one pixel are left out.
    ("resnet18", 32): {"relu": (64, 16, 16), "layer1": (64, 8, 8), "layer2": (128, 4, 4), "layer3": (256, 2, 2)},
    # The adaptive pooling to 7x7 that comes last makes no stage.
    ("vgg11", 32): {
        "features.1": (64, 32, 32),
        "features.4": (128, 16, 16),
        "features.9": (256, 8, 8),
        "features.14": (512, 4, 4),
        "features.19": (512, 2, 2),
    },
    # A block that makes its maps smaller begins with some of the size before.
    ("mobilenet_v2", 64): {
        "features.1": (16, 32, 32),
        "features.3": (24, 16, 16),
        "features.6": (32, 8, 8),
        "features.13": (96, 4, 4),
        "features": (1280, 2, 2),
    },
    # The classifier is a convolution: its maps are no stage.
    ("squeezenet1_1", 64): {
        "features.1": (64, 31, 31),
        "features.4": (128, 15, 15),
        "features.7": (256, 7, 7),
        "features": (512, 3, 3),
    },
    # Channels last, up to the end.
    ("swin_t", 64): {
        "features.1": (96, 16, 16),
        "features.3": (192, 8, 8),
        "features.5": (384, 4, 4),
        "permute": (768, 2, 2),
    },
    # Tokens, of one size all the way.
    ("vit_b_32", 224): {f"encoder.layers.encoder_layer_{number}": (768, 7, 7) for number in (2, 5, 8, 11)},
}


@pytest.mark.parametrize(("name", "size"), STAGES)
def test_chosen_stages_are_the_last_maps_of_each_size(name: str, size: int) -> None:
    assert list(chosen(name, size).items()) == list(STAGES[name, size].items())


def test_maps_that_are_overwritten_are_not_chosen() -> None:
    net = Net(lambda net, x: torch.relu_(net.norm(net.conv(x))).mean((2, 3)), conv=nn.Conv2d(3, 3, 1))
    net.norm = nn.BatchNorm2d(3)
    net.head = nn.Linear(3, CLASSES)  # the classifier is the last
    assert choose(net.eval(), images(8, 1)) == ("conv",)


def test_maps_of_one_pixel_are_chosen_if_there_are_no_others() -> None:
    net = Net(lambda net, x: net.conv(x.mean((2, 3), keepdim=True)).flatten(1), conv=nn.Conv2d(3, 3, 1))
    assert choose(net.eval(), images(8, 1)) == ("conv",)


def test_a_net_without_maps_has_no_stages() -> None:
    assert choose(Net(lambda net, values: values.mean((2, 3))).eval(), images(8, 1)) == ()


def test_what_is_no_row_for_each_image_is_not_chosen() -> None:
    # Such as a table of positions that a small net makes of their distances.
    net = Net(lambda net, x: (net.conv(x) + net.table(x.new_zeros(1, 4, 4, 3)).mean()).mean((2, 3)))
    net.conv, net.table = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)
    net.head = nn.Linear(3, CLASSES)
    assert choose(net.eval(), images(8, 1)) == ("conv",)


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(1, ["0"]), (2, ["0", "1"]), (4, ["0", "1", "2", "3"]), (6, ["0", "2", "3", "5"]), (9, ["1", "3", "5", "8"])],
)
def test_about_four_blocks_of_tokens_are_chosen_evenly_spaced_and_the_last_among_them(
    depth: int, blocks: list[str]
) -> None:
    def run(net: Any, values: Tensor) -> Tensor:
        tokens = values.flatten(2).transpose(1, 2)
        for block in net.blocks:
            tokens = tokens + block(tokens)
        return net.norm(tokens).mean(1)

    rows = nn.ModuleList(nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 3)) for _ in range(depth))
    net = Net(run, blocks=rows, norm=nn.LayerNorm(3)).eval()
    assert choose(net, images(4, 1)) == tuple(f"blocks.{block}" for block in blocks)


# --- set in params.json ---


def test_stages_of_a_section_are_the_taps_of_its_net() -> None:
    assert taps_of(own("tiny")) == ()
    assert taps_of(own("tiny", stages=["bn1", "conv2"])) == ("bn1", "conv2")


@pytest.mark.parametrize(("stages", "expected"), [({}, ()), ({"stages": None}, ()), ({"stages": ["bn2"]}, ("bn2",))])
def test_a_restored_net_has_the_taps_of_its_checkpoint_also_of_one_from_before_there_were_any(
    stages: dict[str, Any], expected: tuple[str, ...]
) -> None:
    net = own("tiny")
    record = {"section": {"name": "tiny", "width": 16, "dropout_rate": 0.0, **stages}, "num_classes": CLASSES}
    assert taps_of(nets.restore({"net": record, "state_dict": net.state_dict()}, "x")) == expected


def test_an_empty_list_of_stages_is_refused() -> None:
    _, [(key, text)] = NETS.resolve({"name": "tiny", "stages": []})
    assert key == "stages"
    assert "fewer than 1" in text


def test_the_classifier_of_our_own_nets_reads_their_embedding() -> None:
    net = own("resnet20")
    read: list[Tensor] = []
    net.get_submodule(taps.classifier_of(net)).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    assert features_of(net, images()).embedding is read[0]

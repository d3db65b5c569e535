from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models import _builder
from torch import Tensor, nn

from model.errors import InputError
from model.nets import NETS
from model.nets.timm_nets import remedy
from model.outputs import features_of
from model.taps import choose, set_taps, taps_of


def create(architecture: str, num_classes: int = 7, *, pretrained: bool = False) -> nn.Module:
    net: nn.Module = NETS.create({"name": f"timm/{architecture}", "pretrained": pretrained}, num_classes)
    return net


def put_weights(monkeypatch: pytest.MonkeyPatch, architecture: str) -> dict[str, Tensor]:
    """Makes random weights stand for those of the hub, and returns them."""
    weights: dict[str, Tensor] = timm.create_model(architecture).state_dict()
    asked: list[str] = []

    def load(hub_id: str, **options: Any) -> dict[str, Tensor]:
        asked.append(hub_id)
        assert hub_id.startswith(f"timm/{architecture}")
        return dict(weights)

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", load)
    return weights


@pytest.mark.parametrize("architecture", ["resnet10t", "vit_tiny_patch16_224"])
def test_it_is_timms_net_with_a_logit_for_each_class(architecture: str) -> None:
    with torch.device("meta"):
        net = create(architecture).train()
        assert type(net) is type(timm.create_model(architecture))
        assert net(torch.empty(2, 3, 224, 224)).shape == (2, 7)


@pytest.mark.parametrize(("architecture", "size"), [("resnet10t", None), ("vit_tiny_patch16_384", 384)])
def test_nets_that_take_one_size_of_image_say_which(architecture: str, size: int | None) -> None:
    with torch.device("meta"):
        net = create(architecture)
        assert net.input_size == size
        assert net.eval()(torch.empty(1, 3, size or 64, size or 64)).shape == (1, 7)


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm/resnet10t.c3_in1k"])
def test_a_name_may_end_with_the_tag_of_its_weights(name: str) -> None:
    assert NETS.resolve({"name": name})[1] == []


@pytest.mark.parametrize("name", ["resnet10u", "resnet10t.c4_in1k", "mobilenetv5_300m_enc", ""])
def test_what_is_no_classifier_of_timm_is_refused_with_the_nearest_name(name: str) -> None:
    _, [(key, text)] = NETS.resolve({"name": f"timm/{name}"})
    assert key == "name"
    assert f"unknown net 'timm/{name}'; " in text
    assert ("did you mean 'timm/resnet10t" in text) == ("resnet10" in name)


def test_stages_of_a_convolutional_net_are_its_own() -> None:
    with torch.device("meta"):
        net = create("resnet10t").eval()
        assert choose(net, torch.empty(1, 3, 64, 64)) == ("act1", "layer1", "layer2", "layer3", "layer4")


def test_stages_of_a_transformer_are_blocks_and_its_class_token_is_in_no_map() -> None:
    torch.manual_seed(0)
    net: Any = create("vit_tiny_patch16_224").eval()
    images = torch.randn(2, 3, 224, 224)
    set_taps(net, choose(net, images[:1]))
    assert taps_of(net) == ("blocks.2", "blocks.5", "blocks.8", "blocks.11")
    with torch.no_grad():
        outputs = features_of(net, images)
        expected = net.forward_intermediates(images, indices=[2, 5, 8, 11], intermediates_only=True)
        embedding = net.forward_head(net.forward_features(images), pre_logits=True)
    assert all(torch.equal(one, other) for one, other in zip(outputs.features, expected, strict=True))
    assert outputs.embedding is not None
    assert torch.equal(outputs.embedding, embedding)


# --- pretrained ---


def test_pretrained_weights_are_kept_up_to_a_new_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = put_weights(monkeypatch, "resnet10t")
    loaded = create("resnet10t", pretrained=True).state_dict()
    assert list(loaded) == list(weights)
    assert [key for key in weights if not torch.equal(loaded[key], weights[key])] == ["fc.weight", "fc.bias"]
    loaded = create("resnet10t.c3_in1k", 1000, pretrained=True).state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_a_pretrained_net_is_restored_into_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    put_weights(monkeypatch, "resnet10t")
    net, restored = create("resnet10t", pretrained=True).eval(), create("resnet10t").eval()
    restored.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(restored(images), net(images))


def test_weights_that_cannot_be_downloaded_are_an_input_error_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no route to host,\nand nothing in the cache")

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", refuse)
    with pytest.raises(InputError) as error:
        create("resnet10t", pretrained=True)
    assert str(error.value) == (
        "cannot load the weights of timm/resnet10t (no route to host, and nothing in the cache); where there is a"
        f" network, run `hf download timm/resnet10t.c3_in1k`, and copy its cache to {HF_HUB_CACHE}"
    )


def test_weights_that_are_not_on_the_hub_are_to_be_put_into_torchs_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    text = remedy(None, "https://example.org/files/net-0123.pth?download=1")
    assert text.startswith("download https://example.org/files/net-0123.pth?download=1 and save it as ")
    assert text.endswith(str(tmp_path / "hub" / "checkpoints" / "net-0123.pth"))


def test_a_net_that_nobody_has_trained_cannot_be_pretrained() -> None:
    with pytest.raises(InputError, match=r'timm has no weights for timm/botnet50ts_256; set "pretrained" to false'):
        create("botnet50ts_256", pretrained=True)

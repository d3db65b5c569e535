from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from model.errors import InputError
from model.nets import NETS
from model.nets.torchvision_nets import replace_classifier

# The smallest of each kind.
ARCHITECTURES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_32",
]  # fmt: skip


def create(architecture: str, num_classes: int, *, pretrained: bool = False) -> nn.Module:
    net: nn.Module = NETS.create({"name": f"torchvision/{architecture}", "pretrained": pretrained}, num_classes)
    return net


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, and no network behind it."""

    def refuse(url: str, *_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


def put_weights(hub: Path, architecture: str) -> dict[str, Tensor]:
    """Puts random weights where torchvision looks for its ImageNet weights, and returns them."""
    net = models.get_model(architecture, weights=None)
    url = models.get_model_weights(architecture).DEFAULT.url
    torch.save(net.state_dict(), hub / url.rpartition("/")[2])
    weights: dict[str, Tensor] = net.state_dict()
    return weights


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_replaced_classifier_gives_the_new_number_of_logits(architecture: str) -> None:
    # The builder of the regnets reads numbers out of tensors, and those of the meta device have none.
    with torch.device("cpu" if architecture.startswith("regnet") else "meta"):
        net = create(architecture, 1000).eval()
        replace_classifier(net, 7)
        assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 7)


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out(architecture: str) -> None:
    with torch.device("meta"):
        net = create(architecture, 7).train()
        assert net(torch.empty(2, 3, 96, 96)).shape == (2, 7)
    assert not [key for key in net.state_dict() if key.lower().startswith("aux")]


@pytest.mark.parametrize(
    ("architecture", "size"), [("resnet18", None), ("swin_t", None), ("vit_b_32", 224), ("maxvit_t", 224)]
)
def test_nets_that_take_one_size_of_image_say_which(architecture: str, size: int | None) -> None:
    with torch.device("meta"):
        net = create(architecture, 7)
        assert net.input_size == size
        assert net.eval()(torch.empty(1, 3, size or 64, size or 64)).shape == (1, 7)


@pytest.mark.parametrize("name", ["resnet51", "fcn_resnet50", "", "detection/ssd300_vgg16"])
def test_what_is_no_classifier_of_torchvision_is_refused_with_the_nearest_name(name: str) -> None:
    _, [(key, text)] = NETS.resolve({"name": f"torchvision/{name}"})
    assert key == "name"
    assert f"unknown net 'torchvision/{name}'; " in text
    assert ("did you mean 'torchvision/resnet" in text) == ("resnet" in name)


@pytest.mark.parametrize("architecture", ["shufflenet_v2_x0_5", "squeezenet1_1"])
def test_pretrained_weights_are_kept_up_to_a_new_classifier(architecture: str, hub: Path) -> None:
    weights = put_weights(hub, architecture)
    loaded = create(architecture, 7, pretrained=True).state_dict()
    assert list(loaded) == list(weights)
    changed = [key for key in weights if not torch.equal(loaded[key], weights[key])]
    classifier = {"shufflenet_v2_x0_5": "fc", "squeezenet1_1": "classifier.1"}[architecture]
    assert changed == [f"{classifier}.weight", f"{classifier}.bias"]
    assert create(architecture, 7, pretrained=True)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_pretrained_keeps_the_classifier_where_the_number_of_classes_is_imagenets(hub: Path) -> None:
    weights = put_weights(hub, "squeezenet1_1")
    loaded = create("squeezenet1_1", 1000, pretrained=True).state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3", "squeezenet1_1"])
def test_a_pretrained_net_is_restored_into_one_that_is_not(architecture: str, hub: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about the initialisation that put_weights leaves open
        put_weights(hub, architecture)
    net = create(architecture, 7, pretrained=True).eval()
    restored = create(architecture, 7).eval()
    restored.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(restored(images), net(images))
        assert net.train()(images).shape == (2, 7)


def test_a_vit_has_the_image_size_of_its_weights_also_without_them() -> None:
    with torch.device("meta"):
        assert create("vit_h_14", 7).input_size == 518


def test_weights_that_cannot_be_downloaded_are_an_input_error_with_url_and_file(hub: Path) -> None:
    with pytest.raises(InputError) as error:
        create("resnet18", 10, pretrained=True)
    message = str(error.value)
    assert "no route to host" in message
    assert "download https://download.pytorch.org/models/resnet18-" in message
    assert f"save it as {hub / 'resnet18-'}" in message
    assert "\n" not in message


def test_a_damaged_file_in_the_cache_is_an_input_error(hub: Path) -> None:
    url = models.get_model_weights("squeezenet1_1").DEFAULT.url
    (hub / url.rpartition("/")[2]).write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match="cannot load the ImageNet weights of torchvision/squeezenet1_1"):
        create("squeezenet1_1", 10, pretrained=True)


def test_torchvision_is_imported_only_for_its_own_nets() -> None:
    program = "import sys, model.nets; print('torchvision' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"

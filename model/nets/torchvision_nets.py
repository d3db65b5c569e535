"""Every classifier of torchvision by its name there: `torchvision/resnet50`."""

from __future__ import annotations

import http.client
import pickle
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from model.errors import InputError
from model.nets import NETS


def classifiers() -> list[str]:
    """Returns the names of torchvision's classifiers."""
    # Here, not above: it takes about a second that runs with other nets need not pay.
    from torchvision import models

    return models.list_models(module=models)


@NETS.register("torchvision/", members=classifiers)
def torchvision_net(architecture: str, num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """A classifier of torchvision, as `torchvision/<its name there>`; auxiliary heads are left out.

    Args:
        pretrained: Start from torchvision's default ImageNet weights; the classifier is new unless 1000 classes fit it.

    Raises:
        InputError: The weights are neither in the cache nor to be downloaded.

    Source: torchvision.models, https://docs.pytorch.org/vision/stable/models.html.
    """
    from torchvision import models

    weights = models.get_model_weights(architecture).DEFAULT
    # The attention of these is tied to one grid; the other nets take any size.
    input_size = weights.meta["min_size"][0] if architecture.startswith(("vit_", "maxvit_")) else None
    # What torchvision changes together with the weights is the same here with and without them: a checkpoint of a
    # net that began with pretrained weights is restored into one that did not.
    options: dict[str, Any] = {}
    if architecture.startswith("vit_"):
        options = {"image_size": input_size}
    elif architecture in ("googlenet", "inception_v3"):
        # Without `init_weights` they warn that their default initialisation will change.
        options = {"init_weights": not pretrained, "transform_input": True}
    if pretrained:
        try:
            net = models.get_model(architecture, weights=weights, **options)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, http.client.HTTPException) as error:
            file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
            raise InputError(
                f"cannot load the ImageNet weights of torchvision/{architecture} ({str(error).partition(chr(10))[0]}); "
                f"download {weights.url} and save it as {file}"
            ) from error
        if num_classes != len(weights.meta["categories"]):
            replace_classifier(net, num_classes)
    else:
        net = models.get_model(architecture, weights=None, num_classes=num_classes, **options)
    # googlenet and inception_v3 would return a tuple in training, with the logits of two more classifiers.
    for attribute, off in (("aux_logits", False), ("aux1", None), ("aux2", None), ("AuxLogits", None)):
        if hasattr(net, attribute):
            setattr(net, attribute, off)
    net.input_size = input_size
    return net


def replace_classifier(net: nn.Module, num_classes: int) -> None:
    """Puts a new layer in place of the last linear or 1x1 convolution layer: in torchvision that is the classifier."""
    path, layer = [(path, m) for path, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    bias = layer.bias is not None
    new: nn.Module
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, num_classes, bias=bias)
    else:
        new = nn.Conv2d(layer.in_channels, num_classes, 1, bias=bias)  # squeezenet
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, new)

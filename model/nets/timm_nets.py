"""Every classifier of timm by its name there: `timm/resnet10t`, with the tag of weights `timm/resnet10t.c3_in1k`."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from model.errors import InputError
from model.nets import NETS


def classifiers() -> list[str]:
    """Returns the names of timm's classifiers, with and without the tags of their weights."""
    # Here, not above: it takes seconds that runs with other nets need not pay.
    import timm

    names = {*timm.list_models(), *timm.list_models(include_tags=True)}
    return sorted(name for name in names if not name.partition(".")[0].endswith("_enc"))  # those classify nothing


@NETS.register("timm/", members=classifiers)
def timm_net(architecture: str, num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """A classifier of timm, as `timm/<its name there>`; the name may end with a dot and the tag of its weights.

    Args:
        pretrained: Start from these weights, without a tag from timm's default ones; the classifier is new unless the
            number of classes fits it.

    Raises:
        InputError: There are no such weights, or they are neither in the cache nor to be downloaded.

    Source: Wightman, PyTorch Image Models, 2019, https://github.com/huggingface/pytorch-image-models.
    """
    import timm

    config: Any = timm.get_pretrained_cfg(architecture)
    if pretrained and not config.has_weights:
        raise InputError(f'timm has no weights for timm/{architecture}; set "pretrained" to false, or name another net')
    try:
        net: Any = timm.create_model(architecture, pretrained=pretrained, num_classes=num_classes)
    except Exception as error:  # whatever a hub, its client and a damaged file may lead to
        if not pretrained:
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"cannot load the weights of timm/{architecture} ({why[:200]}); {remedy(config.hf_hub_id, config.url)}"
        ) from error
    # The grid of these has one size; the other nets take any, as far as they do not shrink it to nothing.
    net.input_size = config.input_size[-1] if config.fixed_input_size else None
    return net


def remedy(hub_id: str | None, url: str | None) -> str:
    """Returns what to do without a network about weights that are in a repository of the hub or else behind a URL."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if hub_id:
        return f"where there is a network, run `hf download {hub_id}`, and copy its cache to {HF_HUB_CACHE}"
    name = Path(urlparse(str(url)).path).name
    return f"download {url} and save it as {Path(torch.hub.get_dir()) / 'checkpoints' / name}"

"""VGGs with batch norm and one linear layer, for images of 32x32 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from model.nets import NETS
from model.nets.cnn import require_size
from model.nets.initialisation import he_normal_by_fan_out
from model.nets.resnet import Stage
from model.outputs import Outputs


class VGG(nn.Module):
    """Stages of 3x3 convolutions with batch norm and ReLU, each stage followed by a 2x2 max-pooling.

    Args:
        num_classes: Number of logits.
        num_convs: Convolutions of each stage.
        widths: Channels of each stage.
        num_copies: How often the classifier sees each pooled value.
        last_average: The last stage keeps the size of the one before it, which is not pooled, and is averaged to one
            value per channel.
    """

    input_size: int | None = 32
    activation = staticmethod(F.relu)

    def __init__(
        self,
        num_classes: int,
        num_convs: Sequence[int],
        widths: Sequence[int],
        *,
        num_copies: int = 1,
        last_average: bool = False,
    ) -> None:
        super().__init__()
        self.features = nn.ModuleList()
        channels = 3
        for depth, width in zip(num_convs, widths, strict=True):
            layers = []
            for _ in range(depth):
                layers.append(nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)))
                channels = width
            self.features.append(Stage(*layers))
        pools: list[nn.Module] = [nn.MaxPool2d(2) for _ in widths]
        if last_average:
            pools[-2:] = [nn.Identity(), nn.AdaptiveAvgPool2d(1)]
        self.pools = nn.ModuleList(pools)
        size = 1 if last_average else 32 // 2 ** len(widths)
        self.num_copies = num_copies
        self.classifier = nn.Linear(channels * size * size * num_copies, num_classes)

    @property
    def stage_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The batch norm before each stage's last ReLU."""
        return tuple(stage[-1][1] for stage in self.features)  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        require_size(self, images)
        preacts, features = [], []
        maps = images  # (N, 3, 32, 32); a stage's maps are taken before they are pooled
        for stage, pool in zip(self.features, self.pools, strict=True):
            preact, feature = stage(maps)
            preacts.append(preact)
            features.append(feature)
            maps = pool(feature)
        embedding = maps.flatten(1).repeat_interleave(self.num_copies, dim=1)  # (N, C, h, w) -> (N, C * h * w * copies)
        return Outputs(self.classifier(embedding), tuple(features), tuple(preacts), embedding)


WIDTHS = (64, 128, 256, 512, 512)

LastStageSize = Literal[2, 4]


@NETS.register("vgg8")
def vgg8(num_classes: int, *, last_stage_size: LastStageSize = 4) -> nn.Module:
    """VGG of one convolution per stage and one linear layer, for images of 32x32 pixels: 4.0 M parameters, 100 classes.

    Args:
        last_stage_size: Height and width of the last stage's maps: 4, the size of the stage before it, then a global
            average, or 2, with a max-pooling before and after it as in the larger VGGs.

    Source: Tian et al., "Contrastive Representation Distillation", 2020, supplementary material, "network
    architectures"; layers and initial weights of their code, RepDistiller.
    """
    net = VGG(num_classes, (1, 1, 1, 1, 1), WIDTHS, last_average=last_stage_size == 4)
    he_normal_by_fan_out(net)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.normal_(net.classifier.weight, std=0.01)
    return net


@NETS.register("vgg11")
def vgg11(num_classes: int) -> nn.Module:
    """VGG-11 with batch norm and one linear layer, for images of 32x32 pixels: 9.2 M parameters.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015, table 1,
    A; batch norm and classifier of kuangliu/pytorch-cifar.
    """
    return VGG(num_classes, (1, 1, 2, 2, 2), WIDTHS)


@NETS.register("vgg13")
def vgg13(num_classes: int, *, last_stage_size: LastStageSize = 2) -> nn.Module:
    """VGG-13 with batch norm and one linear layer, for images of 32x32 pixels: 9.4 M parameters.

    Args:
        last_stage_size: Height and width of the last stage's maps: 2, with a max-pooling before and after it, or 4, the
            size of the stage before it, then a global average; 4 is the net of the CIFAR-100 benchmark of Tian et al.,
            "Contrastive Representation Distillation", 2020.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015, table 1,
    B; batch norm and classifier of kuangliu/pytorch-cifar.
    Deviation: in that benchmark the initial weights are drawn as those of `vgg8`, here with either size as torch does.
    """
    return VGG(num_classes, (2, 2, 2, 2, 2), WIDTHS, last_average=last_stage_size == 4)


@NETS.register("vgg16")
def vgg16(num_classes: int) -> nn.Module:
    """VGG-16 with batch norm and one linear layer, for images of 32x32 pixels: 14.7 M parameters.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015, table 1,
    D; batch norm and classifier of kuangliu/pytorch-cifar.
    """
    return VGG(num_classes, (2, 2, 3, 3, 3), WIDTHS)


@NETS.register("vgg19")
def vgg19(num_classes: int) -> nn.Module:
    """VGG-19 with batch norm and one linear layer, for images of 32x32 pixels: 20.0 M parameters.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015, table 1,
    E; batch norm and classifier of kuangliu/pytorch-cifar.
    """
    return VGG(num_classes, (2, 2, 4, 4, 4), WIDTHS)


@NETS.register("vgg19_bn_linear")
def vgg19_bn_linear(num_classes: int) -> nn.Module:
    """VGG-19 whose linear layer is as wide as for images of 224x224 pixels, for 32x32 ones: 20.3 M parameters.

    torchvision's `vgg19_bn` pools to 7x7 cells whatever the size of the image; of an image of 32x32 pixels one cell is
    left, so the classifier, a single linear layer in place of the original three, sees 49 copies of its 512 values.

    Source: the teacher of Heejoon Koo's Knowledge-Distillation (2021); torchvision, `vgg19_bn`.
    """
    return VGG(num_classes, (2, 2, 4, 4, 4), WIDTHS, num_copies=49)

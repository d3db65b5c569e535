"""DenseNets for small images: each layer sees the maps of all layers before it.

A stage ends with maps that nothing has normalised yet. Its map is what the next layer makes of them first: the batch
norm and the ReLU of the transition, or the final ones.

The attribute names are the ancestor's, so its checkpoints load. Those of kuangliu/pytorch-cifar do not: its nets are
here with the ancestor's names, and with a layer's maps after its input, not before it, which is the same function of
permuted weights. The originals pool maps of one size before the classifier; the global average is the same for 32x32
images, and takes any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.nets import NETS
from model.nets.initialisation import he_normal_by_fan_out
from model.outputs import Outputs


class BasicLayer(nn.Module):
    """A 3x3 convolution whose `growth_rate` maps are appended to its input."""

    def __init__(self, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, growth_rate, 3, padding=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat((maps, self.conv1(F.relu(self.bn1(maps)))), 1)


class BottleneckLayer(nn.Module):
    """A 1x1 convolution before the 3x3 one narrows the input to four times the growth rate."""

    def __init__(self, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth_rate, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        narrow = self.conv1(F.relu(self.bn1(maps)))
        return torch.cat((maps, self.conv2(F.relu(self.bn2(narrow)))), 1)


class Transition(nn.Module):
    """A 1x1 convolution and pooling between two stages.

    `bn1` and its ReLU come before the call: the net keeps what they make of the maps.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, activated: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(activated), 2)


class DenseNet(nn.Module):
    """A convolution of twice the growth rate, then `len(num_layers)` stages with transitions between them.

    Args:
        num_classes: Number of logits.
        num_layers: Layers of each stage.
        growth_rate: Maps that a layer adds.
        layer: The kind of layer.
        compression: Share of the maps that a transition keeps.
    """

    input_size: int | None = None
    activation = staticmethod(F.relu)

    def __init__(
        self,
        num_classes: int,
        num_layers: Sequence[int],
        growth_rate: int,
        *,
        layer: type[BasicLayer] | type[BottleneckLayer] = BottleneckLayer,
        compression: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_stages = len(num_layers)
        channels = 2 * growth_rate
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for number, depth in enumerate(num_layers, start=1):
            layers = [layer(channels + position * growth_rate, growth_rate) for position in range(depth)]
            self.add_module(f"dense{number}", nn.Sequential(*layers))
            channels += depth * growth_rate
            if number < self.num_stages:
                kept = int(compression * channels)
                self.add_module(f"trans{number}", Transition(channels, kept))
                channels = kept
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    @property
    def stage_norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The batch norm that takes each stage's maps; its output is the preact."""
        return (*(getattr(self, f"trans{number}").bn1 for number in range(1, self.num_stages)), self.bn)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images).logits

    def forward_with_features(self, images: Tensor) -> Outputs:
        preacts: list[Tensor] = []
        features: list[Tensor] = []
        maps = self.conv1(images)
        for number, norm in enumerate(self.stage_norms, start=1):
            if number > 1:
                maps = getattr(self, f"trans{number - 1}")(features[-1])
            preacts.append(norm(getattr(self, f"dense{number}")(maps)))
            features.append(F.relu(preacts[-1]))
        embedding = features[-1].mean((2, 3))  # (N, D, H, W) -> (N, D)
        return Outputs(self.fc(embedding), tuple(features), tuple(preacts), embedding)


@NETS.register("densenet")
def densenet(num_classes: int) -> nn.Module:
    """The ancestor's DenseNet-BC-100-12 for small images: 100 layers, growth rate 12, 0.77 M parameters.

    Source: Huang et al., "Densely Connected Convolutional Networks", 2017, section 3 and table 2.
    """
    net = DenseNet(num_classes, (16, 16, 16), 12)
    he_normal_by_fan_out(net)
    return net


@NETS.register("densenet40")
def densenet40(num_classes: int) -> nn.Module:
    """DenseNet-40-12 for small images, without bottlenecks and compression: 1.06 M parameters.

    Source: Huang et al., "Densely Connected Convolutional Networks", 2017, table 2.
    Deviation: as in ooodragon94/KD, the first convolution has 24 maps, not 16, and batch norms begin with scale 0.5.
    Its selectors of channels, which never learn, are left out.
    """
    net = DenseNet(num_classes, (12, 12, 12), 12, layer=BasicLayer, compression=1.0)
    he_normal_by_fan_out(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
    return net


@NETS.register("densenet_cifar")
def densenet_cifar(num_classes: int) -> nn.Module:
    """DenseNet-121 for small images with growth rate 12: 1.0 M parameters.

    Source: kuangliu/pytorch-cifar, models/densenet.py.
    """
    return DenseNet(num_classes, (6, 12, 24, 16), 12)


@NETS.register("densenet121")
def densenet121(num_classes: int) -> nn.Module:
    """DenseNet-121 with a stem for small images: 7.0 M parameters.

    Source: Huang et al., "Densely Connected Convolutional Networks", 2017, table 1; stem of kuangliu/pytorch-cifar.
    """
    return DenseNet(num_classes, (6, 12, 24, 16), 32)


@NETS.register("densenet161")
def densenet161(num_classes: int) -> nn.Module:
    """DenseNet-161 with a stem for small images: 26.5 M parameters.

    Source: Huang et al., "Densely Connected Convolutional Networks", 2017, table 1; stem of kuangliu/pytorch-cifar.
    """
    return DenseNet(num_classes, (6, 12, 36, 24), 48)


@NETS.register("densenet169")
def densenet169(num_classes: int) -> nn.Module:
    """DenseNet-169 with a stem for small images: 12.5 M parameters.

    Source: Huang et al., "Densely Connected Convolutional Networks", 2017, table 1; stem of kuangliu/pytorch-cifar.
    """
    return DenseNet(num_classes, (6, 12, 32, 32), 32)


@NETS.register("densenet201")
def densenet201(num_classes: int) -> nn.Module:
    """DenseNet-201 with a stem for small images: 18.1 M parameters.

    Source: Huang et al., "Densely Connected Convolutional Networks", 2017, table 1; stem of kuangliu/pytorch-cifar.
    """
    return DenseNet(num_classes, (6, 12, 48, 32), 32)

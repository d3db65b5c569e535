"""Published sizes, and closed forms from the architectures' tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch import Tensor, nn

from model import sizes
from model.errors import InputError


def rows(nets: list[str], **options: int | None) -> list[dict[str, str]]:
    """Returns the lines of the table as header -> cell."""
    header, _, *lines = sizes.table(nets, **{"image_size": 32, "num_classes": 10} | options).splitlines()
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    return [dict(zip(split[0], line, strict=True)) for line in split[1:]]


# (net, parameters, MB of weights and buffers, millions of MACs): the ancestors' nets as they were published.
@pytest.mark.parametrize(
    ("net", "options", "parameters", "megabytes", "macs"),
    [
        ("resnet152", {}, 58_156_618, 233.2, 3722),
        ("resnet18", {}, 11_173_962, 44.7, 555),
        ("cnn", {}, 357_514, 1.4, 10.6),
        ("torchvision/resnet152", {"image_size": 224, "num_classes": 1000}, 60_192_808, 241.4, 11514),
        ("torchvision/efficientnet_b0", {"image_size": 224, "num_classes": 1000}, 5_288_548, 21.3, 386),
    ],
)
def test_the_sizes_are_the_published_ones(
    net: str, options: dict[str, int], parameters: int, megabytes: float, macs: float
) -> None:
    (row,) = rows([net], **options)
    assert row["net"] == net
    assert row["parameters"] == f"{parameters:,}"
    assert round(float(row["weights and buffers (MB)"]), 1) == megabytes
    assert float(row["MACs (M)"].replace(",", "")) == pytest.approx(macs, rel=0.005)


def test_the_activations_of_resnet152_are_those_of_its_table() -> None:
    """He et al. 2015, table 1: [1x1 w, 3x3 w, 1x1 4w] x (3, 8, 36, 3); each convolution has a batch norm behind it."""
    stem, classifier = 2 * 64 * 32 * 32, 10
    blocks = shortcuts = 0
    for number, (depth, width) in enumerate(zip((3, 8, 36, 3), (64, 128, 256, 512), strict=True)):
        pixels = (32 >> number) ** 2
        before = pixels if number == 0 else 4 * pixels  # the first 1x1 convolution of a stage is before its stride
        blocks += 2 * (width * before + (depth - 1) * width * pixels + depth * (1 + 4) * width * pixels)
        shortcuts += 2 * 4 * width * pixels
    (row,) = rows(["resnet152"])
    assert row["activations"] == f"{stem + blocks + shortcuts + classifier:,}"
    size = int(row["parameters + activations"].replace(",", ""))
    assert size == 58_156_618 + stem + blocks + shortcuts + classifier
    assert round(size / 1e6) == 72  # the size that ooodragon94/KD's table gives it: "72M"


class Counted(nn.Module):
    """For images of 3x8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)  # 4 x 4x4 outputs
        self.bn = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        maps = self.bn(self.conv(images)).relu()
        return self.linear(maps.mean((2, 3))) + self.linear(maps.amax((2, 3)))


def test_activations_are_the_outputs_of_layers_that_have_weights_at_each_use() -> None:
    net = Counted().train()
    assert sizes.count_activations(net, (3, 8, 8)) == 4 * 16 + 4 * 16 + 5 + 5
    assert net.training
    assert not any(layer._forward_hooks for layer in net.modules())
    assert next(net.parameters()).device.type == "cpu"


def test_the_percentages_are_of_the_first_net() -> None:
    first, second = rows(["cnn", "cnn,num_channels=16"])
    assert (first["parameters (%)"], first["MACs (%)"]) == ("100.00", "100.00")
    assert second["parameters (%)"] == f"{100 * 90_186 / 357_514:.2f}"
    # 3x3 convolutions from 3 to C, 2C, 4C channels on 32x32, 16x16 and 8x8 maps; 64C to 4C to 10.
    macs = [9 * 1024 * (3 * c + c * 2 * c / 4 + 2 * c * 4 * c / 16) + 64 * c * 4 * c + 40 * c for c in (32, 16)]
    assert second["MACs (%)"] == f"{100 * macs[1] / macs[0]:.2f}"
    assert second["MACs (M)"] == f"{macs[1] / 1e6:.2f}"


def test_the_number_of_classes_counts() -> None:
    few, many = (int(rows(["cnn"], num_classes=n)[0]["parameters"].replace(",", "")) for n in (10, 100))
    assert many - few == 90 * (128 + 1)


def test_options_are_those_of_params_json() -> None:
    section = sizes.read_section('cnn,num_channels=8,dropout_rate=0.5,freeze=["conv1","bn1"],init=he')
    expected = {"name": "cnn", "num_channels": 8, "dropout_rate": 0.5, "freeze": ["conv1", "bn1"], "init": "he"}
    assert section.items() >= expected.items()


def test_an_experiment_directory_stands_for_its_student(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"student": {"name": "cnn", "num_channels": 8}}')
    assert rows([str(tmp_path)])[0]["parameters"] == "22,954"


def test_a_flat_experiment_directory_stands_for_its_student(tmp_path: Path) -> None:
    flat: dict[str, Any] = {"model_version": "cnn_distill", "teacher": "resnet18", "alpha": 0.9, "temperature": 20}
    flat |= {"learning_rate": 1e-3, "batch_size": 128, "num_epochs": 30, "dropout_rate": 0.5, "num_channels": 16}
    (tmp_path / "params.json").write_text(json.dumps(flat))
    assert rows([str(tmp_path)])[0]["parameters"] == "90,186"


def test_pretrained_weights_are_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    row, plain = rows(["torchvision/resnet18,pretrained=true", "torchvision/resnet18"])
    assert row["parameters"] == plain["parameters"]


@pytest.mark.parametrize(
    ("net", "told"),
    [
        ("cnm", "cnm: name: unknown net 'cnm'; did you mean 'cnn'?"),
        ("", ": name: unknown net ''; known: "),
        (
            "torchvision/resnt50",
            "torchvision/resnt50: name: unknown net 'torchvision/resnt50'; did you mean 'torchvision/resnet50'?",
        ),
        ("cnn,num_chanels=8", "cnn,num_chanels=8: num_chanels: unknown option; did you mean 'num_channels'?"),
        ("cnn,num_channels=0", "cnn,num_channels=0: num_channels: 0 is below 1"),
        ("cnn,num_channels=wide", "num_channels: expected a whole number, got 'wide'"),
        ("cnn,num_channels=8,num_channels=16", "num_channels is given twice"),
        ("cnn,name=tiny", "name is given twice"),
        ("cnn,8", "cnn,8: an option is name=value"),
        ("torchvision/inception_v3", "torchvision/inception_v3 with images of 32x32, 10 classes: "),
    ],
)
def test_a_net_that_cannot_be_measured_is_one_line(net: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        sizes.table(["tiny", net], 32, 10)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_of_what_a_net_says_the_first_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no room\nsecond line")

    monkeypatch.setattr(sizes.NETS, "create", refuse)
    with pytest.raises(InputError, match=r"^tiny with images of 32x32, 10 classes: no room$"):
        sizes.table(["tiny"], 32, 10)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "Expecting value"),
        ("[1]", 'has no "student"'),
        ('"model_version"', 'has no "student"'),
        ("{}", 'has no "student"'),
        ('{"student": 3}', 'expected {"name": ..., options}, got 3'),
        ('{"model_version": "cnm"}', "model_version: unknown"),
    ],
)
def test_a_params_json_that_cannot_be_used_is_one_line(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "params.json").write_text(content)
    with pytest.raises(InputError) as error:
        sizes.read_section(str(tmp_path))
    assert str(error.value).startswith(str(tmp_path))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["cnm"], "cnm: name: unknown net 'cnm'; did you mean 'cnn'?\n"),
        (["cnn", "--image_size", "0"], "--image_size: 0 is below 1\n"),
        (["cnn", "--num_classes", "-1"], "--num_classes: -1 is below 1\n"),
    ],
)
def test_a_mistake_ends_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["sizes.py", *arguments])
    assert sizes.main() == 2
    assert capsys.readouterr() == ("", told)


def test_the_command_prints_the_table() -> None:
    command = [sys.executable, "-m", "model.sizes", "resnet20", "tiny,width=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == sizes.table(["resnet20", "tiny,width=4"], 32, 10) + "\n"
    assert done.stderr == ""


S001 = str(ROOT / "experiments" / "s001" / "M_ce_lr2e-4")


def test_a_directorys_student_is_measured_for_its_datasets_images_and_classes() -> None:
    """Seed 001's student: 1,500,901 parameters and 176.6 M multiply-accumulates at 224 px with 101 classes."""
    student, tiny = rows([S001, "tiny"], image_size=None, num_classes=None)
    assert student["net"].endswith("(224 px, 101 classes)")
    assert (student["parameters"], student["MACs (M)"]) == ("1,500,901", "176.61")
    assert tiny["net"] == "tiny (32 px, 10 classes)"


def test_sizes_that_are_asked_for_hold_for_directories_too() -> None:
    (student,) = rows([S001], image_size=32, num_classes=10)
    (net,) = rows(["mobilenets_m"], image_size=32, num_classes=10)
    assert student | {"net": ""} == net | {"net": ""}


def test_a_row_says_that_a_projector_is_not_measured() -> None:
    pair = "experiments/cifar100/resnet56_to_resnet20"
    shown = sizes.table([str(ROOT / pair / "simkd"), str(ROOT / pair / "kd")])
    assert f"/{pair}/simkd (without simkd's projector)" in shown
    assert f"/{pair}/kd " in shown

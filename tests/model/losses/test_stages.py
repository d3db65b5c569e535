from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from model.errors import InputError
from model.losses.stages import Shape, Stages
from model.outputs import Outputs, Probe

RESNET152: list[Shape] = [(256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)]
EFFICIENTNET_B0: list[Shape] = [
    (16, 32, 32),
    (24, 16, 16),
    (40, 8, 8),
    (80, 4, 4),
    (112, 4, 4),
    (192, 2, 2),
    (320, 2, 2),
]


def probe_of(name: str, shapes: list[Shape]) -> Probe:
    maps = tuple(torch.empty(1, *shape, device="meta") for shape in shapes)
    return Probe(name, nn.Identity(), Outputs(torch.empty(1, 10, device="meta"), preacts=maps))


def stages_of(student: list[Shape], teacher: list[Shape]) -> Stages:
    return Stages("regress", "preacts", probe_of("small", student), probe_of("large", teacher))


def test_the_last_stages_of_each_size_that_both_have_are_paired() -> None:
    assert stages_of(EFFICIENTNET_B0, RESNET152).of_equal_size() == [(1, 1), (2, 2), (3, 3), (5, 4)]
    assert stages_of(RESNET152, EFFICIENTNET_B0).of_equal_size() == [(1, 1), (2, 2), (3, 3), (4, 5)]
    assert stages_of([(8, 16, 16), (8, 8, 8)], RESNET152).of_equal_size() == [(1, 2), (2, 3)]


def test_sizes_are_equal_in_height_and_width() -> None:
    assert stages_of([(8, 16, 8), (8, 8, 8)], [(4, 8, 16), (4, 16, 8)]).of_equal_size() == [(1, 2)]


def test_stages_are_counted_from_1() -> None:
    stages = stages_of(EFFICIENTNET_B0, RESNET152)
    assert stages.shapes(5, 4) == ((112, 4, 4), (2048, 4, 4))
    assert stages.shapes(1, 1) == ((16, 32, 32), (256, 32, 32))


HEAD = "loss 'regress' reads the stages' preacts: "
TAIL = "; student 'small' has 8x4x4, 8x2x2, teacher 'large' has 6x9x9; choose other stages or other nets"


@pytest.mark.parametrize(
    ("pair", "problem"),
    [((3, 1), "student 'small' has no stage 3"), ((2, 2), "teacher 'large' has no stage 2")],
)
def test_a_stage_that_does_not_exist_is_named_with_those_that_do(pair: tuple[int, int], problem: str) -> None:
    stages = stages_of([(8, 4, 4), (8, 2, 2)], [(6, 9, 9)])
    with pytest.raises(InputError, match=re.escape(HEAD + problem + TAIL)):
        stages.shapes(*pair)


def test_nets_without_a_common_size_are_refused() -> None:
    stages = stages_of([(8, 4, 4), (8, 2, 2)], [(6, 9, 9)])
    with pytest.raises(InputError, match=re.escape(HEAD + "they have no height and width in common" + TAIL)):
        stages.of_equal_size()


def test_nets_without_maps_are_refused() -> None:
    some: list[Shape] = [(8, 4, 4)]
    for student, teacher, who in (([], some, "student 'small'"), (some, [], "teacher 'large'")):
        with pytest.raises(InputError, match=f"{who} does not give them; .*{who} has none"):
            stages_of(student, teacher)

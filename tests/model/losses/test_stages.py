from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from model.errors import InputError
from model.losses.stages import Shape, StagedLoss, Stages, describe_pairs, paired
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


@pytest.mark.parametrize("by_size", [False, True])
def test_stages_that_are_named_meet_in_the_order_of_the_lists(by_size: bool) -> None:
    stages = stages_of(EFFICIENTNET_B0, RESNET152)
    assert stages.pairs([5, 1], [4, 1], by_size) == [(5, 4), (1, 1)]


def test_unnamed_stages_of_nets_with_as_many_meet_one_to_one_or_by_size() -> None:
    stages = stages_of([(8, 16, 16), (8, 8, 8), (8, 4, 4)], [(4, 32, 32), (4, 16, 16), (4, 8, 8)])
    assert stages.pairs() == [(1, 1), (2, 2), (3, 3)]
    assert stages.pairs(by_size=True) == [(1, 2), (2, 3)]


def test_unnamed_stages_of_nets_with_different_numbers_meet_by_size() -> None:
    for by_size in (False, True):
        pairs = stages_of(EFFICIENTNET_B0, RESNET152).pairs(None, None, by_size)
        assert pairs == [(1, 1), (2, 2), (3, 3), (5, 4)]


def test_maps_are_taken_in_pairs() -> None:
    student, teacher = (tuple(torch.full((), value) for value in values) for values in ((1.0, 2), (3.0, 4, 5)))
    pairs = [(2, 1), (1, 3)]
    assert [(own.item(), other.item()) for own, other in paired(pairs, student, teacher)] == [(2, 3), (1, 5)]
    assert describe_pairs(pairs) == "student stages [2, 1] to teacher stages [1, 3]"


@pytest.mark.parametrize(
    ("student_stages", "teacher_stages", "lists"),
    [
        ([1, 2], [2], "student_stages [1, 2] and teacher_stages [2]"),
        (None, [2], "student_stages null and teacher_stages [2]"),
        ([1], None, "student_stages [1] and teacher_stages null"),
    ],
)
def test_lists_of_different_lengths_are_refused(
    student_stages: list[int] | None, teacher_stages: list[int] | None, lists: str
) -> None:
    text = f"{lists} are not of one length; name as many stages of both, or of none"
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        StagedLoss(student_stages, teacher_stages)
    StagedLoss(None, None)
    StagedLoss([1, 2], [3, 1])


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
    with pytest.raises(InputError, match=re.escape(HEAD + problem + TAIL)):
        stages.pairs([pair[0]], [pair[1]])


def test_nets_without_a_common_size_are_refused() -> None:
    stages = stages_of([(8, 4, 4), (8, 2, 2)], [(6, 9, 9)])
    with pytest.raises(InputError, match=re.escape(HEAD + "they have no height and width in common" + TAIL)):
        stages.of_equal_size()


def test_nets_without_maps_are_refused() -> None:
    some: list[Shape] = [(8, 4, 4)]
    for student, teacher, who in (([], some, "student 'small'"), (some, [], "teacher 'large'")):
        with pytest.raises(InputError, match=f"{who} does not give them; .*{who} has none"):
            stages_of(student, teacher)

"""Oracles: convolutions and averages written as loops, known shapes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import created, maps_of, probe_of
from torch import nn

from model.errors import InputError
from model.losses.adapters import embedding_widths, fitting, match_sizes, unit
from model.losses.stages import Shape

# --- the convolution that fits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "kernel", "stride"),
    [
        ((4, 8, 8), (6, 4, 4), nn.Conv2d, (3, 3), (2, 2)),
        ((4, 2, 2), (6, 1, 1), nn.Conv2d, (3, 3), (2, 2)),
        ((4, 4, 4), (6, 8, 8), nn.ConvTranspose2d, (4, 4), (2, 2)),
        ((4, 2, 3), (6, 6, 9), nn.ConvTranspose2d, (5, 5), (3, 3)),
        ((4, 2, 2), (6, 8, 8), nn.ConvTranspose2d, (8, 8), (4, 4)),
        ((4, 1, 1), (6, 8, 8), nn.ConvTranspose2d, (16, 16), (8, 8)),
        ((4, 8, 8), (6, 8, 8), nn.Conv2d, (1, 1), (1, 1)),
        ((4, 8, 8), (6, 6, 6), nn.Conv2d, (3, 3), (1, 1)),
        ((4, 8, 8), (6, 2, 2), nn.Conv2d, (7, 7), (1, 1)),
        ((4, 8, 6), (6, 4, 3), nn.Conv2d, (3, 3), (2, 2)),
        ((4, 8, 6), (6, 4, 6), nn.Conv2d, (5, 1), (1, 1)),
    ],
)
def test_the_convolution_goes_by_the_ratio_of_sizes_and_fits(
    student: Shape, teacher: Shape, kind: type[nn.Module], kernel: tuple[int, int], stride: tuple[int, int]
) -> None:
    convolution: Any = fitting(student, teacher)
    assert type(convolution) is kind
    assert (convolution.kernel_size, convolution.stride) == (kernel, stride)
    assert convolution.bias is None
    assert convolution(torch.zeros(2, *student)).shape == (2, *teacher)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 4, 4), (6, 6, 6)), ((4, 4, 8), (6, 8, 8)), ((4, 8, 4), (6, 6, 6)), ((4, 2, 4), (6, 8, 8))],
)
def test_maps_that_are_enlarged_by_no_whole_number_have_none(student: Shape, teacher: Shape) -> None:
    assert fitting(student, teacher) is None


# --- sizes ------------------------------------------------------------------------------------------------------


def averaged(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the adaptive average, whose windows go from the floor to the ceiling of equal parts, as loops."""
    pooled = np.empty((*maps.shape[:2], height, width))
    for y in range(height):
        for x in range(width):
            rows = slice(y * maps.shape[2] // height, -(-(y + 1) * maps.shape[2] // height))
            columns = slice(x * maps.shape[3] // width, -(-(x + 1) * maps.shape[3] // width))
            pooled[:, :, y, x] = maps[:, :, rows, columns].mean(axis=(2, 3))
    return pooled


@pytest.mark.parametrize(
    ("student", "teacher", "size"),
    [
        ((8, 8), (4, 4), (4, 4)),
        ((4, 4), (8, 8), (4, 4)),
        ((8, 8), (6, 6), (6, 6)),
        ((5, 7), (7, 5), (5, 5)),
        ((4, 9), (8, 3), (4, 3)),
        ((3, 3), (3, 3), (3, 3)),
        ((1, 1), (4, 6), (1, 1)),
    ],
)
def test_the_larger_map_is_averaged_to_the_size_of_the_smaller(
    student: tuple[int, int], teacher: tuple[int, int], size: tuple[int, int]
) -> None:
    given = maps_of(3, *student), maps_of(2, *teacher, seed=1)
    for before, after in zip(given, match_sizes(*given), strict=True):
        assert after.shape == (6, before.shape[1], *size)
        expected = averaged(before.detach().numpy(), *size)
        np.testing.assert_allclose(after.detach().numpy(), expected, rtol=1e-12, atol=1e-15)


def test_maps_of_one_size_are_not_touched() -> None:
    student, teacher = maps_of(3, 5, 4), maps_of(2, 5, 4)
    assert match_sizes(student, teacher) == (student, teacher)


# --- norms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_get_length_1_and_those_of_zeros_stay_zeros_without_gradient(dtype: torch.dtype) -> None:
    vectors = torch.tensor([[3.0, 4], [0, 0], [1e-5, 0]], dtype=dtype, requires_grad=True)
    units = unit(vectors, dim=1)
    torch.testing.assert_close(units, torch.tensor([[0.6, 0.8], [0, 0], [1, 0]], dtype=dtype))
    (gradient,) = torch.autograd.grad(units.sum(), vectors)
    # Of (x + y) / r: (1 - x (x + y) / r^2) / r, and the same for y.
    torch.testing.assert_close(gradient[0], torch.tensor([0.032, -0.024], dtype=dtype))
    assert gradient[1].tolist() == [0, 0]


# --- embeddings -------------------------------------------------------------------------------------------------


def test_the_widths_of_both_embeddings_are_returned() -> None:
    assert embedding_widths("relate", probe_of("small", width=12), probe_of("large", width=16)) == (12, 16)


@pytest.mark.parametrize(("student", "teacher", "who"), [(None, 16, "student 'small'"), (12, None, "teacher 'large'")])
def test_a_net_without_embedding_is_named(student: int | None, teacher: int | None, who: str) -> None:
    text = f"loss 'relate' reads the embedding, the classifier's input: {who} does not give it; choose another net"
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        embedding_widths("relate", probe_of("small", width=student), probe_of("large", width=teacher))


@pytest.mark.parametrize("name", ["pkt", "rkd", "cc"])
def test_losses_of_embeddings_refuse_a_net_without_one(name: str) -> None:
    with pytest.raises(InputError, match=f"loss '{name}' reads the embedding, .*: teacher 'large' does not give it"):
        created(name).attach(probe_of("small", width=3), probe_of("large", (3, 4, 4)))

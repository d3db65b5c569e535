"""Addressable augmentation: every way an image can be shown has a number, and a hash picks the number.

So the view of a sample depends on nothing but (seed, epoch, index of the sample); a teacher's output can be
stored under the view it belongs to; and a whole batch is augmented with one gather.

View 0 is the plain image. In general, with `S = 2 * pad + 1`, a view is `mirroring * S * S + shift`. Mirroring counts
left to right before top to bottom, as far as each is allowed. The shift moves a window of the image's size over the
zero-padded image:

    cell = (shift + S * S // 2) % (S * S)       the window's place in row-major order, the centre being shift 0
    top, left = cell // S, cell % S             its corner in the padded image, 0..2 * pad
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.rng import derive_seed


@dataclass(frozen=True)
class Augmentation:
    """A family of views.

    Attributes:
        pad: Black pixels added on each side before a window of the image's own size is cut out.
        horizontal: Whether the window may be mirrored left to right.
        vertical: Whether the window may be mirrored top to bottom.
    """

    pad: int = 0
    horizontal: bool = False
    vertical: bool = False

    @property
    def num_views(self) -> int:
        return (2 * self.pad + 1) ** 2 * 2 ** (self.horizontal + self.vertical)

    def decode(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns what view numbers stand for.

        Returns:
            Top and left (0..2 * pad, `pad` being centred), mirrored left to right, mirrored top to bottom.
        """
        side = 2 * self.pad + 1
        cell = (views + side * side // 2) % (side * side)
        mirroring = views // (side * side)
        columns, rows = (mirroring % 2, mirroring // 2) if self.horizontal else (0 * mirroring, mirroring)
        return cell // side, cell % side, columns == 1, rows == 1


PLAIN = Augmentation()


def draw_views(seed: int, epoch: int, indices: Tensor, num_views: int) -> Tensor:
    """Draws a view for each sample, uniformly, as a function of (seed, epoch, index) only.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).

    Args:
        indices: `(N,)` int64, on the CPU.
        num_views: How many views there are.

    Returns:
        `(N,)` int64 in [0, num_views).
    """
    bits = indices.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits += np.uint64(derive_seed(seed, "view", epoch))
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    # scale the upper 32 bits instead of taking a remainder, which would favour small numbers
    views = (bits >> np.uint64(32)) * np.uint64(num_views) >> np.uint64(32)
    return torch.from_numpy(views.astype(np.int64))


def apply_views(images: Tensor, views: Tensor, augmentation: Augmentation) -> Tensor:
    """Shows each image of a batch under its view.

    Args:
        images: `(N, C, H, W)`, uint8 or any other type, not normalised (padding is 0, that is black).
        views: `(N,)` int64 on the same device, in [0, augmentation.num_views).
        augmentation: The family of views.

    Returns:
        The views, of the same shape and type.
    """
    if augmentation.num_views == 1:
        return images
    n, channels, height, width = images.shape
    top, left, mirrored, upside_down = augmentation.decode(views)
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    rows = torch.where(upside_down[:, None], height - 1 - y, y) + top[:, None]  # (N, H)
    columns = torch.where(mirrored[:, None], width - 1 - x, x) + left[:, None]  # (N, W)
    padded = F.pad(images, (augmentation.pad,) * 4)
    # (N, H, W) -> (N, 1, H*W): which pixel of the padded image each pixel of the view shows, for all channels
    pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).flatten(1)[:, None]
    return padded.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view(n, channels, height, width)

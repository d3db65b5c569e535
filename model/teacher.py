"""The frozen teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model import nets
from model.errors import InputError
from model.legacy import net_record
from model.outputs import Outputs


class FrozenTeacher(nn.Module):
    """A net that answers and never learns: always in eval mode, no gradient, no graph, buffers untouched.

    `no_grad` and not `inference_mode`: tensors of the latter cannot be saved for a student's backward.

    Args:
        net: Takes images normalised with its own training set's constants.
        mean, std: The constants that the images given to `forward` are normalised with, per channel.
        net_mean, net_std: The constants that `net` was trained with.
        name: What net it is, for messages.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        net_mean: Sequence[float] = (),
        net_std: Sequence[float] = (),
        name: str = "",
    ) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        self.name = name
        self.same_input = list(mean) == list(net_mean) and list(std) == list(net_std)
        if not self.same_input:
            a, b, c, d = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std, net_mean, net_std))
            self.register_buffer("scale", b / d, persistent=False)
            self.register_buffer("shift", (a - c) / d, persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode, whatever a surrounding module asks for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.net(self._own_view(images))

    @torch.no_grad()
    def forward_with_features(self, images: Tensor) -> Outputs:
        return self.net.forward_with_features(self._own_view(images))  # type: ignore[operator]

    def _own_view(self, images: Tensor) -> Tensor:
        return images if self.same_input else images * self.scale + self.shift


def create_teacher(
    state: Mapping[str, Any],
    where: str,
    student: Mapping[str, Any],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FrozenTeacher:
    """Returns the frozen net of a teacher's checkpoint, fitted to the student's data.

    Args:
        state: The teacher's checkpoint. One of the ancestor's does not say what net it is (`net` is None): then its
            directory's `params` do.
        where: Its file, for messages.
        student: The student's `net` record, as its checkpoint will hold it: classes, image shape, normalisation.
        mean, std: What the teacher's images were normalised with, if not with what its checkpoint says.

    Raises:
        InputError: The teacher was trained for other classes, another order of them, or other image sizes.
    """
    teacher = {**(state["net"] or net_record(state["params"], student))}
    for key, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) != student["shape"][0]:
            raise InputError(
                f"teacher.{key}: {len(given)} values for images of {student['shape'][0]} channels", "teacher"
            )
        teacher[key] = list(teacher[key] if given is None else given)
    if teacher["num_classes"] != student["num_classes"]:
        raise InputError(
            f"{where}: the teacher has {teacher['num_classes']} classes but the student has {student['num_classes']};"
            " train the teacher on the student's dataset",
            "teacher",
        )
    if teacher["classes"] != student["classes"]:
        pair = next(p for p in zip(teacher["classes"], student["classes"], strict=True) if p[0] != p[1])
        raise InputError(
            f"{where}: the teacher's classes differ from the student's or stand in another order, such as '{pair[0]}'"
            f" where the student has '{pair[1]}'; train the teacher on the student's dataset",
            "teacher",
        )
    if teacher["shape"] != student["shape"]:
        raise InputError(
            f"{where}: the teacher was trained on images of {teacher['shape']} but the student's are"
            f" {student['shape']}; use the same image size for both",
            "teacher",
        )
    net = nets.restore({**state, "net": teacher}, where)
    return FrozenTeacher(
        net, student["mean"], student["std"], teacher["mean"], teacher["std"], teacher["section"]["name"]
    )

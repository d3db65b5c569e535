"""The frozen teacher: it answers, from what it has answered before where that is kept, and never learns."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model import nets
from model.devices import autocast
from model.errors import InputError, Notice
from model.folding import cast_weights, fold_batch_norms
from model.legacy import net_record
from model.outputs import Batch, Outputs, answers, features_of, outputs_of
from model.taps import set_taps
from model.teacher_store import StoreFullError, TeacherStore

PENDING = 32  # batches whose answers wait to be written, so that a device is asked for them seldom


class FrozenTeacher(nn.Module):
    """A net that answers and never learns: always in eval mode, no gradient, no graph, buffers untouched.

    `no_grad` and not `inference_mode`: tensors of the latter cannot be saved for a student's backward.

    Args:
        net: Takes images normalised with its own training set's constants.
        mean, std: The constants that the images given to `forward` are normalised with, per channel.
        net_mean, net_std: The constants that `net` was trained with.
        name: What net it is, for messages.
        fingerprint: What tells it from any other teacher: see `fingerprint_of`.
        accuracy: On validation, in its own run, if that is known.

    Attributes:
        precision: What it computes in.
        num_folded: How many of its batch norms are part of the convolutions before them.
        stores: Lists of samples, and where its answers for them are kept.
        num_computed: For how many images it was asked and the net had to run.
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
        fingerprint: str = "",
        accuracy: float | None = None,
    ) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        self.name = name
        self.fingerprint = fingerprint
        self.accuracy = accuracy
        self.precision = "fp32"
        self.num_folded = 0
        self.stores: list[tuple[Any, TeacherStore]] = []
        self.num_computed = 0
        self.input = {"mean": list(mean), "std": list(std), "net_mean": list(net_mean), "net_std": list(net_std)}
        self.same_input = self.input["mean"] == self.input["net_mean"] and self.input["std"] == self.input["net_std"]
        if not self.same_input:
            a, b, c, d = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std, net_mean, net_std))
            self.register_buffer("scale", b / d, persistent=False)
            self.register_buffer("shift", (a - c) / d, persistent=False)
        self.train(False)

    @property
    def members(self) -> list[FrozenTeacher]:
        """Those who answer: itself. Several together are an ensemble."""
        return [self]

    @staticmethod
    def of(members: Sequence[FrozenTeacher]) -> FrozenTeacher:
        """Returns what the same teacher is with other `members`: the only one of them."""
        [teacher] = members
        return teacher

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode, whatever a surrounding module asks for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with autocast(self.precision, images.device):
            return self.net(self._own_view(images))

    @torch.no_grad()
    def forward_with_features(self, images: Tensor) -> Outputs:
        with autocast(self.precision, images.device):
            return features_of(self.net, self._own_view(images))

    def _own_view(self, images: Tensor) -> Tensor:
        return images if self.same_input else images * self.scale + self.shift

    def fast(self, precision: str, needs: frozenset[str], shape: Sequence[int]) -> FrozenTeacher:
        """Returns a copy that answers the same but for rounding, and faster.

        Args:
            precision: What it computes in.
            needs: What it will be asked for.
            shape: `(C, H, W)` of the images.
        """
        quick = copy.copy(self)
        quick._modules = {}
        folded, quick.num_folded = fold_batch_norms(self.net, needs, shape)
        quick.net = cast_weights(folded, precision).to(memory_format=torch.channels_last)
        quick.precision = precision
        quick.stores = []
        return quick

    @contextlib.contextmanager
    def lesson(self, loader: Any, epoch: int, needs: frozenset[str]) -> Iterator[Callable[[Batch], Outputs]]:
        """Yields what answers for the batches of an epoch of a loader: from its store, if there is one.

        Args:
            loader: Whose batches will be shown.
            epoch: From 0.
            needs: Which fields of `Outputs` are asked for.
        """
        store = self.store_of(loader)
        if store is None:
            yield partial(self.compute, needs)
            return
        recall = _Recall(store, partial(self.compute, needs), loader.seed, epoch, needs | {"logits"})
        try:
            yield recall
        except BaseException:
            with contextlib.suppress(InputError):  # the error itself matters more
                recall.write()
            raise
        recall.write()

    def store_of(self, loader: Any) -> TeacherStore | None:
        """Returns where the answers for a loader's list of samples are kept, if they are."""
        return next((store for split, store in self.stores if split is loader.split), None)

    def compute(self, needs: frozenset[str], batch: Batch) -> Outputs:
        """Returns what the net makes of a batch; no store is asked."""
        self.num_computed += len(batch.labels)
        return answers(partial(outputs_of, self), batch, needs)


class _Recall:
    """Answers from a store; what that lacks is computed, in one forward a batch, and kept.

    Args:
        store: Shared with whoever else trains under this teacher.
        compute: Returns the teacher's outputs for a batch.
        seed, epoch: What views without a number are drawn for.
        fields: The outputs that are asked for.
    """

    def __init__(
        self, store: TeacherStore, compute: Callable[[Batch], Outputs], seed: int, epoch: int, fields: frozenset[str]
    ) -> None:
        self.store = store
        self.compute = compute
        self.key = seed, epoch
        self.fields = sorted(fields)
        self.pending: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
        self.full = False

    def __call__(self, batch: Batch) -> Outputs:
        device = batch.images.device
        values, valid = self.store.read(batch.indices, batch.views, *self.key)
        answers = {field: values[field].to(device, non_blocking=True) for field in self.fields}
        if not valid.all():
            rows = (~valid).nonzero().flatten()
            part = batch.part(rows) if len(rows) < len(valid) else batch
            outputs = self.compute(part)
            # Through the type of the store: what is computed today equals what is read tomorrow.
            computed = {field: self.store.stored(field, getattr(outputs, field)) for field in self.fields}
            places = rows.to(device, non_blocking=True)
            answers = {field: answers[field].index_copy(0, places, computed[field]) for field in self.fields}
            if not self.full:
                self.pending.append((computed, part.indices, part.views))
            if len(self.pending) == PENDING:
                self.write()
        return Outputs(answers["logits"], embedding=answers.get("embedding"))

    def write(self) -> None:
        """Writes what was computed; without room for it training goes on, and computes it again another time."""
        if not self.pending:
            return
        outputs, samples, views = zip(*self.pending, strict=True)
        self.pending = []
        together = {field: torch.cat([each[field] for each in outputs]).cpu() for field in self.fields}
        try:
            self.store.write(together, torch.cat(samples), torch.cat(views), *self.key)
        except StoreFullError as error:
            self.full = True  # for this epoch
            warnings.warn(f"{error}; training goes on without keeping the teacher's answers", Notice, stacklevel=2)


def fingerprint_of(weights: Mapping[str, Tensor], section: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a net's options, weights and buffers, as a checkpoint has them."""
    digest = hashlib.sha256(json.dumps(section, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def create_teacher(state: Mapping[str, Any], section: Mapping[str, Any], student: Mapping[str, Any]) -> FrozenTeacher:
    """Returns the frozen net of a teacher's checkpoint, fitted to the student's data.

    Args:
        state: The teacher's checkpoint. One of the ancestor's does not say what net it is (`net` is None): then its
            directory's `params` do.
        section: The resolved `teacher` section.
        student: The student's `net` record, as its checkpoint will hold it: classes, image shape, normalisation.

    Raises:
        InputError: The teacher was trained for other classes, another order of them, or other image sizes.
    """
    where = f"teacher {section['model_dir']}"
    teacher = {**(state["net"] or net_record(state["params"], student))}
    for key in ("mean", "std"):
        given = section[key]
        if given is not None and len(given) != student["shape"][0]:
            raise InputError(
                f"{where}: {key}: {len(given)} values for images of {student['shape'][0]} channels", "teacher"
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
    if section["stages"] is not None:
        set_taps(net, section["stages"])
    name, constants = teacher["section"]["name"], (student["mean"], student["std"], teacher["mean"], teacher["std"])
    accuracy = state.get("metrics", {}).get("accuracy")
    return FrozenTeacher(net, *constants, name, fingerprint_of(state["state_dict"], teacher["section"]), accuracy)

"""From a dataset as it is read to the loaders of a run: carve, subset, normalise, fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from model.data import augmentations
from model.data.augmentations import Augmenting, Canvas, Listed
from model.data.images import AnySplit, FileSplit, Images, Split, ancestor_subset, divide_per_class
from model.data.joined import JoinedLoader
from model.data.loader import BatchLoader, Loader
from model.data.stream import StreamLoader
from model.errors import InputError
from model.outputs import Samples
from model.rng import derive_seed


@dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        train: Shuffled and augmented.
        val: Plain images: carved from the training list, the dataset's own, or the test split (see `selected_on`).
        test: Plain images, if the dataset has a test split. Only `evaluate.py` reads it.
        classes: The name of each label.
        shape: `(C, H, W)` of an image.
        mean: Per channel, on a [0, 1] scale.
        std: Per channel, on the same scale.
        augmentation: The transforms of training images, in their order.
        selected_on: What `val` is: `val`, or `test` where epochs are selected on the test split.
        fingerprint: SHA-256 over what is trained on, validated on, and the class names.
        summary: One line about all this.
        second: The training samples under their second view, if they have one.
        unlabelled: Images without labels, if there are any.
    """

    train: Loader
    val: Loader
    test: Loader | None
    num_classes: int
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: list[dict[str, Any]]
    selected_on: str
    fingerprint: str
    summary: str
    second: Loader | None = None
    unlabelled: Loader | None = None

    @property
    def lessons(self) -> Loader | JoinedLoader:
        """What is trained on: `train`, with what comes to its batches from other loaders."""
        if self.second is None and self.unlabelled is None:
            return self.train
        return JoinedLoader(self.train, self.second, self.unlabelled)

    def samples(self) -> Samples:
        """Returns what is trained on, for a loss that keeps something of each sample."""
        labels = torch.full((len(self.train.split),), -1)
        labels[self.train.indices] = self.train.split.labels.cpu()[self.train.indices]
        return Samples(labels, self.num_classes)

    def share(self, part: int, parts: int) -> None:
        """Leaves this process one of so many parts of every batch, as `Loader.share`; those of `val` grow with them."""
        if parts > 1:
            for loader in (self.train, self.second, self.unlabelled):
                if loader is not None:
                    loader.share(part, parts)
            self.val.batch_size = max(2, self.val.batch_size) * parts  # a matter of memory, of which each has its own
            self.val.share(part, parts)

    def facts(self) -> dict[str, Any]:
        """Returns what a checkpoint must say of the data for its net to be used again, as plain types."""
        plain = {name: list(getattr(self, name)) for name in ("classes", "shape", "mean", "std")}
        return {"num_classes": self.num_classes, **plain}


def prepare(
    images: Images,
    name: str,
    seed: int,
    device: torch.device,
    *,
    batch_size: Annotated[int, Field(ge=2, le=65536)] = 128,
    eval_batch_size: Annotated[int, Field(ge=1, le=65536)] = 512,
    augmentation: Augmenting = None,
    second_augmentation: Augmenting = None,
    validate_on: Literal["val", "test"] = "val",
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    val_seed: int = 0,
    subset_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0,
    subset_rule: Literal["per_class", "ancestor"] = "per_class",
    mean: list[float] | None = None,
    std: list[Annotated[float, Field(gt=0)]] | None = None,
    num_workers: Annotated[int, Field(ge=0, le=256)] | None = None,
) -> Data:
    """Turns a dataset into the loaders of a run. Its options are common to all datasets.

    Args:
        images: The dataset.
        name: What to call it.
        seed: The run's seed: decides order and views, but neither the validation split nor the subset.
        device: Where the batches are made.
        batch_size: Training samples per step; a last batch of one sample is joined to the batch before it.
        eval_batch_size: Validation and test samples per step: a matter of speed and memory.
        augmentation: Random views of training images: zero-padded 4-pixel crop, mirroring, or a list of transforms in
            their order, each a name or `{"name": ..., options}`; null: the dataset's own.
        second_augmentation: Of a second view of each training image, for losses that compare two; null: there is none.
        validate_on: `test`: nothing is carved, and epochs are selected on the test split, whose scores then flatter.
        val_fraction: Share of each class of the training list that is kept for validation; unused with an own split.
        val_seed: Picks the validation split and the subset, so that runs with different seeds share them.
        subset_fraction: Share of each class (at least one image) to train on, of what validation leaves.
        subset_rule: `ancestor`: not of each class, but the first of a list shuffled with numpy's legacy seed 230.
        mean: Normalisation per channel on a [0, 1] scale; null: the dataset's.
        std: Normalisation per channel on a [0, 1] scale; null: the dataset's.
        num_workers: Processes that decode and transform images, for speed only; 0: none; null: none for images in
            memory, for files one per core, at most 8. Views that can be numbered need none in memory.

    Raises:
        InputError: A class would be without training or validation images, or an option does not fit the data.
    """
    if len(images.classes) < 2:
        raise InputError(f"dataset {name!r} has no classes to learn; name it as unlabelled", "data")
    mean_used = _constants("mean", mean, images.mean, images)
    std_used = _constants("std", std, images.std, images)
    if min(std_used) <= 0:
        raise InputError(f"dataset.std: {list(std_used)} is not above 0 in every channel; give dataset.std", "data")
    chosen = images.augmentation if augmentation is None else augmentation
    sections = _transforms("augmentation", chosen)
    division = _divide(images, name, validate_on, val_fraction, val_seed)
    labels = images.train.labels[division.train]
    train_indices = division.train[_subset(labels, subset_fraction, subset_rule, val_seed)]

    def loader(
        split: AnySplit, indices: Tensor, size: int, shown: Sequence[dict[str, Any]] = (), **changes: Any
    ) -> Loader:
        options: dict[str, Any] = {"indices": indices, "batch_size": size, "mean": mean_used, "std": std_used}
        options |= {"seed": seed, "device": device, **changes}
        return make_loader(split, shown, num_workers=num_workers, **options)

    train = loader(images.train, train_indices, batch_size, sections, shuffle=True)
    second = None
    if second_augmentation is not None:
        transforms = _transforms("second_augmentation", second_augmentation)
        # The same samples in the same order; but what is drawn for a sample is drawn anew.
        apart = {"seed": derive_seed(seed, "second"), "order_seed": seed}
        second = loader(train.split, train_indices, batch_size, transforms, shuffle=True, **apart)
    # A carved validation split shares the training split's images, also those on the device.
    val_split = train.split if division.val_split is images.train else division.val_split
    val = loader(val_split, division.val, eval_batch_size)
    if validate_on == "test":
        test: Loader | None = val
    else:
        test = loader(images.test, torch.arange(len(images.test)), eval_batch_size) if images.test else None
    used = (images.train, train_indices), (division.val_split, division.val)
    subset_note = "" if subset_fraction == 1 else f" (subset {subset_fraction:g})"
    return Data(
        train=train,
        val=val,
        test=test,
        num_classes=len(images.classes),
        classes=images.classes,
        shape=images.train.shape,
        mean=mean_used,
        std=std_used,
        augmentation=sections,
        selected_on=validate_on,
        fingerprint=_fingerprint(images.classes, *used),
        summary=(
            f"{name}: {train.num_samples:,} train{subset_note}, {division.note}, "
            f"{f'{test.num_samples:,}' if test else 'no'} test images of {'x'.join(map(str, images.train.shape))}, "
            f"{len(images.classes):,} classes, augmentation {_describe(chosen, train)}"
            f"{f', second view {_describe(second_augmentation, second)}' if second and second_augmentation else ''}"
        ),
        second=second,
    )


pipeline_options = prepare  # what it is to a registry: the keyword-only parameters are the common options


def add_unlabelled(splits: Data, images: Images | None, name: str, options: dict[str, Any]) -> Data:
    """Returns the data of a run with images that have no labels, or whose labels are not to be used.

    Args:
        splits: The labelled data.
        images: Their training split is taken, but for what the run validates or is tested on; None: that of the
            labelled data, but for what is trained on, too.
        name: What to call them.
        options: As `unlabelled_options` describes them.

    Raises:
        InputError: There are none, they have another shape, or only one of the two datasets is streamed.
    """
    train = splits.train
    split: AnySplit = train.split if images is None else images.train
    indices = torch.arange(len(split))
    if images is None:
        indices = indices[~torch.isin(indices, train.indices)]
    if split.shape != splits.shape:
        line = f"unlabelled: its images are {split.shape}, those of dataset {splits.shape}; give both one size"
        raise InputError(line, "data")
    # No image may be learnt from that selects an epoch or scores the net, wherever else it lies.
    held_out = [(loader.split, loader.indices) for loader in (splits.val, splits.test) if loader is not None]
    if isinstance(split, FileSplit) != isinstance(train.split, FileSplit):
        line = "unlabelled: only one of it and dataset is streamed, so that validation images would not be found there"
        raise InputError(f"{line}; stream both or neither", "data")
    known = {key for other, positions in held_out for key in other.keys(positions)}
    indices = indices[torch.tensor([key not in known for key in split.keys(indices)], dtype=torch.bool)]
    if len(indices) < 2:
        way = "lower dataset.subset_fraction, or name other images"
        raise InputError(f"unlabelled: dataset leaves {len(indices)} of its training images over; {way}", "data")
    given = options["augmentation"]
    sections = splits.augmentation if given is None else _transforms("augmentation", given, "unlabelled")
    loader = make_loader(
        split,
        sections,
        num_workers=options["num_workers"],
        indices=indices,
        batch_size=options["batch_size"],
        mean=splits.mean,
        std=splits.std,
        shuffle=True,
        seed=derive_seed(train.seed, "unlabelled"),
        device=train.device,
    )
    digest = hashlib.sha256(f"{splits.fingerprint} unlabelled".encode())
    split.update(digest, indices)
    at_once = min(options["batch_size"], len(indices))
    line = f"{splits.summary}; {len(indices):,} unlabelled images of {name}, {at_once} to a step"
    return replace(splits, unlabelled=loader, fingerprint=digest.hexdigest(), summary=line)


def unlabelled_options(
    *,
    batch_size: Annotated[int, Field(ge=2, le=65536)] = 128,
    augmentation: Augmenting = None,
    num_workers: Annotated[int, Field(ge=0, le=256)] | None = None,
) -> None:
    """Images without labels, for the losses that need none: a dataset, or `rest`.

    Args:
        batch_size: How many come to the labelled samples of each step.
        augmentation: As for `dataset`; null: that of `dataset`.
        num_workers: As for `dataset`.
    """


def _transforms(key: str, chosen: Any, section: str = "dataset") -> list[dict[str, Any]]:
    """Returns the resolved transforms that an augmentation stands for."""
    sections, problems = augmentations.resolve(chosen)
    if problems:
        raise InputError("; ".join(f"{section}.{key}.{part}: {text}" for part, text in problems))
    return sections


def make_loader(
    split: AnySplit, shown: Sequence[dict[str, Any]], *, num_workers: int | None, mean: Sequence[float], **options: Any
) -> Loader:
    """Returns the loader that suits a split and what is to be done with its images."""
    views = augmentations.as_views(shown)
    if views is None:
        transforms = augmentations.create(shown, Canvas(split.shape, tuple(mean)))
        if isinstance(split, Split):  # another loader may have moved it: what is drawn image by image is drawn here
            split = split.to(torch.device("cpu"))
        return StreamLoader(split, transforms=transforms, num_workers=num_workers, mean=mean, **options)
    if isinstance(split, FileSplit):
        return StreamLoader(split, augmentation=views, num_workers=num_workers, mean=mean, **options)
    return BatchLoader(split, augmentation=views, mean=mean, **options)


@dataclass(frozen=True)
class _Division:
    """What is trained on and validated on: positions in the training list, and in a list that may be the same."""

    train: Tensor
    val_split: AnySplit
    val: Tensor
    note: str


def _divide(images: Images, name: str, validate_on: str, val_fraction: float, val_seed: int) -> _Division:
    everything = torch.arange(len(images.train))
    if validate_on == "test":
        if images.test is None:
            raise InputError(f"dataset.validate_on: dataset {name!r} has no test split; validate on val", "data")
        return _Division(everything, images.test, torch.arange(len(images.test)), "val IS THE TEST SPLIT")
    if images.val is not None:
        note = f"{len(images.val):,} val (the dataset's own)"
        return _Division(everything, images.val, torch.arange(len(images.val)), note)
    seed = derive_seed(val_seed, "val")
    val, train = divide_per_class(images.train.labels, val_fraction, seed, round_down=images.round_down)
    _check_classes(images, val_fraction, train, val)
    return _Division(train, images.train, val, f"{len(val):,} val (carved, seed {val_seed})")


def _subset(labels: Tensor, fraction: float, rule: str, seed: int) -> Tensor:
    """Returns which positions of a list with these labels to train on, ascending."""
    if rule == "per_class":
        return divide_per_class(labels, fraction, derive_seed(seed, "subset"), at_least=1)[0]
    taken = ancestor_subset(len(labels), fraction)
    if len(taken) < 2:  # of one image a batch norm has no statistics
        line = f"{fraction:g} of {len(labels)} images is {len(taken) or 'none'}; raise it to 2 images at least"
        raise InputError(f"dataset.subset_fraction: {line}", "data")
    return taken.sort().values


def _describe(chosen: str | Listed, train: Loader) -> str:
    if not isinstance(chosen, str):
        chosen = " + ".join(e if isinstance(e, str) else e["name"] for e in chosen) or "none"
    views = "" if train.num_views is None else f" ({train.num_views} view{'s' * (train.num_views > 1)})"
    return f"{chosen}{views}"


def _constants(
    key: str, given: Sequence[float] | None, default: tuple[float, ...], images: Images
) -> tuple[float, ...]:
    values = default if given is None else tuple(given)
    channels = images.train.shape[0]
    if len(values) != channels:
        raise InputError(
            f"dataset.{key}: {len(values)} value{'s' * (len(values) != 1)} given but the images have {channels} "
            "channels; give one for each",
            "data",
        )
    return values


def _check_classes(images: Images, val_fraction: float, train_indices: Tensor, val_indices: Tensor) -> None:
    labels, num_classes = images.train.labels, len(images.classes)
    for_training = labels[train_indices].bincount(minlength=num_classes)
    for_validation = labels[val_indices].bincount(minlength=num_classes)
    short = ((for_training == 0) | (for_validation == 0)).nonzero().flatten().tolist()
    if short:
        others = f" (and {len(short) - 1} more classes)" if len(short) > 1 else ""
        raise InputError(
            f"dataset.val_fraction: {val_fraction} leaves class '{images.classes[short[0]]}'{others} with "
            f"{for_training[short[0]]} training and {for_validation[short[0]]} validation images; "
            "each class needs one of both: change val_fraction or add images",
            "data",
        )


def _fingerprint(classes: tuple[str, ...], *parts: tuple[AnySplit, Tensor]) -> str:
    digest = hashlib.sha256(repr(classes).encode())
    for split, indices in parts:
        split.update(digest, indices)
    return digest.hexdigest()

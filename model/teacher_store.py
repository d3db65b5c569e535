"""Stored outputs of a frozen teacher, in files that many runs read and fill at once.

A store is a folder `<root>/<digest of its manifest>`:

    manifest.json                                 all that the outputs depend on: net, data, preprocessing, precision
    logits-10-fp16.rows, .checks                  a table: row `sample * num_views + view`, and a check of each row
    logits-10-fp16-seed_1-epoch_7.rows, .checks   the same where views have no numbers: a table per epoch, row `sample`

A row counts as stored only if its check, a hash of its place and all its bytes, fits. There is no lock, no journal and
no order of writing to rely on: whatever a crash, a full disk, a network file system or two writers of slightly
different bits leave behind is a row whose check does not fit, and such a row is computed again.

Files have their full size from the start, with holes where no rows are stored. They are read through a memory map and
written with `pwrite`, to which a full disk is an error; to a write through a map it would be a fatal signal.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import runpy
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.errors import InputError

Array = np.ndarray[Any, Any]

FORMAT = 1
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
CHUNK = 1 << 16  # 4-byte words or rows at a time: what is made of them in between stays in the processor's cache


class StoreFullError(InputError):
    """Outputs cannot be stored; what was stored before is as good as ever, and a run can go on without storing."""


class StoreSizeError(StoreFullError):
    """They need more room than is allowed, or than the disk has; nothing was written."""


# --- numbers to words and back ---


@dataclass(frozen=True)
class Column:
    """One field of the outputs and how its values are stored; a row is a whole number of 4-byte words.

    With `top_k`, a row has the k largest values with their classes, and one number for the others, the tail:
    `log(mean(exp(tail)))`. Reading gives that number to all of the tail. So at temperature 1 the k probabilities and
    the mass of the tail are exact, up to the rounding of `dtype`; how the mass is spread within the tail is lost, and
    the total variation distance to the true probabilities is at most that mass. `top_k_error` measures it, also at
    higher temperatures, where the tail weighs more and its mass is not exact any more.

    Attributes:
        field: `logits` or `embedding`.
        width: Values per row as they are read.
        dtype: `fp16` or `fp32`.
        top_k: How many classes are stored, fewer than `width`; None for all.
    """

    field: str
    width: int
    dtype: str
    top_k: int | None = None

    @property
    def name(self) -> str:
        return f"{self.field}-{self.width}{f'-top{self.top_k}' if self.top_k else ''}-{self.dtype}"

    @property
    def words(self) -> int:
        """4-byte words per row."""
        size = DTYPES[self.dtype].itemsize
        if self.top_k is None:
            return math.ceil(self.width * size / 4)
        return math.ceil((self.top_k + 1) * size / 4) + math.ceil(self.top_k * self._index_dtype.itemsize / 4)

    def encode(self, values: Tensor) -> Tensor:
        """Returns what is stored of values `(n, width)`: `(n, words)` int32 on the same device."""
        dtype = DTYPES[self.dtype]
        if self.top_k is None:
            return _as_words(values.to(dtype))
        values = values.float()
        kept, classes = values.topk(self.top_k, dim=1)
        tail = values.scatter(1, classes, -math.inf)
        # Not by logsumexp: of equal values this gives just that value, so what was read can be stored again as it is.
        largest = tail.amax(dim=1, keepdim=True)
        level = largest + ((tail - largest).exp().sum(dim=1, keepdim=True) / (self.width - self.top_k)).log()
        numbers = torch.cat([kept, level], dim=1).to(dtype)
        return torch.cat([_as_words(numbers), _as_words(classes.to(self._index_dtype))], dim=1)

    def decode(self, words: Tensor) -> Tensor:
        """Returns the values that words stand for, `(n, width)` float32 on the same device."""
        dtype = DTYPES[self.dtype]
        if self.top_k is None:
            return words.view(dtype)[:, : self.width].float()
        split = math.ceil((self.top_k + 1) * dtype.itemsize / 4)
        numbers = words[:, :split].view(dtype)[:, : self.top_k + 1].float()
        classes = words[:, split:].view(self._index_dtype)[:, : self.top_k].long()
        values = numbers[:, -1:].repeat(1, self.width)
        # clamped, because words that do not fit their check come here too
        return values.scatter_(1, classes.clamp_(0, self.width - 1), numbers[:, :-1])

    @property
    def _index_dtype(self) -> torch.dtype:
        return torch.int16 if self.width <= 1 << 15 else torch.int32


def _as_words(values: Tensor) -> Tensor:
    if values.element_size() == 2:
        values = F.pad(values, (0, values.shape[1] % 2))
    return values.contiguous().view(torch.int32)


def top_k_error(logits: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Returns what storing only the k largest logits does to the teacher's probabilities.

    Args:
        logits: `(N, C)`.
        k: Classes stored.
        temperature: Of the softmax, on both sides.

    Returns:
        `(N,)`, the total variation distance: half the sum of the absolute differences, 0 to 1.
    """
    if k >= logits.shape[1]:
        return logits.new_zeros(len(logits))
    column = Column("logits", logits.shape[1], "fp32", k)
    true, restored = (F.softmax(x.float() / temperature, dim=1) for x in (logits, column.decode(column.encode(logits))))
    return (true - restored).abs().sum(dim=1) / 2


# --- words to files and back ---


class Table:
    """A file of rows of 4-byte words and a file of their checks.

    The check of a row with the words w is multilinear: the upper half of `m[0] + m[1] * number of the row + m[2] * w[0]
    + m[3] * w[1] + ...` modulo 2^64. Over random multipliers m, rows that differ, in whatever way, have the same check
    with a probability of 2^-32. Here they follow from the names of the store and the table, so that the rows of one
    table fit in no other. A check of 0 stands for a row never written; one that comes out as 0 is stored as 1.

    Source: Lemire and Kaser, "Strongly universal string hashing is fast", The Computer Journal 57(7), 2014.

    Args:
        path: The two files, without `.rows` and `.checks`.
        words: Per row.
        num_rows: At least 1.
    """

    def __init__(self, path: Path, words: int, num_rows: int) -> None:
        self.words = words
        self.num_rows = num_rows
        self.files = {Path(f"{path}.rows"): 4 * words * num_rows, Path(f"{path}.checks"): 4 * num_rows}
        key = hashlib.shake_256(f"{path.parent.name}/{path.name}".encode()).digest(8 * (words + 2))
        self._multipliers = np.frombuffer(key, np.uint64)
        self._maps: list[Array] = []

    @property
    def bytes(self) -> int:
        """The size of both files when all rows are stored."""
        return sum(self.files.values())

    def read(self, rows: Array) -> tuple[Array, Array]:
        """Returns `(n, words)` uint32 and, `(n,)`, which of them are stored; the others are of any value."""
        words = np.zeros((len(rows), self.words), np.uint32)
        stored = np.zeros(len(rows), bool)
        if not self._mapped():
            return words, stored
        step = max(CHUNK // self.words, 1)
        for start in range(0, len(rows), step):
            checks = self._maps[1].take(rows[start : start + step])
            found = np.flatnonzero(checks)
            places, checks = start + found, checks[found]
            # Copied before it is checked: what another process writes meanwhile does not matter any more.
            copies = self._maps[0].take(rows[places], axis=0)
            words[places] = copies
            stored[places] = self._check(copies, rows[places]) == checks
        return words, stored

    def written(self, rows: Array | None = None) -> Array:
        """Returns which rows, of all if None, have a check at all; whether it fits, `read` finds out."""
        if not self._mapped():
            return np.zeros(self.num_rows if rows is None else len(rows), bool)
        checks = self._maps[1]
        return (checks if rows is None else checks.take(rows)) != 0

    def create(self) -> None:
        """Makes the files in their full size, so that whoever looks for room sees what they will take.

        Raises:
            OSError: The disk is full or refuses for another reason.
        """
        for (path, size), holes in zip(self.files.items(), (True, False), strict=True):
            file = _open(path, size, holes)
            os.close(file)

    def write(self, words: Array, rows: Array) -> None:
        """Stores words `(n, words)` uint32; of a row that is given twice, the last.

        Raises:
            OSError: The disk is full or refuses for another reason.
        """
        order = np.argsort(rows, kind="stable")
        words, rows = words[order], rows[order]
        ends = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        runs = [(first, last, int(rows[first])) for first, last in itertools.pairwise(ends)]
        for (path, size), content in zip(self.files.items(), (words, self._check(words, rows)), strict=True):
            data, width = memoryview(content.data).cast("B"), content.nbytes // len(rows)
            file = _open(path, size, holes=content is words)
            try:
                for first, last, row in runs:
                    _write_at(file, data[first * width : last * width], row * width)
            finally:
                os.close(file)

    def _check(self, words: Array, rows: Array) -> Array:
        multipliers = self._multipliers
        checks = np.empty(len(rows), np.uint32)
        step = max(CHUNK // self.words, 1)
        for start in range(0, len(rows), step):
            total = words[start : start + step].astype(np.uint64) @ multipliers[2:]
            total += multipliers[0] + multipliers[1] * rows[start : start + step].astype(np.uint64)
            checks[start : start + step] = total >> np.uint64(32)
        return np.maximum(checks, np.uint32(1), out=checks)

    def _mapped(self) -> bool:
        """Maps the files, once they have their full size: a map of more than there is would be a fatal signal."""
        if not self._maps:
            sizes = [_size(path) for path in self.files]
            if any(size < full for size, full in zip(sizes, self.files.values(), strict=True)):
                return False
            rows, checks = (_map(path, size) for path, size in self.files.items())
            self._maps = [rows.reshape(self.num_rows, self.words), checks]
        return True


def _open(path: Path, size: int, holes: bool) -> int:
    """Opens a file, which gets its full size if it has less; never less: another process may have it mapped."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if os.fstat(file).st_size < size:
            _extend(file, size, holes)
    except BaseException:
        os.close(file)
        raise
    return file


def _extend(file: int, size: int, holes: bool) -> None:
    """Gives a file its full size.

    Checks are looked at wherever they are, and in a file system in memory looking into a hole through a map takes a
    page, or is a fatal signal where there is none left. Of rows only those that were written are looked at.
    """
    if holes or not hasattr(os, "posix_fallocate"):
        os.ftruncate(file, size)
    else:
        os.posix_fallocate(file, 0, size)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _size(path: Path) -> int:
    """Returns the size of a file, holes included; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _size_on_disk(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _map(path: Path, size: int) -> Array:
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint32)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror}); mend that or set teacher.cache to off", "teacher")


def _cannot_store(folder: Path, error: OSError) -> StoreFullError:
    return StoreFullError(
        f"{folder}: cannot store the teacher's outputs ({error.strerror}); mend that, or choose another place with"
        " teacher.cache_dir",
        "teacher",
    )


# --- the store ---


class TeacherStore:
    """What a frozen teacher answers, in files that many runs read and fill at once; `open` makes one.

    Args:
        folder: The store's own.
        manifest: What is in its `manifest.json`.
        columns: What is stored of an output; a sample counts as stored if all of them are.
        max_bytes: What the folder above may hold.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], columns: Sequence[Column], max_bytes: int | None = None
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.columns = tuple(columns)
        self.num_samples: int = manifest["num_samples"]
        self.num_views: int | None = manifest["num_views"]
        self.max_bytes = max_bytes
        self._opened: dict[bool, tuple[tuple[int, int] | None, list[Table]]] = {}

    @classmethod
    def open(
        cls,
        root: Path,
        manifest: Mapping[str, Any],
        *,
        num_samples: int,
        num_views: int | None,
        widths: Mapping[str, int],
        dtype: str = "fp16",
        top_k: int | None = None,
        max_bytes: int | None = None,
        epochs: Iterable[tuple[int, int]] = (),
    ) -> TeacherStore:
        """Opens the store of a manifest, and creates it where there is none: in full size, so that others see that.

        Args:
            root: The folder of all stores of a teacher.
            manifest: All that the outputs depend on, as JSON holds it.
            num_samples: In the dataset's own list.
            num_views: How many views a sample has; None where they have no numbers: then outputs are kept by
                (seed, epoch), and those of the plain image, view 0, beside them.
            widths: The fields to store, `logits` or `embedding`, and how many values each has.
            dtype: `fp16` or `fp32`.
            top_k: Of the logits, store this many and the tail, see `Column`; None, or as many as there are, for all.
            max_bytes: What `root` may hold when all tables of this run are full, those of other stores included.
            epochs: The (seed, epoch) that will be stored, for that sum, where views have no numbers.

        Raises:
            StoreSizeError: It does not fit.
            StoreFullError: The folder cannot be made.
            InputError: The folder's manifest is damaged or another.
        """
        manifest = {**manifest, "format": FORMAT, "num_samples": num_samples, "num_views": num_views}
        folder = root / digest(manifest)
        columns = [
            Column(field, width, dtype, top_k if field == "logits" and top_k and top_k < width else None)
            for field, width in widths.items()
        ]
        store = cls(folder, manifest, columns, max_bytes)
        keys = [None, *epochs] if num_views is None else [None]
        store._check_room([table for key in keys for table in store._tables(key)])
        try:
            if not (folder / "manifest.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                _replace(folder / "manifest.json", json.dumps(manifest, indent=4, sort_keys=True) + "\n")
            for table in store._tables(None) if num_views is not None else []:
                table.create()
        except OSError as error:
            raise _cannot_store(folder, error) from None
        read_manifest(folder)
        return store

    @classmethod
    def existing(cls, folder: Path, columns: Sequence[Column]) -> TeacherStore:
        """Opens a store by nothing but its folder.

        Raises:
            InputError: Its manifest is damaged.
        """
        return cls(folder, read_manifest(folder), columns)

    @property
    def num_rows(self) -> int:
        """Rows of a table."""
        return self.num_samples * (self.num_views or 1)

    def read(self, samples: Tensor, views: Tensor, seed: int = 0, epoch: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        """Returns what is stored.

        Args:
            samples: `(n,)` int64 on the CPU, positions in the dataset's own list.
            views: `(n,)` int64 on the CPU; where views have no numbers all are -1, or all 0 for the plain images.
            seed, epoch: Which drawing of views without numbers; otherwise of no effect.

        Returns:
            The values of each field, `(n, width)` float32 on the CPU, NaN where nothing is stored; and where something
            is, `(n,)` bool.

        Raises:
            ValueError: A sample or a view is out of range.
            InputError: A file cannot be read.
        """
        rows, tables = self._find(samples, views, seed, epoch)
        stored = np.ones(len(rows), bool)
        values = {}
        for column, table in zip(self.columns, tables, strict=True):
            words, found = table.read(rows)
            # by way of one dimension: an empty numpy array has no strides that torch could view as another type
            whole = torch.from_numpy(words.view(np.int32).ravel()).view(len(rows), table.words)
            values[column.field] = column.decode(whole)
            stored &= found
        valid = torch.from_numpy(stored)
        if not stored.all():
            for value in values.values():
                value[~valid] = math.nan
        return values, valid

    def write(
        self, outputs: Mapping[str, Tensor], samples: Tensor, views: Tensor, seed: int = 0, epoch: int = 0
    ) -> None:
        """Stores outputs, all fields of them or, on an error before the first file is touched, none.

        Args:
            outputs: `(n, width)` per field, on any device.
            samples, views, seed, epoch: As for `read`.

        Raises:
            ValueError: A sample or a view is out of range, or a shape does not fit.
            InputError: Values are not finite, or not in the type they are stored in; nothing is written.
            StoreFullError: The disk is full or refuses for another reason.
        """
        rows, tables = self._find(samples, views, seed, epoch)
        encoded = [self._encode(column, outputs[column.field], len(rows)) for column in self.columns]
        if not len(rows):
            return
        try:
            missing = [table for table in tables if not all(path.exists() for path in table.files)]
            if missing:
                self._check_room(missing)
            for table, words in zip(tables, encoded, strict=True):
                table.write(words, rows)
        except OSError as error:
            raise _cannot_store(self.folder, error) from None

    def stored(self, field: str, values: Tensor) -> Tensor:
        """Returns what reading values back would give, `(n, width)` float32, without a file and on their own device.

        Values that `write` refuses become infinite.
        """
        column = next(column for column in self.columns if column.field == field)
        return column.decode(column.encode(values))

    def num_filled(self, samples: Tensor, views: Tensor, seed: int = 0, epoch: int = 0) -> int:
        """Returns how many of the pairs of a sample `(n,)` and a view `(m,)` are stored, by their checks alone."""
        filled = 0
        total = len(samples) * len(views)
        for start in range(0, total, CHUNK):
            pairs = torch.arange(start, min(start + CHUNK, total))
            rows, tables = self._find(samples[pairs // len(views)], views[pairs % len(views)], seed, epoch)
            filled += int(np.count_nonzero(np.logical_and.reduce([table.written(rows) for table in tables])))
        return filled

    def missing_blocks(
        self, samples: Tensor, views: Tensor, block_size: int, seed: int = 0, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the pairs of a sample `(n,)` and a view `(m,)` that are not stored yet, or damaged, in blocks.

        The order of the blocks is random, and what is stored is looked up just before a block is due. So several
        processes that fill a store at the same time share the work without knowing of each other, and hardly ever do
        the same block; in a fixed order, all would be at the same block once one has caught up with another.

        Args:
            samples, views: int64 on the CPU.
            block_size: Pairs per block at most; there are fewer where some are stored.
            seed, epoch: As for `read`.

        Yields:
            Samples and views, of the same length; the views of a sample stand together.
        """
        total = len(samples) * len(views)
        step = block_size * max(CHUNK // block_size, 1)
        blocks = [
            (self._missing(samples, views, first, min(first + step, total), seed, epoch) // block_size).unique()
            for first in range(0, total, step)
        ]
        # not torch's generator: its state belongs to the run
        for block in np.random.default_rng().permutation(torch.cat(blocks)).tolist() if blocks else []:
            last = min((block + 1) * block_size, total)
            pairs = self._missing(samples, views, block * block_size, last, seed, epoch)
            if len(pairs):
                yield samples[pairs // len(views)], views[pairs % len(views)]

    def sample_filled(self, fraction: float, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, int, int]]:
        """Yields a random part of what is stored, by the checks alone: at least one row of each table that has any.

        Args:
            fraction: In (0, 1].
            generator: On the CPU.

        Yields:
            Samples, views, seed and epoch, as `read` takes them; samples ascend.
        """
        for key in self._keys():
            filled = np.logical_and.reduce([table.written() for table in self._tables(key)])
            rows = torch.from_numpy(np.flatnonzero(filled))
            if len(rows):
                chosen = torch.randperm(len(rows), generator=generator)[: math.ceil(fraction * len(rows))]
                rows = rows[chosen].sort().values
                num_views = self.num_views or 1
                views = rows % num_views if key is None else torch.full_like(rows, -1)
                yield rows // num_views, views, *(key or (0, 0))

    def _find(self, samples: Tensor, views: Tensor, seed: int, epoch: int) -> tuple[Array, list[Table]]:
        """Returns the rows of samples and views, and the columns' tables that they are in."""
        rows, shown = samples.numpy(), views.numpy()
        if rows.shape != shown.shape or rows.ndim != 1:
            raise ValueError(f"samples {rows.shape} and views {shown.shape} must be one row of numbers each")
        if not len(rows):
            return rows, self._tables(None)
        if rows.min() < 0 or rows.max() >= self.num_samples:
            raise ValueError(f"samples must be 0 to {self.num_samples - 1}, not {rows.min()} to {rows.max()}")
        first, last = int(shown.min()), int(shown.max())
        if self.num_views is None and first == last == -1:
            return rows, self._tables((seed, epoch))
        if first < 0 or last >= (self.num_views or 1):
            allowed = "all -1 or all 0" if self.num_views is None else f"0 to {self.num_views - 1}"
            raise ValueError(f"views must be {allowed}, not {first} to {last}")
        return rows * (self.num_views or 1) + shown, self._tables(None)

    def _missing(self, samples: Tensor, views: Tensor, first: int, last: int, seed: int, epoch: int) -> Tensor:
        """Returns which of the pairs `sample * number of views + view` from `first` to before `last` are not stored."""
        pairs = torch.arange(first, last)
        rows, tables = self._find(samples[pairs // len(views)], views[pairs % len(views)], seed, epoch)
        stored = np.logical_and.reduce([table.read(rows)[1] for table in tables])
        return pairs[torch.from_numpy(~stored)]

    def _tables(self, key: tuple[int, int] | None) -> list[Table]:
        """Returns the columns' tables: those of numbered views, or of (seed, epoch).

        Of each kind the last are kept open; those of all epochs would look like a leak of memory.
        """
        kind = key is None
        if kind not in self._opened or self._opened[kind][0] != key:
            tables = [Table(self.folder / _table_name(c, key), c.words, self.num_rows) for c in self.columns]
            self._opened[kind] = key, tables
        return self._opened[kind][1]

    def _keys(self) -> list[tuple[int, int] | None]:
        """Returns what there are tables of, of whatever columns, as `_tables` takes it."""
        keys = {parsed[1] for path in self.folder.glob("*.checks") if (parsed := _parse(path))}
        return sorted(keys, key=lambda key: key or (-math.inf, 0))

    def _encode(self, column: Column, values: Tensor, length: int) -> Array:
        if values.shape != (length, column.width):
            raise ValueError(f"{column.field} of shape {tuple(values.shape)} instead of {(length, column.width)}")
        words = column.encode(values).cpu()
        # of a tail only one number is stored, so the values themselves are looked at too
        finite = values.isfinite().all(dim=1).cpu() & column.decode(words).isfinite().all(dim=1)
        if not finite.all():
            advice = "check how it was trained"
            if column.dtype == "fp16":
                advice = "fp16 ends at 65504: set teacher.cache_dtype to fp32"
            raise InputError(
                f"the teacher's {column.field} of {int((~finite).sum())} of {length} images are not finite in"
                f" {column.dtype}; {advice}",
                "teacher",
            )
        return words.numpy().view(np.uint32)

    def _check_room(self, tables: Sequence[Table]) -> None:
        files = {path: size for table in tables for path, size in table.files.items()}
        added = sum(max(size - _size(path), 0) for path, size in files.items())
        root = self.folder.parent
        total = sum(table.bytes for table in tables)
        columns = ", ".join(column.name for column in self.columns)
        advice = "store fewer classes with teacher.top_k, or set teacher.cache to off"
        if self.max_bytes is not None and added:
            used = sum(_size(Path(folder, name)) for folder, _, names in os.walk(root) for name in names)
            if used + added > self.max_bytes:
                raise StoreSizeError(
                    f"{self.folder}: the teacher's outputs ({columns}) need {_gb(total)}, and with {_gb(used)} in"
                    f" {root} already that is more than the {_gb(self.max_bytes)} allowed; raise teacher.max_gb,"
                    f" {advice}",
                    "teacher",
                )
        place = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        needed = sum(max(size - _size_on_disk(path), 0) for path, size in files.items())
        if needed > free:
            raise StoreSizeError(
                f"{self.folder}: the teacher's outputs ({columns}) need {_gb(needed)} more, but the disk has"
                f" {_gb(free)} free; choose another with teacher.cache_dir, {advice}",
                "teacher",
            )


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _table_name(column: Column, key: tuple[int, int] | None) -> str:
    return column.name if key is None else f"{column.name}-seed_{key[0]}-epoch_{key[1]}"


def _parse(path: Path) -> tuple[Column, tuple[int, int] | None] | None:
    """Returns what a table is of by the name of its file; None where that is no table's."""
    match = re.fullmatch(
        r"([a-z]+)-([1-9]\d{0,6})(?:-top([1-9]\d{0,6}))?-(fp16|fp32)(?:-seed_(-?\d{1,20})-epoch_(\d{1,9}))?", path.stem
    )
    if match is None:
        return None
    field, width, top_k, dtype, seed, epoch = match.groups()
    column = Column(field, int(width), dtype, int(top_k) if top_k else None)
    if column.top_k and column.top_k >= column.width:
        return None
    return column, None if seed is None else (int(seed), int(epoch))


# --- folders ---


def canonical(manifest: Any) -> str:
    """Returns a manifest as the one text that stands for it."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(manifest: Mapping[str, Any]) -> str:
    """Returns the name of a manifest's folder: 16 hex digits of its SHA-256."""
    return hashlib.sha256(canonical(manifest).encode()).hexdigest()[:16]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads what a store's outputs depend on.

    Raises:
        InputError: The manifest is not there or damaged, or is not that of a folder of this name.
    """
    path = folder / "manifest.json"

    def unusable(why: str) -> InputError:
        return InputError(f"{path}: {why}; remove {folder}, what was in it will be computed again", "teacher")

    if not path.is_file():  # also: a FIFO, which must not be opened
        raise unusable("is not a file" if path.exists() else "does not exist")
    try:
        with path.open("rb") as file:
            manifest = json.loads(file.read(1 << 20))
        belongs = digest(manifest) == folder.name
        num_samples, num_views = manifest["num_samples"], manifest["num_views"]
        sound = manifest["format"] == FORMAT and type(num_samples) is int and num_samples > 0
        sound &= num_views is None or (type(num_views) is int and num_views > 0)
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, TypeError, LookupError, RecursionError):
        raise unusable("is damaged") from None
    if not belongs or not sound:
        raise unusable("is not that of this folder" if sound else "is damaged")
    return manifest


def stores_in(root: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """Returns the stores of a folder with their manifests, None where that is damaged, in the order of their names."""
    stores: list[tuple[Path, dict[str, Any] | None]] = []
    for folder in sorted(root.glob("[0-9a-f]" * 16)):
        if folder.is_dir():
            try:
                stores.append((folder, read_manifest(folder)))
            except InputError:
                stores.append((folder, None))
    return stores


@dataclass(frozen=True)
class Filling:
    """How full a column is.

    Attributes:
        column: What is stored of each row.
        epochs: How many tables there are, one for each (seed, epoch); None for the one table of numbered views.
        filled: Rows that have a check.
        total: Rows.
        bytes: Size of the files, holes included.
        bytes_on_disk: What they take of the disk.
    """

    column: Column
    epochs: int | None
    filled: int
    total: int
    bytes: int
    bytes_on_disk: int


def status(folder: Path) -> list[Filling]:
    """Returns how full the columns of a store are; reads nothing but the checks.

    Raises:
        InputError: The manifest is damaged.
    """
    manifest = read_manifest(folder)
    num_samples, num_views = manifest["num_samples"], manifest["num_views"]
    found: dict[tuple[str, bool], list[Filling]] = {}
    for path in sorted(folder.glob("*.checks")):
        if parsed := _parse(path):
            column, key = parsed
            table = Table(path.with_suffix(""), column.words, num_samples * (num_views or 1))
            filled = int(np.count_nonzero(table.written()))
            sizes = sum(map(_size, table.files)), sum(map(_size_on_disk, table.files))
            tables = found.setdefault((column.name, key is None), [])
            tables.append(Filling(column, None if key is None else 1, filled, table.num_rows, *sizes))
    return [
        Filling(
            tables[0].column,
            None if numbered else len(tables),
            sum(table.filled for table in tables),
            sum(table.total for table in tables),
            sum(table.bytes for table in tables),
            sum(table.bytes_on_disk for table in tables),
        )
        for (_, numbered), tables in found.items()
    ]


def why_not(manifest: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> str:
    """Returns in what the nearest of other stores differs from the one wanted, in words.

    Args:
        manifest: That of the store wanted.
        others: Those of the others.
    """
    wanted = _flat(manifest)
    differences = []
    for there in map(_flat, others):
        keys = [key for key in {**wanted, **there} if wanted.get(key, "absent") != there.get(key, "absent")]
        parts = {key.split(".")[0] for key in keys}
        words = [f"{key} is {there.get(key, 'absent')}, not {wanted.get(key, 'absent')}" for key in keys]
        differences.append((len(parts), len(keys), "; ".join(words)))
    if not differences:
        return "there is no other store"
    return f"the nearest of {len(differences)} other stores differs: {min(differences)[2]}"


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Returns the leaves of a manifest by their dotted keys, as short texts that differ where they do."""
    if isinstance(value, Mapping) and value:
        parts = [_flat(part, f"{key}.{name}" if key else str(name)) for name, part in value.items()]
        return {name: text for part in parts for name, text in part.items()}
    text = canonical(value)
    if len(text) > 40:
        is_digest = re.fullmatch(r'"[0-9a-f]+"', text)
        text = f"{text[1:13]}…" if is_digest else f"{text[:20]}… ({digest(value)})"
    return {key: text}


def remove(folder: Path) -> None:
    """Removes a store; runs that have it open keep what they can read, and store nothing more.

    Renamed first: nobody finds half a store. What an earlier removal that was cut short left behind goes too.

    Raises:
        OSError: It cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        folder.rename(folder.with_name(f".removed-{folder.name}-{secrets.token_hex(4)}"))
    for rest in folder.parent.glob(".removed-*"):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(rest)


def _replace(path: Path, text: str) -> None:
    """Writes a file so that everyone sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    # The commands are about experiment directories, of which this package knows nothing: a script of their own.
    runpy.run_module("stores", run_name="__main__")

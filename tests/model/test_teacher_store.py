"""Stored teacher outputs: exact, shared by processes, and never wrong whatever happens to their files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import random
import signal
import struct
import time
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import teacher_store
from model.errors import InputError
from model.teacher_store import Column, StoreFullError, StoreSizeError, Table, TeacherStore, top_k_error

MANIFEST = {"teacher": {"net": "tiny", "weights": "ab" * 32}, "dataset": "cd" * 32, "precision": "fp32"}


def open_store(root: Path, **options: Any) -> TeacherStore:
    defaults: dict[str, Any] = {"num_samples": 6, "num_views": 3, "widths": {"logits": 10}}
    return TeacherStore.open(root, options.pop("manifest", MANIFEST), **(defaults | options))


def every_pair(store: TeacherStore) -> tuple[Tensor, Tensor]:
    """Returns all samples and views, in the order of the rows."""
    rows = torch.arange(store.num_rows)
    return rows // (store.num_views or 1), rows % (store.num_views or 1)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 10 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_fp16(values: Tensor) -> Tensor:
    """Rounds by the struct module, which has its own half floats."""
    rounded = [struct.unpack("<e", struct.pack("<e", value))[0] for value in values.flatten().tolist()]
    return torch.tensor(rounded).view(values.shape)


def files_of(store: TeacherStore, suffix: str) -> list[Path]:
    return sorted(store.folder.glob(f"*.{suffix}"))


# --- what is read back ---


def test_values_come_back_rounded_to_fp16(tmp_path: Path) -> None:
    store = open_store(tmp_path, widths={"logits": 5})
    values = torch.tensor([[1 / 3, -2049.0, 65504.0, 1e-7, 0.1]])
    store.write({"logits": values}, torch.tensor([4]), torch.tensor([2]))
    read, valid = store.read(torch.tensor([4]), torch.tensor([2]))
    assert valid.tolist() == [True]
    assert read["logits"].dtype == torch.float32
    # 11 significant bits: 1365 / 4096; even of 2048 and 2050; the largest; 2 / 2^24; 1638 / 2^14
    assert read["logits"].tolist() == [[1365 / 4096, -2048.0, 65504.0, 2 / 2**24, 1638 / 2**14]]


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("width", [1, 2, 5, 10, 101])
def test_rows_are_found_in_any_order_and_in_another_process(tmp_path: Path, width: int, dtype: str) -> None:
    options: dict[str, Any] = {"num_samples": 50, "num_views": 7, "widths": {"logits": width}, "dtype": dtype}
    store = open_store(tmp_path, **options)
    samples, views = every_pair(store)
    values = random_logits(len(samples), width)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1))
    for part in order.split(64):
        store.write({"logits": values[part]}, samples[part], views[part])
    asked = torch.randint(len(samples), (500,), generator=torch.Generator().manual_seed(2))
    expected = as_fp16(values) if dtype == "fp16" else values
    for reader in (store, open_store(tmp_path, **options)):
        read, valid = reader.read(samples[asked], views[asked])
        assert valid.all()
        assert torch.equal(read["logits"], expected[asked])


def test_a_row_lies_at_sample_times_views_plus_view(tmp_path: Path) -> None:
    store = open_store(tmp_path, widths={"logits": 3})
    store.write({"logits": torch.tensor([[1.0, 2.0, 3.0]])}, torch.tensor([4]), torch.tensor([1]))
    [path] = files_of(store, "rows")
    assert path.name == "logits-3-fp16.rows"
    content = path.read_bytes()
    assert len(content) == 18 * 8  # 3 half floats and 2 bytes to make it whole words
    assert content[13 * 8 : 14 * 8] == struct.pack("<eee", 1, 2, 3) + bytes(2)
    assert not any(content[: 13 * 8] + content[14 * 8 :])


def test_what_is_not_stored_is_nan_and_not_valid(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    samples, views = every_pair(store)
    read, valid = store.read(samples, views)
    assert not valid.any()
    assert read["logits"].isnan().all()
    store.write({"logits": torch.zeros(2, 10)}, torch.tensor([0, 5]), torch.tensor([1, 2]))
    read, valid = store.read(samples, views)
    assert valid.nonzero().flatten().tolist() == [1, 17]
    assert torch.equal(read["logits"].isnan().any(dim=1), ~valid)
    assert torch.equal(read["logits"][valid], torch.zeros(2, 10))


def test_of_a_row_given_twice_the_last_is_stored(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    values = random_logits(300, 10)
    samples = torch.arange(300) % 6
    store.write({"logits": values}, samples, torch.zeros_like(samples))
    read, valid = store.read(samples[-6:], torch.zeros(6, dtype=torch.int64))
    assert valid.all()
    assert torch.equal(read["logits"], as_fp16(values[-6:]))


def test_no_rows_are_read_and_written_too(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    nothing = torch.zeros(0, dtype=torch.int64)
    store.write({"logits": torch.zeros(0, 10)}, nothing, nothing)
    read, valid = store.read(nothing, nothing)
    assert read["logits"].shape == (0, 10)
    assert valid.shape == (0,)
    assert store.num_filled(nothing, torch.arange(3)) == 0
    assert list(store.missing_blocks(nothing, torch.arange(3), 8)) == []


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dtype", "top_k"), [("fp16", None), ("fp32", None), ("fp16", 3), ("fp32", 4), ("fp16", 9)])
def test_stored_is_what_is_read_later(tmp_path: Path, dtype: str, top_k: int | None, source: torch.dtype) -> None:
    store = open_store(tmp_path, dtype=dtype, top_k=top_k)
    values = random_logits(18, 10).to(source)
    stored = store.stored("logits", values)
    store.write({"logits": values}, *every_pair(store))
    assert torch.equal(store.read(*every_pair(store))[0]["logits"], stored)
    assert torch.equal(store.stored("logits", stored), stored), "what was stored can be stored again"
    store.write({"logits": stored}, *every_pair(store))
    assert torch.equal(store.read(*every_pair(store))[0]["logits"], stored)


@pytest.mark.parametrize("widths", [{"logits": 10, "embedding": 4}, {"embedding": 4, "logits": 10}])
def test_needs_of_several_runs_lie_side_by_side_and_a_row_needs_all_fields(
    tmp_path: Path, widths: dict[str, int]
) -> None:
    small, both = open_store(tmp_path), open_store(tmp_path, widths=widths)
    assert small.folder == both.folder
    logits, embedding = random_logits(18, 10), random_logits(18, 4, seed=1)
    small.write({"logits": logits}, *every_pair(small))
    assert small.read(*every_pair(small))[1].all()
    values, valid = both.read(*every_pair(both))
    assert not valid.any()
    assert values["logits"].isnan().all()
    part = torch.tensor([3, 4])
    both.write({"logits": logits[part], "embedding": embedding[part]}, part // 3, part % 3)
    values, valid = both.read(*every_pair(both))
    assert valid.nonzero().flatten().tolist() == [3, 4]
    assert torch.equal(values["embedding"][part], as_fp16(embedding[part]))
    assert both.num_filled(torch.arange(6), torch.arange(3)) == 2
    assert sum(len(samples) for samples, _ in both.missing_blocks(torch.arange(6), torch.arange(3), 5)) == 16
    assert small.num_filled(torch.arange(6), torch.arange(3)) == 18
    for options in ({"dtype": "fp32"}, {"top_k": 2}):
        assert not open_store(tmp_path, **options).read(*every_pair(small))[1].any()


@pytest.mark.parametrize(
    ("samples", "views"), [([6], [0]), ([-1], [0]), ([0], [3]), ([0], [-1]), ([0, 1], [0]), ([[0]], [[0]])]
)
def test_what_is_out_of_range_is_refused(tmp_path: Path, samples: list[int], views: list[int]) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match=r"must be"):
        store.read(torch.tensor(samples), torch.tensor(views))
    with pytest.raises(ValueError, match=r"must be"):
        store.write({"logits": torch.zeros(len(samples), 10)}, torch.tensor(samples), torch.tensor(views))


@pytest.mark.parametrize("shape", [(2, 9), (1, 10), (2,)])
def test_a_wrong_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match=r"instead of \(2, 10\)"):
        store.write({"logits": torch.zeros(shape)}, torch.tensor([0, 1]), torch.tensor([0, 1]))


def test_large_reads_equal_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.write({"logits": random_logits(9, 10)}, torch.arange(9) // 3, torch.arange(9) % 3)
    whole, valid = store.read(*every_pair(store))
    monkeypatch.setattr(teacher_store, "CHUNK", 20)
    parts, valid_parts = store.read(*every_pair(store))
    assert torch.equal(valid, valid_parts)
    assert torch.equal(whole["logits"][valid], parts["logits"][valid])
    other = open_store(tmp_path / "other")
    other.write({"logits": random_logits(9, 10)}, torch.arange(9) // 3, torch.arange(9) % 3)
    for suffix in ("rows", "checks"):
        assert files_of(other, suffix)[0].read_bytes() == files_of(store, suffix)[0].read_bytes()


# --- what cannot be stored ---


@pytest.mark.parametrize(
    ("value", "dtype", "top_k", "message"),
    [
        (65520.0, "fp16", None, "1 of 3 images are not finite in fp16; fp16 ends at 65504: set teacher.cache_dtype"),
        (-65520.0, "fp16", None, "set teacher.cache_dtype to fp32"),
        (65520.0, "fp16", 2, "set teacher.cache_dtype to fp32"),
        (math.inf, "fp32", None, "1 of 3 images are not finite in fp32; check how it was trained"),
        (math.nan, "fp32", None, "not finite"),
        (math.nan, "fp16", 2, "not finite"),
        (-math.inf, "fp32", 2, "not finite"),  # in the tail it would look like a probability of 0
    ],
)
def test_what_is_not_finite_is_refused_and_nothing_written(
    tmp_path: Path, value: float, dtype: str, top_k: int | None, message: str
) -> None:
    store = open_store(tmp_path, dtype=dtype, top_k=top_k, widths={"embedding": 2, "logits": 10})
    logits = random_logits(3, 10)
    logits[1, 7] = value
    outputs = {"logits": logits, "embedding": torch.zeros(3, 2)}
    with pytest.raises(InputError, match=message) as caught:
        store.write(outputs, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    assert caught.value.reason == "teacher"
    assert not isinstance(caught.value, StoreFullError)
    assert not store.read(torch.arange(3), torch.zeros(3, dtype=torch.int64))[1].any()
    logits[1, 7] = 65519.0 if dtype == "fp16" else -3e38
    store.write(outputs, torch.arange(3), torch.zeros(3, dtype=torch.int64))


# --- damage ---


def filled(root: Path, **options: Any) -> tuple[TeacherStore, Tensor]:
    """Returns a store of 18 rows, all written, and what it must answer."""
    store = open_store(root, **options)
    values = random_logits(18, 10)
    store.write({"logits": values}, *every_pair(store))
    return store, store.stored("logits", values)


def valid_rows(store: TeacherStore, expected: Tensor) -> list[int]:
    """Reads all and returns which rows are valid, all of which must be right."""
    fresh = TeacherStore.existing(store.folder, store.columns)  # maps the files anew
    values, valid = fresh.read(*every_pair(store))
    assert torch.equal(values["logits"][valid], expected[valid])
    return valid.nonzero().flatten().tolist()


def test_the_check_is_the_multilinear_hash_of_place_and_words(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    [rows], [checks] = files_of(store, "rows"), files_of(store, "checks")
    key = hashlib.shake_256(f"{store.folder.name}/logits-10-fp16".encode()).digest(7 * 8)
    m = struct.unpack("<7Q", key)
    for row in range(18):
        words = struct.unpack("<5I", rows.read_bytes()[20 * row : 20 * row + 20])
        total = m[0] + m[1] * row + sum(a * b for a, b in zip(m[2:], words, strict=True))
        [check] = struct.unpack("<I", checks.read_bytes()[4 * row : 4 * row + 4])
        assert check == (total % 2**64) >> 32


def test_a_check_of_zero_is_stored_as_one(tmp_path: Path) -> None:
    table = Table(tmp_path / "logits-2-fp16", 1, 4)
    table._multipliers = np.zeros(3, np.uint64)
    table.write(np.array([[7]], np.uint32), np.array([2]))
    assert np.fromfile(tmp_path / "logits-2-fp16.checks", np.uint32).tolist() == [0, 0, 1, 0]
    assert table.read(np.array([1, 2]))[1].tolist() == [False, True]


def test_rows_beyond_2_to_the_32_have_checks_of_their_own(tmp_path: Path) -> None:
    table = Table(tmp_path / "logits-2-fp16", 1, 2**33)
    words = np.array([[7], [7]], np.uint32)
    low, high = table._check(words, np.array([5, 5 + 2**32]))
    assert low != high


def test_every_flipped_bit_makes_its_row_missing(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    pairs = every_pair(store)
    for suffix, size in (("rows", 20), ("checks", 4)):
        [path] = files_of(store, suffix)
        whole = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for bit in range(len(whole) * 8):
                place = bit // 8
                os.pwrite(file.fileno(), bytes([whole[place] ^ 1 << bit % 8]), place)
                valid = store.read(*pairs)[1]
                assert (~valid).nonzero().flatten().tolist() == [place // size]
                os.pwrite(file.fileno(), whole[place : place + 1], place)
    assert store.read(*pairs)[1].all()


def swapped(data: bytes, a: int, b: int, size: int) -> bytes:
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    parts[a], parts[b] = parts[b], parts[a]
    return b"".join(parts)


def test_swapped_rows_and_swapped_words_are_missing(tmp_path: Path) -> None:
    store, expected = filled(tmp_path)
    [rows], [checks] = files_of(store, "rows"), files_of(store, "checks")
    values, hashes = rows.read_bytes(), checks.read_bytes()
    for a, b in ((0, 1), (3, 17)):
        rows.write_bytes(swapped(values, a, b, 20))
        others = [row for row in range(18) if row not in (a, b)]
        assert valid_rows(store, expected) == others
        checks.write_bytes(swapped(hashes, a, b, 4))  # a whole record moved to another place
        assert valid_rows(store, expected) == others
        checks.write_bytes(hashes)
    for size in (2, 4, 8):  # within the first row
        for a in range(20 // size):
            for b in range(a):
                rows.write_bytes(swapped(values[:20], a, b, size) + values[20:])
                assert valid_rows(store, expected) == list(range(1, 18)), (size, a, b)


def test_torn_rows_and_checks_of_another_writer_are_missing(tmp_path: Path) -> None:
    """Two writers whose values differ in their last bits: any mixture of their bytes is neither's row."""
    store, expected = filled(tmp_path)
    [rows], [checks] = files_of(store, "rows"), files_of(store, "checks")
    first = rows.read_bytes(), checks.read_bytes()
    other = (expected.half().view(torch.int16) ^ 1).view(torch.float16)
    store.write({"logits": other}, *every_pair(store))
    second = rows.read_bytes(), checks.read_bytes()
    for cut in range(1, 19):  # the last byte is the same in both
        mixed = b"".join(
            first[0][20 * row : 20 * row + cut] + second[0][20 * row + cut : 20 * row + 20] for row in range(18)
        )
        rows.write_bytes(mixed)
        for hashes in (first[1], second[1]):
            checks.write_bytes(hashes)
            assert valid_rows(store, expected) == []
    rows.write_bytes(first[0])
    checks.write_bytes(second[1])
    assert valid_rows(store, expected) == []
    checks.write_bytes(first[1])
    assert valid_rows(store, expected) == list(range(18))


def test_a_page_of_zeros_or_of_old_content_is_missing(tmp_path: Path) -> None:
    store = open_store(tmp_path, num_samples=1000)
    samples, views = every_pair(store)
    old, new = random_logits(3000, 10), random_logits(3000, 10, seed=1)
    store.write({"logits": old}, samples, views)
    [path] = files_of(store, "rows")
    stale = path.read_bytes()
    store.write({"logits": new}, samples, views)
    whole = path.read_bytes()
    expected = store.stored("logits", new)
    lost = set(range(8192 // 20, math.ceil(12288 / 20)))
    for page in (bytes(4096), stale[8192:12288]):
        path.write_bytes(whole[:8192] + page + whole[12288:])
        assert set(valid_rows(store, expected)) == set(range(3000)) - lost


@pytest.mark.parametrize("suffix", ["rows", "checks"])
def test_a_file_cut_short_is_as_if_empty_and_mended_by_the_next_write(tmp_path: Path, suffix: str) -> None:
    store, expected = filled(tmp_path)
    [path] = files_of(store, suffix)
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert valid_rows(store, expected) == []
        fresh = TeacherStore.existing(store.folder, store.columns)
        fresh.write({"logits": expected[:1]}, torch.tensor([0]), torch.tensor([0]))
        assert path.stat().st_size == len(whole)
        assert 0 in valid_rows(store, expected)
        fresh.write({"logits": expected}, *every_pair(store))
        assert path.read_bytes() == whole


def test_a_file_that_is_too_long_or_has_gone_loses_nothing_else(tmp_path: Path) -> None:
    store, expected = filled(tmp_path)
    [rows], [checks] = files_of(store, "rows"), files_of(store, "checks")
    rows.write_bytes(rows.read_bytes() + bytes(5000))
    store.write({"logits": expected[:1]}, torch.tensor([0]), torch.tensor([0]))
    assert rows.stat().st_size == 18 * 20 + 5000  # to cut a file is fatal for those who have mapped it
    assert valid_rows(store, expected) == list(range(18))
    checks.unlink()
    assert valid_rows(store, expected) == []


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    store, expected = filled(tmp_path)
    [rows] = files_of(store, "rows")
    rows.unlink()
    os.mkfifo(rows)  # opening it would wait for ever
    assert valid_rows(store, expected) == []
    rows.unlink()
    rows.mkdir()
    with pytest.raises(InputError, match=r"logits-10-fp16.rows: cannot be read \(Is a directory\)"):
        valid_rows(store, expected)
    with pytest.raises(StoreFullError, match="Is a directory"):
        store.write({"logits": expected[:1]}, torch.tensor([0]), torch.tensor([0]))


def test_rows_of_another_store_or_table_fit_in_none(tmp_path: Path) -> None:
    store, expected = filled(tmp_path)
    other = open_store(tmp_path, manifest={**MANIFEST, "precision": "bf16"})
    for suffix in ("rows", "checks"):
        [path] = files_of(store, suffix)
        (other.folder / path.name).write_bytes(path.read_bytes())
    assert valid_rows(other, expected) == []


def test_random_bytes_are_no_rows_whatever_their_type(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for options in ({"top_k": 3}, {"top_k": 4, "dtype": "fp32"}, {}, {"top_k": 3, "widths": {"logits": 40_000}}):
        store = open_store(tmp_path, **options)
        [table] = store._tables(None)
        for path, size in table.files.items():
            path.write_bytes(draw.bytes(size))
        values, valid = store.read(*every_pair(store))
        assert not valid.any()
        assert values["logits"].shape == (18, store.columns[0].width)


# --- crashes and concurrent writers ---

CALLS = ("open", "ftruncate", "posix_fallocate", "pwrite", "fsync", "replace", "rename", "mkdir")


def fork(work: Callable[[], None]) -> int:
    """Runs a function in a process of its own and returns its number."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid: int) -> int:
    """Waits for a process and returns its exit status or, below 0, what signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(kill_at: int, share: float) -> None:
    """Makes this process kill itself at its n-th call that changes a file, of a write after this share of its bytes."""
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == kill_at:
                if call is pwrite:
                    file, data, offset = arguments
                    pwrite(file, data[: int(len(data) * share)], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapper

    pwrite = os.pwrite
    for name in CALLS:  # pathlib calls these through the os module
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("share", [0.0, 0.37])
def test_a_kill_at_any_call_leaves_no_wrong_row_and_nothing_in_the_way(tmp_path: Path, share: float) -> None:
    values = random_logits(18, 10)
    order = torch.tensor([0, 2, 3, 4, 5, 9, 11, 17, 1, 6, 7, 8, 10, 12, 13, 14, 15, 16])
    kills = 0
    for kill_at in range(1, 200):
        root = tmp_path / str(kill_at)

        def write(root: Path = root, kill_at: int = kill_at) -> None:
            killed_at(kill_at, share)
            store = open_store(root)
            for part in order.split(8):
                store.write({"logits": values[part]}, part // 3, part % 3)

        status = ended(fork(write))
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        store = open_store(root)
        valid_rows(store, as_fp16(values))
        blocks = list(store.missing_blocks(torch.arange(6), torch.arange(3), 5))
        for samples, views in blocks:
            store.write({"logits": values[3 * samples + views]}, samples, views)
        assert valid_rows(store, as_fp16(values)) == list(range(18))
        if not status:
            assert not blocks
            break
    assert kills > 20  # else the calls were not intercepted


def test_writers_of_different_bits_killed_at_random_leave_only_rows_of_one_of_them(tmp_path: Path) -> None:
    """Overlapping blocks, real processes, writes in pieces: what is valid must be some writer's row as a whole."""
    options: dict[str, Any] = {"num_samples": 16, "num_views": 2, "widths": {"logits": 300}, "dtype": "fp32"}
    store = open_store(tmp_path, **options)
    base = random_logits(store.num_rows, 300)
    versions = torch.stack([(base.view(torch.int32) ^ writer).view(torch.float32) for writer in range(4)])

    def write_for_ever(version: int) -> None:
        own, draw, pwrite = open_store(tmp_path, **options), random.Random(os.getpid()), os.pwrite

        def in_pieces(file: int, data: memoryview, offset: int) -> int:
            os.sched_yield()
            return pwrite(file, data[: draw.randrange(1, len(data) + 1)], offset)

        pytest.MonkeyPatch().setattr(os, "pwrite", in_pieces)
        while True:
            first = draw.randrange(store.num_rows)
            rows = torch.arange(first, min(first + draw.randrange(1, 9), store.num_rows))
            own.write({"logits": versions[version, rows]}, rows // 2, rows % 2)

    draw = random.Random(0)
    writers = {version: fork(partial(write_for_ever, version)) for version in range(4)}
    seen, missing, kills = torch.zeros(4, dtype=torch.int64), 0, 0
    try:
        end = time.monotonic() + 2
        while time.monotonic() < end or kills < 10 or missing < 100 or not (seen > 0).all():
            values, valid = store.read(*every_pair(store))
            same = (values["logits"] == versions).all(dim=2)  # (versions, rows)
            assert torch.equal(same.any(dim=0), valid)
            seen += same.sum(dim=1)
            missing += int((~valid).sum())
            if draw.random() < 0.1:
                version = draw.randrange(4)
                os.kill(writers[version], signal.SIGKILL)
                assert ended(writers.pop(version)) == -signal.SIGKILL
                kills += 1
                writers[version] = fork(partial(write_for_ever, version))
    finally:
        for pid in writers.values():
            os.kill(pid, signal.SIGKILL)
            ended(pid)
    valid = store.read(*every_pair(store))[1]
    blocks = list(store.missing_blocks(torch.arange(16), torch.arange(2), 5))
    assert sum(len(samples) for samples, _ in blocks) == int((~valid).sum())
    for samples, views in blocks:
        store.write({"logits": versions[0, 2 * samples + views]}, samples, views)
    assert store.read(*every_pair(store))[1].all()


def test_processes_that_open_a_new_store_at_once_share_it(tmp_path: Path) -> None:
    for number in range(6):
        root = tmp_path / str(number)
        start = time.monotonic() + 0.02

        def work(part: int, root: Path = root, start: float = start) -> None:
            while time.monotonic() < start:
                pass
            store = open_store(root)
            rows = torch.arange(part, 18, 4)
            store.write({"logits": rows[:, None].expand(-1, 10).float()}, rows // 3, rows % 3)

        assert [ended(pid) for pid in [fork(partial(work, part)) for part in range(4)]] == [0] * 4
        store = open_store(root)
        assert valid_rows(store, torch.arange(18.0)[:, None].expand(-1, 10)) == list(range(18))
        assert sorted(path.name for path in store.folder.iterdir()) == [
            *("logits-10-fp16.checks", "logits-10-fp16.rows", "manifest.json")
        ]


def test_processes_that_fill_at_the_same_time_share_the_work(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_samples": 100, "num_views": 30}
    start = time.monotonic() + 0.2

    def fill(log: Path) -> None:
        store = open_store(tmp_path, **options)
        time.sleep(max(start - time.monotonic(), 0))
        for samples, views in store.missing_blocks(torch.arange(100), torch.arange(30), 20):
            time.sleep(0.004)  # the teacher
            values = (30 * samples + views)[:, None].expand(-1, 10).float()
            store.write({"logits": values}, samples, views)
            with log.open("a") as file:
                file.write(f"{len(samples)}\n")

    logs = [tmp_path / f"{number}.log" for number in range(3)]
    assert [ended(pid) for pid in [fork(partial(fill, log)) for log in logs]] == [0] * 3
    store = open_store(tmp_path, **options)
    values, valid = store.read(*every_pair(store))
    assert valid.all()
    assert torch.equal(values["logits"][:, 0], as_fp16(torch.arange(3000.0)))
    computed = [sum(map(int, log.read_text().split())) for log in logs]
    assert 3000 <= sum(computed) < 3000 * 1.3  # in lockstep it would be near 6000
    assert min(computed) > 300
    assert not list(store.missing_blocks(torch.arange(100), torch.arange(30), 20))


# --- what is missing ---


@pytest.mark.parametrize("block_size", [1, 4, 7, 100])
def test_missing_blocks_are_each_missing_pair_once(tmp_path: Path, block_size: int) -> None:
    store = open_store(tmp_path)
    store.write({"logits": torch.zeros(3, 10)}, torch.tensor([1, 1, 4]), torch.tensor([0, 2, 1]))
    samples, views = torch.tensor([5, 1, 4]), torch.tensor([2, 0, 1])
    state = torch.get_rng_state()
    blocks = list(store.missing_blocks(samples, views, block_size))
    assert torch.equal(torch.get_rng_state(), state)  # it is the run's
    assert all(0 < len(block[0]) == len(block[1]) <= block_size for block in blocks)
    pairs = [(int(sample), int(view)) for block in blocks for sample, view in zip(*block, strict=True)]
    expected = {(5, 2), (5, 0), (5, 1), (1, 1), (4, 2), (4, 0)}
    assert len(pairs) == 6
    assert set(pairs) == expected
    assert store.num_filled(samples, views) == 3


@pytest.mark.parametrize("missing", [0, 7, 8, 16, 17])
def test_a_single_missing_row_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    monkeypatch.setattr(teacher_store, "CHUNK", 8)  # rows looked at together
    store = open_store(tmp_path)
    rows = torch.tensor([row for row in range(18) if row != missing])
    store.write({"logits": torch.zeros(17, 10)}, rows // 3, rows % 3)
    for block_size in (1, 3, 5, 8, 9, 100):
        [(samples, views)] = store.missing_blocks(torch.arange(6), torch.arange(3), block_size)
        assert (3 * samples + views).tolist() == [missing]
    blocks = open_store(tmp_path / "empty").missing_blocks(torch.arange(6), torch.arange(3), 5)
    assert sorted(row for samples, views in blocks for row in (3 * samples + views).tolist()) == list(range(18))


def test_missing_blocks_leave_out_what_another_fills_meanwhile(tmp_path: Path) -> None:
    store, other = open_store(tmp_path), open_store(tmp_path)
    blocks = store.missing_blocks(torch.arange(6), torch.arange(3), 6)
    first, _ = next(blocks)
    other.write({"logits": torch.zeros(17, 10)}, torch.arange(17) // 3, torch.arange(17) % 3)
    rest = list(blocks)
    assert [(s.tolist(), v.tolist()) for s, v in rest] == ([] if 5 in first else [([5], [2])])


def test_missing_blocks_have_damaged_rows_too(tmp_path: Path) -> None:
    store, expected = filled(tmp_path)
    [path] = files_of(store, "rows")
    damaged = bytearray(path.read_bytes())
    damaged[20 * 7] ^= 1
    path.write_bytes(damaged)
    assert store.num_filled(torch.arange(6), torch.arange(3)) == 18
    [(samples, views)] = store.missing_blocks(torch.arange(6), torch.arange(3), 4)
    assert (samples.tolist(), views.tolist()) == ([2], [1])
    store.write({"logits": expected[7:8]}, samples, views)
    assert valid_rows(store, expected) == list(range(18))


def test_blocks_come_in_another_order_each_time(tmp_path: Path) -> None:
    store = open_store(tmp_path, num_samples=1000)
    orders = {
        tuple(int(samples[0]) for samples, _ in store.missing_blocks(torch.arange(1000), torch.arange(3), 300))
        for _ in range(5)
    }
    assert len(orders) > 1


# --- views without numbers ---


def test_views_without_numbers_are_kept_by_seed_and_epoch(tmp_path: Path) -> None:
    store = open_store(tmp_path, num_views=None)
    samples, views = torch.arange(6), torch.full((6,), -1)
    keys = [(0, 0), (0, 1), (1, 0), (2**62, 3)]
    for number, key in enumerate(keys):
        assert not store.read(samples, views, *key)[1].any()
        store.write({"logits": torch.full((6, 10), float(number))}, samples, views, *key)
    fresh = open_store(tmp_path, num_views=None)
    for number, key in enumerate(keys):
        values, valid = fresh.read(samples, views, *key)
        assert valid.all()
        assert (values["logits"] == number).all()
    assert not fresh.read(samples, views, 1, 1)[1].any()
    assert (store.folder / f"logits-10-fp16-seed_{2**62}-epoch_3.rows").is_file()
    assert list(store.missing_blocks(samples, torch.tensor([-1]), 4, *keys[3])) == []
    assert sum(len(block) for block, _ in store.missing_blocks(samples, torch.tensor([-1]), 4, 5, 5)) == 6


def test_plain_images_are_kept_beside_views_without_numbers(tmp_path: Path) -> None:
    store = open_store(tmp_path, num_views=None)
    samples, plain = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    store.write({"logits": torch.ones(6, 10)}, samples, plain, 3, 4)
    assert store.read(samples, plain, 7, 8)[1].all()
    assert not store.read(samples, plain - 1, 3, 4)[1].any()
    assert (store.folder / "logits-10-fp16.rows").is_file()
    for views in ([0, -1], [-1, 0], [1, 1], [-2, -2]):
        with pytest.raises(ValueError, match="all -1 or all 0"):
            store.read(samples[:2], torch.tensor(views))


def test_only_the_last_epoch_stays_mapped(tmp_path: Path) -> None:
    store = open_store(tmp_path, num_views=None)
    samples, views = torch.arange(6), torch.full((6,), -1)
    for epoch in range(5):
        store.write({"logits": torch.zeros(6, 10)}, samples, views, 0, epoch)
        store.read(samples, views, 0, epoch)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(store.folder) in line]
    assert len(mapped) == 2


# --- top k ---


def softmax(logits: Any, temperature: float = 1.0) -> Any:
    scaled = np.asarray(logits, np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("width", [10, 101, 40_000])
@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_keeps_the_largest_and_the_mass_of_the_tail(tmp_path: Path, k: int, width: int) -> None:
    store = open_store(tmp_path, top_k=k, dtype="fp32", widths={"logits": width})
    values = random_logits(18, width)
    store.write({"logits": values}, *every_pair(store))
    read = store.read(*every_pair(store))[0]["logits"]
    kept = np.argsort(-values.numpy(), axis=1)[:, :k]
    true, restored = softmax(values), softmax(read)
    assert np.array_equal(np.take_along_axis(read.numpy(), kept, 1), np.take_along_axis(values.numpy(), kept, 1))
    top = np.take_along_axis(true, kept, 1)
    np.testing.assert_allclose(np.take_along_axis(restored, kept, 1), top, rtol=3e-6)
    tail = np.ones_like(true, bool)
    np.put_along_axis(tail, kept, False, 1)
    for row in range(18):
        assert len(set(read[row].numpy()[tail[row]])) == 1
        np.testing.assert_allclose(restored[row][tail[row]].sum(), true[row][tail[row]].sum(), rtol=3e-6, atol=1e-12)
        distance = np.abs(true[row] - restored[row]).sum() / 2
        assert distance <= true[row][tail[row]].sum() * (1 + 1e-5) + 1e-7


def test_top_k_in_fp16_rounds_only_what_it_stores(tmp_path: Path) -> None:
    store = open_store(tmp_path, top_k=2, widths={"logits": 4})
    [name] = [column.name for column in store.columns]
    assert name == "logits-4-top2-fp16"
    logits = torch.tensor([[0.1, 5.0, 0.1 + math.log(3), 2049.0]])
    tail = math.log((math.exp(0.1) + math.exp(0.1 + math.log(3))) / 2)
    expected = as_fp16(torch.tensor([[tail, 5.0, tail, 2048.0]]))
    assert torch.equal(store.stored("logits", logits), expected)


def test_extreme_tails_neither_overflow_nor_vanish() -> None:
    column = Column("logits", 6, "fp32", 2)
    logits = torch.tensor([[300.0, 200.0, -1e4, -1e4, -1e4, -1e4], [3e38, 2e38, 1e38, 1e38, 1e38, 1e38]])
    assert torch.equal(column.decode(column.encode(logits)), logits)


def test_equal_logits_are_all_restored() -> None:
    column = Column("logits", 7, "fp16", 3)
    for logits in (torch.full((2, 7), 1.5), torch.tensor([[2.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]])):
        assert torch.equal(column.decode(column.encode(logits)), logits)


@pytest.mark.parametrize("k", [10, 11, None])
def test_top_k_of_all_classes_is_plain_storage(tmp_path: Path, k: int | None) -> None:
    assert [column.name for column in open_store(tmp_path, top_k=k).columns] == ["logits-10-fp16"]


def test_top_k_is_for_logits_only(tmp_path: Path) -> None:
    store = open_store(tmp_path, top_k=2, widths={"logits": 10, "embedding": 64})
    assert [column.name for column in store.columns] == ["logits-10-top2-fp16", "embedding-64-fp16"]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_top_k_error_is_the_total_variation_distance(k: int, temperature: float) -> None:
    logits = random_logits(20, 10).double()
    order = np.sort(logits.numpy(), axis=1)[:, ::-1]
    level = np.log(np.exp(order[:, k:]).mean(axis=1, keepdims=True))
    restored = np.concatenate([order[:, :k], np.repeat(level, 10 - k, axis=1)], axis=1)
    expected = np.abs(softmax(order, temperature) - softmax(restored, temperature)).sum(axis=1) / 2
    np.testing.assert_allclose(top_k_error(logits, k, temperature), expected, atol=2e-6)


def test_top_k_error_is_at_most_the_mass_of_the_tail_and_zero_for_all_classes() -> None:
    logits = random_logits(500, 30)
    for k in (1, 4, 29):
        tail = 1 - np.sort(softmax(logits), axis=1)[:, -k:].sum(axis=1)
        error = top_k_error(logits, k).numpy()
        assert (error <= tail * (1 - 1 / (30 - k)) + 1e-6).all()  # a uniform tail has some of each right
        assert k == 29 or error.max() > 0.01
    assert top_k_error(logits, 30).tolist() == [0.0] * 500


# --- folders ---


def test_a_store_is_found_by_its_manifest_only(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    same = json.loads(json.dumps(MANIFEST))
    assert open_store(tmp_path, manifest=dict(reversed(same.items()))).folder == store.folder
    text = json.dumps(
        {**MANIFEST, "format": 1, "num_samples": 6, "num_views": 3}, sort_keys=True, separators=(",", ":")
    )
    assert store.folder == tmp_path / hashlib.sha256(text.encode()).hexdigest()[:16]
    others: list[dict[str, Any]] = [
        {"manifest": {**MANIFEST, "precision": "bf16"}},
        {"manifest": {**MANIFEST, "teacher": {"net": "tiny", "weights": "ac" * 32}}},
        {"num_samples": 7},
        {"num_views": 4},
        {"num_views": None},
    ]
    folders = {open_store(tmp_path, **other).folder for other in others}
    assert len(folders | {store.folder}) == 6
    assert [folder for folder, _ in teacher_store.stores_in(tmp_path)] == sorted(folders | {store.folder})
    assert dict(teacher_store.stores_in(tmp_path))[store.folder] == store.manifest
    assert json.loads((store.folder / "manifest.json").read_text()) == store.manifest


def test_a_manifest_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched(source: Path, target: Path) -> None:
        assert json.loads(Path(source).read_text())["precision"] == "fp32"
        assert not target.exists()
        calls.append(target.name)
        replace(source, target)

    def synced(file: int) -> None:
        fsync(file)
        calls.append("fsync")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", watched)
    store = open_store(tmp_path)
    assert calls == ["fsync", "manifest.json"]

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFullError, match="No space left"):
        open_store(tmp_path / "other")
    assert list((tmp_path / "other" / store.folder.name).iterdir()) == []


def test_opening_again_writes_nothing(tmp_path: Path) -> None:
    store, expected = filled(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in [store.folder, *store.folder.iterdir()]}
    assert valid_rows(open_store(tmp_path), expected) == list(range(18))
    assert {path: path.stat().st_mtime_ns for path in [store.folder, *store.folder.iterdir()]} == before


def test_a_manifest_of_another_store_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    other = open_store(tmp_path, manifest={**MANIFEST, "precision": "bf16"})
    (store.folder / "manifest.json").write_bytes((other.folder / "manifest.json").read_bytes())
    with pytest.raises(
        InputError, match=r"manifest.json: is not that of this folder; remove .*computed again"
    ) as caught:
        open_store(tmp_path)
    assert caught.value.reason == "teacher"
    assert teacher_store.stores_in(tmp_path)[0 if store.folder < other.folder else 1] == (store.folder, None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"null",
        b"[" * 100_000,
        b"1" * 5000,
        b'{"format": NaN}',
        b'{"format": 1e999, "num_samples": 6, "num_views": 3}',
        b'{"format": 2, "num_samples": 6, "num_views": 3}',
        b'{"format": 1, "num_samples": 0, "num_views": 3}',
        b'{"format": 1, "num_samples": true, "num_views": 3}',
        b'{"format": 1, "num_samples": 6.5, "num_views": 3}',
        b'{"format": 1, "num_samples": 6, "num_views": "3"}',
        b'{"format": 1, "num_samples": 6, "num_views": -3}',
        b'{"format": 1, "num_samples": 6}',
        b'{"format": 1, "num_samples": 6, "num_views": 3, "x": NaN}',
        b'{"format": 1, "num_samples": 6, "num_views": 3, "x": "' + b"x" * (1 << 20) + b'"}',
    ],
    ids=range(19),
)
def test_a_damaged_manifest_is_one_line_that_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    store = open_store(tmp_path)
    (store.folder / "manifest.json").write_bytes(content)
    folders = [store.folder]
    with contextlib.suppress(ValueError, RecursionError):
        folders.append(tmp_path / teacher_store.digest(json.loads(content)))  # as if it had always been there
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(InputError, match=r"is damaged; remove .* computed again|not that of") as caught:
            TeacherStore.existing(folder, [Column("logits", 10, "fp16")])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="manifest"):
        open_store(tmp_path)
    assert all(found is None for _, found in teacher_store.stores_in(tmp_path))


def test_a_manifest_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    path = store.folder / "manifest.json"
    path.unlink()
    with pytest.raises(InputError, match="does not exist"):
        teacher_store.read_manifest(store.folder)
    os.mkfifo(path)  # opening it would wait for ever
    with pytest.raises(InputError, match="is not a file"):
        open_store(tmp_path)


def test_other_things_in_the_folders_are_left_alone(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    (tmp_path / "accuracy.json").write_text("{}")
    (tmp_path / ("a" * 16)).write_text("a file")
    (tmp_path / "notes").mkdir()
    for name in ("x.checks", "logits-0-fp16.checks", "logits-3-top5-fp16.checks", "logits-9999999999-fp16.checks"):
        (store.folder / name).write_bytes(b"abcd")
    assert [folder for folder, _ in teacher_store.stores_in(tmp_path)] == [store.folder]
    assert [line.column.name for line in teacher_store.status(store.folder)] == ["logits-10-fp16"]
    assert teacher_store.stores_in(tmp_path / "none") == []


def test_status_counts_rows_and_bytes(tmp_path: Path) -> None:
    store = open_store(tmp_path, num_samples=5000, widths={"logits": 10, "embedding": 3})
    pairs = torch.tensor([0, 1, 4999]), torch.tensor([0, 2, 2])
    store.write({"logits": torch.zeros(3, 10), "embedding": torch.zeros(3, 3)}, *pairs)
    open_store(tmp_path, num_samples=5000, top_k=2).write({"logits": torch.zeros(3, 10)}, *pairs)
    found = {line.column.name: line for line in teacher_store.status(store.folder)}
    # words per row: 5, 2 and 2 + 1 (3 half floats; 2 classes of 2 bytes)
    assert {name: (line.epochs, line.filled, line.total, line.bytes) for name, line in found.items()} == {
        "logits-10-fp16": (None, 3, 15000, 15000 * 24),
        "embedding-3-fp16": (None, 3, 15000, 15000 * 12),
        "logits-10-top2-fp16": (None, 3, 15000, 15000 * 16),
    }
    # checks have all their room, rows only that of their pages: through a map, in a full file system in memory, a look
    # into a hole would be the end
    assert all(60_000 <= line.bytes_on_disk <= 15 * 4096 + 3 * 2 * 4096 for line in found.values())


def test_status_adds_up_epochs(tmp_path: Path) -> None:
    store = open_store(tmp_path, num_views=None)
    for epoch in range(4):
        store.write({"logits": torch.zeros(epoch, 10)}, torch.arange(epoch), torch.full((epoch,), -1), 0, epoch)
    store.write({"logits": torch.zeros(5, 10)}, torch.arange(5), torch.zeros(5, dtype=torch.int64))
    lines = {line.epochs: line for line in teacher_store.status(store.folder)}
    assert {key: (line.filled, line.total, line.bytes) for key, line in lines.items()} == {
        None: (5, 6, 6 * 24),
        3: (1 + 2 + 3, 18, 18 * 24),
    }


@pytest.mark.parametrize("num_views", [3, None])
def test_a_random_part_of_what_is_stored_is_drawn(tmp_path: Path, num_views: int | None) -> None:
    store = open_store(tmp_path, num_samples=1000, num_views=num_views, widths={"logits": 10, "embedding": 2})
    generator = torch.Generator().manual_seed(0)
    assert list(store.sample_filled(0.5, generator)) == []
    samples = torch.arange(0, 1000, 2)
    outputs = {"logits": torch.zeros(500, 10), "embedding": torch.zeros(500, 2)}
    for view in [0, 2] if num_views else [0]:
        store.write(outputs, samples, torch.full((500,), view))
    if num_views is None:
        store.write(outputs, samples, torch.full((500,), -1), 7, 9)
    odd = torch.tensor([1])
    logits_only = open_store(tmp_path, num_samples=1000, num_views=num_views)
    logits_only.write({"logits": torch.zeros(1, 10)}, odd, odd - 1)
    parts = list(TeacherStore.existing(store.folder, store.columns).sample_filled(0.1, generator))
    assert [part[2:] for part in parts] == ([(0, 0)] if num_views else [(0, 0), (7, 9)])
    for drawn, views, seed, epoch in parts:
        assert len(drawn) == len(views) == (100 if num_views else 50)
        assert len({(int(s), int(v)) for s, v in zip(drawn, views, strict=True)}) == len(drawn)
        assert (drawn % 2 == 0).all()
        assert drawn.min() < 200
        assert drawn.max() > 800
        assert store.read(drawn, views, seed, epoch)[1].all()
        assert set(views.tolist()) == ({0, 2} if num_views else {-1} if epoch else {0})
    again, same, other = (next(store.sample_filled(0.1, torch.Generator().manual_seed(seed)))[0] for seed in (1, 1, 2))
    assert torch.equal(again, same)
    assert not torch.equal(again, other)
    assert [len(part[0]) for part in store.sample_filled(1e-9, generator)] == [1] * len(parts)


def test_why_not_names_what_the_nearest_store_has_otherwise() -> None:
    wanted = {
        "teacher": {"net": "resnet18", "weights": "0" * 64},
        "dataset": {"name": "cifar10", "digest": "1" * 64},
        "precision": "bf16",
        "views": {"pad": 4},
    }
    assert teacher_store.why_not(wanted, []) == "there is no other store"
    far = {**wanted, "teacher": {"net": "wrn", "weights": "2" * 64}, "precision": "fp32"}
    near = {**wanted, "precision": "fp32", "views": {"pad": 2, "vertical": True}}
    del near["dataset"]
    nearest = {**wanted, "teacher": {"net": "resnet18", "weights": "3" * 64}}
    assert teacher_store.why_not(wanted, [far, nearest, near]) == (
        "the nearest of 3 other stores differs: teacher.weights is 333333333333…, not 000000000000…"
    )
    text = teacher_store.why_not(wanted, [near])
    for part in ('precision is "fp32", not "bf16"', "views.pad is 2, not 4", "views.vertical is true, not absent"):
        assert part in text
    assert "dataset.name is absent, not" in text
    long = {**wanted, "precision": ["x" * 100, 1]}
    assert "precision is [" in teacher_store.why_not(long, [{**wanted, "precision": ["x" * 100, 2]}])


def test_removing_disturbs_nobody_who_reads(tmp_path: Path) -> None:
    store, expected = filled(tmp_path)
    assert store.read(*every_pair(store))[1].all()
    (tmp_path / f".removed-{store.folder.name}-cut-short").mkdir()
    teacher_store.remove(store.folder)
    assert list(tmp_path.iterdir()) == []
    values, valid = store.read(*every_pair(store))
    assert valid.all()
    assert torch.equal(values["logits"], expected)
    with pytest.raises(StoreFullError, match="No such file"):
        store.write({"logits": expected}, *every_pair(store))
    teacher_store.remove(store.folder)  # another process was faster
    assert valid_rows(open_store(tmp_path), expected) == []


def test_a_store_that_is_being_removed_is_found_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, expected = filled(tmp_path)
    monkeypatch.setattr(teacher_store.shutil, "rmtree", lambda path: None)  # as if it took long
    teacher_store.remove(store.folder)
    assert not store.folder.exists()
    assert teacher_store.stores_in(tmp_path) == []
    assert valid_rows(open_store(tmp_path), expected) == []


# --- room ---


def test_a_store_beyond_its_budget_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_samples": 50_000, "num_views": 162, "widths": {"logits": 100}}
    full = 50_000 * 162 * (200 + 4)
    with pytest.raises(StoreSizeError) as caught:
        open_store(tmp_path / "root", max_bytes=full - 1, **options)
    assert caught.value.reason == "teacher"
    for words in ("(logits-100-fp16) need 1.65 GB", "the 1.65 GB allowed", "teacher.max_gb", "teacher.top_k", "off"):
        assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    open_store(tmp_path / "root", max_bytes=full, **options)


def test_the_budget_is_that_of_all_stores_together(tmp_path: Path) -> None:
    first, expected = filled(tmp_path)
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    other: dict[str, Any] = {"manifest": {**MANIFEST, "precision": "bf16"}}
    with pytest.raises(StoreSizeError, match="allowed"):
        open_store(tmp_path, max_bytes=used + 18 * 24 - 1, **other)
    second = open_store(tmp_path, max_bytes=used + 18 * 24, **other)
    # what is there already needs no room, even when the budget was lowered meanwhile
    assert valid_rows(open_store(tmp_path, max_bytes=1), expected) == list(range(18))
    with pytest.raises(StoreSizeError, match="allowed"):
        open_store(tmp_path, max_bytes=used + 17 * 24, dtype="fp32")
    # An open store has its room, though nothing is stored yet: whoever comes later sees it.
    with pytest.raises(StoreSizeError, match="allowed"):
        open_store(tmp_path, max_bytes=used + 2 * 18 * 24 - 1, manifest={**MANIFEST, "precision": "fp16"})
    second.write({"logits": expected}, *every_pair(second))
    assert first.folder != second.folder


def test_the_budget_counts_the_epochs_that_are_to_come(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_views": None, "num_samples": 1000}
    epochs = [(3, epoch) for epoch in range(10)]
    with pytest.raises(StoreSizeError):
        open_store(tmp_path, max_bytes=11 * 24_000 - 1, epochs=epochs, **options)
    store = open_store(tmp_path, max_bytes=12 * 24_000, epochs=epochs, **options)
    samples, views = torch.arange(1000), torch.full((1000,), -1)
    for epoch in range(5):
        store.write({"logits": torch.zeros(1000, 10)}, samples, views, 3, epoch)
    open_store(tmp_path, max_bytes=12 * 24_000, epochs=epochs, **options)  # resumed: half is there
    with pytest.raises(StoreSizeError):
        open_store(tmp_path, max_bytes=12 * 24_000, epochs=[(4, epoch) for epoch in range(10)], **options)


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(teacher_store.shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 400, 400))
    with pytest.raises(
        StoreSizeError, match=r"need 4.32e-07 GB more, but the disk has 4e-07 GB free.*teacher.cache_dir"
    ):
        open_store(tmp_path / "deep" / "root")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    _, expected = filled(tmp_path)
    monkeypatch.setattr(teacher_store.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 0))
    assert valid_rows(open_store(tmp_path), expected) == list(range(18))  # what is on the disk needs no more of it


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("after", range(6))
def test_a_full_disk_is_an_error_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, code: int
) -> None:
    store, expected = filled(tmp_path)
    pwrite, calls = os.pwrite, 0

    def full(file: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return pwrite(file, data[: len(data) // 2 + 1], offset)  # the last that there was room for

    monkeypatch.setattr(os, "pwrite", full)
    rows = torch.tensor([2, 3, 4, 9])
    with pytest.raises(StoreFullError, match=os.strerror(code)) as caught:
        store.write({"logits": expected[rows] + 1}, rows // 3, rows % 3)
    assert str(store.folder) in str(caught.value)
    assert caught.value.reason == "teacher"
    monkeypatch.undo()
    values, valid = store.read(*every_pair(store))
    for row in range(18):
        right = [expected[row]] + ([expected[row] + 1] if row in rows else [])
        assert not valid[row] or any(torch.equal(values["logits"][row], as_fp16(value)) for value in right)
    assert valid[[0, 1, 5, 6, 7, 8, *range(10, 18)]].all()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    store, expected = filled(tmp_path)
    assert valid_rows(store, expected) == list(range(18))


def test_a_root_that_cannot_be_made_is_an_error_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreFullError, match="Not a directory"):
        open_store(tmp_path / "file" / "root")

"""Checkpoint files: read back, verified, never executed."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import MAGIC, has_trailer, load_checkpoint, save_checkpoint
from utils import RunError

STATE = {"epoch": 3, "step": 0, "net": {"section": {"name": "tiny"}}, "state_dict": {"weight": torch.arange(300.0)}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.pth.tar"
    save_checkpoint(path, STATE)
    return path


def test_a_checkpoint_is_read_back_and_plain_torch_reads_it_too(checkpoint: Path) -> None:
    state, sha = load_checkpoint(checkpoint)
    assert state["epoch"] == 3
    assert torch.equal(state["state_dict"]["weight"], torch.arange(300.0))
    assert sha == save_checkpoint(checkpoint, STATE)
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 3
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.testzip() is None


def test_every_truncation_is_detected(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    for size in [0, 1, 39, 40, 41, 100, len(whole) // 2, len(whole) - 40, len(whole) - 1]:
        checkpoint.write_bytes(whole[:size])
        with pytest.raises(RunError, match=r"cut short|does not match|cannot be parsed"):
            load_checkpoint(checkpoint)


def test_every_flipped_bit_is_detected(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    draw = random.Random(0)
    positions = [*range(60), *range(len(whole) - 60, len(whole)), *(draw.randrange(len(whole)) for _ in range(300))]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        checkpoint.write_bytes(damaged)
        with pytest.raises(RunError):
            load_checkpoint(checkpoint)


def test_a_hole_of_zeros_is_detected(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:200] + bytes(400) + whole[600:])
    with pytest.raises(RunError, match="damaged"):
        load_checkpoint(checkpoint)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def with_trailer(content: bytes) -> bytes:
    return content + MAGIC + hashlib.sha256(content).digest()


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    path, proof = tmp_path / "best.pth.tar", tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save({**STATE, "extra": Malicious(proof)}, buffer)
    for content in (buffer.getvalue(), pickle.dumps({**STATE, "extra": Malicious(proof)})):
        path.write_bytes(with_trailer(content))
        with pytest.raises(RunError, match="cannot be parsed"):
            load_checkpoint(path)
    assert not proof.exists()


def test_compressed_entries_are_refused_as_a_bomb(tmp_path: Path) -> None:
    buffer, bomb = io.BytesIO(), io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    path = tmp_path / "best.pth.tar"
    path.write_bytes(with_trailer(bomb.getvalue()))
    with pytest.raises(RunError, match="compressed"):
        load_checkpoint(path)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "best.pth.tar"
    with pytest.raises(RunError, match="does not exist"):
        load_checkpoint(path)
    path.mkdir()
    with pytest.raises(RunError, match="is not a file"):
        load_checkpoint(path)
    path.rmdir()
    os.mkfifo(path)  # opening it would wait for ever
    with pytest.raises(RunError, match="is not a file"):
        load_checkpoint(path)
    path.unlink()
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    path.write_bytes(with_trailer(buffer.getvalue()))
    with pytest.raises(RunError, match="lacks epoch, net or state_dict"):
        load_checkpoint(path)


# --- checkpoints of the ancestor ---

WEIGHTS = {"conv1.weight": torch.arange(6.0), "bn1.running_mean": torch.zeros(3)}


def write_foreign(path: Path, state: Any, legacy_format: bool = False) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=not legacy_format)
    return path


@pytest.mark.parametrize("legacy_format", [False, True], ids=["zip", "pickles of torch 0.3"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("optimizer", ["optim_dict", "optimizer"])
def test_a_checkpoint_of_the_ancestor_is_read_as_weights(
    tmp_path: Path, prefix: str, optimizer: str, legacy_format: bool
) -> None:
    weights = OrderedDict((f"{prefix}{name}", value) for name, value in WEIGHTS.items())
    moments = torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1).state_dict()
    path = write_foreign(
        tmp_path / "best.pth.tar", {"epoch": 7, "state_dict": weights, optimizer: moments, "acc": 0.9}, legacy_format
    )
    state, sha = load_checkpoint(path, foreign=True)
    assert sha == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (state["net"], state["epoch"], state["step"]) == (None, 7, 0)
    assert type(state["state_dict"]) is dict  # without _metadata, which would make num_batches_tracked required
    assert list(state["state_dict"]) == list(WEIGHTS)
    assert all(torch.equal(state["state_dict"][name], value) for name, value in WEIGHTS.items())


def test_a_prefix_that_only_some_names_have_is_part_of_them(tmp_path: Path) -> None:
    weights = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    state, _ = load_checkpoint(write_foreign(tmp_path / "x.pth.tar", {"state_dict": weights}), foreign=True)
    assert list(state["state_dict"]) == ["module.a", "b"]
    assert state["epoch"] == 0


def test_another_programs_checkpoint_is_refused_where_only_ours_will_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no verification trailer"):
        load_checkpoint(write_foreign(tmp_path / "last.pth.tar", {"state_dict": WEIGHTS}))


def test_ours_without_its_trailer_is_not_taken_for_another_programs(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[: -len(MAGIC) - 32])
    with pytest.raises(RunError, match="lost its verification trailer"):
        load_checkpoint(checkpoint, foreign=True)


def test_ours_is_verified_where_another_programs_would_do(checkpoint: Path) -> None:
    state, _ = load_checkpoint(checkpoint, foreign=True)
    assert state["net"] is not None
    whole = bytearray(checkpoint.read_bytes())
    whole[300] ^= 1
    checkpoint.write_bytes(whole)
    with pytest.raises(RunError, match="is damaged"):
        load_checkpoint(checkpoint, foreign=True)


@pytest.mark.parametrize(
    "state", [[1], {"epoch": 1}, {"state_dict": {}}, {"state_dict": {"a": 1}}, {"state_dict": [1]}]
)
def test_what_holds_no_named_tensors_is_no_checkpoint(tmp_path: Path, state: Any) -> None:
    with pytest.raises(RunError, match="is no checkpoint"):
        load_checkpoint(write_foreign(tmp_path / "x.pth.tar", state), foreign=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not a pickle", pickle.dumps(Path())])
def test_bytes_that_are_no_checkpoint_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pth.tar"
    path.write_bytes(content)
    with pytest.raises(RunError, match="cannot be parsed") as caught:
        load_checkpoint(path, foreign=True)
    assert "\n" not in str(caught.value)


def test_nothing_in_another_programs_checkpoint_is_executed(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    for legacy_format in (False, True):
        state = {"state_dict": WEIGHTS, "extra": Malicious(proof)}
        with pytest.raises(RunError, match="cannot be parsed"):
            load_checkpoint(write_foreign(tmp_path / "x.pth.tar", state, legacy_format), foreign=True)
    assert not proof.exists()


def test_a_file_of_ours_is_told_by_its_end_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "best.pth.tar"
    save_checkpoint(path, {"epoch": 1, "net": {}, "state_dict": {}})
    assert has_trailer(path)
    for other in (b"", b"x", path.read_bytes()[:-1]):
        (tmp_path / "other").write_bytes(other)
        assert not has_trailer(tmp_path / "other")

"""Checkpoint files: read back, verified, never executed."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import MAGIC, load_checkpoint, save_checkpoint
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

"""Checkpoint files that verify themselves. torch is imported by what uses it, so that importing this costs nothing."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils import FAILED, RunError, write_file

MAGIC = b"KDCKPT1\n"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> str:
    """Writes a checkpoint that verifies itself: torch's zip format, then MAGIC and the SHA-256 of all before.

    Returns:
        The SHA-256 in hex.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    digest = hashlib.sha256(content)
    write_file(path, content + MAGIC + digest.digest())
    return digest.hexdigest()


def load_checkpoint(path: Path, *, foreign: bool = False) -> tuple[dict[str, Any], str]:
    """Reads, verifies and parses a checkpoint, on the CPU; nothing in it is executed.

    Args:
        path: The file.
        foreign: Whether one that another program wrote will do: a dict with `state_dict`, as the ancestor's are.
            Nothing vouches for its content, and its state holds no more than `state_dict` and `epoch`; `net` is None.

    Returns:
        The state and the SHA-256 of its content in hex.

    Raises:
        RunError: Reason `checkpoint`: missing, damaged, or not written by this program.
    """
    import torch

    def unusable(why: str) -> RunError:
        return RunError(f"{path}: {why}", "checkpoint", FAILED)

    if not path.is_file():  # also: a FIFO, which must not be opened
        raise unusable("is not a file" if path.exists() else "does not exist")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unusable(f"cannot be read: {error.strerror}") from None
    content, trailer = data[: -len(MAGIC) - 32], data[-len(MAGIC) - 32 :]
    ours = trailer.startswith(MAGIC)
    if not ours and not foreign:
        raise unusable("has no verification trailer: cut short, or written by another program")
    content = content if ours else data
    digest = hashlib.sha256(content)
    if ours and trailer[len(MAGIC) :] != digest.digest():
        raise unusable("is damaged: its content does not match its SHA-256")
    try:
        if ours or zipfile.is_zipfile(io.BytesIO(content)):  # before torch 1.6 it was a row of pickles
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("has compressed entries, which torch never writes")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its own text advises to load it unsafely
        raise unusable("cannot be parsed: no checkpoint, or one that holds more than tensors and plain types") from None
    except Exception as error:  # whatever a hostile file makes of the parser
        why = re.split(r"[.:]\s|\n", f"{type(error).__name__}: {error}".replace(": ", " ", 1))[0]
        raise unusable(f"cannot be parsed: {why}; it is cut short or no checkpoint") from None
    if not ours:
        return _read_foreign(state, unusable), digest.hexdigest()
    if not isinstance(state, dict) or not {"epoch", "net", "state_dict"} <= state.keys():
        raise unusable("is not a checkpoint of an experiment: it lacks epoch, net or state_dict")
    return state, digest.hexdigest()


def _read_foreign(state: Any, unusable: Callable[[str], RunError]) -> dict[str, Any]:
    import torch

    def is_weights(value: Any) -> bool:
        named = isinstance(value, dict) and len(value) > 0
        return named and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())

    if isinstance(state, dict) and isinstance(state.get("net"), dict) and "section" in state["net"]:
        raise unusable("has lost its verification trailer: it was cut short")
    # The ancestor's key, that of kuangliu/pytorch-cifar and its followers, or nothing but the weights.
    places = [state.get("state_dict"), state.get("net"), state] if isinstance(state, dict) else []
    weights = next((value for value in places if is_weights(value)), None)
    if weights is None:
        raise unusable("is no checkpoint: it holds no named tensors, alone or as state_dict or net")
    # DataParallel puts "module." before every name. A plain dict, without the version that torch keeps beside the
    # names, lets batch norms from before 2018 load without their num_batches_tracked.
    prefix = "module." if all(name.startswith("module.") for name in weights) else ""
    epoch = state.get("epoch")
    return {
        "net": None,
        "state_dict": {name.removeprefix(prefix): value for name, value in weights.items()},
        "epoch": epoch if isinstance(epoch, int) else 0,
        "step": 0,
    }


def has_trailer(path: Path) -> bool:
    """Tells whether a file ends as ours do, at a glance: it needs no torch, and does not look whether it is whole."""
    size = len(MAGIC) + 32
    with path.open("rb") as file:
        file.seek(-min(size, path.stat().st_size), os.SEEK_END)
        return file.read().startswith(MAGIC)


def is_foreign(path: Path) -> bool:
    """Tells whether a file is a checkpoint of another program."""
    try:
        return load_checkpoint(path, foreign=True)[0]["net"] is None
    except RunError:
        return False

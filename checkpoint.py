"""Checkpoint files that verify themselves. torch is imported by what uses it, so that importing this costs nothing."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
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


def load_checkpoint(path: Path) -> tuple[dict[str, Any], str]:
    """Reads, verifies and parses a checkpoint, on the CPU; nothing in it is executed.

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
    if not trailer.startswith(MAGIC):
        raise unusable("has no verification trailer: cut short, or written by another program")
    digest = hashlib.sha256(content)
    if trailer[len(MAGIC) :] != digest.digest():
        raise unusable("is damaged: its content does not match its SHA-256")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("has compressed entries, which torch never writes")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile file makes of the parser
        raise unusable(f"cannot be parsed: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or not {"epoch", "net", "state_dict"} <= state.keys():
        raise unusable("is not a checkpoint of an experiment: it lacks epoch, net or state_dict")
    return state, digest.hexdigest()

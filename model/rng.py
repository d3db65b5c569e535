"""Seeds as pure functions of what they are for."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Returns a seed in [0, 2**63) that depends on all parts and on nothing else.

    Unlike `seed + epoch` no two uses collide, and unlike `hash` it is the same in every process.

    Args:
        parts: For instance `(seed, "order", epoch)`.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

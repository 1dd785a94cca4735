"""Keyed draws: the same key gives the same number, whatever was drawn before. There is no "next" number anywhere."""

from hashlib import blake2b
from struct import Struct

_PACKERS = tuple(Struct(f"<{n}q") for n in range(12))
"""By how many integers a key has."""


def bits(seed: int, stream: str, *key: int) -> int:
    """64 bits. A key has at most ten integers."""
    raw = blake2b(_PACKERS[len(key) + 1].pack(seed, *key), digest_size=8, key=stream.encode()).digest()
    return int.from_bytes(raw, "little")


def uniform(seed: int, stream: str, *key: int) -> float:
    """In [0, 1)."""
    return (bits(seed, stream, *key) >> 11) * 2.0**-53

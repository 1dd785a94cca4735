"""Keyed draws: a number depends on the seed, the stream's name and the key, never on what was drawn before.

So a fault or a message more in one place changes no draw in another, and a failing seed stays the same world while it is being debugged.
"""

from collections.abc import Sequence
from hashlib import blake2b
from struct import pack
from typing import TypeVar

T = TypeVar("T")


class KeyedRng:
    """Implements `ports.Rng`."""

    def __init__(self, seed: int) -> None:
        self._key = pack("<q", seed)
        self._streams: dict[str, bytes] = {}

    def bits(self, stream: str, *key: int) -> int:
        """64 bits."""
        name = self._streams.get(stream)
        if name is None:
            name = self._streams[stream] = blake2b(stream.encode(), digest_size=16, key=self._key).digest()
        raw = blake2b(pack(f"<{len(key)}q", *key), digest_size=8, key=name).digest()
        return int.from_bytes(raw, "little")

    def uniform(self, stream: str, *key: int) -> float:
        """In [0, 1)."""
        return (self.bits(stream, *key) >> 11) * 2.0**-53

    def between(self, low: int, high: int, stream: str, *key: int) -> int:
        """An integer in [low, high]."""
        return low + self.bits(stream, *key) % (high - low + 1)


class Draws:
    """Draws in sequence from one stream, for building a scenario."""

    def __init__(self, rng: KeyedRng, stream: str, *key: int) -> None:
        self._rng, self._stream, self._key, self._count = rng, stream, key, 0

    def uniform(self) -> float:
        self._count += 1
        return self._rng.uniform(self._stream, *self._key, self._count)

    def between(self, low: int, high: int) -> int:
        self._count += 1
        return self._rng.between(low, high, self._stream, *self._key, self._count)

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[self.between(0, len(options) - 1)]

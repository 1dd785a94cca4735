"""Host memory as a tier: an anonymous arena of equal slots, one block each.

Copies run without the interpreter's lock. One thread puts, gets and deletes; another may read what a name's view shows as long as nobody
deletes it.
"""

import ctypes
import mmap
from contextlib import suppress

from headrace.types.ids import BlockHash


class MemoryStore:
    """Implements `ports.Store`."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._map = mmap.mmap(-1, max(1, blocks * block_bytes))
        self._view = memoryview(self._map)
        self._free = list(range(blocks - 1, -1, -1))
        self._slots: dict[BlockHash, int] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def put(self, key: BlockHash, value: memoryview) -> None:
        """Raises MemoryError if every slot is taken."""
        slot = self._slots.get(key)
        if slot is None:
            if not self._free:
                raise MemoryError("host memory for cached blocks is full")
            slot = self._free.pop()
        copy(self._slot(slot), value)
        self._slots[key] = slot

    def get(self, key: BlockHash, target: memoryview) -> bool:
        slot = self._slots.get(key)
        if slot is None:
            return False
        copy(target, self._slot(slot))
        return True

    def view(self, key: BlockHash) -> memoryview | None:
        """Where it lies."""
        slot = self._slots.get(key)
        return None if slot is None else self._slot(slot)

    def delete(self, key: BlockHash) -> None:
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._free.append(slot)

    def close(self) -> None:
        self._view.release()
        # Where somebody still has a view, the mapping ends with that.
        with suppress(BufferError):
            self._map.close()

    def _slot(self, slot: int) -> memoryview:
        return self._view[slot * self._block_bytes : (slot + 1) * self._block_bytes]


def copy(target: memoryview, source: memoryview) -> None:
    """Bytes of equal length, both writable memory; without the interpreter's lock."""
    assert len(target) == len(source)
    array = ctypes.c_char * len(target)
    ctypes.memmove(array.from_buffer(target), array.from_buffer(source), len(target))

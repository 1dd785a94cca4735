"""The memory of KV pools: sealed memory files that processes share by descriptor.

A pool has no name in any file system: it ends with the last process that has it open. Its size is sealed, as a shrunken file would kill
whoever reads it. `serve` makes all pools before it starts workers, which inherit the descriptors.
"""

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import threading

from headrace.live.memory import available_bytes
from headrace.live.settings import GIB, PoolLayout
from headrace.types.errors import ConfigError
from headrace.types.kv import KVSpec

log = logging.getLogger(__name__)

ALIGNMENT = max(4096, mmap.PAGESIZE)
"""Of each group's first block, bytes."""
MADV_POPULATE_WRITE = 23
FILL_PIECE = 8 * 2**20
"""Bytes touched at once while filling."""
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def layout_for(spec: KVSpec, nbytes: int) -> PoolLayout:
    """The most blocks, as many in each group, that fit into `nbytes`. Raises ConfigError if it is not even one."""
    block_bytes = [spec.block_bytes(g) for g in range(len(spec.groups))]
    count = (nbytes - ALIGNMENT * (len(block_bytes) - 1)) // sum(block_bytes)
    if count < 1:
        need = sum(block_bytes) / 2**20
        raise ConfigError(f"--kv-memory {nbytes} bytes hold not one block of this model ({need:.2f} MiB)")
    return layout_of(spec, (count,) * len(block_bytes))


def layout_of(spec: KVSpec, blocks: tuple[int, ...]) -> PoolLayout:
    """Groups one after the other, each aligned."""
    offsets: list[int] = []
    sizes: list[int] = []
    end = 0
    for group, count in enumerate(blocks):
        offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
        sizes.append(spec.block_bytes(group))
        end = offsets[-1] + count * sizes[-1]
    return PoolLayout(blocks, tuple(sizes), tuple(offsets), -(-end // ALIGNMENT) * ALIGNMENT)


def check_memory(nbytes: int, pools: int, swap_bytes: int = 0) -> None:
    """Raises ConfigError if so much memory is not there. `swap_bytes`: of all host areas together."""
    have = available_bytes()
    if nbytes * pools > have:
        each = f"{pools} pools of {nbytes / GIB:.2f} GiB" if pools > 1 else f"{nbytes / GIB:.2f} GiB"
        raise ConfigError(f"--kv-memory asks for {each}, but {have / GIB:.2f} GiB of memory are available")
    if swap_bytes and nbytes * pools + swap_bytes > have:
        raise ConfigError(
            f"--swap-space takes {swap_bytes / GIB:.2f} GiB of all workers together, beside {nbytes * pools / GIB:.2f} GiB of KV memory, "
            f"but {have / GIB:.2f} GiB of memory are available: lower either"
        )


class Pool:
    """A pool mapped into this process. Owns its descriptor."""

    def __init__(self, fd: int, layout: PoolLayout) -> None:
        self.fd = fd
        self.layout = layout
        os.set_inheritable(fd, False)
        self._map = mmap.mmap(fd, layout.total)
        self._view = memoryview(self._map)
        self._ended = threading.Event()
        self._filler: threading.Thread | None = None

    @classmethod
    def create(cls, name: str, layout: PoolLayout) -> "Pool":
        """A new pool of zeros; no memory is used until it is touched."""
        fd = os.memfd_create(f"headrace-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, layout.total)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return cls(fd, layout)

    @property
    def memory(self) -> memoryview:
        """All of it, writable."""
        return self._view

    def buffers(self) -> list[memoryview]:
        """The writable memory of each group, whole blocks. They keep the mapping alive."""
        layout = self.layout
        spans = zip(layout.offsets, layout.sizes, layout.blocks, strict=True)
        return [self._view[offset : offset + size * count] for offset, size, count in spans]

    def fill(self) -> None:
        """Touch all memory, in the background and with low priority. What is written meanwhile stays."""
        self._filler = threading.Thread(target=self._fill, name="headrace-fill", daemon=True)
        self._filler.start()

    def filled(self, timeout_s: float) -> bool:
        """Wait for that."""
        if self._filler is not None:
            self._filler.join(timeout_s)
        return self._filler is None or not self._filler.is_alive()

    def close(self) -> None:
        """Give up this process's hold. Views that are still in use keep the mapping until they go."""
        self._ended.set()
        if self._filler is not None:
            self._filler.join()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            # Somebody still has a view: the mapping ends with it.
            pass

    def _fill(self) -> None:
        # By ctypes, as mmap.madvise holds the interpreter's lock: a GiB takes a second.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        anchor = ctypes.c_char.from_buffer(self._map)
        start = ctypes.addressof(anchor)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for at in range(0, self.layout.total, FILL_PIECE):
            if self._ended.is_set():
                break
            piece = min(FILL_PIECE, self.layout.total - at)
            if libc.madvise(start + at, piece, MADV_POPULATE_WRITE):
                name = errno.errorcode.get(ctypes.get_errno(), "?")
                log.warning(
                    "cannot fill the pool ahead of use (%s): the first use of each block is slower", name
                )
                break
        del anchor

"""Pages of a memory file (Linux): a range is reserved without access, and pieces of the file are mapped into it, shared.

A mapped piece is also faulted in, for writing: else the first step that touches it would do that, page by page.
"""

import ctypes
import errno
import logging
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from headrace.compute.memory.pages import Unmappable

log = logging.getLogger(__name__)

MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000
MADV_POPULATE_WRITE = 23
FAILED = ctypes.c_void_p(-1).value
MAPPINGS_LEFT = 4096
"""Of those that the system allows a process: for libraries, threads and the allocator."""

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
)
libc.mmap.restype = ctypes.c_void_p
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class MemfdPages:
    """Implements `Pages`. The descriptor stays its owner's."""

    def __init__(self, fd: int, *, populate: bool = True) -> None:
        """`populate`: fault pieces in as they are mapped."""
        self.page_bytes = mmap.PAGESIZE
        # A piece in the middle of a range splits what is around it: two mappings each, at most.
        self.pieces_max = max(1, (mappings_allowed() - MAPPINGS_LEFT) // 2)
        self._fd = fd
        self._populate = populate
        self._ranges: list[tuple[int, int]] = []

    def reserve(self, nbytes: int) -> int:
        address = self._map(None, nbytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        self._ranges.append((address, nbytes))
        return address

    def show(self, address: int, offset: int, nbytes: int) -> None:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            self._map(address, nbytes, access, mmap.MAP_SHARED | MAP_FIXED, self._fd, offset)
        except Unmappable:
            # It may have taken away what was there, and another mapping of this process could get the place.
            self.hide(address, nbytes)
            raise
        if self._populate and libc.madvise(address, nbytes, MADV_POPULATE_WRITE):
            log.info(
                "pieces are not faulted in as they are mapped: %s", errno.errorcode.get(ctypes.get_errno())
            )
            self._populate = False

    def hide(self, address: int, nbytes: int) -> None:
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        self._map(address, nbytes, 0, kind, -1, 0)

    def bytes_at(self, address: int, nbytes: int) -> Tensor:
        return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)

    def resident_bytes(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        for address, nbytes in self._ranges:
            libc.munmap(address, nbytes)
        self._ranges.clear()

    def _map(self, address: int | None, nbytes: int, access: int, kind: int, fd: int, offset: int) -> int:
        found = libc.mmap(address, nbytes, access, kind, fd, offset)
        if found != FAILED:
            return found
        code = ctypes.get_errno()
        if code == errno.ENOMEM:
            raise Unmappable(
                f"the system maps no more for this process: {nbytes} bytes (see vm.max_map_count and ulimit -v); use a larger "
                "--block-size, or --memory paged"
            )
        raise OSError(code, f"cannot map {nbytes} bytes: {os.strerror(code)}")


def mappings_allowed() -> int:
    """How many mappings a process may have."""
    return int(Path("/proc/sys/vm/max_map_count").read_text())

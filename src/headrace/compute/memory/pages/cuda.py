"""Pages of an NVIDIA device's memory, by the driver's virtual memory calls (CUDA driver API, section "Virtual Memory Management").

The pool is physical memory in handles of one size, which the driver maps into reserved address ranges. It maps whole handles only, so a
block must be a multiple of `page_bytes` (2 MiB with the stock driver; smaller pages take vAttention's modified one).

This file has never run on a GPU: it is tested against a stand-in for the driver. Attention on GPUs is not part of Headrace yet; what
would compute there gets its tensors from `bytes_at`.
"""

import ctypes
from ctypes import POINTER, byref, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_ushort, c_void_p
from typing import Any

import torch
from torch import Tensor

from headrace.compute.memory.pages import Unmappable

LIBRARY = "libcuda.so.1"
OUT_OF_MEMORY = 2
PINNED, ON_DEVICE, FILE_DESCRIPTOR, MINIMUM, READ_WRITE = 1, 1, 1, 0, 3
"""Of CUmemAllocationType, CUmemLocationType, CUmemAllocationHandleType, CUmemAllocationGranularity_flags, CUmemAccess_flags."""


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", c_int), ("id", c_int))


class Flags(ctypes.Structure):
    """allocFlags of CUmemAllocationProp."""

    _fields_ = (("compression", c_ubyte), ("rdma", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4))


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("flags", Flags),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", c_int))


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(Properties), c_int),
    "cuMemCreate": (POINTER(c_uint64), c_size_t, POINTER(Properties), c_ulonglong),
    "cuMemRelease": (c_uint64,),
    "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_ulonglong),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_ulonglong),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(Access), c_size_t),
}


def open_driver() -> Any:
    """The driver's library. Raises OSError where there is none."""
    library = ctypes.CDLL(LIBRARY)
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


class CudaPages:
    """Implements `Pages`. Owns the pool's memory."""

    pieces_max = 2**62

    def __init__(self, nbytes: int, device: int = 0, driver: Any = None) -> None:
        """A pool of at least so many bytes. Raises OSError without a driver, Unmappable if the device has not so much memory."""
        self._driver = driver or open_driver()
        self._device = device
        self._context = c_void_p()
        self._handles: list[int] = []
        self._ranges: list[tuple[int, int]] = []
        self._shown: dict[int, None] = {}
        """Addresses, page by page."""
        ordinal, step = c_int(), c_size_t()
        self._check("cuInit", 0)
        self._check("cuDeviceGet", byref(ordinal), device)
        self._check("cuDevicePrimaryCtxRetain", byref(self._context), ordinal)
        # A handle that can be exported lets other processes map the same memory.
        self._properties = Properties(PINNED, FILE_DESCRIPTOR, Location(ON_DEVICE, device))
        self._enter()
        self._check("cuMemGetAllocationGranularity", byref(step), byref(self._properties), MINIMUM)
        self.page_bytes = step.value
        try:
            for _ in range(-(-nbytes // self.page_bytes)):
                handle = c_uint64()
                self._check("cuMemCreate", byref(handle), self.page_bytes, byref(self._properties), 0)
                self._handles.append(handle.value)
        except Unmappable:
            self.close()
            raise

    def reserve(self, nbytes: int) -> int:
        self._enter()
        address = c_uint64()
        self._check("cuMemAddressReserve", byref(address), nbytes, self.page_bytes, 0, 0)
        self._ranges.append((address.value, nbytes))
        return address.value

    def show(self, address: int, offset: int, nbytes: int) -> None:
        self._enter()
        self._hide(address, nbytes)
        page = self.page_bytes
        try:
            for at in range(0, nbytes, page):
                self._check("cuMemMap", address + at, page, 0, self._handles[(offset + at) // page], 0)
                self._shown[address + at] = None
            access = Access(Location(ON_DEVICE, self._device), READ_WRITE)
            self._check("cuMemSetAccess", address, nbytes, byref(access), 1)
        except Unmappable:
            self._hide(address, nbytes)
            raise

    def hide(self, address: int, nbytes: int) -> None:
        self._enter()
        self._hide(address, nbytes)

    def bytes_at(self, address: int, nbytes: int) -> Tensor:
        return torch.as_tensor(Span(address, nbytes), device=f"cuda:{self._device}")

    def resident_bytes(self) -> int:
        return len(self._handles) * self.page_bytes

    def close(self) -> None:
        self._enter()
        for address, nbytes in self._ranges:
            self._hide(address, nbytes)
            self._check("cuMemAddressFree", address, nbytes)
        for handle in self._handles:
            self._check("cuMemRelease", handle)
        self._ranges.clear()
        self._handles.clear()

    def _enter(self) -> None:
        """The driver's calls are of the thread's current context, and look-ahead has a thread of its own."""
        self._check("cuCtxSetCurrent", self._context)

    def _hide(self, address: int, nbytes: int) -> None:
        # The driver refuses to unmap what is not mapped.
        for at in range(address, address + nbytes, self.page_bytes):
            if at in self._shown:
                self._check("cuMemUnmap", at, self.page_bytes)
                del self._shown[at]

    def _check(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code == OUT_OF_MEMORY:
            raise Unmappable(f"{name}: device {self._device} has no memory or no addresses left")
        if code:
            raise OSError(f"{name} failed on device {self._device}: CUDA error {code}")


class Span:
    """Memory as other libraries take it (CUDA array interface, version 3)."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

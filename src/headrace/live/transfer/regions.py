"""Registered memory, and what a peer must hold to write into it.

A `Descriptor` is plain data: it travels in any message. It names one region of one incarnation; its token is drawn when the region is
registered, so a descriptor that outlives its region, or is made up, is refused.
"""

import secrets

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.types.errors import TransferError
from headrace.types.ids import Address

REGIONS_MAX = 1 << 16


class Way(msgspec.Struct, frozen=True, array_like=True):
    """How a peer is reached by one transport: one address per lane. What an address says is the transport's own."""

    transport: str
    lanes: tuple[str, ...]


class Card(msgspec.Struct, frozen=True):
    """One incarnation of a peer, and the ways to it."""

    owner: Address
    host: str
    """Equal for processes that can share memory."""
    ways: tuple[Way, ...]

    def way(self, transport: str) -> Way | None:
        return next((way for way in self.ways if way.transport == transport), None)


class Descriptor(msgspec.Struct, frozen=True):
    """One region of a peer, as its peers know it."""

    card: Card
    region: int
    nbytes: int
    layout: str
    """What lies in it (a hash of model and KV spec, say): both sides' must be equal."""
    token: str

    @property
    def owner(self) -> Address:
        return self.card.owner


class Region:
    """Memory of this process that is registered. `fd`: of the memory file that it maps from its beginning, if it is one."""

    def __init__(self, number: int, memory: memoryview, layout: str, fd: int = -1) -> None:
        self.number = number
        self.layout = layout
        self.fd = fd
        self.token = secrets.token_hex(8)
        self.memory = memory.cast("B")
        # Keeps the memory alive, and gives its address.
        self.bytes: NDArray[np.uint8] = np.frombuffer(self.memory, np.uint8)
        self.nbytes = self.bytes.nbytes
        self.address: int = self.bytes.ctypes.data


class Regions:
    """Those of one engine, by number; a number is not used twice."""

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}
        self._next = 0

    def __contains__(self, region: Region) -> bool:
        return self._regions.get(region.number) is region

    def add(self, memory: memoryview, layout: str, fd: int) -> Region:
        if self._next >= REGIONS_MAX:
            raise TransferError(f"{REGIONS_MAX} regions have been registered: no number is left")
        region = self._regions[self._next] = Region(self._next, memory, layout, fd)
        self._next += 1
        return region

    def remove(self, region: Region) -> None:
        del self._regions[region.number]

    def check(self, number: int, nbytes: int, layout: str, token: str) -> Region:
        """The region that a peer's descriptor names. Raises TransferError saying what differs."""
        region = self._regions.get(number)
        if region is None:
            raise TransferError(f"there is no region {number}")
        for what, theirs, ours in (
            ("layout", layout, region.layout),
            ("size", nbytes, region.nbytes),
        ):
            if theirs != ours:
                raise TransferError(
                    f"the {what} of region {number} is {ours!r}, and {theirs!r} in the descriptor"
                )
        if not secrets.compare_digest(token.encode(), region.token.encode()):
            raise TransferError(f"the token for region {number} is wrong")
        return region

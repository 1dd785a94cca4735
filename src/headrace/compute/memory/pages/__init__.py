"""Memory that can be seen at several virtual addresses. One file a kind of memory."""

from typing import Protocol

from torch import Tensor

from headrace.types.errors import HeadraceError


class Unmappable(HeadraceError):
    """The system maps no more; the message says what to do."""


class Pages(Protocol):
    """The memory of one pool, and addresses under which its pages may be shown. May be called from any thread, one at a time."""

    page_bytes: int
    """Addresses, offsets and sizes are multiples of it."""
    pieces_max: int
    """How many pieces may be shown at once, whatever their sizes."""

    def reserve(self, nbytes: int) -> int:
        """The address of a new range that shows nothing and takes no memory. Raises Unmappable."""
        ...

    def show(self, address: int, offset: int, nbytes: int) -> None:
        """From now on the range at `address` shows the pool's bytes from `offset` on, and no longer what it showed. Raises Unmappable."""
        ...

    def hide(self, address: int, nbytes: int) -> None:
        """The range shows nothing any more; it stays reserved."""
        ...

    def bytes_at(self, address: int, nbytes: int) -> Tensor:
        """A reserved range as uint8 [nbytes]. What is not shown must not be touched; the range must outlive the tensor."""
        ...

    def resident_bytes(self) -> int:
        """Memory of the pool that exists, bytes."""
        ...

    def close(self) -> None:
        """Give all ranges back. The pool stays."""
        ...

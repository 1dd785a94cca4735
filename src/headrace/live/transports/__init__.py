"""How bytes get into a peer's memory. One file a transport, chosen by its name, behind the protocols of this module.

A transport knows nothing of transfers, counts or deadlines: `live.transfer.engine` does. It owes the engine:
 1. A shard's note is reported at the target (`Site.landed`) when all of its bytes are there, whatever else has come: once, or never.
 2. A message is reported whole (`Site.mailed`), once or never. Nothing is in any order.
 3. A link or its inbound end that fails in any way says so once (`broken`), and moves nothing more on its own.
 4. `close` returns control only by `closed`: when it is called, no thread of this process moves anything for that link any more.
All methods are called on the engine's thread and return at once; a `Site`'s may be called from any thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol

from headrace import registry
from headrace.live.transfer.pieces import Pieces
from headrace.live.transfer.regions import Card, Descriptor, Region
from headrace.types.errors import ConfigError
from headrace.types.ids import Address


@dataclass(frozen=True, slots=True)
class Settings:
    """What a transport is told when it is made."""

    address: Address
    """The engine's own."""
    secret: str = field(default="", repr=False)
    """Shared by all that may connect; it proves itself and never travels."""
    lanes: int = 1
    hosts: tuple[str, ...] = ("127.0.0.1",)
    """Where to listen, one a network card; lanes go round them."""
    pace: int = 0
    """Bytes a second that all lanes of a link send at most; 0: as they can."""
    tls: tuple[str, str, str] | None = None
    """Files: certificate, its key, and the certificates that peers' must be signed by."""


@dataclass(eq=False, slots=True)
class Shard:
    """What one lane moves at a time."""

    note: int
    lane: int
    source: Region | None
    """None if there are no pieces."""
    pieces: Pieces
    target: Descriptor | None = None
    dropped: bool = False
    """Set by the engine: do not start it any more. A transport that has not begun says `Upward.dropped`."""


class Upward(Protocol):
    """The engine's side of a link, at the source."""

    def up(self) -> None:
        """The peer has taken the link: whatever earlier links of ours moved to it has landed or never will."""
        ...

    def dropped(self, shard: Shard) -> None:
        """Nothing of it was or will be moved."""
        ...

    def replied(self, message: bytes, fds: Sequence[int]) -> None: ...

    def broken(self, reason: str, lane: int, *, final: bool) -> None:
        """`final`: the peer will have no link of ours, and what earlier ones moved to it has landed or never will."""
        ...


class Link(Protocol):
    """A source's way to one incarnation of one peer. Opened by `Transport.link`; carries nothing before `Upward.up`."""

    def write(self, shard: Shard) -> None: ...

    def send(self, message: bytes) -> None: ...

    def attach(self, descriptor: Descriptor, fds: Sequence[int]) -> None:
        """The peer granted this region; writes into it may follow. `fds` are the link's own now. Raises TransferError."""
        ...

    def moved(self, lane: int) -> int:
        """Bytes that have left by this lane: while it grows the lane is alive."""
        ...

    def close(self, closed: Callable[[], None]) -> None:
        """`closed` may be called from any thread."""
        ...


class Inbound(Protocol):
    """A target's end of a link."""

    source: Address
    generation: int
    """Of the source's links to us: a later link replaces the earlier ones."""

    def accept(self) -> None:
        """No earlier link of the source moves anything here any more: let it begin (`Upward.up`)."""
        ...

    def refuse(self, reason: str) -> None: ...

    def grant(self, region: Region) -> Sequence[int]:
        """From now on this link may write into `region`. What must go with the answer: descriptors that map it."""
        ...

    def reply(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Never blocks: a source that does not read its answers loses the link."""
        ...

    def sever(self, gone: Callable[[], None]) -> None:
        """Close it: nobody is told of anything by it any more. `gone`, once and from any thread, when nobody moves anything here for it.

        That is soon where its source has ended or lets go; a source that is stopped while it copies into our memory keeps it until then.
        """
        ...


class Site(Protocol):
    """The engine's side, at the target."""

    def opened(self, inbound: Inbound) -> None:
        """A source that knows the secret wants a link: `accept` or `refuse` it."""
        ...

    def landed(self, inbound: Inbound, note: int) -> None: ...

    def mailed(self, inbound: Inbound, message: bytes) -> None: ...

    def broken(self, inbound: Inbound, reason: str) -> None: ...


class Transport(Protocol):
    one_host: bool
    """Only processes of one host reach each other by it."""

    def __init__(self, settings: Settings) -> None: ...

    def listen(self, site: Site) -> tuple[str, ...]:
        """From now on peers can connect. One address per lane. Raises ConfigError."""
        ...

    def register(self, region: Region) -> None:
        """Before anything is moved from or granted into it."""
        ...

    def unregister(self, region: Region) -> None: ...

    def link(self, peer: Card, generation: int, upward: Upward) -> Link:
        """Begin to connect."""
        ...

    def close(self) -> None:
        """Its links have been told to close, its inbound ends are severed. Waits for all of its threads."""
        ...


AUTO = ("shm", "tcp")
"""What "auto" stands for, the preferred one first. The last one leads to other hosts, too."""


def check_transport(name: str) -> None:
    """Raises ConfigError naming what exists."""
    # "loop" joins engines of one process: tests make it by hand.
    names = [*(n for n in registry.names("live.transports") if n != "loop"), "auto"]
    if name not in names:
        raise ConfigError(f"no live.transports {name!r}; there are: {', '.join(sorted(names))}")


def is_of_one_host(name: str) -> bool:
    """Do only processes of one host reach each other by it? Raises ConfigError."""
    check_transport(name)
    return name != "auto" and import_module(f"headrace.live.transports.{name}").Transport.one_host


def open_transports(name: str, settings: Settings) -> dict[str, Transport]:
    """By name, the preferred one first; "auto": shared memory between processes of one host, else TCP. Raises ConfigError."""
    check_transport(name)
    chosen = AUTO if name == "auto" else (name,)
    return {n: import_module(f"headrace.live.transports.{n}").Transport(settings) for n in chosen}

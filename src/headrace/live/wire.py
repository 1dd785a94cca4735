"""What hub and workers say to each other, beside the cores' messages.

Frames: a header (who to whom), a message, and what the shell attaches to it. The hub forwards between workers without reading the last two.
"""

from typing import Any, TypeVar

import msgspec
from msgspec.structs import asdict

from headrace.live.settings import WorkerConfig
from headrace.live.transfer.kv import Place
from headrace.types.errors import IncompatiblePeer
from headrace.types.ids import Address
from headrace.types.kv import KVSpec
from headrace.types.messages import AnyMessage, InstanceInfo
from headrace.types.payload import Emission, SequencePayload
from headrace.types.ranges import RangeCounts
from headrace.types.weights import Staged

PROTOCOL = 2
"""Counted up when frames or messages change."""

T = TypeVar("T")


class Hello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A worker's first message: what it is, and what must be equal among workers that hand KV to each other."""

    protocol: int = PROTOCOL
    secret: str
    fingerprint: str
    """Of the model's configuration and weights."""
    dtype: str
    block_size: int
    spec: KVSpec
    vocabulary: int
    numerics: str
    """Id of its arithmetic: equal ids promise equal bits."""
    promise: str = ""
    """What is promised in place of equal bits, if it is less."""
    place: Place
    """Of its pool."""
    version: int = 0
    """Of its weights."""


class Apply(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """First message of a worker that was started by hand, before it loads anything: who it would be, and what it would load."""

    protocol: int = PROTOCOL
    name: str = ""
    """Empty: any."""
    leaning: str
    host: str
    """Where it runs, as people call it."""
    fingerprint: str
    dtype: str
    block_size: int
    spec: KVSpec
    vocabulary: int
    length_max: int
    blocks: tuple[int, ...]
    """Of its pool, per group."""


class Invitation(msgspec.Struct, frozen=True, tag=True):
    """A place in the service. What only the worker's host can know is left open: the pools' descriptors, threads, folders."""

    config: WorkerConfig


COMPARED = (
    ("protocol", "protocol version"),
    ("fingerprint", "model fingerprint"),
    ("dtype", "dtype"),
    ("block_size", "block size"),
    ("spec", "KV spec"),
    ("vocabulary", "vocabulary"),
    ("length_max", "length limit --max-model-len"),
    ("numerics", "numerics id"),
)
"""Fields of `Hello` and `Apply` that must agree, and how they are called."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A worker that is up."""

    address: Address
    info: InstanceInfo
    place: Place
    """Of its pool."""


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The hub takes the worker in; these are its peers."""

    peers: tuple[Member, ...]
    now_ns: int = 0
    """The service's clock."""


class NotWelcome(msgspec.Struct, frozen=True, tag=True):
    """The hub refuses the worker, which ends."""

    reason: str
    again: bool = False
    """It may ask once more, later."""


class Dismissed(msgspec.Struct, frozen=True, tag=True):
    """The worker is no member any more, and its peers know. It was given up for dead, or ran over a deadline."""

    reason: str


class Retire(msgspec.Struct, frozen=True, tag=True):
    """The worker would end in order: give it nothing new, and tell its core to drain."""


class Farewell(msgspec.Struct, frozen=True, tag=True):
    """The worker has finished what it had, and ends."""


class Pulse(msgspec.Struct, frozen=True, tag=True):
    """Nothing: sent to see whether the connection is there."""


class PeerJoined(msgspec.Struct, frozen=True, tag=True):
    peer: Member


class PeerLeft(msgspec.Struct, frozen=True, tag=True):
    """Its process has ended."""

    peer: Member


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answer with `Pong`."""

    now_ns: int = 0
    """The service's clock."""


class Pong(msgspec.Struct, frozen=True, tag=True):
    step_ns: int
    """How long the executor has been at what it does now; 0: it is idle."""


class Leave(msgspec.Struct, frozen=True, tag=True):
    """The service ends: so does the worker."""


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """These weights may be used soon: make them ready, and answer `Prepared`."""

    staged: Staged


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """They are ready, or (without a fingerprint) there is no memory to make them ready before their turn, or they cannot be used."""

    version: int
    fingerprint: str
    numerics: str
    promise: str
    error: str


class Forget(msgspec.Struct, frozen=True, tag=True):
    """This version of the weights is not used after all."""

    version: int


class WorkerCounts(msgspec.Struct, frozen=True):
    """Attached to `Report`: counts since the worker's start."""

    preemptions: int = 0
    swaps_out: int = 0
    """Preempted sequences whose KV went to host memory,"""
    swaps_in: int = 0
    """and came back."""
    swaps_full: int = 0
    """Those for which there was no room there."""
    swap_copies: int = 0
    """Runs copied, either way."""
    swap_bytes: int = 0

    ranges: RangeCounts | None = None
    """Where memory is virtual."""

    def plus(self, other: "WorkerCounts") -> "WorkerCounts":
        """Sums of what only grows."""
        theirs = other.sums()
        return msgspec.convert({name: n + theirs[name] for name, n in self.sums().items()}, WorkerCounts)

    def sums(self) -> dict[str, int]:
        """What only grows, by name."""
        return {name: count for name, count in asdict(self).items() if isinstance(count, int)}


Control = (
    Hello
    | Apply
    | Invitation
    | Welcome
    | NotWelcome
    | Dismissed
    | Retire
    | Farewell
    | PeerJoined
    | PeerLeft
    | Ping
    | Pulse
    | Pong
    | Leave
    | Prepare
    | Prepared
    | Forget
)

Payload = SequencePayload | tuple[Emission, ...] | WorkerCounts | None
"""Attached to `Start`, to `Tail` and `Tokens`, to `Report`."""

_encode = msgspec.msgpack.Encoder().encode
_header = msgspec.msgpack.Decoder(tuple[Address, Address])
_message = msgspec.msgpack.Decoder(AnyMessage | Control)


def encode(
    source: Address, target: Address, message: AnyMessage | Control, payload: bytes = b""
) -> list[bytes]:
    return [_encode((source, target)), _encode(message), payload]


def decode_header(frame: bytes) -> tuple[Address, Address]:
    """Source and target. Raises msgspec.MsgspecError."""
    return _header.decode(frame)


def decode_message(frame: bytes) -> AnyMessage | Control:
    """Raises msgspec.MsgspecError."""
    return _message.decode(frame)


def encode_payload(payload: Payload) -> bytes:
    return b"" if payload is None else _encode(payload)


def decode_payload(frame: bytes, kind: type[T]) -> T:
    """Raises msgspec.MsgspecError."""
    return msgspec.msgpack.decode(frame, type=kind)


def check_compatible(expected: dict[str, Any], said: Hello | Apply) -> None:
    """Raises IncompatiblePeer naming the first field that differs, of those that are said."""
    for field, name in COMPARED:
        theirs, ours = getattr(said, field, None), expected.get(field)
        if theirs is not None and ours is not None and theirs != ours:
            raise IncompatiblePeer(f"the {name} differs: the worker has {theirs}, the service has {ours}")

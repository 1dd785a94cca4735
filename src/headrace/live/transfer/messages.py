"""What two engines say to each other beside shards. Forward: from a link's source; backward: the target's answers."""

from enum import Enum

import msgspec

MAIL_BYTES_MAX = 1 << 24


class Open(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """May this link write into the region that this descriptor names?"""

    region: int
    nbytes: int
    layout: str
    token: str


class Kind(Enum):
    MAIL = 0
    BARRIER = 1


class Mail(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A small message of the engine's user; answered by an `Ack`."""

    serial: int
    kind: Kind
    body: bytes


class Opened(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """It may. File descriptors that the transport needs come along."""

    region: int
    token: str


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    region: int
    token: str
    reason: str


class Ack(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """These shards and mails have been counted at the target."""

    serials: list[int]


Forward = Open | Mail
Backward = Opened | Refused | Ack

encode = msgspec.msgpack.Encoder().encode
decode_forward = msgspec.msgpack.Decoder(Forward).decode
decode_backward = msgspec.msgpack.Decoder(Backward).decode

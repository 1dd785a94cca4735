"""What a block looks like on disk: a header that says what it is, and the block's bytes.

The header (little-endian): magic (8 bytes), format version (4), the terms under which the block was computed (16: model, KV spec, numerics,
weights), the block's hash (16), length of what follows (8), its checksum (16, blake2b), and a checksum of all that (4, CRC-32).
Whoever reads a block gets it only if all of that is as it should be.
"""

from enum import Enum
from hashlib import blake2b
from struct import Struct
from zlib import crc32

from headrace.types.ids import BlockHash

MAGIC = b"HeadrcKV"
VERSION = 1
_HEAD = Struct("<8sI16s16sQ16s")
_CRC = Struct("<I")
HEADER_BYTES = _HEAD.size + _CRC.size
TERMS_BYTES = 16
_TERMS_AT = len(MAGIC) + 4

Buffer = bytes | bytearray | memoryview


class Verdict(Enum):
    """What was found in place of a block."""

    GOOD = "good"
    FOREIGN = "foreign"
    """No file of ours, or of another version."""
    OTHER = "other"
    """Ours, of another model, arithmetic or block."""
    TORN = "torn"
    """Ours, and not whole, or changed since."""


def header(terms: bytes, name: BlockHash, payload: Buffer) -> bytes:
    """What stands before `payload`. `terms`: 16 bytes."""
    head = _HEAD.pack(MAGIC, VERSION, terms, name, len(payload), checksum(payload))
    return head + _CRC.pack(crc32(head))


def checksum(payload: Buffer) -> bytes:
    return blake2b(payload, digest_size=16).digest()


def stated(head: Buffer) -> bytes:
    """The terms that a header names, be the rest of it as it may; of something shorter, what is there."""
    return bytes(head[_TERMS_AT : _TERMS_AT + TERMS_BYTES])


def judge(head: Buffer, size: int, terms: bytes, name: BlockHash) -> Verdict:
    """Of a header alone, and the number of bytes behind it: might this be that block?"""
    if bytes(head[: len(MAGIC)]) != MAGIC:
        return Verdict.FOREIGN
    if len(head) < HEADER_BYTES or crc32(head[: _HEAD.size]) != _CRC.unpack_from(head, _HEAD.size)[0]:
        return Verdict.TORN
    _, version, its_terms, its_name, length, _ = _HEAD.unpack_from(head)
    if version != VERSION:
        return Verdict.FOREIGN
    if its_terms != terms or its_name != name:
        return Verdict.OTHER
    return Verdict.GOOD if length == size else Verdict.TORN


def verify(head: Buffer, payload: Buffer, terms: bytes, name: BlockHash) -> Verdict:
    """Is this that block, to the bit?"""
    verdict = judge(head, len(payload), terms, name)
    if verdict is Verdict.GOOD and _HEAD.unpack_from(head)[5] != checksum(payload):
        return Verdict.TORN
    return verdict

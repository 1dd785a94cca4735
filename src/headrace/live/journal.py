"""A core's journal as a file: a header that says what core it is, then one record an instant (see `nodes.journal`).

Each is msgpack behind its length (4 bytes, little-endian), and is written at once: what a killed process did last is in it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from headrace.nodes.journal import Record
from headrace.types.ids import Address


class Header(msgspec.Struct, frozen=True):
    """What is needed to make the same core again."""

    kind: str
    """"router" | "pool" | "instance"."""
    address: Address
    settings: dict[str, Any]
    """What it was made from."""


class JournalFile:
    """A sink for `nodes.journal.Journaled`."""

    def __init__(self, folder: str, header: Header) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.path = Path(folder) / f"{header.address}.journal"
        self._encode = msgspec.msgpack.Encoder().encode
        self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 (closed by close)
        self._put(header)

    def __call__(self, record: Record) -> None:
        self._put(record)

    def close(self) -> None:
        self._file.close()

    def _put(self, item: Header | Record) -> None:
        raw = self._encode(item)
        self._file.write(len(raw).to_bytes(4, "little") + raw)


def read_journal(path: Path) -> tuple[Header, list[Record]]:
    """A record cut short by a kill is left out."""
    items = _items(path.read_bytes())
    header = msgspec.msgpack.decode(next(items), type=Header)
    decode = msgspec.msgpack.Decoder(Record).decode
    return header, [decode(item) for item in items]


def _items(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at + 4 <= len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        if at + 4 + size > len(raw):
            return
        yield raw[at + 4 : at + 4 + size]
        at += 4 + size

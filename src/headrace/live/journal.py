"""A core's journal as a file: a header that says what core it is, then one record an instant (see `nodes.journal`).

Each is msgpack behind its length (4 bytes, little-endian), and is written at once: what a killed process did last is in it.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from headrace.live.policies import engine_policies, policy
from headrace.live.settings import EngineSettings, PolicySettings
from headrace.nodes.instance import Instance
from headrace.nodes.journal import Record
from headrace.nodes.limits import InstanceConfig, RouterConfig
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.ports import Core
from headrace.types.ids import Address, PoolId
from headrace.types.kv import KVSpec
from headrace.types.messages import InstanceInfo


class RouterSettings(msgspec.Struct, frozen=True, tag="router"):
    placement: PolicySettings
    router: RouterConfig


class PoolSettings(msgspec.Struct, frozen=True, tag="pool"):
    pool: PoolId
    spec: KVSpec
    blocks: tuple[int, ...]
    eviction: PolicySettings


class InstanceSettings(msgspec.Struct, frozen=True, tag="instance"):
    router: Address
    info: InstanceInfo
    spec: KVSpec
    engine: EngineSettings
    instance: InstanceConfig


class Header(msgspec.Struct, frozen=True):
    """What is needed to make the same core again."""

    address: Address
    settings: RouterSettings | PoolSettings | InstanceSettings


def remake(header: Header) -> Core:
    """A fresh core like the one that a journal is of; `nodes.journal.replay` feeds it. Raises ConfigError."""
    match header.settings:
        case RouterSettings(placement, config):
            return Router(header.address, policy("cluster.placement", placement), config)
        case PoolSettings(pool, spec, blocks, eviction):
            return PoolCore(header.address, pool, spec, blocks, policy("kv.evict", eviction))
        case InstanceSettings(router, info, spec, engine, config):
            return Instance(header.address, router, info, spec, engine_policies(engine), config)


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

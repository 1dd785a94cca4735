"""A core's journal as a file, written live, and read again to be compared with what a fresh core says to it.

The file is `MAGIC`, then frames. A frame is the length of its body and a running checksum (4 bytes each, little-endian), then the body, as
msgpack: first the `Header` that says what core it is, then one `Instant` each. A frame is one write, made as soon as its instant is decided
and before its commands are carried out: what a killed process did is in the file. The checksum covers all bodies so far, so none can be
changed, left out or moved.
"""

import logging
from collections.abc import Iterator
from hashlib import blake2b
from itertools import count, zip_longest
from pathlib import Path
from typing import BinaryIO, TypeVar
from zlib import crc32

import msgspec

from headrace.live.policies import engine_policies, policy
from headrace.live.settings import EngineSettings, PolicySettings
from headrace.nodes.instance import Instance
from headrace.nodes.journal import Record, replay
from headrace.nodes.limits import InstanceConfig, RouterConfig, TierConfig
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.ports import Core
from headrace.types.errors import ConfigError, HeadraceError
from headrace.types.events import Command, Event
from headrace.types.ids import Address, PoolId
from headrace.types.kv import KVSpec
from headrace.types.messages import InstanceInfo, Report

JOURNALS = "journal"
"""Folder of a recording."""
MAGIC = b"headrace journal 1\n"
FRAME = 8
"""Bytes of length and checksum."""

log = logging.getLogger(__name__)

T = TypeVar("T")
_encode = msgspec.msgpack.Encoder().encode


class RouterSettings(msgspec.Struct, frozen=True, tag="router"):
    placement: PolicySettings
    router: RouterConfig
    roles: PolicySettings | None = None
    rebalance: PolicySettings | None = None


class PoolSettings(msgspec.Struct, frozen=True, tag="pool"):
    pool: PoolId
    spec: KVSpec
    blocks: tuple[int, ...]
    eviction: PolicySettings
    listener: Address | None = None
    """Who is told of what enters and leaves the prefix index."""
    tiers: TierConfig | None = None
    """What lies below its memory."""


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
    """A fresh core like the one that a journal is of. Raises ConfigError."""
    match header.settings:
        case RouterSettings(placement, config, roles, rebalance):
            return Router(
                header.address,
                policy("cluster.placement", placement),
                config,
                roles=None if roles is None else policy("cluster.roles", roles),
                rebalance=None if rebalance is None else policy("cluster.rebalance", rebalance),
            )
        case PoolSettings(pool, spec, blocks, eviction, listener, tiers):
            evict = policy("kv.evict", eviction)
            return PoolCore(header.address, pool, spec, blocks, evict, listener=listener, tiers=tiers)
        case InstanceSettings():
            return remake_instance(header)


def remake_instance(header: Header) -> Instance:
    """The same for what is known to be an instance's."""
    settings = header.settings
    assert isinstance(settings, InstanceSettings)
    router, info, spec, config = settings.router, settings.info, settings.spec, settings.instance
    return Instance(header.address, router, info, spec, engine_policies(settings.engine), config)


class Instant(msgspec.Struct, frozen=True, array_like=True):
    """One settle of a core."""

    now_ns: int
    events: list[Event]
    commands: msgspec.Raw
    """msgpack of the `list[Command]` that came of them; of None where the core raised."""


class Journal:
    """A core that is recorded: drives `core` and writes each instant to `FOLDER/ADDRESS.journal`. Raises OSError."""

    def __init__(self, core: Core, folder: Path, header: Header) -> None:
        self.core = core
        self._events: list[Event] = []
        self._encode = msgspec.msgpack.Encoder().encode
        self._checksum = 0
        self.path = folder / f"{header.address}.journal"
        self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        self._file.write(MAGIC)
        self._put(header)

    def handle(self, event: Event, now_ns: int) -> None:
        self._events.append(event)
        try:
            self.core.handle(event, now_ns)
        except Exception:
            self._settled(now_ns, None)
            raise

    def settle(self, now_ns: int) -> list[Command]:
        try:
            commands = self.core.settle(now_ns)
        except Exception:
            self._settled(now_ns, None)
            raise
        self._settled(now_ns, commands)
        return commands

    def observe(self, now_ns: int) -> Report | None:
        return self.core.observe(now_ns)

    def close(self) -> None:
        self._file.close()

    def _settled(self, now_ns: int, commands: list[Command] | None) -> None:
        self._put((now_ns, self._events, commands))
        self._events = []

    def _put(self, item: object) -> None:
        if self._file.closed:
            return
        body = self._encode(item)
        self._checksum = crc32(body, self._checksum)
        try:
            self._file.write(b"%b%b%b" % (_four(len(body)), _four(self._checksum), body))
        except OSError as error:
            # The service is worth more than its journal.
            log.error("the journal %s ends here: %s", self.path, error)
            self._file.close()


def _four(number: int) -> bytes:
    return number.to_bytes(4, "little")


class JournalError(HeadraceError):
    """A file is no journal, or was changed after it was written."""


class JournalReader:
    """Reads a journal instant by instant. Raises JournalError, at once if it is none, later at the first frame that was changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut = False
        """Once read to its end: the last frame is not whole, as when its writer was killed. It is left out."""
        self._bodies = self._frames()
        first = next(self._bodies, None)
        if first is None:
            raise JournalError(f"{path} was cut short before it says what core it is of")
        self.header = self._decode(msgspec.msgpack.Decoder(Header), first)

    def instants(self) -> Iterator[Instant]:
        """Only once."""
        decoder = msgspec.msgpack.Decoder(Instant)
        for body in self._bodies:
            yield self._decode(decoder, body)

    def _frames(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                yield from self._read(file)
        except OSError as error:
            raise JournalError(f"{self.path} cannot be read: {error.strerror}") from error

    def _read(self, file: BinaryIO) -> Iterator[bytes]:
        if file.read(len(MAGIC)) != MAGIC:
            raise JournalError(f"{self.path} is no journal, or one of another version of Headrace")
        checksum = 0
        for number in count():
            begin = file.read(FRAME)
            size, wanted = int.from_bytes(begin[:4], "little"), int.from_bytes(begin[4:], "little")
            body = file.read(size)
            if len(begin) < FRAME or len(body) < size:
                self.cut = len(begin) > 0
                return
            checksum = crc32(body, checksum)
            if checksum != wanted:
                raise JournalError(f"{self.path} was changed: frame {number} is not as it was written")
            yield body

    def _decode(self, decoder: "msgspec.msgpack.Decoder[T]", body: bytes) -> T:
        try:
            return decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise JournalError(f"{self.path} is of another version of Headrace: {error}") from error


class Difference(msgspec.Struct, frozen=True):
    """The first instant that a fresh core decides otherwise."""

    instant: int
    """Counted from 0."""
    now_ns: int
    events: list[Event]
    recorded: list[Command] | None
    """None: the core raised."""
    replayed: list[Command] | None
    error: str = ""
    """What the fresh core raised."""

    def lines(self) -> list[str]:
        """The commands that differ, as a diff: "-" recorded, "+" replayed."""
        shown: list[str] = []
        for was, now in zip_longest(self.recorded or (), self.replayed or ()):
            if was != now:
                shown += [f"- {was!r}"] * (was is not None) + [f"+ {now!r}"] * (now is not None)
        if self.recorded is None:
            shown.append("- (the core raised)")
        return [*shown, f"+ (the core raises {self.error})"] if self.error else shown


class CoreVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one journal that was fed to a fresh core."""

    name: str
    """Of the core, or of the file where it does not say."""
    instants: int = 0
    events: int = 0
    digest: str = ""
    """Over events and commands of all instants."""
    cut: bool = False
    """The last frame was cut short, and left out."""
    difference: Difference | None = None
    problem: str = ""
    """Why it could not be read to its end."""

    @property
    def ok(self) -> bool:
        return self.difference is None and not self.problem


def verify(folder: Path) -> Iterator[CoreVerdict]:
    """Feed each journal of a recording (or of its `journal` folder) to a fresh core. Raises ConfigError if there is none."""
    inner = folder / JOURNALS
    paths = sorted((inner if inner.is_dir() else folder).glob("*.journal"))
    if not paths:
        raise ConfigError(f"{folder} holds no journals; give the folder that `serve --record` wrote")
    return map(verify_journal, paths)


def verify_journal(path: Path) -> CoreVerdict:
    """Feed one journal to a fresh core, up to the first instant that differs by a byte."""
    name, instants, events, difference = path.name, 0, 0, None
    digest, cut, problem = blake2b(digest_size=8), False, ""
    try:
        reader = JournalReader(path)
        name = str(reader.header.address)
        core = remake(reader.header)
        for instant in reader.instants():
            difference = compare(core, instants, instant)
            if difference is not None:
                break
            instants, events = instants + 1, events + len(instant.events)
            digest.update(_encode((instant.now_ns, instant.events)) + bytes(instant.commands))
        cut = reader.cut
    except HeadraceError as error:
        problem = str(error)
    return CoreVerdict(
        name=name,
        instants=instants,
        events=events,
        digest=digest.hexdigest(),
        cut=cut,
        difference=difference,
        problem=problem,
    )


def compare(core: Core, number: int, instant: Instant) -> Difference | None:
    """Feed one instant to a core; None if it decides as recorded, to the byte. A core that raised then must raise again."""
    replayed: list[Command] | None = None
    error = ""
    try:
        [replayed] = replay(core, [Record(instant.now_ns, instant.events)])
    except Exception as raised:  # whatever a core that fails raises is what is asked for
        error = repr(raised)
    if _encode(replayed) == bytes(instant.commands):
        return None
    recorded = msgspec.msgpack.decode(instant.commands, type=list[Command] | None)
    return Difference(number, instant.now_ns, instant.events, recorded, replayed, error)

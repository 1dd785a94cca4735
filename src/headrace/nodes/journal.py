"""The journal of a core: every settle with its time and ordered events. Feeding it back gives identical commands, to the byte."""

from collections.abc import Callable, Iterable
from hashlib import blake2b

import msgspec

from headrace.ports import Core
from headrace.types.events import Command, Event
from headrace.types.messages import Report


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One instant of one core."""

    now_ns: int
    events: list[Event]


class Journaled:
    """A core that is recorded: `sink` gets each instant before its commands are carried out, `digest` covers events and commands."""

    def __init__(self, core: Core, sink: Callable[[Record], None] | None = None) -> None:
        self.core = core
        self._sink = sink
        self._batch: list[Event] = []
        self._digest = blake2b(digest_size=16)
        self._encode = msgspec.msgpack.Encoder().encode

    def handle(self, event: Event, now_ns: int) -> None:
        self._batch.append(event)
        self.core.handle(event, now_ns)

    def settle(self, now_ns: int) -> list[Command]:
        record = Record(now_ns, self._batch)
        self._batch = []
        if self._sink is not None:
            self._sink(record)
        commands = self.core.settle(now_ns)
        self._digest.update(self._encode((record, commands)))
        return commands

    def observe(self, now_ns: int) -> Report | None:
        return self.core.observe(now_ns)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def replay(core: Core, records: Iterable[Record]) -> list[list[Command]]:
    """Feed a journal to a fresh core of the same configuration: the commands of every instant."""
    batches: list[list[Command]] = []
    for record in records:
        for event in record.events:
            core.handle(event, record.now_ns)
        batches.append(core.settle(record.now_ns))
    return batches

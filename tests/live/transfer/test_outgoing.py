"""A source's half of a link, with a transport that does what the test says."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from headrace.live.transfer import messages, pieces
from headrace.live.transfer import outgoing as outgoings
from headrace.live.transfer.counters import parts_of
from headrace.live.transfer.messages import Ack, Open, Opened, Refused
from headrace.live.transfer.outgoing import Outgoing, Parcel, Transfer
from headrace.live.transfer.regions import Card, Descriptor, Region
from headrace.live.transports import Shard, Upward
from headrace.types.errors import TransferError
from headrace.types.ids import Address
from tests.live.transports.harness import Turns

CARD = Card(Address("b", 1), "here", ())
GOOD = Descriptor(CARD, 0, 100, "bytes", "token")


class Line:
    """`transports.Link`."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self.asked: list[Open] = []

    def write(self, shard: Shard) -> None:
        self.shards.append(shard)

    def send(self, message: bytes) -> None:
        asked = messages.decode_forward(message)
        assert isinstance(asked, Open)
        self.asked.append(asked)

    def attach(self, descriptor: Descriptor, fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)

    def moved(self, lane: int) -> int:
        return 0

    def close(self, closed: Callable[[], None]) -> None:
        closed()


class Sender:
    """One half, which is up, and what became of its writes."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.lines: list[Line] = []
        self.ends: list[Upward] = []
        self.ended: list[TransferError | None] = []
        self.source = Region(0, memoryview(bytearray(100)), "bytes")
        self.half = Outgoing("a#0", CARD, self, self.turns, self.turns.call_soon_threadsafe, 1, 10**9)  # type: ignore[arg-type]
        self.half.connect()
        self.ends[0].up()
        self.turns.run()

    def link(self, peer: Card, generation: int, upward: Upward) -> Line:
        self.lines.append(Line())
        self.ends.append(upward)
        return self.lines[-1]

    def write(self, target: Descriptor, moved: pieces.Pieces) -> None:
        transfer = Transfer(1, self.ended.append, left=1)
        parcel = Parcel(transfer, self.half, 0, shard=Shard(0, 0, self.source, moved, target))
        self.half.submit(parcel)
        self.turns.run()

    def hear(self, message: Any, fds: Sequence[int] = ()) -> None:
        said = message if isinstance(message, bytes) else messages.encode(message)
        self.ends[0].replied(said, fds)
        self.turns.run()


def test_a_wrong_descriptor_does_not_spoil_the_right_one_of_its_region() -> None:
    """Their answers look alike, so one is asked for after the other."""
    sender = Sender()
    line = sender.lines[0]
    sender.write(replace(GOOD, nbytes=50), pieces.single(0, 0, 10))
    sender.write(GOOD, pieces.single(0, 0, 10))
    assert [asked.nbytes for asked in line.asked] == [50]
    sender.hear(Refused(0, "token", "the size differs"))
    assert "the size differs" in str(sender.ended[0]) and not line.shards
    assert [asked.nbytes for asked in line.asked] == [50, 100]
    sender.hear(Opened(0, "token"))
    [shard] = line.shards
    sender.hear(Ack([parts_of(shard.note)[1]]))
    assert sender.ended[1] is None


def test_memory_that_is_granted_to_a_link_that_has_ended_is_not_kept() -> None:
    sender = Sender()
    fd, other = os.pipe()
    os.close(other)
    sender.write(GOOD, pieces.single(0, 0, 10))
    sender.half.forget()
    sender.hear(Opened(0, "token"), [fd])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_answers_that_nobody_asked_for_change_nothing() -> None:
    sender = Sender()
    fd, other = os.pipe()
    sender.hear(Ack([7]))
    sender.hear(Refused(3, "x", "no"))
    sender.hear(Opened(3, "x"), [fd])
    os.close(other)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    sender.write(GOOD, pieces.empty())
    sender.hear(Ack([0]))
    assert sender.ended == [None]


def test_an_answer_that_cannot_be_read_breaks_its_link_and_no_more() -> None:
    sender = Sender()
    sender.write(GOOD, pieces.empty())
    sender.hear(b"\xc1")
    assert not sender.ended
    sender.turns.ring()
    assert len(sender.lines) == 2
    sender.ends[1].up()
    sender.turns.run()
    assert "says what cannot be read" in str(sender.ended[0])


def test_what_waits_because_too_much_is_under_way_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoings, "FLYING_MAX", 2)
    sender = Sender()
    for _ in range(3):
        sender.write(GOOD, pieces.empty())
    assert len(sender.lines[0].shards) == 2
    sender.hear(Ack([0, 1]))
    assert len(sender.lines[0].shards) == 3
    sender.hear(Ack([2]))
    assert sender.ended == [None] * 3


def test_who_was_held_up_himself_blames_no_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = 10**12
    monkeypatch.setattr(outgoings, "monotonic_ns", lambda: now_ns)
    sender = Sender()
    sender.write(GOOD, pieces.empty())
    for later_s in (0.25, 60.0, *[0.25] * 4):
        now_ns += int(later_s * 1e9)
        sender.turns.ring()
    assert len(sender.lines) == 1
    for _ in range(3):
        now_ns += 250_000_000
        sender.turns.ring()
    assert len(sender.lines) == 2


def test_what_waits_for_a_grant_is_not_looked_at_for_each_that_joins_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sender = Sender()
    looks: list[Descriptor] = []
    grant_of = outgoings.grant_of
    monkeypatch.setattr(outgoings, "grant_of", lambda target: (looks.append(target), grant_of(target))[1])
    for _ in range(100):
        sender.write(GOOD, pieces.single(0, 0, 10))
    sender.hear(Opened(0, "token"))
    assert len(sender.lines[0].shards) == 100 and len(looks) < 300

"""The bus between a hub and its links, over real sockets in one process."""

import asyncio

import msgspec
import pytest
import zmq

from headrace.live import wire
from headrace.live.bus import HUB, Hub, Link
from headrace.live.pools import layout_of
from headrace.live.transfer.kv import Place
from headrace.live.transfer.regions import Card, Descriptor
from headrace.types.errors import IncompatiblePeer
from headrace.types.ids import Address, RequestId, SequenceKey
from headrace.types.kv import Layout
from headrace.types.messages import Cancel, Drain, Resume
from tests.live.fake import SPEC
from tests.live.serving import run

A, B, ROUTER = Address("a", 2), Address("b"), Address("router")


class Ear:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[Address, Address, object, bytes]] = []
        self.greeted: list[tuple[Address, wire.Hello]] = []
        self._news = asyncio.Event()

    def receive(self, source: Address, target: Address, message: object, payload: bytes) -> None:
        self.heard.append((source, target, message, payload))
        self._news.set()

    def greet(self, source: Address, hello: wire.Hello) -> None:
        self.greeted.append((source, hello))
        self._news.set()

    async def until(self, heard: int = 0, greeted: int = 0) -> None:
        while len(self.heard) < heard or len(self.greeted) < greeted:
            self._news.clear()
            await self._news.wait()


def hello(**fields: object) -> wire.Hello:
    said = {
        "secret": "s",
        "fingerprint": "f",
        "dtype": "bfloat16",
        "block_size": 8,
        "spec": SPEC,
        "vocabulary": 9,
        "numerics": "n",
        "place": Place(
            Descriptor(Card(Address("a", 1), "here", ()), 0, 64, "layout", "token"),
            layout_of(SPEC, (1, 1)),
            (),
        ),
    }
    return wire.Hello(**{**said, **fields})


def resume(number: int) -> Resume:
    return Resume(SequenceKey(RequestId(number)))


def refuse(error: Exception) -> None:
    raise error


class Trio:
    """A hub and two admitted links."""

    def __init__(self) -> None:
        self.at_hub, self.at_a, self.at_b = Ear(), Ear(), Ear()
        self.hub = Hub(self.at_hub.greet, self.at_hub.receive, refuse)
        self.a = Link(A, self.hub.endpoint, self.at_a.receive, refuse)
        self.b = Link(B, self.hub.endpoint, self.at_b.receive, refuse)

    async def __aenter__(self) -> "Trio":
        self.a.send(HUB, hello())
        self.b.send(HUB, hello())
        await self.at_hub.until(greeted=2)
        self.hub.admit(A)
        self.hub.admit(B)
        return self

    async def __aexit__(self, *error: object) -> None:
        for end in (self.a, self.b, self.hub):
            end.close()


def test_messages_arrive_in_order_with_what_is_attached() -> None:
    async def scenario() -> None:
        async with Trio() as trio:
            for i in range(2000):
                trio.a.send(B, resume(i), b"%d" % i)
                trio.b.send(ROUTER, resume(i), b"r%d" % i)
                trio.hub.send(ROUTER, A, resume(i))
            await trio.at_b.until(2000)
            await trio.at_hub.until(2000)
            await trio.at_a.until(2000)
            assert trio.at_b.heard == [(A, B, resume(i), b"%d" % i) for i in range(2000)]
            assert trio.at_hub.heard == [(B, ROUTER, resume(i), b"r%d" % i) for i in range(2000)]
            assert trio.at_a.heard == [(ROUTER, A, resume(i), b"") for i in range(2000)]

    run(scenario())


def test_nothing_passes_to_or_from_who_was_dismissed() -> None:
    async def scenario() -> None:
        async with Trio() as trio:
            trio.a.send(B, resume(1))
            await trio.at_b.until(1)
            trio.hub.dismiss(A)
            trio.a.send(B, resume(2))
            trio.a.send(ROUTER, resume(3))
            trio.hub.send(ROUTER, A, Drain())
            trio.b.send(A, resume(4))
            # Whatever came of these comes before the answer to this.
            trio.b.send(ROUTER, resume(5))
            await trio.at_hub.until(2)
            trio.hub.send(ROUTER, B, resume(6))
            await trio.at_b.until(2)
            # For nobody: no node has that address.
            assert trio.at_hub.heard == [(B, A, resume(4), b""), (B, ROUTER, resume(5), b"")]
            assert [m for _, _, m, _ in trio.at_b.heard] == [resume(1), resume(6)]
            assert trio.at_a.heard == []

    run(scenario())


def test_strangers_are_heard_only_when_they_greet() -> None:
    async def scenario() -> None:
        async with Trio() as trio:
            ear = Ear()
            stranger = Link(Address("c", 1), trio.hub.endpoint, ear.receive, refuse)
            stranger.send(B, resume(1))
            stranger.send(ROUTER, resume(2))
            stranger.send(HUB, hello(secret="wrong"))
            await trio.at_hub.until(greeted=3)
            assert trio.at_hub.greeted[2] == (Address("c", 1), hello(secret="wrong"))
            trio.hub.refuse(Address("c", 1), "go away")
            await ear.until(1)
            assert ear.heard[0][2] == wire.NotWelcome("go away")
            assert trio.at_hub.heard == trio.at_b.heard == []
            stranger.close()

    run(scenario())


def test_a_member_cannot_speak_as_another() -> None:
    async def scenario() -> None:
        async with Trio() as trio:
            trio.a.address = B
            trio.a.send(ROUTER, resume(1))
            trio.a.address = A
            trio.a.send(ROUTER, resume(2))
            await trio.at_hub.until(1)
            assert [m for _, _, m, _ in trio.at_hub.heard] == [resume(2)]

    run(scenario())


def test_garbage_is_dropped_and_an_unreadable_greeting_is_refused() -> None:
    async def scenario() -> None:
        async with Trio() as trio:
            context = zmq.Context()
            raw = context.socket(zmq.DEALER)
            raw.set(zmq.IDENTITY, b"old#4")
            raw.set(zmq.LINGER, 0)
            raw.connect(trio.hub.endpoint)
            for frames in ([b"x"], [b"x", b"y", b"z"], [b""] * 7):
                raw.send_multipart(frames)
            ear = Ear()
            trio.a._socket.zmq.send_multipart([b"?", b"?", b"?"])
            old = Link(Address("old", 5), trio.hub.endpoint, ear.receive, refuse)
            old._socket.zmq.send_multipart([b"?", b"\x81\xa4type\xa5Hello", b""])
            await ear.until(1)
            refusal = ear.heard[0][2]
            assert isinstance(refusal, wire.NotWelcome)
            assert "protocol version differs" in refusal.reason
            trio.a.send(ROUTER, resume(1))
            await trio.at_hub.until(1)
            old.close()
            raw.close()
            context.term()

    run(scenario())


@pytest.mark.parametrize(("field", "name"), wire.COMPARED)
def test_the_field_that_differs_is_named(field: str, name: str) -> None:
    facts = {
        "fingerprint": "f",
        "dtype": "d",
        "block_size": 8,
        "spec": SPEC,
        "vocabulary": 9,
        "length_max": 7,
    }
    asks = wire.Apply(leaning="mixed", host="h", blocks=(1,), **facts)
    said = hello() if hasattr(hello(), field) else asks
    expected = {f: getattr(said, f) for f, _ in wire.COMPARED if hasattr(said, f)}
    wire.check_compatible(expected, said)
    wire.check_compatible({}, said)
    with pytest.raises(IncompatiblePeer, match=f"the {name} differs"):
        wire.check_compatible({**expected, field: "other"}, said)


def test_another_layout_of_kv_is_refused_by_name() -> None:
    said = hello()
    ours = msgspec.structs.replace(said.spec, layout=Layout.TOKEN_MAJOR)
    with pytest.raises(
        IncompatiblePeer, match=r"KV spec differs: the worker has .*HEAD_MAJOR.* has .*TOKEN_MAJOR"
    ):
        wire.check_compatible({"spec": ours}, said)


def test_messages_and_payloads_survive_the_wire() -> None:
    frames = wire.encode(A, B, Cancel(SequenceKey(RequestId(1), 2, 3)), b"p")
    assert wire.decode_header(frames[0]) == (A, B)
    assert wire.decode_message(frames[1]) == Cancel(SequenceKey(RequestId(1), 2, 3))
    assert frames[2] == b"p"


def test_an_error_of_the_receiver_is_fatal() -> None:
    async def scenario() -> None:
        errors: list[Exception] = []
        failed = asyncio.Event()

        def receive(source: Address, target: Address, message: object, payload: bytes) -> None:
            raise KeyError("nobody knows")

        def fail(error: Exception) -> None:
            errors.append(error)
            failed.set()

        async with Trio() as trio:
            link = Link(Address("c"), trio.hub.endpoint, receive, fail)
            trio.hub.admit(Address("c"))
            link.send(HUB, hello())
            await trio.at_hub.until(1)
            trio.hub.send(ROUTER, Address("c"), resume(1))
            trio.hub.send(ROUTER, Address("c"), resume(2))
            await failed.wait()
            trio.a.send(ROUTER, resume(3))
            await trio.at_hub.until(2)
            assert [type(error) for error in errors] == [KeyError]
            link.close()

    run(scenario())

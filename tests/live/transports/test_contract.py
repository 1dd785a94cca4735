"""The contract of every transport, under the engine: each write ends once, and counts only if its bytes are in memory."""

import asyncio
import random

import numpy as np
import pytest
from msgspec.structs import replace

from headrace.live.transfer import pieces
from headrace.live.transfer.counters import immediate
from headrace.live.transports import check_transport
from headrace.types.errors import ConfigError, TransferError
from headrace.types.ids import Address
from tests.live.transports.harness import NAMES, End, Turns, ends, run, until

A, B, C = Address("a", 3), Address("b", 1), Address("c", 0)
PAGE = 64
every = pytest.mark.parametrize("name", NAMES)


def random_writes(draw: random.Random, pages: int) -> list[pieces.Pieces]:
    """All pages to other places, in writes of one to a dozen."""
    sources, targets = list(range(pages)), list(range(pages))
    draw.shuffle(sources)
    draw.shuffle(targets)
    writes: list[pieces.Pieces] = []
    while sources:
        count = min(draw.randint(1, 12), len(sources))
        writes.append(pieces.paged(sources[:count], targets[:count], PAGE))
        del sources[:count], targets[:count]
    return writes


def arrived(source: End, target: End, moved: pieces.Pieces) -> bool:
    return all(
        (target.memory[to : to + size] == source.memory[start : start + size]).all()
        for start, to, size in moved.tolist()
    )


# Completeness


@every
def test_all_bytes_are_there_when_the_count_is(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B, nbytes=1 << 16, lanes=2) as (a, b):
            for slot in range(5):
                writes = random_writes(random.Random(slot), (1 << 16) // PAGE)
                fired: list[bool] = []

                def check(writes: list[pieces.Pieces] = writes, fired: list[bool] = fired) -> None:
                    fired.append(all(arrived(a, b, w) for w in writes))

                b.memory[:] = 0
                b.engine.counter().expect(slot, 3 * len(writes), check)
                a.ended.clear()
                for moved in writes:
                    a.write(b, moved, immediate(slot, 3))
                await until(lambda writes=writes: len(a.ended) == len(writes))
                assert fired == [True] and not any(a.ended)

    run(scenario())


@every
def test_a_large_write_goes_over_all_lanes_and_counts_once(name: str) -> None:
    async def scenario() -> None:
        nbytes = 5 << 20
        with ends(name, A, B, nbytes=nbytes, lanes=3) as (a, b):
            fired: list[bool] = []
            b.engine.counter().expect(1, 7, lambda: fired.append(bool((a.memory == b.memory).all())))
            a.write(b, pieces.single(0, 0, nbytes), immediate(1, 7))
            await until(lambda: bool(a.ended))
            assert a.ended == [None] and fired == [True]

    run(scenario())


@every
def test_memory_that_is_no_file_is_written_all_the_same(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B, lanes=2, nbytes=3 << 20, file=False) as (a, b):
            moved = pieces.paged(range(700), range(699, -1, -1), 4096)
            a.write(b, moved, immediate(1, 7))
            await until(lambda: bool(a.ended))
            assert a.ended == [None] and arrived(a, b, moved)

    run(scenario())


@every
def test_an_empty_write_carries_its_immediate_only(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B) as (a, b):
            before = b.memory.copy()
            heard: list[tuple[Address, int, int]] = []
            b.engine.counter().generic = lambda *what: heard.append(what)
            a.engine.write(None, b.descriptor, pieces.empty(), a.ended.append, imm=immediate(65535, 65535))
            await until(lambda: bool(a.ended))
            assert heard == [(A, 65535, 65535)] and a.ended == [None]
            assert (before == b.memory).all()

    run(scenario())


@every
def test_pieces_of_no_bytes_are_no_pieces(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B) as (a, b):
            nothing = np.zeros((3, 3), np.int64)
            some = np.array([(0, 0, 0), (64, 128, 64), (7, 7, 0)], np.int64)
            b.memory[:] = 0
            a.write(b, nothing, immediate(1, 1))
            a.write(b, some, immediate(1, 1))
            await until(lambda: len(a.ended) == 2)
            assert a.ended == [None, None] and b.engine.counter().vacant(1) == 2
            assert (b.memory[128:192] == a.memory[64:128]).all() and not b.memory[:128].any()

    run(scenario())


@every
def test_the_immediate_is_counted_before_the_write_is_done(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B, lanes=2) as (a, b):
            counted: list[int] = []
            done: list[bool] = []
            b.engine.counter().generic = lambda _source, slot, _weight: counted.append(slot)
            for slot in range(50):
                a.engine.write(
                    a.region,
                    b.descriptor,
                    pieces.single(slot, slot * 64, 64),
                    lambda error, slot=slot: done.append(error is None and slot in counted),
                    imm=immediate(slot, 1),
                )
            await until(lambda: len(done) == 50)
            assert all(done)

    run(scenario())


@every
def test_forms_of_a_write_and_of_a_message(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B, C) as (a, b, c):
            forms = [
                pieces.paged([5, 6, 9], [1, 2, 30], 512, offset=16, nbytes=100),
                pieces.strided(0, 22000, 10, 50, 100, 60),
                pieces.scatter([(30000, 20000, 7), (1, 40000, 1)]),
            ]
            parts = [(end.descriptor, form, immediate(2, 1)) for end in (b, c) for form in forms]
            a.engine.write_scatter(a.region, parts, a.ended.append)
            await until(lambda: bool(a.ended))
            assert a.ended == [None]
            assert all(arrived(a, end, form) for end in (b, c) for form in forms)
            assert [end.engine.counter().vacant(2) for end in (b, c)] == [3, 3]
            for body in (b"", b"hello", bytes(100_000)):
                b.engine.send(c.engine.card, body, b.ended.append)
            await until(lambda: len(b.ended) == 3)
            assert sorted(c.mail) == [(B, b""), (B, bytes(100_000)), (B, b"hello")]

    run(scenario())


@every
def test_a_barrier_waits_for_all(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B, C) as (a, b, c):

            def come(end: End, tag: bytes) -> None:
                others = [other.engine.card for other in (a, b, c) if other is not end]
                end.engine.barrier(others, tag, end.ended.append)

            told: list[TransferError | None] = []
            for end, tag in ((a, b"1"), (b, b"1"), (a, b"2"), (c, b"2")):
                come(end, tag)
                # A message behind it has been heard: so has it, most likely.
                for other in (a, b, c):
                    if other is not end:
                        end.engine.send(other.engine.card, b"", told.append)
            await until(lambda: len(told) == 8)
            assert not (a.ended or b.ended or c.ended)
            come(c, b"1")
            await until(lambda: bool(a.ended and b.ended and c.ended))
            assert (a.ended, b.ended, c.ended) == ([None], [None], [None])
            come(b, b"2")
            await until(lambda: len(a.ended) == len(b.ended) == len(c.ended) == 2)

    run(scenario())


@every
def test_more_writes_than_any_queue_takes(name: str) -> None:
    async def scenario() -> None:
        count = 2000
        with ends(name, A, B, lanes=2) as (a, b):
            fired: list[bool] = []
            b.engine.counter().expect(3, count, lambda: fired.append(True))
            for i in range(count):
                a.write(b, pieces.single(i, i * 8, 8), immediate(3, 1))
            await until(lambda: len(a.ended) == count)
            assert fired == [True] and not any(a.ended)
            assert (b.memory[: count * 8 : 8] == a.memory[:count]).all()

    run(scenario())


# Descriptors


@every
def test_descriptors_that_are_wrong_are_refused_by_name(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B) as (a, b):
            good = b.descriptor
            untouched = b.memory.copy()
            moved = pieces.single(0, 0, 100)
            wrong = {
                "the layout of region 0": replace(good, layout="other"),
                "the size of region 0": replace(good, nbytes=good.nbytes * 2),
                "the token for region 0": replace(good, token="0" * 16),
                "there is no region 9": replace(good, region=9),
            }
            other = a.engine.register(memoryview(bytearray(1000)), "other")
            for why, descriptor in wrong.items():
                region = other if descriptor.layout == "other" else a.region
                a.ended.clear()
                a.engine.write(region, descriptor, moved, a.ended.append, imm=immediate(1, 1))
                await until(lambda: bool(a.ended))
                [error] = a.ended
                assert isinstance(error, TransferError)
                assert all(part in str(error) for part in (why, "transfer ", str(A), str(B))), str(error)
            # Nothing moved, nothing counted, and the link is as good as before.
            assert (b.memory == untouched).all() and not b.engine.counter().vacant(1)
            a.write(good, moved, immediate(1, 1))
            await until(lambda: len(a.ended) == 2)
            assert a.ended[1] is None and b.engine.counter().vacant(1) == 1

    run(scenario())


@every
def test_another_incarnation_of_a_peer_is_not_written_to(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B, stall_ns=300_000_000) as (a, b):
            for epoch in (0, 2):
                card = replace(b.engine.card, owner=Address("b", epoch))
                a.write(replace(b.descriptor, card=card), pieces.single(0, 0, 100), immediate(1, 1))
            await until(lambda: len(a.ended) == 2)
            for epoch, error in zip((0, 2), sorted(map(str, a.ended)), strict=True):
                assert f"from a#3 to b#{epoch} failed" in error, error
            assert not b.engine.counter().vacant(1)

    run(scenario())


@every
def test_what_is_wrong_at_first_sight_is_raised(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B) as (a, b):
            nbytes = a.region.nbytes
            for moved in (
                pieces.single(0, nbytes - 1, 2),
                pieces.single(nbytes, 0, 1),
                pieces.single(-1, 0, 1),
                pieces.scatter([(0, 1, 2**62), (0, 2**62, 5)]),
            ):
                with pytest.raises(TransferError, match=r"a#3 cannot write to b#1: bytes"):
                    a.write(b, moved)
            with pytest.raises(TransferError, match="layouts of their memory differ"):
                a.write(replace(b.descriptor, layout="other"), pieces.single(0, 0, 1))
            with pytest.raises(TransferError, match="no transport leads to b#1: it has none"):
                a.write(replace(b.descriptor, card=replace(b.engine.card, ways=())), pieces.empty())

    run(scenario())


@every
def test_a_region_that_is_gone_takes_nothing(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B) as (a, b):
            old = b.descriptor
            a.write(old, pieces.single(0, 0, 100), immediate(1, 1))
            await until(lambda: bool(a.ended))
            gone = asyncio.Event()
            b.engine.unregister(b.region, gone.set)
            await gone.wait()
            b.memory[:] = 0
            a.write(old, pieces.single(0, 0, 100), immediate(1, 1))
            await until(lambda: len(a.ended) == 2)
            assert a.ended[1] is not None
            a.write(old, pieces.single(0, 0, 100), immediate(1, 1))
            await until(lambda: len(a.ended) == 3)
            assert "there is no region 0" in str(a.ended[2])
            assert not b.memory.any()

    run(scenario())


# Peers that go


@every
def test_after_forgetting_a_peer_nothing_of_it_is_heard(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B) as (a, b):
            heard: list[int] = []
            b.engine.counter().generic = lambda _source, slot, _weight: heard.append(slot)
            a.write(b, pieces.single(0, 0, 10), immediate(1, 1))
            await until(lambda: bool(a.ended))
            gone = asyncio.Event()
            b.engine.forget(A, gone.set)
            await gone.wait()
            b.memory[:] = 0
            for slot in range(2, 30):
                a.write(b, pieces.single(0, 0, 10), immediate(slot, 1))
            await until(lambda: len(a.ended) == 29)
            assert heard == [1] and not b.memory.any()
            assert all(str(error).startswith("transfer ") for error in a.ended[1:])

    run(scenario())


@every
def test_writes_to_a_forgotten_peer_fail(name: str) -> None:
    async def scenario() -> None:
        with ends(name, A, B) as (a, b):
            for i in range(50):
                a.write(b, pieces.single(0, i, 10), immediate(1, 1))
                if i == 25:
                    a.engine.forget(B)
            await until(lambda: len(a.ended) == 50)
            assert all("from a#3 to b#1 failed: the peer has ended" in str(e) for e in a.ended[26:])

    run(scenario())


def test_what_only_tests_can_make_is_offered_to_nobody() -> None:
    with pytest.raises(ConfigError, match=r"no live.transports 'loop'; there are: auto, .*shm, tcp"):
        check_transport("loop")


def test_an_unknown_transport_is_named() -> None:
    with pytest.raises(ConfigError, match="'pigeon'; there are: auto, "):
        check_transport("pigeon")


def test_10000_orders_end_complete_and_the_last_message_would_not() -> None:
    turns = Turns()
    early = 0
    with ends("loop", A, B, turns=turns, nbytes=8 * PAGE, lanes=2, file=False) as (a, b):
        for slot in range(10_000):
            early += one_order(turns, a, b, slot)
    # The control: whoever takes the arrival of the last message for the end reads memory that is not there yet.
    assert early > 2000


def one_order(turns: Turns, a: End, b: End, slot: int) -> bool:
    """Did a last message, sent when all writes had been, arrive before they were complete?"""
    draw = random.Random(slot)
    b.memory[:] = 0
    a.ended.clear()
    writes = [pieces.paged([i, i + 1], [6 - i, 7 - i], PAGE) for i in (0, 2, 4, 6)]
    weights = [draw.randint(1, 5) for _ in writes]
    fired: list[bool] = []
    last: list[bool] = []
    expected = pieces.scatter([row for w in writes for row in w.tolist()])
    b.engine.counter(0).expect(slot, sum(weights), lambda: fired.append(arrived(a, b, expected)))
    b.engine.counter(1).expect(slot, 1, lambda: last.append(arrived(a, b, expected)))
    for moved, weight in zip(writes, weights, strict=True):
        a.write(b, moved, immediate(slot, weight))
    a.write(b, pieces.empty(), immediate(slot, 1), channel=1)
    turns.run()
    assert fired == [True] and a.ended == [None] * 5
    return last == [False]

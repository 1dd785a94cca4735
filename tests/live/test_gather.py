"""The gather path: nothing is counted before it is scattered, slots are bounded and come back, whoever dies and whenever."""

import asyncio
import random
from collections.abc import Callable
from threading import Event

import numpy as np
import pytest
from msgspec.structs import replace

from headrace.live.pools import layout_of
from headrace.live.transfer import gather
from headrace.live.transfer import pieces as forms
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.gather import Ask, GatherPath
from headrace.live.transfer.kv import KVTransport, pieces_of
from headrace.live.transfer.pieces import Pieces
from headrace.live.transports import Settings
from headrace.live.transports.loop import Switch, Transport
from headrace.types.errors import TransferError
from headrace.types.events import Landed, Write, Written
from headrace.types.ids import Address, Slot, WriteId
from headrace.types.kv import GroupKind, KVGroup, KVSpec
from tests.live.serving import run

A, B = Address("a", 1), Address("b", 1)
POOL = 1 << 14
SIZES = gather.Settings(slot_bytes=1 << 12, slots=3, answer_ns=5_000_000_000)


class Side:
    def __init__(self, address: Address, switch: Switch, settings: gather.Settings) -> None:
        loop = asyncio.get_running_loop()
        self.memory = bytearray(random.Random(address.name).randbytes(POOL))
        self.engine = TransferEngine(address, {"loop": Transport(Settings(address), switch)}, loop)
        self.region = self.engine.register(memoryview(self.memory), "kv")
        self.landed: list[tuple[Address, int, int]] = []
        self.check: Callable[[int], None] = lambda _slot: None
        self.path = GatherPath(self.engine, self.region, loop, self._landed, settings)
        self.engine.received = self._received
        self.peers: dict[Address, Side] = {}

    def _received(self, source: Address, body: bytes) -> None:
        if source in self.peers:
            assert self.path.heard(self.peers[source].engine.card, body)

    def _landed(self, source: Address, slot: int, weight: int) -> None:
        self.landed.append((source, slot, weight))
        self.check(slot)

    def forget(self, peer: Address) -> None:
        self.peers.pop(peer, None)
        self.engine.forget(peer, self.path.forget(peer))

    def close(self) -> None:
        self.path.close()
        self.engine.close()


class Pair:
    def __init__(self, seed: int = 0, settings: gather.Settings = SIZES) -> None:
        self.switch = Switch(asyncio.get_running_loop(), seed)
        self.source, self.target = Side(A, self.switch, settings), Side(B, self.switch, settings)
        self.source.peers[B], self.target.peers[A] = self.target, self.source
        self.ended: dict[int, str] = {}
        self.by_runs: list[int] = []
        self.news = asyncio.Event()

    def write(self, slot: int, pieces: Pieces, weight: int = 1) -> None:
        def end(how: str) -> None:
            assert slot not in self.ended, "a batch has ended twice"
            self.ended[slot] = how
            self.news.set()

        def done(error: TransferError | None) -> None:
            end("" if error is None else str(error))

        def runs() -> None:
            self.by_runs.append(slot)
            end("runs")

        self.source.path.write(self.target.engine.card, pieces, [(slot, weight)], done, runs)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.news.clear()
            try:
                await asyncio.wait_for(self.news.wait(), 0.01)
            except TimeoutError:
                continue

    def arrived(self, pieces: Pieces) -> bool:
        ours, theirs = self.source.memory, self.target.memory
        return all(theirs[t : t + n] == ours[s : s + n] for s, t, n in pieces.tolist())

    def all_free(self) -> bool:
        sides = (self.source.path, self.target.path)
        every = list(range(SIZES.slots))
        return all(sorted(p._free_sends) == sorted(p._free_staging) == every for p in sides)

    def close(self) -> None:
        self.source.close()
        self.target.close()


def batches(seed: int, count: int) -> list[Pieces]:
    """Disjoint scattered pieces for each of `count` batches, of blocks of 64 bytes."""
    draw = random.Random(seed)
    blocks = POOL // 64
    sources, targets = draw.sample(range(blocks), blocks), draw.sample(range(blocks), blocks)
    found, at = [], 0
    for _ in range(count):
        size = draw.randint(2, 20)
        pages = sources[at : at + size], targets[at : at + size]
        found.append(forms.paged(*pages, 64))
        at += size
    return found


@pytest.mark.parametrize("seed", range(30))
def test_a_batch_counts_when_all_of_it_is_scattered_and_not_before(seed: int) -> None:
    async def scenario() -> None:
        pair, found = Pair(seed), batches(seed, 10)
        pair.target.check = lambda slot: assert_arrived(pair, found[slot])
        for slot, pieces in enumerate(found):
            pair.write(slot, pieces, weight=slot + 1)
        await pair.until(lambda: len(pair.ended) == len(found))
        gathered = [slot for slot in range(len(found)) if slot not in pair.by_runs]
        assert len(gathered) >= SIZES.slots and all(pair.ended[slot] == "" for slot in gathered)
        assert sorted(pair.target.landed) == [(A, slot, slot + 1) for slot in gathered]
        await pair.until(pair.all_free)
        pair.close()

    run(scenario())


def assert_arrived(pair: Pair, pieces: Pieces) -> None:
    assert pair.arrived(pieces), "a batch was counted before it was scattered"


def test_slots_are_bounded_and_what_finds_none_goes_as_runs() -> None:
    async def scenario() -> None:
        pair, found = Pair(1), batches(1, 8)
        pair.target.path._free_staging[:] = []
        pair.write(0, found[0])
        await pair.until(lambda: bool(pair.ended))
        assert pair.ended == {0: "runs"} and not pair.target.landed
        pair.target.path._free_staging[:] = range(SIZES.slots)
        for slot in range(1, 8):
            pair.write(slot, found[slot])
        assert pair.by_runs == [0, 4, 5, 6, 7], "more batches than there are send slots"
        pair.write(8, forms.single(0, 0, SIZES.slot_bytes + 1))
        assert pair.by_runs[-1] == 8, "a batch larger than a slot"
        await pair.until(lambda: len(pair.ended) == 9)
        pair.close()

    run(scenario())


def test_a_grant_that_comes_too_late_is_given_back() -> None:
    async def scenario() -> None:
        pair = Pair(2, gather.Settings(slot_bytes=SIZES.slot_bytes, slots=SIZES.slots, answer_ns=0))
        held = pair.target.path._insist
        late: list[tuple[object, ...]] = []
        pair.target.path._insist = lambda *said: late.append(said)  # type: ignore[method-assign]
        pair.write(0, batches(2, 1)[0])
        await pair.until(lambda: bool(late) and bool(pair.ended))
        assert pair.ended == {0: "runs"} and not pair.all_free()
        pair.target.path._insist = held  # type: ignore[method-assign]
        held(*late[0])  # type: ignore[arg-type]
        await pair.until(pair.all_free)
        assert not pair.target.landed
        pair.close()

    run(scenario())


class Gate:
    """Holds the copy thread within a copy into `memory`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.entered, self.released = Event(), Event()
        self.into: list[int] = []
        self._copy = gather.copy
        patch.setattr(gather, "copy", self)
        patch.setattr(gather, "STEP_BYTES", 64)

    def __call__(self, source, target, pieces: Pieces) -> None:
        if target.number in self.into:
            self.entered.set()
            assert self.released.wait(60)
        self._copy(source, target, pieces)


def test_a_source_that_dies_in_mid_scatter_is_forgotten_when_no_thread_copies_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        gate = Gate(monkeypatch)
        pair, pieces = Pair(3), batches(3, 1)[0]
        gate.into = [pair.target.region.number]
        before = bytes(pair.target.memory)
        pair.write(0, pieces)
        assert await asyncio.to_thread(gate.entered.wait, 60)
        (intake,) = pair.target.path._intakes.values()
        forgetting = asyncio.ensure_future(asyncio.to_thread(pair.target.path.forget, A))
        while intake.copying is None or not intake.copying.stopped:
            await asyncio.sleep(0)
        assert not forgetting.done() and bytes(pair.target.memory) == before
        gate.released.set()
        (await forgetting)()
        after = bytes(pair.target.memory)
        assert after != before, "the step under way was not waited for"
        pair.target.forget(A)
        await asyncio.sleep(0)
        assert bytes(pair.target.memory) == after and not pair.arrived(pieces)
        assert sorted(pair.target.path._free_staging) == list(range(SIZES.slots))
        pair.source.forget(B)
        assert "ended" in pair.ended[0] and not pair.target.landed
        pair.close()

    run(scenario())


@pytest.mark.parametrize("steps", range(0, 40, 3))
def test_either_may_die_at_any_point_and_all_slots_come_back(steps: int) -> None:
    async def scenario() -> None:
        for dead in ("source", "target"):
            pair, found = Pair(steps), batches(steps, 3)
            for slot, pieces in enumerate(found):
                pair.write(slot, pieces)
            for _ in range(steps):
                await asyncio.sleep(0)
            if dead == "target":
                pair.source.forget(B)
                assert len(pair.ended) == 3
                assert sorted(pair.source.path._free_sends) == list(range(SIZES.slots))
            landed = len(pair.target.landed)
            pair.target.forget(A)
            image = bytes(pair.target.memory)
            for _ in range(20):
                await asyncio.sleep(0)
            assert sorted(pair.target.path._free_staging) == list(range(SIZES.slots))
            assert bytes(pair.target.memory) == image and len(pair.target.landed) == landed
            pair.close()

    run(scenario())


def test_a_write_that_fails_ends_when_the_target_has_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        pair = Pair(5)

        def fail(*_: object, **__: object) -> None:
            raise TransferError("no such way")

        monkeypatch.setattr(pair.source.engine, "write", fail)
        pair.write(0, batches(5, 1)[0])
        await pair.until(lambda: bool(pair.ended))
        assert pair.ended == {0: "no such way"} and not pair.target.landed
        await pair.until(pair.all_free)
        pair.close()

    run(scenario())


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (Ask(7, 64, [(POOL - 32, 64)], [(0, 1)]), "not in the target's region"),
        (Ask(7, 65, [(0, 64)], [(0, 1)]), "65 bytes do not fit"),
        (Ask(7, 2 * SIZES.slot_bytes, [(0, 2 * SIZES.slot_bytes)], [(0, 1)]), "do not fit"),
        (Ask(7, 64, [(0, 64)], [(0, 70000)]), "16 bits"),
        (Ask(7, 64, [(2**63, 64)], [(0, 1)]), "in no memory"),
    ],
)
def test_a_batch_that_is_wrong_is_refused_with_its_reason(ask: Ask, named: str) -> None:
    async def scenario() -> None:
        pair = Pair(6)
        assert named in pair.target.path._wrong(ask)
        pair.write(0, forms.single(0, 0, 64))
        path = pair.target.path
        path._wrong = lambda _: GatherPath._wrong(path, ask)  # type: ignore[method-assign]
        await pair.until(lambda: bool(pair.ended))
        assert "refused a batch" in pair.ended[0] and named in pair.ended[0]
        await pair.until(pair.all_free)
        pair.close()

    run(scenario())


def test_what_cannot_be_read_is_an_error_and_other_mail_is_not_ours() -> None:
    async def scenario() -> None:
        pair = Pair(7)
        card = pair.target.engine.card
        assert not pair.source.path.heard(card, b"weights:")
        with pytest.raises(TransferError, match="cannot be read"):
            pair.source.path.heard(card, gather.MAIL + b"?")
        pair.close()

    run(scenario())


SPEC = KVSpec(
    (KVGroup(GroupKind.FULL, (0, 2), 1, 2), KVGroup(GroupKind.WINDOW, (1,), 1, 2, window=8)), 4, "bfloat16"
)
BLOCKS = 20


def writes_of(seed: int) -> list[Write]:
    """Of runs in both groups, some of them of one layer only, to disjoint blocks."""
    draw = random.Random(seed)
    found: list[Write] = []
    for group in range(2):
        sources, targets = draw.sample(range(0, BLOCKS, 2), 6), draw.sample(range(0, BLOCKS, 2), 6)
        for source, target in zip(sources, targets, strict=True):
            layers = draw.choice((0, 0, 1))
            number = WriteId(len(found) + 1)
            found.append(Write(number, B, Slot(group), group, source, target, 1 + source % 2, 2, 0, layers))
    return found


class Worker:
    """A pool and a KVTransport that gathers."""

    def __init__(self, address: Address, switch: Switch) -> None:
        loop = asyncio.get_running_loop()
        self.layout = layout_of(SPEC, (BLOCKS, BLOCKS))
        self.memory = bytearray(random.Random(address.name).randbytes(self.layout.total))
        self.engine = TransferEngine(address, {"loop": Transport(Settings(address), switch)}, loop)
        region = self.engine.register(memoryview(self.memory), "kv")
        self.events: list[Landed | Written] = []
        self.kv = KVTransport(self.engine, region, SPEC, self.layout, self.events.append, loop, SIZES)


@pytest.mark.parametrize("seed", range(10))
def test_what_one_instant_sends_to_one_peer_is_one_batch(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        switch = Switch(asyncio.get_running_loop(), seed)
        source, target = Worker(A, switch), Worker(B, switch)
        source.kv.join(B, target.kv.place)
        target.kv.join(A, source.kv.place)
        batches: list[int] = []
        write = GatherPath.write

        def count(self: GatherPath, card: object, pieces: Pieces, *rest: object) -> None:
            batches.append(len(pieces))
            write(self, card, pieces, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(GatherPath, "write", count)
        writes = writes_of(seed)
        for one in writes:
            source.kv.write(one)
        while len(source.events) < len(writes):
            await asyncio.sleep(0.001)
        assert len(batches) == 1 and batches[0] > 2
        assert sorted(e.write for e in source.events if isinstance(e, Written) and e.ok) == [
            w.write for w in writes
        ]
        landed = [(e.slot, e.weight) for e in target.events if isinstance(e, Landed)]
        assert landed == [(w.slot, w.weight) for w in writes]
        for one in writes:
            for start, to, nbytes in pieces_of(one, SPEC, source.layout, target.layout).tolist():
                assert target.memory[to : to + nbytes] == source.memory[start : start + nbytes]

    run(scenario())


def test_a_peer_of_another_layout_is_refused_by_the_fields_name() -> None:
    async def scenario() -> None:
        switch = Switch(asyncio.get_running_loop())
        source, target = Worker(A, switch), Worker(B, switch)
        groups = tuple(replace(g, block_size=8) for g in target.kv.place.groups)
        source.kv.join(B, replace(target.kv.place, groups=groups))
        source.kv.write(writes_of(0)[0])
        while not source.events:
            await asyncio.sleep(0.001)
        assert source.events == [Written(WriteId(1), False)]
        assert "block size" in source.kv._refused[B]

    run(scenario())


def test_steps_cut_long_pieces_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "STEP_BYTES", 100)
    pieces = np.array([(0, 500, 30), (40, 600, 250), (300, 900, 7)], np.int64)
    found = list(gather.steps(pieces))
    assert all(forms.total(step) <= 100 for step in found)
    assert np.array_equal(forms.merge(np.concatenate(found)), pieces)

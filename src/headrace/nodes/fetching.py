"""Fetching a cached prefix from another instance's pool before computing the rest (MemServe, arXiv 2406.17565, sections 5 and 6).

The asker, for a sequence whose `Start` names somebody to ask:
 1. looks up its own prefix (FETCHING: the sequence is in no queue yet), and takes blocks in hand for what of the chain is missing;
 2. `Fetch`: the chain's hashes, and where it wants the missing blocks; counts what lands, as in any transfer;
 3. `Found`: the end, with what the other does not have. What came is published and goes on as a hit, and the sequence joins the queue.
The other locks what its pool has of the chain under a key of its own, writes it, says `Found`, and unlocks when all writes have ended.
A chain that is to be kept for later comes in the same way, for no sequence that runs (`nodes.returning`).
Nothing depends on it: if the other has gone, is slow, or a write fails, the sequence joins the queue with what it has. Then the blocks that
may still be written into are kept apart until the other has said `Fenced`, or has ended.
"""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.engine.memory import Memory
from headrace.engine.sequence import Sequence, Status
from headrace.nodes.limits import InstanceConfig
from headrace.nodes.receiving import Incoming, Receiving
from headrace.nodes.sending import Sending
from headrace.types.ids import Address, SequenceKey, Slot
from headrace.types.kv import table_runs
from headrace.types.messages import (
    Abandon,
    AnyMessage,
    Dispatch,
    Fetch,
    Found,
    InstanceInfo,
    Match,
    Matched,
    Release,
    Unfenced,
)


def errand(key: SequenceKey) -> SequenceKey:
    """The key under which a sequence's prefix is fetched: none that a sequence has, here or at the other."""
    return SequenceKey(key.request, -1 - key.choice, key.attempt)


@dataclass(slots=True, eq=False)
class Wanting:
    """What is looked up here, before anybody is asked."""

    sequence: Sequence
    source: Address
    at: int = 0
    """Leading blocks that are here,"""
    count: int = 0
    """and those behind them that are not."""
    lacks: bool = False
    """It waits for blocks to receive them in."""


@dataclass(slots=True, eq=False)
class Getting:
    """What is on the way here. The blocks are in no sequence's table."""

    sequence: Sequence
    source: Address
    blocks: list[list[int]]
    """Per group, from logical block `at` on."""
    at: int
    due_ns: int
    """Until when it is waited for; then, until when the other may confirm that it writes no more."""
    given_up: bool = False
    """The sequence has gone on without."""


@dataclass(slots=True, eq=False)
class Giving:
    """What somebody asked for."""

    target: Address
    message: Fetch
    locked: bool = False
    """Our pool has locked blocks for it."""


class Fetching:
    """`goes_on` puts a sequence into the queue with the prefix that it has."""

    def __init__(
        self,
        router: Address,
        info: InstanceInfo,
        config: InstanceConfig,
        memory: Memory,
        sending: Sending,
        receiving: Receiving,
        send: Callable[[Address, AnyMessage], None],
        goes_on: Callable[[Sequence, int], None],
    ) -> None:
        self._router = router
        self._info = info
        self._config = config
        self._memory = memory
        self._sending = sending
        self._receiving = receiving
        self._send = send
        self._goes_on = goes_on
        self._wanting: dict[SequenceKey, Wanting] = {}
        """Sequences that nobody was asked for yet."""
        self._getting: dict[SequenceKey, Getting] = {}
        """By errand."""
        self._asked: dict[SequenceKey, Giving] = {}
        """By errand: what our pool looks up."""
        self._giving: dict[SequenceKey, Giving] = {}
        """By errand: what our pool has looked up, and what is being written."""
        self._brought: dict[SequenceKey, int] = {}
        self._bytes: dict[SequenceKey, int] = {}

    @property
    def idle(self) -> bool:
        return not (self._wanting or self._getting or self._asked or self._giving)

    def due_ns(self) -> int:
        """The next timer; 0: none."""
        return min((g.due_ns for g in self._getting.values()), default=0)

    def brought(self, key: SequenceKey) -> int:
        """Tokens that were fetched for a sequence; asked once."""
        return self._brought.pop(key, 0)

    def bytes_brought(self, key: SequenceKey) -> int:
        """Bytes of those; asked once."""
        return self._bytes.pop(key, 0)

    # The asker

    def begin(self, sequence: Sequence, source: Address, peer: InstanceInfo | None) -> bool:
        """Look up what is here already. False: there is nobody to ask."""
        limit = sequence.total - 1
        worth = min(len(sequence.hashes), limit // self._memory.spec.block_size) > 0
        if peer is None or peer.pool == self._info.pool or not worth:
            return False
        sequence.status = Status.FETCHING
        self._wanting[sequence.key] = Wanting(sequence, source)
        self._send(self._info.pool_address, Match(sequence.key, tuple(sequence.hashes), limit))
        return True

    def matched(
        self, sequence: Sequence, message: Matched, peers: dict[Address, InstanceInfo], now_ns: int
    ) -> None:
        """Ask for what is missing beyond it, as soon as there is room for it; or go on, if nothing is."""
        size, memory = self._memory.spec.block_size, self._memory
        wanting = self._wanting[sequence.key]
        wanting.at = message.tokens // size
        sequence.published = [wanting.at] * len(sequence.tables)
        memory.adopt(sequence, message.table, sequence.published)
        wanting.count = min(len(sequence.hashes), (sequence.total - 1) // size) - wanting.at
        if wanting.count > 0 and not memory.covers(self._blocks(wanting)):
            memory.wish = [n + wanting.count for n in memory.wish]
            wanting.lacks = True
        else:
            self._ask(wanting, peers, now_ns)

    def leased(self, peers: dict[Address, InstanceInfo], now_ns: int) -> None:
        """The pool has given what it has. Whose wish it did not fulfil goes on without."""
        if self._memory.short or not any(self._memory.wish):
            for wanting in [w for w in self._wanting.values() if w.lacks]:
                self._ask(wanting, peers, now_ns)

    def settle(self, peers: dict[Address, InstanceInfo], now_ns: int) -> None:
        """What is freed here is room, too."""
        for wanting in [w for w in self._wanting.values() if w.lacks]:
            if self._memory.covers(self._blocks(wanting)):
                self._ask(wanting, peers, now_ns)
        if any(self._memory.wish) and not any(w.lacks for w in self._wanting.values()):
            self._memory.wish = [0] * len(self._memory.wish)

    def _blocks(self, wanting: Wanting) -> list[int]:
        """Of each group."""
        return [wanting.count] * len(wanting.sequence.tables)

    def _ask(self, wanting: Wanting, peers: dict[Address, InstanceInfo], now_ns: int) -> None:
        sequence, source, at, count = wanting.sequence, wanting.source, wanting.at, wanting.count
        del self._wanting[sequence.key]
        memory = self._memory
        # Where others are short nothing is taken that can be done without.
        room = not memory.pressed and not memory.short and memory.covers(self._blocks(wanting))
        if count <= 0 or source not in peers or not room:
            self._goes_on(sequence, at * memory.spec.block_size)
            return
        blocks = [
            [block for first, length in spare.take(count) for block in range(first, first + length)]
            for spare in memory.spare
        ]
        key = errand(sequence.key)
        due_ns = now_ns + self._config.fetch_ns
        self._getting[key] = Getting(sequence, source, blocks, at, due_ns)
        table = tuple(run for group, ids in enumerate(blocks) for run in table_runs(group, at, ids))
        slot = self._receiving.expect_blocks(key, sequence, source, table)
        self._send(source, Fetch(key, slot, table, tuple(sequence.hashes[: at + count])))

    def arrived(self, session: Incoming) -> None:
        """All that the other has is here, and so is its end."""
        key = errand(session.sequence.key)
        getting, found = self._getting.pop(key), session.found
        assert found is not None
        self._receiving.close(key)
        if getting.given_up:
            # It was on the way when we gave up, and nothing more is.
            self._put_back(getting.blocks)
            return
        sequence, memory = getting.sequence, self._memory
        count = max(0, found.blocks - getting.at)
        for group, ids in enumerate(getting.blocks):
            sequence.tables[group] += ids[:count]
        self._put_back([ids[count:] for ids in getting.blocks])
        tokens = len(sequence.tables[0]) * memory.spec.block_size
        sequence.computed = tokens
        # Windows need the last of these blocks only, and the other had no more than that.
        for message in (*memory.trim(sequence, tokens), memory.publish(sequence)):
            if message is not None:
                self._send(self._info.pool_address, message)
        self._brought[sequence.key] = count * memory.spec.block_size
        self._bytes[sequence.key] = found.bytes
        self._goes_on(sequence, tokens)

    def dropped(self, sequence: Sequence, now_ns: int) -> None:
        """The sequence leaves: nothing is wanted any more."""
        self._wanting.pop(sequence.key, None)
        self._brought.pop(sequence.key, None)
        self._bytes.pop(sequence.key, None)
        key = errand(sequence.key)
        getting = self._getting.get(key)
        if getting is not None and not getting.given_up:
            self._give_up(key, getting, now_ns)

    def fenced(self, key: SequenceKey, slot: Slot) -> bool:
        """Nothing more can land. False: this is not about an errand, or about one that is over."""
        if key not in self._getting or not self._receiving.fenced(key, slot):
            return False
        self._end(key)
        return True

    def expire(self, now_ns: int) -> None:
        for key, getting in [(k, g) for k, g in self._getting.items() if g.due_ns <= now_ns]:
            if getting.given_up:
                self._send(self._router, Unfenced(getting.source))
                getting.due_ns = now_ns + self._config.fence_ns
            else:
                self._give_up(key, getting, now_ns)
                self._goes_on(getting.sequence, self._own(getting))

    # The other

    def asked(self, target: Address, message: Fetch) -> None:
        self._asked[message.key] = Giving(target, message)
        limit = len(message.hashes) * self._memory.spec.block_size
        self._send(self._info.pool_address, Match(message.key, message.hashes, limit))

    def looked_up(self, message: Matched) -> bool:
        """Our pool has locked what it has of a chain. False: nobody asked for that, or not any more."""
        giving = self._asked.pop(message.key, None)
        if giving is None:
            return False
        self._giving[message.key] = giving
        giving.locked = message.tokens > 0
        spec = self._memory.spec
        fetch, have = giving.message, message.tokens // spec.block_size
        tables = [[-1] * have for _ in spec.groups]
        for run in message.table:
            tables[run.group][run.at : run.at + run.count] = range(run.first, run.first + run.count)
        asked = Dispatch(fetch.key, fetch.slot, fetch.table, shared=False, expected=0)
        session = self._sending.give(giving.target, asked, tables, have)
        self._send(giving.target, Found(fetch.key, fetch.slot, have, session.skipped, session.bytes))
        self._ended(fetch.key)
        return True

    def is_about(self, key: SequenceKey) -> bool:
        return key.choice < 0

    def written(self, key: SequenceKey, failed: bool) -> None:
        """A write of ours has ended. One that failed ends the errand: the asker hears it as soon as no write is in flight."""
        giving = self._giving[key]
        if failed:
            self._sending.abandoned(giving.target, Abandon(key, giving.message.slot))
        self._ended(key)

    def abandoned(self, key: SequenceKey) -> None:
        """The asker has gone on without."""
        self._asked.pop(key, None)
        if key in self._giving:
            self._ended(key)

    # Both

    def lost(self, peer: Address) -> None:
        for key in [k for k, g in self._getting.items() if g.source == peer]:
            # Its process has ended: no write can land any more.
            self._receiving.close(key)
            self._end(key)
        for key in [k for k, g in self._asked.items() if g.target == peer]:
            del self._asked[key]

    def _give_up(self, key: SequenceKey, getting: Getting, now_ns: int) -> None:
        getting.given_up = True
        getting.due_ns = now_ns + self._config.fence_ns
        self._receiving.abandon(key)

    def _ended(self, key: SequenceKey) -> None:
        """Once all writes have ended, nothing need be locked any more."""
        if not self._sending.busy(key):
            self._sending.keep(key)
            if self._giving.pop(key).locked:
                self._send(self._info.pool_address, Release(key))

    def _end(self, key: SequenceKey) -> None:
        """Nothing lands any more, and not all has come."""
        getting = self._getting.pop(key)
        self._put_back(getting.blocks)
        if not getting.given_up:
            self._goes_on(getting.sequence, self._own(getting))

    def _own(self, getting: Getting) -> int:
        """Tokens of the prefix that was here before."""
        return getting.at * self._memory.spec.block_size

    def _put_back(self, blocks: list[list[int]]) -> None:
        for group, ids in enumerate(blocks):
            for run in table_runs(group, 0, ids):
                self._memory.spare[group].add(run.first, run.count)

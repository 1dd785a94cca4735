"""The tiers below one pool: host memory and local disk (MemServe, arXiv 2406.17565, section 4: swap out, swap in). One KV group only.

Life cycle of a cached block that the eviction policy gives up:
 1. While few blocks are free (fewer than leases have lately taken at once) it leaves the index ahead of need, and is *away*: nobody's,
    until host memory has a copy (`Save`, `Saved`).
    What a lease needs at once it takes without a copy: a lease waits for no tier, and what is lost by that is counted.
 2. Its copy goes from host memory to disk when room there becomes short (`Spill`, `Spilled`), and from disk when that is full.

Life cycle of a look-up whose prefix goes on in a tier (a promotion):
 1. What the pool has is locked for it. Blocks are made room for, and are away; the tiers fill them (`Load`).
 2. When all have been answered (`Loaded`) what is whole up to the first gap is indexed, and whoever waits is told what the pool has now.
    A copy that was not what it is called is forgotten.
 3. Where that takes too long, those that wait are told of what the pool has, and what comes later is cache for the next.
Who looks up what is being loaded already waits for that. The death of who waits changes nothing for the blocks.

Life cycle of a flush, when the service ends: what is cached is saved where it lies, the most recently used first, and goes on to disk.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.kv.pool import BlockPool
from headrace.kv.tiers import Tiers
from headrace.nodes.limits import TierConfig
from headrace.types.events import Command
from headrace.types.ids import Address, BlockHash, SequenceKey
from headrace.types.messages import Match, Matched
from headrace.types.tiers import (
    Drop,
    FlushAsked,
    Flushed,
    Load,
    Loaded,
    Piece,
    Recovered,
    Save,
    Saved,
    Spill,
    Spilled,
    Tier,
    TierEvent,
)

AHEAD_SHARE_MAX = 4
"""No more than one block in so many is kept free ahead of need."""


@dataclass(slots=True)
class Wait:
    """Who has looked up a prefix and is not answered yet."""

    holder: Address
    message: Match
    due_ns: int


@dataclass(slots=True, eq=False)
class Promotion:
    """A piece of a chain on its way into the pool."""

    names: tuple[BlockHash, ...]
    parent: BlockHash | None
    """Of the first."""
    depth: int
    """Logical block of the first."""
    blocks: list[int]
    begun_ns: int
    tickets: dict[int, None] = field(default_factory=dict[int, None])
    """Loads that are not answered."""
    good: dict[BlockHash, Tier] = field(default_factory=dict[BlockHash, Tier])
    """What has come, and from where."""
    waiting: list[Wait] = field(default_factory=list[Wait])


class Tiering:
    """See the module. `out` takes commands; `tell` answers a look-up."""

    def __init__(
        self,
        pool: BlockPool,
        config: TierConfig,
        out: Callable[[Command], None],
        tell: Callable[[Address, Matched], None],
    ) -> None:
        assert len(pool.trees) == 1, "tiers keep blocks of one KV group"
        self.tiers = Tiers(config.host_blocks, config.disk_blocks)
        self.counters: dict[str, int] = {}
        """Counts since the start, by the names of `types.service.ServiceStatus.counters`."""
        self._pool = pool
        self._config = config
        self._out = out
        self._tell = tell
        self._ticket = 0
        self._saves: dict[int, tuple[Piece, ...]] = {}
        self._spills: dict[int, tuple[BlockHash, ...]] = {}
        self._loads: dict[int, tuple[Promotion, Load]] = {}
        self._loading: dict[BlockHash, Promotion] = {}
        self._block_ns: dict[Tier, int] = {}
        """What loading one block takes, as far as is known."""
        self._listed: dict[BlockHash, None] = {}
        """What the pool's listener knows of."""
        self._ahead = config.ahead_blocks
        """How many blocks are to be free: more while leases take more at once, up to a share of the pool."""
        self._since = 0
        """Blocks moved down since a lease found too few, or since fewer were kept free."""
        self._flush: deque[Piece] | None = None
        """What is still to be saved before the end; None: no end is near."""
        self._bytes = pool.spec.block_bytes(0)
        pool.evicted = []

    @property
    def idle(self) -> bool:
        return not (self._saves or self._spills or self._loads)

    @property
    def flushing(self) -> bool:
        return self._flush is not None

    def due_ns(self) -> int:
        """The next timer; 0: none."""
        waits = (w.due_ns for p in self._promotions() for w in p.waiting)
        return min(waits, default=0)

    def handle(self, event: TierEvent, now_ns: int) -> None:
        match event:
            case Saved(ticket, ok):
                self._saved(self._saves.pop(ticket), ok)
            case Spilled(ticket, ok):
                for name, good in zip(self._spills.pop(ticket), ok, strict=True):
                    self.tiers.spilled(name, ok=good)
                    self._count("tier_disk_bytes_saved", good * self._bytes)
                    self._count("tier_spills_failed", not good)
            case Loaded(ticket, ok):
                self._loaded(*self._loads.pop(ticket), ok, now_ns)
            case Recovered(names):
                self.tiers.recovered(names)
                self._count("tier_blocks_recovered", len(names))
            case FlushAsked():
                self._flush = deque(self._worth_keeping())

    def settle(self, now_ns: int) -> None:
        """After leases were served."""
        self._expire(now_ns)
        assert self._pool.evicted is not None
        passed_over = sum(name not in self.tiers for name in self._pool.evicted)
        self._count("tier_blocks_passed_over", passed_over)
        self._pool.evicted.clear()
        if passed_over:
            # Leases are larger than what was kept free for them.
            self._ahead = min(
                max(self._ahead, self._pool.blocks[0] // AHEAD_SHARE_MAX), self._ahead + passed_over
            )
            self._since = 0
        if self._flush is None:
            self._demote()
        self._spill()
        if self._flush is not None:
            self._save_rest(self._flush)
        self._drop()
        self._count("tier_blocks_lost", self.tiers.lost)
        self.tiers.lost = 0

    def listed(
        self, entered: tuple[BlockHash, ...], left: tuple[BlockHash, ...]
    ) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """What has come and gone since this was asked last, tiers taken for a part of the pool. Given: the same of the pool alone."""
        changes = dict.fromkeys((*entered, *left, *self.tiers.changes))
        self.tiers.changes.clear()
        tree = self._pool.trees[0]
        now = {name: tree.get(name) is not None or name in self.tiers for name in changes}
        came = tuple(n for n, here in now.items() if here and n not in self._listed)
        gone = tuple(n for n, here in now.items() if not here and n in self._listed)
        self._listed.update(dict.fromkeys(came))
        for name in gone:
            del self._listed[name]
        return came, gone

    # Down

    def _demote(self) -> None:
        pool, tree = self._pool, self._pool.trees[0]
        pieces: list[Piece] = []
        room = self._config.batch_blocks - sum(map(len, self._saves.values()))
        while len(pieces) < room and tree.evictable:
            if pool.free[0].total + pool.away[0].total >= self._ahead:
                break
            entry = pool.demote()
            self._since += 1
            if entry.hash not in self.tiers and self.tiers.save(entry.hash):
                pieces.append(Piece(entry.hash, entry.block))
                continue
            self._count("tier_blocks_lost", entry.hash not in self.tiers)
            self.tiers.touch([entry.hash])
            pool.come_back(entry.block)
        self._save(pieces)
        if self._since >= 8 * self._ahead:
            self._ahead = max(self._config.ahead_blocks, self._ahead - self._ahead // 8)
            self._since = 0

    def _drop(self) -> None:
        """Before what takes its place is asked for, or is copied anew: a tier has room for so many and no more."""
        for tier, names in self.tiers.dropped().items():
            self._out(Drop(tier, names))

    def _save(self, pieces: list[Piece]) -> None:
        if pieces:
            self._drop()
            # In the order of the pool, so that what lies together is copied together.
            ordered = tuple(sorted(pieces, key=lambda piece: piece.block))
            ticket = self._next_ticket()
            self._saves[ticket] = ordered
            self._out(Save(ticket, ordered))

    def _saved(self, pieces: tuple[Piece, ...], ok: tuple[bool, ...]) -> None:
        for piece, good in zip(pieces, ok, strict=True):
            self.tiers.saved(piece.name, ok=good)
            self._count("tier_host_bytes_saved", good * self._bytes)
            self._count("tier_saves_failed", not good)
            if self._flush is None or not self._held(piece):
                self._pool.come_back(piece.block)

    def _held(self, piece: Piece) -> bool:
        """A flush saves blocks where they lie."""
        entry = self._pool.trees[0].get(piece.name)
        return entry is not None and entry.block == piece.block

    def _spill(self) -> None:
        room = self._config.batch_blocks - sum(map(len, self._spills.values()))
        ahead = self.tiers.host.blocks_max if self.flushing else self._config.batch_blocks
        names = tuple(self.tiers.spills(room, min(ahead, self.tiers.host.blocks_max)))
        if names:
            ticket = self._next_ticket()
            self._spills[ticket] = names
            self._drop()
            self._out(Spill(ticket, names))

    # Up

    def look_up(self, holder: Address, message: Match, now_ns: int) -> bool:
        """Begin to load what of the chain goes on in a tier, or wait for what is being loaded. False: there is nothing to wait for."""
        if self.flushing:
            return False
        size = self._pool.spec.block_size
        chain = message.hashes[: message.limit // size]
        here = self._here(holder, message.key)
        if here >= len(chain):
            return False
        promotion = self._loading.get(chain[here]) or self._begin(chain, here, now_ns)
        if promotion is None:
            return False
        promotion.waiting.append(Wait(holder, message, now_ns + self._config.load_ns))
        return True

    def _here(self, holder: Address, key: SequenceKey) -> int:
        handle = self._pool.handles.get((holder, key))
        return handle[0].end if handle else 0

    def _begin(self, chain: tuple[BlockHash, ...], here: int, now_ns: int) -> Promotion | None:
        tiers, pool = self.tiers, self._pool
        end = here
        while end < len(chain) and chain[end] not in self._loading and tiers.where(chain[end]) is not None:
            end += 1
        # No more than half of what others could lease is taken for it.
        end = min(end, here + pool.available()[0] // 2)
        names = chain[here:end]
        if not names or not self._worth(names):
            return None
        tiers.touch(list(chain[:end]))
        blocks = pool.make_room(len(names))
        promotion = Promotion(names, chain[here - 1] if here else None, here, blocks, now_ns)
        for tier in Tier:
            pieces = [Piece(n, b) for n, b in zip(names, blocks, strict=True) if tiers.where(n) is tier]
            if pieces:
                load = Load(self._next_ticket(), tier, tuple(pieces))
                promotion.tickets[load.ticket] = None
                self._loads[load.ticket] = (promotion, load)
                for piece in pieces:
                    tiers.shelf(tier).pin(piece.name)
                self._out(load)
        for name in names:
            self._loading[name] = promotion
        return promotion

    def _worth(self, names: tuple[BlockHash, ...]) -> bool:
        """Is loading faster than computing, as far as both are known?"""
        if not self._config.recompute_ns:
            return True
        tiers = [self.tiers.where(name) for name in names]
        load_ns = sum(self._block_ns.get(tier, 0) for tier in tiers if tier is not None)
        return load_ns < len(names) * self._config.recompute_ns

    def _loaded(self, promotion: Promotion, load: Load, ok: tuple[bool, ...], now_ns: int) -> None:
        took_ns = (now_ns - promotion.begun_ns) // len(load.pieces)
        self._block_ns[load.tier] = (3 * self._block_ns.get(load.tier, took_ns) + took_ns) // 4
        shelf = self.tiers.shelf(load.tier)
        for piece, good in zip(load.pieces, ok, strict=True):
            shelf.unpin(piece.name)
            if good:
                promotion.good[piece.name] = load.tier
                self._count(f"tier_{load.tier.value}_bytes_loaded", self._bytes)
            else:
                self._count("tier_loads_failed")
                if shelf.idle(piece.name):
                    self.tiers.forget(load.tier, piece.name)
        del promotion.tickets[load.ticket]
        if not promotion.tickets:
            self._end(promotion, now_ns)

    def _end(self, promotion: Promotion, now_ns: int) -> None:
        """All that will come has come."""
        pool, parent, whole = self._pool, promotion.parent, True
        for i, (name, block) in enumerate(zip(promotion.names, promotion.blocks, strict=True)):
            del self._loading[name]
            whole = whole and name in promotion.good
            if whole:
                whole = pool.promote(block, name, parent, promotion.depth + i, now_ns)
            else:
                pool.come_back(block)
            parent = name
        for wait in promotion.waiting:
            before = self._here(wait.holder, wait.message.key)
            after = self._answer(wait, now_ns)
            for name in wait.message.hashes[before:after]:
                tier = promotion.good.get(name)
                if tier is not None:
                    self._count(f"tokens_hit_{tier.value}", pool.spec.block_size)

    def _answer(self, wait: Wait, now_ns: int) -> int:
        """Say what the pool has now; so many blocks."""
        pool, message = self._pool, wait.message
        pool.release(wait.holder, message.key, now_ns)
        tokens, table = pool.match(wait.holder, message.key, message.hashes, message.limit, now_ns)
        self._tell(wait.holder, Matched(message.key, tokens, table))
        return tokens // pool.spec.block_size

    def _expire(self, now_ns: int) -> None:
        for promotion in self._promotions():
            for wait in [w for w in promotion.waiting if w.due_ns <= now_ns]:
                promotion.waiting.remove(wait)
                self._count("tier_loads_late")
                self._answer(wait, now_ns)

    def released(self, holder: Address, key: SequenceKey) -> None:
        """It wants nothing any more."""
        for promotion in self._promotions():
            promotion.waiting = [w for w in promotion.waiting if (w.holder, w.message.key) != (holder, key)]

    def forget(self, holder: Address) -> None:
        """It has ended."""
        for promotion in self._promotions():
            promotion.waiting = [w for w in promotion.waiting if w.holder != holder]

    def _promotions(self) -> list[Promotion]:
        return list(dict.fromkeys(promotion for promotion, _ in self._loads.values()))

    # The end

    def _worth_keeping(self) -> list[Piece]:
        """What is cached and in no tier, as much as disk has room for; the most recently used first, and of a chain the beginning."""
        disk = self.tiers.disk.blocks_max
        entries = sorted(self._pool.trees[0], key=lambda entry: (-entry.used_ns, entry.depth))
        return [Piece(e.hash, e.block) for e in entries[:disk] if e.hash not in self.tiers]

    def _save_rest(self, rest: deque[Piece]) -> None:
        pieces: list[Piece] = []
        room = self._config.batch_blocks - sum(map(len, self._saves.values()))
        while rest and len(pieces) < room and self.tiers.spilling:
            if self.tiers.host.full and not self._can_go():
                break
            piece = rest.popleft()
            if piece.name not in self.tiers and self.tiers.save(piece.name):
                pieces.append(piece)
        self._save(pieces)
        if self.idle and not pieces:
            self._out(Flushed())

    def _can_go(self) -> bool:
        """Is something in host memory on disk, too?"""
        host, disk = self.tiers.host, self.tiers.disk
        return any(host.idle(name) and disk.ready(name) for name in host)

    def _next_ticket(self) -> int:
        self._ticket += 1
        return self._ticket

    def _count(self, name: str, by: int = 1) -> None:
        if by:
            self.counters[name] = self.counters.get(name, 0) + by

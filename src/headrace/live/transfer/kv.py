"""A worker's KV over the engine: the core's `Write`s become engine writes, and immediates become `Landed`. Peer to peer, past the hub.

Blocks go as they are, so both ends' layouts must be equal: a peer whose layout differs is refused with the field's name, here as at the
handshake. (`transfer.layout` can map other block sizes and degrees; but a target finds KV by hashes that chain over its own block size.)
By `path: gather` what one instant sends to one peer goes through one buffer and one write if it is scattered (`gather`); else as runs.
At the target the core hears of a write before the write is acknowledged, so at the source `Written` comes after `Landed` there: a `Fenced`
that follows can overtake nothing. After `forget(peer)` nothing of that peer reaches the core.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b

import msgspec
import numpy as np

from headrace.live.settings import PoolLayout
from headrace.live.transfer import gather, pieces
from headrace.live.transfer.counters import immediate
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.gather import GatherPath
from headrace.live.transfer.outgoing import Turns
from headrace.live.transfer.pieces import Pieces
from headrace.live.transfer.regions import Descriptor, Region
from headrace.transfer.layout import GroupLayout, check_whole, layout_of, remap
from headrace.types.errors import IncompatiblePeer, TransferError
from headrace.types.events import Landed, Write, Written
from headrace.types.ids import Address, Slot
from headrace.types.kv import KVSpec, Layout

log = logging.getLogger(__name__)

CHANNEL = 0
"""Of KV's immediates: their slots are the cores' own (`transfer.target`)."""


class Place(msgspec.Struct, frozen=True):
    """Where a worker's pool is, for those who write into it."""

    descriptor: Descriptor
    layout: PoolLayout
    groups: tuple[GroupLayout, ...]


def layout_id(fingerprint: str, spec: KVSpec) -> str:
    """What must be equal for one's blocks to mean anything to the other: the model, its KV's shape, order and element type."""
    return blake2b(msgspec.json.encode((fingerprint, spec)), digest_size=16).hexdigest()


def pieces_of(write: Write, spec: KVSpec, source: PoolLayout, target: PoolLayout) -> Pieces:
    """A run of blocks is one piece, as blocks are block-first; some layers of it are one piece a block, or one a token.

    Raises TransferError for blocks that are not there.
    """
    check_blocks(write, source, target)
    group, size = write.group, source.sizes[write.group]
    start = source.offsets[group] + write.source_first * size
    to = target.offsets[group] + write.target_first * size
    if not write.layers:
        return pieces.single(start, to, write.count * size)
    by_token = spec.layout is Layout.TOKEN_MAJOR
    count = write.count * (spec.block_size if by_token else 1)
    stride = size // (spec.block_size if by_token else 1)
    layer = stride // len(spec.groups[group].layers)
    skipped = write.layer * layer
    return pieces.strided(start + skipped, to + skipped, count, write.layers * layer, stride, stride)


def check_blocks(write: Write, source: PoolLayout, target: PoolLayout) -> None:
    """Raises TransferError for blocks that are not there."""
    group = write.group
    if write.source_first + write.count > source.blocks[group] or write.source_first < 0:
        raise TransferError(f"the source's pool has {source.blocks[group]} blocks in group {group}: {write}")
    if write.target_first + write.count > target.blocks[group] or write.target_first < 0:
        raise TransferError(f"the target's pool has {target.blocks[group]} blocks in group {group}: {write}")


def batch_pieces(
    writes: Sequence[Write], spec: KVSpec, groups: Sequence[GroupLayout], source: PoolLayout, target: Place
) -> Pieces:
    """All of them, by the layout map: whole runs of blocks, as the layouts are equal. Raises TransferError."""
    found: list[Pieces] = []
    for group, layout in enumerate(groups):
        runs = [w for w in writes if w.group == group]
        found += [pieces_of(w, spec, source, target.layout) for w in runs if w.layers]
        tables: tuple[list[int], list[int]] = ([], [])
        for write in (w for w in runs if not w.layers):
            check_blocks(write, source, target.layout)
            tables[0].extend(range(write.source_first, write.source_first + write.count))
            tables[1].extend(range(write.target_first, write.target_first + write.count))
        if tables[0]:
            end = len(tables[0]) * layout.block_size
            for part in remap(layout, target.groups[group], *tables, 0, end):
                offsets = np.array([source.offsets[group], target.layout.offsets[group], 0], np.int64)
                found.append(part.pieces + offsets)
    return pieces.merge(np.concatenate(found))


class KVTransport:
    """Implements `ports.Transport`. `post` takes the core's events, on the engine's thread."""

    def __init__(
        self,
        engine: TransferEngine,
        region: Region,
        spec: KVSpec,
        layout: PoolLayout,
        post: Callable[[Landed | Written], None],
        turns: Turns,
        gathering: gather.Settings | None = None,
    ) -> None:
        """`gathering`: None sends runs always."""
        self._groups = tuple(layout_of(spec, group) for group in range(len(spec.groups)))
        self.place = Place(engine.describe(region), layout, self._groups)
        self._engine = engine
        self._region = region
        self._spec = spec
        self._layout = layout
        self._post = post
        self._turns = turns
        self._peers: dict[Address, Place] = {}
        self._refused: dict[Address, str] = {}
        self._instant: dict[Address, list[Write]] = {}
        """What is to be sent by gathering, at the end of this turn."""
        self._gather: GatherPath | None = None
        if gathering is not None:
            self._gather = GatherPath(engine, region, turns, self._landed, gathering)
            engine.received = self._mailed
        engine.counter(CHANNEL).generic = self._landed

    def join(self, peer: Address, place: Place) -> None:
        """From now on it can be written to, if its blocks are like ours."""
        try:
            for ours, theirs in zip(self._groups, place.groups, strict=True):
                check_whole(ours, theirs)
        except (IncompatiblePeer, ValueError) as error:
            log.error("KV cannot go to %s: %s", peer, error)
            self._refused[peer] = str(error)
            return
        self._peers[peer] = place

    def distrust(self, peer: Address, why: str) -> None:
        self._engine.distrust(peer, why)

    def write(self, write: Write) -> None:
        if self._gather is None:
            self._write_run(write)
            return
        if not self._instant:
            self._turns.call_soon_threadsafe(self._flush)
        self._instant.setdefault(write.target, []).append(write)

    def forget(self, peer: Address, then: Callable[[], None]) -> None:
        """It has ended. `then`: nothing of it can land here any more; perhaps within this call."""
        self._peers.pop(peer, None)
        self._refused.pop(peer, None)
        free = self._gather.forget(peer) if self._gather is not None else None

        def gone() -> None:
            if free is not None:
                free()
            then()

        self._engine.forget(peer, gone)

    def _write_run(self, write: Write) -> None:
        done = partial(self._written, write)
        place = self._peers.get(write.target)
        try:
            if place is None:
                raise TransferError(self._refused.get(write.target, f"{write.target} has ended"))
            self._engine.write(
                self._region,
                place.descriptor,
                pieces_of(write, self._spec, self._layout, place.layout),
                done,
                imm=immediate(write.slot, write.weight),
                channel=CHANNEL,
            )
        except TransferError as error:
            done(error)

    def _flush(self) -> None:
        instant, self._instant = self._instant, {}
        for peer, writes in instant.items():
            place = self._peers.get(peer)
            for batch in self._batches(writes):
                if place is None or not self._gathered(place, batch):
                    self._as_runs(batch)

    def _batches(self, writes: list[Write]) -> Iterator[list[Write]]:
        """As many as a slot holds, each."""
        assert self._gather is not None
        batch: list[Write] = []
        filled = 0
        for write in writes:
            size = write.count * self._layout.sizes[write.group]
            if batch and filled + size > self._gather.settings.slot_bytes:
                yield batch
                batch, filled = [], 0
            batch.append(write)
            filled += size
        yield batch

    def _gathered(self, place: Place, batch: list[Write]) -> bool:
        """False: they are one run already, or are not all there; as runs, each ends by itself."""
        assert self._gather is not None
        try:
            moved = batch_pieces(batch, self._spec, self._groups, self._layout, place)
        except TransferError:
            return False
        if len(moved) < 2:
            return False

        def done(error: TransferError | None) -> None:
            for write in batch:
                self._written(write, error)

        arrivals = [(int(w.slot), w.weight) for w in batch]
        self._gather.write(place.descriptor.card, moved, arrivals, done, partial(self._as_runs, batch))
        return True

    def _as_runs(self, batch: list[Write]) -> None:
        for write in batch:
            self._write_run(write)

    def _mailed(self, source: Address, body: bytes) -> None:
        place = self._peers.get(source)
        if place is None or self._gather is None:
            return
        try:
            if not self._gather.heard(place.descriptor.card, body):
                log.warning("%s says what nobody here understands", source)
        except TransferError as error:
            log.error("%s", error)

    def _landed(self, source: Address, slot: int, weight: int) -> None:
        self._post(Landed(Slot(slot), weight, source))

    def _written(self, write: Write, error: TransferError | None) -> None:
        if error is not None:
            log.warning("write %d to %s: %s", write.write, write.target, error)
        self._post(Written(write.write, error is None))

"""A worker's KV over the engine: the core's `Write`s become engine writes, and immediates become `Landed`. Peer to peer, past the hub.

At the target the core hears of a write before the write is acknowledged, so at the source `Written` comes after `Landed` there: a `Fenced`
that follows can overtake nothing. After `forget(peer)` nothing of that peer reaches the core.
"""

import logging
from collections.abc import Callable
from functools import partial
from hashlib import blake2b

import msgspec

from headrace.live.settings import PoolLayout
from headrace.live.transfer import pieces
from headrace.live.transfer.counters import immediate
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.pieces import Pieces
from headrace.live.transfer.regions import Descriptor, Region
from headrace.types.errors import TransferError
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


def layout_id(fingerprint: str, spec: KVSpec) -> str:
    """What must be equal for one's blocks to mean anything to the other: the model, its KV's shape, order and element type."""
    return blake2b(msgspec.json.encode((fingerprint, spec)), digest_size=16).hexdigest()


def pieces_of(write: Write, spec: KVSpec, source: PoolLayout, target: PoolLayout) -> Pieces:
    """A run of blocks is one piece, as blocks are block-first; some layers of it are one piece a block, or one a token.

    Raises TransferError for blocks that are not there.
    """
    group, size = write.group, source.sizes[write.group]
    if write.source_first + write.count > source.blocks[group] or write.source_first < 0:
        raise TransferError(f"the source's pool has {source.blocks[group]} blocks in group {group}: {write}")
    if write.target_first + write.count > target.blocks[group] or write.target_first < 0:
        raise TransferError(f"the target's pool has {target.blocks[group]} blocks in group {group}: {write}")
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


class KVTransport:
    """Implements `ports.Transport`. `post` takes the core's events, on the engine's thread."""

    def __init__(
        self,
        engine: TransferEngine,
        region: Region,
        spec: KVSpec,
        layout: PoolLayout,
        post: Callable[[Landed | Written], None],
    ) -> None:
        self.place = Place(engine.describe(region), layout)
        self._engine = engine
        self._region = region
        self._spec = spec
        self._layout = layout
        self._post = post
        self._peers: dict[Address, Place] = {}
        engine.counter(CHANNEL).generic = self._landed

    def join(self, peer: Address, place: Place) -> None:
        """From now on it can be written to."""
        self._peers[peer] = place

    def write(self, write: Write) -> None:
        done = partial(self._written, write)
        place = self._peers.get(write.target)
        try:
            if place is None:
                raise TransferError(f"{write.target} has ended")
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

    def forget(self, peer: Address) -> None:
        self._peers.pop(peer, None)
        self._engine.forget(peer)

    def _landed(self, source: Address, slot: int, weight: int) -> None:
        self._post(Landed(Slot(slot), weight))

    def _written(self, write: Write, error: TransferError | None) -> None:
        if error is not None:
            log.warning("write %d to %s: %s", write.write, write.target, error)
        self._post(Written(write.write, error is None))

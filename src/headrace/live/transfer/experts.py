"""Expert dispatch and combine over the transfer engine: tokens travel to the ranks that hold their experts, results come back.

After TransferEngine (arXiv 2510.27656, section 6): scatter writes and counts in place of a padded all-to-all. A step, on each rank:
 1. `dispatch`: one scatter call sends every peer a header (how many rows, which of its experts each wants, with what weight) and the
    rows themselves, as one write into memory that the peer keeps for this sender alone: nobody waits for counts before it sends.
 2. A write weighs the same whatever it carries, so what to expect is known beforehand. When all peers' are there, in whatever order,
    the caller computes (`Dispatched.compute`).
 3. `combine`: each sender gets its rows back, one write a peer. It sums them in the order of the ranks.
A token's row travels once to a rank, however many of its experts lie there; a rank's part goes through its experts in ascending order.
So the result is the same to the bit whatever arrives first. A rank can be one step ahead of another, never two: slots and headers
alternate.
Leaves out: rows that do not fit the private memory (they are refused, not sent to a shared overflow); quantising rows on their way.
"""

import asyncio
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from headrace.live.pools import SEALS
from headrace.live.transfer import pieces as forms
from headrace.live.transfer.counters import ImmCounter, immediate
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.pieces import Pieces
from headrace.live.transfer.regions import Descriptor
from headrace.types.errors import ConfigError, TransferError

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Rows = NDArray[np.uint8]
Compute = Callable[[int, Rows], Floats]
"""(expert, rows [n, row_bytes]) -> [n, hidden] f32; the expert's number among all."""

ROWS, RESULTS = 0, 1
"""What a slot counts: `2 * kind + parity of the step`."""
WRITE = 64
"""Of each write, its weight: it may be dealt over as many lanes."""
CHANNEL = 1
"""The engine's channel: slots of others are not in the way."""
CHOICE = np.dtype([("expert", np.int32), ("weight", np.float32)])


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Equal on all ranks."""

    ranks: int
    experts: int
    """Expert e lies on rank `e // (experts / ranks)`."""
    chosen: int
    """Experts of a token."""
    tokens_max: int
    """Of one rank, in one step."""
    row_bytes: int
    """Of a token's input."""
    hidden: int
    """f32 values of a token's output."""
    rows_max: int = 0
    """From one rank to another, in one step; 0: all its tokens."""

    @property
    def rows(self) -> int:
        return self.rows_max or self.tokens_max

    @property
    def local(self) -> int:
        """Experts of a rank."""
        return self.experts // self.ranks

    def check(self) -> None:
        """Raises ConfigError."""
        if self.experts % self.ranks or not 1 <= self.chosen <= self.experts:
            raise ConfigError(f"{self.experts} experts, {self.chosen} a token, do not fit {self.ranks} ranks")
        if self.rows < 1:
            raise ConfigError(f"{self.rows} rows from rank to rank: give rows_max or tokens_max at least 1")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where what lies in a rank's region, bytes. Received: by sender; to be sent: by receiver."""

    shape: Shape

    @property
    def header_bytes(self) -> int:
        return 8 + self.shape.rows * self.shape.chosen * CHOICE.itemsize

    @property
    def result_bytes(self) -> int:
        return self.shape.hidden * 4

    def header(self, rank: int, parity: int) -> int:
        return (parity * self.shape.ranks + rank) * self.header_bytes

    def rows(self, rank: int) -> int:
        return self.header(0, 2) + rank * self.shape.rows * self.shape.row_bytes

    def results(self, rank: int) -> int:
        return self.rows(self.shape.ranks) + rank * self.shape.rows * self.result_bytes

    @property
    def half(self) -> int:
        """What is received; what is to be sent lies behind it, headers and results in the same order."""
        return -(-self.results(self.shape.ranks) // 4096) * 4096

    @property
    def inputs(self) -> int:
        """This rank's tokens, to be sent."""
        return 2 * self.half

    @property
    def nbytes(self) -> int:
        return self.inputs + self.shape.tokens_max * self.shape.row_bytes


@dataclass(slots=True)
class Dispatched:
    """The rows that this rank's experts are to work on, in the order of the senders."""

    rows: Rows
    """[n, row_bytes]."""
    choices: NDArray[np.void]
    """[n, chosen] of (expert, weight); expert -1: not of this rank."""
    counts: tuple[int, ...]
    """Rows of each sender."""
    first: int
    """Number of this rank's first expert,"""
    local: int
    """and how many it has."""

    def compute(self, expert: Compute, hidden: int) -> Floats:
        """Weighted sums over this rank's experts, in ascending order: [n, hidden]."""
        out = np.zeros((len(self.rows), hidden), np.float32)
        wanted = self.choices["expert"]
        for number in range(self.first, self.first + self.local):
            at, column = np.nonzero(wanted == number)
            if len(at):
                weights = self.choices["weight"][at, column][:, None]
                out[at] += weights * expert(number, self.rows[at])
        return out


class Experts:
    """One rank. Its `descriptor` goes to all others, and theirs to `join`, by whatever way they know each other."""

    def __init__(self, engine: TransferEngine, rank: int, shape: Shape, *, timeout_s: float = 30.0) -> None:
        shape.check()
        self.shape = shape
        self.rank = rank
        self._engine = engine
        self._timeout_s = timeout_s
        self._layout = Layout(shape)
        self._fd = os.memfd_create("headrace-experts", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, self._layout.nbytes)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        self._map = mmap.mmap(self._fd, self._layout.nbytes)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._region = engine.register(memoryview(self._map), f"experts {shape}", self._fd)
        self._counter: ImmCounter = engine.counter(CHANNEL)
        self._peers: dict[int, Descriptor] = {}
        self._step = 0
        self._sent: list[asyncio.Future[None]] = []
        """Writes of the last step, whose memory is used again."""
        self._tokens = 0
        self._returns: tuple[Ints, ...] = ()
        """Tokens whose results each rank owes us."""
        self._back: asyncio.Future[None]
        self._awaited: asyncio.Future[None] | None = None
        self._error: TransferError | None = None
        """Of a write: the group cannot go on."""
        self.bytes_sent = 0

    @property
    def descriptor(self) -> Descriptor:
        return self._engine.describe(self._region)

    def join(self, descriptors: Sequence[Descriptor]) -> None:
        """Those of all ranks, in their order."""
        assert len(descriptors) == self.shape.ranks
        self._peers = {rank: d for rank, d in enumerate(descriptors) if rank != self.rank}
        for peer in self._peers.values():
            self._engine.connect(peer.card)

    async def close(self) -> None:
        """All ranks together: each waits until all have had what they sent. Then peers can write here no more."""
        await self._settled()
        met: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        cards = [peer.card for peer in self._peers.values()]
        self._engine.barrier(cards, b"experts end", lambda error: _fulfil(met))
        await self._wait(met, "the end")
        let_go = asyncio.Event()
        self._engine.unregister(self._region, let_go.set)
        await let_go.wait()
        os.close(self._fd)

    async def dispatch(self, tokens: NDArray[np.generic], experts: Ints, weights: Floats) -> Dispatched:
        """Send `tokens` [n, row_bytes / itemsize] to their `experts` [n, chosen] and get those that want ours.

        Raises TransferError, before anything is sent, for rows that do not fit; and for peers that do not send theirs in time.
        """
        rows = (
            np.ascontiguousarray(tokens)
            .view(np.uint8)
            .reshape(len(tokens), tokens[0:1].nbytes or self.shape.row_bytes)
        )
        self._check(rows, experts)
        targets = [
            np.flatnonzero((experts // self.shape.local == r).any(axis=1)) for r in range(self.shape.ranks)
        ]
        for rank, chosen in enumerate(targets):
            if len(chosen) > self.shape.rows:
                raise TransferError(
                    f"rank {self.rank} has {len(chosen)} rows for rank {rank}, which keeps room for {self.shape.rows}: raise rows_max"
                )
        await self._settled()
        parity = self._step % 2
        self._step += 1
        coming = self._expect(ROWS, parity, len(self._peers))
        owing = sum(len(chosen) > 0 for rank, chosen in enumerate(targets) if rank != self.rank)
        self._tokens = len(rows)
        self._returns = tuple(chosen.astype(np.int32) for chosen in targets)
        self._back = self._expect(RESULTS, parity, owing)
        self._send(rows, experts, weights, targets, parity)
        await self._wait(coming, "rows")
        counts = [self._announced(rank, parity) for rank in range(self.shape.ranks)]
        return self._received(counts, parity)

    async def combine(self, results: Floats, counts: Sequence[int]) -> Floats:
        """Return `results` [rows, hidden], in the order of `Dispatched.rows`; the sums over all experts of our own tokens [n, hidden]."""
        layout, parity = self._layout, (self._step - 1) % 2
        parts: list[tuple[Descriptor, Pieces, int]] = []
        at = 0
        for rank, count in enumerate(counts):
            begin = layout.results(rank) + (0 if rank == self.rank else layout.half)
            part = self._bytes[begin : begin + count * layout.result_bytes]
            part.view(np.float32).reshape(count, self.shape.hidden)[:] = results[at : at + count]
            at += count
            if rank != self.rank and count:
                run = forms.single(begin, layout.results(self.rank), count * layout.result_bytes)
                parts.append((self._peers[rank], run, immediate(_slot(RESULTS, parity), WRITE)))
        self._scatter(parts)
        await self._wait(self._back, "results")
        out = np.zeros((self._tokens, self.shape.hidden), np.float32)
        for rank, chosen in enumerate(self._returns):
            begin = layout.results(rank)
            part = self._bytes[begin : begin + len(chosen) * layout.result_bytes].view(np.float32)
            # A token is there once at most: so this adds each once.
            out[chosen] += part.reshape(len(chosen), self.shape.hidden)
        return out

    # Sending

    def _check(self, rows: Rows, experts: Ints) -> None:
        shape = self.shape
        if len(rows) > shape.tokens_max or experts.shape != (len(rows), shape.chosen):
            raise TransferError(
                f"{len(rows)} tokens with experts {experts.shape} do not fit {shape.tokens_max} tokens with {shape.chosen} each"
            )
        if len(rows) and rows.shape[1] != shape.row_bytes:
            raise TransferError(f"rows of {rows.shape[1]} bytes were given, {shape.row_bytes} were agreed on")
        if len(rows) and not 0 <= int(experts.min()) <= int(experts.max()) < shape.experts:
            raise TransferError(f"an expert is none of 0 to {shape.experts - 1}")

    def _send(
        self, rows: Rows, experts: Ints, weights: Floats, targets: Sequence[NDArray[np.intp]], parity: int
    ) -> None:
        """Headers and rows of all peers, in one call; our own part is copied."""
        shape, layout = self.shape, self._layout
        self._bytes[layout.inputs : layout.inputs + rows.size] = rows.reshape(-1)
        parts: list[tuple[Descriptor, Pieces, int]] = []
        for rank, chosen in enumerate(targets):
            here = rank == self.rank
            begin = layout.header(rank, parity) + (0 if here else layout.half)
            used = self._write_header(begin, experts[chosen], weights[chosen], rank)
            if here:
                own = self._bytes[layout.rows(rank) : layout.rows(rank) + len(chosen) * shape.row_bytes]
                own.reshape(len(chosen), shape.row_bytes)[:] = rows[chosen]
                continue
            run = np.empty((1 + len(chosen), 3), np.int64)
            run[0] = begin, layout.header(self.rank, parity), used
            run[1:, 0] = layout.inputs + chosen * shape.row_bytes
            run[1:, 1] = layout.rows(self.rank) + np.arange(len(chosen)) * shape.row_bytes
            run[1:, 2] = shape.row_bytes
            parts.append((self._peers[rank], forms.merge(run), immediate(_slot(ROWS, parity), WRITE)))
        self._scatter(parts)

    def _write_header(self, begin: int, experts: Ints, weights: Floats, rank: int) -> int:
        """Bytes of it that are used."""
        used = 8 + experts.size * CHOICE.itemsize
        header = self._bytes[begin : begin + used]
        header[:8].view(np.int64)[0] = len(experts)
        choices = header[8:].view(CHOICE).reshape(experts.shape)
        choices["expert"] = np.where(experts // self.shape.local == rank, experts, -1)
        choices["weight"] = weights
        return used

    def _scatter(self, parts: list[tuple[Descriptor, Pieces, int]]) -> None:
        if not parts:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def ended(error: TransferError | None) -> None:
            self._error = self._error or error
            if not done.done():
                done.set_result(None)
            if error is not None:
                self._failing()

        self.bytes_sent += sum(forms.total(run) for _, run, _ in parts)
        self._engine.write_scatter(self._region, parts, ended, channel=CHANNEL)
        self._sent.append(done)

    async def _settled(self) -> None:
        """What the last step sent has gone: its memory is free."""
        sent, self._sent = self._sent, []
        for done in sent:
            await self._wait(done, "acknowledgements")

    # Receiving

    def _expect(self, kind: int, parity: int, writes: int) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if writes:
            self._counter.expect(_slot(kind, parity), writes * WRITE, partial(_fulfil, done))
        else:
            done.set_result(None)
        return done

    async def _wait(self, done: asyncio.Future[None], what: str) -> None:
        if self._error is not None:
            raise self._error
        if done.done():
            return
        self._awaited = done
        try:
            async with asyncio.timeout(self._timeout_s):
                await done
        except TimeoutError:
            raise TransferError(
                f"rank {self.rank} has waited {self._timeout_s:g} s for {what} of step {self._step} of its peers"
            ) from None
        if self._error is not None:
            raise self._error

    def _failing(self) -> None:
        """A write of ours has failed: whoever waits need not wait for what cannot come."""
        if self._awaited is not None:
            _fulfil(self._awaited)

    def _announced(self, rank: int, parity: int) -> int:
        begin = self._layout.header(rank, parity)
        count = int(self._bytes[begin : begin + 8].view(np.int64)[0])
        if not 0 <= count <= self.shape.rows:
            raise TransferError(f"rank {rank} announces {count} rows, {self.shape.rows} are the most")
        return count

    def _received(self, counts: Sequence[int], parity: int) -> Dispatched:
        shape, layout = self.shape, self._layout
        rows: list[Rows] = []
        choices: list[NDArray[np.void]] = []
        for rank, count in enumerate(counts):
            begin = layout.rows(rank)
            rows.append(self._bytes[begin : begin + count * shape.row_bytes].reshape(count, shape.row_bytes))
            begin = layout.header(rank, parity) + 8
            header = self._bytes[begin : begin + count * shape.chosen * CHOICE.itemsize]
            choices.append(header.view(CHOICE).reshape(count, shape.chosen))
        first = self.rank * shape.local
        return Dispatched(np.concatenate(rows), np.concatenate(choices), tuple(counts), first, shape.local)


def _fulfil(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _slot(kind: int, parity: int) -> int:
    return 2 * kind + parity

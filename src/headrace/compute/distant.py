"""The owner's part of attention over KV that lies on several instances (Infinite-LLM, arXiv 2401.02669, section 4).

In each layer the query rows of sequences that have partitions elsewhere go to the holders; while these work, the rows attend to what is
here; then all partial states of a row are merged by position. The bits are those of one pool (see `ops.partial`).
A holder that is gone, or does not answer in time, is asked no more in this step, and the sequences that need it are `lost`: what is
computed for them then is of no use to anybody, and the rows of others are not touched by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from headrace.compute.holding import Piece, Query, encode
from headrace.compute.ops import combine_partials, paged_attention, partial_attention
from headrace.compute.ops.partial import TAIL
from headrace.compute.plans import PARTITION
from headrace.ports import Answer, HolderLost, Partials
from headrace.types.ids import Address

ROWS_MAX = 256
"""Query rows that are asked about at once: an answer is a few hundred KiB a row and partition with the largest models."""

Tables = dict[Address, list[dict[int, list[int]]]]
"""By holder, per group: partition -> its block ids there."""


@dataclass(frozen=True, slots=True)
class Span:
    """Successive rows of a batch that are of one sequence, some of whose partitions are elsewhere."""

    row: int
    """Of the block tables."""
    first: int
    count: int
    """In the batch."""
    tables: Tables
    away: int
    """Leading partitions that are elsewhere: all of them stand before the rows."""

    def pieces(self, holder: Address, group: int, first: int) -> list[Piece]:
        """What to ask a holder, where this span's rows begin at `first` in the query."""
        held = self.tables[holder][group]
        pieces: list[Piece] = []
        for begin in [p for p in sorted(held) if p - 1 not in held]:
            end = begin
            blocks: list[int] = []
            while end in held:
                blocks += held[end]
                end += 1
            pieces.append(Piece(first, self.count, begin, end, np.array(blocks, dtype=np.int32).tobytes()))
        return pieces


@dataclass(slots=True)
class Distant:
    """Of one batch: its spans that have partitions elsewhere, and whom to ask."""

    spans: Sequence[Span]
    partials: Partials
    gone: dict[Address, None] = field(default_factory=dict[Address, None])
    lost: dict[int, None] = field(default_factory=dict[int, None])
    """Rows of the block tables whose sequences need somebody who did not answer."""
    bytes: int = 0
    """Sent and received."""

    def attend(
        self,
        q: Tensor,
        kv: Tensor,
        group: int,
        layer: int,
        tables: Tensor,
        rows: Tensor,
        positions: Tensor,
        *,
        scale: float,
        threads: int,
    ) -> Tensor:
        """As `ops.paged_attention` without a window, over keys here and elsewhere."""
        tokens, heads, dim = q.shape
        out = torch.empty(tokens, heads * dim, dtype=q.dtype)
        parts = self._parts()
        near = torch.ones(tokens, dtype=torch.bool)
        for number, part in enumerate(parts):
            index = torch.cat([torch.arange(s.first, s.first + s.count) for s in part])
            near[index] = False
            mine = q[index]
            asked = self._ask(part, mine, group, layer, scale)
            if number == len(parts) - 1 and bool(near.any()):
                # What is of no concern to holders is computed while they work.
                args = (q[near], kv, layer, tables, rows[near], positions[near])
                out[near] = paged_attention(*args, scale=scale, threads=threads)
            at = positions[index]
            counts = at // PARTITION + 1
            states = torch.empty(len(index), int(counts.max()), heads, dim + TAIL)
            away = torch.cat([torch.full((s.count,), s.away, dtype=torch.int32) for s in part])
            base = torch.zeros_like(away)
            partial_attention(
                mine,
                kv,
                layer,
                tables,
                rows[index],
                at,
                away,
                counts,
                base,
                states,
                scale=scale,
                threads=threads,
            )
            for holder, pieces, answer in asked:
                self._take(part, holder, pieces, answer, states)
            out[index] = combine_partials(states, counts, at, kv.shape[3], q.dtype, threads=threads)
        return out

    def _parts(self) -> list[list[Span]]:
        """The spans, cut and put together so that each part has at most ROWS_MAX rows."""
        parts: list[list[Span]] = []
        rows = ROWS_MAX
        for span in self.spans:
            for first in range(0, span.count, ROWS_MAX):
                count = min(ROWS_MAX, span.count - first)
                if rows + count > ROWS_MAX:
                    parts.append([])
                    rows = 0
                rows += count
                parts[-1].append(Span(span.row, span.first + first, count, span.tables, span.away))
        return parts

    def _ask(
        self, part: list[Span], q: Tensor, group: int, layer: int, scale: float
    ) -> list[tuple[Address, list[Piece], Answer | None]]:
        """Send each holder its queries; None where there is no use in it."""
        asked: list[tuple[Address, list[Piece], Answer | None]] = []
        for holder in sorted({holder for span in part for holder in span.tables}):
            pieces: list[Piece] = []
            first = 0
            for span in part:
                if holder in span.tables:
                    pieces += span.pieces(holder, group, first)
                first += span.count
            answer: Answer | None = None
            if holder not in self.gone:
                sent = encode(Query(group, layer, q.shape[1], scale, tuple(pieces)), q)
                self.bytes += sum(part.nbytes for part in sent)
                try:
                    answer = self.partials.ask(holder, sent)
                except HolderLost:
                    self.gone[holder] = None
            asked.append((holder, pieces, answer))
        return asked

    def _take(
        self, part: list[Span], holder: Address, pieces: list[Piece], answer: Answer | None, states: Tensor
    ) -> None:
        """Put a holder's states where they belong."""
        _, _, heads, floats = states.shape
        if answer is not None:
            try:
                came = answer.wait()
            except HolderLost:
                self.gone[holder] = None
            else:
                self.bytes += came.nbytes
                found, at = torch.frombuffer(came, dtype=torch.float32), 0
                for p in pieces:
                    size = p.count * (p.end - p.begin) * heads * floats
                    shaped = found[at : at + size].view(p.count, p.end - p.begin, heads, floats)
                    states[p.first : p.first + p.count, p.begin : p.end] = shaped
                    at += size
                return
        for p in pieces:
            states[p.first : p.first + p.count, p.begin : p.end] = 0
        self.lost.update({span.row: None for span in part if holder in span.tables})

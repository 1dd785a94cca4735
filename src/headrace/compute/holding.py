"""The holder's part of attention over KV that lies on several instances: partial states of what was lent.

A query names blocks of this pool and brings query rows; the answer is one state a row and partition (see `ops.partial`). Nothing is kept
between queries, so a holder's own steps, on another thread, go on meanwhile.
"""

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from headrace.compute.checkpoint import DTYPES
from headrace.compute.ops import partial_attention
from headrace.compute.ops.partial import TAIL
from headrace.compute.plans import PARTITION


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Successive query rows, each of which asks for the same partitions of its sequence."""

    first: int
    count: int
    begin: int
    end: int
    """Partitions begin .. end - 1; all of them stand before the rows."""
    blocks: bytes
    """int32: block ids of these partitions."""


class Query(msgspec.Struct, frozen=True, array_like=True):
    group: int
    layer: int
    """Inside the group."""
    heads: int
    scale: float
    pieces: tuple[Piece, ...]


HEADER_BYTES = 4
encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Query)


def encode(query: Query, q: Tensor) -> list[memoryview]:
    """`q`: [rows, heads, dim], contiguous. What is sent, in parts."""
    header = encoder.encode(query)
    rows = memoryview(q.view(torch.uint8).flatten().numpy().data)
    return [memoryview(len(header).to_bytes(HEADER_BYTES, "little") + header), rows]


def answer_bytes(query: Query, dim: int) -> int:
    return 4 * query.heads * (dim + TAIL) * sum(p.count * (p.end - p.begin) for p in query.pieces)


class Holding:
    """Answers queries about one pool. May be called on any thread."""

    def __init__(self, pool: Sequence[Tensor], dtype: str, threads: int) -> None:
        """`pool`: one tensor a group, as `pool.pool_tensors` makes them."""
        self._pool = pool
        self._dtype = DTYPES[dtype]
        self._threads = threads

    def answer(self, asked: memoryview) -> memoryview:
        """The states of all pieces, one after the other: f32 [rows of the piece, partitions, heads, dim + TAIL].

        Raises ValueError or msgspec.MsgspecError if the query cannot be answered.
        """
        size = HEADER_BYTES + int.from_bytes(asked[:HEADER_BYTES], "little")
        query = decoder.decode(asked[HEADER_BYTES:size])
        kv = self._pool[query.group]
        dim = kv.shape[5]
        row = query.heads * dim * self._dtype.itemsize
        if row < 1 or (len(asked) - size) % row:
            raise ValueError(f"{len(asked) - size} bytes are no whole rows of {query.heads} heads of {dim}")
        # A copy is aligned, and may be written to, as torch wants it.
        q = torch.frombuffer(bytearray(asked[size:]), dtype=self._dtype).view(-1, query.heads, dim)
        states = torch.empty(answer_bytes(query, dim) // 4, dtype=torch.float32)
        at = 0
        for piece in query.pieces:
            shape = (piece.count, piece.end - piece.begin, query.heads, dim + TAIL)
            out = states[at : at + shape[0] * shape[1] * shape[2] * shape[3]].view(shape)
            at += out.numel()
            self._attend(query, piece, q[piece.first : piece.first + piece.count], kv, out)
        return states.view(torch.uint8).numpy().data

    def _attend(self, query: Query, piece: Piece, q: Tensor, kv: Tensor, out: Tensor) -> None:
        each = PARTITION // kv.shape[4]
        table = torch.full((1, piece.end * each), -1, dtype=torch.int32)
        table[0, piece.begin * each :] = torch.frombuffer(bytearray(piece.blocks), dtype=torch.int32)
        count = piece.count
        partial_attention(
            q,
            kv,
            query.layer,
            table,
            torch.zeros(count, dtype=torch.int32),
            # Wherever they stand, they see these partitions whole; as neighbours they share the reading of them.
            torch.arange(piece.end * PARTITION, piece.end * PARTITION + count, dtype=torch.int32),
            torch.full((count,), piece.begin, dtype=torch.int32),
            torch.full((count,), piece.end, dtype=torch.int32),
            torch.full((count,), piece.begin, dtype=torch.int32),
            out,
            scale=query.scale,
            threads=self._threads,
        )

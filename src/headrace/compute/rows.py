"""The sequences that plans name, as matrices with one row each: token ids, and a block table for every KV group.

A step's batch is then a few array operations, whatever it mixes, and the block tables need no copy.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.compute.distant import Distant, Tables
from headrace.compute.distant import Span as DistantSpan
from headrace.compute.layers.batch import Batch, GroupKV
from headrace.compute.ops import Workspace
from headrace.compute.planning import LastPlans, StepPlans
from headrace.compute.plans import PARTITION
from headrace.ports import Partials
from headrace.types.ids import Address
from headrace.types.kv import KVSpec, TableRun

Span = tuple[int, int, int]
"""(row, first position, count): tokens to compute of one sequence."""


class Rows:
    """Token ids and block tables by row. A row is held from `acquire` to `release`."""

    def __init__(self, spec: KVSpec, length: int, rows: int = 64, shared_prefixes: bool = True):
        """`length`: longest sequence, tokens. `rows`: how many to make room for at first; more are added as needed.

        `shared_prefixes`: sequences of a step may attend together to what they share (see `StepPlans`).
        """
        self._spec = spec
        self._shared_prefixes = shared_prefixes
        self._workspace = Workspace()
        self._last: LastPlans = {}
        self._ids = np.zeros((0, length + 1), dtype=np.int32)
        self._tables = [np.zeros((0, spec.blocks_for(length)), dtype=np.int32) for _ in spec.groups]
        self._table_tensors: list[Tensor] = []
        self._free: list[int] = []
        self._away: dict[int, Tables] = {}
        """By row: what of a sequence is elsewhere."""
        self._grow(rows)

    def acquire(self, token_ids: Sequence[int], row: int | None = None) -> int:
        """A row that holds these ids and an empty table: the one asked for, which must be free, or any."""
        while not self._free or (row is not None and row >= len(self._ids)):
            self._grow(len(self._ids))
        if row is None:
            row = self._free.pop()
        else:
            self._free.remove(row)
        self._ids[row, : len(token_ids)] = token_ids
        for table in self._tables:
            table[row] = -1
        return row

    def release(self, row: int) -> None:
        self._away.pop(row, None)
        self._free.append(row)

    def put(self, row: int, position: int, token_id: int) -> None:
        """Set the id of one token."""
        self._ids[row, position] = token_id

    def extend(self, row: int, runs: Iterable[TableRun]) -> None:
        """Enter runs of blocks into the row's tables."""
        for run in runs:
            self._tables[run.group][row, run.at : run.at + run.count] = np.arange(
                run.first, run.first + run.count
            )

    def move_out(self, row: int, holder: Address, runs: Sequence[TableRun]) -> None:
        """These blocks are a peer's from now on: whole partitions. Raises ValueError if they are not."""
        each = PARTITION // self._spec.block_size
        away = self._away.setdefault(row, {}).setdefault(holder, [{} for _ in self._spec.groups])
        for group, (table, held) in enumerate(zip(self._tables, away, strict=True)):
            mine = sorted(run for run in runs if run.group == group)
            at = [run.at + i for run in mine for i in range(run.count)]
            there = [run.first + i for run in mine for i in range(run.count)]
            starts = at[::each]
            if at != [start + i for start in starts for i in range(each)] or any(s % each for s in starts):
                raise ValueError(f"what {holder} has is not of whole partitions of {PARTITION} tokens")
            table[row, at] = -1
            for i, start in enumerate(starts):
                held[start // each] = there[i * each : (i + 1) * each]

    def batch(
        self,
        spans: Sequence[Span],
        wanted: Sequence[bool],
        pool: Sequence[Tensor],
        threads: int,
        partials: Partials | None = None,
    ) -> Batch:
        """All tokens of `spans`, in order; `wanted`: of which spans the last token's logits are asked for.

        Raises ValueError if a table has no block for one of the tokens.
        """
        row, first, count = np.array(spans, dtype=np.int32).T
        ends = count.cumsum(dtype=np.int32)
        rows = row.repeat(count)
        positions = np.arange(ends[-1], dtype=np.int32) + (first - (ends - count)).repeat(count)
        logical, offsets = np.divmod(positions, np.int32(self._spec.block_size))
        blocks = [table[rows, logical] for table in self._tables]
        distant = self._distant(spans, ends.tolist(), partials) if self._away else None
        if any((b < 0).any() for b in blocks):
            raise ValueError("a plan computes a token for which its sequence has no block")
        return Batch(
            ids=torch.from_numpy(self._ids[rows, positions]),
            positions=torch.from_numpy(positions),
            rows=torch.from_numpy(rows),
            offsets=torch.from_numpy(offsets),
            wanted=torch.from_numpy(ends[np.asarray(wanted, dtype=np.bool_)] - 1),
            groups=tuple(
                GroupKV(kv, table, torch.from_numpy(b))
                for kv, table, b in zip(pool, self._table_tensors, blocks, strict=True)
            ),
            threads=threads,
            plans=StepPlans(self._workspace, self._last, threads, self._shared_prefixes),
            distant=distant,
        )

    def _distant(
        self, spans: Sequence[Span], ends: Sequence[int], partials: Partials | None
    ) -> Distant | None:
        """Which of the spans need what is elsewhere."""
        found: list[DistantSpan] = []
        for (row, first, count), end in zip(spans, ends, strict=True):
            tables = self._away.get(row)
            if tables is None:
                continue
            away = sorted(p for held in tables.values() for p in held[0])
            if away != list(range(len(away))) or first < len(away) * PARTITION:
                raise ValueError(f"partitions {away} are elsewhere, and token {first} is to be computed")
            found.append(DistantSpan(row, end - count, count, tables, len(away)))
        if found and partials is None:
            raise ValueError("a sequence has KV elsewhere, and there is no way to ask for it")
        return Distant(found, partials) if found and partials is not None else None

    def _grow(self, more: int) -> None:
        held = len(self._ids)
        self._ids = _taller(self._ids, more)
        self._tables = [_taller(table, more) for table in self._tables]
        self._table_tensors = [torch.from_numpy(table) for table in self._tables]
        self._free.extend(range(held + more - 1, held - 1, -1))


def _taller(matrix: NDArray[np.int32], more: int) -> NDArray[np.int32]:
    # Zero pages that are never written take no memory, so rows may be as long as the longest sequence.
    taller = np.zeros((len(matrix) + more, matrix.shape[1]), dtype=np.int32)
    taller[: len(matrix)] = matrix
    return taller

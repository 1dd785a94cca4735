"""What a model keeps of the past, as groups of layers that share one block index space each."""

from enum import Enum
from math import gcd, lcm

import msgspec

from headrace.types.ids import PoolId


class GroupKind(Enum):
    FULL = "full"
    """Every token is kept."""
    WINDOW = "window"
    """Only the last `window` tokens are needed."""


class Layout(Enum):
    """Order of a group's memory. Either way a block is one piece that holds all its layers."""

    HEAD_MAJOR = "head-major"
    """`[block, layer in group, plane, head, token, dim]`: each head's keys lie together."""
    TOKEN_MAJOR = "token-major"
    """`[block, token, layer in group, plane, head, dim]`: blocks put one after the other are one longer block."""


class KVGroup(msgspec.Struct, frozen=True):
    """Layers whose KV has one shape."""

    kind: GroupKind
    layers: tuple[int, ...]
    """Indices of the model's layers, ascending; position in this tuple is the layer's index in the group."""
    kv_heads: int
    head_dim: int
    planes: int = 2
    """K and V."""
    window: int = 0
    """Tokens attended, the current one included; 0 for FULL."""


class KVSpec(msgspec.Struct, frozen=True):
    """All groups of a model, its element type and the block size (tokens)."""

    groups: tuple[KVGroup, ...]
    block_size: int
    dtype: str
    """"float32" | "bfloat16" | "float16"."""
    layout: Layout = Layout.HEAD_MAJOR

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def block_bytes(self, group: int) -> int:
        """Bytes of one block of `group`: all its layers and planes."""
        g = self.groups[group]
        return len(g.layers) * g.planes * g.kv_heads * self.block_size * g.head_dim * self.dtype_bytes

    def block_size_step(self, page_bytes: int) -> int:
        """Blocks of so many tokens, or of a multiple, are whole pages in every group. It is a multiple of 16, as block sizes are."""
        tokens = [self.block_bytes(g) // self.block_size for g in range(len(self.groups))]
        return lcm(16, *(page_bytes // gcd(page_bytes, nbytes) for nbytes in tokens))

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens, the last one perhaps partly filled."""
        return -(-tokens // self.block_size)


class BlockRun(msgspec.Struct, frozen=True, array_like=True, order=True):
    """`count` consecutive blocks of one group of one pool, from block id `first`."""

    pool: PoolId
    group: int
    first: int
    count: int


class TableRun(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A piece of a sequence's block table: its logical blocks `at .. at+count-1` lie in block ids `first .. first+count-1`."""

    group: int
    at: int
    first: int
    count: int


def table_runs(group: int, at: int, blocks: list[int]) -> list[TableRun]:
    """The fewest runs that say: logical block `at + i` lies in `blocks[i]`. Entries of -1 (absent) are skipped."""
    runs: list[TableRun] = []
    start, size = 0, len(blocks)
    if (
        size
        and 0 <= blocks[0] == blocks[-1] - size + 1
        and blocks == list(range(blocks[0], blocks[0] + size))
    ):
        return [TableRun(group, at, blocks[0], size)]
    for i in range(1, len(blocks) + 1):
        if i < len(blocks) and blocks[i] == blocks[i - 1] + 1 and blocks[i - 1] >= 0:
            continue
        if blocks[start] >= 0:
            runs.append(TableRun(group, at + start, blocks[start], i - start))
        start = i
    return runs


def id_runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Sorted block ids merged to (first, count) runs."""
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs

from mmap import PAGESIZE

import msgspec
import pytest

from headrace.cli.wiring import check_ranges
from headrace.types.errors import ConfigError
from headrace.types.kv import GroupKind, KVGroup, KVSpec, Layout

SMALL = KVSpec((KVGroup(GroupKind.FULL, (0,), kv_heads=1, head_dim=16),), 32, "bfloat16", Layout.TOKEN_MAJOR)


def test_virtual_ranges_take_blocks_of_whole_pages() -> None:
    size = 2 * SMALL.block_size_step(PAGESIZE)
    check_ranges(msgspec.structs.replace(SMALL, block_size=size))
    with pytest.raises(ConfigError, match=f"32 tokens takes 2048 bytes: give --block-size {size // 2}"):
        check_ranges(SMALL)
    check_ranges(msgspec.structs.replace(SMALL, layout=Layout.HEAD_MAJOR))

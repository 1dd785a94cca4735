from mmap import PAGESIZE
from typing import Any

import msgspec
import pytest

from headrace.cli.options import ServeOptions
from headrace.cli.wiring import check_ranges, check_together
from headrace.types.errors import ConfigError
from headrace.types.kv import GroupKind, KVGroup, KVSpec, Layout

SMALL = KVSpec((KVGroup(GroupKind.FULL, (0,), kv_heads=1, head_dim=16),), 32, "bfloat16", Layout.TOKEN_MAJOR)


def test_virtual_ranges_take_blocks_of_whole_pages() -> None:
    size = 2 * SMALL.block_size_step(PAGESIZE)
    check_ranges(msgspec.structs.replace(SMALL, block_size=size))
    with pytest.raises(ConfigError, match=f"32 tokens takes 2048 bytes: give --block-size {size // 2}"):
        check_ranges(SMALL)
    check_ranges(msgspec.structs.replace(SMALL, layout=Layout.HEAD_MAJOR))


@pytest.mark.parametrize(
    ("settings", "push_key", "named"),
    [
        ({"lend_kv": 0.5, "host_cache": "1GiB"}, "", "--lend-kv"),
        ({"lend_kv": 0.5, "preemption": "swap"}, "", "--preemption swap"),
        ({"lend_kv": 0.5}, "key", "--push-key"),
    ],
)
def test_what_is_not_served_together_is_refused(settings: dict[str, Any], push_key: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_together(ServeOptions(separate_pools=True, **settings), push_key)
    check_together(ServeOptions(separate_pools=True), push_key)

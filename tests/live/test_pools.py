"""Pool memory: layout, seals, sharing between processes, filling; and how much memory there is."""

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.live.memory import available_bytes
from headrace.live.pools import ALIGNMENT, Pool, check_memory, layout_for, layout_of
from headrace.types.errors import ConfigError
from tests.live.fake import SPEC


def test_groups_are_aligned_and_do_not_overlap() -> None:
    layout = layout_for(SPEC, 1_000_000)
    ends = [o + s * b for o, s, b in zip(layout.offsets, layout.sizes, layout.blocks, strict=True)]
    assert layout.offsets[0] == 0
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    assert ends[0] <= layout.offsets[1]
    assert ends[1] <= layout.total <= 1_000_000 + ALIGNMENT
    assert layout.sizes == tuple(SPEC.block_bytes(g) for g in range(2))


def test_no_block_fits() -> None:
    with pytest.raises(ConfigError, match="--kv-memory"):
        layout_for(SPEC, ALIGNMENT)


def test_more_than_there_is() -> None:
    with pytest.raises(ConfigError, match="--kv-memory asks for 2 pools"):
        check_memory(available_bytes(), 2)


def test_a_pool_keeps_its_size_and_what_is_written_while_it_is_filled() -> None:
    pool = Pool.create("test", layout_of(SPEC, (40_000, 40_000)))
    with pytest.raises(PermissionError) as refused:
        os.ftruncate(pool.fd, 0)
    assert refused.value.errno == errno.EPERM
    first, second = pool.buffers()
    first[:4], second[-4:] = b"head", b"tail"
    pool.fill()
    assert pool.filled(10)
    assert (bytes(first[:4]), bytes(second[-4:])) == (b"head", b"tail")
    assert os.fstat(pool.fd).st_blocks * 512 >= pool.layout.total
    del first, second
    pool.close()
    pool.close()


def test_a_child_maps_an_inherited_pool() -> None:
    pool = Pool.create("test", layout_of(SPEC, (10, 10)))
    code = f"import mmap; m = mmap.mmap({pool.fd}, {pool.layout.total}); m[:5] = b'child'"
    subprocess.run([sys.executable, "-c", code], pass_fds=[pool.fd], check=True)
    assert bytes(pool.buffers()[0][:5]) == b"child"
    # Nothing else inherits it.
    code = f"import os; os.fstat({pool.fd})"
    lost = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, close_fds=False, check=False)
    assert b"Bad file descriptor" in lost.stderr
    pool.close()


def test_a_view_in_use_outlives_the_pool() -> None:
    pool = Pool.create("test", layout_of(SPEC, (10, 10)))
    view = pool.buffers()[0]
    pool.close()
    view[:2] = b"ok"
    assert bytes(view[:2]) == b"ok"


def test_memory_is_what_the_tightest_control_group_leaves(tmp_path: Path) -> None:
    def say(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    say("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_bytes(tmp_path) == 8000 * 1024
    say("proc/self/cgroup", "0::/outer/inner\n")
    assert available_bytes(tmp_path) == 8000 * 1024
    for group, limit, used in (("outer", "5000000", "2000000"), ("outer/inner", "max", "1")):
        say(f"sys/fs/cgroup/{group}/memory.max", limit)
        say(f"sys/fs/cgroup/{group}/memory.current", used)
        say(f"sys/fs/cgroup/{group}/memory.stat", "anon 5\ninactive_file 1000\n")
    assert available_bytes(tmp_path) == 3_001_000
    say("proc/self/cgroup", "7:cpu,memory:/job\n")
    say("sys/fs/cgroup/memory/memory.limit_in_bytes", "4000000")
    say("sys/fs/cgroup/memory/memory.usage_in_bytes", "3999000")
    say("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 24\n")
    assert available_bytes(tmp_path) == 1024


def test_pages_are_the_alignment() -> None:
    assert ALIGNMENT % mmap.PAGESIZE == 0

"""Tiers for cached blocks: what was put comes back to the bit, or not at all."""

import errno
import os
from pathlib import Path

import pytest

from headrace.kv.frames import HEADER_BYTES
from headrace.live.stores.disk import DiskStore
from headrace.live.stores.memory import MemoryStore
from headrace.types.errors import ConfigError
from headrace.types.ids import BlockHash

SIZE = 4096
TERMS = bytes(range(16))


def name(n: int) -> BlockHash:
    return BlockHash(bytes([n]) * 16)


def block(n: int) -> memoryview:
    return memoryview(bytearray((n * 31 + i) % 251 for i in range(SIZE)))


def empty() -> memoryview:
    return memoryview(bytearray(SIZE))


@pytest.fixture
def disk(tmp_path: Path):
    store = DiskStore(tmp_path, TERMS, "pool0", SIZE)
    yield store
    store.close()


def reopened(store: DiskStore, folder: Path, terms: bytes = TERMS) -> DiskStore:
    store.close()
    store.__init__(folder, terms, "pool0", SIZE)
    return store


def file_of(store: DiskStore, n: int) -> Path:
    return store.folder / name(n).hex()[:2] / f"{name(n).hex()}.kv"


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_was_put_comes_back(kind: str, tmp_path: Path):
    store = MemoryStore(4, SIZE) if kind == "memory" else DiskStore(tmp_path, TERMS, "pool0", SIZE)
    for n in range(3):
        store.put(name(n), block(n))
    store.put(name(1), block(7))
    target = empty()
    assert store.get(name(2), target) and target == block(2)
    assert store.get(name(1), target) and target == block(7), "the later one holds"
    assert not store.get(name(9), target)
    store.delete(name(2))
    store.delete(name(2))
    assert not store.get(name(2), target)
    store.close()


def test_slots_are_used_again_and_no_more_than_there_are():
    store = MemoryStore(2, SIZE)
    store.put(name(1), block(1))
    store.put(name(2), block(2))
    with pytest.raises(MemoryError):
        store.put(name(3), block(3))
    store.delete(name(1))
    store.put(name(3), block(3))
    view = store.view(name(3))
    assert view is not None and view == block(3) and len(store) == 2 and store.view(name(1)) is None
    view.release()
    store.close()


def test_a_new_life_finds_what_the_last_one_left_longest_unused_first(disk: DiskStore, tmp_path: Path):
    for n in range(4):
        disk.put(name(n), block(n))
        os.utime(file_of(disk, n), ns=(n, n))
    disk.get(name(0), empty())
    disk.delete(name(2))
    again = reopened(disk, tmp_path)
    assert again.recover() == (name(1), name(3), name(0))
    target = empty()
    assert again.get(name(3), target) and target == block(3)


def test_what_is_written_after_a_push_is_for_this_life_alone(disk: DiskStore, tmp_path: Path):
    disk.put(name(1), block(1))
    disk.renew(b"of pushed weight")
    disk.put(name(2), block(2))
    target = empty()
    for n in (1, 2):
        assert disk.get(name(n), target) and target == block(n)
    path = file_of(disk, 2)
    again = reopened(disk, tmp_path)
    assert again.recover() == (name(1),) and not path.exists()
    assert (again.outdated, again.damaged, again.foreign) == (1, 0, 0)


def test_another_model_finds_nothing_and_destroys_nothing(disk: DiskStore, tmp_path: Path):
    disk.put(name(1), block(1))
    other = reopened(disk, tmp_path, b"x" * 16)
    assert other.recover() == () and not other.get(name(1), empty())
    assert reopened(other, tmp_path).recover() == (name(1),)


def test_a_second_service_is_kept_out(disk: DiskStore, tmp_path: Path):
    with pytest.raises(ConfigError, match="in use by another service"):
        DiskStore(tmp_path, TERMS, "pool0", SIZE)
    with pytest.raises(ConfigError, match="--disk-cache"):
        DiskStore(Path("/proc/none"), TERMS, "pool0", SIZE)


@pytest.mark.parametrize(
    "at", [0, 7, 8, 12, 30, 44, 50, 60, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + SIZE - 1]
)
def test_a_changed_byte_is_never_served(
    disk: DiskStore, tmp_path: Path, at: int, caplog: pytest.LogCaptureFixture
):
    disk.put(name(1), block(1))
    path = file_of(disk, 1)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    assert not disk.get(name(1), empty()) and "not served" in caplog.text
    if at >= 12:
        assert not path.exists() and disk.damaged == 1
    path.write_bytes(raw)
    again = reopened(disk, tmp_path)
    found = again.recover()
    assert not found or (at >= HEADER_BYTES and not again.get(name(1), empty()))


@pytest.mark.parametrize(
    "size", [0, 5, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + SIZE - 1, HEADER_BYTES + SIZE + 1]
)
def test_a_torn_file_is_never_served(disk: DiskStore, tmp_path: Path, size: int):
    disk.put(name(1), block(1))
    path = file_of(disk, 1)
    raw = (path.read_bytes() + b"more")[:size]
    path.write_bytes(raw)
    assert not disk.get(name(1), empty())
    path.write_bytes(raw)
    assert reopened(disk, tmp_path).recover() == ()


def test_a_file_under_another_ones_name_is_not_served(disk: DiskStore, tmp_path: Path):
    disk.put(name(1), block(1))
    moved = file_of(disk, 2)
    moved.parent.mkdir()
    file_of(disk, 1).rename(moved)
    assert not disk.get(name(2), empty()) and disk.damaged == 1
    assert reopened(disk, tmp_path).recover() == ()


def test_what_was_never_finished_is_deleted_and_what_is_not_ours_is_left(disk: DiskStore, tmp_path: Path):
    disk.put(name(1), block(1))
    unfinished = file_of(disk, 1).with_suffix(".tmp")
    unfinished.write_bytes(b"half of it")
    strangers = [file_of(disk, 1).parent / "notes.txt", file_of(disk, 1).parent / f"{'z' * 32}.kv"]
    strangers.append(file_of(disk, 3))
    strangers[2].parent.mkdir()
    for path in strangers:
        path.write_bytes(b"something else altogether")
    again = reopened(disk, tmp_path)
    assert again.recover() == (name(1),) and again.foreign == 3 and again.damaged == 0
    assert not unfinished.exists() and all(path.exists() for path in strangers)


def test_a_full_disk_leaves_nothing_behind(disk: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk.put(name(1), block(1))

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        disk.put(name(2), block(2))
    with pytest.raises(OSError, match="No space"):
        disk.put(name(1), block(5))
    monkeypatch.undo()
    target = empty()
    assert disk.get(name(1), target) and target == block(1)
    assert reopened(disk, tmp_path).recover() == (name(1),)
    assert not list(disk.folder.rglob("*.tmp"))

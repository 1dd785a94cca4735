import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest
import torch

from headrace.compute.memory.pages import Pages, Unmappable
from headrace.compute.memory.pages.memfd import MemfdPages, mappings_allowed

PAGE = mmap.PAGESIZE


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("test")
    os.ftruncate(made, 8 * PAGE)
    yield made
    os.close(made)


@pytest.fixture
def pages(fd: int) -> Iterator[MemfdPages]:
    made: Pages = MemfdPages(fd)
    assert isinstance(made, MemfdPages)
    yield made
    made.close()


def resident_kib() -> int:
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def test_a_piece_is_seen_where_it_is_mapped_and_twice_if_mapped_twice(fd: int, pages: MemfdPages):
    address = pages.reserve(6 * PAGE)
    pages.show(address, 3 * PAGE, 2 * PAGE)
    pages.show(address + 4 * PAGE, 3 * PAGE, 2 * PAGE)
    view = pages.bytes_at(address, 6 * PAGE)
    view[PAGE : PAGE + 3] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert view[5 * PAGE : 5 * PAGE + 4].tolist() == [1, 2, 3, 0]
    assert os.pread(fd, 4, 4 * PAGE) == bytes([1, 2, 3, 0])
    pages.show(address, 0, PAGE)
    assert view[:4].tolist() == [0] * 4 and view[PAGE].item() == 1, (
        "only the piece that was mapped over has gone"
    )


def test_what_is_hidden_stays_reserved_and_keeps_its_bytes(fd: int, pages: MemfdPages):
    address = pages.reserve(4 * PAGE)
    pages.show(address, 0, 2 * PAGE)
    ctypes.memset(address, 9, 2 * PAGE)
    pages.hide(address, PAGE)
    assert f"{address:x}-{address + PAGE:x} ---p" in open_maps()
    assert os.pread(fd, 1, 0) == b"\t"
    pages.show(address, PAGE, PAGE)
    assert pages.bytes_at(address, 1).tolist() == [9]


def test_reserved_ranges_take_no_memory(pages: MemfdPages):
    before = resident_kib()
    address = pages.reserve(2**40)
    pages.show(address + 2**39, 0, PAGE)
    assert pages.bytes_at(address, 2**40)[2**39].item() == 0
    assert resident_kib() - before < 4096
    assert pages.resident_bytes() == PAGE, "mapping faults it in"


def test_closing_gives_the_addresses_back(fd: int):
    pages = MemfdPages(fd, populate=False)
    address = pages.reserve(2**30)
    pages.show(address, 0, PAGE)
    assert pages.resident_bytes() == 0
    assert f"{address:x}-" in open_maps()
    pages.close()
    assert f"{address:x}-" not in open_maps()


def test_what_the_system_refuses_is_said(fd: int, pages: MemfdPages):
    with pytest.raises(Unmappable, match="maps no more"):
        pages.reserve(2**60)
    address = pages.reserve(PAGE)
    with pytest.raises(OSError, match="cannot map"):
        pages.show(address, 1, PAGE)
    assert 1 < pages.pieces_max < mappings_allowed()


def open_maps() -> str:
    with open("/proc/self/maps") as maps:
        return maps.read()

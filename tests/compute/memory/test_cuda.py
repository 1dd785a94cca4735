"""Against a stand-in for the driver, as strict as its documentation: these tests say nothing of a real GPU."""

from typing import Any

import pytest

from headrace.compute.memory.pages import Pages, Unmappable
from headrace.compute.memory.pages.cuda import OUT_OF_MEMORY, SIGNATURES, CudaPages, open_driver
from headrace.compute.memory.ranges import Ranges
from headrace.types.kv import GroupKind, KVGroup, KVSpec, Layout, table_runs
from tests.compute.harness import key

PAGE = 2 * 2**20
INVALID = 1


class FakeDriver:
    """Handles and addresses, and what is mapped where. Whatever the documentation forbids is an error."""

    def __init__(self, handles: int = 100) -> None:
        self.handles: dict[int, int] = {}
        self.left = handles
        self.ranges: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.accessible: dict[int, None] = {}
        self.entered = False
        self.next = 1

    def cuInit(self, flags: int) -> int:
        return INVALID if flags else 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = 40 + ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        assert device.value == 40
        context._obj.value = 77
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.entered = context.value == 77
        return 0

    def cuMemGetAllocationGranularity(self, size: Any, properties: Any, option: int) -> int:
        assert (properties._obj.type, properties._obj.location.type, option) == (1, 1, 0)
        size._obj.value = PAGE
        return 0

    def cuMemCreate(self, handle: Any, size: int, properties: Any, flags: int) -> int:
        assert self.entered and not size % PAGE and flags == 0
        if not self.left:
            return OUT_OF_MEMORY
        self.left -= 1
        self.next += 1
        handle._obj.value = self.next
        self.handles[self.next] = size
        return 0

    def cuMemRelease(self, handle: int) -> int:
        return 0 if self.handles.pop(handle, None) else INVALID

    def cuMemAddressReserve(self, address: Any, size: int, alignment: int, wish: int, flags: int) -> int:
        assert not size % PAGE and alignment == PAGE and wish == flags == 0
        address._obj.value = 2**40 + PAGE * 1000 * len(self.ranges)
        self.ranges[address._obj.value] = size
        return 0

    def cuMemAddressFree(self, address: int, size: int) -> int:
        held = [at for at in self.mapped if address <= at < address + size]
        return INVALID if held or self.ranges.pop(address, None) != size else 0

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> int:
        reserved = any(first <= address and address + size <= first + n for first, n in self.ranges.items())
        if address in self.mapped or not reserved or offset or flags or self.handles.get(handle) != size:
            return INVALID
        self.mapped[address] = handle
        return 0

    def cuMemUnmap(self, address: int, size: int) -> int:
        assert size == PAGE
        self.accessible.pop(address, None)
        return 0 if self.mapped.pop(address, None) else INVALID

    def cuMemSetAccess(self, address: int, size: int, access: Any, count: int) -> int:
        assert (access._obj.location.type, access._obj.flags, count) == (1, 3, 1)
        for at in range(address, address + size, PAGE):
            if at not in self.mapped:
                return INVALID
            self.accessible[at] = None
        return 0

    def seen(self, address: int, count: int) -> list[int | None]:
        """Number of the handle, from 0 on, that each page shows."""
        numbers = {handle: i for i, handle in enumerate(sorted(self.handles))}
        assert sorted(self.mapped) == sorted(self.accessible)
        return [numbers.get(self.mapped.get(address + i * PAGE, -1)) for i in range(count)]


def test_the_stand_in_knows_every_call_that_is_made():
    assert all(hasattr(FakeDriver, name) for name in SIGNATURES)


def test_pages_are_shown_replaced_shared_and_hidden():
    driver = FakeDriver()
    pages: Pages = CudaPages(5 * PAGE - 3, driver=driver)
    assert (len(driver.handles), pages.page_bytes, pages.resident_bytes()) == (5, PAGE, 5 * PAGE)
    address = pages.reserve(6 * PAGE)
    pages.show(address, PAGE, 3 * PAGE)
    pages.show(address + 4 * PAGE, PAGE, PAGE)
    assert driver.seen(address, 6) == [1, 2, 3, None, 1, None]
    pages.show(address + PAGE, 0, 3 * PAGE)
    assert driver.seen(address, 6) == [1, 0, 1, 2, 1, None]
    pages.hide(address, 6 * PAGE)
    assert driver.seen(address, 6) == [None] * 6
    pages.close()
    assert not driver.handles and not driver.ranges


def test_ranges_work_on_it():
    driver = FakeDriver()
    group = KVGroup(GroupKind.FULL, tuple(range(32)), kv_heads=8, head_dim=128)
    spec = KVSpec((group,), 16, "bfloat16", Layout.TOKEN_MAJOR)
    assert spec.block_bytes(0) == PAGE
    ranges = Ranges.reserve(CudaPages(8 * PAGE, driver=driver), spec, (0,), 16 * 4, 2)
    for number, table in {1: [5, 2], 2: [5, 3, 4]}.items():
        ranges.claim(key(number), table_runs(0, 0, table))
        ranges.fill(key(number), 0, 4)
        place = ranges.groups[0].place(ranges.held[key(number)].range, 0)
        assert driver.seen(place, len(table)) == table
    ranges.release(key(1))
    ranges.claim(key(3), table_runs(0, 0, [5, 6]))
    ranges.fill(key(3), 0, 4)
    assert driver.seen(ranges.groups[0].place(ranges.held[key(3)].range, 0), 4) == [5, 6, None, None]
    assert ranges.tally.in_place == 1


def test_what_the_driver_refuses_is_said():
    driver = FakeDriver(handles=3)
    with pytest.raises(Unmappable, match="cuMemCreate: device 0 has no memory"):
        CudaPages(4 * PAGE, driver=driver)
    assert not driver.handles, "what was taken is given back"
    pages = CudaPages(0, driver=FakeDriver())
    with pytest.raises(IndexError):
        pages.show(pages.reserve(PAGE), 0, PAGE)
    broken = FakeDriver()
    broken.cuInit = lambda flags: 999  # type: ignore[method-assign]
    with pytest.raises(OSError, match="cuInit failed on device 0: CUDA error 999"):
        CudaPages(PAGE, driver=broken)


def test_a_driver_that_is_there_has_all_calls():
    try:
        driver = open_driver()
    except OSError:
        pytest.skip("no libcuda on this machine")
    assert all(hasattr(driver, name) for name in SIGNATURES)

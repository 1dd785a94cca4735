"""Carries out what pool cores want of the tiers below their memory (`nodes.tiering`), on threads of the process that maps every pool.

Each pool of this host has a thread for host memory and, with a disk, one for that: each does one thing after the other, in the order in
which it was asked, and copies without the interpreter's lock. The pool of a worker of another host has no tiers.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import assert_never

from headrace.live.memory import available_bytes
from headrace.live.pools import Pool
from headrace.live.settings import GIB
from headrace.live.stores.disk import DiskStore
from headrace.live.stores.memory import MemoryStore
from headrace.nodes.limits import TierConfig
from headrace.ports import Store
from headrace.types.errors import ConfigError
from headrace.types.events import Event
from headrace.types.hashing import root_of_version
from headrace.types.ids import Address, BlockHash
from headrace.types.kv import GroupKind, KVSpec
from headrace.types.tiers import (
    Drop,
    FlushAsked,
    Flushed,
    Load,
    Loaded,
    Recovered,
    Save,
    Saved,
    Spill,
    Spilled,
    Tier,
    TierCommand,
)

log = logging.getLogger(__name__)

FLUSH_S = 60.0
"""At the end, what is cached may take so long to be put on disk."""

Post = Callable[[Address, Event], None]
Job = Callable[[], Event | None]


def check_tiers(spec: KVSpec) -> None:
    """Raises ConfigError for a model whose blocks tiers do not keep."""
    kinds = [group.kind for group in spec.groups]
    if kinds != [GroupKind.FULL]:
        said = ", ".join(kind.value for kind in kinds)
        raise ConfigError(
            f"--host-cache and --disk-cache keep models with one group of full-attention layers; this one has the groups: {said}"
        )


class Tiers:
    """The tiers of all pools. Its methods are called on the loop's thread."""

    def __init__(
        self,
        config: TierConfig,
        spec: KVSpec,
        post: Post,
        failed: Callable[[Exception], None],
        folder: Path | None,
    ) -> None:
        """`failed`: told of what must not happen. `folder`: of the disk tier, if there is one. Raises ConfigError."""
        check_tiers(spec)
        self._config = config
        self._block_bytes = spec.block_bytes(0)
        self._post = post
        self._failed = failed
        self._folder = folder
        self._below: dict[Address, Below] = {}
        self._terms = BlockHash(b"")
        self._opened = self._renewed = False

    def make(self, pools: Mapping[Address, Pool]) -> None:
        """Host memory for each pool. Raises ConfigError if it is not there."""
        need, have = len(pools) * self._config.host_blocks * self._block_bytes, available_bytes()
        if need > have:
            raise ConfigError(
                f"--host-cache asks for {need / GIB:.2f} GiB, but {have / GIB:.2f} GiB are available"
            )
        for address, pool in pools.items():
            memory = MemoryStore(self._config.host_blocks, self._block_bytes)
            blocks = pool.buffers()[0]
            self._below[address] = Below(address, blocks, self._block_bytes, memory, self._post, self._failed)

    def open(self, terms: bytes) -> None:
        """All workers are there, and agree: what an earlier life has left on disk can be served. Raises ConfigError."""
        if self._folder is None:
            return
        self._terms = BlockHash(terms)
        for address, below in self._below.items():
            disk = DiskStore(self._folder, terms, address.name, self._block_bytes)
            below.open_disk(disk)
            self._post(address, Recovered(disk.recover()))
        self._opened = True

    def carry(self, address: Address, command: TierCommand) -> None:
        self._below[address].carry(command)

    def renew(self, version: int) -> None:
        """The service has other weights from now on. What lies below under the roots of older ones serves whoever goes on with them; what
        goes to disk from now on is for this life alone."""
        self._renewed = True
        for below in self._below.values():
            below.renew(root_of_version(self._terms, version))

    def counters(self) -> dict[str, int]:
        """Of what was found on disk."""
        disks = [below.disk for below in self._below.values() if below.disk is not None]
        if not disks:
            return {}
        return {
            "tier_files_damaged": sum(disk.damaged for disk in disks),
            "tier_files_foreign": sum(disk.foreign for disk in disks),
            "tier_files_outdated": sum(disk.outdated for disk in disks),
        }

    async def stop(self) -> None:
        """Put what is cached on disk, if a later life can use it, and end all threads. The workers have ended."""
        if self._opened and not self._renewed:
            for address in self._below:
                self._post(address, FlushAsked())
            waits = [below.flushed.wait() for below in self._below.values()]
            try:
                await asyncio.wait_for(asyncio.gather(*waits), FLUSH_S)
            except TimeoutError:
                log.warning("not all that is cached could be put on disk in %.0f s", FLUSH_S)
        for below in self._below.values():
            await asyncio.to_thread(below.close)
        self._below.clear()


class Below:
    """The tiers of one pool."""

    def __init__(
        self,
        address: Address,
        blocks: memoryview,
        block_bytes: int,
        memory: MemoryStore,
        post: Post,
        failed: Callable[[Exception], None],
    ) -> None:
        self.disk: DiskStore | None = None
        self.flushed = asyncio.Event()
        self._address = address
        self._blocks = blocks
        self._block_bytes = block_bytes
        self._memory = memory
        self._post = post
        self._loop = asyncio.get_running_loop()
        self._failed = failed
        self._lanes = {Tier.HOST: Lane(f"{address.name}-host", self._done, self._broken)}

    def open_disk(self, disk: DiskStore) -> None:
        self.disk = disk
        self._lanes[Tier.DISK] = Lane(f"{self._address.name}-disk", self._done, self._broken)

    def renew(self, terms: BlockHash) -> None:
        """Behind what is on its way to disk: that was computed by older weights."""
        disk = self.disk
        if disk is not None:
            self._lanes[Tier.DISK].put(lambda: disk.renew(terms))

    def carry(self, command: TierCommand) -> None:
        match command:
            case Save():
                self._lanes[Tier.HOST].put(lambda: self._save(command))
            case Load(_, tier):
                self._lanes[tier].put(lambda: self._load(command))
            case Spill():
                self._lanes[Tier.DISK].put(lambda: self._spill(command))
            case Drop(tier):
                self._lanes[tier].put(lambda: self._drop(command))
            case Flushed():
                self.flushed.set()
            case _:
                assert_never(command)

    def close(self) -> None:
        """Ends the threads, each after what it was asked for so far."""
        for lane in self._lanes.values():
            lane.close()
        self._blocks.release()
        self._memory.close()
        if self.disk is not None:
            self.disk.close()

    # On the threads

    def _done(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._post, self._address, event)

    def _broken(self, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._failed, error)

    def _save(self, command: Save) -> Event:
        for piece in command.pieces:
            self._memory.put(piece.name, self._block(piece.block))
        return Saved(command.ticket, (True,) * len(command.pieces))

    def _load(self, command: Load) -> Event:
        store = self._store(command.tier)
        ok = tuple(store.get(piece.name, self._block(piece.block)) for piece in command.pieces)
        return Loaded(command.ticket, ok)

    def _spill(self, command: Spill) -> Event:
        ok: list[bool] = []
        store = self._store(Tier.DISK)
        for name in command.names:
            view = self._memory.view(name)
            good = view is not None and (not ok or ok[-1])
            if good and view is not None:
                try:
                    store.put(name, view)
                except OSError as error:
                    log.warning(
                        "the disk cache takes nothing more (%s); what it has is served", error.strerror
                    )
                    good = False
            ok.append(good)
        return Spilled(command.ticket, tuple(ok))

    def _drop(self, command: Drop) -> None:
        store = self._store(command.tier)
        for name in command.names:
            store.delete(name)

    def _store(self, tier: Tier) -> Store:
        if tier is Tier.HOST:
            return self._memory
        assert self.disk is not None, "the core was told of no disk"
        return self.disk

    def _block(self, block: int) -> memoryview:
        return self._blocks[block * self._block_bytes : (block + 1) * self._block_bytes]


class Lane:
    """A thread that does one job after the other, and says what came of it. One that raises ends it."""

    def __init__(self, name: str, done: Callable[[Event], None], broken: Callable[[Exception], None]) -> None:
        self._done = done
        self._broken = broken
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=f"headrace-{name}", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                event = job()
                if event is not None:
                    self._done(event)
        except Exception as error:
            self._broken(error)

"""NIXL over UCX: the way to RDMA network cards. Needs `pip install headrace[nixl]`.

Each end of a link is an agent of its own (`live.transfer.onesided`). A shard is one NIXL write of all its pieces, and its note is the
notification that NIXL gives the target after the last byte. UCX_TLS chooses the path, as UCX defines it. Where it is not set, paths by
which a source's own thread writes into another process's memory (cma, knem, xpmem) are left out: closing the target's agent is no fence
for them.
Leaves out: progress within a shard; CUDA memory; other backends of NIXL.
"""

import os
import struct
from collections import deque
from importlib import import_module
from itertools import count
from time import monotonic
from typing import Any

import msgspec
import numpy as np

from headrace.live.transfer.onesided import Driver
from headrace.live.transfer.regions import Region
from headrace.live.transports import Settings, Shard
from headrace.types.errors import ConfigError, TransferError

NOTE = struct.Struct("<Q")
CLOSE_S = 0.5
"""What a write under way has to end by itself when its link is closed."""
FENCED_PATHS = "^cma,knem,xpmem"


class Key(msgspec.Struct, frozen=True, array_like=True):
    """What a source needs of a region."""

    address: int
    metadata: bytes


class Transport(Driver):
    """Raises ConfigError if NIXL is not installed."""

    def __init__(self, settings: Settings) -> None:
        nixl = load()
        numbers = count()

        def make_rail() -> Rail:
            return Rail(nixl, f"{settings.address}#{next(numbers)}")

        super().__init__("nixl", settings, make_rail)


def load() -> Any:
    """The library. It reads its settings from the environment when the first agent is made. Raises ConfigError."""
    os.environ.setdefault("UCX_TLS", FENCED_PATHS)
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    try:
        return import_module("nixl")
    except ImportError as error:
        raise ConfigError(
            f"--transport nixl needs the NIXL library ({error}): pip install headrace[nixl]"
        ) from None


class Rail:
    """See `ends.Rail`."""

    def __init__(self, nixl: Any, name: str) -> None:
        self._nixl = nixl
        bound = vars(nixl._bindings)
        self._errors = tuple(
            e for name, e in bound.items() if name.startswith("nixl") and name.endswith("Error")
        )
        self._agent: Any = self._try(lambda: nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"])))
        self._peer = ""
        self._registered: dict[int, Any] = {}
        self._keys: dict[int, int] = {}
        """Of the peer's regions: where they begin."""
        self._flying: dict[Any, Shard] = {}
        self._left: deque[Shard] = deque()

    def address(self) -> bytes:
        agent = self._agent
        none = self._nixl._bindings.nixlRegDList(agent.nixl_mems["DRAM"])
        return self._try(lambda: agent.get_partial_agent_metadata(none, True, ["UCX"]))

    def connect(self, address: bytes) -> None:
        self._peer = self._try(lambda: self._agent.add_remote_agent(address))

    def grant(self, region: Region) -> bytes:
        descriptors = self._register(region)
        metadata = self._try(lambda: self._agent.get_partial_agent_metadata(descriptors, False, ["UCX"]))
        return msgspec.msgpack.encode(Key(region.address, metadata))

    def attach(self, region: int, key: bytes) -> None:
        try:
            known = msgspec.msgpack.decode(key, type=Key)
        except msgspec.MsgspecError as error:
            raise TransferError(f"the key of region {region} cannot be read: {error}") from None
        self._try(lambda: self._agent.add_remote_agent(known.metadata))
        self._keys[region] = known.address

    def write(self, shard: Shard) -> None:
        assert shard.source is not None and shard.target is not None
        note = NOTE.pack(shard.note)
        self._register(shard.source)
        local = self._descriptors(shard.source.address, shard.pieces[:, 0], shard.pieces[:, 2])
        remote = self._descriptors(self._keys[shard.target.region], shard.pieces[:, 1], shard.pieces[:, 2])
        agent = self._agent
        handle = self._try(lambda: agent.initialize_xfer("WRITE", local, remote, self._peer, note))
        self._flying[handle] = shard
        self._see(handle, self._try(lambda: agent.transfer(handle)))

    def poll(self) -> tuple[list[Shard], list[int]]:
        for handle in list(self._flying):
            self._see(handle, self._try(lambda handle=handle: self._agent.check_xfer_state(handle)))
        left, self._left = list(self._left), deque()
        came: dict[str, list[bytes]] = self._try(self._agent.get_new_notifs)
        return left, [NOTE.unpack(note)[0] for notes in came.values() for note in notes]

    def forget(self, region: Region) -> None:
        descriptors = self._registered.pop(region.number, None)
        if descriptors is not None:
            self._try(lambda: self._agent.deregister_memory(descriptors))

    def close(self) -> None:
        until_s = monotonic() + CLOSE_S
        try:
            while self._flying and monotonic() < until_s:
                self.poll()
        except TransferError:
            # What has failed moves nothing any more; the rest ends with the agent.
            pass
        self._flying.clear()
        try:
            for descriptors in self._registered.values():
                self._try(lambda d=descriptors: self._agent.deregister_memory(d))
        except TransferError:
            # So it is with the agent.
            pass
        # The agent goes before the memory that it knows: otherwise the library faults.
        self._registered.clear()
        self._agent = None

    def _register(self, region: Region) -> Any:
        if region.number not in self._registered:
            memory = [(region.address, region.nbytes, 0, "")]
            self._registered[region.number] = self._try(lambda: self._agent.register_memory(memory, "DRAM"))
        return self._registered[region.number]

    def _descriptors(self, origin: int, offsets: np.ndarray, sizes: np.ndarray) -> Any:
        rows = np.zeros((len(offsets), 3), np.uint64)
        rows[:, 0] = offsets + origin
        rows[:, 1] = sizes
        return self._agent.get_xfer_descs(rows, "DRAM")

    def _see(self, handle: Any, state: str) -> None:
        if state == "DONE":
            self._left.append(self._flying.pop(handle))
            self._try(handle.release)
        elif state != "PROC":
            raise TransferError(f"a write by NIXL ended in state {state}")

    def _try(self, call: Any) -> Any:
        try:
            return call()
        except self._errors as error:
            raise TransferError(f"NIXL: {error}") from error

"""libfabric: one-sided writes whose note arrives as remote completion data, on EFA, verbs, TCP or shared memory of one host.

Each end of a link is an endpoint of its own (`live.transfer.onesided`). Delivery is in no order: a shard's last piece, which bears its
note, leaves when all its others have arrived. HEADRACE_FABRIC_PROVIDER names the provider as `fi_info` does ("efa", "verbs;ofi_rxm",
"tcp;ofi_rxm", "shm"); without it libfabric's first choice is taken.
Needs libfabric 1.17 or later on the machine, and its headers where Headrace is built.
Leaves out: progress within a shard; device memory; several cards for one link.
"""

import os
from importlib import import_module
from itertools import count
from typing import Any

import msgspec

from headrace.live.transfer.onesided import Driver
from headrace.live.transfer.regions import Region
from headrace.live.transports import Settings, Shard
from headrace.types.errors import ConfigError, TransferError

INSTALL = "install libfabric (Debian, Ubuntu: apt install libfabric-dev), then build Headrace again"


class Key(msgspec.Struct, frozen=True, array_like=True):
    """What a source needs of a region."""

    address: int
    key: int


class Transport(Driver):
    """Raises ConfigError if libfabric or the extension is not there."""

    def __init__(self, settings: Settings) -> None:
        provider = os.environ.get("HEADRACE_FABRIC_PROVIDER", "")
        # Endpoints of shared memory have names of their own.
        host = "" if provider == "shm" else settings.hosts[0]
        library = load()
        try:
            library.Endpoint(provider, host).close()
        except RuntimeError as error:
            named = f" with provider {provider!r}" if provider else ""
            raise ConfigError(
                f"--transport fabric cannot start{named} on {host or 'this host'} ({error}): {INSTALL}"
            ) from None
        super().__init__("fabric", settings, lambda: Rail(library, provider, host))


def load() -> Any:
    """The extension. Raises ConfigError."""
    try:
        return import_module("headrace.live._fabric")
    except ImportError as error:
        raise ConfigError(f"--transport fabric was not built here ({error}): {INSTALL}") from None


class Rail:
    """See `ends.Rail`."""

    def __init__(self, library: Any, provider: str, host: str) -> None:
        try:
            self._endpoint = library.Endpoint(provider, host)
        except RuntimeError as error:
            raise TransferError(f"libfabric: {error}") from error
        self._numbers = count()
        self._enrolled: dict[int, Key] = {}
        self._keys: dict[int, Key] = {}
        """Of the peer's regions."""
        self._flying: dict[int, Shard] = {}

    def address(self) -> bytes:
        return self._try(self._endpoint.name)

    def connect(self, address: bytes) -> None:
        self._try(self._endpoint.connect, address)

    def grant(self, region: Region) -> bytes:
        return msgspec.msgpack.encode(self._enroll(region))

    def attach(self, region: int, key: bytes) -> None:
        try:
            self._keys[region] = msgspec.msgpack.decode(key, type=Key)
        except msgspec.MsgspecError as error:
            raise TransferError(f"the key of region {region} cannot be read: {error}") from None

    def write(self, shard: Shard) -> None:
        assert shard.source is not None and shard.target is not None
        self._enroll(shard.source)
        key = self._keys[shard.target.region]
        number, pieces = next(self._numbers), shard.pieces
        assert pieces.flags.c_contiguous
        self._flying[number] = shard
        self._try(
            self._endpoint.write,
            number,
            shard.source.number,
            pieces.ctypes.data,
            len(pieces),
            key.address,
            key.key,
            shard.note,
        )

    def poll(self) -> tuple[list[Shard], list[int]]:
        done, notes = self._try(self._endpoint.poll)
        return [self._flying.pop(number) for number in done], notes

    def forget(self, region: Region) -> None:
        if self._enrolled.pop(region.number, None) is not None:
            self._endpoint.dismiss(region.number)

    def close(self) -> None:
        self._endpoint.close()
        self._flying.clear()

    def _enroll(self, region: Region) -> Key:
        if region.number not in self._enrolled:
            key = self._try(self._endpoint.enroll, region.number, region.address, region.nbytes)
            self._enrolled[region.number] = Key(*key)
        return self._enrolled[region.number]

    def _try(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RuntimeError as error:
            raise TransferError(f"libfabric: {error}") from error

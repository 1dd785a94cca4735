"""Where the libraries of one-sided transports are, for services of real processes: installed, or among the benchmarks' peers."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from headrace.live.transports import Settings
from headrace.live.transports.fabric import Transport as Fabric
from headrace.types.errors import ConfigError
from headrace.types.ids import Address
from tests.live.serving import REPOSITORY

PEERS = REPOSITORY / ".peers/lib" / f"python3.{sys.version_info.minor}" / "site-packages"


def nixl_environment(folder: Path) -> dict[str, str]:
    """What a worker needs in its environment to import NIXL. Skips the test if it is nowhere."""
    paths = [str(REPOSITORY), str(REPOSITORY / "src")]
    if find_spec("nixl") is None:
        if not (PEERS / "nixl").exists():
            pytest.skip("NIXL is not installed: pip install headrace[nixl], or make bench-peers")
        # Only NIXL, as everything else is here.
        for part in PEERS.glob("nixl*"):
            (folder / part.name).symlink_to(part)
        paths.append(str(folder))
    return {"PYTHONPATH": ":".join(paths)}


def fabric_environment(provider: str) -> dict[str, str]:
    """The same for libfabric with this provider. Skips the test if it is not there."""
    with provider_named(provider):
        try:
            Fabric(Settings(Address("probe", 0))).close()
        except ConfigError as error:
            pytest.skip(str(error))
    paths = [str(REPOSITORY), str(REPOSITORY / "src")]
    return {"PYTHONPATH": ":".join(paths), "HEADRACE_FABRIC_PROVIDER": provider}


@contextmanager
def provider_named(provider: str) -> Iterator[None]:
    name = "HEADRACE_FABRIC_PROVIDER"
    before = os.environ.get(name)
    os.environ[name] = provider
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before

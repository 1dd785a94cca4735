"""The contract over transports whose library is not in this environment, or has several ways: in processes of their own."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from headrace.live.transfer import onesided
from headrace.live.transports import Settings, nixl
from headrace.types.errors import ConfigError
from headrace.types.ids import Address
from tests.live.onesided import fabric_environment, nixl_environment
from tests.live.serving import REPOSITORY


def contract(name: str, environment: dict[str, str]) -> None:
    """All of it but the tests that other transports have alone."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", f"[{name}]"]
    done = subprocess.run(
        [*command, "tests/live/transports/test_contract.py"],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-4000:]


@pytest.mark.parametrize("ways", ["tcp", ""], ids=["tcp", "shared memory"])
def test_the_contract_over_nixl(ways: str, tmp_path: Path) -> None:
    contract("nixl", nixl_environment(tmp_path) | ({"UCX_TLS": ways} if ways else {}))


@pytest.mark.parametrize("provider", ["tcp;ofi_rxm", "shm"])
def test_the_contract_over_libfabric(provider: str) -> None:
    contract("fabric", fabric_environment(provider))


@pytest.mark.parametrize("name", ["nixl", "fabric"])
def test_what_is_missing_is_said_with_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    monkeypatch.setitem(sys.modules, "headrace.live._fabric", None)
    module = import_module(f"headrace.live.transports.{name}")
    with pytest.raises(ConfigError, match={"nixl": r"headrace\[nixl\]", "fabric": "libfabric-dev"}[name]):
        module.Transport(Settings(Address("a", 1)))


def test_pacing_and_tls_are_refused() -> None:
    with pytest.raises(ConfigError, match="use tcp"):
        onesided.Driver("nixl", Settings(Address("a", 1), pace=1), lambda: nixl.Rail(None, ""))

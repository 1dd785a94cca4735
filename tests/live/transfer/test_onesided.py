"""The door of transports with one-sided writes."""

import socket
from time import monotonic
from typing import Any

import pytest

from headrace.live.transfer import onesided
from headrace.live.transfer.onesided import Driver
from headrace.live.transports import Settings
from headrace.types.ids import Address


def test_a_stranger_who_speaks_byte_by_byte_has_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onesided, "GREETING_S", 0.3)
    site: Any = None
    driver = Driver("test", Settings(Address("a", 0), "secret"), lambda: site)
    [address] = driver.listen(site)
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as sock:
        sock.settimeout(0.05)
        began = monotonic()
        hung_up = False
        # The length of a greeting that never ends, then a byte every 50 ms: more than a minute of them.
        said = (10_000).to_bytes(4, "little")
        while not hung_up and monotonic() - began < 60:
            try:
                sock.sendall(said)
                said = b"x"
                hung_up = not sock.recv(1024)
            except TimeoutError:
                continue
            except ConnectionError:
                hung_up = True
        assert hung_up
    driver.close()

"""What a worker hears, and from whom. Its life with a service is in `test_service` and `test_failover`."""

import asyncio
from types import SimpleNamespace

import pytest

from headrace.live import wire
from headrace.live.bus import HUB
from headrace.live.worker import Dismissal, Worker
from headrace.types.ids import Address


def test_only_the_hub_may_end_it(caplog: pytest.LogCaptureFixture) -> None:
    """The hub passes on between workers what it does not read."""

    class Hearing(Worker):
        def __init__(self) -> None:
            self.ended = asyncio.get_running_loop().create_future()
            self._config = SimpleNamespace(address=Address("w0", 0))  # type: ignore[assignment]

    async def scenario() -> None:
        worker = Hearing()
        worker._receive(Address("w1", 0), Address("w0", 0), wire.Dismissed("go away"), b"")
        assert not worker.ended.done() and "w1#0 says Dismissed" in caplog.text
        worker._receive(HUB, Address("w0", 0), wire.Dismissed("go away"), b"")
        with pytest.raises(Dismissal, match="go away"):
            await worker.ended

    asyncio.run(scenario())

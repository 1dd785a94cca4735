"""New weights in a worker: made ready beside the running steps where memory allows, and changed to between two steps.

 1. `stage`: the weights lie in memory of this host. If a second model fits, it is made on a thread of its own (packed, self-tested).
 2. `use`: behind the plans that are given. Unless it is ready, the model is made now, while steps wait.
A version that nobody will use is dropped.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread

from headrace.live import wire
from headrace.live.memory import available_bytes
from headrace.types.errors import HeadraceError
from headrace.types.weights import Staged

log = logging.getLogger(__name__)

HEADROOM = 1.5
"""Times the weights' size must be free before a second model is made."""


@dataclass(frozen=True, slots=True)
class Renewal:
    """A model that is ready."""

    fingerprint: str
    numerics: str
    promise: str
    apply: Callable[[], None]
    """Use it from the next step on. On the executor's thread."""


Prepare = Callable[[Staged], Renewal]
"""Make it ready. Raises HeadraceError for weights that cannot be used. On any thread."""


class Renewals:
    """Versions that this worker may be told to use. `send` says something to the hub."""

    def __init__(self, send: Callable[[wire.Control], None]) -> None:
        self.prepare: Prepare | None = None
        """Set when the executor is there."""
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._staged: dict[int, Staged] = {}
        self._ready: dict[int, Renewal] = {}
        self._threads: dict[int, Thread] = {}

    def stage(self, staged: Staged) -> None:
        version = staged.version
        self._staged[version] = staged
        if available_bytes() < HEADROOM * staged.nbytes:
            log.info("no memory for a second model: version %d is loaded when it is its turn", version)
            self._send(wire.Prepared(version, "", "", "", ""))
            return
        thread = Thread(target=self._make, args=(staged,), name="headrace-renewal", daemon=True)
        self._threads[version] = thread
        thread.start()

    def drop(self, version: int) -> None:
        """It is not used after all."""
        self._staged.pop(version, None)
        self._ready.pop(version, None)

    def use(self, version: int) -> None:
        """On the executor's thread. Raises HeadraceError: the worker cannot go on then."""
        thread = self._threads.pop(version, None)
        if thread is not None:
            thread.join()
        renewal = self._ready.pop(version, None)
        if renewal is None:
            if version not in self._staged or self.prepare is None:
                raise HeadraceError(f"version {version} of the weights is not at hand")
            renewal = self.prepare(self._staged[version])
        renewal.apply()
        for old in [v for v in self._staged if v <= version]:
            self.drop(old)

    def _make(self, staged: Staged) -> None:
        version = staged.version
        try:
            assert self.prepare is not None
            renewal = self.prepare(staged)
        except Exception as error:
            log.exception("version %d of the weights cannot be used", version)
            said = wire.Prepared(version, "", "", "", str(error) or type(error).__name__)
        else:
            if version in self._staged:
                self._ready[version] = renewal
            said = wire.Prepared(version, renewal.fingerprint, renewal.numerics, renewal.promise, "")
        self._loop.call_soon_threadsafe(self._send, said)

"""Shared memory: the source copies whole runs into the target's pool, which it has mapped.

One thread copies, in order, so the loop is never held up; the immediate goes over the bus after the copy. A peer's end fails what waits
for it; a copy under way ends harmlessly in memory that outlives the peer and is in quarantine until it is answered.
Leaves out: several copying threads; non-temporal stores.
"""

from queue import SimpleQueue
from threading import Thread

from headrace.live.transports import Site
from headrace.types.events import Write
from headrace.types.ids import Address


class Transport:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._lost: dict[Address, None] = {}
        self._writes: SimpleQueue[tuple[Write, list[memoryview]]] = SimpleQueue()
        self._thread: Thread | None = None

    def write(self, write: Write) -> None:
        target = self._site.target(write.target)
        if target is None:
            self._site.call(self._done, write, False)
            return
        if self._thread is None:
            self._thread = Thread(target=self._run, name="headrace-copy", daemon=True)
            self._thread.start()
        self._writes.put((write, target))

    def forget(self, peer: Address) -> None:
        self._lost[peer] = None

    def _run(self) -> None:
        while True:
            write, target = self._writes.get()
            ok = write.target not in self._lost and self._site.copy(write, target)
            try:
                self._site.call(self._done, write, ok)
            except RuntimeError:
                # The loop has ended: so does the worker.
                return

    def _done(self, write: Write, ok: bool) -> None:
        if ok:
            self._site.landed(write.target, write.slot, write.weight)
        self._site.written(write.write, ok)

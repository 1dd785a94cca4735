"""In this process, in random order: every completion that a network could show, for tests.

A keyed draw picks which of the waiting writes is carried out next; the immediate and the acknowledgement follow at once.
Leaves out: delay.
"""

from hashlib import blake2b
from struct import pack

from headrace.live.transports import Site
from headrace.types.events import Write
from headrace.types.ids import Address


class Transport:
    def __init__(self, site: Site, seed: int = 0) -> None:
        self._site = site
        self._seed = seed
        self._serial = 0
        self._waiting: list[Write] = []
        self._lost: dict[Address, None] = {}

    def write(self, write: Write) -> None:
        self._waiting.append(write)
        self._site.call(self._step)

    def forget(self, peer: Address) -> None:
        self._lost[peer] = None

    def _step(self) -> None:
        """Carry one out. There are as many steps as writes."""
        self._serial += 1
        drawn = int.from_bytes(
            blake2b(pack("<qq", self._seed, self._serial), digest_size=8).digest(), "little"
        )
        write = self._waiting.pop(drawn % len(self._waiting))
        target = None if write.target in self._lost else self._site.target(write.target)
        ok = target is not None and self._site.copy(write, target)
        if ok:
            self._site.landed(write.target, write.slot, write.weight)
        self._site.written(write.write, ok)

"""Memory into which a trainer writes new weights: one memory file for all workers of this host, so bytes are written once.

Each tensor has a place, fixed before the first byte comes (the static plan), and a slot that counts what has landed of it. As soon as a
tensor is whole its digest is taken, on a thread, while the next ones arrive.
"""

import asyncio
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b

from headrace.live.pools import SEALS
from headrace.live.transfer.counters import WEIGHT_MAX
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.regions import Descriptor
from headrace.types.weights import Place, Staged, Tensor

ALIGNMENT = 64
"""Of each tensor, bytes."""
LAYOUT = "weights"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan(tensors: Sequence[Tensor], dtype: str) -> tuple[Place, ...]:
    """Where each tensor goes, in the order given."""
    places: list[Place] = []
    end = 0
    for tensor in tensors:
        count = ITEM_BYTES[dtype]
        for length in tensor.shape:
            count *= length
        places.append(Place(tensor.name, tensor.shape, end, count))
        end += -(-count // ALIGNMENT) * ALIGNMENT
    return tuple(places)


def weight_of(place: Place) -> int:
    """What its slot counts to: one a MiB, so that a write may be dealt over lanes."""
    return max(1, min(WEIGHT_MAX, place.nbytes >> 20))


def digest_of(memory: memoryview) -> str:
    """Of one tensor's bytes. Other threads run meanwhile."""
    return blake2b(memory, digest_size=16).hexdigest()


class Staging:
    """The memory of one version. `arrived` is called on the loop's thread for each tensor that is whole."""

    def __init__(
        self,
        version: int,
        dtype: str,
        tensors: Sequence[Tensor],
        engine: TransferEngine,
        arrived: Callable[[], None],
    ) -> None:
        self.version = version
        self.dtype = dtype
        self.fingerprint = ""
        """Of names, shapes and content, once all is there."""
        self.places = plan(tensors, dtype)
        self.missing = len(self.places)
        """Tensors that have not arrived."""
        self.nbytes = max(1, self.places[-1].offset + self.places[-1].nbytes)
        self._engine = engine
        self._arrived = arrived
        self._loop = asyncio.get_running_loop()
        self._fd = os.memfd_create(f"headrace-weights-{version}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, self.nbytes)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        self._map = mmap.mmap(self._fd, self.nbytes)
        self._view = memoryview(self._map)
        self._region = engine.register(self._view, LAYOUT, self._fd)
        self._digester = ThreadPoolExecutor(1, "headrace-digest")
        self._digests: list[asyncio.Future[str] | None] = [None] * len(self.places)
        counter = engine.counter()
        for slot, place in enumerate(self.places):
            counter.expect(slot, weight_of(place), partial(self._whole, slot))
        self._open = True

    def describe(self) -> Descriptor:
        """What the trainer's engine needs to write here."""
        return self._engine.describe(self._region)

    async def digests(self) -> list[str]:
        """Of all tensors, which must have arrived."""
        return [await future for future in self._digests if future is not None]

    def seal(self, sealed: Callable[[], None]) -> None:
        """Take nothing more. `sealed`: nothing can land from outside any more; perhaps within this call."""
        if self._open:
            self._open = False
            self._engine.unregister(self._region, sealed)
            for slot in range(len(self.places)):
                self._engine.counter().close(slot)

    def staged(self, fingerprint: str = "") -> Staged:
        """For workers, which map it by its path."""
        path = f"/proc/{os.getpid()}/fd/{self._fd}"
        return Staged(self.version, path, self.nbytes, self.dtype, self.places, fingerprint)

    def close(self) -> None:
        """Give up this process's hold: workers that have it mapped keep it."""
        self.seal(lambda: None)
        self._digester.shutdown(cancel_futures=True)
        del self._region
        os.close(self._fd)
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            # A digest is being taken, or the engine has not let go: the mapping ends with that.
            pass

    def _whole(self, slot: int) -> None:
        place = self.places[slot]
        memory = self._view[place.offset : place.offset + place.nbytes]
        self._digests[slot] = self._loop.run_in_executor(self._digester, digest_of, memory)
        self.missing -= 1
        self._arrived()

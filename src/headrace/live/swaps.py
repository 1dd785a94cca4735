"""Copies between a worker's pool and its host area, on a thread of their own beside the steps.

Swaps are carried out one after another, each in as many copies as it has runs. numpy gives up the interpreter's lock while it copies a run,
so the loop answers and steps go on. The host area is memory of this process alone, filled in the background: a first touch costs more than
the copy itself. It ends with the process.
"""

import asyncio
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

import numpy as np

from headrace.live.pools import Pool, layout_of
from headrace.types.kv import KVSpec
from headrace.types.swaps import SwapIn, SwapOut, Swapped


class Swaps:
    """`ended` runs on the loop's thread; `failed` gets an error of the thread, after which nothing is copied any more."""

    def __init__(
        self,
        spec: KVSpec,
        blocks: tuple[int, ...],
        device: list[memoryview],
        ended: Callable[[Swapped], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """`blocks`: of the host area, per group; `device`: the pool's memory, per group."""
        self._area = Pool.create("swap", layout_of(spec, blocks))
        self._area.fill()
        self._host = [_rows(m, spec.block_bytes(g)) for g, m in enumerate(self._area.buffers())]
        self._device = [_rows(m, spec.block_bytes(g)) for g, m in enumerate(device)]
        self.copies = 0
        """Runs copied so far,"""
        self.bytes = 0
        """and what is in them."""
        self._ended = ended
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[SwapOut | SwapIn] = SimpleQueue()
        Thread(target=self._run, name="headrace-swaps", daemon=True).start()

    def give(self, command: SwapOut | SwapIn) -> None:
        """Carry it out after those before it."""
        self._queue.put(command)

    def _run(self) -> None:
        try:
            while True:
                command = self._queue.get()
                for run in command.runs:
                    device = self._device[run.group][run.device : run.device + run.count]
                    host = self._host[run.group][run.host : run.host + run.count]
                    if isinstance(command, SwapOut):
                        np.copyto(host, device)
                    else:
                        np.copyto(device, host)
                    self.copies += 1
                    self.bytes += device.nbytes
                self._loop.call_soon_threadsafe(self._ended, Swapped(command.swap, True))
        except Exception as error:
            self._loop.call_soon_threadsafe(self._failed, error)


def _rows(memory: memoryview, nbytes: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """As blocks of so many bytes."""
    return np.frombuffer(memory, dtype=np.uint8).reshape(-1, nbytes)

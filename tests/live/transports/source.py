"""A source in a process of its own: for each line it hears, a target and how often, one write of its memory, all over again so often."""

import asyncio
import sys

import msgspec
import numpy as np

from headrace.live.transfer.counters import immediate
from headrace.live.transfer.regions import Descriptor
from headrace.types.ids import Address
from tests.live.transports.harness import ends

BYTE = 171


async def main(name: str, own: str, epoch: str, nbytes: str) -> None:
    with ends(name, Address(own, int(epoch)), nbytes=int(nbytes)) as (end,):
        end.memory[:] = BYTE
        while line := await asyncio.to_thread(sys.stdin.readline):
            target, times = msgspec.json.decode(line, type=tuple[Descriptor, int])
            moved = np.array([(0, 0, target.nbytes)] * times, np.int64)
            end.write(target, moved, immediate(1, 1))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

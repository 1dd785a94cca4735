"""A target in a process of its own: says its descriptor, then takes what comes until it is killed."""

import asyncio
import sys

import msgspec

from headrace.types.ids import Address
from tests.live.transports.harness import ends


async def main(name: str, peer: str, epoch: str, nbytes: str) -> None:
    with ends(name, Address(peer, int(epoch)), nbytes=int(nbytes), lanes=2) as (end,):
        sys.stdout.buffer.write(msgspec.json.encode(end.descriptor) + b"\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

"""A trainer of made-up weights, and services over the fake executor that take them."""

import numpy as np
from msgspec.structs import replace

from headrace.cli.push import Writer
from headrace.live.service import Service
from headrace.types.kv import KVSpec
from headrace.types.weights import Pushed, Running, Tensor, Ticket
from tests.live.fake import SPEC
from tests.live.serving import COMMAND, MODEL, config_for

TENSORS = (Tensor("embed", (64, 32)), Tensor("empty", (0, 4)), Tensor("head", (300, 7)))
KEY = "key"


class Trainer:
    """Tensors of random bytes; `tampered` is not what it says its digest is of."""

    def tensors(self) -> tuple[Tensor, ...]:
        return TENSORS

    def read(self, name: str, dtype: str) -> memoryview:
        shape = next(tensor.shape for tensor in TENSORS if tensor.name == name)
        rng = np.random.default_rng(len(name))
        return rng.integers(0, 256, int(np.prod(shape)) * 2, np.uint8).data


def serving(spec: KVSpec = SPEC, **fields: object) -> Service:
    model = replace(MODEL, spec=spec, tensors=TENSORS)
    return Service(config_for(push_key=KEY, **fields), model, COMMAND)


async def written(ticket: Ticket) -> list[str]:
    async with Writer(Trainer(), ticket, KEY, 1 << 20, lambda done, total: None) as writer:
        return await writer.run()


async def push(service: Service, running: Running = Running.KEEP, hold_ns: int = 10**9) -> Pushed:
    ticket = service.pushes.begin(TENSORS, running, hold_ns)
    return await service.pushes.commit(ticket.push, await written(ticket))

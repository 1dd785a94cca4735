"""Mooncake's transfer engine between two processes of this host, over TCP. The clock runs around one (batched) synchronous write."""

import os
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from time import perf_counter

import numpy as np
from mooncake.engine import TransferEngine
from rounds import answer, serve


def engine_of(memory: np.ndarray) -> TransferEngine:
    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError("the engine did not start")
    if engine.register_memory(memory.ctypes.data, len(memory)):
        raise RuntimeError("the memory was not registered")
    return engine


class Sender:
    def __init__(self, memory: np.ndarray, connection: Connection) -> None:
        self._memory = memory
        self._engine = engine_of(memory)
        port, self._remote = connection.recv()
        self._peer = f"127.0.0.1:{port}"

    def prepare(self, sources: list[int], targets: list[int], piece_bytes: int) -> Callable[[], float]:
        origin = self._memory.ctypes.data
        local = [origin + s for s in sources]
        remote = [self._remote + t for t in targets]
        lengths = [piece_bytes] * len(sources)

        def move() -> float:
            started = perf_counter()
            if len(local) == 1:
                code = self._engine.transfer_sync_write(self._peer, local[0], remote[0], piece_bytes)
            else:
                code = self._engine.batch_transfer_sync_write(self._peer, local, remote, lengths)
            if code:
                raise RuntimeError(f"the write ended in code {code}")
            return perf_counter() - started

        return move

    def close(self) -> None:
        pass


def receive(nbytes: int, connection: Connection) -> None:
    memory = np.zeros(nbytes, dtype=np.uint8)
    engine = engine_of(memory)
    connection.send((engine.get_rpc_port(), memory.ctypes.data))
    answer(memory, connection)
    os._exit(0)


if __name__ == "__main__":
    serve(Sender, receive, {"mooncake": version("mooncake-transfer-engine-non-cuda")})

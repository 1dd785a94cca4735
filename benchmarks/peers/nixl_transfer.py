"""NIXL between two processes of this host, over UCX; UCX_TLS in the environment chooses how.

The clock runs from the post of a prepared transfer to its completion: what preparing costs is not counted against it.
"""

import os
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from time import perf_counter

import numpy as np
from nixl import nixl_agent, nixl_agent_config
from rounds import answer, serve


class Sender:
    def __init__(self, memory: np.ndarray, connection: Connection) -> None:
        self._memory = memory
        self._agent = nixl_agent("source", nixl_agent_config(backends=["UCX"]))
        self._registered = self._agent.register_memory([(memory.ctypes.data, len(memory), 0, "")], "DRAM")
        metadata, self._remote = connection.recv()
        self._peer = self._agent.add_remote_agent(metadata)

    def prepare(self, sources: list[int], targets: list[int], piece_bytes: int) -> Callable[[], float]:
        agent, origin = self._agent, self._memory.ctypes.data
        local = agent.get_xfer_descs([(origin + s, piece_bytes, 0) for s in sources], "DRAM")
        remote = agent.get_xfer_descs([(self._remote + t, piece_bytes, 0) for t in targets], "DRAM")
        handle = agent.initialize_xfer("WRITE", local, remote, self._peer, b"done")

        def move() -> float:
            started = perf_counter()
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(f"the transfer ended in state {state}")
            return perf_counter() - started

        return move

    def close(self) -> None:
        pass


def receive(nbytes: int, connection: Connection) -> None:
    memory = np.zeros(nbytes, dtype=np.uint8)
    agent = nixl_agent("target", nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(memory.ctypes.data, nbytes, 0, "")], "DRAM")
    connection.send((agent.get_agent_metadata(), memory.ctypes.data))
    answer(memory, connection)
    os._exit(0)


if __name__ == "__main__":
    serve(Sender, receive, {"nixl": version("nixl")})

"""What a peer's script is to `_peers.py`: two processes, and one measured transfer for each line on standard input.

The script says {"ready": versions} once both processes are up, then for each line {"pieces": 2048, "piece_bytes": 32768} it answers
{"seconds": 0.02}. Before the first answer of a shape all pieces are moved and compared with what was sent.
"""

import json
import multiprocessing as mp
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Protocol

import numpy as np
from places import places

CHECK, END = "check", "end"


class Sender(Protocol):
    def prepare(self, sources: list[int], targets: list[int], piece_bytes: int) -> Callable[[], float]:
        """From offsets to a call that moves these pieces and says the seconds until all are at the target."""
        ...

    def close(self) -> None: ...


def serve(
    make_sender: Callable[[np.ndarray, Connection], Sender],
    receive: Callable[[int, Connection], None],
    versions: dict[str, str],
) -> None:
    """Run the script. `receive(nbytes, connection)` is the target's process: it must end in `answer`."""
    nbytes = int(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    connection, theirs = mp.Pipe()
    target = mp.get_context("spawn").Process(target=receive, args=(nbytes, theirs), daemon=True)
    target.start()
    theirs.close()
    memory = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)
    sender = make_sender(memory, connection)
    calls: dict[tuple[int, int], Callable[[], float]] = {}
    print(json.dumps({"ready": versions}), file=answers, flush=True)
    for line in sys.stdin:
        shape = json.loads(line)
        key = (shape["pieces"], shape["piece_bytes"])
        if key not in calls:
            sources, targets = places(*key, target=False), places(*key, target=True)
            calls[key] = sender.prepare(sources, targets, key[1])
            calls[key]()
            connection.send((CHECK, sources, targets, key[1]))
            assert connection.recv(), "the pieces at the target are not those that were sent"
        print(json.dumps({"seconds": calls[key]()}), file=answers, flush=True)
    calls.clear()
    sender.close()
    connection.send((END,))
    target.join(10)
    answers.flush()
    os._exit(0)  # past the libraries' own end: one of them faults when its buffers go first


def answer(memory: np.ndarray, connection: Connection) -> None:
    """At the target: compare what came, until told to end."""
    sent = np.random.default_rng(1).integers(0, 256, len(memory), dtype=np.uint8)
    while (message := connection.recv())[0] == CHECK:
        _, sources, targets, size = message
        pairs = zip(sources, targets, strict=True)
        connection.send(all(np.array_equal(memory[t : t + size], sent[s : s + size]) for s, t in pairs))

"""One seed is one run, to the bit; a journal is enough to repeat what a core did."""

import os
import subprocess
import sys
from hashlib import blake2b

import msgspec
import pytest

from headrace.nodes.journal import Record, replay
from headrace.sim.run import Cores, Outcome, run
from headrace.sim.scenarios import draw_world

SCRIPT = """
from headrace.sim.run import run
for seed in range(40):
    print(seed, run(seed).digest)
"""


def digests(hash_seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_a_seed_is_one_run_whatever_the_hash_seed():
    first, second = digests("1"), digests("2")
    assert first == second
    assert len(first.splitlines()) == 40


def test_seeds_differ():
    assert len({run(seed).digest for seed in range(20)}) == 20


def repeats(outcome: Outcome, seed: int) -> int:
    """Feed every journal, written and read again, to a fresh core; how many commands it gave."""
    cores = Cores(draw_world(seed))
    encode = msgspec.msgpack.encode
    commands = 0
    for node in outcome.shell.nodes:
        journal = msgspec.msgpack.decode(encode(node.journal), type=list[Record])
        batches = replay(cores.at(node.address), journal)
        digest = blake2b(digest_size=16)
        for record, batch in zip(journal, batches, strict=True):
            digest.update(encode((record, batch)))
            commands += len(batch)
        assert digest.hexdigest() == node.core.digest, f"seed {seed}: {node.address} does not repeat itself"
    return commands


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_a_journal_repeats_every_command_to_the_byte(first: int):
    assert all(repeats(run(seed), seed) > 0 for seed in range(first, first + 20))

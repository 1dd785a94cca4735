"""A sequence whose first partitions lie with other pools draws the same tokens, to the bit, as one of a single large pool."""

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from headrace.compute.holding import Holding, Piece, Query, encode
from headrace.compute.ops.backend import native
from headrace.compute.plans import PARTITION
from headrace.compute.pool import pool_tensors
from headrace.compute.runner import Runner
from headrace.ports import HolderLost
from headrace.types.ids import Address
from headrace.types.kv import TableRun, table_runs
from headrace.types.payload import SamplingParams
from headrace.types.plan import Elsewhere
from tests.compute.harness import BLOCK_SIZE, Driver, key, load, make_model, open_driver

pytestmark = pytest.mark.skipif(native is None, reason="equal bits are the native kernels' promise")

EACH = PARTITION // BLOCK_SIZE
A, B = Address("a"), Address("b")
PROMPT = [(37 * i + i // 160) % 160 for i in range(3 * PARTITION + 40)]
SHORT = [(11 * i) % 160 for i in range(50)]
PARAMS = SamplingParams(temperature=1.0, seed=5, tokens_max=10_000, logprobs=3)


class Peers:
    """Holders in this process. Those in `silent` do not answer."""

    def __init__(self, spec) -> None:
        self.pools = {peer: pool_tensors(spec, [3 * EACH]) for peer in (A, B)}
        self.holders = {p: Holding(pool, spec.dtype, threads=1) for p, pool in self.pools.items()}
        self.silent: set[Address] = set()
        self.asked = 0

    def ask(self, holder, query):
        self.asked += 1
        if holder in self.silent:
            raise HolderLost(str(holder))
        asked = b"".join(query)
        peers = self

        class Answer:
            def wait(self):
                return peers.holders[holder].answer(memoryview(asked))

        return Answer()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    make_model("qwen3", seed=5, num_key_value_heads=2, max_position_embeddings=8192).save_pretrained(folder)
    return load(folder, dtype="bfloat16", length=len(PROMPT) + 64)


@pytest.fixture(scope="module")
def expected(loaded):
    """Of the long and the short prompt, on one large pool."""
    driver = open_driver(*loaded, blocks=300)
    driver.add(key(1), PROMPT, PARAMS)
    driver.add(key(2), SHORT, PARAMS)
    driver.run([key(1), key(2)], 12, chunk=700)
    return [driver.tracks[key(n)].emissions for n in (1, 2)]


class Owner(Driver):
    """Moves a partition out as soon as one is complete."""

    def __init__(self, loaded, peers: Peers, blocks: int) -> None:
        model, spec = loaded
        runner = Runner(model, spec, [blocks], eos_token_ids=(), threads=1, partials=peers)
        super().__init__(runner, spec, blocks)
        self.peers = peers
        self.away = 0
        """Partitions of the long sequence that were moved out."""

    def plan(self, counts, ends=()):
        track, moved = self.tracks[key(1)], ()
        if key(1) in ends:
            self.free[0] += [b for b in track.blocks[0] if b >= 0]
            track.blocks[0], track.computed, track.total = [], 0, len(track.token_ids)
            self.away = 0
            counts = {**counts, key(1): min(counts[key(1)], track.total)}
        elif track.computed >= (self.away + 1) * PARTITION and key(1) in counts:
            moved = (self._move_out(track.blocks[0]),)
        return replace(super().plan(counts, ends), elsewhere=moved)

    def _move_out(self, table: list[int]) -> Elsewhere:
        holder, at = (A, B)[self.away % 2], self.away * EACH
        there = list(range(at, at + EACH))[::-1]  # the order of blocks at the holder is its own
        source = self.runner.pool[0]
        self.peers.pools[holder][0][there] = source[table[at : at + EACH]].clone()
        source[table[at : at + EACH]] = float("nan")
        self.free[0] += table[at : at + EACH]
        table[at : at + EACH] = [-1] * EACH
        self.away += 1
        return Elsewhere(key(1), holder, tuple(table_runs(0, at, there)))


def test_a_context_longer_than_the_pool_draws_the_same(loaded, expected):
    owner = Owner(loaded, Peers(loaded[1]), blocks=2 * EACH + 12)
    owner.add(key(1), PROMPT, PARAMS)
    owner.add(key(2), SHORT, PARAMS)
    owner.run([key(1), key(2)], 12, chunk=700)
    assert owner.away == 3 and owner.peers.asked > 0
    assert [owner.tracks[key(n)].emissions for n in (1, 2)] == expected, "tokens and logprobs, to the bit"


def test_a_silent_holder_loses_its_own_sequences_only(loaded, expected):
    owner = Owner(loaded, Peers(loaded[1]), blocks=2 * EACH + 12)
    owner.add(key(1), PROMPT, PARAMS)
    owner.add(key(2), SHORT, PARAMS)
    owner.run([key(1), key(2)], 5, chunk=700)
    owner.peers.silent = {B}
    asked = owner.peers.asked
    long, short = owner.step({key(1): 1, key(2): 1})
    assert long.lost and (long.emitted, long.error) == (0, "") and not short.lost and short.emitted == 1
    layers = len(loaded[1].groups[0].layers)
    assert owner.peers.asked - asked == layers + 1, "who is silent once is not asked again in the step"
    (again,) = owner.step({key(1): 1})  # a plan that was in flight
    assert again.lost
    owner.peers.silent = set()
    owner.step({key(1): 700}, ends=[key(1)])
    owner.run([key(1), key(2)], 12, chunk=700)
    assert [owner.tracks[key(n)].emissions for n in (1, 2)] == expected


def test_only_whole_partitions_before_what_is_computed_may_be_elsewhere(loaded):
    owner = Owner(loaded, Peers(loaded[1]), blocks=3 * EACH)
    owner.add(key(1), PROMPT, PARAMS)
    owner.step({key(1): 700})
    half = Elsewhere(key(1), A, (TableRun(0, 0, 0, EACH // 2),))
    with pytest.raises(ValueError, match="not of whole partitions"):
        owner.execute(replace(owner.plan({key(1): 1}), elsewhere=(half,)))
    owner = Owner(loaded, Peers(loaded[1]), blocks=3 * EACH)
    owner.add(key(1), PROMPT, PARAMS)
    owner.step({key(1): 700})
    early = Elsewhere(key(1), A, (TableRun(0, 0, 0, EACH),))
    with pytest.raises(ValueError, match="is to be computed"):
        owner.execute(replace(owner.plan({key(1): 1}), elsewhere=(early,)))


def test_without_a_way_to_ask_it_is_refused(loaded):
    driver = open_driver(*loaded, blocks=3 * EACH)
    driver.add(key(1), PROMPT, PARAMS)
    driver.step({key(1): PARTITION})
    away = Elsewhere(key(1), A, (TableRun(0, 0, 0, EACH),))
    with pytest.raises(ValueError, match="no way to ask"):
        driver.execute(replace(driver.plan({key(1): 1}), elsewhere=(away,)))


def test_a_query_that_names_what_is_not_there_is_refused(loaded):
    peers = Peers(loaded[1])
    q = torch.zeros(1, 4, loaded[1].groups[0].head_dim, dtype=torch.bfloat16)
    beyond = np.full(EACH, 3 * EACH, dtype=np.int32).tobytes()
    asked = b"".join(encode(Query(0, 0, 4, 0.25, (Piece(0, 1, 0, 1, beyond),)), q))
    with pytest.raises(ValueError, match="names no block"):
        peers.holders[A].answer(memoryview(asked))
    with pytest.raises(ValueError, match="whole rows"):
        peers.holders[A].answer(memoryview(asked[:-2]))
    with pytest.raises(msgspec.MsgspecError):
        peers.holders[A].answer(memoryview(b"\x04\x00\x00\x00none"))

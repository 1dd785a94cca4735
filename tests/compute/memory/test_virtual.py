"""The runner on virtual ranges says what it says on the paged pool, whatever happens to sequences and to the look-ahead."""

import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.compute.layers.decoder import Decoder
from headrace.compute.memory import Memory
from headrace.compute.memory.paged import PagedMemory
from headrace.compute.memory.pages import Unmappable
from headrace.compute.memory.pages.memfd import MemfdPages
from headrace.compute.memory.virtual import VirtualMemory
from headrace.types.ids import SequenceKey, StepId
from headrace.types.kv import KVSpec, Layout, TableRun
from headrace.types.payload import SamplingParams
from headrace.types.plan import Growth, SequenceStart, StepPlan, Work
from tests.compute.harness import (
    BLOCK_SIZE,
    Driver,
    PoolFile,
    close_all,
    key,
    load,
    make_model,
    open_driver,
    virtual,
)

SEEDED = SamplingParams(temperature=1.0, top_p=0.9, seed=11, tokens_max=10_000, logprobs=2)
PROMPT = [(7 * i) % 160 for i in range(120)]
BLOCKS = 100

Loaded = tuple[Decoder, KVSpec]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Two KV groups, one of them windowed."""
    folder = tmp_path_factory.mktemp("qwen2")
    config = dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=20, max_window_layers=1)
    # Heads of 32, so that a block of bfloat16 is whole pages, too.
    config |= dict(hidden_size=128)
    make_model("qwen2", seed=5, **config).save_pretrained(folder)
    return load(folder, request.param, layout=Layout.TOKEN_MAJOR)


@pytest.fixture(autouse=True)
def closing() -> Iterator[None]:
    yield
    close_all()


class Ahead(Driver):
    """Names each plan ahead, and remembers the steps' logits."""

    def execute(self, plan: StepPlan):
        self.runner.ahead(plan)
        return super().execute(plan)


def paged(loaded: Loaded) -> Driver:
    model, spec = loaded
    return open_driver(model, replace_layout(spec, Layout.HEAD_MAJOR), blocks=BLOCKS)


def replace_layout(spec: KVSpec, layout: Layout) -> KVSpec:
    return KVSpec(spec.groups, spec.block_size, spec.dtype, layout)


def on_ranges(loaded: Loaded, **options) -> tuple[Driver, VirtualMemory]:
    model, spec = loaded
    pool = PoolFile(spec, BLOCKS)
    # What nobody has written must never be read.
    for buffer in pool.buffers:
        torch.frombuffer(buffer, dtype=torch.uint8).fill_(0xFF)
    memory = virtual(spec, pool, model.length, **options)
    driver = open_driver(model, spec, blocks=BLOCKS, memory=memory)
    driver.__class__ = Ahead
    return driver, memory


def schedule(driver: Driver, seed: int) -> dict[SequenceKey, list[int]]:
    """Prompts with common beginnings, in chunks; some are preempted, some end, others take their place and their blocks."""
    draw = random.Random(seed)
    names: list[SequenceKey] = []
    ends: list[SequenceKey] = []
    for number in range(90):
        if len(names) < 6 and draw.random() < 0.4:
            name = key(number)
            length = draw.randrange(1, 110)
            whole = [n for n in names if driver.tracks[n].computed >= length]
            like = draw.choice(whole) if whole and draw.random() < 0.5 else None
            if like is not None:
                shared = min(length - 1, driver.tracks[like].computed) // BLOCK_SIZE * BLOCK_SIZE
                ids = [*driver.tracks[like].token_ids[:shared], *PROMPT[: length - shared]]
                driver.add(name, ids, SEEDED, like=like, computed=shared)
            else:
                driver.add(name, PROMPT[:length], SEEDED)
            names.append(name)
        counts = {}
        for name in names:
            track = driver.tracks[name]
            if draw.random() < 0.8 and track.total < 200:
                counts[name] = min(draw.randrange(1, 40), track.total - track.computed)
        if not counts:
            continue
        driver.step(counts, ends)
        ends = []
        for name in list(names):
            fate = draw.random()
            if fate < 0.06 and driver.tracks[name].started:
                # Preempted: it starts over, on other blocks, and is computed again.
                ends.append(name)
                driver.tracks[name].computed = 0
                give_back(driver, name)
            elif fate < 0.12:
                names.remove(name)
                driver.runner.close(name)
                give_back(driver, name)
                ends = [n for n in ends if n != name]
    return {name: track.token_ids for name, track in driver.tracks.items()}


def give_back(driver: Driver, name: SequenceKey) -> None:
    """The sequence's blocks, but those that others share, are the next to be handed out."""
    held, driver.tracks[name].blocks = driver.tracks[name].blocks, [[], []]
    for group, blocks in enumerate(held):
        shared = {block for track in driver.tracks.values() for block in track.blocks[group]}
        driver.free[group].extend(block for block in blocks if block not in shared)


@pytest.mark.parametrize("seed", range(6))
def test_random_schedules_draw_the_same_tokens(loaded: Loaded, seed: int) -> None:
    expected = paged(loaded)
    wanted = schedule(expected, seed)
    for options in ({}, {"look_ahead": False}, {"ranges": 12}):
        driver, memory = on_ranges(loaded, **options)
        assert schedule(driver, seed) == wanted, options
        logprobs = {n: [e.logprobs for e in t.emissions] for n, t in driver.tracks.items()}
        assert logprobs == {n: [e.logprobs for e in t.emissions] for n, t in expected.tracks.items()}
        assert memory.counts().blocks_mapped


def test_attention_sees_one_piece_a_sequence(loaded: Loaded) -> None:
    """Any kernel for contiguous KV runs on it as it is: here torch's."""
    driver, memory = on_ranges(loaded)
    _, spec = loaded
    driver.free = [list(range(0, BLOCKS, 2)), list(range(1, BLOCKS, 2))]  # no two blocks lie side by side
    driver.add(key(1), PROMPT, SEEDED)
    driver.run([key(1)], 1, chunk=50)
    for group, (kept, kv) in enumerate(zip(spec.groups, driver.runner.pool, strict=True)):
        table = torch.tensor(driver.tracks[key(1)].blocks[group])
        for layer in range(len(kept.layers)):
            k, v = memory.contiguous(key(1), group, layer, len(PROMPT))
            gathered = kv[table, layer].permute(1, 0, 3, 2, 4).reshape(2, -1, kept.kv_heads, kept.head_dim)
            assert torch.equal(k, gathered[0, : len(PROMPT)]) and torch.equal(v, gathered[1, : len(PROMPT)])
            q = torch.randn(1, 4, 1, kept.head_dim).to(k.dtype)
            views = (x.transpose(0, 1).unsqueeze(0) for x in (k, v))
            found = F.scaled_dot_product_attention(q, *views, enable_gqa=True)
            assert_attends(found[0, :, 0], q[0, :, 0], gathered[:, : len(PROMPT)])


def assert_attends(found: Tensor, q: Tensor, kv: Tensor) -> None:
    k, v = kv.double().repeat_interleave(2, 2)
    weights = (torch.einsum("hd,thd->ht", q.double(), k) * q.shape[1] ** -0.5).softmax(-1)
    tolerance = 1e-5 if found.dtype == torch.float32 else 2e-2
    expected = torch.einsum("ht,thd->hd", weights, v)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_a_prefix_is_shared_without_a_copy(loaded: Loaded) -> None:
    driver, memory = on_ranges(loaded)
    driver.add(key(1), PROMPT, SEEDED)
    driver.run([key(1)], 1)
    driver.add(key(2), PROMPT, SEEDED, like=key(1), computed=112)
    driver.run([key(2)], 1)
    first, second = (memory.contiguous(key(n), 0, 0, 112)[0] for n in (1, 2))
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    second[40] = 3.0
    assert (first[40] == 3.0).all(), "the same memory, seen twice"


def test_the_next_turn_finds_its_prefix_mapped(loaded: Loaded) -> None:
    driver, memory = on_ranges(loaded)
    driver.add(key(1), PROMPT, SEEDED)
    driver.run([key(1)], 1)
    driver.runner.close(key(1))
    assert memory.counts().in_use == 0 and memory.counts().mapped_bytes > 0
    driver.add(key(2), PROMPT, SEEDED, like=key(1), computed=112)
    driver.run([key(2)], 1)
    assert memory.counts().blocks_in_place == 2 * 7


def start(number: int, blocks: int, base: int = 0, work: int = 1) -> StepPlan:
    """A plan that starts a sequence on the pool's first blocks and computes `work` tokens of it."""
    table = tuple(TableRun(g, 0, 0, blocks) for g in range(2))
    first = SequenceStart(key(number), blocks * BLOCK_SIZE, 0, 0, table)
    return StepPlan(StepId(base + 1), StepId(base), (), (first,), (), (Work(key(number), 0, work, False),))


def going_on(number: int, base: int, first: int, growth: tuple[Growth, ...] = ()) -> StepPlan:
    return StepPlan(StepId(base + 1), StepId(base), (), (), growth, (Work(key(number), first, 1, False),))


def memory_of(loaded: Loaded, **options) -> VirtualMemory:
    model, spec = loaded
    return virtual(spec, PoolFile(spec, BLOCKS), model.length, **options)


def test_without_look_ahead_a_step_maps_what_it_needs_and_no_more(loaded: Loaded) -> None:
    memory = memory_of(loaded, look_ahead=False)
    plan = start(1, blocks=10, work=20)
    memory.ahead(plan)
    assert memory.counts().blocks_mapped == 0
    assert memory.prepare(plan) == {}
    assert (memory.counts().blocks_mapped, memory.counts().stalls) == (2 * 2, 1)
    assert memory.counts().stall_ns >= memory.counts().map_ns > 0
    memory.prepare(going_on(1, 1, 31))
    assert memory.counts().stalls == 1, "token 31 lies in the second block"
    memory.prepare(going_on(1, 2, 32))
    assert (memory.counts().blocks_mapped, memory.counts().stalls) == (3 * 2, 2)


def test_with_look_ahead_no_step_waits(loaded: Loaded) -> None:
    memory = memory_of(loaded)
    plans = [start(1, blocks=10), going_on(1, 1, 100), going_on(1, 2, 160, (grown(10),))]
    for plan in plans:
        memory.ahead(plan)
        memory.settle()
    assert memory.counts().blocks_mapped == 2 * 11
    for plan in plans:
        assert memory.prepare(plan) == {}
    assert memory.counts().stalls == memory.counts().stall_ns == 0
    assert memory.counts().map_calls == 2 * 3, (
        "pieces of at most 4 MiB: the first block, the rest, the growth"
    )


def grown(at: int) -> Growth:
    return Growth(key(1), tuple(TableRun(g, at, 50, 1) for g in range(2)))


def test_a_plan_that_needs_nothing_unmaps_one_block_of_an_idle_range(loaded: Loaded) -> None:
    memory = memory_of(loaded)
    for plan in (start(1, blocks=3), start(2, blocks=2, base=1)):
        memory.ahead(plan)
        memory.settle()
        memory.prepare(plan)
    memory.release(key(1))
    before = memory.counts()
    for base in range(2, 5):
        memory.ahead(going_on(2, base, base))
        memory.settle()
        memory.prepare(going_on(2, base, base))
    after = memory.counts()
    assert after.blocks_unmapped - before.blocks_unmapped == 3
    assert after.mapped_bytes < before.mapped_bytes and after.stalls == before.stalls == 0


def test_what_cannot_be_mapped_fails_alone(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, _ = on_ranges(loaded, ranges=3)
    names = [key(n) for n in range(4)]
    for name in names:
        driver.add(name, PROMPT, SEEDED)
    driver.run(names, 4)
    assert [bool(driver.tracks[name].error) for name in names] == [False, False, False, True]
    assert "all 3 virtual KV ranges are in use" in driver.tracks[key(3)].error
    expected = paged(loaded)
    expected.add(key(0), PROMPT, SEEDED)
    expected.run([key(0)], 12)

    def refuse(*_: object) -> None:
        raise Unmappable("no more")

    monkeypatch.setattr(MemfdPages, "show", refuse)
    # It has room in its last block for some tokens, and fails when it needs another.
    driver.run(names[:1], 12)
    assert driver.tracks[key(0)].error == "no more"
    drawn = driver.tracks[key(0)].token_ids
    assert drawn == expected.tracks[key(0)].token_ids[: len(drawn)] and len(drawn) == 129


def test_an_error_of_the_look_ahead_is_the_next_step_s(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = memory_of(loaded)
    wrong = replace_growth(start(1, blocks=2), Growth(key(1), (TableRun(0, 5, 9, 1),)))
    memory.ahead(wrong)
    with pytest.raises(ValueError, match="does not follow the 2 blocks"):
        memory.prepare(wrong)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("headrace.compute.memory.ranges.Ranges.claim", fail)
    plan = start(2, blocks=2, base=1)
    memory.ahead(plan)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        memory.prepare(plan)


def replace_growth(plan: StepPlan, growth: Growth) -> StepPlan:
    return StepPlan(plan.step, plan.base, plan.ends, plan.starts, (growth,), plan.work)


def test_a_table_that_begins_too_late_for_its_window_is_refused(loaded: Loaded) -> None:
    memory = memory_of(loaded, look_ahead=False)
    plan = start(1, blocks=4)
    late = SequenceStart(key(1), 64, 48, 0, (TableRun(0, 0, 0, 4), TableRun(1, 2, 0, 2)))
    wrong = StepPlan(plan.step, plan.base, (), (late,), (), (Work(key(1), 48, 1, False),))
    with pytest.raises(ValueError, match="group 1's table names no block"):
        memory.prepare(wrong)


def test_what_it_needs_of_a_pool(loaded: Loaded) -> None:
    model, spec = loaded
    with pytest.raises(ValueError, match="take a token-major pool, not a head-major one"):
        memory_of((model, replace_layout(spec, Layout.HEAD_MAJOR)))
    made: Memory = PagedMemory(spec, [1, 1])
    assert made.counts() is None


def test_counts_of_memory(loaded: Loaded) -> None:
    driver, memory = on_ranges(loaded)
    _, spec = loaded
    driver.add(key(1), PROMPT[:20], SEEDED)
    driver.run([key(1)], 1)
    memory.settle()
    counts = driver.runner.counts()
    assert counts is not None
    token = sum(spec.block_bytes(g) for g in range(2)) // BLOCK_SIZE
    assert (counts.used_bytes, counts.held_bytes, counts.mapped_bytes) == (21 * token, 32 * token, 32 * token)
    assert counts.resident_bytes == BLOCKS * BLOCK_SIZE * token and counts.in_use == 1

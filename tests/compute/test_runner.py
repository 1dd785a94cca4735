import pytest
import torch
from msgspec.structs import replace

from headrace.compute.memory import Memory
from headrace.compute.memory.paged import PagedMemory
from headrace.compute.pool import pool_tensors
from headrace.ports import Executor
from headrace.types.hashing import block_hashes
from headrace.types.ids import BlockHash, RequestId, SequenceKey, StepId
from headrace.types.kv import KVSpec, Layout
from headrace.types.payload import Emission, SamplingParams, SequencePayload
from headrace.types.plan import SequenceStart, StepPlan, Work
from headrace.types.request import FinishReason
from tests.compute.harness import (
    BLOCK_SIZE,
    GREEDY,
    ROOT,
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
PROMPT = [(7 * i) % 160 for i in range(37)]


@pytest.fixture(scope="module", params=Layout)
def loaded(request, tmp_path_factory):
    """Two KV groups, so that every test covers several block tables. The layout decides how memory is seen."""
    folder = tmp_path_factory.mktemp("qwen2")
    config = dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=20, max_window_layers=1)
    make_model("qwen2", seed=5, **config).save_pretrained(folder)
    yield load(folder, layout=request.param)
    close_all()


@pytest.fixture
def driver(loaded) -> Driver:
    return open_driver(*loaded)


def on(pool: PoolFile, spec: KVSpec, length: int) -> Memory:
    if spec.layout is Layout.TOKEN_MAJOR:
        return virtual(spec, pool, length)
    return PagedMemory(spec, pool.blocks, pool.buffers)


def drawn(driver: Driver, steps: int = 20, params: SamplingParams = SEEDED, prompt=PROMPT) -> list[int]:
    """What a fresh sequence draws, alone."""
    name = key(1000 + len(driver.tracks))
    driver.add(name, prompt, params)
    driver.run([name], steps)
    return driver.tracks[name].token_ids[len(prompt) :]


def test_it_is_an_executor(driver):
    executor: Executor = driver.runner
    executor.close(key(404))


def test_emissions_and_results(driver):
    driver.add(key(1), PROMPT, SEEDED)
    outputs = driver.step({key(1): 30})
    assert [(o.emitted, o.finish, o.error, o.discarded) for o in outputs] == [(0, None, "", False)]
    plan = driver.plan({key(1): 7})
    result, emissions = driver.runner.execute(plan)
    assert (result.step, result.repeats) == (plan.step, 1)
    assert result.started_ns <= result.ended_ns
    assert [o.emitted for o in result.outputs] == [1]
    assert [(e.key, e.first, len(e.token_ids), len(e.logprobs)) for e in emissions] == [(key(1), 0, 1, 1)]
    assert len(emissions[0].logprobs[0].top_ids) == 2


def test_layers_are_told_of_when_their_kv_is_written(driver):
    """A layer's KV has changed if and only if the layer is among those told of."""
    driver.add(key(1), PROMPT, SEEDED)
    pool, groups = driver.runner.pool, driver.runner.model.groups
    before = [kv.clone() for kv in pool]
    told = []

    def layers_done(layers: int) -> None:
        told.append(layers)
        for kv, old, group in zip(pool, before, groups, strict=True):
            for index, layer in enumerate(group.layers):
                assert torch.equal(kv[:, index], old[:, index]) == (layer >= layers)

    driver.runner.execute(replace(driver.plan({key(1): 37}), layered=True), layers_done)
    assert told == list(range(1, len(driver.runner.model.layers) + 1))
    driver.runner.execute(driver.plan({key(1): 1}), layers_done)
    assert told[-1] == len(told)


def test_sequences_do_not_depend_on_their_neighbours(driver):
    alone = drawn(driver)
    names = [key(n) for n in range(5)]
    for n, name in enumerate(names):
        params = [SEEDED, GREEDY, SamplingParams(seed=n, top_k=9, tokens_max=99, presence_penalty=1.0)][n % 3]
        driver.add(name, PROMPT[n * 3 % 7 :] if n else PROMPT, params)
    driver.run(names, 20, chunk=9)
    assert driver.tracks[names[0]].token_ids[len(PROMPT) :] == alone


def test_hashes_of_blocks_are_reported_once(driver):
    track = driver.add(key(1), PROMPT, GREEDY)
    chain = block_hashes(ROOT, PROMPT, BLOCK_SIZE)
    track.hashed = 1
    driver.run([key(1)], 50, chunk=10)
    assert track.hashes[:1] == chain[1:]
    whole = block_hashes(ROOT, track.token_ids[:-1], BLOCK_SIZE)
    assert track.hashes == whole[1:]


def test_finish_by_stop_token_and_by_length(loaded):
    eos = drawn(open_driver(*loaded), 10)[9]
    driver = open_driver(*loaded, eos=[eos])
    expected = drawn(open_driver(*loaded), 10)
    cut = expected.index(eos) + 1
    for n, (change, tokens, finish) in enumerate(
        [
            ({}, cut, FinishReason.STOP),
            ({"ignore_eos": True, "tokens_max": 10}, 10, FinishReason.LENGTH),
            (
                {"stop_token_ids": (expected[2],)},
                min(cut, expected.index(expected[2]) + 1),
                FinishReason.STOP,
            ),
        ]
    ):
        params = SamplingParams(**{"temperature": 1.0, "top_p": 0.9, "seed": 11, "tokens_max": 99, **change})
        track = driver.add(key(n), PROMPT, params)
        driver.run([key(n)], 99)
        assert track.token_ids[len(PROMPT) :] == expected[:tokens]
        assert track.finish is finish


def test_work_planned_before_a_finish_was_known_is_discarded(loaded):
    """Two plans in flight: N+1 names a sequence that ends in N, and one that goes on from N's token."""
    expected = drawn(open_driver(*loaded), 10)
    driver = open_driver(*loaded)
    driver.add(
        key(1), PROMPT, SamplingParams(temperature=1.0, top_p=0.9, seed=11, stop_token_ids=(expected[0],))
    )
    driver.add(key(2), PROMPT, SEEDED)
    plans = [driver.plan({key(1): 37, key(2): 37}), driver.plan({key(1): 1, key(2): 1})]
    first, second = (driver.execute(plan) for plan in plans)
    assert [(o.emitted, o.finish, o.discarded) for o in first] == [
        (1, FinishReason.STOP, False),
        (1, None, False),
    ]
    assert [(o.emitted, o.finish, o.discarded) for o in second] == [(0, None, True), (1, None, False)]
    driver.step({key(2): 1}, ends=[key(1)])
    assert driver.tracks[key(2)].token_ids[37:] == expected[:3]


def test_preemption_recomputes_the_same(driver):
    expected = drawn(driver)
    track = driver.add(key(1), PROMPT, SEEDED)
    driver.run([key(1)], 8)
    track.computed, track.blocks = 0, [[], []]
    driver.step({key(1): 11}, ends=[key(1)])
    driver.run([key(1)], 20, chunk=13)
    assert track.token_ids[37:] == expected


def test_failover_resumes_from_the_history(loaded):
    """Another worker gets what was emitted, and goes on with what the lost one would have drawn."""
    expected = drawn(open_driver(*loaded))
    driver = open_driver(*loaded)
    track = driver.add(key(1), PROMPT + expected[:9], SEEDED, prompt=37)
    driver.run([key(1)], 11)
    assert track.token_ids[37:] == expected
    assert [e.first for e in track.emissions] == list(range(9, 20))


def test_handover_between_two_runners_on_one_memory(loaded):
    """One prefills into shared memory and draws token 0; the other maps the same memory and decodes."""
    model, spec = loaded
    expected = drawn(open_driver(model, spec))
    pool = PoolFile(spec, 64)
    source, target = (open_driver(model, spec, memory=on(pool, spec, model.length)) for _ in range(2))
    source.add(key(1), PROMPT, SEEDED)
    source.run([key(1)], 1)
    track = target.add(key(1), PROMPT, SEEDED)
    target.runner.append(source.tracks[key(1)].emissions[0])
    target.runner.append(source.tracks[key(1)].emissions[0])
    track.blocks, track.computed, track.total = source.tracks[key(1)].blocks, 37, 38
    target.free = source.free
    target.run([key(1)], 19)
    assert [*source.tracks[key(1)].token_ids[37:], *track.token_ids[37:]] == expected
    with pytest.raises(ValueError, match="only 20 are known"):
        target.runner.append(Emission(key(1), 21, (5,)))


def test_a_sequence_that_cannot_go_on_fails_alone(loaded):
    model, spec = loaded
    driver = open_driver(model, spec)
    expected = drawn(driver, 5)
    bad = {
        key(1): ([5, 160], SEEDED, "outside 0..159"),
        key(2): ([5, -1], SEEDED, "outside 0..159"),
        key(3): ([5] * 257, SEEDED, "257 tokens, but this worker serves at most 256"),
        key(4): (PROMPT, SamplingParams(logit_bias={999: 1.0}), "token 999"),
    }
    for name, (ids, params, _) in bad.items():
        driver.add(name, ids, params)
    poisoned = driver.add(key(5), PROMPT, SEEDED)
    good = driver.add(key(6), PROMPT, SEEDED)
    driver.step(dict.fromkeys([*bad, key(5), key(6)], 2))
    driver.runner.pool[0][poisoned.blocks[0][0]] = float("nan")
    driver.run([key(5), key(6)], 5)
    for name, (_, _, reason) in bad.items():
        assert reason in driver.tracks[name].error
    assert "not a distribution" in poisoned.error
    assert driver.step({key(5): 1})[0].error == poisoned.error
    assert good.token_ids[37:] == expected


def test_the_context_ends(tmp_path):
    make_model("llama", seed=0).save_pretrained(tmp_path)
    driver = open_driver(*load(tmp_path, length=40))
    track = driver.add(key(1), PROMPT, GREEDY)
    driver.run([key(1)], 99)
    assert len(track.token_ids) == 41
    assert track.error == "longer than the 40 tokens that this worker serves"


def test_plans_that_contradict_what_is_known(driver):
    driver.add(key(1), PROMPT, GREEDY)
    driver.step({key(1): 10})

    def plan(step=2, base=1, starts=(), ends=(), work=()) -> StepPlan:
        return StepPlan(StepId(step), StepId(base), tuple(ends), tuple(starts), (), tuple(work))

    wrong = {
        "follows 0, but 1 was executed last": plan(base=0),
        "is not open": plan(ends=[key(7)]),
        "already running": plan(starts=[SequenceStart(key(1), 37, 0, 0, ())]),
        "contradicts 37 known": plan(work=[Work(key(1), 30, 8, True)]),
        "has no block": plan(work=[Work(key(1), 30, 7, True)]),
    }
    for message, contradiction in wrong.items():
        with pytest.raises(ValueError, match=message):
            driver.runner.execute(contradiction)
    driver.add(key(2), PROMPT, GREEDY)
    with pytest.raises(ValueError, match="starts with 36 tokens, but 37 are known"):
        driver.runner.execute(plan(starts=[SequenceStart(key(2), 36, 0, 0, ())]))


def test_closed_sequences_are_forgotten(loaded):
    driver = open_driver(*loaded, blocks=200)
    for n in range(200):
        driver.add(key(n), PROMPT[:3], GREEDY)
    driver.step({key(n): 3 for n in range(200)})
    for n in range(200):
        driver.runner.close(key(n))
    assert not driver.runner._residents
    with pytest.raises(ValueError, match="not open"):
        driver.runner.append(Emission(key(1), 0, (5,)))
    driver.runner.open(key(1), SequencePayload(BlockHash(b"x" * 16), PROMPT, 37, GREEDY))


def test_choices_of_one_request_differ(driver):
    names = [SequenceKey(RequestId(1), choice) for choice in range(2)]
    for name in names:
        driver.add(name, PROMPT, SEEDED)
    driver.run(names, 12)
    first, second = (driver.tracks[name].token_ids for name in names)
    assert first != second


def test_pool_memory(loaded):
    _, spec = loaded
    memory = [memoryview(bytearray(8 * spec.block_bytes(g))) for g in range(2)]
    tensors = pool_tensors(spec, [8, 8], memory)
    tensors[1][3] = 1.0
    start, end = (n * spec.block_bytes(1) for n in (3, 4))
    assert (torch.frombuffer(memory[1][start:end], dtype=torch.float32) == 1.0).all()
    assert not any(memory[1][:start]) and not any(memory[1][end:])
    with pytest.raises(ValueError, match="group 0"):
        pool_tensors(spec, [9, 8], memory)
    with pytest.raises(ValueError, match="2 groups"):
        pool_tensors(spec, [9])

import pytest

from headrace.sim.executors import ContentExecutor
from headrace.sim.memory import Memory, expected_tokens, seen_from
from headrace.types.hashing import block_hashes, chain_root
from headrace.types.ids import SequenceKey, StepId
from headrace.types.kv import GroupKind, KVGroup, KVSpec, TableRun
from headrace.types.payload import Emission, SamplingParams, SequencePayload
from headrace.types.plan import Growth, SequenceStart, StepPlan, Work
from headrace.types.request import FinishReason

FULL = KVGroup(GroupKind.FULL, (0,), 1, 1)
WINDOW = KVGroup(GroupKind.WINDOW, (1,), 1, 1, window=5)
SPECS = [KVSpec(groups, 4, "float32") for groups in ((FULL,), (WINDOW,), (FULL, WINDOW))]
KEY = SequenceKey(1)


def payload(prompt: int = 23, seed: int = 1, **sampling) -> SequencePayload:
    ids = list(range(100, 100 + prompt))
    return SequencePayload(chain_root("test"), ids, prompt, SamplingParams(seed=seed, **sampling))


def table(spec: KVSpec, first: int = 0, count: int = 15) -> tuple[TableRun, ...]:
    return tuple(TableRun(g, 0, first + g, count) for g in range(len(spec.groups)))


class Driver:
    """Drives one executor without a core."""

    def __init__(self, spec: KVSpec, memory: Memory | None = None) -> None:
        self.memory = memory or Memory(spec, (60,) * len(spec.groups))
        self.executor = ContentExecutor(self.memory)

    def step(self, *work: Work, starts=(), growth=(), ends=()):
        step = StepId(self.executor.last + 1)
        plan = StepPlan(step, self.executor.last, tuple(ends), tuple(starts), tuple(growth), work)
        return self.executor.execute(plan)

    def generate(self, asked: SequencePayload, count: int, chunk: int, runs) -> list[int]:
        self.executor.open(KEY, asked)
        start = [SequenceStart(KEY, asked.prompt, 0, 0, runs)]
        at, known, said = 0, asked.prompt, list[int]()
        while len(said) < count:
            take = min(chunk, known - at)
            result, emissions = self.step(Work(KEY, at, take, at + take == known), starts=start)
            start, at = [], at + take
            if emissions:
                said += emissions[0].token_ids
                known += 1
            if result.outputs[0].finish:
                break
        return said


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("chunk", [1, 3, 4, 50])
def test_chunks_change_nothing(spec: KVSpec, chunk: int):
    for seed in range(5):
        asked = payload(seed=seed)
        said = Driver(spec).generate(asked, 20, chunk, table(spec))
        assert said == expected_tokens(asked, 20, spec)[0]


def test_the_text_depends_on_seed_choice_prompt_and_root():
    spec = SPECS[2]
    texts = [
        expected_tokens(payload(), 5, spec),
        expected_tokens(payload(), 5, spec, choice=1),
        expected_tokens(payload(seed=2), 5, spec),
        expected_tokens(payload(prompt=24), 5, spec),
    ]
    assert all(a[0][0] != b[0][0] for i, a in enumerate(texts) for b in texts[:i])


def test_end_of_text_stops_unless_ignored_or_too_early():
    spec = SPECS[0]
    stopped = next(s for s in range(99) if expected_tokens(payload(seed=s), 10, spec)[1])
    said, finish = expected_tokens(payload(seed=stopped), 10, spec)
    assert finish is FinishReason.STOP and said[-1] == 0
    assert len(expected_tokens(payload(seed=stopped, ignore_eos=True), 10, spec)[0]) == 10
    assert len(expected_tokens(payload(seed=stopped, min_tokens=10), 11, spec)[0]) >= 10


@pytest.mark.parametrize("spec", SPECS)
def test_every_block_that_is_read_matters(spec: KVSpec):
    """Damage any one block that the next token attends to: the text changes."""
    asked = payload(min_tokens=99)
    wanted = expected_tokens(asked, 2, spec)[0]
    for group, g in enumerate(spec.groups):
        reads_from = seen_from(g.window, asked.prompt)
        for block in range(6):
            driver = Driver(spec)
            said = driver.generate(asked, 1, 50, table(spec))
            driver.memory.groups[group][block * 32 + group * 32] ^= 1
            _, emissions = driver.step(Work(KEY, asked.prompt, 1, True))
            said += emissions[0].token_ids
            assert (said != wanted) == (block * 4 >= reads_from)


def test_copied_blocks_speak_alike_and_stale_ones_do_not():
    spec = SPECS[2]
    asked = payload(min_tokens=99)
    wanted = expected_tokens(asked, 6, spec)[0]
    source, target = Driver(spec), Driver(spec)
    first = source.generate(asked, 1, 50, table(spec))
    for group in range(2):
        target.memory.copy_from(source.memory, group, group, 20 + group, 6)
    target.executor.open(KEY, asked)
    target.executor.append(Emission(KEY, 0, tuple(first)))
    start = SequenceStart(KEY, asked.prompt + 1, asked.prompt, 5, table(spec, 20, 6))
    said = list(first)
    for i in range(4):
        growth = [Growth(KEY, (TableRun(0, 6, 40, 2), TableRun(1, 6, 50, 2)))] if i == 1 else ()
        work = Work(KEY, asked.prompt + i, 1, True)
        _, emissions = target.step(work, starts=[start] if i == 0 else (), growth=growth)
        said += emissions[0].token_ids
    assert said == wanted[:5]
    source.memory.groups[0][0:32] = target.memory.groups[0][64:96]
    _, emissions = source.step(Work(KEY, asked.prompt, 1, True))
    assert emissions[0].token_ids[0] != wanted[1]


def test_hashes_of_blocks_that_the_core_cannot_name():
    spec = SPECS[0]
    asked = payload(prompt=9, ignore_eos=True)
    driver = Driver(spec)
    driver.executor.open(KEY, asked)
    start = SequenceStart(KEY, 9, 0, 1, table(spec))
    result, _ = driver.step(Work(KEY, 0, 9, True), starts=[start])
    ids = asked.token_ids + expected_tokens(asked, 3, spec)[0]
    names = block_hashes(asked.root, ids, 4)
    assert result.outputs[0].hashes == tuple(names[1:2])
    hashes = [driver.step(Work(KEY, 9 + i, 1, True))[0].outputs[0].hashes for i in range(3)]
    assert hashes == [(), (), (names[2],)]


def test_a_finished_sequence_is_discarded_and_its_slot_scribbled_on():
    spec = SPECS[0]
    seed = next(s for s in range(99) if expected_tokens(payload(seed=s), 1, spec)[1])
    driver = Driver(spec)
    driver.generate(payload(seed=seed), 1, 50, table(spec))
    before = bytes(driver.memory.groups[0])
    result, emissions = driver.step(Work(KEY, 23, 1, True))
    output = result.outputs[0]
    assert output.discarded and output.emitted == 0 and output.finish is None and emissions == ()
    assert bytes(driver.memory.groups[0]) != before


def test_a_plan_on_another_base_is_refused():
    driver = Driver(SPECS[0])
    driver.step()
    with pytest.raises(ValueError, match="continues 0, but 1"):
        driver.executor.execute(StepPlan(StepId(2), StepId(0), (), (), (), ()))


def test_writes_are_seen_when_the_step_ends():
    spec = SPECS[0]
    driver = Driver(spec)
    driver.executor.open(KEY, payload())
    before = bytes(driver.memory.groups[0])
    plan = StepPlan(
        StepId(1), StepId(0), (), (SequenceStart(KEY, 23, 0, 0, table(spec)),), (), (Work(KEY, 0, 23, True),)
    )
    step = driver.executor.begin(plan)
    assert bytes(driver.memory.groups[0]) == before
    driver.executor.end(step, 1, 2)
    assert bytes(driver.memory.groups[0]) != before

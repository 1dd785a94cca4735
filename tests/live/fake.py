"""An executor without a model: what it draws depends on every byte of KV that it reads back from the pool.

A position's tag is a keyed hash of its token and of the tag before it, as read from memory, and is kept twice: at its block's
beginning and at its end. A block that is missing, stale or half copied therefore changes the text.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from struct import pack

from headrace.live.renewal import Renewal
from headrace.live.settings import WorkerConfig
from headrace.live.worker import Loaded
from headrace.types.hashing import block_hash, chain_root
from headrace.types.ids import BlockHash, SequenceKey, StepId
from headrace.types.kv import GroupKind, KVGroup, KVSpec, TableRun
from headrace.types.payload import Emission, SamplingParams, SequencePayload, TokenLogprobs
from headrace.types.plan import Output, SequenceStart, StepPlan, StepResult, Work
from headrace.types.request import FinishReason
from headrace.types.weights import Staged

TAG = 8
VOCABULARY = 1000
SPEC = KVSpec(
    groups=(
        KVGroup(GroupKind.FULL, (0, 2), kv_heads=1, head_dim=16),
        KVGroup(GroupKind.WINDOW, (1,), kv_heads=1, head_dim=16, window=24),
    ),
    block_size=8,
    dtype="bfloat16",
)
ONE_GROUP = KVSpec(SPEC.groups[:1], SPEC.block_size, SPEC.dtype)
"""What `options["one_group"]` asks for: tiers keep no windows."""
FAULT = VOCABULARY - 1
"""A prompt that ends in this id meets what `options["fault"]` says."""


@dataclass(slots=True)
class Opened:
    payload: SequencePayload
    ids: list[int]
    tables: list[list[int]] | None = None
    hashes: list[BlockHash] = field(default_factory=list)
    hashed: int = 0
    finished: bool = False


class FakeExecutor:
    """Implements `ports.Executor`."""

    def __init__(
        self,
        buffers: list[memoryview],
        step_s: float = 0.0,
        fault: str = "",
        dies_at: int = 0,
        spec: KVSpec = SPEC,
    ) -> None:
        """`dies_at`: in its step of this number, counted from 1, its process is killed."""
        self._buffers = buffers
        self._spec = spec
        self._step_s = step_s
        self.version = 0
        self._fault = fault
        self._steps_left = dies_at
        self._opened: dict[SequenceKey, Opened] = {}
        self._last = StepId(0)

    def open(self, key: SequenceKey, payload: SequencePayload) -> None:
        assert key not in self._opened
        self._opened[key] = Opened(payload, list(payload.token_ids))

    def append(self, emission: Emission) -> None:
        opened = self._opened[emission.key]
        assert emission.first == len(opened.ids) - opened.payload.prompt
        opened.ids += emission.token_ids

    def close(self, key: SequenceKey) -> None:
        self._opened.pop(key, None)

    def execute(
        self, plan: StepPlan, layers_done: Callable[[int], None] | None = None
    ) -> tuple[StepResult, tuple[Emission, ...]]:
        if plan.base != self._last:
            raise ValueError(f"{plan.step} continues {plan.base}, not {self._last}")
        self._last = plan.step
        self._steps_left -= 1
        if not self._steps_left:
            os.kill(os.getpid(), signal.SIGKILL)
        started_ns = time.monotonic_ns()
        time.sleep(self._step_s)
        for key in plan.ends:
            if key in self._opened:
                self._opened[key].tables = None
        for start in plan.starts:
            self._start(start)
        for growth in plan.growth:
            place(self._tables(growth.key), growth.table)
        outputs: list[Output] = []
        emissions: list[Emission] = []
        for work in plan.work:
            output, emission = self._work(work)
            outputs.append(output)
            emissions += [emission] if emission else []
        result = StepResult(plan.step, tuple(outputs), started_ns, time.monotonic_ns())
        return result, tuple(emissions)

    def _tables(self, key: SequenceKey) -> list[list[int]]:
        tables = self._opened[key].tables
        assert tables is not None
        return tables

    def _start(self, start: SequenceStart) -> None:
        opened = self._opened[start.key]
        assert opened.tables is None and start.total <= len(opened.ids)
        del opened.ids[start.total :]
        opened.finished = False
        opened.tables = [[] for _ in self._spec.groups]
        opened.hashed = start.hashed
        place(opened.tables, start.table)

    def _work(self, work: Work) -> tuple[Output, Emission | None]:
        opened = self._opened[work.key]
        if opened.finished:
            return Output(work.key, 0, discarded=True), None
        if opened.payload.token_ids[opened.payload.prompt - 1] == FAULT:
            if self._fault == "error":
                raise RuntimeError("a fault was asked for")
            if self._fault == "hang":
                time.sleep(60)
            if self._fault == "exit":
                os._exit(3)
            if self._fault == "sequence":
                return Output(work.key, 0, error="this sequence has a fault"), None
        end = work.first + work.count
        for group in range(len(self._spec.groups)):
            self._fill(opened, group, work.first, end)
        hashes = self._hashes(opened, end // SPEC.block_size)
        if not work.emits:
            return Output(work.key, 0, hashes), None
        assert end == len(opened.ids)
        groups = range(len(self._spec.groups))
        seen = [self._read(opened, g, seen_from(g, end - 1), end) for g in groups]
        index = end - opened.payload.prompt
        token = draw(seen, opened.payload.sampling, work.key.choice, index)
        opened.ids.append(token)
        finish = finish_of(token, opened.payload.sampling)
        opened.finished = finish is not None
        wanted = opened.payload.sampling.logprobs is not None
        logprobs = (TokenLogprobs(-float(token), 1),) if wanted else ()
        return Output(work.key, 1, hashes, finish), Emission(
            work.key, index, (token,), logprobs, (opened.payload.version, self.version)
        )

    def _hashes(self, opened: Opened, blocks: int) -> tuple[BlockHash, ...]:
        size = SPEC.block_size
        while len(opened.hashes) < blocks:
            at = len(opened.hashes)
            parent = opened.hashes[-1] if at else opened.payload.root
            opened.hashes.append(block_hash(parent, opened.ids[at * size : (at + 1) * size]))
        new = tuple(opened.hashes[opened.hashed : blocks])
        opened.hashed = max(opened.hashed, blocks)
        return new

    # Memory

    def _fill(self, opened: Opened, group: int, first: int, end: int) -> None:
        tag = self._read(opened, group, first - 1, first) if first else salt(group, self.version)
        for position in range(first, end):
            tag = next_tag(tag, opened.ids[position])
            for at in self._places(opened, group, position):
                self._buffers[group][at : at + TAG] = tag

    def _read(self, opened: Opened, group: int, first: int, end: int) -> bytes:
        """Tags of positions `first .. end-1`, block by block; what differs between a block's two copies is torn."""
        size, block_bytes = SPEC.block_size, SPEC.block_bytes(group)
        assert opened.tables is not None
        tags = bytearray()
        for block in opened.tables[group][first // size : -(-end // size)]:
            assert block >= 0
            raw = self._buffers[group][block * block_bytes : (block + 1) * block_bytes]
            ahead, behind = raw[: size * TAG], raw[-size * TAG :]
            tags += ahead if ahead == behind else b"torn" * (size * TAG // 4)
        skip = first // size * size
        return bytes(tags[(first - skip) * TAG : (end - skip) * TAG])

    def _places(self, opened: Opened, group: int, position: int) -> tuple[int, int]:
        size, block_bytes = SPEC.block_size, SPEC.block_bytes(group)
        assert opened.tables is not None
        block = opened.tables[group][position // size]
        assert block >= 0
        inside = position % size * TAG
        return block * block_bytes + inside, (block + 1) * block_bytes - size * TAG + inside


def place(tables: list[list[int]], runs: tuple[TableRun, ...]) -> None:
    for run in runs:
        table = tables[run.group]
        table += [-1] * (run.at + run.count - len(table))
        table[run.at : run.at + run.count] = range(run.first, run.first + run.count)


def salt(group: int, version: int = 0) -> bytes:
    """Other weights say other things."""
    return pack("<q", group + 1000 * version)


def next_tag(tag: bytes, token: int) -> bytes:
    return blake2b(pack("<q", token), key=tag, digest_size=TAG).digest()


def seen_from(group: int, position: int) -> int:
    window = SPEC.groups[group].window
    return max(0, position - window + 1) if window else 0


def draw(seen: list[bytes], sampling: SamplingParams, choice: int, index: int) -> int:
    digest = blake2b(pack("<qqq", sampling.seed, choice, index), digest_size=8)
    for tags in seen:
        digest.update(tags)
    return int.from_bytes(digest.digest(), "little") % (VOCABULARY - 1)


def finish_of(token: int, sampling: SamplingParams) -> FinishReason | None:
    return FinishReason.STOP if token in sampling.stop_token_ids else None


def expected(
    payload: SequencePayload,
    choice: int,
    count: int,
    version: int = 0,
    spec: KVSpec = SPEC,
    before: tuple[int, ...] = (),
) -> list[int]:
    """What a lone sequence says, without blocks, plans or a system; `before` is given."""
    ids = [*payload.token_ids, *before]
    tags: list[list[bytes]] = [[] for _ in spec.groups]
    said = list(before)
    while len(said) < count:
        for group, known in enumerate(tags):
            for token in ids[len(known) :]:
                known.append(next_tag(known[-1] if known else salt(group, version), token))
        last = len(ids) - 1
        seen = [b"".join(known[seen_from(g, last) :]) for g, known in enumerate(tags)]
        token = draw(seen, payload.sampling, choice, len(said))
        said.append(token)
        ids.append(token)
        if finish_of(token, payload.sampling):
            break
    return said


ROOT = chain_root("fake")


def make_executor(config: WorkerConfig, buffers: list[memoryview]) -> Loaded:
    options = config.options
    restart_fault = options.get("restart_fault", False) and config.address.epoch > 0
    if options.get("start_fault") == config.address.name or restart_fault:
        raise RuntimeError("the model cannot be loaded")
    odd = options.get("odd", {}) if options.get("odd_worker") == config.address.name else {}
    dies_at = options.get("dies_at", {}).get(config.address.name, 0) if config.address.epoch == 0 else 0
    spec = ONE_GROUP if options.get("one_group") else SPEC
    executor = FakeExecutor(buffers, options.get("step_s", 0.0), options.get("fault", ""), dies_at, spec)
    executor.version = config.info.version

    def prepare(staged: Staged) -> Renewal:
        time.sleep(options.get("prepare_s", 0.0))
        if options.get("unfit") == config.address.name:
            raise RuntimeError("they are too large")

        def apply() -> None:
            time.sleep(options.get("apply_s", 0.0))
            executor.version = staged.version

        return Renewal(staged.fingerprint, f"fake {staged.version}", "", apply)

    pushed = config.weights
    if pushed is not None:
        odd = {"fingerprint": pushed.fingerprint, "numerics": f"fake {pushed.version}", **odd}
    facts = {"fingerprint": "fake", "spec": spec, "vocabulary": VOCABULARY, "numerics": "fake", **odd}
    return Loaded(executor, **facts, prepare=prepare)

"""Small random models saved by transformers, and a scheduler simple enough to be right, for the tests of `compute`."""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from headrace.compute import models
from headrace.compute.checkpoint import Checkpoint
from headrace.compute.layers.decoder import Decoder
from headrace.compute.memory import Memory
from headrace.compute.memory.pages.memfd import MemfdPages
from headrace.compute.memory.virtual import VirtualMemory
from headrace.compute.pool import pool_tensors
from headrace.compute.rows import Rows
from headrace.compute.runner import Runner
from headrace.types.hashing import chain_root
from headrace.types.ids import BlockHash, RequestId, SequenceKey, StepId
from headrace.types.kv import KVSpec, Layout, TableRun, table_runs
from headrace.types.payload import Emission, SamplingParams, SequencePayload
from headrace.types.plan import Growth, Output, SequenceStart, StepPlan, Work
from headrace.types.request import FinishReason

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ROOT = chain_root("test")
BLOCK_SIZE = 16
GREEDY = SamplingParams(temperature=0.0, tokens_max=10_000)

SIZES = dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)


def make_model(architecture: str, seed: int, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A transformers model of random weights, far from their initial values, so that every term counts."""
    settings = transformers.AutoConfig.for_model(architecture, **{**SIZES, **config})
    settings._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.3 if name.endswith("bias") else 0.15)
    return model.to(dtype)


def reference(model: Any, ids: Sequence[int], at_once: int | None = None) -> Tensor:
    """transformers' logits [len(ids), vocab]: the first `at_once` tokens (default: all) in one pass, then one by one."""
    at_once = at_once or len(ids)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        out = model(tokens[:, :at_once], use_cache=True)
        parts = [out.logits[0]]
        for i in range(at_once, len(ids)):
            out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits[0])
    return torch.cat(parts)


def all_logits(
    model: Decoder,
    spec: KVSpec,
    sequences: Sequence[Sequence[int]],
    *,
    seed: int | None = None,
    threads: int = 1,
) -> list[Tensor]:
    """Logits of every token. The sequences are computed together, whole or (given a seed) in random chunks.

    So with a seed, prefill and decode of several sequences mix, and blocks of one sequence are scattered.
    """
    longest = max(map(len, sequences))
    rows = Rows(spec, longest, 1)
    held = [rows.acquire(ids) for ids in sequences]
    blocks = spec.blocks_for(longest)
    pool = pool_tensors(spec, [blocks * len(held)] * len(spec.groups))
    for number, row in enumerate(held):
        for i in range(blocks):
            rows.extend(row, (TableRun(g, i, i * len(held) + number, 1) for g in range(len(spec.groups))))
    generator = torch.Generator().manual_seed(seed or 0)
    computed, found = [0] * len(held), [[] for _ in held]
    while any(done < len(ids) for done, ids in zip(computed, sequences, strict=True)):
        counts = [len(ids) - done for done, ids in zip(computed, sequences, strict=True)]
        if seed is not None:
            limits = torch.randint(0, 20, (len(held),), generator=generator).tolist()
            counts = [min(pair) for pair in zip(counts, limits, strict=True)]
        chosen = [n for n, count in enumerate(counts) if count]
        if not chosen:
            continue
        spans = [(held[n], computed[n], counts[n]) for n in chosen]
        batch = rows.batch(spans, [True] * len(spans), pool, threads)
        batch = replace(batch, wanted=torch.arange(len(batch.ids), dtype=torch.int32))
        parts = model.forward(batch).clone().split([counts[n] for n in chosen])
        for n, part in zip(chosen, parts, strict=True):
            found[n].append(part)
            computed[n] += counts[n]
    return [torch.cat(parts) for parts in found]


def key(number: int) -> SequenceKey:
    return SequenceKey(RequestId(number))


@dataclass
class Track:
    """What a core knows of a sequence."""

    total: int
    computed: int
    blocks: list[list[int]]
    token_ids: list[int] = field(default_factory=list)
    emissions: list[Emission] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str = ""
    started: bool = False
    hashed: int = 0


class Driver:
    """Makes plans for a runner: hands out blocks, follows counters, collects what is emitted."""

    def __init__(self, runner: Runner, spec: KVSpec, blocks: int):
        self.runner = runner
        self.spec = spec
        self.free = [list(range(blocks))[::-1] for _ in spec.groups]
        self.tracks: dict[SequenceKey, Track] = {}
        self.step_id = 0

    def add(
        self,
        name: SequenceKey,
        ids: Sequence[int],
        params: SamplingParams = GREEDY,
        *,
        prompt: int | None = None,
        like: SequenceKey | None = None,
        computed: int = 0,
    ) -> Track:
        """Open a sequence; with `like`, its first `computed` tokens use the blocks of that sequence."""
        payload = SequencePayload(
            root=ROOT, token_ids=list(ids), prompt=len(ids) if prompt is None else prompt, sampling=params
        )
        self.runner.open(name, payload)
        shared = computed // self.spec.block_size
        blocks = (
            [list(group[:shared]) for group in self.tracks[like].blocks] if like else [[] for _ in self.free]
        )
        self.tracks[name] = Track(len(ids), computed, blocks, list(ids))
        return self.tracks[name]

    def plan(self, counts: dict[SequenceKey, int], ends: Sequence[SequenceKey] = ()) -> StepPlan:
        """A step that computes so many tokens of each; the last known token draws the next."""
        starts, growth, work = [], [], []
        for name in ends:
            self.tracks[name].started = False
        for name, count in counts.items():
            track = self.tracks[name]
            runs = self._reserve(track, track.computed + count, whole=not track.started)
            if not track.started:
                starts.append(SequenceStart(name, track.total, track.computed, track.hashed, runs))
                track.started = True
            elif runs:
                growth.append(Growth(name, runs))
            emits = track.computed + count == track.total
            work.append(Work(name, track.computed, count, emits))
            track.computed += count
            track.total += emits
        base, self.step_id = self.step_id, self.step_id + 1
        return StepPlan(
            StepId(self.step_id), StepId(base), tuple(ends), tuple(starts), tuple(growth), tuple(work)
        )

    def execute(self, plan: StepPlan) -> tuple[Output, ...]:
        """Run a plan and take in what came of it."""
        result, emissions = self.runner.execute(plan)
        for output in result.outputs:
            track = self.tracks[output.key]
            track.hashes.extend(output.hashes)
            track.finish = track.finish or output.finish
            track.error = track.error or output.error
        for emission in emissions:
            self.tracks[emission.key].token_ids.extend(emission.token_ids)
            self.tracks[emission.key].emissions.append(emission)
        return result.outputs

    def step(self, counts: dict[SequenceKey, int], ends: Sequence[SequenceKey] = ()) -> tuple[Output, ...]:
        return self.execute(self.plan(counts, ends))

    def run(self, names: Sequence[SequenceKey], steps: int, chunk: int = 1000) -> None:
        """Step all unfinished sequences, prefilling in chunks, until each has drawn `steps` tokens or ended."""
        while True:
            counts = {}
            for name in names:
                track = self.tracks[name]
                if len(track.emissions) < steps and not track.finish and not track.error:
                    counts[name] = min(chunk, track.total - track.computed)
            if not counts:
                return
            self.step(counts)

    def _reserve(self, track: Track, tokens: int, whole: bool) -> tuple[TableRun, ...]:
        runs: list[TableRun] = []
        for g, held in enumerate(track.blocks):
            before = len(held)
            held.extend(self.free[g].pop() for _ in range(self.spec.blocks_for(tokens) - before))
            at = 0 if whole else before
            if held[at:]:
                runs.extend(table_runs(g, at, held[at:]))
        return tuple(runs)


def load(
    folder: Path, dtype: str = "auto", length: int = 256, layout: Layout = Layout.HEAD_MAJOR
) -> tuple[Decoder, KVSpec]:
    checkpoint = Checkpoint(folder)
    spec = models.kv_spec(checkpoint, dtype=dtype, block_size=BLOCK_SIZE, layout=layout)
    return models.load(checkpoint, dtype=dtype, length=length), spec


def open_driver(
    model: Decoder,
    spec: KVSpec,
    *,
    blocks: int = 64,
    eos: Sequence[int] = (),
    memory: Memory | None = None,
    threads: int = 1,
    shared_prefixes: bool = True,
) -> Driver:
    """Put a runner under a driver. By default on a pool of its own, paged or (token-major) virtual."""
    counts = [blocks] * len(spec.groups)
    if memory is None and spec.layout is Layout.TOKEN_MAJOR:
        memory = virtual(spec, PoolFile(spec, blocks), model.length)
    runner = Runner(
        model,
        spec,
        counts,
        eos_token_ids=eos,
        threads=threads,
        memory=memory,
        shared_prefixes=shared_prefixes,
    )
    return Driver(runner, spec, blocks)


class PoolFile:
    """Memory of a pool that several runners may share: `blocks` of each group, one group after the other."""

    def __init__(self, spec: KVSpec, blocks: int) -> None:
        self.blocks = [blocks] * len(spec.groups)
        sizes = [blocks * spec.block_bytes(g) for g in range(len(spec.groups))]
        self.offsets = [sum(sizes[:g]) for g in range(len(sizes))]
        self.fd = os.memfd_create("test")
        os.ftruncate(self.fd, sum(sizes))
        self._map = mmap.mmap(self.fd, sum(sizes))
        view = memoryview(self._map)
        spans = zip(self.offsets, sizes, strict=True)
        self.buffers = [view[offset : offset + size] for offset, size in spans]

    def __del__(self) -> None:
        os.close(self.fd)


def virtual(spec: KVSpec, pool: PoolFile, length: int, **options: Any) -> VirtualMemory:
    """Closed by `close_all`."""
    pages = MemfdPages(pool.fd)
    made = VirtualMemory(
        spec,
        pool.blocks,
        pool.buffers,
        pages=pages,
        offsets=pool.offsets,
        length=length,
        **{"ranges": 256} | options,
    )
    OPENED.append((made, pool))
    return made


OPENED: list[tuple[VirtualMemory, PoolFile]] = []


def close_all() -> None:
    while OPENED:
        OPENED.pop()[0].close()

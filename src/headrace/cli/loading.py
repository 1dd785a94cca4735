"""A checkpoint as an executor, on the memory of a pool."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from headrace.compute import models
from headrace.compute.checkpoint import Checkpoint
from headrace.compute.holding import Holding
from headrace.compute.layers.decoder import Decoder
from headrace.compute.memory import Memory
from headrace.compute.memory.paged import PagedMemory
from headrace.compute.memory.pages.memfd import MemfdPages
from headrace.compute.memory.virtual import VirtualMemory
from headrace.compute.numerics import Numerics, prepare, self_test, torch_inference
from headrace.compute.ops.backend import describe
from headrace.compute.runner import Runner
from headrace.compute.staged import StagedCheckpoint
from headrace.live.lending import Connections
from headrace.live.renewal import Renewal
from headrace.live.settings import SharedPool, WorkerConfig
from headrace.live.worker import Loaded
from headrace.types.kv import Layout
from headrace.types.weights import Staged


def load(folder: Path, dtype: str, config: WorkerConfig, buffers: Sequence[memoryview]) -> Loaded:
    """Raises CheckpointError naming what cannot be served."""
    prepare(config.threads)
    spec = config.model.spec

    def make(checkpoint: Checkpoint) -> tuple[Decoder, Numerics, str]:
        """The model, ready; on any thread."""
        with torch_inference():
            decoder = models.load(checkpoint, dtype=dtype, length=config.model.length_max)
            numerics = self_test(decoder, spec, config.threads)
        return decoder, numerics, "" if numerics.invariant else weaker_promise(spec.dtype)

    weights = config.weights
    checkpoint = Checkpoint(folder) if weights is None else StagedCheckpoint(folder, weights)
    decoder, numerics, promise = make(checkpoint)
    pool = config.pool
    lends = config.instance.lend_share > 0
    runner = Runner(
        decoder,
        spec,
        pool.layout.blocks,
        eos_token_ids=checkpoint.eos_token_ids,
        threads=config.threads,
        memory=memory_of(config, pool, buffers),
        shared_prefixes=config.options.get("shared_prefixes", True),
        partials=Connections(config.secret, config.instance.lend_answer_ns / 1e9) if lends else None,
    )
    runner.version = config.info.version

    def renewal(staged: Staged) -> Renewal:
        decoder, numerics, promise = make(StagedCheckpoint(folder, staged))
        number = numerics.id if numerics.invariant else ""
        return Renewal(staged.fingerprint, number, promise, partial(runner.renew, decoder, staged.version))

    holding = Holding(runner.pool, spec.dtype, config.threads)
    return Loaded(
        executor=runner,
        fingerprint=checkpoint.fingerprint(),
        spec=models.kv_spec(checkpoint, dtype=dtype, block_size=spec.block_size, layout=spec.layout),
        vocabulary=decoder.vocab,
        numerics=numerics.id if numerics.invariant else "",
        promise=promise,
        prepare=renewal,
        ahead=runner.ahead,
        counts=runner.counts,
        answer=holding.answer,
    )


def memory_of(config: WorkerConfig, pool: SharedPool, buffers: Sequence[memoryview]) -> Memory:
    """How attention sees the worker's pool: the order in which its KV lies says so. Raises Unmappable."""
    spec, layout = config.model.spec, pool.layout
    if spec.layout is Layout.HEAD_MAJOR:
        return PagedMemory(spec, layout.blocks, buffers)
    return VirtualMemory(
        spec,
        layout.blocks,
        buffers,
        pages=MemfdPages(pool.fd),
        offsets=layout.offsets,
        length=config.model.length_max,
        ranges=2 * config.instance.sequences_max,
    )


def weaker_promise(dtype: str) -> str:
    """What is promised when equal bits are not, and why."""
    kernels = ", ".join(f"{operation}: {backend}" for operation, backend in describe().items())
    return (
        f"nothing is lost, doubled or changed once sent, but equal bits are not promised ({dtype}; {kernels})"
    )

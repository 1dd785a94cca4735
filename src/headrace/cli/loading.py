"""A checkpoint as an executor, on the memory of a pool."""

from collections.abc import Sequence
from pathlib import Path

from headrace.compute import models
from headrace.compute.checkpoint import Checkpoint
from headrace.compute.numerics import prepare, self_test
from headrace.compute.ops.backend import describe
from headrace.compute.runner import Runner
from headrace.live.settings import WorkerConfig
from headrace.live.worker import Loaded


def load(folder: Path, dtype: str, config: WorkerConfig, buffers: Sequence[memoryview]) -> Loaded:
    """Raises CheckpointError naming what cannot be served."""
    prepare(config.threads)
    checkpoint = Checkpoint(folder)
    spec = config.model.spec
    decoder = models.load(checkpoint, dtype=dtype, length=config.model.length_max)
    numerics = self_test(decoder, spec, config.threads)
    blocks = next(p.layout.blocks for p in config.pools if p.pool == config.info.pool)
    executor = Runner(
        decoder,
        spec,
        blocks,
        eos_token_ids=checkpoint.eos_token_ids,
        threads=config.threads,
        buffers=buffers,
    )
    promise = "" if numerics.invariant else weaker_promise(spec.dtype)
    return Loaded(
        executor=executor,
        fingerprint=checkpoint.fingerprint(),
        spec=models.kv_spec(checkpoint, dtype=dtype, block_size=spec.block_size),
        vocabulary=decoder.vocab,
        numerics=numerics.id if numerics.invariant else "",
        promise=promise,
    )


def weaker_promise(dtype: str) -> str:
    """What is promised when equal bits are not, and why."""
    kernels = ", ".join(f"{operation}: {backend}" for operation, backend in describe().items())
    return (
        f"nothing is lost, doubled or changed once sent, but equal bits are not promised ({dtype}; {kernels})"
    )

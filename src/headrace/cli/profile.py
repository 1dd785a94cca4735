"""`headrace profile`: measure the live engine on this machine, for a cost model that can stand in for it."""

import asyncio
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from headrace import __version__
from headrace.cli import wiring
from headrace.cli.child import server
from headrace.cli.options import EngineOptions
from headrace.cli.wiring import Probe
from headrace.live.journal import JOURNALS, JournalReader
from headrace.live.machine import processor
from headrace.live.memory import available_bytes
from headrace.live.profiling import (
    COPIES,
    measure_copies,
    measure_message,
    measure_pairs,
    measure_steps,
    rig,
)
from headrace.live.record import TRACE
from headrace.live.settings import Model, ServiceConfig
from headrace.live.shapes import Limits, Shape, grid, pair_shapes
from headrace.types.errors import ConfigError, HeadraceError
from headrace.types.events import StepDone
from headrace.types.profile import Profile
from headrace.types.recording import RecordedRequest
from headrace.workload.client import run_load
from headrace.workload.load import LoadConfig
from headrace.workload.report import progress_bar

PROFILER = (sys.executable, "-m", "headrace.cli.profiler")
SHARE = 0.3
"""Of the memory that is free, for both pools together."""
BLOCKS_MIN = 64
PAIRS = 4
LENGTH_MIN = 64
REQUESTS, REQUESTS_QUICK = 24, 8
PROMPT, ANSWER = 64, 48
"""Tokens of the requests that measure what surrounds steps, where the model takes that many."""
NOTES = (
    "Seconds of steps are the executor's, greedy sampling and the step's Python included. Decode rows lie around the stated context, a "
    "token further with each repeat. Contexts were not computed beforehand: their KV is zeros. The step overhead is from begin to begin of "
    "live decode steps with one request at a time, less the same step alone: the server's and the worker's own work beside it are in it."
)


async def profile(options: EngineOptions, out: Path, quick: bool) -> Profile:
    """Write `out`, and show what matters most. Raises ConfigError, HeadraceError."""
    check_out(out)
    if options.record is not None:
        raise ConfigError("--record is for serve and generate; profile keeps what it measures in --out")
    found = await wiring.probe(options)
    config, model = wiring.service_config(options, found), wiring.model(options, found)
    limits = limits_of(config, found)
    check_limits(limits)
    lone = lone_step(limits)
    shapes = [lone, *(shape for shape in grid(limits, quick) if shape != lone)]
    total = len(shapes) + PAIRS + len(COPIES) + 2
    with progress_bar(Console(stderr=True), "measurements") as progress:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        made = await _measure(config, model, limits, shapes, tick)
        period_s, around_s = await _live(options, found, config, quick)
        tick()
    made = msgspec.structs.replace(
        made,
        config=wiring.config_of(options),
        step_overhead_s=max(0.0, period_s - median(made.steps[0].seconds)),
        request_overhead_s=max(0.0, around_s),
    )
    await asyncio.to_thread(out.write_bytes, msgspec.json.format(msgspec.json.encode(made)) + b"\n")
    console = Console()
    console.print(f"{made.model} on {made.device}, {made.threads} threads a worker")
    console.print(summary(made))
    console.print(f"wrote {out}")
    return made


def summary(made: Profile) -> Table:
    """Of each kind the smallest and the largest."""
    table = Table()
    table.add_column("what")
    table.add_column("takes", justify="right")
    decodes = [step for step in made.steps if not step.prefills]
    prefills = [step for step in made.steps if not step.decodes and len(step.prefills) == 1]
    for step in (decodes[0], decodes[-1]):
        rows = f"{step.decodes} sequence{'s' if step.decodes != 1 else ''}"
        table.add_row(
            f"decode, {rows}, {step.context:,} tokens of context", _milliseconds(median(step.seconds))
        )
    for step in (prefills[0], prefills[-1]):
        [(count, before)] = step.prefills
        table.add_row(f"prefill, {count:,} tokens behind {before:,}", _milliseconds(median(step.seconds)))
    for pair in made.pairs:
        table.add_row(f"{pair.kind} beside another worker's {pair.beside}", f"{pair.slowdown:.2f} times")
    if made.copies:
        largest = max(made.copies, key=lambda copy: copy.nbytes)
        rate = largest.nbytes / median(largest.seconds) / 1e9
        table.add_row(f"copy, {largest.nbytes / 2**20:.1f} MiB", f"{rate:.1f} GB/s")
    table.add_row("message between processes", _milliseconds(made.message_s))
    table.add_row("around a step", _milliseconds(made.step_overhead_s))
    table.add_row("around a request", _milliseconds(made.request_overhead_s))
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def check_out(out: Path) -> None:
    """Raises ConfigError if it cannot be written."""
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder does not exist")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file")


def limits_of(config: ServiceConfig, found: Probe) -> Limits:
    """What the deployment may run, and what this machine has memory for now."""
    spec = found.spec
    each = sum(spec.block_bytes(g) for g in range(len(spec.groups)))
    return Limits(
        tokens=config.instance.tokens_max,
        sequences=config.instance.sequences_max,
        length=found.length_max,
        blocks=int(available_bytes() * SHARE) // 2 // each,
        block_size=spec.block_size,
    )


async def _measure(
    config: ServiceConfig, model: Model, limits: Limits, shapes: list[Shape], tick: Callable[[], None]
) -> Profile:
    size = model.spec.block_size
    all_shapes = [*shapes, *pair_shapes(limits).values()]
    blocks = min(limits.blocks, max(BLOCKS_MIN, *(shape.blocks(size) for shape in all_shapes)))
    async with rig(config, model, PROFILER, blocks) as measuring:
        steps = await measure_steps(measuring, shapes, tick)
        pairs = await measure_pairs(measuring, limits, tick)
        copies = await measure_copies(measuring, model, blocks, tick)
        message_s = await measure_message(measuring)
        tick()
    return Profile(
        model=model.name,
        config={},
        engine_version=__version__,
        device=processor(),
        threads=config.threads,
        dtype=model.spec.dtype,
        block_size=size,
        steps=tuple(steps),
        pairs=tuple(pairs),
        copies=tuple(copies),
        message_s=message_s,
        notes=NOTES,
    )


def check_limits(limits: Limits) -> None:
    """Raises ConfigError if not even the usual steps fit them."""
    if limits.length < LENGTH_MIN:
        raise ConfigError(
            f"sequences of {limits.length} tokens are too short: {LENGTH_MIN} are needed to profile"
        )
    for shape in (lone_step(limits), *pair_shapes(limits).values()):
        if not limits.allow(shape):
            need = shape.blocks(limits.block_size)
            raise ConfigError(
                f"profiling takes two pools of {need} KV blocks, but the memory that is free has room for {limits.blocks} each"
            )


def lone_step(limits: Limits) -> Shape:
    """The usual step of the requests that measure what surrounds steps."""
    prompt, answer = lengths(limits.length)
    return Shape(decodes=1, context=prompt + answer // 2)


def lengths(length_max: int) -> tuple[int, int]:
    """Prompt and answer of such a request, in a model of this length."""
    return min(PROMPT, length_max // 4), min(ANSWER, length_max // 4)


async def _live(
    options: EngineOptions, found: Probe, config: ServiceConfig, quick: bool
) -> tuple[float, float]:
    """Seconds from step to step, and seconds around a request, from the recording of a real server with one request at a time."""
    prompt, answer = lengths(found.length_max)
    with tempfile.TemporaryDirectory(prefix="headrace-profile-") as folder:
        settings, record = Path(folder) / "settings.yaml", Path(folder) / "record"
        # One worker: what surrounds steps does not depend on how many there are, and each takes its time to start.
        alone = options.model_copy(update={"instances": 1, "prefill": None, "decode": None})
        stated = wiring.settled(alone, found, config.kv_bytes) | {"threads": config.threads}
        await asyncio.to_thread(settings.write_text, yaml.safe_dump(stated))
        async with server(("--config", str(settings), "--record", str(record))) as url:
            load = LoadConfig(
                url=url,
                prompts=REQUESTS_QUICK if quick else REQUESTS,
                concurrency=1,
                input_tokens=prompt,
                output_tokens=answer,
            )
            run = await run_load(load)
        if not run.outcomes.succeeded.all():
            raise HeadraceError(f"the server failed requests: {', '.join(filter(None, run.outcomes.errors))}")
        around_s = float(np.median(run.outcomes.ttft_s())) - await asyncio.to_thread(recorded_ttft_s, record)
        return await asyncio.to_thread(step_period_s, record), around_s


def recorded_ttft_s(record: Path) -> float:
    """Median of a recording, by the service's own clock."""
    lines = (record / TRACE).read_bytes().splitlines()
    requests = [msgspec.json.decode(line, type=RecordedRequest) for line in lines]
    return median((r.choices[0].first_ns - r.arrival_ns) * 1e-9 for r in requests)


def step_period_s(record: Path) -> float:
    """Median from begin to begin of the steps of the worker that ran the most.

    With one request at a time almost each step is a decode step, planned on the one before.
    """
    steps: list[list[int]] = []
    for path in sorted((record / JOURNALS).glob("*.journal")):
        begun = [
            event.result.started_ns
            for instant in JournalReader(path).instants()
            for event in instant.events
            if isinstance(event, StepDone)
        ]
        steps.append(begun)
    longest = max(steps, key=len)
    if len(longest) < 2:
        raise HeadraceError("the server ran no two steps: nothing could be measured between them")
    return median((later - earlier) * 1e-9 for earlier, later in pairwise(longest))

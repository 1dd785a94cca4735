"""Agents that use tools: many short calls over one growing context, with a pause for the tool between them.

Agents of one kind share a long system prompt with the tools' descriptions. Each call's answer (a tool's arguments) and the tool's result
are added to the context; the last call of a task is a longer answer. Some pauses are long: a build, a person who approves.
Leaves out: agents that start others, contexts that are summarised.
"""

import msgspec
import numpy as np

from headrace.types.trace import Trace
from headrace.workload.arrivals import Arrivals, Poisson, instants
from headrace.workload.lengths import Constant, Lengths, Lognormal, Uniform, draw
from headrace.workload.mix import Class, assign, stream
from headrace.workload.sessions import Turns, session_column, spoken
from headrace.workload.settings import Count, Share, Size


class Config(msgspec.Struct, frozen=True):
    tasks: Count = 200
    arrivals: Arrivals = Poisson(rate_per_s=0.5)
    """Of tasks."""
    calls: Lengths = Lognormal(median=12.0, sigma=0.8, max=200)
    """Of one task."""
    kinds: Count = 3
    """Of agents; a tenant each."""
    system: Lengths = Constant(value=4096)
    task: Lengths = Lognormal(median=400.0, sigma=1.0)
    """Tokens of the task's text."""
    result: Lengths = Lognormal(median=600.0, sigma=1.3, max=16_384)
    """Tokens of a tool's result."""
    output: Lengths = Lognormal(median=90.0, sigma=0.8)
    answer: Lengths = Lognormal(median=400.0, sigma=0.8)
    """Tokens of the last call's output."""
    tool_ms: Lengths = Lognormal(median=800.0, sigma=1.2, max=600_000)
    long_share: Share = 0.02
    """Of pauses that are long."""
    long_ms: Lengths = Uniform(low=30_000, high=600_000)
    token_ms: Size = 30.0
    context_max: Count = 131_072
    block_size: Count = 32
    classes: tuple[Class, ...] = ()


def generate(config: Config, seed: int) -> Trace:
    session = session_column(draw(config.calls, config.tasks, stream(seed, "calls")))
    first = np.concatenate(([True], np.diff(session) != 0))
    last = np.concatenate((first[1:], [True]))
    rows = len(session)
    pause_ms = draw(config.tool_ms, rows, stream(seed, "tool"))
    long_ms = draw(config.long_ms, rows, stream(seed, "long"))
    pause_ms = np.where(stream(seed, "which").random(rows) < config.long_share, long_ms, pause_ms)
    task, result = (draw(getattr(config, name), rows, stream(seed, name)) for name in ("task", "result"))
    output, answer = (draw(getattr(config, name), rows, stream(seed, name)) for name in ("output", "answer"))
    turns = Turns(
        session=session,
        message=np.where(first, task, result),
        output=np.where(last, answer, output),
        pause_ns=np.where(first, 0, pause_ms * 1_000_000),
    )
    trace = spoken(
        f"agents, {config.tasks:,} tasks, seed {seed}",
        turns,
        instants(config.arrivals, config.tasks, stream(seed, "arrivals")),
        stream(seed, "kinds").integers(0, config.kinds, config.tasks),
        draw(config.system, config.kinds, stream(seed, "system")),
        block_size=config.block_size,
        context_max=config.context_max,
        token_ns=round(config.token_ms * 1e6),
    )
    return assign(trace, config.classes, seed)

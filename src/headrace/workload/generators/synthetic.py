"""Requests that know nothing of each other: an arrival process and two distributions of lengths. Cheap at millions of rows.

Leaves out: shared prefixes, sessions (see `conversations` and `agents`).
"""

import msgspec

from headrace.types.trace import Trace, make_trace
from headrace.workload.arrivals import Arrivals, Poisson, instants
from headrace.workload.lengths import Lengths, Lognormal, draw, joint
from headrace.workload.mix import Class, assign, stream
from headrace.workload.settings import Count


class Config(msgspec.Struct, frozen=True):
    requests: Count = 1000
    arrivals: Arrivals = Poisson()
    prompt: Lengths = Lognormal(median=512.0)
    output: Lengths = Lognormal(median=128.0)
    file: str = ""
    """A trace whose prompt and output lengths are drawn together, in place of `prompt` and `output`."""
    classes: tuple[Class, ...] = ()
    """What the requests are, by weight; none: one unnamed class."""


def generate(config: Config, seed: int) -> Trace:
    arrival = instants(config.arrivals, config.requests, stream(seed, "arrivals"))
    if config.file:
        prompt, output = joint(config.file, config.requests, stream(seed, "lengths"))
    else:
        prompt = draw(config.prompt, config.requests, stream(seed, "prompt"))
        output = draw(config.output, config.requests, stream(seed, "output"))
    trace = make_trace(f"synthetic, {config.requests:,} requests, seed {seed}", arrival, prompt, output)
    return assign(trace, config.classes, seed)

"""Requests that think before they answer: a long hidden output with a heavy tail, then a short visible one (arXiv 2510.18672).

Hidden tokens are the leading ones of the output; `Trace.hidden` says how many, so that the time to the first visible token is known.
`budget` cuts thinking short, as serving systems do. A share of requests does not think. Leaves out: accuracy, and how it falls
with the budget.
"""

from dataclasses import replace
from typing import Annotated

import msgspec
import numpy as np

from headrace.types.trace import Trace, make_trace
from headrace.workload.arrivals import Arrivals, Gamma, instants
from headrace.workload.lengths import Lengths, Lognormal, draw
from headrace.workload.mix import Class, assign, stream
from headrace.workload.settings import Count, Share


class Config(msgspec.Struct, frozen=True):
    requests: Count = 1000
    arrivals: Arrivals = Gamma(rate_per_s=1.0, shape=0.5)
    prompt: Lengths = Lognormal(median=200.0, sigma=0.9)
    hidden: Lengths = Lognormal(median=1200.0, sigma=1.1, max=65_536)
    visible: Lengths = Lognormal(median=250.0, sigma=0.7)
    share: Share = 0.9
    """Of requests that think."""
    budget: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Hidden tokens at most."""
    classes: tuple[Class, ...] = ()


def generate(config: Config, seed: int) -> Trace:
    rows = config.requests
    hidden = draw(config.hidden, rows, stream(seed, "hidden"))
    hidden = np.where(stream(seed, "which").random(rows) < config.share, hidden, 0)
    if config.budget is not None:
        hidden = np.minimum(hidden, config.budget)
    trace = make_trace(
        f"reasoning, {rows:,} requests, seed {seed}",
        instants(config.arrivals, rows, stream(seed, "arrivals")),
        draw(config.prompt, rows, stream(seed, "prompt")),
        hidden + draw(config.visible, rows, stream(seed, "visible")),
    )
    return assign(replace(trace, hidden=hidden), config.classes, seed)

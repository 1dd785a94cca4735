"""People who talk: conversations of several turns over growing shared prefixes, with times to think, and a system prompt a tenant.

A turn comes when the answer before it has ended (at `token_ms` a token) and the user has thought. Leaves out: users who go on elsewhere in
a conversation, or edit it.
"""

import msgspec
import numpy as np

from headrace.types.trace import Trace
from headrace.workload.arrivals import Arrivals, Poisson, instants
from headrace.workload.lengths import Constant, Lengths, Lognormal, Zipf, draw
from headrace.workload.mix import Class, assign, stream
from headrace.workload.sessions import Turns, session_column, spoken
from headrace.workload.settings import Count, Size


class Config(msgspec.Struct, frozen=True):
    conversations: Count = 1000
    arrivals: Arrivals = Poisson()
    """Of conversations."""
    turns: Lengths = Zipf(exponent=1.2, max=20)
    system: Lengths = Constant(value=512)
    """Tokens of each tenant's system prompt."""
    tenants: Count = 4
    tenant_skew: Size = 1.0
    """Tenants' shares go with 1 / rank^skew; 0: alike."""
    message: Lengths = Lognormal(median=64.0, sigma=1.2)
    """New tokens of a turn's prompt."""
    first: Lengths | None = None
    """Those of the first turn; None: as `message`."""
    output: Lengths = Lognormal(median=192.0, sigma=0.9)
    think_ms: Lengths = Lognormal(median=15_000.0, sigma=1.0, max=3_600_000)
    token_ms: Size = 30.0
    context_max: Count = 32_768
    """Prompt and answer of the last turn fit in it."""
    end_s: Size | None = None
    """What would come later is left out, as at the end of a recording."""
    block_size: Count = 32
    classes: tuple[Class, ...] = ()


def generate(config: Config, seed: int) -> Trace:
    begin = instants(config.arrivals, config.conversations, stream(seed, "arrivals"))
    session = session_column(draw(config.turns, config.conversations, stream(seed, "turns")))
    pause_ns = draw(config.think_ms, len(session), stream(seed, "think")) * 1_000_000
    begins = np.concatenate(([True], np.diff(session) != 0))
    pause_ns[begins] = 0
    message = draw(config.message, len(session), stream(seed, "message"))
    if config.first is not None:
        message[begins] = draw(config.first, config.conversations, stream(seed, "first"))
    turns = Turns(
        session=session,
        message=message,
        output=draw(config.output, len(session), stream(seed, "output")),
        pause_ns=pause_ns,
    )
    shares = np.arange(1, config.tenants + 1, dtype=np.float64) ** -config.tenant_skew
    tenant = stream(seed, "tenants").choice(config.tenants, config.conversations, p=shares / shares.sum())
    trace = spoken(
        f"conversations, {config.conversations:,}, seed {seed}",
        turns,
        begin,
        tenant,
        draw(config.system, config.tenants, stream(seed, "system")),
        block_size=config.block_size,
        context_max=config.context_max,
        token_ns=round(config.token_ms * 1e6),
        end_ns=None if config.end_s is None else round(config.end_s * 1e9),
    )
    return assign(trace, config.classes, seed)

"""What the pieces of one instance share."""

from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.engine.memory import Memory
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence
from headrace.nodes.limits import InstanceConfig
from headrace.nodes.receiving import Receiving
from headrace.nodes.sending import Sending
from headrace.nodes.swapping import Swapping
from headrace.types.ids import Address, SequenceKey
from headrace.types.kv import KVSpec
from headrace.types.messages import AnyMessage


@dataclass(slots=True, eq=False)
class Parts:
    router: Address
    pool: Address
    spec: KVSpec
    config: InstanceConfig
    memory: Memory
    scheduler: Scheduler
    sending: Sending
    receiving: Receiving
    swapping: Swapping
    send: Callable[[Address, AnyMessage], None]
    sequences: dict[SequenceKey, Sequence] = field(default_factory=dict[SequenceKey, Sequence])
    deadlines: dict[SequenceKey, int] = field(default_factory=dict[SequenceKey, int])
    """Of sequences that wait for somebody else: held, receiving, fencing."""

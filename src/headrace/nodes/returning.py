"""What a decode instance has generated goes back to where the prompt was computed (MemServe, arXiv 2406.17565, section 5).

 1. A request ends at its decode instance, whose pool keeps its full blocks as cache: `Keep` names the whole chain to the prefill instance.
 2. That one looks up what its own pool lacks of it, takes blocks for that, and fetches them as it would for a sequence (`nodes.fetching`):
    its request for them is the target's allocation, what comes is indexed as it arrives, and nobody waits for either.
 3. What came is published and stays as cache; nothing is held for it any more.
Where memory is pressed, or too much is under way already, nothing is fetched. With one pool for both there is nothing to return.
"""

from collections.abc import Callable

from headrace.engine.memory import Memory
from headrace.engine.sequence import Sequence
from headrace.nodes.fetching import Fetching
from headrace.types.ids import Address, SequenceKey
from headrace.types.messages import AnyMessage, InstanceInfo, Keep, Returned, Role
from headrace.types.request import NEVER_NS

KEEPS_MAX = 16
"""Chains on the way here at once."""


class Returning:
    """`free` gives up what a chain has locked and leased."""

    def __init__(
        self,
        router: Address,
        memory: Memory,
        fetching: Fetching,
        send: Callable[[Address, AnyMessage], None],
        free: Callable[[Sequence], None],
    ) -> None:
        self._router = router
        self._memory = memory
        self._fetching = fetching
        self._send = send
        self._free = free
        self._coming: dict[SequenceKey, Sequence] = {}
        """Chains that are being fetched, each as a sequence that never runs."""

    @property
    def idle(self) -> bool:
        return not self._coming

    def get(self, key: SequenceKey) -> Sequence | None:
        """The chain that comes under this key."""
        return self._coming.get(key)

    # The decode instance

    def ended(self, sequence: Sequence) -> None:
        """Its last token is drawn, or nobody wants more."""
        if sequence.prefiller is None:
            return
        known = (sequence.total - sequence.emitted) // self._memory.spec.block_size
        blocks = min(sequence.published)
        if blocks > known:
            self._send(sequence.prefiller, Keep(sequence.key, tuple(sequence.hashes[:blocks])))
        sequence.prefiller = None

    # The prefill instance

    def keep(self, source: Address, message: Keep, peer: InstanceInfo | None) -> None:
        """Somebody has a chain that may be of use here."""
        memory, key = self._memory, message.key
        # No sequence has this key: attempts are counted from 0.
        chain = Sequence(
            key=SequenceKey(key.request, key.choice, -1 - key.attempt),
            role=Role.WHOLE,
            arrival_ns=0,
            deadline_ns=NEVER_NS,
            priority=0,
            history=0,
            emits_max=0,
            source=None,
            total=len(message.hashes) * memory.spec.block_size + 1,
            hashes=list(message.hashes),
            tables=[[] for _ in memory.spare],
            published=[0] * len(memory.spare),
            trimmed=[0] * len(memory.spare),
        )
        if memory.pressed or memory.short or len(self._coming) >= KEEPS_MAX or chain.key in self._coming:
            return
        if self._fetching.begin(chain, source, peer):
            self._coming[chain.key] = chain

    def came(self, chain: Sequence) -> None:
        """All of it is here and published that will be."""
        del self._coming[chain.key]
        tokens = self._fetching.brought(chain.key)
        if tokens:
            moved = self._fetching.bytes_brought(chain.key)
            self._send(self._router, Returned(chain.key, tokens, moved))
        self._free(chain)

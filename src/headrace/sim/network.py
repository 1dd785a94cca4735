"""Messages and block writes between nodes, with the freedom that the design gives a real network, and no more.

Messages: in order per pair of incarnations, any order between pairs, each at least 1 ns under way. What a dead incarnation had sent may be
lost (from some message on) or arrive late, even after its `PeerLost`; what is sent to a dead one is lost.
Writes: any order, and memory is read and written at some moment before `Written`. A failed one leaves part of its blocks behind. `Landed`
comes no earlier than the memory and no later than `Written`, which is what an acknowledgement proves. A dead source's writes reach memory
(and are told) before anybody hears of its death, or never; a dead target's memory is still there, because the pool's process lives on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from headrace.sim.loop import Loop
from headrace.sim.nodes import Node, Worker
from headrace.sim.rng import KeyedRng
from headrace.types.events import Landed, Write, Written
from headrace.types.messages import AnyMessage
from headrace.types.payload import Emission, SequencePayload

Attachment = SequencePayload | tuple[Emission, ...] | None
"""What a shell adds to a message: ids that no core sees."""


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    latency_ns: int = 5_000
    """Most messages take up to this."""
    late_ns: int = 200_000
    """Late ones take up to this."""
    late_share: float = 0.0
    write_ns: int = 20_000
    """A write takes up to this."""
    failed_share: float = 0.0
    """Of writes."""


class Network:
    def __init__(self, loop: Loop, rng: KeyedRng, config: NetworkConfig) -> None:
        self.config = config
        self.deliver: Callable[[Node, Node, AnyMessage, Attachment], None]
        """Set by the shell: a message has arrived."""
        self.on_copy: Callable[[Worker, Write], None] = lambda target, write: None
        """Told just before a write reaches memory."""
        self._loop = loop
        self._rng = rng
        self._last: dict[tuple[int, int], int] = {}
        self._serial = 0

    def heal(self) -> None:
        """No message is late and no write fails from now on."""
        self.config = replace(self.config, late_share=0.0, failed_share=0.0)

    def hold_until(self, source: Node, target: Node, at_ns: int) -> None:
        """No message of this pair arrives before: the target has not heard of the source yet."""
        pair = (source.index, target.index)
        self._last[pair] = max(self._last.get(pair, 0), at_ns)

    def delay_ns(self, *key: int) -> int:
        """How long one message takes."""
        draw = self._rng.uniform("latency", *key)
        late = self.config.late_share
        if draw < late:
            return 1 + int(draw / late * self.config.late_ns)
        return 1 + int((draw - late) / (1 - late) * self.config.latency_ns)

    def send(self, source: Node, target: Node, message: AnyMessage, attachment: Attachment) -> None:
        self._serial += 1
        pair = (source.index, target.index)
        at_ns = max(self._loop.now_ns + self.delay_ns(self._serial), self._last.get(pair, 0))
        self._last[pair] = at_ns
        self._loop.at(at_ns, self._arrive, source, target, message, attachment)

    def _arrive(self, source: Node, target: Node, message: AnyMessage, attachment: Attachment) -> None:
        now_ns = self._loop.now_ns
        if not target.alive:
            return
        if not source.alive:
            lasts = self._rng.uniform("last words", source.index, target.index)
            if now_ns > source.died_ns + int(lasts * 2 * self.config.late_ns):
                return
        self.deliver(source, target, message, attachment)

    # Writes

    def write(self, source: Worker, target: Worker, write: Write) -> None:
        rng, now_ns = self._rng, self._loop.now_ns
        key = (source.index, write.write)
        span = self.config.write_ns * (1 + write.count)
        copied_ns = now_ns + 1 + int(rng.uniform("write", *key) ** 2 * span)
        told_ns = copied_ns + int(rng.uniform("landed", *key) ** 4 * span)
        written_ns = told_ns + int(rng.uniform("written", *key) ** 2 * span)
        ok = rng.uniform("write fails", *key) >= self.config.failed_share
        count = write.count if ok else rng.between(0, write.count, "write stops", *key)
        self._loop.at(copied_ns, self._copy, source, target, write, count)
        if ok:
            self._loop.at(told_ns, self._landed, source, target, write)
        self._loop.at(written_ns, self._written, source, write, ok)

    def _copy(self, source: Worker, target: Worker, write: Write, count: int) -> None:
        if self._reaches(source):
            self.on_copy(target, write)
            target.memory.copy_from(source.memory, write.group, write.source_first, write.target_first, count)

    def _landed(self, source: Worker, target: Worker, write: Write) -> None:
        if self._reaches(source):
            target.receive(Landed(write.slot, write.weight), self._loop.now_ns)

    def _written(self, source: Worker, write: Write, ok: bool) -> None:
        source.receive(Written(write.write, ok), self._loop.now_ns)

    def _reaches(self, source: Worker) -> bool:
        """May a write of this source touch memory now? For some time between its death and its discovery, perhaps."""
        if source.alive:
            return True
        share = self._rng.uniform("last write", source.index)
        return self._loop.now_ns <= source.died_ns + int(share * (source.found_ns - source.died_ns))

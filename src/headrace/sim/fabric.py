"""The network of the timing simulation: messages take what their distance says, KV flows share links (`sim.flows`).

Messages of one node to another in one instant travel together, and arrive in order.
"""

from collections.abc import Callable
from typing import Any

from headrace.sim.flows import Flows
from headrace.sim.loop import Loop
from headrace.sim.nodes import Node, Worker
from headrace.sim.topology import Links
from headrace.types.events import Landed, Write, Written
from headrace.types.messages import AnyMessage

Envelope = tuple[Node, Node, list[tuple[AnyMessage, Any]]]
Place = tuple[int, int]
"""Host, and device of it."""


class Fabric:
    """Implements `sim.shell.Carrier`. Nodes whose names are not in `places` (the router, pools) are near everybody."""

    def __init__(
        self,
        loop: Loop,
        links: Links,
        places: dict[str, Place],
        *,
        message_ns: int,
        block_bytes: tuple[int, ...],
        layers: tuple[int, ...],
    ) -> None:
        """`block_bytes` and `layers` are of each KV group."""
        self.deliver: Callable[[Node, Node, AnyMessage, Any], None]
        self.flows = Flows(loop, links.capacities)
        self.flows.follow(links.changes())
        self._loop = loop
        self._links = links
        self._places = places
        self._message_ns = max(1, message_ns)
        self._block_bytes = block_bytes
        self._layers = layers
        self._latest: dict[tuple[int, int], tuple[int, Envelope]] = {}
        self._distances: dict[tuple[int, int], int] = {}
        self._not_before: dict[tuple[int, int], int] = {}

    def send(self, source: Node, target: Node, message: AnyMessage, attachment: Any) -> None:
        now_ns = self._loop.now_ns
        pair = (source.index, target.index)
        latest = self._latest.get(pair)
        if latest is not None and latest[0] == now_ns:
            latest[1][2].append((message, attachment))
            return
        envelope = (source, target, [(message, attachment)])
        self._latest[pair] = (now_ns, envelope)
        at_ns = now_ns + self.distance_ns(source, target)
        if self._not_before:
            at_ns = max(at_ns, self._not_before.get(pair, 0))
        self._loop.at(at_ns, self._arrive, envelope)

    def delay_ns(self, *key: int) -> int:
        """Of what is asked of a node's machine."""
        return self._message_ns

    def distance_ns(self, source: Node, target: Node) -> int:
        """From one node's settle to the other's."""
        pair = (source.index, target.index)
        distance_ns = self._distances.get(pair)
        if distance_ns is None:
            here, there = self._places.get(source.address.name), self._places.get(target.address.name)
            distance_ns = self._message_ns
            if here is not None and there is not None and here[0] != there[0]:
                distance_ns += self._links.path(here, there).latency_ns
            self._distances[pair] = distance_ns
        return distance_ns

    def hold_until(self, source: Node, target: Node, at_ns: int) -> None:
        """No message of this pair arrives before: the target has not heard of the source yet."""
        self._not_before[(source.index, target.index)] = at_ns

    def _arrive(self, envelope: Envelope) -> None:
        source, target, messages = envelope
        if target.alive:
            for message, attachment in messages:
                self.deliver(source, target, message, attachment)

    # Writes

    def write(self, source: Worker, target: Worker, write: Write) -> None:
        """Counted at the target when its last byte is there; the source hears of it one message later."""
        path = self._links.path(self._places[source.address.name], self._places[target.address.name])
        layers = self._layers[write.group]
        nbytes = write.count * self._block_bytes[write.group] * (write.layers or layers) // layers

        def done() -> None:
            if source.alive:
                target.receive(Landed(write.slot, write.weight, source.address), self._loop.now_ns)
                self._loop.at(
                    self._loop.now_ns + self.distance_ns(source, target), self._written, source, write
                )

        self.flows.start(path.links, nbytes, done, path.latency_ns)

    def _written(self, source: Worker, write: Write) -> None:
        source.receive(Written(write.write, ok=True), self._loop.now_ns)

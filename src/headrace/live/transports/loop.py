"""In this process, in random order: every completion that a network could show, for tests.

Whatever engines of one `Switch` do to each other waits there; a keyed draw picks what happens next. A shard leaves, and some time
later lands: its bytes and its note in one step.
Leaves out: delay, threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import pack

from headrace.live.transfer.copying import copy
from headrace.live.transfer.outgoing import Turns
from headrace.live.transfer.regions import Card, Descriptor, Region
from headrace.live.transports import Settings, Shard, Site, Upward
from headrace.types.ids import Address


@dataclass(eq=False, slots=True)
class Waiting:
    """Something that will happen."""

    link: "Link"
    lane: int
    """-1: not a shard."""
    happen: Callable[[], None]


class Switch:
    """What connects the engines. `held(source, lane)`: do shards of this lane wait for ever?"""

    def __init__(self, turns: Turns, seed: int = 0) -> None:
        self.transports: dict[Address, Transport] = {}
        self.held: Callable[[Address, int], bool] = lambda _source, _lane: False
        self._turns = turns
        self._seed = seed
        self._serial = 0
        self._stepping = False
        self._waiting: list[Waiting] = []

    def put(self, waiting: Waiting) -> None:
        self._waiting.append(waiting)
        self.release()

    def release(self) -> None:
        """Go on, as `held` may have changed."""
        if not self._stepping:
            self._stepping = True
            self._turns.call_soon_threadsafe(self._step)

    def _step(self) -> None:
        """One of them happens; what it leads to on the engines' thread comes before the next."""
        self._stepping = False
        free = [w for w in self._waiting if w.lane < 0 or not self.held(w.link.source, w.lane)]
        if not free:
            return
        self._serial += 1
        drawn = int.from_bytes(
            blake2b(pack("<qq", self._seed, self._serial), digest_size=8).digest(), "little"
        )
        waiting = free[drawn % len(free)]
        self._waiting.remove(waiting)
        waiting.happen()
        self.release()


class Link:
    """Both ends in one: `transports.Link` and `transports.Inbound`."""

    def __init__(
        self, switch: Switch, source: Address, peer: Address, generation: int, upward: Upward
    ) -> None:
        self.source = source
        self.generation = generation
        self._switch = switch
        self._peer = peer
        self._upward = upward
        self._moved: dict[int, int] = {}
        self._granted: dict[int, Region] = {}
        self._site: Site | None = None
        self._open = True

    def begin(self) -> None:
        transport = self._switch.transports.get(self._peer)
        if transport is None or transport.site is None:
            self._upward.broken(f"{self._peer} does not listen", -1, final=False)
        else:
            self._site = transport.site
            transport.site.opened(self)

    # The source's end

    def write(self, shard: Shard) -> None:
        self._later(lambda: self._begin(shard), shard.lane)

    def send(self, message: bytes) -> None:
        self._later(lambda: self._at().mailed(self, message))

    def attach(self, descriptor: Descriptor, fds: Sequence[int]) -> None:
        assert descriptor.region in self._granted and not fds

    def moved(self, lane: int) -> int:
        return self._moved.get(lane, 0)

    def close(self, closed: Callable[[], None]) -> None:
        if self._open:
            self._open = False
            # The target hears of it at some time, or first of the next link.
            self._switch.put(Waiting(self, -1, self._tell_target))
        closed()

    # The target's end

    def accept(self) -> None:
        self._later(self._upward.up)

    def refuse(self, reason: str) -> None:
        self._later(lambda: self._upward.broken(reason, -1, final=True))

    def grant(self, region: Region) -> Sequence[int]:
        self._granted[region.number] = region
        return ()

    def reply(self, message: bytes, fds: Sequence[int] = ()) -> None:
        self._later(lambda: self._upward.replied(message, fds))

    def sever(self, gone: Callable[[], None]) -> None:
        if self._open:
            self._open = False
            self._switch.put(
                Waiting(self, -1, lambda: self._upward.broken("its target closed it", -1, final=False))
            )
        gone()

    def _later(self, happen: Callable[[], None], lane: int = -1) -> None:
        def unless_closed() -> None:
            if self._open:
                happen()

        self._switch.put(Waiting(self, lane, unless_closed))

    def _begin(self, shard: Shard) -> None:
        if shard.dropped:
            self._upward.dropped(shard)
        else:
            self._later(lambda: self._land(shard), shard.lane)

    def _land(self, shard: Shard) -> None:
        if shard.source is not None and shard.target is not None and len(shard.pieces):
            copy(shard.source, self._granted[shard.target.region], shard.pieces)
        self._moved[shard.lane] = self._moved.get(shard.lane, 0) + 1
        self._at().landed(self, shard.note)

    def _at(self) -> Site:
        assert self._site is not None, "nothing is sent by a link that is not up"
        return self._site

    def _tell_target(self) -> None:
        if self._site is not None:
            self._site.broken(self, "its source closed it")


class Transport:
    one_host = True

    def __init__(self, settings: Settings, switch: Switch) -> None:
        self.site: Site | None = None
        self._settings = settings
        self._switch = switch

    def listen(self, site: Site) -> tuple[str, ...]:
        self.site = site
        self._switch.transports[self._settings.address] = self
        return (str(self._settings.address),) * self._settings.lanes

    def register(self, region: Region) -> None:
        pass

    def unregister(self, region: Region) -> None:
        pass

    def link(self, peer: Card, generation: int, upward: Upward) -> Link:
        link = Link(self._switch, self._settings.address, peer.owner, generation, upward)
        self._switch.put(Waiting(link, -1, link.begin))
        return link

    def close(self) -> None:
        self.site = None
        self._switch.transports.pop(self._settings.address, None)

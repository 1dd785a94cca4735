"""The workers of a service, and the hub through which they talk.

Life cycle of a worker as its peers see it (`live.members` has that of its process):
 0. One that was started by hand on another host (`live.joining`) says `Apply` before it loads anything. The team checks what it would
    load, and offers it a name, an epoch and a pool's number. The pool's memory is its own; the pool's core runs here, from 2 to 3.
 1. It says `Hello`. The team checks what it has loaded (`live.terms`), and admits or refuses it.
 2. Admitted: the pools hear of it first, then the worker itself, then its peers and the router (see `types.events.PeerUp`).
 3. Lost: nothing that it said is heard from now on, and everybody is told.
"""

import asyncio
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from socket import AF_INET6, AI_PASSIVE, SOCK_STREAM, getaddrinfo
from time import monotonic_ns
from typing import Protocol

import zmq
from msgspec.structs import replace

from headrace.live import wire
from headrace.live.bus import HUB, Hub
from headrace.live.cores import ROUTER, Cores
from headrace.live.keys import Keys, door_of
from headrace.live.launch.local import Launcher
from headrace.live.members import Member, Members, State
from headrace.live.pools import layout_of
from headrace.live.settings import (
    Model,
    PoolLayout,
    ServiceConfig,
    SharedPool,
    WorkerConfig,
    WorkerSettings,
    lease_blocks,
)
from headrace.live.terms import Terms
from headrace.live.transports import AUTO
from headrace.types.errors import ConfigError, IncompatiblePeer
from headrace.types.events import DrainAsked, PeerLost, PeerUp
from headrace.types.ids import Address
from headrace.types.messages import AnyMessage, Report
from headrace.types.service import InstanceStatus
from headrace.types.weights import Staged

log = logging.getLogger(__name__)

NAME_MAX = 200
"""Characters of a worker's name."""
LEAVE_S = 2.0
"""Workers have so long to leave before they are killed."""


class Owner(Protocol):
    """Who wants to know. All are called on the loop's thread."""

    def told(self, source: Address, target: Address, message: AnyMessage, payload: bytes) -> None:
        """A worker has sent this to one of the cores of this process."""
        ...

    def member_changed(self, member: Member) -> None:
        """Its state is a new one."""
        ...

    def busy(self) -> bool:
        """There is work."""
        ...

    def joining(self, member: Member, version: int) -> None:
        """A worker with these weights is about to be welcomed."""
        ...

    def lost(self, worker: Address) -> None:
        """A worker that was welcomed has ended."""
        ...

    def prepared(self, worker: Address, message: wire.Prepared) -> None:
        """A worker has made new weights ready, or could not."""
        ...

    def weights(self) -> Staged | None:
        """What workers that start now begin with; None: their folder's."""
        ...

    def fail(self, error: Exception) -> None:
        """The hub cannot go on."""
        ...


class Team:
    """See the module. Implements `members.Watcher`."""

    def __init__(
        self,
        config: ServiceConfig,
        model: Model,
        cores: Cores,
        terms: Terms,
        owner: Owner,
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        threads: int,
        journals: str,
        keys: Keys | None,
    ) -> None:
        """`command` starts a worker of so many threads; `environment` is added to what it has; `keys` are of the door, if there is one."""
        self._config = config
        self._model = replace(model, tensors=())
        self._cores = cores
        self._terms = terms
        self._owner = owner
        self._threads = threads
        self._journals = journals
        self._keys = keys
        self.door = ""
        """Where it listens for workers of other hosts, HOST:PORT; empty: nowhere."""
        self._secret = secrets.token_hex(16)
        self._past = wire.WorkerCounts()
        """Of incarnations that have ended."""
        infos = {w.name: cores.info(index) for index, w in enumerate(config.workers)}
        self._hub = Hub(self._greet, self._receive, owner.fail)
        self.members = Members(config, infos, self)
        self.launcher = Launcher(command, environment, self._configure, self.members.ended)
        self.members.launcher = self.launcher

    @property
    def counts(self) -> wire.WorkerCounts:
        """Since the start, of all incarnations."""
        total = self._past
        for member in self.members:
            total = total.plus(member.counts)
        return total

    def start(self) -> None:
        """Listen, if it is to, and start all workers; the owner hears of each change. Raises ConfigError."""
        if self._config.listen:
            self._listen()
        self.members.start_all()

    def _listen(self) -> None:
        """Raises ConfigError naming the flag."""
        assert self._keys is not None
        listen = self._config.listen
        host, port = door_of(listen, "--listen", port_min=0)
        try:
            family, _, _, _, where = getaddrinfo(host, port, type=SOCK_STREAM, flags=AI_PASSIVE)[0]
            at = f"[{where[0]}]" if family == AF_INET6 else where[0]
            silence_ms = max(1, self._config.silence_ns // 1_000_000)
            bound = self._hub.open_door(f"tcp://{at}:{port}", self._keys, silence_ms, self._knock, self._gone)
        except (OSError, zmq.ZMQError) as error:
            raise ConfigError(f"--listen {listen}: {error.strerror or error}") from error
        self.door = f"{host}:{bound.rpartition(':')[2]}"
        log.info("workers of other hosts join at %s", self.door)

    async def stop(self) -> None:
        """Tell all workers to leave, kill those that do not, and close the hub."""
        try:
            for member in self.members:
                if member.state is State.READY:
                    self._hub.send(HUB, member.address, wire.Leave())
                else:
                    self.launcher.kill(member.address)
            self.members.stop()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.launcher.empty.wait(), LEAVE_S)
            self.launcher.kill_all()
            await self.launcher.empty.wait()
        finally:
            self._hub.close()

    def send(self, source: Address, target: Address, message: AnyMessage, payload: bytes) -> None:
        """To a worker; dropped if it is not up."""
        self._hub.send(source, target, message, payload)

    def tell(self, worker: Address, message: wire.Control) -> None:
        """The same, from the hub itself."""
        self._hub.send(HUB, worker, message)

    def kill(self, peer: Address) -> None:
        why = "did not confirm that it stopped writing"
        member = self.members.at(peer)
        if member is not None and member.host:
            self.members.expel(member, why)
            return
        log.error("%s %s: killed", peer, why)
        self.launcher.kill(peer)

    def statuses(self) -> tuple[InstanceStatus, ...]:
        return tuple(_status_of(member, self.launcher.pid(member.address)) for member in self.members)

    # What `members.Members` wants

    def member_lost(self, member: Member) -> None:
        """Its process has ended: nothing that it said is heard from now on, and everybody is told."""
        self._hub.dismiss(member.address)
        self._owner.lost(member.address)
        self._past = self._past.plus(member.counts)
        member.counts = wire.WorkerCounts()
        self._cores.post_all(PeerLost(member.address, member.info))
        lost = _as_peer(member)
        for peer in self.members:
            if peer is not member and peer.state is State.READY:
                self._hub.send(HUB, peer.address, wire.PeerLeft(lost))
        if member.host:
            self._cores.drop_pool(member.info)

    def member_expelled(self, member: Member, why: str) -> None:
        self._hub.dismiss(member.address, f"it {why}")

    def member_changed(self, member: Member) -> None:
        if member.host and member.state is State.STOPPED:
            self._hub.dismiss(member.address)
        self._owner.member_changed(member)

    def ping(self, address: Address) -> None:
        self._hub.send(HUB, address, wire.Ping(monotonic_ns()))

    def busy(self) -> bool:
        return self._owner.busy()

    # Workers of other hosts

    def _knock(self, visitor: bytes, apply: wire.Apply) -> None:
        try:
            self._terms.consider(apply)
            check_worker(apply.name, apply.leaning)
            if len(apply.blocks) != len(self._model.spec.groups) or min(apply.blocks) < 1:
                raise IncompatiblePeer(f"a pool of {apply.blocks} blocks does not fit the model")
            name = self.members.free_name(apply.name, apply.leaning, apply.host)
        except (IncompatiblePeer, ConfigError) as error:
            log.warning("a worker of %s was turned away: %s", apply.host, error)
            self._hub.turn_away(visitor, str(error), again=False)
            return
        except KeyError:
            # Perhaps its own former life, whose end we have not seen yet.
            self._hub.turn_away(visitor, f"a worker named {apply.name} is here", again=True)
            return
        info = self._cores.joining(apply.leaning, apply.blocks, apply.host)
        member = self.members.enlist(WorkerSettings(name=name, leaning=apply.leaning), info, apply.host)
        log.info("%s of %s has applied", member.address, member.host)
        instance = replace(self._config.instance, lease_blocks=lease_blocks(min(apply.blocks), 1))
        config = self._config_of(member.address, -1, layout_of(self._model.spec, apply.blocks))
        # Memory that it maps could not be fenced: nobody here can end its process.
        transport = AUTO[-1] if config.transfer.transport == "auto" else config.transfer.transport
        transfer = replace(config.transfer, transport=transport)
        offer = replace(
            config, parent=0, endpoint="", threads=0, options={}, instance=instance, transfer=transfer
        )
        self._hub.offer(visitor, wire.Invitation(offer))
        self.members.watch()

    def _gone(self, address: Address) -> None:
        member = self.members.at(address)
        if member is not None:
            self.members.gone(member, "its connection has ended")

    # What workers say

    def _greet(self, source: Address, hello: wire.Hello) -> None:
        member = self.members.at(source)
        if member is None or hello.secret != self._secret:
            log.warning("%s is none of ours: not heard", source)
            return
        if member.state is not State.STARTING:
            # Too late: it is being ended.
            return
        try:
            self._terms.accept(hello)
            if member.host and hello.version != self._terms.version:
                raise IncompatiblePeer(
                    f"the service has pushed weights of version {self._terms.version}, which lie in memory of its own host"
                )
        except IncompatiblePeer as error:
            self._hub.refuse(source, str(error))
            self.members.refused(member, str(error))
            return
        member.place = hello.place
        member.info = replace(member.info, version=hello.version)
        self._join(member)

    def _join(self, member: Member) -> None:
        """Pools hear of it first, then the worker itself, then its peers and the router: see `types.events.PeerUp`."""
        newcomer = _as_peer(member)
        ready = [m for m in self.members if m.state is State.READY]
        peers = [_as_peer(m) for m in ready]
        event = PeerUp(member.address, member.info)
        if member.host:
            log.info("%s of %s has joined", member.address, member.host)
            self._cores.add_pool(member.info, {m.address: m.info for m in ready})
        self._cores.post_pools(event)
        self._hub.admit(member.address)
        self._owner.joining(member, member.info.version)
        self._hub.send(HUB, member.address, wire.Welcome(tuple(peers), monotonic_ns()))
        for peer in peers:
            self._hub.send(HUB, peer.address, wire.PeerJoined(newcomer))
        self._cores.post(ROUTER, event)
        self.members.ready(member)

    def _receive(
        self, source: Address, target: Address, message: AnyMessage | wire.Control, payload: bytes
    ) -> None:
        member = self.members.at(source)
        if member is None:
            return
        self.members.heard(member)
        match message:
            case wire.Pong(step_ns):
                self.members.pong(member, step_ns)
            case wire.Retire():
                self._cores.post(ROUTER, DrainAsked(source))
            case wire.Farewell() if member.host:
                self.members.gone(member, "it was told to end, and has finished what it had")
            case Report():
                member.report = message
                member.counts = wire.decode_payload(payload, wire.WorkerCounts)
            case wire.Prepared():
                self._owner.prepared(source, message)
            case _:
                pass
        if not isinstance(message, wire.Control):
            self._owner.told(source, target, message, payload)

    def _configure(self, address: Address) -> WorkerConfig:
        """Of a worker of this host."""
        pool = self._cores.pools[self.members.by_name[address.name].info.pool]
        return self._config_of(address, pool.fd, pool.layout)

    def _config_of(self, address: Address, fd: int, layout: PoolLayout) -> WorkerConfig:
        config, info = self._config, self.members.by_name[address.name].info
        # Pushed weights lie in memory of this host.
        weights = None if self.members.by_name[address.name].host else self._owner.weights()
        info = replace(info, version=0 if weights is None else weights.version)
        return WorkerConfig(
            address=address,
            parent=os.getpid(),
            endpoint=self._hub.endpoint,
            secret=self._secret,
            router=ROUTER,
            info=info,
            model=self._model,
            pool=SharedPool(info.pool, fd, layout),
            engine=config.engine,
            instance=config.instance,
            transfer=config.transfer,
            threads=self._threads,
            report_ns=config.report_ns,
            journals=self._journals,
            options=config.options,
            weights=weights,
        )


def _as_peer(member: Member) -> wire.Member:
    """Of one that is, or was, ready."""
    assert member.place is not None
    return wire.Member(member.address, member.info, member.place)


def check_names(config: ServiceConfig) -> None:
    """Raises ConfigError for workers whose names or leanings cannot be."""
    names = [w.name for w in config.workers]
    if not names and not config.listen:
        raise ConfigError("a service needs at least one worker, or --listen for those of other hosts")
    for worker in config.workers:
        if names.count(worker.name) > 1 or not worker.name:
            raise ConfigError(f"worker name {worker.name!r} is taken")
        check_worker(worker.name, worker.leaning)


def check_worker(name: str, leaning: str) -> None:
    """Raises ConfigError. An empty name is any."""
    plain = name.replace("-", "").replace("_", "")
    taken = name in (ROUTER.name, HUB.name) or (name.startswith("pool") and name[4:].isdigit())
    if taken or (name and not (plain.isascii() and plain.isalnum())) or len(name) > NAME_MAX:
        raise ConfigError(f"worker name {name!r} is taken, or not of letters, digits, '-' and '_'")
    if leaning not in ("prefill", "decode", "mixed"):
        raise ConfigError(f"worker {name}: leaning {leaning!r} is none of prefill, decode, mixed")


def _status_of(member: Member, pid: int | None) -> InstanceStatus:
    draining = member.report is not None and member.report.draining and member.state is State.READY
    return InstanceStatus(
        name=member.settings.name,
        epoch=member.epoch,
        leaning=member.settings.leaning,
        state="draining" if draining else member.state.value,
        pid=pid,
        report=member.report,
        host=member.host,
        ranges=member.counts.ranges,
    )

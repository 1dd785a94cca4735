"""The workers of a service, and the hub through which they talk.

Life cycle of a worker as its peers see it (`live.members` has that of its process):
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
from typing import Protocol

from headrace.live import wire
from headrace.live.bus import HUB, Hub
from headrace.live.cores import ROUTER, Cores
from headrace.live.launch.local import Launcher
from headrace.live.members import Member, Members, State
from headrace.live.settings import Model, ServiceConfig, SharedPool, WorkerConfig
from headrace.live.terms import Terms
from headrace.types.errors import ConfigError, IncompatiblePeer
from headrace.types.events import PeerLost, PeerUp
from headrace.types.ids import Address
from headrace.types.messages import AnyMessage, Report
from headrace.types.service import InstanceStatus

log = logging.getLogger(__name__)

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
    ) -> None:
        """`command` starts a worker of so many threads; `environment` is added to what it has."""
        self._config = config
        self._model = model
        self._cores = cores
        self._terms = terms
        self._owner = owner
        self._threads = threads
        self._journals = journals
        self._secret = secrets.token_hex(16)
        self._preemptions = 0
        """Of incarnations that have ended."""
        infos = {w.name: cores.info(index) for index, w in enumerate(config.workers)}
        self._hub = Hub(self._greet, self._receive, owner.fail)
        self.members = Members(config, infos, self)
        self.launcher = Launcher(command, environment, self._configure, self.members.ended)
        self.members.launcher = self.launcher

    @property
    def preemptions(self) -> int:
        """Since the start, of all incarnations."""
        return self._preemptions + sum(m.preemptions for m in self.members)

    def start(self) -> None:
        """Start all workers; the owner hears of each change."""
        self.members.start_all()

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

    def kill(self, peer: Address) -> None:
        log.error("%s did not confirm that it stopped writing: killed", peer)
        self.launcher.kill(peer)

    def statuses(self) -> tuple[InstanceStatus, ...]:
        return tuple(_status_of(member, self.launcher.pid(member.address)) for member in self.members)

    # What `members.Members` wants

    def member_lost(self, member: Member) -> None:
        """Its process has ended: nothing that it said is heard from now on, and everybody is told."""
        self._hub.dismiss(member.address)
        self._preemptions += member.preemptions
        member.preemptions = 0
        self._cores.post_all(PeerLost(member.address, member.info))
        lost = wire.Member(member.address, member.info)
        for peer in self.members:
            if peer is not member and peer.state is State.READY:
                self._hub.send(HUB, peer.address, wire.PeerLeft(lost))

    def member_changed(self, member: Member) -> None:
        self._owner.member_changed(member)

    def ping(self, address: Address) -> None:
        self._hub.send(HUB, address, wire.Ping())

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
        except IncompatiblePeer as error:
            self._hub.refuse(source, str(error))
            self.members.refused(member, str(error))
            return
        self._join(member)

    def _join(self, member: Member) -> None:
        """Pools hear of it first, then the worker itself, then its peers and the router: see `types.events.PeerUp`."""
        newcomer = wire.Member(member.address, member.info)
        peers = [wire.Member(m.address, m.info) for m in self.members if m.state is State.READY]
        event = PeerUp(member.address, member.info)
        self._cores.post_pools(event)
        self._hub.admit(member.address)
        self._hub.send(HUB, member.address, wire.Welcome(tuple(peers)))
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
        if isinstance(message, wire.Pong):
            self.members.pong(member, message.step_ns)
        elif isinstance(message, Report):
            member.report = message
            member.preemptions = wire.decode_payload(payload, wire.WorkerCounts).preemptions
        if not isinstance(message, wire.Control):
            self._owner.told(source, target, message, payload)

    def _configure(self, address: Address) -> WorkerConfig:
        config = self._config
        return WorkerConfig(
            address=address,
            parent=os.getpid(),
            endpoint=self._hub.endpoint,
            secret=self._secret,
            router=ROUTER,
            info=self.members.by_name[address.name].info,
            model=self._model,
            pools=tuple(SharedPool(i, p.fd, p.layout) for i, p in self._cores.pools.items()),
            engine=config.engine,
            instance=config.instance,
            transport=config.transport,
            threads=self._threads,
            report_ns=config.report_ns,
            journals=self._journals,
            options=config.options,
        )


def check_names(config: ServiceConfig) -> None:
    """Raises ConfigError for workers whose names or leanings cannot be."""
    names = [w.name for w in config.workers]
    if not names:
        raise ConfigError("a service needs at least one worker")
    taken = {ROUTER.name, HUB.name, *(f"pool{i}" for i in range(len(names)))}
    for name in names:
        if names.count(name) > 1 or name in taken or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"worker name {name!r} is taken, or not of letters, digits, '-' and '_'")
    for worker in config.workers:
        if worker.leaning not in ("prefill", "decode", "mixed"):
            raise ConfigError(
                f"worker {worker.name}: leaning {worker.leaning!r} is none of prefill, decode, mixed"
            )


def _status_of(member: Member, pid: int | None) -> InstanceStatus:
    draining = member.report is not None and member.report.draining and member.state is State.READY
    return InstanceStatus(
        name=member.settings.name,
        epoch=member.epoch,
        leaning=member.settings.leaning,
        state="draining" if draining else member.state.value,
        pid=pid,
        report=member.report,
    )

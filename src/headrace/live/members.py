"""The workers of a service: started, watched, replaced.

Life cycle of a worker (`State`), each incarnation under a higher epoch:
 1. STARTING    its process runs and loads; it has a deadline.
 2. READY       it said `Hello` and was admitted.
 3. RESTARTING  its process has ended; the next one is started after a pause that doubles with each quick death.
 4. FAILED      it could not be started several times in a row, or was refused: nothing more is tried.
    STOPPED     the service ends.
A worker that does not answer while there is work, or whose step takes too long, is killed: then 3.

A worker that joined from another host is nobody's child: it is not started again, and its end is the end of its connection. So it has 1 and
2 only, is always asked whether it lives, and when it is given up its peers close their connections to it, so that what it writes lands
nowhere, before they are told that it is lost. Its name is free then; whoever has it next has a higher epoch.
"""

import asyncio
import logging
import os
import signal
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from time import monotonic_ns
from typing import Protocol

from headrace.live.settings import ServiceConfig, WorkerSettings
from headrace.live.transfer.kv import Place
from headrace.live.wire import WorkerCounts
from headrace.ports import Launcher
from headrace.types.ids import Address
from headrace.types.messages import InstanceInfo, Report

log = logging.getLogger(__name__)


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(slots=True)
class Member:
    """One worker through all its incarnations."""

    settings: WorkerSettings
    info: InstanceInfo
    state: State = State.STARTING
    epoch: int = -1
    reason: str = ""
    """Why it is not ready."""
    failures: int = 0
    """Starts in a row that did not get ready."""
    deaths: int = 0
    """In a row, each soon after the one before."""
    since_ns: int = 0
    """When it got into its state."""
    asked_ns: int = 0
    """When it was asked whether it lives, and has not answered since; 0: not asked."""
    place: Place | None = None
    """Of its pool, once it is ready."""
    report: Report | None = None
    counts: WorkerCounts = field(default_factory=WorkerCounts)
    """Of this incarnation."""
    host: str = ""
    """Of one that joined; empty: `serve` started it."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)

    @property
    def address(self) -> Address:
        return Address(self.settings.name, self.epoch)


class Watcher(Protocol):
    """Who wants to know. All are called on the loop's thread."""

    def member_lost(self, member: Member) -> None:
        """A READY one has ended; `member` is still what it was."""
        ...

    def member_changed(self, member: Member) -> None:
        """Its state is a new one."""
        ...

    def member_expelled(self, member: Member, why: str) -> None:
        """One that joined is given up; `member_lost` follows if it was READY."""
        ...

    def ping(self, address: Address) -> None: ...

    def busy(self) -> bool:
        """There is work."""
        ...


class Members:
    """See the module."""

    def __init__(self, config: ServiceConfig, infos: dict[str, InstanceInfo], watcher: Watcher) -> None:
        self.by_name = {w.name: Member(w, infos[w.name]) for w in config.workers}
        self.restarts = 0
        self.launcher: Launcher
        """Set before `start_all`."""
        self._config = config
        self._watcher = watcher
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        self._epochs: dict[str, int] = {}
        """The highest one of each name that ever joined."""
        self._tick: asyncio.TimerHandle | None = None

    def __iter__(self):
        return iter(list(self.by_name.values()))

    def at(self, address: Address) -> Member | None:
        """The member whose present incarnation this is."""
        member = self.by_name.get(address.name)
        return member if member is not None and member.epoch == address.epoch else None

    def start_all(self) -> None:
        for member in self:
            self._start(member)

    def stop(self) -> None:
        """Nobody is started any more."""
        self._stopping = True
        for member in self:
            self._enter(member, State.STOPPED, "the service has ended")
        if self._tick is not None:
            self._tick.cancel()

    # Those that join

    def free_name(self, wanted: str, leaning: str, host: str) -> str:
        """A name like no other's. Raises KeyError if the one that is wanted is taken."""
        if wanted:
            if wanted in self.by_name:
                raise KeyError(wanted)
            return wanted
        stem = f"{leaning}-{''.join(c if c.isascii() and c.isalnum() else '-' for c in host)}"
        return next(name for n in count() if (name := f"{stem}-{n}") not in self.by_name)

    def enlist(self, settings: WorkerSettings, info: InstanceInfo, host: str) -> Member:
        """It has applied, and loads now. Its name is a free one."""
        assert settings.name not in self.by_name
        epoch = self._epochs[settings.name] = self._epochs.get(settings.name, -1) + 1
        member = self.by_name[settings.name] = Member(settings, info, epoch=epoch, host=host)
        self._enter(member, State.STARTING, f"{host} has applied, and loads")
        member.timer = self._loop.call_later(self._config.start_ns / 1e9, self._too_slow, member)
        return member

    def gone(self, member: Member, why: str) -> None:
        """One that joined is no member any more."""
        log.warning("%s of %s has ended: %s", member.address, member.host, why)
        if self.by_name.get(member.settings.name) is not member:
            return
        if member.state is State.READY:
            self._watcher.member_lost(member)
        del self.by_name[member.settings.name]
        self._enter(member, State.STOPPED, why)

    # Life

    def ready(self, member: Member) -> None:
        member.failures = 0
        self._enter(member, State.READY, "")

    def refused(self, member: Member, reason: str) -> None:
        """It cannot become one of us, however often it is started; it ends by itself."""
        if member.host:
            self.gone(member, reason)
            return
        self._enter(member, State.FAILED, reason)

    def ended(self, address: Address, status: int, lines: list[str]) -> None:
        """Its process is gone."""
        member = self.at(address)
        if member is None or member.state in (State.STOPPED, State.FAILED):
            return
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        log.warning("%s has ended: %s", address, how)
        if member.state is State.READY:
            stable = monotonic_ns() - member.since_ns >= self._config.stable_ns
            member.deaths = 1 if stable else member.deaths + 1
            self._watcher.member_lost(member)
        else:
            member.deaths += 1
            member.failures += 1
        reason = member.reason or how
        if member.failures >= self._config.starts_max:
            said = "".join(f"\n  {line}" for line in lines)
            self._enter(member, State.FAILED, f"{reason}, {member.failures} times in a row; it said:{said}")
            return
        self._enter(member, State.RESTARTING, reason)
        pause_ns = min(self._config.backoff_ns << min(member.deaths - 1, 20), self._config.backoff_max_ns)
        member.timer = self._loop.call_later(pause_ns / 1e9, self._restart, member)

    def _restart(self, member: Member) -> None:
        self.restarts += 1
        self._start(member)

    def _start(self, member: Member) -> None:
        member.epoch += 1
        member.asked_ns = 0
        member.report = None
        self._enter(member, State.STARTING, "")
        member.timer = self._loop.call_later(self._config.start_ns / 1e9, self._too_slow, member)
        try:
            self.launcher.start(member.settings.name, member.epoch)
        except OSError as error:
            self.ended(member.address, os.EX_OSERR, [f"it cannot be started: {error}"])

    def _too_slow(self, member: Member) -> None:
        member.reason = f"not ready within {self._config.start_ns / 1e9:.0f} s"
        self._kill(member, f"is {member.reason}")

    def _enter(self, member: Member, state: State, reason: str) -> None:
        if member.timer is not None:
            member.timer.cancel()
            member.timer = None
        member.state, member.reason, member.since_ns = state, reason, monotonic_ns()
        self._watcher.member_changed(member)

    # Heartbeats

    def watch(self) -> None:
        """Ask after the ready ones as long as there is work, or one that joined; else nobody is woken."""
        if self._tick is None and not self._stopping:
            self._arm()

    def heard(self, member: Member) -> None:
        member.asked_ns = 0

    def pong(self, member: Member, step_ns: int) -> None:
        if step_ns > self._config.step_ns:
            self._kill(member, f"has been at one step for {step_ns / 1e9:.1f} s")

    def _arm(self) -> None:
        due_ns = monotonic_ns() + self._config.heartbeat_ns
        self._tick = self._loop.call_later(self._config.heartbeat_ns / 1e9, self._beat, due_ns)

    def _beat(self, due_ns: int) -> None:
        self._tick = None
        now_ns = monotonic_ns()
        # If we were held up ourselves, what they answered may still be unread.
        late = now_ns - due_ns > self._config.heartbeat_ns
        for member in self:
            if member.state is not State.READY:
                continue
            if not member.asked_ns or late:
                member.asked_ns = now_ns
                self._watcher.ping(member.address)
            elif now_ns - member.asked_ns > self._config.silence_ns:
                self._kill(member, f"has said nothing for {(now_ns - member.asked_ns) / 1e9:.1f} s")
        if (self._watcher.busy() or any(m.host for m in self)) and not self._stopping:
            self._arm()

    def _kill(self, member: Member, why: str) -> None:
        if member.host:
            self.expel(member, why)
            return
        log.error("%s %s: killed", member.address, why)
        self.launcher.kill(member.address)

    def expel(self, member: Member, why: str) -> None:
        """Give up one that joined. It may live, and is told."""
        self._watcher.member_expelled(member, why)
        self.gone(member, why)

"""New weights for a running service: from a trainer's first word until every worker computes with them.

Life cycle of a push, one at a time:
 1. OPEN      `begin`: names and shapes are compared with what is served, memory is staged, and the trainer is told where each tensor goes.
              It writes by the transfer engine; each tensor is counted and its digest taken when it is whole.
 2. PREPARING `commit`: all tensors are there, with the digests that the trainer has. Every worker makes the new model ready beside the old.
 3. HOLDING   The router was asked to change (`nodes.switching`), and waits for what is between two workers.
 4. CHANGED   `Committed`: from this instant on all that starts is of the new version. A worker that dies now starts again with it.
 5. `Completed`: every worker has changed. The memory stays for those that start later, until the next version replaces it.
Whatever goes wrong before 4 ends the push: the old weights serve, and its trainer is told why. A trainer that is silent for `SILENCE_S` has
left.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from hashlib import blake2b
from typing import Any, Protocol

import msgspec

from headrace.live import wire
from headrace.live.members import Member, State
from headrace.live.settings import Model
from headrace.live.staging import Staging
from headrace.live.terms import Terms
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transports import Settings, open_transports
from headrace.types.errors import PushRefused
from headrace.types.events import Event
from headrace.types.ids import Address
from headrace.types.weights import (
    Committed,
    Completed,
    Place,
    Pushed,
    Running,
    Staged,
    SwitchAsked,
    SwitchDropped,
    Tensor,
    Ticket,
    WeightsStatus,
)

log = logging.getLogger(__name__)

SILENCE_S = 60.0
"""A trainer that has begun sends something this often."""
PREPARE_S = 300.0
"""Workers have so long to make a model ready."""
MARGIN_S = 30.0
"""Beyond the time that new starts may be held, until the router must have changed."""
COMPLETE_S = 300.0
ADDRESS = Address("weights")


class Stage(Enum):
    OPEN = "open"
    PREPARING = "preparing"
    HOLDING = "holding"
    CHANGED = "changed"


class Push:
    """One push as it goes."""

    def __init__(self, number: int, staging: Staging, running: Running, hold_ns: int) -> None:
        self.number = number
        self.staging = staging
        self.running = running
        self.hold_ns = hold_ns
        self.stage = Stage.OPEN
        self.news = asyncio.Event()
        """Something has come that whoever waits may wait for."""
        self.asked: dict[Address, None] = {}
        """Workers that have not answered `Prepare`."""
        self.made: wire.Prepared | None = None
        """What the first that was ready said."""
        self.failure = ""
        self.committed: Committed | None = None
        self.completed = False
        self.timer: asyncio.TimerHandle | None = None

    @property
    def version(self) -> int:
        return self.staging.version


class Owner(Protocol):
    """What a push needs of the service."""

    @property
    def members(self) -> Iterable[Member]: ...

    def tell(self, worker: Address, message: wire.Control) -> None: ...

    def tell_router(self, event: Event) -> None: ...


class Pushes:
    """See the module. All on the loop's thread."""

    def __init__(self, key: str, model: Model, terms: Terms, owner: Owner) -> None:
        self._key = key
        self._model = model
        self._terms = terms
        self._owner = owner
        self._numbers = itertools.count(1)
        self._versions = itertools.count(1)
        self._engine: TransferEngine | None = None
        self._push: Push | None = None
        self._serving: Staging | None = None
        """Memory of the version that is served; None: the folder's."""
        self._told: Staged | None = None

    @property
    def staged(self) -> Staged | None:
        """What a worker that starts now begins with; None: the folder."""
        return self._told

    @property
    def stage(self) -> Stage | None:
        """Of the push that is under way."""
        return self._push.stage if self._push is not None else None

    def status(self) -> WeightsStatus:
        return WeightsStatus(
            self._terms.version, self._terms.fingerprint, self._model.spec.dtype, self._model.tensors
        )

    def close(self) -> None:
        if self._push is not None:
            # The cores and the workers have gone: there is nobody to tell.
            self._push.staging.close()
        if self._engine is not None:
            self._engine.close()
        if self._serving is not None:
            self._serving.close()

    # The trainer

    def begin(self, tensors: Sequence[Tensor], running: Running, hold_ns: int) -> Ticket:
        """Raises PushRefused."""
        if not self._key:
            raise PushRefused("this service takes no new weights: start it with --push-key")
        if self._push is not None:
            raise PushRefused(f"push {self._push.number} is under way: wait for its end")
        check_tensors(self._model.tensors, tensors)
        away = [str(member.address) for member in self._owner.members if member.host]
        if away:
            raise PushRefused(
                f"{away[0]} runs on another host, where pushed weights do not lie: dismiss it first"
            )
        if self._engine is None:
            settings = Settings(ADDRESS, self._key)
            loop = asyncio.get_running_loop()
            self._engine = TransferEngine(ADDRESS, open_transports("auto", settings), loop)
        version, dtype = next(self._versions), self._model.spec.dtype
        staging = Staging(version, dtype, tensors, self._engine, self._arrived)
        push = self._push = Push(next(self._numbers), staging, running, hold_ns)
        self._wait_for_trainer(push)
        target: dict[str, Any] = msgspec.to_builtins(staging.describe())
        return Ticket(push.number, version, dtype, staging.places, target)

    async def commit(self, number: int, digests: Sequence[str]) -> Pushed:
        """All is written. Returns when every worker computes with it; raises PushRefused if none will."""
        push = self._current(number)
        if push.stage is not Stage.OPEN or push.staging.missing:
            raise PushRefused(
                f"push {number} is {push.stage.value}, and {push.staging.missing} of its tensors have not arrived"
            )
        push.stage = Stage.PREPARING
        if push.timer is not None:
            push.timer.cancel()
        try:
            staged = await self._check(push, digests)
            await self._prepare(push, staged)
            await self._switch(push)
        except (PushRefused, TimeoutError) as error:
            if push.committed is None:
                reason = str(error) or f"it took too long ({push.stage.value})"
                self._end(push, reason)
                raise PushRefused(f"the old weights go on serving: {reason}") from error
        except BaseException:
            if push.committed is None:
                self._end(push, "it was interrupted")
            raise
        return await self._completion(push)

    def drop(self, number: int) -> None:
        """Its trainer gives up. Raises PushRefused if it is too late."""
        push = self._current(number)
        if push.stage is Stage.CHANGED:
            raise PushRefused(f"push {number} has been taken")
        self._end(push, "its trainer has given up")

    # What workers and the router say

    def joining(self, member: Member, version: int) -> None:
        """It will be welcomed: what it may be told to use, it must have at hand."""
        if self._told is not None and version != self._terms.version:
            self._owner.tell(member.address, wire.Prepare(self._told))
        push = self._push
        if push is not None and push.stage in (Stage.PREPARING, Stage.HOLDING):
            self._owner.tell(member.address, wire.Prepare(push.staging.staged(_fingerprint(push))))

    def prepared(self, worker: Address, message: wire.Prepared) -> None:
        push = self._push
        if push is None or push.version != message.version or push.stage is Stage.CHANGED:
            return
        push.asked.pop(worker, None)
        if message.error:
            push.failure = f"{worker} cannot use them: {message.error}"
        elif message.fingerprint:
            first = push.made = push.made or message
            if first.numerics != message.numerics and not self._terms.mixed:
                push.failure = f"{worker} computes other bits with them than another worker does"
        push.news.set()

    def lost(self, worker: Address) -> None:
        push = self._push
        if push is not None and worker in push.asked:
            del push.asked[worker]
            push.news.set()

    def said(self, command: Committed | Completed) -> None:
        """By the router. `Committed` comes before the first start of the new version."""
        push = self._push
        if push is None or push.version != command.version:
            return
        if isinstance(command, Completed):
            push.completed = True
        else:
            push.committed, push.stage = command, Stage.CHANGED
            old, self._serving = self._serving, push.staging
            self._told = push.staging.staged(_fingerprint(push))
            made = push.made
            self._terms.renew(push.version, self._told.fingerprint, made.numerics if made else "")
            if old is not None:
                old.close()
        push.news.set()

    # Steps of a push

    def _current(self, number: int) -> Push:
        push = self._push
        if push is None or push.number != number:
            raise PushRefused(f"there is no push {number} (any more)")
        return push

    def _arrived(self) -> None:
        if self._push is not None:
            self._wait_for_trainer(self._push)

    def _wait_for_trainer(self, push: Push) -> None:
        if push.timer is not None:
            push.timer.cancel()
        loop = asyncio.get_running_loop()
        push.timer = loop.call_later(SILENCE_S, self._end, push, "its trainer has gone silent")

    async def _check(self, push: Push, digests: Sequence[str]) -> Staged:
        """What has arrived is what was sent."""
        sealed = asyncio.Event()
        push.staging.seal(sealed.set)
        async with asyncio.timeout(PREPARE_S):
            await sealed.wait()
        found = await push.staging.digests()
        if len(digests) != len(found):
            raise PushRefused(f"{len(digests)} digests came for {len(found)} tensors")
        for place, theirs, ours in zip(push.staging.places, digests, found, strict=True):
            if theirs != ours:
                raise PushRefused(
                    f"tensor {place.name!r} did not arrive as it was sent (digest {ours}, not {theirs})"
                )
        push.staging.fingerprint = fingerprint_of(push.staging.dtype, push.staging.places, found)
        return push.staging.staged(push.staging.fingerprint)

    async def _prepare(self, push: Push, staged: Staged) -> None:
        ready = [member.address for member in self._owner.members if member.state is State.READY]
        if not ready:
            raise PushRefused("no worker is ready")
        push.asked = dict.fromkeys(ready)
        for worker in ready:
            self._owner.tell(worker, wire.Prepare(staged))
        await self._until(push, lambda: not push.asked, PREPARE_S)

    async def _switch(self, push: Push) -> None:
        push.stage = Stage.HOLDING
        self._owner.tell_router(SwitchAsked(push.version, push.running, push.hold_ns))
        await self._until(push, lambda: push.committed is not None, push.hold_ns / 1e9 + MARGIN_S)

    async def _completion(self, push: Push) -> Pushed:
        """It cannot fail any more; it may only be slow."""
        committed = push.committed
        assert committed is not None
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        try:
            await self._until(push, lambda: push.completed, COMPLETE_S)
        except TimeoutError:
            log.warning("version %d of the weights: a worker is still loading it", push.version)
        finally:
            self._push = None
        log.info("the weights have version %d now", push.version)
        return Pushed(
            version=push.version,
            fingerprint=_fingerprint(push),
            kept=committed.kept,
            recomputed=committed.recomputed,
            held_ms=committed.held_ns / 1e6,
            switched_ms=(loop.time() - begun_s) * 1e3,
        )

    async def _until(self, push: Push, condition: Callable[[], bool], timeout_s: float) -> None:
        """Raises TimeoutError; PushRefused if the push has failed meanwhile."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                push.news.clear()
                if push.failure and push.committed is None:
                    raise PushRefused(push.failure)
                await push.news.wait()
        if push.failure and push.committed is None:
            raise PushRefused(push.failure)

    def _end(self, push: Push, reason: str) -> None:
        """The old weights go on serving."""
        if self._push is not push or push.stage is Stage.CHANGED:
            return
        log.warning("push %d of weights has ended: %s", push.number, reason)
        self._push = None
        push.failure = push.failure or reason
        if push.timer is not None:
            push.timer.cancel()
        if push.stage is Stage.HOLDING:
            self._owner.tell_router(SwitchDropped(push.version))
        if push.stage is not Stage.OPEN:
            for member in self._owner.members:
                if member.state is State.READY:
                    self._owner.tell(member.address, wire.Forget(push.version))
        push.staging.close()
        push.news.set()


def _fingerprint(push: Push) -> str:
    return push.staging.fingerprint


def fingerprint_of(dtype: str, places: Sequence[Place], digests: Sequence[str]) -> str:
    """Of all tensors: names, shapes and bytes, whatever order they were sent in."""
    digest = blake2b(dtype.encode(), digest_size=16)
    for place, content in sorted(zip(places, digests, strict=True), key=lambda pair: pair[0].name):
        digest.update(f"{place.name} {list(place.shape)} {content}".encode())
    return digest.hexdigest()


def check_tensors(served: Sequence[Tensor], pushed: Sequence[Tensor]) -> None:
    """Raises PushRefused naming the first tensor that differs."""
    wanted = {tensor.name: tuple(tensor.shape) for tensor in served}
    if not wanted:
        raise PushRefused("this service does not say which tensors it has: it takes no new weights")
    seen: dict[str, None] = {}
    for tensor in pushed:
        if tensor.name not in wanted:
            raise PushRefused(f"tensor {tensor.name!r} is none of the served model's")
        if tensor.name in seen:
            raise PushRefused(f"tensor {tensor.name!r} comes twice")
        if tuple(tensor.shape) != wanted[tensor.name]:
            raise PushRefused(
                f"tensor {tensor.name!r} has shape {list(tensor.shape)}, the served model has {list(wanted[tensor.name])}"
            )
        seen[tensor.name] = None
    missing = [name for name in wanted if name not in seen]
    if missing:
        raise PushRefused(f"tensor {missing[0]!r} is missing ({len(missing)} in all)")

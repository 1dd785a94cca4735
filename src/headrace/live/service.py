"""The service: router, pools and workers behind `ports.Gateway`. It runs in the process that `headrace serve` starts.

Life cycle:
 1. `start`: memory is checked, pools are made, the hub listens, workers are started; done when all are ready, or one has failed.
 2. Serving. Workers that end are replaced; their requests go on elsewhere (`nodes.router`), from what `store` holds.
 3. `drain`: nothing new is taken, what is there is finished.
 4. `stop`: workers are told to leave, and killed if they do not.
An error of a core here is fatal: every stream fails, and `failed` says why.

To wire it (`cli/serve.py`), on the loop that will serve:

    service = Service(config, model, [sys.executable, "-m", "headrace.cli.worker"])
    await service.start()                        # raises ConfigError, HeadraceError
    app = create_app(service, tokenizer, settings)
    ...                                          # serve until SIGTERM, or until `service.failed` is done
    await service.drain()                        # within config.shutdown_ns
    await service.stop()
"""

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic_ns

from msgspec.structs import replace

from headrace.live import wire
from headrace.live.cores import ROUTER, Cores, pool_address
from headrace.live.journal import JOURNALS
from headrace.live.keys import Keys
from headrace.live.launch.local import worker_environment
from headrace.live.members import Member, State
from headrace.live.policies import engine_policies, policy
from headrace.live.pushes import Pushes
from headrace.live.record import Recorder, check_folder, describe
from headrace.live.settings import Model, ServiceConfig
from headrace.live.store import Store
from headrace.live.team import Team, check_names
from headrace.live.terms import Terms
from headrace.live.tiers import Tiers
from headrace.live.transports import is_of_one_host
from headrace.types.errors import ConfigError, HeadraceError, Overloaded, RequestFailed
from headrace.types.events import (
    Command,
    Deliver,
    DrainAsked,
    Event,
    Kill,
    Received,
    Reject,
    Send,
    Submitted,
    Withdrawn,
)
from headrace.types.ids import Address, BlockHash, PoolId, RequestId
from headrace.types.messages import AnyMessage, Start, Tokens
from headrace.types.payload import Chunk, Emission, Submission
from headrace.types.service import ServiceInfo, ServiceStatus
from headrace.types.tiers import Drop, Flushed, Load, Save, Spill
from headrace.types.weights import Committed, Completed, Staged

log = logging.getLogger(__name__)


class Service:
    """Implements `ports.Gateway`. Everything runs on the loop on which it was started."""

    def __init__(
        self, config: ServiceConfig, model: Model, command: Sequence[str], keys: Keys | None = None
    ) -> None:
        """`command` starts a worker (see `live.worker`); `keys` are for those of other hosts.

        Raises ConfigError for what can be known to be wrong now.
        """
        check_names(config)
        if config.listen and keys is None:
            raise ConfigError("--listen needs a secret: give --secret-file FILE")
        if config.listen and config.record is not None:
            raise ConfigError("--record keeps services of one host: leave --listen out")
        engine_policies(config.engine)
        if is_of_one_host(config.transfer.transport) and config.listen:
            raise ConfigError(f"--transport {config.transfer.transport} leads to no other host: leave it out")
        self._config = config
        self._threads = config.threads or max(1, len(os.sched_getaffinity(0)) // max(1, len(config.workers)))
        """Of each worker."""
        self._model = model
        self._command = list(command)
        self._keys = keys
        policy("cluster.placement", config.placement)
        policy("kv.evict", config.eviction)
        self._journals = ""
        """Folder of the cores' journals."""
        if config.record is not None:
            check_folder(config.record)
            self._journals = str(Path(config.record.folder).resolve() / JOURNALS)
        self._recorder: Recorder | None = None
        self._tiers: Tiers | None = None
        self._numbers = itertools.count(1)
        self._terms = Terms(model, config.mixed_numerics)
        self._cleanup = AsyncExitStack()

    # Life

    async def start(self) -> None:
        """Returns when every worker of this host is ready.

        Raises ConfigError, IncompatiblePeer or HeadraceError, and leaves nothing behind then.
        """
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done, with an exception, if the service cannot go on."""
        self._changed = asyncio.Event()
        self._alone: asyncio.TimerHandle | None = None
        self._stopping = False
        self._store = Store(self._terms.root)
        self.pushes = Pushes(self._config.push_key, self._model, self._terms, self)
        self._cleanup.callback(self.pushes.close)
        self._cleanup.callback(self._end_recording)
        try:
            self._make()
            while not all(m.state is State.READY for m in self.members if not m.host):
                self._changed.clear()
                await self._changed.wait()
                for member in self.members:
                    if member.state is State.FAILED:
                        raise HeadraceError(f"worker {member.settings.name} does not start: {member.reason}")
            if self._tiers is not None:
                self._tiers.open(self._terms.root(""))
            self._record()
        except BaseException:
            await self.stop()
            raise

    async def drain(self) -> bool:
        """Take nothing new and finish what is there, for `shutdown_ns` at most. True if all was finished."""
        self._cores.post(ROUTER, DrainAsked())
        try:
            await asyncio.wait_for(self._store.empty.wait(), self._config.shutdown_ns / 1e9)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End what is unfinished, all workers, and free all memory. Safe to call again."""
        self._stopping = True
        self._store.fail_all(RequestFailed("the service was shut down before the request was finished"))
        await self._cleanup.aclose()

    def _make(self) -> None:
        """The cores, then the workers."""
        config = self._config
        self._cores = Cores(config, self._model, self._journals, self._carry, self.fail)
        self._cleanup.callback(self._cores.close)
        self._cores.make()
        if config.tiers is not None:
            folder = Path(config.disk_cache) if config.disk_cache else None
            self._tiers = Tiers(config.tiers, self._model.spec, self._cores.post, self.fail, folder)
            self._cleanup.push_async_callback(self._tiers.stop)
            self._tiers.make({pool_address(number): pool for number, pool in self._cores.pools.items()})
        self._team = Team(
            config,
            self._model,
            self._cores,
            self._terms,
            self,
            command=self._command,
            environment={**worker_environment(self._threads), **config.environment},
            threads=self._threads,
            journals=self._journals,
            keys=self._keys,
        )
        self.members = self._team.members
        self.launcher = self._team.launcher
        self._cleanup.push_async_callback(self._team.stop)
        self._team.start()

    def _record(self) -> None:
        config = self._config
        if config.record is None:
            return
        infos = [(m.settings.name, m.info) for m in self.members]
        numerics, now_ns = self._terms.numerics, monotonic_ns()
        recording = describe(config.record, self._model, self._threads, now_ns, numerics, infos)
        self._recorder = Recorder(config.record, recording)

    def _end_recording(self) -> None:
        """Last of all: streams that the end of the service fails are in it, too."""
        if self._recorder is not None:
            self._recorder.close()

    def fail(self, error: Exception) -> None:
        """The service cannot go on: every stream ends, and `failed` says why."""
        log.critical("the service cannot go on", exc_info=error)
        self._store.fail_all(RequestFailed("the service has failed; its log says why"))
        if not self.failed.done():
            self.failed.set_exception(error)

    @property
    def door(self) -> str:
        """HOST:PORT where workers of other hosts join; empty: nowhere."""
        return self._team.door

    @property
    def pool_ids(self) -> tuple[PoolId, ...]:
        """Of the pools that are there."""
        return tuple(self._cores.pool_cores)

    # What the team says

    def member_changed(self, member: Member) -> None:
        """See `team.Owner`."""
        self._changed.set()
        if self._alone is not None:
            self._alone.cancel()
            self._alone = None
        if self._stopping or not self._hopeless():
            return
        reason = f"no worker is left: {member.reason}"
        if not self._config.listen or not len(self._store):
            self._store.fail_all(RequestFailed(reason))
        else:
            log.warning("%s; streams wait for one that joins", reason)
            wait_s = self._config.alone_ns / 1e9
            reason += f", and none has joined for {wait_s:g} s"
            loop = asyncio.get_running_loop()
            self._alone = loop.call_later(wait_s, self._store.fail_all, RequestFailed(reason))

    def _hopeless(self) -> bool:
        """No worker is here, or comes by itself."""
        return all(m.state in (State.FAILED, State.STOPPED) for m in self.members)

    def busy(self) -> bool:
        """See `team.Owner`."""
        return len(self._store) > 0

    def told(self, source: Address, target: Address, message: AnyMessage, payload: bytes) -> None:
        """See `team.Owner`."""
        if isinstance(message, Tokens):
            self._store.drawn(wire.decode_payload(payload, tuple[Emission, ...]))
        self._cores.post(target, Received(source, message))

    def joining(self, member: Member, version: int) -> None:
        """See `team.Owner`."""
        self.pushes.joining(member, version)

    def lost(self, worker: Address) -> None:
        """See `team.Owner`."""
        self.pushes.lost(worker)

    def prepared(self, worker: Address, message: wire.Prepared) -> None:
        """See `team.Owner`."""
        self.pushes.prepared(worker, message)

    def weights(self) -> Staged | None:
        """See `team.Owner`."""
        return self.pushes.staged

    def tell(self, worker: Address, message: wire.Control) -> None:
        """See `pushes.Owner`."""
        self._team.tell(worker, message)

    def tell_router(self, event: Event) -> None:
        """See `pushes.Owner`."""
        self._cores.post(ROUTER, event)

    # What the cores want

    def _carry(self, source: Address, command: Command) -> None:
        if isinstance(command, Committed) and self._tiers is not None:
            self._tiers.renew(command.version)
        match command:
            case Send(target, message):
                if self._recorder is not None:
                    self._recorder.told(target, message)
                self._send(source, target, message)
            case Deliver():
                chunk = self._store.deliver(command)
                if self._recorder is not None and chunk is not None:
                    self._recorder.delivered(command.request, chunk, monotonic_ns())
            case Reject():
                self._store.reject(command)
            case Kill(peer):
                self._team.kill(peer)
            case Save() | Load() | Spill() | Drop() | Flushed():
                assert self._tiers is not None
                self._tiers.carry(source, command)
            case Committed() | Completed():
                self.pushes.said(command)
            case _:
                raise TypeError(f"the service has no use for {command!r}")

    def _send(self, source: Address, target: Address, message: AnyMessage) -> None:
        if target in self._cores:  # a pool tells the router of its index
            self._cores.post(target, Received(source, message))
            return
        payload = b""
        if isinstance(message, Start):
            wanted = self._store.payload_for(message)
            if wanted is None:
                # Its client has just left: `Withdrawn` is on its way to the router.
                return
            payload = wire.encode_payload(wanted)
        self._team.send(source, target, message, payload)

    # The gateway

    async def submit(self, submission: Submission) -> AsyncGenerator[Chunk, None]:
        """See `ports.Gateway`."""
        if self._hopeless():
            if self._config.listen:
                raise Overloaded("no worker is here; one has to join")
            raise RequestFailed("no worker is left; the log says why")
        submission = self._versioned(submission)
        request = submission.request
        stream = self._store.open(submission)
        recorder, failure = self._recorder, None
        if recorder is not None:
            recorder.submitted(submission)
        self._cores.post(ROUTER, Submitted(request))
        self.members.watch()
        try:
            async for chunk in stream.read():
                yield chunk
        except HeadraceError as error:
            failure = error
            raise
        finally:
            if stream.choices:
                self._cores.post(ROUTER, Withdrawn(request.id))
            self._store.close(request.id)
            if recorder is not None:
                recorder.ended(request.id, failure, monotonic_ns())

    def _versioned(self, submission: Submission) -> Submission:
        """Say under which weights it was hashed: while a large one was, they may have changed."""
        version, payload = self._terms.version, submission.payload
        if version and payload.root != self._terms.root(submission.salt):
            version -= 1
        if not version:
            return submission
        request = replace(submission.request, version=version)
        return replace(submission, request=request, payload=replace(payload, version=version))

    def withdraw(self, request: RequestId, choice: int) -> None:
        self._store.withdraw(request, choice)
        if self._recorder is not None:
            self._recorder.withdrawn(request, choice, monotonic_ns())
        self._cores.post(ROUTER, Withdrawn(request, choice))

    def next_id(self) -> RequestId:
        return RequestId(next(self._numbers))

    def now_ns(self) -> int:
        return monotonic_ns()

    def root(self, salt: str) -> BlockHash:
        """See `terms.Terms.root`."""
        return self._terms.root(salt)

    def info(self) -> ServiceInfo:
        model = self._model
        return ServiceInfo(
            model=model.name,
            length_max=model.length_max,
            block_size=model.spec.block_size,
            vocabulary=model.vocabulary,
            numerics=self._terms.equal_numerics,
            promise=self._terms.promise,
        )

    def status(self) -> ServiceStatus:
        usable = any(m.state is State.READY for m in self.members)
        waits = "; ".join(
            f"{m.settings.name} is {m.state.value}: {m.reason}" for m in self.members if m.reason
        )
        cores = self._cores.pool_cores.values()
        waiting = self._cores.router.waiting
        return ServiceStatus(
            ready=usable,
            reason="" if usable else waits or self._waits_for(),
            instances=self._team.statuses(),
            requests_waiting=waiting,
            requests_running=self._cores.router.unfinished - waiting,
            counters={
                **self._cores.router.counters,
                **self._cores.tier_counters(),
                **(self._tiers.counters() if self._tiers is not None else {}),
                "worker_restarts": self.members.restarts,
                **self._team.counts.sums(),
            },
            blocks_total=sum(sum(core.blocks.blocks) for core in cores),
            blocks_free=sum(sum(core.blocks.available()) for core in cores),
            weights=self._terms.version,
        )

    def _waits_for(self) -> str:
        if self._team.door and self._hopeless():
            return f"no worker is here: waiting for workers to join at {self._team.door}"
        return "no worker is ready yet"

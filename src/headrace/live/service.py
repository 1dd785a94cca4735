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
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from time import monotonic_ns
from typing import Any

import msgspec

from headrace.live import wire
from headrace.live.bus import HUB, Hub
from headrace.live.journal import JOURNALS, Header, Journal, PoolSettings, RouterSettings, remake
from headrace.live.launch.local import Launcher
from headrace.live.loop import CoreLoop, Node
from headrace.live.members import Member, Members, State
from headrace.live.policies import engine_policies, policy
from headrace.live.pools import Pool, check_memory, layout_for
from headrace.live.record import Recorder, check_folder, describe
from headrace.live.settings import Model, ServiceConfig, SharedPool, WorkerConfig
from headrace.live.store import Store
from headrace.live.transports import check_transport
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.ports import Core
from headrace.types.errors import ConfigError, HeadraceError, IncompatiblePeer, RequestFailed
from headrace.types.events import (
    Command,
    Deliver,
    DrainAsked,
    Kill,
    PeerLost,
    PeerUp,
    Received,
    Reject,
    Send,
    Submitted,
    Withdrawn,
)
from headrace.types.hashing import chain_root
from headrace.types.ids import Address, BlockHash, PoolId, RequestId
from headrace.types.messages import AnyMessage, InstanceInfo, Report, Start, Tokens
from headrace.types.payload import Chunk, Emission, Submission
from headrace.types.service import InstanceStatus, ServiceInfo, ServiceStatus

log = logging.getLogger(__name__)

ROUTER = Address("router")
LEAVE_S = 2.0
"""Workers have so long to leave before they are killed."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PASSIVE: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Workers share cores: an idle thread of torch's that spins takes one from a step that is at work."""


class Service:
    """Implements `ports.Gateway`. Everything runs on the loop on which it was started."""

    def __init__(self, config: ServiceConfig, model: Model, command: Sequence[str]) -> None:
        """`command` starts a worker (see `live.worker`). Raises ConfigError for what can be known to be wrong now."""
        _check_names(config)
        engine_policies(config.engine)
        check_transport(config.transport)
        self._config = config
        self._threads = config.threads or max(1, len(os.sched_getaffinity(0)) // len(config.workers))
        """Of each worker."""
        self._model = model
        self._command = list(command)
        policy("cluster.placement", config.placement)
        policy("kv.evict", config.eviction)
        self._journals = ""
        """Folder of the cores' journals."""
        if config.record is not None:
            check_folder(config.record)
            self._journals = str(Path(config.record.folder).resolve() / JOURNALS)
        self._recorder: Recorder | None = None
        self._secret = secrets.token_hex(16)
        self._numbers = itertools.count(1)
        self._expected = _expected(model)
        """What a worker's greeting must say; completed by the first one."""
        self._promise = ""
        self._pools: dict[PoolId, Pool] = {}
        self._pool_cores: dict[PoolId, PoolCore] = {}
        self._nodes: dict[Address, Node] = {}
        self._preemptions = 0
        """Of incarnations that have ended."""
        self._cleanup = AsyncExitStack()

    # Life

    async def start(self) -> None:
        """Returns when every worker is ready. Raises ConfigError, IncompatiblePeer or HeadraceError, and leaves nothing behind then."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done, with an exception, if the service cannot go on."""
        self._changed = asyncio.Event()
        self._store = Store()
        self._cleanup.callback(self._end_recording)
        try:
            self._make_pools()
            self._make_cores()
            self._make_workers()
            while not all(m.state is State.READY for m in self.members):
                self._changed.clear()
                await self._changed.wait()
                for member in self.members:
                    if member.state is State.FAILED:
                        raise HeadraceError(f"worker {member.settings.name} does not start: {member.reason}")
            self._record()
        except BaseException:
            await self.stop()
            raise

    async def drain(self) -> bool:
        """Take nothing new and finish what is there, for `shutdown_ns` at most. True if all was finished."""
        self._router_node.post(DrainAsked())
        try:
            await asyncio.wait_for(self._store.empty.wait(), self._config.shutdown_ns / 1e9)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End what is unfinished, all workers, and free all memory. Safe to call again."""
        self._store.fail_all(RequestFailed("the service was shut down before the request was finished"))
        await self._cleanup.aclose()

    def _make_pools(self) -> None:
        """One pool for all workers, or one each."""
        config = self._config
        count = 1 if config.shared else len(config.workers)
        layout = layout_for(self._model.spec, config.kv_bytes)
        check_memory(layout.total, count)
        for index in range(count):
            pool = self._pools[PoolId(index)] = Pool.create(f"pool{index}", layout)
            self._cleanup.callback(pool.close)
            if config.fill:
                pool.fill()

    def _make_cores(self) -> None:
        config = self._config
        self._loop = CoreLoop(self._fail)
        listener = ROUTER if policy("cluster.placement", config.placement).reads_prefixes else None
        for index, pool in self._pools.items():
            settings = PoolSettings(index, self._model.spec, pool.layout.blocks, config.eviction, listener)
            core = self._add(Header(pool_address(index), settings))
            assert isinstance(core, PoolCore)
            self._pool_cores[index] = core
        router = self._add(Header(ROUTER, RouterSettings(config.placement, config.router, config.roles)))
        assert isinstance(router, Router)
        self._router = router
        self._router_node = self._nodes[ROUTER]

    def _add(self, header: Header) -> Core:
        """Make a core and run it on the loop."""
        core = shown = remake(header)
        if self._journals:
            shown = Journal(core, Path(self._journals), header)
            self._cleanup.callback(shown.close)
        node = self._nodes[header.address] = self._loop.add(shown, partial(self._carry, header.address))
        self._cleanup.callback(node.close)
        return core

    def _make_workers(self) -> None:
        config = self._config
        infos = {w.name: self._info(index) for index, w in enumerate(config.workers)}
        self._hub = Hub(self._greet, self._receive, self._fail)
        self._cleanup.callback(self._hub.close)
        self.members = Members(config, infos, self)
        environment = {**worker_environment(self._threads), **config.environment}
        self.launcher = Launcher(self._command, environment, self._configure, self.members.ended)
        self.members.launcher = self.launcher
        self._cleanup.push_async_callback(self._end_workers)
        self.members.start_all()

    def _record(self) -> None:
        config = self._config
        if config.record is None:
            return
        infos = [(m.settings.name, m.info) for m in self.members]
        numerics = self._expected.get("numerics", "")
        recording = describe(config.record, self._model, self._threads, monotonic_ns(), numerics, infos)
        self._recorder = Recorder(config.record, recording)

    def _end_recording(self) -> None:
        """Last of all: streams that the end of the service fails are in it, too."""
        if self._recorder is not None:
            self._recorder.close()

    async def _end_workers(self) -> None:
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

    def _info(self, index: int) -> InstanceInfo:
        pool, spec = PoolId(0 if self._config.shared else index), self._model.spec
        return InstanceInfo(
            pool=pool,
            pool_address=pool_address(pool),
            leaning=self._config.workers[index].leaning,
            sequences_max=self._config.instance.sequences_max,
            blocks_total=self._pools[pool].layout.blocks,
            block_size=spec.block_size,
            block_bytes=sum(spec.block_bytes(group) for group in range(len(spec.groups))),
        )

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
            pools=tuple(SharedPool(i, p.fd, p.layout) for i, p in self._pools.items()),
            engine=config.engine,
            instance=config.instance,
            transport=config.transport,
            threads=self._threads,
            report_ns=config.report_ns,
            journals=self._journals,
            options=config.options,
        )

    def _fail(self, error: Exception) -> None:
        log.critical("the service cannot go on", exc_info=error)
        self._store.fail_all(RequestFailed("the service has failed; its log says why"))
        if not self.failed.done():
            self.failed.set_exception(error)

    # Membership

    def _greet(self, source: Address, hello: wire.Hello) -> None:
        member = self.members.at(source)
        if member is None or hello.secret != self._secret:
            log.warning("%s is none of ours: not heard", source)
            return
        if member.state is not State.STARTING:
            # Too late: it is being ended.
            return
        try:
            wire.check_compatible(self._expected, hello)
        except IncompatiblePeer as error:
            self._hub.refuse(source, str(error))
            self.members.refused(member, str(error))
            return
        self._expected["fingerprint"] = hello.fingerprint
        self._promise = self._promise or hello.promise
        if not self._config.mixed_numerics:
            self._expected["numerics"] = hello.numerics
        self._join(member)

    def _join(self, member: Member) -> None:
        """Pools hear of it first, then the worker itself, then its peers and the router: see `types.events.PeerUp`."""
        newcomer = wire.Member(member.address, member.info)
        peers = [wire.Member(m.address, m.info) for m in self.members if m.state is State.READY]
        event = PeerUp(member.address, member.info)
        for pool in self._pool_cores:
            self._nodes[pool_address(pool)].post(event)
        self._hub.admit(member.address)
        self._hub.send(HUB, member.address, wire.Welcome(tuple(peers)))
        for peer in peers:
            self._hub.send(HUB, peer.address, wire.PeerJoined(newcomer))
        self._router_node.post(event)
        self.members.ready(member)

    def member_lost(self, member: Member) -> None:
        """Its process has ended: nothing that it said is heard from now on, and everybody is told."""
        self._hub.dismiss(member.address)
        self._preemptions += member.preemptions
        member.preemptions = 0
        event = PeerLost(member.address, member.info)
        for node in self._nodes.values():
            node.post(event)
        lost = wire.Member(member.address, member.info)
        for peer in self.members:
            if peer is not member and peer.state is State.READY:
                self._hub.send(HUB, peer.address, wire.PeerLeft(lost))

    def member_changed(self, member: Member) -> None:
        self._changed.set()
        if all(m.state is State.FAILED for m in self.members):
            self._store.fail_all(RequestFailed(f"no worker is left: {member.reason}"))

    def ping(self, address: Address) -> None:
        self._hub.send(HUB, address, wire.Ping())

    # What workers say

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
                return
            case Tokens():
                self._store.drawn(wire.decode_payload(payload, tuple[Emission, ...]))
            case Report():
                member.report = message
                member.preemptions = wire.decode_payload(payload, wire.WorkerCounts).preemptions
            case _:
                pass
        node = self._nodes.get(target)
        if node is not None and not isinstance(message, wire.Control):
            node.post(Received(source, message))

    # What the cores want

    def _carry(self, source: Address, command: Command) -> None:
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
                log.error("%s did not confirm that it stopped writing: killed", peer)
                self.launcher.kill(peer)
            case _:
                raise TypeError(f"the service has no use for {command!r}")

    def _send(self, source: Address, target: Address, message: AnyMessage) -> None:
        if target in self._nodes:  # a pool tells the router of its index
            self._nodes[target].post(Received(source, message))
            return
        payload = b""
        if isinstance(message, Start):
            wanted = self._store.payload_for(message)
            if wanted is None:
                # Its client has just left: `Withdrawn` is on its way to the router.
                return
            payload = wire.encode_payload(wanted)
        self._hub.send(source, target, message, payload)

    # The gateway

    async def submit(self, submission: Submission) -> AsyncGenerator[Chunk, None]:
        """See `ports.Gateway`."""
        if all(m.state is State.FAILED for m in self.members):
            raise RequestFailed("no worker is left; the log says why")
        request = submission.request
        stream = self._store.open(submission)
        recorder, failure = self._recorder, None
        if recorder is not None:
            recorder.submitted(submission)
        self._router_node.post(Submitted(request))
        self.members.watch(lambda: len(self._store) > 0)
        try:
            async for chunk in stream.read():
                yield chunk
        except HeadraceError as error:
            failure = error
            raise
        finally:
            if stream.choices:
                self._router_node.post(Withdrawn(request.id))
            self._store.close(request.id)
            if recorder is not None:
                recorder.ended(request.id, failure, monotonic_ns())

    def withdraw(self, request: RequestId, choice: int) -> None:
        self._store.withdraw(request, choice)
        if self._recorder is not None:
            self._recorder.withdrawn(request, choice, monotonic_ns())
        self._router_node.post(Withdrawn(request, choice))

    def next_id(self) -> RequestId:
        return RequestId(next(self._numbers))

    def now_ns(self) -> int:
        return monotonic_ns()

    def root(self, salt: str) -> BlockHash:
        """Covers all that makes two caches differ for equal tokens."""
        spec = msgspec.json.encode(self._model.spec).decode()
        return chain_root(self._expected["fingerprint"], spec, self._expected.get("numerics", "mixed"), salt)

    def info(self) -> ServiceInfo:
        model = self._model
        mixed = "workers may differ in arithmetic: equal requests need not give equal tokens"
        return ServiceInfo(
            model=model.name,
            length_max=model.length_max,
            block_size=model.spec.block_size,
            vocabulary=model.vocabulary,
            numerics="" if self._promise else self._expected.get("numerics", ""),
            promise=mixed if self._config.mixed_numerics else self._promise,
        )

    def status(self) -> ServiceStatus:
        members = list(self.members)
        usable = any(m.state is State.READY for m in members)
        waits = "; ".join(f"{m.settings.name} is {m.state.value}: {m.reason}" for m in members if m.reason)
        cores = self._pool_cores.values()
        waiting = self._router.waiting
        return ServiceStatus(
            ready=usable,
            reason="" if usable else waits or "no worker is ready yet",
            instances=tuple(_status_of(m, self.launcher.pid(m.address)) for m in members),
            requests_waiting=waiting,
            requests_running=self._router.unfinished - waiting,
            counters={
                **self._router.counters,
                "worker_restarts": self.members.restarts,
                "preemptions": self._preemptions + sum(m.preemptions for m in members),
            },
            blocks_total=sum(sum(core.blocks.blocks) for core in cores),
            blocks_free=sum(sum(core.blocks.available()) for core in cores),
        )


def worker_environment(threads: int) -> dict[str, str]:
    """Added to the environment of a worker that computes with so many threads."""
    return {**dict.fromkeys(THREAD_VARIABLES, str(threads)), **PASSIVE}


def pool_address(pool: PoolId) -> Address:
    return Address(f"pool{pool}")


def _expected(model: Model) -> dict[str, Any]:
    """What `Hello` must say. The fingerprint may be left open, and what the first worker's arithmetic is decides for the others."""
    spec = model.spec
    expected: dict[str, Any] = {
        "protocol": wire.PROTOCOL,
        "dtype": spec.dtype,
        "block_size": spec.block_size,
        "spec": spec,
        "vocabulary": model.vocabulary,
    }
    return {**expected, "fingerprint": model.fingerprint} if model.fingerprint else expected


def _check_names(config: ServiceConfig) -> None:
    """Raises ConfigError."""
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

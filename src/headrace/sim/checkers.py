"""What must hold at every instant, and what must hold when all work is done. Text is checked where it is delivered (`sim.clients`)."""

from array import array

from headrace.kv import frames
from headrace.kv.pool import BlockPool
from headrace.nodes.instance import Instance
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.sim.memory import extend, salts
from headrace.sim.nodes import ContentWorker, Node
from headrace.sim.shell import Shell
from headrace.sim.tiers import TERMS, ContentTiers
from headrace.types.events import Command, Event, Execute, Send, Write
from headrace.types.hashing import block_hashes, root_of_version
from headrace.types.ids import Address, BlockHash
from headrace.types.messages import Joined, Tail
from headrace.types.plan import StepPlan
from headrace.types.weights import UseWeights


class Violation(AssertionError):
    """The system did what must never happen."""


class Checker:
    """Watches every settle. Blocks of a pool are recounted whenever its core has settled, an instance's whenever that has.

    Nothing else changes either, so what holds after each settle holds always.
    """

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._told: dict[Address, int] = {}
        """Versions of the weights that instances have been told to use."""
        shell.network.on_copy = self._copied

    def __call__(self, node: Node, now_ns: int, event: Event | None, commands: list[Command] | None) -> None:
        if commands is None:
            return
        if isinstance(node.state, PoolCore):
            node.state.blocks.audit()
            check_holders(node.state.blocks)
        elif isinstance(node, ContentWorker):
            pool, _ = self._shell.pools[node.info.pool]
            assert isinstance(pool.state, PoolCore)
            check_lease(node, pool.state.blocks)
            check_host(node)
            check_loans(self._shell)
            for command in commands:
                if isinstance(command, Execute):
                    check_work(self._shell, node, command.plan)
                elif isinstance(command, Send) and isinstance(command.message, Tail | Joined):
                    check_version(node, command.message, self._told.get(node.address, 0))
                elif isinstance(command, UseWeights):
                    self._told[node.address] = command.version

    def _copied(self, target: ContentWorker, write: Write) -> None:
        pool, _ = self._shell.pools[target.info.pool]
        assert isinstance(pool.state, PoolCore)
        check_landing(target, pool.state.blocks, write)


def check_landing(target: ContentWorker, pool: BlockPool, write: Write) -> None:
    """Memory that may still be written into is its target's, or in quarantine after it: nobody else can have it."""
    segments = pool.leases.get(target.address) or pool.quarantine.get(target.address)
    runs = segments[write.group].runs() if segments else []
    end = write.target_first + write.count
    if not any(first <= write.target_first and end <= first + size for first, size in runs):
        raise Violation(
            f"a write lands in blocks {write.target_first}..{end - 1}, which are not {target.address}'s any more"
        )


def check_holders(pool: BlockPool) -> None:
    """Only the living hold anything."""
    for holder, key in pool.handles:
        if holder not in pool.leases:
            raise Violation(f"{pool.pool}: the locks of {key} belong to {holder}, which has ended")


def check_work(shell: Shell, worker: ContentWorker, plan: StepPlan) -> None:
    """Nobody works for a client that has its answer or has left, once he has heard all that the router had to say."""
    if not shell.network.heard_all(shell.router, worker):
        return
    for work in plan.work:
        client = shell.clients.all[work.key.request]
        if client.rejected is not None or client.streams[work.key.choice].ended:
            raise Violation(f"{worker.address} computes {work.key}, which nobody waits for")


def check_version(worker: ContentWorker, message: Tail | Joined, version: int) -> None:
    """What changes hands was begun under the weights that its instance has been told to use."""
    began = worker.executor.opened[message.key].version
    if version != began:
        raise Violation(
            f"{worker.address} has version {version} of the weights: {message.key} began under {began}, and changes hands"
        )


def check_lease(worker: ContentWorker, pool: BlockPool) -> None:
    """No block twice in an instance's books, and none there that the pool has not leased to it (the reverse may be under way)."""
    instance = worker.state
    assert isinstance(instance, Instance)
    lease = pool.leases.get(worker.address)
    if lease is None:
        return
    held = [list(spare.runs()) for spare in instance.memory.spare]
    for sequence in instance.sequences.values():
        for run in instance.memory.private(sequence):
            held[run.group].append((run.first, run.count))
    for run in instance.loans.runs():
        held[run.group].append((run.first, run.count))
    for group, segments in enumerate(lease):
        # A bit for each block that is leased and not in the instance's books so far.
        free = 0
        for first, size in segments.runs():
            free |= _bits(first, size)
        for first, size in held[group]:
            bits = _bits(first, size)
            if free & bits != bits:
                raise Violation(
                    f"{worker.address} uses blocks {first}..{first + size - 1} of group {group} unduly"
                )
            free ^= bits


def check_host(worker: ContentWorker) -> None:
    """No host block is lost, owned twice, or kept for a sequence that is not here; who waits with KV there still has it there."""
    instance = worker.state
    assert isinstance(instance, Instance)
    area = instance.swapping.area
    if not instance.swapping.swaps:
        return
    area.audit()
    for key in area.copies:
        if key not in instance.sequences:
            raise Violation(f"{worker.address} keeps host memory for {key}, which has left")
    for sequence in instance.sequences.values():
        blocks = instance.memory.spec.blocks_for(sequence.kept)
        if sequence.kept and any(copy.end < blocks for copy in area.copies.get(sequence.key, ())):
            raise Violation(
                f"{worker.address}: {sequence.key} waits for {sequence.kept} tokens that are not in host memory"
            )


def check_loans(shell: Shell) -> None:
    """What a plan in flight reads at a holder is lent to its owner by that holder, and to nobody else."""
    owners: dict[tuple[Address, int, int], Address] = {}
    for worker in shell.workers.values():
        if not worker.alive:
            continue
        for moved in worker.reads():
            holder = shell.workers[moved.holder]
            if not holder.alive:
                continue
            assert isinstance(holder.state, Instance)
            lent = [0] * len(worker.memory.groups)
            for run in holder.state.loans.lending.lent_to(worker.address):
                lent[run.group] |= _bits(run.first, run.count)
            for run in moved.table:
                bits = _bits(run.first, run.count)
                if lent[run.group] & bits != bits:
                    raise Violation(f"{holder.address} has freed {run}, which {worker.address} reads")
                owner = owners.setdefault((moved.holder, run.group, run.first), worker.address)
                if owner != worker.address:
                    raise Violation(f"block {run.first} of {moved.holder} is lent to {owner}, too")


def _bits(first: int, size: int) -> int:
    return ((1 << size) - 1) << first


def check_idle(shell: Shell) -> None:
    """All requests have ended and all is quiet: nothing is held for anybody."""
    for client in shell.clients.all.values():
        if not client.ended:
            raise Violation(f"request {client.request.id} has no end")
    if not shell.network.quiet:
        raise Violation("a message between two that live was never heard")
    router = shell.router.state
    assert isinstance(router, Router)
    if not router.idle or router.unfinished or router.fleet.view(0).assigned.any():
        raise Violation(f"the router still counts {router.unfinished} choices: {list(router.choices)}")
    for pool, _ in shell.pools.values():
        assert isinstance(pool.state, PoolCore)
        blocks = pool.state.blocks
        blocks.audit()
        if blocks.handles or blocks.quarantine:
            raise Violation(f"{pool.address}: left over {list(blocks.handles)} {list(blocks.quarantine)}")
        if any(segments.total for segments in blocks.away):
            raise Violation(f"{pool.address}: blocks are away for ever")
        if pool.state.tiering is not None and not pool.state.tiering.idle:
            raise Violation(f"{pool.address}: a tier was never heard of again")
    for worker in shell.workers.values():
        if worker.alive:
            _check_idle_worker(shell, worker)


def check_content(shell: Shell) -> None:
    """Whatever the index still offers under a hash is what that hash names."""
    spec = shell.clients.spec
    named: dict[BlockHash, list[bytes]] = {}
    for client in shell.clients.all.values():
        for version, text in [pair for stream in client.streams for pair in stream.texts.items()]:
            ids = client.payload.token_ids + text
            root = root_of_version(client.payload.root, version)
            tags = [array("Q") for _ in spec.groups]
            for group, g in enumerate(spec.groups):
                extend(tags[group], 0, ids, g.window, salts(root, len(spec.groups))[group], version)
            for at, name in enumerate(block_hashes(root, ids, spec.block_size)):
                span = slice(at * spec.block_size, (at + 1) * spec.block_size)
                named[name] = [t[span].tobytes() for t in tags]
    for below in shell.tiers.values():
        assert isinstance(below, ContentTiers)
        for name, kept in below.host.items():
            if kept[: len(named[name][0])] != named[name][0]:
                raise Violation("host memory keeps a block that is not what it is named")
        for name, (head, kept) in below.disk.items():
            whole = frames.verify(head, kept, TERMS, name) is frames.Verdict.GOOD
            if whole and kept[: len(named[name][0])] != named[name][0]:
                raise Violation("a disk keeps a block that is not what it is named")
    for pool, memory in shell.pools.values():
        assert isinstance(pool.state, PoolCore)
        for group, tree in enumerate(pool.state.blocks.trees):
            for entry in tree:
                if (
                    memory.read(group, [entry.block], 0, spec.block_size).tobytes()
                    != named[entry.hash][group]
                ):
                    raise Violation(
                        f"{pool.address}: block {entry.block} of group {group} is not what it is named"
                    )


def _check_idle_worker(shell: Shell, worker: ContentWorker) -> None:
    instance = worker.state
    assert isinstance(instance, Instance)
    if not instance.idle or worker.given:
        raise Violation(f"{worker.address} still holds {list(instance.sequences)}")
    router = shell.router.state
    assert isinstance(router, Router)
    if worker.executor.version != router.switching.version:
        raise Violation(f"{worker.address} was left with version {worker.executor.version} of the weights")
    if worker.executor.opened:
        raise Violation(
            f"{worker.address}: the executor was never told to close {list(worker.executor.opened)}"
        )
    pool, _ = shell.pools[worker.info.pool]
    assert isinstance(pool.state, PoolCore)
    check_lease(worker, pool.state.blocks)
    for group, segments in enumerate(instance.memory.spare):
        leased = pool.state.blocks.leases[worker.address][group].total
        if leased != segments.total:
            raise Violation(f"{worker.address} knows of {segments.total} blocks, {leased} are leased to it")

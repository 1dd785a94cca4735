"""The tiers below a simulated pool: what is copied, how long that takes, and what goes wrong.

`ContentTiers` keeps tags and their versions, as a pool's memory does, so that a block that was copied too late, or was changed on disk,
changes the text. The pool's blocks are read and written when a copy ends, where most can have gone wrong. `TimedTiers` keeps nothing, and
takes time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from headrace.kv import frames
from headrace.nodes.limits import TierConfig
from headrace.sim.loop import Loop
from headrace.sim.memory import Memory
from headrace.sim.nodes import Node
from headrace.sim.rng import Draws, KeyedRng
from headrace.types.ids import BlockHash
from headrace.types.kv import GroupKind, KVSpec
from headrace.types.tiers import (
    Drop,
    Flushed,
    Load,
    Loaded,
    Save,
    Saved,
    Spill,
    Spilled,
    Tier,
    TierCommand,
)

TERMS = b"simulated terms."


@dataclass(frozen=True, slots=True)
class TierFaults:
    """How tiers behave. Shares are of commands; `torn_share` of blocks."""

    host_ns: int = 5_000
    """A copy to or from host memory takes up to this,"""
    disk_ns: int = 50_000
    """and one to or from disk."""
    slow_share: float = 0.0
    """These take up to 20 times as long."""
    failed_share: float = 0.0
    torn_share: float = 0.0
    """What is written to disk is changed or cut short."""


class ContentTiers:
    """Of one pool."""

    def __init__(
        self,
        node: Node,
        memory: Memory,
        loop: Loop,
        rng: KeyedRng,
        config: TierConfig,
        faults: TierFaults,
    ) -> None:
        self._node = node
        self._config = config
        self._memory = memory
        self._loop = loop
        self._rng = rng
        self._faults = faults
        self.host: dict[BlockHash, bytes] = {}
        self.disk: dict[BlockHash, tuple[bytes, bytes]] = {}
        """Header and block, as they are on disk."""
        self.counts: dict[str, int] = {}
        self._serial = 0
        self._until_ns = dict.fromkeys(Tier, 0)
        """Each tier does one thing after the other."""

    def carry(self, command: TierCommand) -> None:
        match command:
            case Save():
                self._later(Tier.HOST, self._save, command)
            case Load(_, tier):
                self._later(tier, self._load, command)
            case Spill():
                self._later(Tier.DISK, self._spill, command)
            case Drop(tier):
                self._later(tier, self._drop, command)
            case Flushed():
                raise TypeError("a simulated service does not end")
            case _:
                assert_never(command)

    def _later(self, tier: Tier, action: Callable[..., None], command: TierCommand) -> None:
        faults, serial = self._faults, self._next()
        most_ns = faults.host_ns if tier is Tier.HOST else faults.disk_ns
        slow = self._rng.uniform("slow tier", self._node.index, serial) < faults.slow_share
        took_ns = self._rng.between(1, most_ns * (20 if slow else 1), "tier", self._node.index, serial)
        self._until_ns[tier] = max(self._loop.now_ns, self._until_ns[tier]) + took_ns
        self._loop.at(self._until_ns[tier], action, command)

    def _save(self, command: Save) -> None:
        failed = self._fails("saves failed")
        ok: list[bool] = []
        for piece in command.pieces:
            if not failed:
                self.host[piece.name] = self._memory.block(0, piece.block)
                assert len(self.host) <= self._config.host_blocks, "host memory has no room for so many"
            ok.append(not failed)
        self._node.receive(Saved(command.ticket, tuple(ok)), self._loop.now_ns)

    def _load(self, command: Load) -> None:
        failed = self._fails("loads failed")
        ok: list[bool] = []
        for piece in command.pieces:
            found = None if failed else self._find(command.tier, piece.name)
            # What was read in vain is in the block all the same.
            size = self._memory.stride + self._memory.spec.block_size
            self._memory.fill(0, piece.block, found if found is not None else b"\xee" * size)
            ok.append(found is not None)
        self._count("blocks loaded", sum(ok))
        self._node.receive(Loaded(command.ticket, tuple(ok)), self._loop.now_ns)

    def _find(self, tier: Tier, name: BlockHash) -> bytes | None:
        if tier is Tier.HOST:
            return self.host[name]
        head, payload = self.disk[name]
        if frames.verify(head, payload, TERMS, name) is not frames.Verdict.GOOD:
            self._count("torn blocks found")
            return None
        return payload.ljust(self._memory.stride + self._memory.spec.block_size, b"\0")

    def _spill(self, command: Spill) -> None:
        failed = self._fails("spills failed")
        for name in command.names:
            if not failed:
                self.disk[name] = self._written(name, self.host[name])
                assert len(self.disk) <= self._config.disk_blocks, "the disk was to have no more than so many"
        self._node.receive(Spilled(command.ticket, (not failed,) * len(command.names)), self._loop.now_ns)

    def _written(self, name: BlockHash, payload: bytes) -> tuple[bytes, bytes]:
        """As it is on disk: perhaps cut short, or with a bit changed."""
        head = frames.header(TERMS, name, payload)
        draw = self._rng.uniform("torn", self._node.index, self._next())
        if draw >= self._faults.torn_share:
            return head, payload
        at = self._rng.between(0, len(payload) - 1, "torn at", self._node.index, self._next())
        if at % 3 == 0:
            return head, payload[:at]
        return head, payload[:at] + bytes((payload[at] ^ 0x10,)) + payload[at + 1 :]

    def _drop(self, command: Drop) -> None:
        shelf = self.host if command.tier is Tier.HOST else self.disk
        for name in command.names:
            shelf.pop(name, None)

    def _fails(self, what: str) -> bool:
        failed = self._rng.uniform("tier fails", self._node.index, self._next()) < self._faults.failed_share
        self._count(what, failed)
        return failed

    def _count(self, what: str, by: int = 1) -> None:
        if by:
            self.counts[what] = self.counts.get(what, 0) + by

    def _next(self) -> int:
        self._serial += 1
        return self._serial


@dataclass(frozen=True, slots=True)
class TierSpeeds:
    """Bytes per second of each tier, and what one command costs."""

    host_bytes_per_s: int = 20_000_000_000
    disk_bytes_per_s: int = 3_000_000_000
    command_ns: int = 20_000


class TimedTiers:
    """Of one pool: each tier does one thing after the other, and nothing fails."""

    def __init__(self, node: Node, loop: Loop, block_bytes: int, speeds: TierSpeeds) -> None:
        self._node = node
        self._loop = loop
        self._block_bytes = block_bytes
        self._speeds = speeds
        self._until_ns = dict.fromkeys(Tier, 0)

    def carry(self, command: TierCommand) -> None:
        match command:
            case Save(ticket, pieces):
                self._later(Tier.HOST, len(pieces), Saved(ticket, (True,) * len(pieces)))
            case Load(ticket, tier, pieces):
                self._later(tier, len(pieces), Loaded(ticket, (True,) * len(pieces)))
            case Spill(ticket, names):
                self._later(Tier.DISK, len(names), Spilled(ticket, (True,) * len(names)))
            case Drop():
                pass
            case Flushed():
                raise TypeError("a simulated service does not end")
            case _:
                assert_never(command)

    def _later(self, tier: Tier, blocks: int, event: Saved | Loaded | Spilled) -> None:
        speeds = self._speeds
        rate = speeds.host_bytes_per_s if tier is Tier.HOST else speeds.disk_bytes_per_s
        took_ns = speeds.command_ns + blocks * self._block_bytes * 1_000_000_000 // rate
        self._until_ns[tier] = max(self._loop.now_ns, self._until_ns[tier]) + took_ns
        self._loop.at(self._until_ns[tier], self._tell, event)

    def _tell(self, event: Saved | Loaded | Spilled) -> None:
        self._node.receive(event, self._loop.now_ns)


def draw_tiers(draws: Draws, spec: KVSpec) -> TierConfig | None:
    """Mostly too small for what is cached."""
    if [group.kind for group in spec.groups] != [GroupKind.FULL] or draws.chance(0.4):
        return None
    return TierConfig(
        host_blocks=draws.pick((1, 3, 8, 40)),
        disk_blocks=draws.pick((0, 2, 8, 40)),
        ahead_blocks=draws.pick((1, 2, 4)),
        batch_blocks=draws.pick((1, 2, 8)),
        load_ns=draws.pick((20, 200, 5000)) * 1000,
    )


def draw_tier_faults(draws: Draws) -> TierFaults:
    return TierFaults(
        host_ns=draws.pick((1, 5, 50)) * 1000,
        disk_ns=draws.pick((1, 20, 200)) * 1000,
        slow_share=draws.pick((0.1, 0.5)) if draws.chance(0.25) else 0,
        failed_share=draws.pick((0.05, 0.3)) if draws.chance(0.25) else 0,
        torn_share=draws.pick((0.1, 0.6)) if draws.chance(0.25) else 0,
    )

"""Copies between a pool and a worker's host memory, on virtual time: one after another, as one thread does them."""

from dataclasses import dataclass
from typing import Any

from headrace.sim.loop import Loop
from headrace.sim.memory import Memory
from headrace.sim.rng import Draws
from headrace.types.swaps import SwapIn, SwapOut


@dataclass(frozen=True, slots=True)
class Outlook:
    """What will become of a swap."""

    duration_ns: int
    ok: bool = True


@dataclass(frozen=True, slots=True)
class CopyCosts:
    """Modelled, not measured: each copy takes a constant, and each byte its share of a rate."""

    copy_ns: int = 10_000
    """Of each copy, whatever its size: the call, and the start of the engine that copies."""
    bytes_per_s: int = 25_000_000_000
    """About what PCI Express 4.0 x16 gives."""

    def duration_ns(self, command: SwapOut | SwapIn, block_bytes: tuple[int, ...]) -> int:
        nbytes = sum(run.count * block_bytes[run.group] for run in command.runs)
        return len(command.runs) * self.copy_ns + nbytes * 1_000_000_000 // self.bytes_per_s


class Lane:
    """The thread that copies."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._free_ns = 0

    def take(self, duration_ns: int) -> int:
        """When a swap ends that is given now, after those before it, at least a nanosecond from now."""
        self._free_ns = max(self._free_ns, self._loop.now_ns) + max(1, duration_ns)
        return self._free_ns


def copy_runs(command: SwapOut | SwapIn, device: Memory, host: Memory, share: float) -> None:
    """Carry out a share of its runs, on tags. Where that is not all, the last block is torn: half of it is written."""
    runs = command.runs[: int(len(command.runs) * share)]
    for run in runs:
        if isinstance(command, SwapOut):
            host.copy_from(device, run.group, run.device, run.host, run.count)
        else:
            device.copy_from(host, run.group, run.host, run.device, run.count)
    if len(runs) < len(command.runs):
        run = command.runs[len(runs)]
        memory, first = (host, run.host) if isinstance(command, SwapOut) else (device, run.device)
        at = first * memory.stride
        memory.groups[run.group][at : at + memory.stride // 2] = b"\xee" * (memory.stride // 2)


def draw_settings(draws: Draws) -> dict[str, dict[str, Any]]:
    """Settings of swapping and of fairness, in case they are drawn."""
    swap = {part: draws.chance(0.7) for part in ("groups", "background", "reuse")}
    fair = {
        "pattern": draws.pick(("served", "random", "markov")),
        "frequency": draws.pick((0.1, 0.3, 1.0)),
        "quantum": draws.pick((1, 4, 16)),
        "levels": draws.pick((2, 8)),
        "seed": draws.between(0, 3),
    }
    return {
        "engine.preemption": swap
        | {"group_blocks": draws.pick((1, 3, 60)), "tokens_min": draws.pick((0, 0, 9))},
        "engine.ordering": fair,
    }

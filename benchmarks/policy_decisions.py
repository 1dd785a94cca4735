"""Microseconds a decision, for every placement and rebalancing policy, over fleets of 16, 128 and 1,024 instances.

    make bench NAME=policy_decisions [ARGS="--rounds 9"]

Views as the router shows them: half of the rows lean to prefill, half to decode, or all are mixed; loads are drawn; of each prompt's 24
blocks the first 8 are in an eighth of the pools and the first 16 in two. Costs are two kinds of linear hardware. What the policies ask for
on the way is measured apart: one walk of the cluster's prompt tree, and the fleet's view.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import process_time
from typing import Any

import numpy as np
from _report import target, write

from headrace import registry
from headrace.cluster.prefixes import Prefixes
from headrace.nodes.fleet import Fleet
from headrace.types.costs import DecodeCost
from headrace.types.draws import uniform
from headrace.types.ids import Address, BlockHash, PoolId, RequestId
from headrace.types.messages import InstanceInfo, Report
from headrace.types.request import Request
from headrace.types.views import ClusterView, PlacementRequest

SIZES = (16, 128, 1024)
BLOCKS, BLOCK_SIZE, BLOCK_BYTES = 24, 32, 32 * 128 * 1024
POOL_BLOCKS = 4096
CALLS = 200


@dataclass(frozen=True, eq=False)
class LinearCosts:
    """So many nanoseconds a prefilled token; the rest is in proportion."""

    token_ns: int

    def decode(self, rows: int, context: int) -> DecodeCost:
        return DecodeCost(8_000_000_000, 20 * self.token_ns, 2**40)

    def step_ps(self, prefills: Sequence[tuple[int, int]], rows: int, context: int) -> int:
        return (
            1000 * sum(self.token_ns * t + t * c // 100 for t, c in prefills) + 20 * self.token_ns * context
        )

    def transfer_ns(self, nbytes: int) -> int:
        return 20_000 + nbytes // 25


def question(serial: int) -> PlacementRequest:
    """One of 32 prompts, placed for the `serial`-th time."""
    hashes = tuple(name(serial % 32, i) for i in range(BLOCKS))
    request = Request(RequestId(serial), BLOCKS * BLOCK_SIZE + 5, hashes, 200)
    return PlacementRequest(request, request.prompt, 0, serial)


def name(prompt: int, block: int) -> BlockHash:
    return BlockHash(prompt.to_bytes(8, "little") + block.to_bytes(8, "little"))


def prefixes_of(rows: int) -> Prefixes:
    prefixes = Prefixes()
    prefixes.map_rows([PoolId(i) for i in range(rows)])
    for prompt in range(32):
        for pool in range(rows):
            blocks = 16 if pool in (prompt % rows, (prompt + 1) % rows) else 8 * (pool % 8 == prompt % 8)
            prefixes.stored(PoolId(pool), [name(prompt, i) for i in range(blocks)])
    return prefixes


def fleet_of(rows: int, leanings: tuple[str, str]) -> Fleet:
    """Rows that have reported drawn loads."""
    fleet = Fleet()
    for i in range(rows):
        info = InstanceInfo(PoolId(i), Address(f"pool{i:04}"), leanings[i % 2], 256, (POOL_BLOCKS,))
        fleet.add(Address(f"node{i:04}"), info)
    for i in range(rows):
        address, busy = Address(f"node{i:04}"), uniform(0, "busy", i)
        running = int(200 * busy)
        fleet.assign(address, running, running * 500)
        report = Report(
            observed_at_ns=0,
            waiting=int(4 * busy),
            running=running,
            held=0,
            receiving=0,
            tokens_waiting=int(3000 * busy),
            blocks_total=POOL_BLOCKS,
            blocks_free=int(POOL_BLOCKS * (1 - busy)),
            steps=100,
            draining=False,
            blocks_demand=int(40 * busy),
            tokens_running=running * 480,
        )
        fleet.report(address, report)
    return fleet


def view_of(fleet: Fleet, rows: int) -> ClusterView:
    """The fleet's view, with an index and costs."""
    view = fleet.view(0)
    shown = {field: getattr(view, field) for field in view.__struct_fields__}
    hardware = (LinearCosts(20_000), LinearCosts(60_000))
    shown |= {
        "prefixes": prefixes_of(rows),
        "costs": tuple(hardware[i % 4 == 0] for i in range(rows)),
        "block_size": BLOCK_SIZE,
        "block_bytes": BLOCK_BYTES,
    }
    return ClusterView(**shown)


def microseconds(call: Callable[[int], object], rounds: int) -> list[float]:
    """CPU time, each of `rounds` means over many calls, one warm-up before."""
    times: list[float] = []
    for _ in range(rounds + 1):
        begun_s = process_time()
        for i in range(CALLS):
            call(i)
        times.append((process_time() - begun_s) / CALLS * 1e6)
    return times[1:]


def decisions(rows: int, rounds: int) -> dict[str, list[float]]:
    """Of every policy on rows with a leaning and on mixed ones, and of what is made on the way."""
    split = fleet_of(rows, ("prefill", "decode"))
    times = of_policies(view_of(split, rows), "", rounds)
    times |= of_policies(view_of(fleet_of(rows, ("mixed", "mixed")), rows), ", mixed", rounds)
    index, hashes = prefixes_of(rows), [question(serial).request.hashes for serial in range(CALLS)]
    times["one walk of the prompt tree"] = microseconds(lambda i: index.hits(hashes[i]), rounds)
    times["one view of the fleet"] = microseconds(split.view, rounds)
    return times


def of_policies(view: ClusterView, kind: str, rounds: int) -> dict[str, list[float]]:
    questions = [question(serial) for serial in range(CALLS)]
    times: dict[str, list[float]] = {}
    for policy in registry.names("cluster.placement"):
        placement: Any = registry.load("cluster.placement", policy)
        times[policy + kind] = microseconds(lambda i, p=placement: p.place(questions[i], view), rounds)
    for policy in registry.names("cluster.rebalance"):
        rebalance: Any = registry.load("cluster.rebalance", policy)
        times[f"rebalance {policy}{kind}"] = microseconds(lambda _, p=rebalance: p.moves(view), rounds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    times = {rows: decisions(rows, rounds) for rows in SIZES}
    print(f"{'microseconds a decision':38}" + "".join(f"{rows:>10,}" for rows in SIZES))
    for policy in times[SIZES[0]]:
        print(f"{policy:38}" + "".join(f"{statistics.median(times[rows][policy]):10.1f}" for rows in SIZES))
    figures = {
        policy: {str(rows): round(float(np.median(times[rows][policy])), 2) for rows in SIZES}
        for policy in times[SIZES[0]]
    }
    goals = (("power_of_two, mixed", 5), ("prompt_tree", 100), ("one walk of the prompt tree", 100))
    targets = [
        target(
            f"{policy}, 1,024 instances",
            times[1024][policy],
            "us",
            f"< {goal}",
            met=statistics.median(times[1024][policy]) < goal,
        )
        for policy, goal in goals
    ]
    notes = (
        "CPU time. A view is made once per decision by the router; its own cost is the last line. "
        "Goals are this project's, from its 150 us a request at 1,024 instances."
    )
    write("policy_decisions", figures, targets, {}, notes)


if __name__ == "__main__":
    main()

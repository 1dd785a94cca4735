"""Decode attention of requests that share a prefix: attended to together (composable formats) against each by itself, bf16.

    make bench NAME=shared_prefix [ARGS="--threads 2 --rounds 11"]

16 query heads, 8 KV heads, dim 128, blocks of 32 at random places, several layers so that no cache holds them all; 64 tokens of each own.
of its own. Both ways compute the same bits; what is compared is two plans of one kernel, and the time that planning takes is shown apart.
"""

import argparse
import statistics
from dataclasses import dataclass

import torch
from _report import pairs, seconds, target, write
from torch import Tensor

from headrace.compute import ops
from headrace.compute.plans import Limits, Plan, Shape, describe, make_plan

HEADS, KV_HEADS, DIM, BLOCK = 16, 8, 128, 32
OWN = 64
LAYERS = 4


@dataclass
class Batch:
    q: Tensor
    kv: Tensor
    tables: Tensor
    rows: Tensor
    positions: Tensor
    workspace: ops.Workspace

    @classmethod
    def of(cls, requests: int, shared: int) -> "Batch":
        common, own = shared // BLOCK, OWN // BLOCK
        blocks = common + requests * own
        order = torch.randperm(blocks).int()
        tables = torch.cat([order[:common].expand(requests, -1), order[common:].view(requests, own)], 1)
        return cls(
            torch.randn(requests, HEADS, DIM).bfloat16(),
            torch.randn(blocks, LAYERS, 2, KV_HEADS, BLOCK, DIM).bfloat16(),
            tables.contiguous(),
            torch.arange(requests).int(),
            torch.full((requests,), shared + OWN - 1).int(),
            ops.Workspace(),
        )

    def plan(self, threads: int, levels: int) -> Plan:
        queries, sparse = describe(
            self.tables.numpy(),
            self.rows.numpy(),
            self.positions.numpy(),
            blocks=self.kv.shape[0],
            block_size=BLOCK,
        )
        return make_plan(queries, sparse, Shape(HEADS, KV_HEADS), Limits(threads, levels=levels))

    def attend(self, plan: Plan, threads: int) -> Tensor:
        """Every layer; the last one's output."""
        for layer in range(LAYERS):
            out = ops.planned_attention(
                self.q,
                self.kv,
                layer,
                plan,
                self.positions,
                scale=DIM**-0.5,
                threads=threads,
                workspace=self.workspace,
            )
        return out


@dataclass
class Compared:
    ratios: list[float]
    """Time of each by itself over time together, by round."""
    together_us: float
    """A layer."""
    alone_us: float
    plan_us: float
    shared: bool
    """Whether the planner found that it pays."""


def compare(requests: int, shared: int, threads: int, rounds: int) -> Compared:
    batch = Batch.of(requests, shared)
    together, alone = batch.plan(threads, 2), batch.plan(threads, 0)
    if not torch.equal(batch.attend(together, threads), batch.attend(alone, threads)):
        raise SystemExit("the two plans do not give the same bits")
    times = pairs(lambda: batch.attend(together, threads), lambda: batch.attend(alone, threads), rounds)
    planning = statistics.median(seconds(lambda: batch.plan(threads, 2)) for _ in range(rounds))
    return Compared(
        [b / a for a, b in zip(*times, strict=True)],
        statistics.median(times[0]) / LAYERS * 1e6,
        statistics.median(times[1]) / LAYERS * 1e6,
        planning * 1e6,
        bool(together.shared),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    figures = {"threads": arguments.threads, "backend": ops.describe(torch.bfloat16), "own_tokens": OWN}
    targets = []
    for requests, shared, least in (
        (16, 16_384, 4.0),
        (16, 4_096, 1.0),
        (16, 1_024, 1.0),
        (2, 4_096, 1.0),
        (2, 1_024, 1.0),
    ):
        found = compare(requests, shared, arguments.threads, arguments.rounds)
        figures[f"{requests}_sharing_{shared}"] = {
            "together_us_a_layer": found.together_us,
            "alone_us_a_layer": found.alone_us,
            "plan_us_a_step": found.plan_us,
            "shared": found.shared,
        }
        met = statistics.median(found.ratios) >= least
        goal = f">= {least}" if least > 1 else ">= 1 (never slower)"
        what = f"{requests} requests sharing {shared} tokens: alone over together"
        if not found.shared:  # one plan, twice
            goal, met = "the planner leaves it alone", True
        targets.append(target(what, found.ratios, "x", goal, met=met))
    write(
        "shared_prefix",
        figures,
        targets,
        {},
        "Together and alone are bit-equal. A ratio is of one round; planning is not in it: it is once a step, for all layers.",
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()

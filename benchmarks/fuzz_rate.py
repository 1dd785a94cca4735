"""How fast simulated worlds with faults run: seeds a minute on two processes, and on one for comparison.

    make bench NAME=fuzz_rate [ARGS="--seeds 1000"]

Each seed is a world of its own with all checkers on: every event is checked, every text compared with what a lone sequence would have said.
The rounds run different seeds, so low and high show how much worlds differ, too.
"""

import argparse
import os
from typing import Any

from _report import target, write

from headrace.sim.fuzz import Fuzzer, Tally
from headrace.sim.scenarios import KINDS

GOAL_SEEDS, GOAL_MINUTES = 10_000, 10


def measure(seeds: range, jobs: int) -> Tally:
    """Raises SystemExit if a seed fails: a rate of wrong runs is worth nothing."""
    tally = Fuzzer(seeds, jobs).run()
    if not tally.passed:
        raise SystemExit(
            "\n".join(f"{f.reason}\n  {f.replay}" for f in tally.found) or f"died: {tally.fatal}"
        )
    return tally


def per_minute(tally: Tally) -> float:
    return tally.done / tally.seconds * 60


def summary(tallies: list[Tally]) -> dict[str, Any]:
    """Of all rounds together."""
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return {
        "seeds": total.done,
        "seconds": round(sum(tally.seconds for tally in tallies), 2),
        "seeds_with_fault": {kind: total.kinds[kind] for kind in KINDS},
        "happened": dict(sorted(total.counts.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=GOAL_SEEDS, help="in all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    o = parser.parse_args()
    share = max(1, o.seeds // o.rounds)
    rounds = [measure(range(i * share, (i + 1) * share), o.jobs) for i in range(o.rounds)]
    alone = measure(range(max(1, share // 4)), 1)
    minutes = [GOAL_SEEDS / per_minute(tally) for tally in rounds]
    figures = {
        "processes": o.jobs,
        "cores": os.cpu_count(),
        "seeds_per_minute": [round(per_minute(tally)) for tally in rounds],
        "seeds_per_minute_one_process": round(per_minute(alone)),
        "ms_per_seed_and_process": round(60_000 * o.jobs / (GOAL_SEEDS / (sum(minutes) / len(minutes))), 2),
        **summary(rounds),
    }
    goal = f"at most {GOAL_MINUTES} min"
    met = max(minutes) <= GOAL_MINUTES
    targets = [target(f"{GOAL_SEEDS:,} fault seeds on {o.jobs} processes", minutes, "min", goal, met=met)]
    write("fuzz_rate", figures, targets, {}, "all checkers on; start of the processes included in each round")


if __name__ == "__main__":
    main()

"""`python -m headrace.sim SEED [--count N] [--trace]`: run seeds one after another, or show all that happens in one."""

import argparse
import sys

from headrace.sim.run import Failure, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m headrace.sim", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--count", type=int, default=1, help="run this many seeds from SEED on")
    parser.add_argument("--trace", action="store_true", help="print every event and command")
    arguments = parser.parse_args()
    failed = 0
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        try:
            outcome = run(seed, _say if arguments.trace else None)
        except Failure as failure:
            failed += 1
            _say(str(failure))
            if arguments.count == 1:
                raise
        else:
            if arguments.count == 1:
                _say(
                    f"seed {seed}: {outcome.digest}, {outcome.events} events, {outcome.steps} steps, {outcome.counts}"
                )
    if arguments.count > 1:
        _say(f"{arguments.count - failed} of {arguments.count} seeds passed")
    return 1 if failed else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())

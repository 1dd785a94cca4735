"""`headrace fuzz`: run simulated worlds with faults until one fails, and say how to see that one again."""

import sys
from pathlib import Path

import msgspec
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headrace.sim.fuzz import Found, Fuzzer, Tally
from headrace.sim.run import Failure, run
from headrace.sim.scenarios import KINDS, draw_world
from headrace.types.errors import ConfigError
from headrace.workload.report import progress_bar

INTERRUPTED = 130


def fuzz(
    seeds: str = "0:1000",
    jobs: int = 2,
    seed: int | None = None,
    *,
    trace: bool = False,
    keep_going: bool = False,
    json: Path | None = None,
) -> int:
    """Exit code: 0 all passed, 1 some failed, 130 interrupted (with the summary of what was done). Raises ConfigError for bad flags."""
    if seed is not None:
        if seed < 0:
            raise ConfigError(f"--seed {seed}: at least 0")
        return _one(seed, trace=trace)
    if trace:
        raise ConfigError("--trace shows one seed: give it with --seed N")
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least 1")
    if json is not None and not json.parent.is_dir():
        raise ConfigError(f"--json {json}: the folder does not exist")
    wanted = parse_seeds(seeds)
    fuzzer = Fuzzer(wanted, jobs, keep_going=keep_going)
    code = 0
    try:
        with progress_bar(Console(stderr=True), "seeds") as progress:
            fuzzer.run(progress)
    except KeyboardInterrupt:
        code = INTERRUPTED
    tally = fuzzer.tally
    _show(Console(), tally, len(wanted))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(as_json(wanted, tally)), indent=1) + b"\n")
    return code or int(not tally.passed)


def parse_seeds(text: str) -> range:
    """`A:B` is the seeds from A on and before B; one number N is `0:N`."""
    first, colon, stop = text.rpartition(":")
    try:
        seeds = range(int(first or 0) if colon else 0, int(stop))
    except ValueError:
        raise ConfigError(f"--seeds {text}: give A:B, the seeds from A on and before B") from None
    if not seeds or seeds.start < 0:
        raise ConfigError(f"--seeds {text}: these are no seeds; give A:B with 0 <= A < B")
    return seeds


def as_json(wanted: range, tally: Tally) -> dict[str, object]:
    """The summary for machines. Kinds of faults are counted in seeds, `counts` in occurrences."""
    return {
        "seeds": [wanted.start, wanted.stop],
        "done": tally.done,
        "seconds": round(tally.seconds, 3),
        "seeds_per_second": round(_rate(tally), 2),
        "failed": [
            {"seed": f.seed, "reason": f.reason, "kinds": f.kinds, "replay": f.replay} for f in tally.found
        ],
        "died": [[seeds.start, seeds.stop] for seeds in tally.fatal],
        "kinds": {kind: tally.kinds[kind] for kind in KINDS},
        "counts": dict(sorted(tally.counts.items())),
    }


def _one(seed: int, *, trace: bool) -> int:
    """Every event and command of one seed, and how it ended."""

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")

    kinds = ", ".join(draw_world(seed).kinds)
    say(f"seed {seed}: {kinds or 'no faults'}")
    try:
        outcome = run(seed, say if trace else None)
    except Failure as failure:
        say(str(failure))
        return 1
    say(
        f"seed {seed} passed: {outcome.events} events, {outcome.steps} steps, {outcome.ended_ns / 1e6:.3f} ms of virtual time, "
        f"digest {outcome.digest}"
    )
    return 0


def _show(console: Console, tally: Tally, wanted: int) -> None:
    if tally.done:
        tables = (
            _table("Faults that were on", "seeds", {kind: tally.kinds[kind] for kind in KINDS}),
            _table("What happened", "times", dict(sorted(tally.counts.items()))),
        )
        console.print(Columns(tables, padding=(0, 6)))
    for found in tally.found:
        _show_found(console, found)
    for seeds in tally.fatal:
        console.print(
            f"[bold red]a process died[/] in seeds {seeds.start} to {seeds.stop - 1}: killed (out of memory?) or crashed; "
            f"headrace fuzz --jobs 1 --seeds {seeds.start}:{seeds.stop} shows more",
            soft_wrap=True,
        )
    failed = len(tally.found) + len(tally.fatal)
    verdict = f"[bold red]{failed} failed[/]" if failed else "[bold green]none failed[/]"
    console.print(
        f"{tally.done:,} of {wanted:,} seeds in {tally.seconds:.1f} s ({_rate(tally):.1f} a second): {verdict}"
    )


def _show_found(console: Console, found: Found) -> None:
    console.print(f"[bold red]{escape(found.reason)}[/]", soft_wrap=True, highlight=False)
    console.print(
        f"  with {', '.join(found.kinds) or 'no faults'}; replay it: {found.replay}", soft_wrap=True
    )


def _table(title: str, unit: str, values: dict[str, int]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    table.add_column(unit, justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:,}")
    return table


def _rate(tally: Tally) -> float:
    return tally.done / tally.seconds if tally.seconds else 0.0

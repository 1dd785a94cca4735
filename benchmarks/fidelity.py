"""This machine's live engine under load, beside the simulation of the same requests from a profile of the same engine.

    make bench NAME=fidelity [ARGS="--model 0.6b --seconds 20"]

Two deployments, one thread a worker: one prefill and one decode worker; two mixed ones. Each is asked one at a time, and by Poisson
arrivals at about 50%, 80% and 110% of what it can serve, five times, through HTTP. `headrace profile` has seen one request at a time, so
that load is in sample; the others are held out. docs/fidelity.md says more. Needs a machine that nobody else uses.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import _report
import msgspec
from _fidelity import MODELS, WARMUPS, Deployment, Load, Sizes, View, measure, model, simulated_cluster, views
from rich.console import Console

from headrace.cli.options import EngineOptions
from headrace.cli.profile import profile
from headrace.cost.measured import Measured
from headrace.types.profile import Profile
from headrace.workload.fidelity import FidelityFigure, FidelityReport, fidelity, render_fidelity
from headrace.workload.report import progress_bar

DEPLOYMENTS = {
    "1 prefill + 1 decode": ("--prefill", "1", "--decode", "1"),
    "2 mixed": ("--instances", "2"),
}
SHARES = (0.5, 0.8, 1.1)
PROMISED = ("50%", "80%")
LIMITS = {"ttft": 0.12, "tpot": 0.05, "e2e": 0.07, "output": 0.05}
"""Of the error, by the begin of a metric's key; twice the spread of the live repeats counts where that is more."""
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "end to end", "output": "throughput"}
ENGINE = {"threads": 1, "max_model_len": 2048, "kv_memory": "1GiB"}
"""Options of each deployment, and of the profile."""
PEERS = {
    "note": "errors of other simulators as stated elsewhere, on other deployments",
    "BLIS": {"end to end, median": 0.067, "TTFT, held out": 0.176},
    "LLMServingSim, its four live runs": {"TTFT": [-0.136, 0.013], "TPOT": [-0.017, 0.008]},
    "aiconfigurator on A100, users' reports": {"TTFT": 0.45},
}
NOTES = (
    "In sample: one request at a time, of whose like the profile took the time around steps and requests. Held out: all other loads; "
    "nothing was fitted to them. `client`: as the load client saw it through HTTP; `service`: the same runs by the service's own clock, "
    "without the API. Each target has the errors of mean, P50, P90 and P99, and is met if each is within its limit."
)


def make_profile(folder: Path | None, out: Path, *, quick: bool) -> float:
    """As `headrace profile` does, of workers with one thread; seconds it took."""
    begun_s = perf_counter()
    asyncio.run(profile(EngineOptions.model_validate({"model": folder, **ENGINE}), out, quick))
    return perf_counter() - begun_s


def measure_all(folder: Path | None, sizes: Sizes, at: Path) -> list[Deployment]:
    """Both, one after the other, with a bar for the requests of each."""
    engine = [text for key, value in ENGINE.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    arguments = [*(() if folder is None else (str(folder),)), *engine]
    found: list[Deployment] = []
    for number, (name, flags) in enumerate(DEPLOYMENTS.items()):
        with progress_bar(Console(stderr=True), name) as progress:
            record = at / f"record{number}"
            tick = counter(progress, sizes)
            made = asyncio.run(measure(name, (*arguments, *flags), record, sizes, SHARES, tick))
        print(f"{name}: capacity {made.capacity:.2f} requests/s", file=sys.stderr)
        found.append(made)
    return found


def counter(progress: Callable[[int, int], None], sizes: Sizes) -> Callable[[int], None]:
    """Counts requests that are done; how many there will be is known only when the capacity is."""
    done, most = 0, WARMUPS + sizes.burst + sizes.repeats * (sizes.alone + len(SHARES) * sizes.requests_max)

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(done, most)

    return tick


def within(figure: FidelityFigure) -> bool:
    return figure.within(LIMITS[figure.key.split("_")[0]])


def as_figures(load: Load, client: FidelityReport, service: FidelityReport) -> dict[str, Any]:
    """For the results."""

    def rows(report: FidelityReport) -> list[dict[str, Any]]:
        return [
            {
                "metric": figure.key,
                "live": round(figure.live, 3),
                "simulated": round(figure.simulated, 3),
                "error": round(figure.error, 4),
                "spread": None if figure.spread is None else round(figure.spread, 4),
                "within": within(figure),
            }
            for figure in report.figures
        ]

    return {
        "rate_per_s": round(load.rate, 3),
        "requests": load.requests,
        "in_sample": load.in_sample,
        "client": rows(client),
        "service": rows(service),
    }


def targets_of(deployment: str, load: Load, report: FidelityReport) -> list[dict[str, Any]]:
    """One a metric."""
    found: list[dict[str, Any]] = []
    for begin, limit in LIMITS.items():
        figures = [f for f in report.figures if f.key.startswith(begin)]
        errors = [abs(f.error) * 100 for f in figures]
        goal = f"each within {limit:.0%} or twice the spread (held out)"
        what = f"{deployment} at {load.name}: {NAMES[begin]}, size of errors"
        found.append(_report.target(what, errors, "%", goal, met=all(within(f) for f in figures)))
    return found


def compare(view: View) -> FidelityReport:
    return fidelity(view.live, view.simulated)


def envelope(figures: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """By deployment: what is outside its limit, by load."""
    return {
        name: [
            f"{load}: {row['metric']} {row['error']:+.1%}"
            for load, entry in loads.items()
            if load != "capacity_per_s"
            for row in entry["client"]
            if not row["within"]
        ]
        for name, loads in figures.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--profile", type=Path, help="one made before, with the same model and threads")
    parser.add_argument("--quick", action="store_true", help="few requests, one repeat, the bundled model")
    parser.add_argument("--seconds", type=float, default=11.0, help="of arrivals, each run")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=48)
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def sizes_of(o: argparse.Namespace) -> Sizes:
    if o.quick:
        return Sizes(64, 16, o.spread, seconds=3.0, repeats=1, alone=3, requests_max=20, burst=8)
    return Sizes(o.prompt, o.output, o.spread, o.seconds, o.repeats, alone=6, requests_max=300, burst=48)


def main() -> None:
    o = parse()
    sizes, begun_s = sizes_of(o), perf_counter()
    console, figures, targets = Console(), dict[str, Any](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="headrace-fidelity-") as temporary:
        at = Path(temporary)
        folder = None if o.quick else model(o.model)
        path = o.profile or at / "profile.json"
        profile_s = 0.0 if o.profile else make_profile(folder, path, quick=o.quick)
        measured = Measured(msgspec.json.decode(path.read_bytes(), type=Profile))
        for deployment in measure_all(folder, sizes, at):
            mine: dict[str, Any] = {"capacity_per_s": round(deployment.capacity, 3)}
            for load, client, service in views(deployment, simulated_cluster(deployment, path)):
                seen, inside = compare(client), compare(service)
                kind = "in sample" if load.in_sample else "held out"
                console.rule(f"{deployment.name}, {load.name} ({load.rate:.2f}/s), {kind}")
                console.print(render_fidelity(seen))
                mine[load.name] = as_figures(load, seen, inside)
                if load.name in PROMISED:
                    targets += targets_of(deployment.name, load, seen)
            figures[deployment.name] = mine
    outside = envelope(figures)
    for name, metrics in outside.items():
        print(f"{name}, outside the limits: {', '.join(metrics) or 'nothing'}")
    facts = {
        "sizes": vars(o) | {"profile": o.profile and o.profile.name},
        "outside_limits": outside,
        "profile_errors": measured.errors(),
        "profile_s": round(profile_s, 1),
        "wall_s": round(perf_counter() - begun_s, 1),
    }
    _report.write("fidelity", figures | facts, targets, PEERS, NOTES)


if __name__ == "__main__":
    main()

"""This machine's live engine under load, beside the simulation of the same requests from a profile of the same engine.

    make bench NAME=fidelity [ARGS="--model 0.6b --seconds 40"]

Two deployments, one thread a worker: one prefill and one decode worker; two mixed ones. Each is asked one at a time, and by Poisson
arrivals at about 50%, 65%, 80% and 110% of what it can serve, five times (65%: twice), through HTTP. The profile has seen one request at a
time, and one factor for all steps is fitted to the load of 65%: these two are in sample, the others held out. docs/fidelity.md says more.
Needs a machine that nobody else uses; takes about ten minutes.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import _report
import msgspec
from _fidelity import MODELS, Counterpart, Deployment, Shares, Sizes, measure, model
from rich.console import Console
from rich.table import Table

from headrace.cli.options import EngineOptions
from headrace.cli.profile import profile
from headrace.cost.measured import Measured
from headrace.types.profile import Profile
from headrace.workload.fidelity import FidelityFigure, FidelityReport, fidelity
from headrace.workload.metrics import value_as_text
from headrace.workload.report import progress_bar

DEPLOYMENTS = {
    "1 prefill + 1 decode": ("--prefill", "1", "--decode", "1"),
    "2 mixed": ("--instances", "2"),
}
SHARES = Shares(calibration=0.65, held_out=(0.5, 0.8, 1.1))
PROMISED = ("50%", "80%")
LIMITS = {"ttft": 0.12, "tpot": 0.05, "e2e": 0.07, "output": 0.05}
"""Of the error, by the begin of a metric's key; twice the spread of the live repeats counts where that is more."""
BUSY = 0.7
"""Load average above which a run is not to be quoted."""
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "end to end", "output": "throughput"}
ENGINE = {"threads": 1, "max_model_len": 2048, "kv_memory": "2GiB"}
"""Options of each deployment, and of the profile."""
PEERS = {
    "note": "errors of other simulators as stated elsewhere, on other deployments",
    "BLIS": {"end to end, median": 0.067, "TTFT, held out": 0.176},
    "LLMServingSim, its four live runs": {"TTFT": [-0.136, 0.013], "TPOT": [-0.017, 0.008]},
    "aiconfigurator on A100, users' reports": {"TTFT": 0.45},
}
NOTES = (
    "profile_alone: the simulation knows the profile and the recorded settings, nothing of any load. calibrated: all steps take longer "
    "by one factor, fitted to the mean time end to end at 65%. Both as the client saw it, through HTTP; profile_alone_service: by the "
    "service's own clock, without the API. Held out: 50%, 80%, 110%. A target has the sizes of the errors of mean, P50, P90 and P99."
)


def make_profile(folder: Path | None, out: Path, *, quick: bool) -> float:
    """As `headrace profile` does, of workers with one thread; seconds it took."""
    begun_s = perf_counter()
    asyncio.run(profile(EngineOptions.model_validate({"model": folder, **ENGINE}), out, quick))
    return perf_counter() - begun_s


def measured_all(folder: Path | None, sizes: Sizes, at: Path) -> Iterator[Deployment]:
    """One after the other, with a bar for the requests of each. Recordings lie in `at`."""
    engine = [text for key, value in ENGINE.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    arguments = [*(() if folder is None else (str(folder),)), *engine]
    for number, (name, flags) in enumerate(DEPLOYMENTS.items()):
        record = at / f"record{number}"
        with progress_bar(Console(stderr=True), name) as progress:
            made = asyncio.run(measure(name, (*arguments, *flags), record, sizes, SHARES, progress))
        print(f"{name}: capacity {made.capacity:.2f} requests/s", file=sys.stderr)
        yield made


def within(figure: FidelityFigure) -> bool:
    return figure.within(LIMITS[figure.key.split("_")[0]])


def rows(report: FidelityReport) -> list[dict[str, Any]]:
    """For the results."""
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


def show(title: str, plain: FidelityReport, fitted: FidelityReport) -> Table:
    """Errors that are outside their limits are red."""

    def error(figure: FidelityFigure) -> str:
        return f"[{'green' if within(figure) else 'red'}]{figure.error:+.1%}[/]"

    table = Table("Metric", title=title, title_justify="left")
    for head in ("live, median", "spread", "profile alone", "error", "calibrated", "error"):
        table.add_column(head, justify="right")
    for a, b in zip(plain.figures, fitted.figures, strict=True):
        table.add_row(
            a.label,
            value_as_text(a.live, a.unit),
            "one run" if a.spread is None else f"{a.spread:.1%}",
            value_as_text(a.simulated, a.unit),
            error(a),
            value_as_text(b.simulated, b.unit),
            error(b),
        )
    return table


def targets_of(what: str, report: FidelityReport) -> list[dict[str, Any]]:
    """One a metric: the sizes of the errors of its mean, P50, P90 and P99."""
    found: list[dict[str, Any]] = []
    for begin, limit in LIMITS.items():
        figures = [f for f in report.figures if f.key.startswith(begin)]
        errors = [abs(f.error) * 100 for f in figures]
        goal = f"each within {limit:.0%} or twice the spread"
        found.append(
            _report.target(f"{what}: {NAMES[begin]}", errors, "%", goal, met=all(map(within, figures)))
        )
    return found


def compare(
    deployment: Deployment, profile: Path, console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and targets of all its loads; prints a table of each."""
    counterpart = Counterpart(deployment, profile)
    figures: dict[str, Any] = {
        "capacity_per_s": round(deployment.capacity, 3),
        "calibration_factor": round(counterpart.factor, 4),
        "loads": {},
    }
    targets: list[dict[str, Any]] = []
    for each in counterpart.comparisons():
        load = each.load
        reports = {
            "profile_alone": fidelity(each.live, each.simulated),
            "calibrated": fidelity(each.live, each.calibrated),
            "profile_alone_service": fidelity(each.live_service, each.simulated_service),
        }
        title = f"{deployment.name}, {load.name}, {load.rate:.2f} requests/s, {load.sample}"
        console.print(show(title, reports["profile_alone"], reports["calibrated"]))
        figures["loads"][load.name] = {
            "rate_per_s": round(load.rate, 3),
            "requests": load.requests,
            "repeats": load.repeats,
            "sample": load.sample,
            **{name: rows(report) for name, report in reports.items()},
        }
        if load.name in PROMISED:
            for name in ("profile_alone", "calibrated"):
                what = f"{deployment.name} at {load.name}, {name.replace('_', ' ')}"
                targets += targets_of(what, reports[name])
    return figures, targets


def outside(figures: dict[str, Any], kind: str) -> dict[str, list[str]]:
    """By load: the metrics whose error is beyond its limit. Where the envelope ends."""
    return {
        load: [f"{row['metric']} {row['error']:+.1%}" for row in entry[kind] if not row["within"]]
        for load, entry in figures["loads"].items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--profile", type=Path, help="one made before, with the same model and threads")
    parser.add_argument("--keep", type=Path, help="new folder for the profile and the recordings")
    parser.add_argument("--quick", action="store_true", help="few requests, one repeat, the bundled model")
    parser.add_argument("--seconds", type=float, default=9.0, help="of arrivals, each run")
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
    busy = os.getloadavg()[0]
    if busy > BUSY and not o.quick:
        print(
            f"the load average is {busy:.1f}: the live figures will be of a machine at other work, too",
            file=sys.stderr,
        )
    sizes, begun_s, console = sizes_of(o), perf_counter(), Console(width=None if sys.stdout.isatty() else 120)
    figures: dict[str, Any] = {}
    targets: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="headrace-fidelity-") as temporary:
        at = o.keep or Path(temporary)
        at.mkdir(parents=True, exist_ok=True)
        folder = None if o.quick else model(o.model)
        path = o.profile or at / "profile.json"
        profile_s = 0.0 if o.profile else make_profile(folder, path, quick=o.quick)
        measured = Measured(msgspec.json.decode(path.read_bytes(), type=Profile))
        for deployment in measured_all(folder, sizes, at):
            figures[deployment.name], more = compare(deployment, path, console)
            targets += more
    for name, found in figures.items():
        for kind in ("profile_alone", "calibrated"):
            found[f"outside_limits_{kind}"] = outside(found, kind)
            for load, metrics in found[f"outside_limits_{kind}"].items():
                print(f"{name}, {load}, {kind}: outside its limit: {', '.join(metrics) or 'nothing'}")
    figures |= {
        "sizes": msgspec.to_builtins(sizes) | {"model": "bundled" if o.quick else o.model},
        "profile": {
            "seconds": round(profile_s, 1),
            "step_errors": measured.errors(),
            "step_overhead_ms": round(measured.profile.step_overhead_s * 1e3, 3),
            "request_overhead_ms": round(measured.profile.request_overhead_s * 1e3, 3),
            "message_ms": round(measured.profile.message_s * 1e3, 3),
            "pairs": {f"{p.kind} beside {p.beside}": round(p.slowdown, 3) for p in measured.profile.pairs},
        },
        "wall_s": round(perf_counter() - begun_s, 1),
        "load_average_before": round(busy, 2),
    }
    _report.write("fidelity", figures, targets, PEERS, NOTES)


if __name__ == "__main__":
    main()

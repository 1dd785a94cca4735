"""`headrace simulate`: a trace served by a cluster on virtual time."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape

from headrace.cli.cluster import cluster_of
from headrace.cli.machines import read_profile
from headrace.cli.models import length_max, model_config
from headrace.cli.options import ClusterOptions
from headrace.cli.perfetto import spans
from headrace.cli.workload import Workload, check_lengths, load, part
from headrace.sim.cluster import Progress
from headrace.sim.cluster import run as run_cluster
from headrace.types.errors import ConfigError
from headrace.types.outcomes import RunData
from headrace.types.trace import Trace
from headrace.workload.report import progress_bar, render, summarize


class Outputs(msgspec.Struct, frozen=True, kw_only=True):
    """Files to write, each only if it is named."""

    json: Path | None = None
    html: Path | None = None
    perfetto: Path | None = None
    perfetto_requests: int = 2000

    def check(self) -> None:
        """Before anything takes time. Raises ConfigError."""
        for flag, path in (("json", self.json), ("html", self.html), ("perfetto", self.perfetto)):
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                what = "is a folder; name a file" if path.is_dir() else "the folder does not exist"
                raise ConfigError(f"--{flag} {path}: {what}")


def simulate(
    options: ClusterOptions,
    workload: Workload,
    outputs: Outputs,
    *,
    name: str,
    seed: int = 0,
    every_step: bool = False,
    skip_s: tuple[float, float] = (0.0, 0.0),
) -> RunData:
    """Show the report and write what was asked for. Raises ConfigError, Stuck."""
    outputs.check()
    whole, notes = load(workload, seed)
    trace = part(workload, whole)
    console = Console()
    for note in notes:
        console.print(note, markup=False)
    with progress_bar(Console(stderr=True)) as progress:
        run = play(options, trace, seed, name, every_step=every_step, progress=progress)
    run.settings["trace"] = workload.trace
    report = summarize(run, skip_s)
    console.print(render(report))
    facts = run.facts
    console.print(
        f"[dim]{len(run.outcomes):,} requests of {escape(trace.name)} on {facts['instances']:,} instances in "
        f"{facts['cpu_s']:.1f} CPU-seconds: {facts['steps']:,} steps, {facts['events']:,} events.[/]",
        highlight=False,
    )
    if outputs.json is not None:
        write(outputs.json, report.to_json() + b"\n", console)
    if outputs.html is not None:
        from headrace.workload.html import run_html  # plots take a second to load

        write(outputs.html, run_html(run, skip_s).encode(), console)
    if outputs.perfetto is not None:
        write(outputs.perfetto, spans(run, outputs.perfetto_requests), console)
    return run


def play(
    options: ClusterOptions,
    trace: Trace,
    seed: int,
    name: str,
    *,
    config: Mapping[str, Any] | None = None,
    every_step: bool = False,
    progress: Progress | None = None,
    outside: bool = True,
) -> RunData:
    """One run. `config`: the model's, where it is known. `outside`: a request's time before and after the service counts.

    Raises ConfigError for what cannot work, Stuck if the simulation cannot go on.
    """
    if config is None:
        config = model_config(options, read_profile(options.profile) if options.profile else None)
    cluster = cluster_of(options, config)
    check_lengths(trace, length_max(options, config))
    if not outside:
        cluster = replace(cluster, ingress_ns=0, egress_ns=0)
    return run_cluster(cluster, trace, seed, name=name, every_step=every_step, progress=progress)


def write(path: Path, raw: bytes, console: Console) -> None:
    """Raises ConfigError."""
    try:
        path.write_bytes(raw)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)

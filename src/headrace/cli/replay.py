"""`headrace replay DIR`: what was recorded live, simulated on the same deployment, and under other policies.

Two things are shown beside each other: how far the simulation of the recorded deployment is from what was recorded, and what other settings
would have made of the same requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headrace.cli.machines import read_profile
from headrace.cli.options import ClusterOptions, read
from headrace.cli.simulate import Outputs, play, write
from headrace.cli.variants import Job, Variant, run_jobs, seeds_of, variants, varied
from headrace.cli.workload import Workload, load, variety
from headrace.types.errors import ConfigError
from headrace.types.outcomes import Outcomes, RunData, Series, goal_columns
from headrace.types.recording import FAILED, FORMAT, RecordedRequest, Recording
from headrace.types.request import Slo
from headrace.workload.compare import Comparison, render_comparison
from headrace.workload.compare import compare as compare_runs
from headrace.workload.fidelity import FidelityReport, fidelity, render_fidelity
from headrace.workload.metrics import METRICS, value_as_text
from headrace.workload.report import RunReport, as_json, progress_bar, summarize

FALLBACK = "epyc-2core"
"""Of the catalogue, where nothing was measured."""
SIMULATED = "as recorded"
GOOD = ("stop", "length")


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything that a replay says."""

    live: RunData
    simulated: RunData
    """The recorded deployment, the recorded requests."""
    fidelity: FidelityReport
    what_if: dict[str, RunData]
    """All requests, by variant."""
    comparison: Comparison | None
    """Over several draws of the requests; None: nothing was varied."""


def replay(
    options: ClusterOptions,
    folder: Path,
    vary: Sequence[str],
    outputs: Outputs,
    *,
    speedup: float | None = None,
    seeds: int = 5,
    jobs: int = 2,
    skip_s: tuple[float, float] = (0.0, 0.0),
) -> Answer:
    """Show both and write what was asked for. Raises ConfigError, Stuck."""
    outputs.check()
    console = Console()
    recording, requests = read_recording(folder)
    options = _deployed(options, recording, console)
    config = recording.config if _same_model(options, folder) else None
    recorded = Workload(str(folder / "trace.jsonl"), format="recorded", sort=True)
    trace, notes = load(recorded)
    for note in notes:
        console.print(note, markup=False)
    live = live_run(recording, requests)
    with progress_bar(Console(stderr=True)) as progress:
        simulated = play(options, trace, 0, SIMULATED, config=config, progress=progress, outside=False)
    known = fidelity([live], simulated, skip_s)
    console.print(render_fidelity(known))
    asked = Workload(recorded.trace, format="recorded", sort=True, speedup=speedup)
    told = variety(asked, seeds_of(seeds, 0))
    what_if, comparison = _what_if(options, config, asked, vary, range(seeds), told, jobs, skip_s)
    answer = Answer(live, simulated, known, what_if, comparison)
    _show(console, answer, told, skip_s)
    _write(outputs, answer, console, skip_s)
    return answer


def read_recording(folder: Path) -> tuple[Recording, list[RecordedRequest]]:
    """What it was, and its requests by arrival. Raises ConfigError for what is no recording."""
    try:
        recording = msgspec.json.decode((folder / "meta.json").read_bytes(), type=Recording)
        lines = (folder / "trace.jsonl").read_bytes().splitlines()
        requests = [msgspec.json.decode(line, type=RecordedRequest) for line in lines]
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{folder} is no recording of `headrace serve --record`: {error}") from error
    if recording.format != FORMAT:
        raise ConfigError(f"{folder}: has format {recording.format}, this version reads {FORMAT}")
    return recording, sorted(requests, key=lambda request: (request.arrival_ns, request.number))


def live_run(recording: Recording, requests: Sequence[RecordedRequest]) -> RunData:
    """What was recorded, as a run: a row for each choice that gave a token, as the trace's reader has them."""
    rows = [(request, i) for request in requests for i, tokens in enumerate(request.output) if tokens]
    names = tuple(instance.name for instance in recording.instances)
    outcomes = Outcomes.empty(len(rows), names)
    numbers = {name: number for number, name in enumerate(names)}
    for row, (request, index) in enumerate(rows):
        choice = request.choices[index]
        for name in (
            "placed_ns",
            "prefill_ns",
            "first_ns",
            "joined_ns",
            "finished_ns",
            "cached",
            "bytes_moved",
        ):
            getattr(outcomes, name)[row] = getattr(choice, name)
        outcomes.arrival_ns[row], outcomes.prompt[row] = request.arrival_ns, request.prompt
        outcomes.output[row] = request.output[index]
        outcomes.recomputed[row], outcomes.attempts[row] = choice.recomputed, choice.attempts
        outcomes.prefill[row] = numbers.get(choice.prefill, -1)
        outcomes.decode[row] = numbers.get(choice.decode, -1)
        if request.finish[index] not in GOOD:
            outcomes.fail(row, request.finish[index] or FAILED)
    begin_ns = int(outcomes.arrival_ns.min(initial=2**62)) if rows else 0
    goals = [(request.ttft_ns, request.tpot_ns) for request, _ in rows]
    kinds = tuple(dict.fromkeys(goals))
    known = any(kind != (None, None) for kind in kinds)
    return RunData(
        name="recorded",
        seed=0,
        clock="wall",
        outcomes=outcomes,
        series=Series(np.zeros(0, dtype=np.int64)),
        counters={},
        duration_s=(int(outcomes.finished_ns.max(initial=begin_ns)) - begin_ns) * 1e-9,
        facts={"device": recording.device, "model": recording.model, "started": recording.started},
        goals=goal_columns(
            np.array([kinds.index(goal) for goal in goals]), tuple(Slo(*kind) for kind in kinds)
        )
        if known
        else None,
    )


def _deployed(options: ClusterOptions, recording: Recording, console: Console) -> ClusterOptions:
    """With costs: what was measured, or asked for, or else the catalogue's nearest machine, and a warning."""
    if options.profile is not None:
        profile = read_profile(options.profile)
        if profile.threads != recording.threads:
            console.print(
                f"[yellow]Careful:[/] the profile is of {profile.threads} threads a worker, the recording of {recording.threads}."
            )
        return options
    if options.hardware is not None:
        return options
    console.print(
        f"[yellow]Careful:[/] without --profile, steps cost what the catalogue says of {FALLBACK}, not {escape(recording.device)}. "
        "`headrace profile` measures it.",
        highlight=False,
    )
    changes: dict[str, Any] = {"hardware": FALLBACK}
    if options.hosts is None:
        changes["hosts"] = {"instances": len(recording.instances)}
    return varied(options, changes, "the recording")


def _same_model(options: ClusterOptions, folder: Path) -> bool:
    return str(options.model) == str(read(folder / "cluster.yaml").get("model"))


def _what_if(
    options: ClusterOptions,
    config: dict[str, Any] | None,
    workload: Workload,
    vary: Sequence[str],
    seeds: range,
    told: str,
    jobs: int,
    skip_s: tuple[float, float],
) -> tuple[dict[str, RunData], Comparison | None]:
    """Each variant with all requests; and over several draws of them, for how sure a difference is."""
    others = [variant for variant in variants(options, vary) if variant.options != options] if vary else []
    if not others and workload.speedup is None:
        return {}, None
    found = [Variant(SIMULATED, options), *others]
    whole = [Job(variant, workload, range(1), 0, "", config, False) for variant in found]
    draws = [
        Job(variant, workload, seeds, seed, told, config, False)
        for seed in seeds
        for variant in found
        if len(seeds) > 1 and others
    ]
    runs = list(run_jobs([*whole, *draws], jobs))
    what_if = {run.name: run for run in runs[: len(whole)]}
    if not others:
        return what_if, None
    return what_if, compare_runs(runs[len(whole) :] if draws else runs[: len(whole)], skip_s)


def _show(console: Console, answer: Answer, told: str, skip_s: tuple[float, float]) -> None:
    if answer.what_if:
        reports = {name: summarize(run, skip_s) for name, run in answer.what_if.items()}
        console.print(_table(summarize(answer.live, skip_s), reports))
    if answer.comparison is not None:
        console.print(render_comparison(answer.comparison))
        console.print(f"[dim]{told}[/]")


def _table(live: RunReport, reports: dict[str, RunReport]) -> Table:
    """What if: all requests of the recording, once for each variant."""
    table = Table("What if", title="All requests of the recording", title_justify="left")
    columns = {"recorded, live": live} | {f"{name}, simulated": report for name, report in reports.items()}
    for name in columns:
        table.add_column(escape(name), justify="right")
    for metric in METRICS:
        values = [metric.of(report) for report in columns.values()]
        if any(values):
            table.add_row(
                metric.label, *("-" if v is None else value_as_text(v, metric.unit) for v in values)
            )
    return table


def _write(outputs: Outputs, answer: Answer, console: Console, skip_s: tuple[float, float]) -> None:
    if outputs.json is not None:
        figures = {
            "fidelity": answer.fidelity,
            "recorded": summarize(answer.live, skip_s),
            "simulated": summarize(answer.simulated, skip_s),
            "what_if": {name: summarize(run, skip_s) for name, run in answer.what_if.items()},
            "comparison": answer.comparison,
        }
        write(outputs.json, as_json(figures) + b"\n", console)
    if outputs.html is not None:
        write(outputs.html, _page(answer, skip_s).encode(), console)


def _page(answer: Answer, skip_s: tuple[float, float]) -> str:
    """The comparison with the fidelity below it; without one, the simulated recording."""
    from headrace.workload.compare_html import comparison_html  # plots take a second to load
    from headrace.workload.html import run_html

    if answer.comparison is not None:
        return comparison_html(answer.comparison, answer.fidelity)
    errors = {figure.label: f"{figure.error:+.1%}" for figure in answer.fidelity.figures}
    facts = {**answer.simulated.facts, "error against the recording": errors}
    return run_html(replace(answer.simulated, facts=facts), skip_s)

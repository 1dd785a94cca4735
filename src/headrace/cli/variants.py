"""Variants of a deployment, as `--vary key=a,b` names them, and their runs on several processes."""

import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from rich.console import Console

from headrace.cli.cluster import cluster_of
from headrace.cli.options import AXES, ClusterOptions, field_of, over, validated
from headrace.cli.simulate import play
from headrace.cli.workload import Workload, draw, split
from headrace.sim.cluster import Progress
from headrace.types.errors import ConfigError, HeadraceError
from headrace.types.outcomes import RunData, Series
from headrace.workload.report import progress_bar

SEEDS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    options: ClusterOptions


def variants(options: ClusterOptions, vary: Sequence[str]) -> list[Variant]:
    """Every combination, the first values first. Raises ConfigError naming the flag."""
    axes: list[tuple[str, list[Any]]] = []
    for text in vary:
        key, equals, values = text.partition("=")
        name = field_of(key.strip(), "--vary")
        if not equals or not values.strip():
            raise ConfigError(
                f"--vary {text}: give key=value,value, as in cluster.placement=least_load,round_robin"
            )
        if name not in ClusterOptions.model_fields:
            raise ConfigError(f"--vary {key}: a simulation does not read this setting")
        if name in (known for known, _ in axes):
            raise ConfigError(f"--vary {key} is given twice: name all its values at once")
        axes.append((name, split(values, f"--vary {key}")))
    return [
        _variant(options, dict(zip([name for name, _ in axes], chosen, strict=True)))
        for chosen in product(*(v for _, v in axes))
    ]


def varied(options: ClusterOptions, changes: Mapping[str, Any], source: str) -> ClusterOptions:
    """With these settings in place of its own. Raises ConfigError."""
    stated = {name: getattr(options, name) for name in options.model_fields_set}
    return validated(type(options), over(stated, dict(changes)), {}, source)


def _variant(options: ClusterOptions, changes: dict[str, Any]) -> Variant:
    text = {
        name: str(value) if name in AXES and not isinstance(value, dict) else value
        for name, value in changes.items()
    }
    name = " + ".join(
        _shown(value) if key in AXES else f"{key.replace('_', '-')}={_shown(value)}"
        for key, value in text.items()
    )
    return Variant(name, varied(options, text, "--vary"))


def _shown(value: Any) -> str:
    """As in a settings file, but shorter."""
    if not isinstance(value, dict):
        return str(value).lower() if isinstance(value, bool) else str(value)
    rest = ", ".join(f"{key}={_shown(each)}" for key, each in value.items() if key != "name")
    return f"{value['name']}({rest})" if "name" in value else f"({rest})"


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a variant with one seed of the workload."""

    variant: Variant
    workload: Workload
    seeds: range
    seed: int
    told: str = ""
    """What the seeds change, for reports."""
    config: dict[str, Any] | None = None
    outside: bool = True


def run_job(job: Job) -> RunData:
    """Without what the fleet looked like over time: a comparison does not show it."""
    trace = draw(job.workload, job.seeds, job.seed)
    run = play(job.variant.options, trace, job.seed, job.variant.name, config=job.config, outside=job.outside)
    settings = {**run.settings, "trace": job.workload.trace, "seeds": job.told}
    return replace(run, settings=settings, series=Series(run.series.at_ns[:0]))


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[RunData]:
    """In the order of the jobs, with a bar on standard error. Raises what a run raises."""
    if processes < 1:
        raise ConfigError(f"--jobs {processes}: at least 1")
    for variant in {job.variant.name: job for job in jobs}.values():
        cluster_of(variant.variant.options, variant.config)
    with progress_bar(Console(stderr=True), "runs") as progress:
        progress(0, len(jobs))
        runs = map(run_job, jobs) if processes == 1 or len(jobs) == 1 else _pooled(jobs, processes)
        yield from _counted(runs, len(jobs), progress)


def _pooled(jobs: Sequence[Job], processes: int) -> Iterator[RunData]:
    context = multiprocessing.get_context("spawn")
    quietly = (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the processes without a word of theirs
    with ProcessPoolExecutor(min(processes, len(jobs)), context, signal.signal, quietly) as pool:
        try:
            yield from pool.map(run_job, jobs)
        except BrokenProcessPool as error:
            raise HeadraceError(
                "a process died, of too little memory perhaps: lower --jobs or --requests"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _counted(runs: Iterator[RunData], total: int, progress: Progress) -> Iterator[RunData]:
    for done, run in enumerate(runs, 1):
        progress(done, total)
        yield run


def seeds_of(count: int, first: int) -> range:
    """Raises ConfigError."""
    if not 1 <= count <= SEEDS_MAX:
        raise ConfigError(f"--seeds {count}: from 1 to {SEEDS_MAX}")
    return range(first, first + count)

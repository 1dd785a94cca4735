"""`headrace compare`: variants of one deployment serve the same requests, seed by seed: who wins where, and is it beyond noise."""

from collections.abc import Sequence

from rich.console import Console

from headrace.cli.options import ClusterOptions
from headrace.cli.simulate import Outputs, write
from headrace.cli.variants import Job, run_jobs, seeds_of, variants
from headrace.cli.workload import Workload, variety
from headrace.types.errors import ConfigError
from headrace.workload.compare import Comparison, render_comparison
from headrace.workload.compare import compare as compare_runs


def compare(
    options: ClusterOptions,
    workload: Workload,
    vary: Sequence[str],
    outputs: Outputs,
    *,
    seeds: int = 5,
    seed: int = 0,
    jobs: int = 2,
    skip_s: tuple[float, float] = (0.0, 0.0),
) -> Comparison:
    """Show the comparison and write what was asked for. Raises ConfigError, Stuck."""
    outputs.check()
    found = variants(options, vary)
    if len(found) < 2:
        raise ConfigError(
            "nothing to compare: give --vary with several values, as in cluster.placement=least_load,round_robin"
        )
    numbers = seeds_of(seeds, seed)
    told = variety(workload, numbers)
    planned = [Job(variant, workload, numbers, number, told) for number in numbers for variant in found]
    comparison = compare_runs(run_jobs(planned, jobs), skip_s)
    console = Console()
    console.print(render_comparison(comparison))
    console.print(f"[dim]{told}[/]")
    if outputs.json is not None:
        write(outputs.json, comparison.to_json() + b"\n", console)
    if outputs.html is not None:
        from headrace.workload.compare_html import comparison_html  # plots take a second to load

        write(outputs.html, comparison_html(comparison).encode(), console)
    return comparison

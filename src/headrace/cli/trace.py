"""`headrace trace`: describe, generate, fit and convert workloads."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headrace.types.errors import ConfigError
from headrace.types.trace import Trace
from headrace.workload import generators, traces, transform
from headrace.workload.describe import describe as describe_trace
from headrace.workload.describe import tables
from headrace.workload.fit import Fit
from headrace.workload.fit import fit as fit_trace
from headrace.workload.reading import ReadReport
from headrace.workload.reuse import reuse
from headrace.workload.settings import pairs
from headrace.workload.traces.recorded import lines_of

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Describe, generate, fit and convert traces: who asks for what, and when.",
)

File = Annotated[str, typer.Argument(help="A trace: a path, or a name below the data folder", metavar="FILE")]
Format = Annotated[
    str | None, typer.Option("--format", help="One of the known formats [default: found from the first line]")
]
Data = Annotated[
    Path | None, typer.Option("--data", envvar="HEADRACE_DATA", help="Folder in which traces are looked for")
]
Sort = Annotated[bool, typer.Option("--sort", help="Put rows in order of time, in place of refusing them")]
Set = Annotated[list[str], typer.Option("--set", help="A setting, key=value; a part's is part.key=value")]
Json = Annotated[Path | None, typer.Option("--json", help="File for the figures")]
Out = Annotated[Path, typer.Option("--out", help="File to write, in Headrace's own form; .gz packs it")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same trace")]


@app.command()
def describe(
    file: File,
    format: Format = None,
    data: Data = None,
    sort: Sort = False,
    settings: Set = [],  # noqa: B006 (typer reads it)
    html: Annotated[Path | None, typer.Option("--html", help="File for a page with plots")] = None,
    json: Json = None,
) -> None:
    """Show what a trace is like: rates, lengths, burstiness, sessions, and what a prefix cache could serve."""
    trace, report = read(file, format, data, sort, settings)
    known = reuse(trace) if len(trace.hash_ids) else None
    found = describe_trace(trace, known)
    Console().print(tables(found, report))
    if json is not None:
        write(json, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    if html is not None:
        from headrace.workload.trace_page import trace_page  # plots take a second to load

        write(html, trace_page(trace, found, known, report).encode())


@app.command()
def generate(
    name: Annotated[str, typer.Argument(help="The generator", metavar="NAME")],
    out: Out,
    settings: Set = [],  # noqa: B006
    seed: Seed = 0,
    data: Data = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="JSON with settings, such as `trace fit --json` wrote; --set wins"),
    ] = None,
) -> None:
    """Make a trace by rule."""
    values = {**(_settings_of(config, name) if config is not None else {}), **pairs(settings)}
    trace = generators.generate(name, _found(values, data), seed)
    save(trace, out)


@app.command()
def fit(
    file: File,
    format: Format = None,
    data: Data = None,
    sort: Sort = False,
    settings: Set = [],  # noqa: B006
    window: Annotated[
        float, typer.Option("--window", help="Seconds for which rate and burstiness are taken as constant")
    ] = 1200.0,
    lengths: Annotated[str, typer.Option("--lengths", help="empirical or lognormal")] = "empirical",
    sessions: Annotated[
        bool | None,
        typer.Option(
            "--sessions/--no-sessions",
            help="Fit conversations [default: if a tenth of the requests are later turns]",
        ),
    ] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Find the generator's settings that give traces like this one, and say how like."""
    if lengths not in ("empirical", "lognormal"):
        raise ConfigError(f"--lengths {lengths}: is empirical or lognormal")
    trace, _ = read(file, format, data, sort, settings)
    kind = "lognormal" if lengths == "lognormal" else "empirical"
    found = fit_trace(trace, window_s=window, lengths=kind, sessions=sessions, seed=seed)
    console = Console()
    console.print(_fit_table(trace.name, found))
    for note in found.notes:
        console.print(note, markup=False)
    if json is not None:
        write(json, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
        console.print(
            f"headrace trace generate {found.generator} --config {json} --out FILE",
            markup=False,
            soft_wrap=True,
        )


@app.command()
def convert(
    file: File,
    out: Out,
    format: Format = None,
    data: Data = None,
    sort: Sort = False,
    settings: Set = [],  # noqa: B006
    rate: Annotated[float | None, typer.Option("--rate", help="Requests per second, on average")] = None,
    begin_s: Annotated[
        float | None, typer.Option("--begin", help="Leave out what comes before this second")
    ] = None,
    end_s: Annotated[
        float | None, typer.Option("--end", help="Leave out what comes from this second on")
    ] = None,
    sample: Annotated[
        float | None, typer.Option("--sample", help="Keep about this share; turns stay together")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="So many requests: cut, or repeated with blocks of their own"),
    ] = None,
    prompt_max: Annotated[int | None, typer.Option("--prompt-max", min=1, help="Cut longer prompts")] = None,
    output_max: Annotated[int | None, typer.Option("--output-max", min=1, help="Cut longer outputs")] = None,
    add: Annotated[list[str], typer.Option("--add", help="Another trace to merge in, by arrival")] = [],  # noqa: B006
    seed: Seed = 0,
) -> None:
    """Write a trace in Headrace's own form, changed as asked: part, sample, merge, rows, lengths, then rate."""
    trace, report = read(file, format, data, sort, settings)
    steps: list[tuple[bool, Callable[[Trace], Trace]]] = [
        (begin_s is not None or end_s is not None, lambda t: _part(t, begin_s, end_s)),
        (sample is not None, lambda t: transform.sample(t, sample or 0.0, seed)),
        (bool(add), lambda t: transform.merge([t, *(read(name, None, data, sort, [])[0] for name in add)])),
        (rows is not None, lambda t: _sized(t, rows or 1)),
        (
            prompt_max is not None or output_max is not None,
            lambda t: transform.clip(t, prompt_max, output_max),
        ),
        (rate is not None, lambda t: transform.at_rate(t, rate or 0.0)),
    ]
    for asked, step in steps:
        trace = step(trace) if asked else trace
    if not len(trace):
        raise ConfigError(f"{file}: nothing is left of it")
    for line in report.lines():
        Console().print(line, markup=False)
    save(trace, out)


def read(
    file: str, format: str | None, data: Path | None, sort: bool, settings: list[str]
) -> tuple[Trace, ReadReport]:
    """A trace by its name, with `--set` for the format's settings."""
    return traces.read(traces.find(file, data), format, sort=sort, **pairs(settings))


def save(trace: Trace, out: Path) -> None:
    """In Headrace's own form."""
    raw = b"".join(lines_of(trace))
    write(out, gzip.compress(raw, mtime=0) if out.suffix == ".gz" else raw)
    Console().print(f"wrote {len(trace):,} requests to {out}: {trace.name}", markup=False, soft_wrap=True)


def write(path: Path, raw: bytes) -> None:
    try:
        path.write_bytes(raw)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _part(trace: Trace, begin_s: float | None, end_s: float | None) -> Trace:
    end_ns = int(trace.arrival_ns[-1]) + 1 if end_s is None else round(end_s * 1e9)
    return transform.between(trace, round((begin_s or 0.0) * 1e9), end_ns)


def _sized(trace: Trace, rows: int) -> Trace:
    return (
        transform.rows_between(trace, 0, rows)
        if rows <= len(trace)
        else transform.tile(trace, rows, fresh=True)
    )


def _settings_of(path: Path, name: str) -> dict[str, Any]:
    """Settings from a JSON file: of a fit, or the settings themselves."""
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: is no JSON object with settings")
    if "generator" not in found:
        return found
    if found["generator"] != name:
        raise ConfigError(
            f"--config {path}: has settings of the generator {found['generator']}, not of {name}"
        )
    return found["settings"]


def _found(values: Any, data: Path | None) -> Any:
    """The settings with every `file` as a path that exists."""
    if not isinstance(values, dict):
        return values
    return {
        key: str(traces.find(value, data))
        if key == "file" and isinstance(value, str) and value
        else _found(value, data)
        for key, value in values.items()
    }


def _fit_table(name: str, found: Fit) -> Table:
    table = Table(
        "", "trace", "generated", "off by", title=escape(f"{name}: {found.generator}"), title_justify="left"
    )
    judged = found.quality
    shapes = [window.shape for window in found.windows]
    rates = [window.rate_per_s for window in found.windows]
    table.add_row("windows", f"{len(found.windows)}", "", "")
    table.add_row(
        "rate by window, requests/s",
        f"{min(rates):.3g} to {max(rates):.3g}",
        "",
        f"mean {judged.rate_error:+.1%}",
    )
    table.add_row(
        "Gamma shape by window",
        f"{min(shapes):.3g} to {max(shapes):.3g}",
        "",
        f"KS of gaps {judged.gap_ks:.3f}",
    )
    table.add_row(
        "CV of gaps", f"{judged.gap_cv:.3f}", f"{judged.generated_cv:.3f}", f"{judged.cv_error:+.1%}"
    )
    for side, of, ks, mean in (
        ("prompt", found.prompt, judged.prompt_ks, judged.prompt_mean_error),
        ("output", found.output, judged.output_ks, judged.output_mean_error),
    ):
        table.add_row(
            f"{side}, mean tokens",
            f"{of.mean:,.1f}",
            f"{of.mean * (1 + mean):,.1f}",
            f"{mean:+.1%}, KS {ks:.3f}",
        )
        nearest = f"median {of.lognormal_median:,.0f}, sigma {of.lognormal_sigma:.2f}"
        table.add_row(f"{side}, as a lognormal", nearest, "", f"KS {of.lognormal_ks:.3f}")
    return table

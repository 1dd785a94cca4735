"""The `headrace` command."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from headrace import __version__
from headrace.cli.flags import ClusterSource, LateGroup, RecordingSource, takes
from headrace.cli.options import ClusterOptions, EngineOptions, ServeOptions, SimulationOptions, WorkerOptions
from headrace.cli.quantize import quantize
from headrace.types.errors import ConfigError, HeadraceError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Headrace serves large language models with prefill and decode on separate workers. Every flag of serve and generate can be "
    "a key of a --config file, and a HEADRACE_* environment variable; flags win.",
)


Data = Annotated[
    Path | None, typer.Option("--data", envvar="HEADRACE_DATA", help="Folder in which traces are looked for")
]
Format = Annotated[
    str | None, typer.Option("--format", help="Of the trace \\[default: found from its first line]")
]
Sort = Annotated[bool, typer.Option("--sort", help="Put the trace in order of time, in place of refusing it")]
Requests = Annotated[
    int | None,
    typer.Option("--requests", min=1, help="So many: the trace's first, or the trace again and again"),
]
Rate = Annotated[float | None, typer.Option("--rate", help="Requests per second, on average")]
Speedup = Annotated[float | None, typer.Option("--speedup", help="The trace so many times as fast")]
TtftGoal = Annotated[float | None, typer.Option("--ttft-ms", min=0, help="Milliseconds, for goodput")]
TpotGoal = Annotated[float | None, typer.Option("--tpot-ms", min=0, help="Milliseconds, for goodput")]
Skip = Annotated[
    tuple[float, float],
    typer.Option("--skip", help="Leave out so many seconds at the begin and at the end of a run"),
]
VARY = "A setting and its values, as in cluster.placement=least_load,round_robin; several: every combination"
Vary = Annotated[list[str], typer.Option("--vary", help=VARY)]
Seeds = Annotated[
    int, typer.Option("--seeds", help="So many draws of the requests, the same for all variants")
]
Jobs = Annotated[int, typer.Option("--jobs", help="Processes")]
Json = Annotated[Path | None, typer.Option("--json", help="File for all figures")]
Html = Annotated[Path | None, typer.Option("--html", help="File for one page with plots, nothing beside it")]


def log_to_stderr(level: int = logging.INFO) -> None:
    console = Console(stderr=True)
    logging.basicConfig(
        level=level,
        format="%(message)s" if console.is_terminal else "%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[RichHandler(console=console, show_path=False)] if console.is_terminal else None,
    )


@app.command()
@takes(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Serve a model with the OpenAI API.

    Without MODEL the small bundled one, which completes Python.
    """
    from headrace.cli.serve import serve as command

    log_to_stderr()
    uvloop.run(command(options))


@app.command()
@takes(WorkerOptions)
def worker(options: WorkerOptions) -> None:
    """Join a service from another host, as one more worker of it.

    On the first host: headrace serve MODEL --listen 10.0.0.1:7000 --secret-file secret

    On others: headrace worker MODEL --join 10.0.0.1:7000 --secret-file secret --leaning decode

    The secret is any long text that all hosts share, as of `openssl rand -hex 32`. Model, dtype, block size and length must be those
    of the service, or it says which differs. SIGTERM ends the worker in order.
    """
    from headrace.cli.join import join as command

    log_to_stderr()
    command(options)


@app.command()
@takes(EngineOptions)
def generate(
    options: EngineOptions,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="File with a prompt a line, or JSONL with request bodies \\[default: stdin]"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="JSONL file to write \\[default: stdout]")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="New tokens per prompt")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: greedy")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1)] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same text")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Continuations per prompt")] = 1,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Do not stop at the end-of-text token")
    ] = False,
) -> None:
    """Complete prompts from a file, without a server.

    A line that is a JSON object is a /v1/completions body; any other line is a prompt.
    """
    from headrace.cli.generate import generate as command

    log_to_stderr(logging.WARNING)
    defaults = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "n": n,
        "ignore_eos": ignore_eos,
    }
    if seed is not None:
        defaults["seed"] = seed
    uvloop.run(command(options, prompts, output, defaults))


@app.command()
def bench(
    url: Annotated[
        str, typer.Option("--url", help="The server, with or without /v1")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option("--model", help="\\[default: the first one that the server lists]")
    ] = None,
    endpoint: Annotated[str, typer.Option("--endpoint", help="completions or chat")] = "completions",
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="HEADRACE_API_KEY")] = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1)] = 100,
    request_rate: Annotated[
        float, typer.Option("--request-rate", help="Requests per second (Poisson); inf: all at once")
    ] = float("inf"),
    max_concurrency: Annotated[int | None, typer.Option("--max-concurrency", min=1)] = None,
    input_len: Annotated[int, typer.Option("--input-len", min=1, help="Tokens of a prompt")] = 128,
    output_len: Annotated[int, typer.Option("--output-len", min=1, help="Tokens of an answer")] = 64,
    range_ratio: Annotated[
        float, typer.Option("--range-ratio", min=0, max=1, help="Lengths vary by this share")
    ] = 0.0,
    prefix_len: Annotated[
        int, typer.Option("--prefix-len", min=0, help="Leading tokens that all prompts share")
    ] = 0,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Prompts from a file in place of random tokens")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0)] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed is the same load")] = 0,
    ttft_goal: Annotated[float | None, typer.Option("--ttft-goal", help="Milliseconds, for goodput")] = None,
    tpot_goal: Annotated[float | None, typer.Option("--tpot-goal", help="Milliseconds, for goodput")] = None,
    save: Annotated[Path | None, typer.Option("--save", help="JSON file for the result")] = None,
) -> None:
    """Load an OpenAI-compatible server and measure it: TTFT, TPOT, ITL, throughput."""
    from headrace.cli.bench import bench as command
    from headrace.workload.load import Goals, LoadConfig

    if endpoint not in ("completions", "chat"):
        raise typer.BadParameter("--endpoint is completions or chat")
    config = LoadConfig(
        url=url,
        endpoint="chat" if endpoint == "chat" else "completions",
        model=model,
        api_key=api_key,
        prompts=num_prompts,
        request_rate=request_rate,
        concurrency=max_concurrency,
        input_tokens=input_len,
        output_tokens=output_len,
        spread=range_ratio,
        prefix_tokens=prefix_len,
        text=prompts,
        temperature=temperature,
        seed=seed,
        goals=Goals(ttft_ms=ttft_goal, tpot_ms=tpot_goal),
    )
    uvloop.run(command(config, save))


@app.command()
@takes(SimulationOptions, (), ClusterSource())
def simulate(
    options: SimulationOptions,
    file: Path | None,
    data: Data = None,
    format: Format = None,
    sort: Sort = False,
    requests: Requests = None,
    rate: Rate = None,
    speedup: Speedup = None,
    ttft_ms: TtftGoal = None,
    tpot_ms: TpotGoal = None,
    seed: Annotated[int, typer.Option("--seed", help="Of a generator, and of policies that draw")] = 0,
    skip: Skip = (0.0, 0.0),
    every_step: Annotated[
        bool,
        typer.Option("--every-step", help="Run each step by itself: the same figures, to the bit, later"),
    ] = False,
    json: Json = None,
    html: Html = None,
    perfetto: Annotated[
        Path | None, typer.Option("--perfetto", help="File for a sample of requests, for ui.perfetto.dev")
    ] = None,
    perfetto_requests: Annotated[int, typer.Option("--perfetto-requests", min=1)] = 2000,
) -> None:
    """Serve a trace on virtual time: the same scheduler, router and pools as serve, with steps and links that only take time.

    headrace simulate h100-1p1d --trace synthetic:rate=10,requests=2000 --html run.html
    """
    from headrace.cli.simulate import Outputs, Workload
    from headrace.cli.simulate import simulate as command

    command(
        options,
        Workload(options.trace or "", data, format, sort, requests, rate, speedup, ttft_ms, tpot_ms),
        Outputs(json=json, html=html, perfetto=perfetto, perfetto_requests=perfetto_requests),
        name=file.stem if file is not None else "simulation",
        seed=seed,
        every_step=every_step,
        skip_s=skip,
    )


@app.command()
@takes(SimulationOptions, (), ClusterSource())
def compare(
    options: SimulationOptions,
    vary: Vary,
    data: Data = None,
    format: Format = None,
    sort: Sort = False,
    requests: Requests = None,
    rate: Rate = None,
    speedup: Speedup = None,
    ttft_ms: TtftGoal = None,
    tpot_ms: TpotGoal = None,
    seeds: Seeds = 5,
    seed: Annotated[int, typer.Option("--seed", help="The first of them")] = 0,
    jobs: Jobs = 2,
    skip: Skip = (0.0, 0.0),
    json: Json = None,
    html: Html = None,
) -> None:
    """Compare variants of a deployment on the same requests: who wins where, and whether it is beyond noise.

    headrace compare h100-16-mixed --trace conversations:conversations=500 --vary cluster.placement=least_load,round_robin --html page.html
    """
    from headrace.cli.compare import compare as command
    from headrace.cli.simulate import Outputs, Workload

    command(
        options,
        Workload(options.trace or "", data, format, sort, requests, rate, speedup, ttft_ms, tpot_ms),
        vary,
        Outputs(json=json, html=html),
        seeds=seeds,
        seed=seed,
        jobs=jobs,
        skip_s=skip,
    )


@app.command()
@takes(ClusterOptions, (), RecordingSource())
def replay(
    options: ClusterOptions,
    folder: Path,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Feed each core's journal to a fresh core: all it said must come again"
        ),
    ] = False,
    vary: Annotated[list[str], typer.Option("--vary", help=VARY)] = [],  # noqa: B006 (typer reads it)
    speedup: Speedup = None,
    seeds: Seeds = 5,
    jobs: Jobs = 2,
    skip: Skip = (0.0, 0.0),
    json: Json = None,
    html: Html = None,
) -> None:
    """What if: simulate what serve --record kept, as it was served, and under other settings; with the error of the simulation.

    headrace replay recording --profile profile.json --vary placement=round_robin,power_of_two --html what-if.html
    """
    if verify:
        from headrace.cli.verify import verify_recording

        sys.exit(0 if verify_recording(folder, Console()) else 1)
    from headrace.cli.replay import replay as command
    from headrace.cli.simulate import Outputs

    outputs = Outputs(json=json, html=html)
    command(options, folder, vary, outputs, speedup=speedup, seeds=seeds, jobs=jobs, skip_s=skip)


app.add_typer(
    typer.Typer(cls=LateGroup, no_args_is_help=True),
    name="trace",
    help="Describe, generate, fit and convert traces: who asks for what, and when.",
)


weights = typer.Typer(no_args_is_help=True)
app.add_typer(weights, name="weights", help="New weights for a running service.")


@weights.command("push")
def push_command(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder with the new weights")],
    url: Annotated[
        str, typer.Option("--url", help="The server, with or without /v1")
    ] = "http://127.0.0.1:8000",
    key: Annotated[
        str, typer.Option("--push-key", envvar="HEADRACE_PUSH_KEY", help="As given to serve")
    ] = "",
    running: Annotated[
        str,
        typer.Option("--running", help="keep: running sequences keep their KV; recompute: it is made anew"),
    ] = "keep",
    hold: Annotated[
        float, typer.Option("--hold", min=0, help="Seconds that new requests may wait for handovers to end")
    ] = 2.0,
    api_key: Annotated[str, typer.Option("--api-key", envvar="HEADRACE_API_KEY")] = "",
) -> None:
    """Update a running service in place: no restart, no request dropped, old KV never under new weights.

    headrace weights push checkpoints/step-200 --url http://127.0.0.1:8000 --push-key KEY
    """
    from headrace.cli.push import push_weights
    from headrace.types.weights import Running

    if running not in ("keep", "recompute"):
        raise typer.BadParameter("--running is keep or recompute")
    report = push_weights(model, url, key=key, running=Running(running), hold_s=hold, api_key=api_key)
    pushed = report.pushed
    Console().print(
        f"version {pushed.version} ({pushed.fingerprint[:12]}): {report.nbytes / 2**20:.0f} MiB written in {report.write_s:.2f} s "
        f"({report.nbytes / 1e9 / max(report.write_s, 1e-9):.2f} GB/s), in use {report.commit_s:.2f} s later; new starts waited "
        f"{pushed.held_ms:.0f} ms, {pushed.kept} sequences kept their KV, {pushed.recomputed} are computed again",
        highlight=False,
    )


app.command()(quantize)


@app.command()
@takes(EngineOptions)
def profile(
    options: EngineOptions,
    out: Annotated[Path, typer.Option("--out", help="File to write")] = Path("profile.json"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes, in a fraction of the time")] = False,
) -> None:
    """Measure the live engine on this machine: what steps, copies and messages cost, for simulations of it."""
    from headrace.cli.profile import profile as command

    log_to_stderr(logging.WARNING)
    uvloop.run(command(options, out, quick))


@app.command()
def fuzz(
    seeds: Annotated[str, typer.Option("--seeds", help="A:B, the seeds from A on and before B")] = "0:1000",
    jobs: Jobs = 2,
    seed: Annotated[int | None, typer.Option("--seed", help="Only this one")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Print every event and command of --seed")] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Do not stop at the first that fails")
    ] = False,
    json: Json = None,
) -> None:
    """Run simulated deployments in which things go wrong, with every rule checked at every event, until one breaks."""
    from headrace.cli.fuzz import fuzz as command

    sys.exit(command(seeds, jobs, seed, trace=trace, keep_going=keep_going, json=json))


@app.command()
def demo(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder \\[default: the bundled one]")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="New tokens per prompt")] = 160,
) -> None:
    """Show the main job: a real server, real prompts, where the time goes, and a worker killed in mid-stream."""
    try:
        from headrace.cli.demo import demo as command
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the demo's client needs the package {error.name}: pip install {error.name}"
        ) from error

    uvloop.run(command(model, tokens))


@app.command()
def version() -> None:
    """Print the version."""
    sys.stdout.write(f"headrace {__version__}\n")


def main() -> None:
    """What a user can mend ends with its message and exit code 2."""
    try:
        app()
    except HeadraceError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]headrace:[/] {escape(str(error))}", highlight=False
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

"""What simulations are asked to serve: a trace from a file or a generator, the part of it and the rate, and other draws of it by seed."""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from headrace.types.errors import ConfigError
from headrace.types.request import Slo
from headrace.types.trace import Trace
from headrace.workload import generators, traces, transform
from headrace.workload.settings import pairs

SHORT = {"rate": "arrivals.rate_per_s", "output": "output.median", "prompt": "prompt.median"}
"""Settings of generators by the names that come to mind first."""
HALF = 0.5


@dataclass(frozen=True, slots=True)
class Workload:
    trace: str
    """A file, a name below the data folder, or a generator with its settings: `synthetic:rate=5,requests=1000`."""
    data: Path | None = None
    format: str | None = None
    sort: bool = False
    requests: int | None = None
    rate: float | None = None
    """Requests per second, on average."""
    speedup: float | None = None
    ttft_ms: float | None = None
    """Goals."""
    tpot_ms: float | None = None

    @property
    def generator(self) -> str | None:
        """Its name, if the trace is made by one."""
        name = self.trace.partition(":")[0]
        return name if name in generators.names() and not Path(self.trace).exists() else None


def load(workload: Workload, seed: int = 0) -> tuple[Trace, list[str]]:
    """All of the trace, its part not yet taken, and what there is to say of its rows. The seed is a generator's. Raises ConfigError."""
    if workload.rate is not None and workload.speedup is not None:
        raise ConfigError("--rate and --speedup both change the times; give one")
    if workload.trace.strip() == "":
        raise ConfigError(
            "what is it to serve? --trace names a file, a name below the data folder, or a generator such as synthetic:rate=5,requests=1000"
        )
    if workload.generator is None:
        trace, report = traces.read(
            traces.find(workload.trace, workload.data), workload.format, sort=workload.sort
        )
        return trace, list(report.lines())
    return generators.generate(workload.generator, _settings(workload), seed), []


def part(workload: Workload, trace: Trace, begin: int = 0) -> Trace:
    """So many requests as are asked for, from row `begin`, at the rate and with the goals asked for."""
    rows = workload.requests
    if rows is not None:
        whole = rows > len(trace)
        trace = (
            transform.tile(trace, rows, fresh=True)
            if whole
            else transform.rows_between(trace, begin, begin + rows)
        )
    if workload.rate is not None:
        trace = transform.at_rate(trace, workload.rate)
    if workload.speedup is not None:
        trace = transform.faster(trace, workload.speedup)
    if workload.ttft_ms is not None or workload.tpot_ms is not None:
        trace = transform.with_goal(trace, Slo(_ns(workload.ttft_ms), _ns(workload.tpot_ms)))
    return trace


def draw(workload: Workload, seeds: range, seed: int) -> Trace:
    """The requests of one seed of several. `variety` says how they differ."""
    trace, _ = load(workload, seed)
    if workload.generator is not None or len(seeds) == 1:
        return part(workload, trace)
    if _sliced(workload, trace):
        assert workload.requests is not None
        room = len(trace) - workload.requests
        return part(workload, trace, room * seeds.index(seed) // (len(seeds) - 1))
    rate = trace.duration_ns and (len(trace) - 1) * 1e9 / trace.duration_ns
    half = transform.sample(trace, HALF, seed)
    if len(half) < 2 or not half.duration_ns or not rate:
        raise ConfigError(
            f"{trace.name} is too short to draw {len(seeds)} different halves of; give --seeds 1"
        )
    half = replace(transform.at_rate(half, rate), name=f"{trace.name}, half {seed}")
    return part(workload, replace(half, arrival_ns=half.arrival_ns - half.arrival_ns[0]))


def variety(workload: Workload, seeds: range) -> str:
    """What the seeds change."""
    if workload.generator is not None:
        return "Each seed is another trace of the same generator."
    if len(seeds) == 1:
        return "One seed: the trace as it is."
    trace, _ = load(workload)
    if not _sliced(workload, trace):
        return (
            "Each seed is another half of the trace's conversations, as dense as all of them were; what one half gives differs from the "
            "next as it would between fresh traces of the whole length."
        )
    rows = workload.requests or 0
    apart = (len(trace) - rows) // (len(seeds) - 1)
    overlap = "they do not overlap" if apart >= rows else "they overlap, so the intervals are too narrow"
    return f"Each seed is another {rows:,} requests of the trace's {len(trace):,}, in a row; {overlap}."


def check_lengths(trace: Trace, length_max: int | None) -> None:
    """Raises ConfigError if a request is longer than the model, or than --max-model-len."""
    if length_max is None or not len(trace):
        return
    tokens = trace.prompt + trace.output
    over = (tokens > length_max).nonzero()[0]
    if len(over):
        row = int(over[0])
        raise ConfigError(
            f"{len(over):,} of {len(trace):,} requests are longer than a sequence may be ({length_max:,} tokens), the first is row "
            f"{row} with {int(trace.prompt[row]):,} in and {int(trace.output[row]):,} out: clip them "
            "(headrace trace convert --prompt-max, --output-max), or take a longer --max-model-len, or another model"
        )


def split(text: str, where: str) -> list[Any]:
    """Values between commas, as YAML has them in a list: `a,b`, `1,2`, `{name: a, x: 1},b`. Raises ConfigError."""
    try:
        found = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {text!r} are no values between commas") from error
    return found


def _sliced(workload: Workload, trace: Trace) -> bool:
    """Seeds are parts of it that lie elsewhere."""
    return workload.requests is not None and 2 * workload.requests <= len(trace)


def _settings(workload: Workload) -> dict[str, Any]:
    """Of the generator."""
    name, _, text = workload.trace.partition(":")
    stated: list[str] = []
    for piece in _pieces(text):
        key, equals, value = piece.partition("=")
        if not equals:
            raise ConfigError(f"--trace {workload.trace}: {piece!r} is no key=value")
        stated.append(f"{SHORT.get(key.strip(), key.strip())}={value.strip()}")
    values = pairs(stated)
    fields = import_module(f"headrace.workload.generators.{name}").Config.__struct_fields__
    if workload.requests is not None and "requests" in fields:
        values["requests"] = workload.requests
    return _found(values, workload.data)


def _pieces(text: str) -> list[str]:
    """Between commas that are in no bracket."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece for piece in pieces if piece.strip()]


def _found(values: Any, data: Path | None) -> Any:
    """The settings with every `file` as a path that exists."""
    if not isinstance(values, dict):
        return values
    return {
        key: str(traces.find(value, data))
        if key == "file" and isinstance(value, str)
        else _found(value, data)
        for key, value in values.items()
    }


def _ns(milliseconds: float | None) -> int | None:
    return None if milliseconds is None else round(milliseconds * 1e6)

"""The metrics by which runs are compared with each other: which figure of a report, in what unit, and which way is better."""

from collections.abc import Callable

import msgspec

from headrace.workload.report import RunReport, Spread


class Metric(msgspec.Struct, frozen=True):
    """One figure of a report; None where the run has none."""

    key: str
    label: str
    unit: str
    lower_is_better: bool
    of: Callable[[RunReport], float | None]


def _latency(name: str, label: str, part: str, part_label: str) -> Metric:
    def of(report: RunReport) -> float | None:
        spread: Spread | None = getattr(report, f"{name}_ms")
        return None if spread is None else getattr(spread, part)

    return Metric(f"{name}_{part}_ms", f"{label}, {part_label}", "ms", True, of)


LATENCIES = tuple(
    _latency(name, label, part, part_label)
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "End to end"))
    for part, part_label in (("mean", "mean"), ("median", "P50"), ("p90", "P90"), ("p99", "P99"))
)
THROUGHPUT = Metric("output_tokens_per_s", "Throughput", "tokens/s", False, lambda r: r.output_tokens_per_s)
GOODPUT = Metric("goodput_per_s", "Goodput", "requests/s", False, lambda r: r.goodput_per_s)


def share_lost(report: RunReport) -> float | None:
    """Of requests: those that failed or did not end."""
    lost = report.failed + report.unfinished
    asked = report.completed + lost
    return lost / asked * 100 if asked else None


def share_cached(report: RunReport) -> float | None:
    return report.cached_tokens / report.input_tokens * 100 if report.input_tokens else None


METRICS = (
    *(metric for metric in LATENCIES if not metric.key.endswith("p90_ms")),
    THROUGHPUT,
    GOODPUT,
    Metric("lost_share", "Failed or unfinished", "%", True, share_lost),
    Metric("cached_share", "Prompt tokens cached", "%", False, share_cached),
    Metric("bytes_moved", "KV moved", "GiB", True, lambda report: report.bytes_moved / 2**30),
    Metric("recomputed_tokens", "Tokens recomputed", "tokens", True, lambda r: float(r.recomputed_tokens)),
)
"""What `compare` compares."""


def number_as_text(value: float) -> str:
    """At least three digits."""
    digits = max(0, 3 - len(f"{abs(value):.0f}")) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def value_as_text(value: float, unit: str) -> str:
    return f"{number_as_text(value)} {unit}"

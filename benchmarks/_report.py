"""The form of a benchmark's result, and how it is timed: warmed up, in interleaved pairs, medians of many."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor, cores, memory and kernel, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"
    )
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {gib:.0f} GiB, Linux {platform.release()}"


def commit() -> str:
    """The commit measured; "+" if the tree has changes beyond results."""
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return (head or "unknown") + ("+" if changed else "")


def target(what: str, values: list[float], unit: str, goal: str, *, met: bool) -> dict[str, Any]:
    """A figure with its goal: the median of `values`, lowest and highest."""
    return {
        "what": what,
        "value": round(statistics.median(values), 4),
        "low": round(min(values), 4),
        "high": round(max(values), 4),
        "unit": unit,
        "goal": goal,
        "met": met,
    }


def write(
    name: str, figures: dict[str, Any], targets: list[dict[str, Any]], peers: dict[str, Any], notes: str
) -> None:
    """Print the targets and write `results/NAME.json`."""
    result = {
        "name": name,
        "command": f"make bench NAME={name}" + (f' ARGS="{" ".join(sys.argv[1:])}"' if sys.argv[1:] else ""),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | _versions("torch", "transformers", "numpy", "msgspec"),
        "figures": figures,
        "targets": targets,
        "peers": peers,
        "notes": notes,
    }
    for t in targets:
        mark = "met" if t["met"] else "MISSED"
        print(f"{t['what']}: {t['value']} {t['unit']} ({t['low']} to {t['high']}), goal {t['goal']}: {mark}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def seconds(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started


def pairs(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, one warm-up each, then in turn, so that a noisy neighbour disturbs both alike."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        times[0].append(seconds(first))
        times[1].append(seconds(second))
    return times


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _versions(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}

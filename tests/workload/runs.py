"""Runs drawn from known distributions, for reports: no simulator is needed."""

import numpy as np

from headrace.types.outcomes import Outcomes, RunData, Series


def drawn_run(
    name: str = "round_robin",
    seed: int = 0,
    rows: int = 1_000,
    *,
    rate: float = 20.0,
    instances: int = 8,
    samples: int = 120,
    slower: float = 1.0,
    goals: bool = False,
) -> RunData:
    """A simulated run. The same seed gives the same requests; `slower` multiplies their latencies."""
    rng = np.random.default_rng(seed)
    outcomes = Outcomes.empty(rows, tuple(f"instance-{i}" for i in range(instances)))
    outcomes.arrival_ns[:] = np.cumsum(rng.exponential(1e9 / rate, rows))
    outcomes.prompt[:] = np.maximum(rng.lognormal(6.5, 1.0, rows), 1)
    outcomes.output[:] = np.maximum(rng.lognormal(5.0, 0.8, rows), 1)
    outcomes.cached[:] = outcomes.prompt * rng.beta(1, 3, rows)
    ttft_ns = (rng.lognormal(-1.5, 0.6, rows) * slower * 1e9).astype(np.int64)
    tpot_ns = (rng.lognormal(-3.6, 0.25, rows) * slower * 1e9).astype(np.int64)
    outcomes.placed_ns[:] = outcomes.arrival_ns + 1_000_000
    outcomes.prefill_ns[:] = outcomes.arrival_ns + ttft_ns // 3
    outcomes.first_ns[:] = outcomes.arrival_ns + ttft_ns
    outcomes.joined_ns[:] = outcomes.first_ns + 2_000_000
    outcomes.finished_ns[:] = outcomes.first_ns + tpot_ns * (outcomes.output - 1)
    outcomes.bytes_moved[:] = (outcomes.prompt - outcomes.cached) * 131_072
    outcomes.attempts[:] = 1 + (rng.random(rows) < 0.01)
    outcomes.recomputed[:] = np.where(outcomes.attempts > 1, outcomes.prompt, 0)
    outcomes.prefill[:] = rng.integers(0, max(instances // 2, 1), rows)
    outcomes.decode[:] = rng.integers(instances // 2, instances, rows)
    for row in np.flatnonzero(rng.random(rows) < 0.01)[:2_000]:
        outcomes.fail(int(row), "instance crashed" if row % 3 else "deadline")
    begin, end = (int(outcomes.arrival_ns.min()), int(outcomes.finished_ns.max())) if rows else (0, 0)
    run = RunData(
        name=name,
        seed=seed,
        clock="virtual",
        outcomes=outcomes,
        series=drawn_series(rng, begin, end, samples, instances),
        counters={"preemptions": 12, "transfer_bytes": int(outcomes.bytes_moved.sum())},
        duration_s=(end - begin) * 1e-9,
        settings={"cluster": {"placement": name, "instances": instances}, "model": "llama-3.1-8b"},
        facts={
            "cost_model": "catalogue H100",
            "cost_error": {"prefill": 0.041, "decode": 0.032},
            "events": rows,
        },
    )
    if goals:
        run.goals = np.full(rows, 400_000_000), np.full(rows, 30_000_000)
    return run


def drawn_series(rng: np.random.Generator, begin: int, end: int, samples: int, instances: int) -> Series:
    """Pools that fill, queues that grow in the middle, transfers, and instances that change their leaning."""
    at = np.linspace(begin, end, samples)
    hill = np.sin(np.linspace(0, np.pi, samples))[:, None]
    leaning = np.rint(instances * (0.3 + 0.2 * hill[:, 0]))
    return Series(
        at_ns=at.astype(np.int64),
        values={
            "kv_used": np.clip(hill * 0.7 + rng.normal(0, 0.1, (samples, instances)), 0, 1),
            "waiting": rng.poisson(hill * 3, (samples, instances)).astype(float),
            "running": rng.poisson(5 + hill * 20, (samples, instances)).astype(float),
            "receiving": rng.poisson(hill * 2, (samples, instances)).astype(float),
            "bytes_in_flight": rng.gamma(2, 1e8, samples) * hill[:, 0],
            "leaning_prefill": leaning,
            "leaning_decode": instances - leaning - 1,
            "leaning_mixed": np.ones(samples),
        },
    )
